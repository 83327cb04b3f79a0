"""Runs the command line as a user does, in this process or in one of its own."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from walbatch.cli import main

ROOT = Path(__file__).resolve().parents[2]
CODE = "from walbatch.cli import main; main()"
CODE_AS = """
import contextlib, io, os, sys, walbatch.backends.lmdb, walbatch.cli.app, walbatch.engine
for name in ("recover", "verify", "inspect", "stats", "dump", "load", "dlq list"):
    with contextlib.redirect_stderr(io.StringIO()):
        walbatch.cli.app.app([*name.split(), "/proc/nowhere"], standalone_mode=False)
os.setgroups([])
os.setgid({user})
os.setuid({user})
walbatch.cli.main()
"""
"""Becomes another user once all is imported, lazily or not: the interpreter itself may be out of that user's reach."""

DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a command ended. `error` is what it wrote to standard error."""

    code: int
    output: str
    error: str

    @property
    def document(self) -> dict[str, Any]:
        """The JSON document on standard output, which is all that stands there."""
        assert self.output.count("\n") == 1, self.output
        value = json.loads(self.output)
        assert isinstance(value, dict)
        return value

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The JSON lines on standard output."""
        return [json.loads(line) for line in self.output.splitlines()]


def command(*arguments: str | Path, user: int | None = None) -> list[str]:
    """What starts the program, as another user if one is given (only root can)."""
    code = CODE if user is None else CODE_AS.format(user=user)
    return [sys.executable, "-c", code, *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    """Only this package, and no bytecode written: the program may run as another user."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WALBATCH", "PYTHON"))}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "80", **more}


def walbatch(
    *arguments: str | Path, cwd: Path | None = None, stdin: str | bytes = b"", user: int | None = None,
    env: Mapping[str, str] | None = None, apart: bool = False,
) -> Ended:  # fmt: skip
    """Run a command to its end. It must not show a traceback, whatever happens.

    In this process, which is ten times as fast, unless `apart` or something asks for another one.
    """
    given = stdin.encode() if isinstance(stdin, str) else stdin
    if apart or user is not None or env is not None:
        done = subprocess.run(
            command(*arguments, user=user), cwd=cwd, input=given, capture_output=True, env=environment(**(env or {})),
            timeout=DEADLINE_S, check=False,
        )  # fmt: skip
        ended = Ended(code=done.returncode, output=done.stdout.decode(), error=done.stderr.decode())
    else:
        with contextlib.chdir(cwd or "."), _clean_interpreter():
            ended = _run_main([str(argument) for argument in arguments], given)
    assert "Traceback" not in ended.output + ended.error, ended.error
    assert "bug in walbatch" not in ended.error, ended.error
    return ended


def _run_main(arguments: list[str], stdin: bytes) -> Ended:
    """What a process of its own would do, with streams that are kept."""
    output, error = io.BytesIO(), io.BytesIO()
    code: object = 0
    with mock.patch.multiple(
        sys,
        argv=["walbatch", *arguments],
        stdin=_text(io.BytesIO(stdin)),
        stdout=_text(output),
        stderr=_text(error),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code
        sys.stdout.flush()
        sys.stderr.flush()
        assert isinstance(code, int)
        return Ended(code=int(code), output=output.getvalue().decode(), error=error.getvalue().decode())


def _text(stream: io.BytesIO) -> io.TextIOWrapper:
    return io.TextIOWrapper(stream, encoding="utf-8")


@contextlib.contextmanager
def _clean_interpreter() -> Iterator[None]:
    """Take back what a command leaves behind in its process: imported targets, the search path, the logger's settings."""
    logger = logging.getLogger("walbatch")
    modules, path, handlers, propagate = set(sys.modules), [*sys.path], [*logger.handlers], logger.propagate
    try:
        with mock.patch.dict(os.environ, {"COLUMNS": "80"}):
            yield
    finally:
        for name in ("again", "target", "broken", "exits", "down", "slow", "no_such_module"):
            if name not in modules:
                sys.modules.pop(name, None)
        importlib.invalidate_caches()
        sys.path[:], logger.handlers[:], logger.propagate = path, handlers, propagate


def assert_one_line(ended: Ended, words: Sequence[str]) -> None:
    """The error is one line that has these words."""
    assert ended.error.endswith("\n")
    assert ended.error.count("\n") == 1, ended.error
    assert ended.error.startswith("walbatch: ")
    for word in words:
        assert word in ended.error
