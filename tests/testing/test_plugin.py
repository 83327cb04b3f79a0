"""The pytest plugin, on applications with real mistakes: it finds them, its line replays them, and the right ones pass."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.testing.installed import PLUGIN_OPTIONS

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parents[2]

APP = '''
import json

import walbatch as wb

CATALOGUE = "/app/catalogue"


class Shop:
    """Keeps a list of its articles in a file of its own, and submits their prices."""

    sync_files = True
    sync_names = True
    write_first = True

    def __init__(self, process):
        self.process, self.fs = process, process.fs
        self.fs.make_directory("/app")
        self.fs.sync_directory("/")
        self.engine = wb.Engine.open(
            "/app/queue",
            {"price": wb.Lane(process.database("price"), trigger=wb.Trigger(linger_ms=1))},
            settings=wb.Settings(segment_bytes=4096, disk_bytes_max=2**24, timer_ms=5, checkpoint_ms=20),
            environment=process.environment,
        )

    def articles(self):
        if not self.fs.exists(CATALOGUE):
            return {}
        file = self.fs.open_read(CATALOGUE)
        try:
            return json.loads(file.read(file.size(), 0))
        finally:
            file.close()

    def set_price(self, name, price):
        """When it returns, both the list and the price survive."""
        if self.write_first:
            self._list(name, price)
        self.engine.submit("price", key=name.encode(), payload=b"%d" % price)
        if not self.write_first:
            self._list(name, price)

    def _list(self, name, price):
        temporary = CATALOGUE + ".new"
        if self.fs.exists(temporary):
            self.fs.unlink(temporary)
        file = self.fs.create(temporary)
        file.write([json.dumps(self.articles() | {name: price}).encode()], 0)
        if self.sync_files:
            file.datasync()
        file.close()
        self.fs.rename(temporary, CATALOGUE)
        if self.sync_names:
            self.fs.sync_directory("/app")

    def close(self):
        self.engine.close()


def use(process, **mistakes):
    shop = Shop(process)
    vars(shop).update(mistakes)
    for name, price in {"apple": 3, "pear": 4}.items():
        shop.set_price(name, price)
        process.promise((name, price))
    shop.close()


def check(process):
    shop = Shop(process)
    listed = shop.articles()
    shop.close()
    for name, price in process.promises:
        assert listed[name] == price
        assert process.content("price")[name.encode()] == b"%d" % price
    for name in process.content("price"):
        assert name.decode() in listed
'''

TEST = """
import app


def test_the_shop(crash_points):
    report = crash_points(lambda process: app.use(process{mistakes}), app.check, states=400)
    assert report.checks >= 1
"""


def shop(pytester: pytest.Pytester, mistakes: str = "", *options: str) -> pytest.RunResult:
    pytester.makepyfile(app=APP, test_shop=TEST.replace("{mistakes}", mistakes))
    return pytester.runpytest(*PLUGIN_OPTIONS, "-p", "no:cacheprovider", *options)


def test_an_application_that_keeps_its_promises_passes(pytester: pytest.Pytester) -> None:
    result = shop(pytester, "", "-rP")
    result.assert_outcomes(passed=1)
    result.stdout.re_match_lines([r".*\d+ crash points, \d+ states, \d+ checks in .* s"])


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        ("sync_files", r"JSONDecodeError|KeyError"),
        ("sync_names", r"KeyError|AssertionError"),
        ("write_first", r"AssertionError"),
    ],
)
def test_an_application_with_a_mistake_fails_and_its_line_replays_just_that(
    pytester: pytest.Pytester, mistake: str, says: str
) -> None:
    result = shop(pytester, f", {mistake}=False")
    result.assert_outcomes(failed=1)
    output = result.stdout.str()
    assert re.search(rf"the check fails: ({says})", output)
    assert "promised by then: " in output
    (line,) = set(re.findall(r"--walbatch-replay '([^']+)'", output))
    again = shop(pytester, f", {mistake}=False", "--walbatch-replay", line)
    again.assert_outcomes(failed=1)
    assert re.search(rf"the check fails: ({says})", again.stdout.str())
    fixed = shop(pytester, "", "--walbatch-replay", line)
    assert "the check fails" not in fixed.stdout.str()


BACKEND = '''
import walbatch as wb


class Archive:
    """A backend that appends each operation to a file; `sync` says whether it is durable when it answers."""

    def __init__(self, fs, sync):
        self.fs, self.sync = fs, sync

    def apply(self, batch):
        for operation in batch:
            path = "/archive/%d" % operation.lsn
            if self.fs.exists(path):
                self.fs.unlink(path)
            file = self.fs.create(path)
            file.write([operation.payload], 0)
            if self.sync:
                file.datasync()
            file.close()
        if self.sync:
            self.fs.sync_directory("/archive")


def opened(process, sync):
    process.fs.make_directory("/archive")
    process.fs.sync_directory("/")
    return wb.Engine.open(
        "/store", {"put": wb.Lane(Archive(process.fs, sync), trigger=wb.Trigger(linger_ms=1))},
        settings=wb.Settings(segment_bytes=4096, disk_bytes_max=2**24, timer_ms=5, checkpoint_ms=20),
        environment=process.environment,
    )


def run(crash_points, sync):
    def use(process):
        engine = opened(process, sync)
        for number in range(3):
            process.promise(engine.submit("put", key=b"k", payload=b"%d" % number).lsn)
            process.pause(0.05)
        engine.close()

    def check(process):
        engine = opened(process, sync)
        engine.close()
        found = {int(name) for name in process.fs.list_directory("/archive")}
        assert set(process.promises) <= found

    crash_points(use, check, states=300)


def test_durable(crash_points):
    run(crash_points, sync=True)


def test_too_early(crash_points):
    run(crash_points, sync=False)
'''


def test_a_backend_that_answers_before_it_is_durable_is_found(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(BACKEND)
    result = pytester.runpytest(*PLUGIN_OPTIONS, "-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["FAILED *test_too_early*"])


def test_what_the_life_raises_is_not_called_a_crash(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import walbatch as wb

        def use(process):
            engine = wb.Engine.open("/store", {"put": wb.Lane(None)}, environment=process.environment)
            raise KeyError("a mistake of the life")

        def test_it(crash_points):
            crash_points(use, lambda process: None)
    """)
    result = pytester.runpytest(*PLUGIN_OPTIONS, "-p", "no:cacheprovider")
    result.assert_outcomes(failed=1)
    assert "KeyError: 'a mistake of the life'" in result.stdout.str()
    assert "--walbatch-replay" not in result.stdout.str()


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--walbatch-replay", "crash=1", "not the line of a failure"),
        ("--walbatch-replay", "seed=0 strict=1 images=8 crash=3 image=power/999", "has no image 'power/999'"),
        ("--walbatch-crash-states", "many", "must be a number from 1 on, or 'all'"),
    ],
)
def test_a_wrong_option_says_so(pytester: pytest.Pytester, option: str, value: str, says: str) -> None:
    result = shop(pytester, "", option, value)
    assert says in result.stdout.str() + result.stderr.str()


def test_as_many_states_are_checked_as_asked_for(pytester: pytest.Pytester) -> None:
    def explored(asked: str) -> tuple[str, int]:
        output = shop(pytester, "", "-rP", "--walbatch-crash-states", asked).stdout.str()
        found = re.search(r"(\d+(?: of \d+)?) crash points, (\d+) states", output)
        assert found is not None, output
        return found[1], int(found[2])

    few, states = explored("100")
    assert " of " in few
    assert states <= 150
    points, more = explored("1500")
    assert " of " not in points
    assert states < more <= 1_500
    assert explored("all")[1] >= more


def test_the_project_registers_the_plugin_and_ships_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    module = project["project"]["entry-points"]["pytest11"]["walbatch"]
    assert (ROOT / f"{module}.py").is_file()
    assert f"{module}.py" in project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    assert f"/{module}.py" in project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]


def test_loading_the_plugin_imports_nothing_of_the_package() -> None:
    code = "import sys, _walbatch_pytest; print(sorted(name for name in sys.modules if name.startswith('walbatch')))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
