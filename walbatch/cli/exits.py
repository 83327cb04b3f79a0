"""Exit codes, and the one place where errors become them."""

from __future__ import annotations

import enum
import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

from walbatch.cli.output import is_stdout_usable, show_json
from walbatch.errors import (
    BackendError,
    ConfigError,
    CorruptionError,
    StorageError,
    StoreLocked,
    UnsupportedFormat,
    WalbatchError,
)

_P = ParamSpec("_P")


class Exit(enum.IntEnum):
    """What a script can rely on."""

    DONE = 0
    """Consistent and drained; a torn tail that was never acknowledged included."""
    INTERNAL = 1
    USAGE = 2
    WORK_LEFT = 3
    """Consistent, but operations are left (a backend fails, is not known, or time ran out), or dead letters are."""
    CORRUPT = 4
    """Corruption found; nothing was changed. Where only dead letters are damaged, those were left, and the rest was done."""
    LOCKED = 5
    NEWER_FORMAT = 6
    SALVAGED = 7
    """Made consistent with a stated loss."""
    IO_ERROR = 8
    INTERRUPTED = 130
    """By Ctrl-C: what a shell makes of SIGINT."""
    TERMINATED = 143
    """The same of SIGTERM."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came: the command ends in order, as after Ctrl-C."""


def exit_code(error: BaseException) -> Exit:
    """The exit code that an error means."""
    match error:
        case CorruptionError():
            return Exit.CORRUPT
        case StoreLocked():
            return Exit.LOCKED
        case UnsupportedFormat():
            return Exit.NEWER_FORMAT
        case ConfigError() | BackendError():
            return Exit.USAGE
        case StorageError() | OSError():
            return Exit.IO_ERROR
        case WalbatchError():
            return Exit.WORK_LEFT
        case Terminated():
            return Exit.TERMINATED
        case KeyboardInterrupt():
            return Exit.INTERRUPTED
        case _:
            return Exit.INTERNAL


def explain(error: BaseException) -> str:
    """One line for people: what happened, and what to do."""
    match error:
        case WalbatchError():
            text = str(error)
        case OSError():
            text = (
                f"{error.filename or 'input or output'}: {error.strerror or error}: repair that and try again"
            )
        case KeyboardInterrupt():
            how = "terminated" if isinstance(error, Terminated) else "interrupted"
            text = f"{how}: nothing acknowledged is lost, and the command can be run again"
        case _:
            text = (
                f"this is a bug in walbatch ({type(error).__name__}: {error}): nothing acknowledged is lost; please report it, "
                "with what WALBATCH_DEBUG=1 shows"
            )
    return " ".join("; ".join([text, *getattr(error, "__notes__", [])]).split())


def guarded(function: Callable[_P, None], *, json_errors: bool = True) -> Callable[_P, None]:
    """A command that never ends in a traceback: whatever it raises becomes one line on standard error and an exit code.

    With --json, the line stands in a JSON document on standard output as well, unless `json_errors` is False.
    """

    @functools.wraps(function)
    def command(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            function(*args, **kwargs)
            sys.stdout.flush()
        except typer.Exit:
            raise
        except BrokenPipeError:
            # The reader of our output went away, as `head` does: no error of ours, but nothing more can be written.
            is_stdout_usable()
            raise typer.Exit(Exit.DONE) from None
        except (Exception, KeyboardInterrupt) as error:
            if os.environ.get("WALBATCH_DEBUG"):
                raise
            if is_stdout_usable() and json_errors and kwargs.get("as_json"):
                show_json({"error": explain(error), "exit": exit_code(error)})
            typer.echo(f"walbatch: {explain(error)}", err=True)
            raise typer.Exit(exit_code(error)) from None

    return command
