"""The program as a whole: help, wrong usage, errors of every class, pipes and signals."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import walbatch as wb
from tests.cli.program import assert_one_line, command, environment, walbatch
from tests.stores import TINY, Made, flip, make_store
from tests.support import wait_until
from walbatch import limits
from walbatch.core.checksum import crc32c

SECTOR = limits.SECTOR_BYTES
COMMANDS = ("recover", "verify", "inspect", "stats", "load", "dump", "dlq")
LETTERS = ("dlq list", "dlq show", "dlq requeue", "dlq drop", "dlq export")
NOBODY = 65534


# --- help ------------------------------------------------------------------------------------------------------------


def test_the_help_names_every_command_in_a_line_of_its_own() -> None:
    ended = walbatch("--help")
    assert ended.code == 0
    for name in COMMANDS:
        line = next(line for line in ended.output.splitlines() if line.strip().startswith(name))
        assert line.endswith("."), "the summary fits"
    assert max(map(len, ended.output.splitlines())) <= 80
    assert "130 interrupted" in " ".join(ended.output.split())
    assert "143 terminated" in " ".join(ended.output.split())


@pytest.mark.parametrize("name", [*COMMANDS[:-1], *LETTERS])
def test_each_command_explains_its_options_and_exit_codes(name: str) -> None:
    ended = walbatch(*name.split(), "--help")
    assert ended.code == 0
    assert max(map(len, ended.output.splitlines())) <= 80
    assert "--json" in ended.output
    assert "Exit codes: 0" in ended.output
    for option in re.findall(r"^  (--[a-z-]+)", ended.output, re.MULTILINE):
        text = re.search(rf"{option}\b[^\n]*  \S", ended.output)
        assert text or re.search(rf"{option}[^\n]*\n\s+\S", ended.output), f"{option} is explained"


def test_without_arguments_it_shows_the_help_as_an_error() -> None:
    ended = walbatch()
    assert (ended.code, ended.output) == (2, "")
    assert "Commands:" in ended.error


def test_it_can_be_run_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "walbatch", "--version"],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, walbatch("--version").output, "")


def test_the_version_is_the_packages() -> None:
    assert re.fullmatch(r"walbatch \d+\.\d+\.\d+\S*\n", walbatch("--version").output)


# --- wrong usage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["frobnicate"], ["frobnicate", "walbatch --help"]),
        (["recover"], ["STORE", "walbatch recover --help"]),
        (["recover", "q", "extra"], ["extra", "walbatch recover --help"]),
        (["recover", "q", "--nope"], ["--nope", "--help"]),
        (["recover", "q", "--timeout", "soon"], ["--timeout", "--help"]),
        (["recover", "q", "--stall", "-1"], ["--stall", "--help"]),
        (["recover", "q", "--shards", "0"], ["--shards", "--help"]),
        (["recover", "q", "--lane", "=x"], ["KIND=URL", "lmdb:///"]),
        (["recover", "q", "--lane", "put="], ["KIND=URL"]),
        (["recover", "q", "--lane", "a=lmdb:x", "--lane", "a=lmdb:y"], ["twice"]),
        (["recover", "nowhere"], ["does not exist", "check the path"]),
        (["verify", "nowhere"], ["does not exist", "check the path"]),
        (["inspect", "nowhere"], ["does not exist", "check the path"]),
        (["dump", "nowhere"], ["does not exist", "check the path"]),
        (["verify", "empty"], ["holds no store"]),
        (["verify", "file"], ["is a file"]),
        (["verify", "file/below"], ["check the path"]),
        (["dump", "q", "--first-lsn", "0"], ["--first-lsn"]),
        (["dump", "q", "--key", "a", "--key-base64", "YQ=="], ["one of them"]),
        (["dump", "q", "--key-base64", "?"], ["not base64"]),
        (["load", "new", "nothing.jsonl"], ["--kind"]),
        (["load", "new", "nothing.jsonl", "--kind", "put"], ["nothing.jsonl", "does not exist"]),
        (["load", "new", "empty", "--kind", "put"], ["is a directory"]),
        (["load", "file", "rows.jsonl", "--kind", "put"], ["file"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    make_store(tmp_path / "q", count=2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "rows.jsonl").write_text('{"key": "k"}\n')
    ended = walbatch(*arguments, cwd=tmp_path)
    assert ended.output == ""
    assert_one_line(ended, words)
    assert ended.code == (8 if arguments[:2] == ["load", "file"] else 2)
    assert not (tmp_path / "new").exists(), "nothing was made"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nonsense", ["not the URL", "lmdb:"]),
        ("ftp://host/x", ["not the URL"]),
        ("lmdb://host/x", ["host"]),
        ("lmdb:", ["names no directory"]),
        ("python:nothing", ["python:module"]),
        ("python:no_such_module:apply", ["No module named", "cannot be imported"]),
        ("python:target:missing", ["missing", "cannot be imported"]),
        ("python:broken:apply", ["cannot be imported", "SyntaxError"]),
        ("python:exits:apply", ["exits"]),
        ("python:target:number", ["function"]),
    ],
)
def test_a_backend_that_cannot_be_made_is_wrong_usage(tmp_path: Path, url: str, words: list[str]) -> None:
    make_store(tmp_path / "q", count=2)
    (tmp_path / "target.py").write_text("number = 7\n")
    (tmp_path / "broken.py").write_text("def apply(:\n")
    (tmp_path / "exits.py").write_text("raise SystemExit('exits')\n")
    ended = walbatch("recover", "q", "--lane", f"put={url}", cwd=tmp_path)
    assert_one_line(ended, words)
    assert ended.code == 2


# --- the state of the store, for every command -----------------------------------------------------------------------


def newer_format(made: Made) -> None:
    data = bytearray((made.path / "identity").read_bytes())
    data[8:12] = (2).to_bytes(4, "little")
    data[-4:] = crc32c(bytes(data[:-4]), 0).to_bytes(4, "little")
    (made.path / "identity").write_bytes(data)


def lose_log(made: Made) -> None:
    for path in made.segments:
        path.unlink()


def identity_as_directory(made: Made) -> None:
    (made.path / "identity").unlink()
    (made.path / "identity").mkdir()


STATES: dict[str, tuple[Callable[[Made], object], int, list[str]]] = {
    "a damaged frame": (lambda made: flip(made.segments[2], SECTOR + 100), 4, ["3.seg", "offset 512", "walbatch"]),
    "a damaged header": (lambda made: flip(made.segments[2], 100), 4, ["W3", "copy"]),
    "a missing segment": (lambda made: made.segments[2].unlink(), 4, ["W4", "copy"]),
    "no identity": (lambda made: (made.path / "identity").unlink(), 4, ["identity"]),
    "a damaged identity": (lambda made: flip(made.path / "identity", 30), 4, ["identity is damaged"]),
    "no log": (lose_log, 4, ["no segment"]),
    "a newer format": (newer_format, 6, ["Upgrade walbatch"]),
    "identity is a directory": (identity_as_directory, 8, ["Is a directory"]),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["recover", "recover --dry-run", "verify", "inspect", "stats", "dump", "load"]
)
@pytest.mark.parametrize("state", STATES)
def test_every_command_says_what_is_wrong_with_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    made = make_store(tmp_path / "q")
    damage, code, words = STATES[state]
    damage(made)
    (tmp_path / "rows").write_text('{"key": "k"}\n')
    arguments = [*name.split(), str(made.path), *(["rows", "--kind", "put"] if name == "load" else [])]
    ended = walbatch(*arguments)
    if name == "load" and state == "a damaged frame":
        # It does not read the settled-or-sealed part of the log; what is damaged is found when it is delivered.
        assert ended.code == 0
        return
    assert ended.code == code, ended.error
    assert_one_line(ended, words)
    if name != "dump":
        document = walbatch(*arguments, "--json").document
        assert document["exit"] == code
        assert document["error"]


def test_reading_commands_work_beside_an_engine_and_writing_ones_say_who_it_is(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text('{"key": "k"}\n')
    with wb.Engine.open(tmp_path / "q", lanes={"put": wb.Lane(None)}, settings=TINY) as engine:
        engine.submit("put", key=b"k")
        for name in ("verify", "inspect", "stats", "dump"):
            assert walbatch(name, "q", cwd=tmp_path).code == 0
        assert "in use" in walbatch("inspect", "q", cwd=tmp_path).output
        for arguments in (
            ["recover", "q"],
            ["recover", "q", "--dry-run"],
            ["recover", "q", "--salvage"],
            ["load", "q", "rows"],
        ):
            ended = walbatch(*arguments, cwd=tmp_path)
            assert ended.code == 5
            assert_one_line(ended, [f"process {os.getpid()}", "close that engine"])
        assert walbatch("recover", "q", "--json", cwd=tmp_path).document["exit"] == 5
        engine.close(drain=False)
    assert walbatch("recover", "q", "--lane", f"put=lmdb:{tmp_path}/b", cwd=tmp_path).code == 0


# --- permissions and disks -------------------------------------------------------------------------------------------


@pytest.fixture
def common(tmp_path: Path) -> Iterator[Path]:
    """A directory that another user can reach."""
    folder = Path(tempfile.mkdtemp(prefix="walbatch-cli-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def owned(path: Path, user: int | None) -> None:
    if user is not None:
        for found in [path, *path.rglob("*")]:
            os.chown(found, user, user)


USER = NOBODY if os.getuid() == 0 else None
"""Permissions do not hold for root."""


@pytest.mark.parametrize(
    "name", ["recover", "recover --dry-run", "verify", "inspect", "stats", "dump", "load", "dlq list"]
)
def test_a_store_of_somebody_else_is_an_io_error_and_not_an_absent_one(common: Path, name: str) -> None:
    made = make_store(common / "q", count=3)
    owned(made.path, USER)
    (common / "rows").write_text('{"key": "k"}\n')
    for mode in (0o000, 0o400):
        made.path.chmod(mode)
        arguments = [*name.split(), "q", *(["rows"] if name == "load" else [])]
        ended = walbatch(*arguments, cwd=common, user=USER)
        assert ended.code == 8, ended.error
        assert_one_line(ended, ["Permission denied"])
    made.path.chmod(0o700)


def test_a_read_only_store_can_be_looked_at_and_not_recovered(common: Path) -> None:
    made = make_store(common / "q", count=3)
    owned(made.path, USER)
    for path in [*made.path.rglob("*"), made.path]:
        path.chmod(0o500 if path.is_dir() else 0o400)
    for arguments in (["verify"], ["inspect"], ["stats"], ["dump"], ["dlq", "list"]):
        ended = walbatch(*arguments, "q", cwd=common, user=USER)
        assert (ended.code, ended.error) == (0, "")
    assert walbatch("recover", "q", "--dry-run", cwd=common, user=USER).code == 3
    ended = walbatch("recover", "q", cwd=common, user=USER)
    assert ended.code == 8
    assert_one_line(ended, ["Permission denied", "repair the cause"])
    for path in [made.path, *made.path.rglob("*")]:
        path.chmod(0o700)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_an_io_error_and_nothing_is_lost(small_disk: Path, tmp_path: Path) -> None:
    made = make_store(small_disk / "q", count=5, clean=False)
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb") as filler:
        while True:
            filler.write(bytes(4096))
            filler.flush()
    for arguments in (["verify"], ["inspect"], ["dump"]):
        assert walbatch(*arguments, str(made.path)).code == 0
    ended = walbatch("recover", str(made.path), "--lane", f"put=lmdb:{tmp_path}/b")
    assert ended.code == 8
    assert_one_line(ended, ["No space left", str(made.path)])
    (small_disk / "filler").unlink()
    ended = walbatch("recover", str(made.path), "--lane", f"put=lmdb:{tmp_path}/b", "--json")
    assert (ended.code, ended.document["delivered"]) == (0, 5)


# --- pipes, terminals and signals ------------------------------------------------------------------------------------


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    make_store(tmp_path / "q", count=300)
    with subprocess.Popen(
        command("dump", "q"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, env=environment()
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(b'{"lsn": 1,')
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


@pytest.mark.parametrize("name", ["recover", "verify", "inspect", "stats", "dump"])
def test_output_that_nobody_can_take_is_an_io_error(tmp_path: Path, name: str) -> None:
    make_store(tmp_path / "q", count=3)
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run(
            command(name, "q"),
            stdout=full,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            env=environment(),
            check=False,
            text=True,
        )
    assert done.returncode == 8
    assert re.fullmatch(r"walbatch: .*No space left on device.*\n", done.stderr)


@pytest.mark.parametrize(
    ("sent", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_an_interruption_ends_a_delivery_in_order(
    tmp_path: Path, sent: signal.Signals, code: int, word: str
) -> None:
    make_store(tmp_path / "q", count=5)
    (tmp_path / "slow.py").write_text(
        "import time\ndef apply(batch):\n    open('started', 'w').close()\n    raise RuntimeError('down')\n"
    )
    with subprocess.Popen(
        command("recover", "q", "--lane", "put=python:slow:apply"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=tmp_path, env=environment(),
    ) as process:  # fmt: skip
        wait_until((tmp_path / "started").exists, what="the backend was called")
        process.send_signal(sent)
        output, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert output == ""
    assert error == f"walbatch: {word}: nothing acknowledged is lost, and the command can be run again\n"
    assert walbatch("recover", "q", "--dry-run", cwd=tmp_path).code == 3, (
        "the store was released, nothing is lost"
    )


def test_progress_is_drawn_on_a_terminal_and_nowhere_else(tmp_path: Path) -> None:
    made = make_store(tmp_path / "q")
    target = f"put=lmdb:{tmp_path}/b"
    shutil.copytree(made.path, tmp_path / "copy")
    assert walbatch("recover", "copy", "--lane", target + "2", cwd=tmp_path).error == ""
    main, terminal = pty.openpty()
    try:
        done = subprocess.run(
            command("recover", "q", "--lane", target), stdout=subprocess.PIPE, stderr=terminal, cwd=tmp_path,
            env=environment(TERM="xterm"), check=False, text=True,
        )  # fmt: skip
        shown = os.read(main, 65536).decode()
    finally:
        os.close(terminal)
        os.close(main)
    assert done.returncode == 0
    assert "checking" in shown
    assert "delivering" in shown
    assert "100%" in shown
    assert "\x1b" not in done.stdout


def test_output_that_is_not_utf8_shows_escapes(tmp_path: Path) -> None:
    with wb.Engine.open(tmp_path / "q", lanes={"pût": wb.Lane(None)}) as engine:
        engine.submit("pût", key="ключ".encode())
        engine.close(drain=False)
    ascii_only = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    ended = walbatch("dump", "q", cwd=tmp_path, env=ascii_only)
    assert ended.code == 0
    assert ended.rows[0]["key"] == "ключ"
    assert walbatch("inspect", "q", cwd=tmp_path, env=ascii_only).code == 0


@pytest.mark.parametrize(
    ("damage", "arguments", "code"),
    [
        (lambda made: None, ["recover", "q", "--lane", "put=lmdb:b"], 0),
        (lambda made: None, ["recover", "q", "--lane", "put=nonsense"], 2),
        (lambda made: None, ["recover", "q"], 3),
        (lambda made: flip(made.segments[2], SECTOR + 100), ["recover", "q"], 4),
        (newer_format, ["recover", "q"], 6),
        (lambda made: flip(made.segments[2], SECTOR + 100), ["recover", "q", "--salvage"], 7),
        (identity_as_directory, ["recover", "q"], 8),
        (lambda made: None, ["recover", "nowhere"], 2),
        (lambda made: None, ["frobnicate"], 2),
        (lambda made: None, ["verify", "q"], 0),
    ],
    ids=[
        "done",
        "usage",
        "work left",
        "corrupt",
        "newer",
        "salvaged",
        "I/O error",
        "no store",
        "no command",
        "sound",
    ],
)
def test_the_exit_code_reaches_the_shell(
    tmp_path: Path, damage: Callable[[Made], object], arguments: list[str], code: int
) -> None:
    damage(make_store(tmp_path / "q"))
    assert walbatch(*arguments, cwd=tmp_path, apart=True).code == code
