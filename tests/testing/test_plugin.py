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
        (
            "--walbatch-replay", "seed=0 strict=1 images=8 crash=3 call=make_directory image=power/999", "has no image 'power/999'",
        ),
        (
            "--walbatch-replay", "seed=0 strict=1 images=8 crash=3 call=datasync image=power/0",
            "step 3 of the application is 'make_directory' and no more 'datasync'",
        ),
        (
            "--walbatch-replay", "seed=0 strict=1 images=8 crash=99999 call=datasync image=power/0",
            "the application ends before step 99999: it is not what it was when the line was printed; run the whole test again",
        ),
        ("--walbatch-crash-states", "many", "must be a number from 1 on, or 'all'"),
    ],
)  # fmt: skip
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


# --- tests that are wrong ---

LIFE = """
import asyncio, threading

import pytest
import walbatch as wb


def opened(process, backend=None):
    return wb.Engine.open(
        "/store", {"put": wb.Lane(backend or process.database("put"))}, environment=process.environment
    )


def submit(process):
    engine = opened(process)
    engine.submit("put", key=b"k", payload=b"v")
    process.promise(b"k")
    engine.close()


def lost(process):
    opened(process).close()
    assert set(process.promises) <= set(process.content("put"))


def raises(batch):
    raise TypeError("a typo")
"""

NOT_A_CRASH_TEST = {
    "nothing at all": (
        "lambda process: None",
        "use changed nothing on the simulated disk: pass environment=",
    ),
    "nothing but a promise": (
        "lambda process: process.promise(1)",
        "use changed nothing on the simulated disk",
    ),
    "a real store": (
        "lambda process: wb.Engine.open('real', {'put': wb.Lane(process.database('put'))})",
        "this would open a real store: pass environment=process.environment to Engine.open",
    ),
    "a real database": (
        "lambda process: opened(process, wb.LmdbBackend('real'))",
        "keeps real files, which the simulation does not crash",
    ),
}


def crash_test(pytester: pytest.Pytester, use: str, check: str = "lost", *options: str) -> str:
    """The output of a test of this life and this check."""
    pytester.makepyfile(f"{LIFE}\n\ndef test_it(crash_points):\n    crash_points({use}, {check})\n")
    return pytester.runpytest(
        *PLUGIN_OPTIONS, "-p", "no:cacheprovider", "-W", "default", *options
    ).stdout.str()


@pytest.mark.parametrize(("use", "says"), NOT_A_CRASH_TEST.values(), ids=NOT_A_CRASH_TEST.keys())
def test_a_test_that_crashes_nothing_fails(pytester: pytest.Pytester, use: str, says: str) -> None:
    output = crash_test(pytester, use, "lambda process: None")
    assert says in output
    assert "1 failed" in output
    assert "--walbatch-replay '" not in output
    assert not (pytester.path / "real").exists()


FOREIGN = """
def real_thread(process):
    engine = opened(process)
    thread = threading.Thread(target=lambda: engine.submit("put", key=b"k", payload=b"v"), name="mine")
    thread.start()
    thread.join()
    engine.close()


def of_a_database(process):
    database = process.database("put")
    submit(process)
    thread = threading.Thread(target=lambda: database.apply(wb.Batch), name="mine")
    thread.start()
    thread.join()


def loop(process):
    async def main():
        await wb.AsyncEngine.open("/store", {"put": wb.Lane(process.database("put"))}, environment=process.environment)
    asyncio.run(main())
"""


@pytest.mark.parametrize("life", ["real_thread", "of_a_database", "loop"])
@pytest.mark.parametrize("part", ["use", "check"])
def test_a_call_from_a_real_thread_fails_the_test(pytester: pytest.Pytester, life: str, part: str) -> None:
    pytester.makepyfile(
        f"{LIFE}{FOREIGN}\n\n"
        f"def test_it(crash_points):\n    crash_points({'submit, ' * (part == 'check')}{life}, {'lost' * (part == 'use')})\n"
    )
    output = pytester.runpytest(*PLUGIN_OPTIONS, "-p", "no:cacheprovider", "-W", "ignore").stdout.str()
    assert "1 failed" in output
    assert "asyncio and real threads cannot run here; use Engine and process.threads" in output
    assert "--walbatch-replay '" not in output


def test_an_engine_that_is_left_open_ends_with_its_process(pytester: pytest.Pytester) -> None:
    use = "lambda process: opened(process).submit('put', key=b'k', payload=b'v').result() and process.promise(b'k')"
    assert "1 passed" in crash_test(pytester, use, "lambda process: opened(process).flush()")


def test_the_end_of_a_process_that_leaves_its_engine_open_is_replayed(pytester: pytest.Pytester) -> None:
    use = "lambda process: (opened(process).submit('put', key=b'k', payload=b'v'), process.promise('at the end'))"
    check = "lambda process: 1 / (1 - len(process.promises))"
    output = crash_test(pytester, use, check)
    assert "after a crash at the end the check fails: ZeroDivisionError" in output
    (line,) = set(re.findall(r"--walbatch-replay '([^']+)'", output))
    assert "the check fails: ZeroDivisionError" in crash_test(pytester, use, check, "--walbatch-replay", line)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (".result()", r"OperationDead: operation 1 was given up \(attempts\): TypeError: a typo"),
        (".result(timeout=0.2)", "ResultTimeout"),
    ],
)
def test_a_backend_that_always_fails_is_named_with_its_failure(
    pytester: pytest.Pytester, call: str, says: str
) -> None:
    use = "lambda process: (lambda e: (e.submit('put', key=b'k', payload=b'v')%s, e.flush()))(opened(process, raises))"
    output = crash_test(pytester, use % call)
    assert re.search(says, output)
    assert "failed and will be tried again: TypeError: a typo" in output


@pytest.mark.parametrize("fails", ["pytest.fail('gone')", "pytest.raises(KeyError, lambda: None)"])
def test_a_failure_of_pytest_in_the_check_has_its_line(pytester: pytest.Pytester, fails: str) -> None:
    output = crash_test(pytester, "submit", f"lambda process: {fails}")
    assert "the check fails: Failed: " in output
    assert "--walbatch-replay '" in output


def test_a_skip_in_the_check_is_a_skip(pytester: pytest.Pytester) -> None:
    assert "1 skipped" in crash_test(pytester, "submit", "lambda process: pytest.skip('not here')")


def test_what_was_left_out_stands_in_the_summary(pytester: pytest.Pytester) -> None:
    few = crash_test(pytester, "submit", "lost", "--walbatch-crash-states", "40")
    assert re.search(r"test_it: \d+ of \d+ crash points left out", few)
    assert "crashes left out" not in crash_test(
        pytester, "lambda process: process.fs.make_directory('/a')", "print"
    )


def test_a_promise_is_a_copy(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        def test_it(crash_points):
            def use(process):
                told = []
                for name in ["/a", "/b"]:
                    process.fs.make_directory(name)
                    process.fs.sync_directory("/")
                    told.append(name)
                    process.promise(told)

            def check(process):
                for name in process.promises[-1] if process.promises else []:
                    assert process.fs.is_directory(name)

            crash_points(use, check)
    """)
    pytester.runpytest(*PLUGIN_OPTIONS, "-p", "no:cacheprovider").assert_outcomes(passed=1)


def test_a_promise_that_cannot_be_copied_is_refused(pytester: pytest.Pytester) -> None:
    output = crash_test(
        pytester, "lambda process: process.promise(opened(process).submit('put', key=b'k', payload=b'v'))"
    )
    assert "TypeError: a promise must be a value that can be copied, and not <Ticket" in output


def test_a_kind_of_engine_of_the_applications_own_is_what_it_opens(pytester: pytest.Pytester) -> None:
    use = """lambda process: (
        type("Mine", (wb.Engine,), {"mine": 1}).open(
            "/store", {"put": wb.Lane(process.database("put"))}, environment=process.environment
        ).mine
    )"""
    assert "1 passed" in crash_test(pytester, use)


def test_a_failure_says_before_what_it_came_and_what_was_not_synced(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        def test_it(crash_points):
            def use(process):
                file = process.fs.create("/a")
                file.write([b"x"], 0)
                process.promise("a")
                file.datasync()

            def check(process):
                assert not process.promises

            crash_points(use, check)
    """)
    output = pytester.runpytest(*PLUGIN_OPTIONS, "-p", "no:cacheprovider").stdout.str()
    assert "after a crash before datasync of /a the check fails" in output
    assert "promised by then: 1 promise: 'a'" in output
    assert "not synced by then: in / the name a, the content of /a" in output
    assert " call=datasync " in output


def test_a_crash_between_threads_is_said_to_be_at_a_thread_switch(pytester: pytest.Pytester) -> None:
    output = crash_test(
        pytester, "submit", "lambda process: [][bool(process.promises) - 1:][0] if process.promises else 0"
    )
    assert "after a crash at a thread switch the check fails: IndexError" in output


def test_a_lane_without_a_database_has_no_content(pytester: pytest.Pytester) -> None:
    output = crash_test(pytester, "submit", "lambda process: process.content('other')")
    assert "lane 'other' has no database: there is one for ['put']" in output


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
