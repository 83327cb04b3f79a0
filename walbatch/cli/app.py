"""The program: its commands, and how it ends."""

from __future__ import annotations

import logging
import os
import signal
import sys
from types import FrameType
from typing import Annotated, NoReturn

import typer

from walbatch.cli.bench import bench
from walbatch.cli.copy import copy
from walbatch.cli.exits import Exit, Terminated, exit_code, explain, guarded
from walbatch.cli.letters import dlq
from walbatch.cli.looking import inspect, verify
from walbatch.cli.output import is_stdout_usable
from walbatch.cli.recover import recover
from walbatch.cli.stats import stats
from walbatch.cli.transfer import dump, load

app = typer.Typer(
    name="walbatch",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    help="Operate walbatch stores.\n\nEvery command has --json. When something is wrong, one line says what to do next, and the "
    "exit code says what it was: 0 done, 2 usage, 3 work left, 4 corruption (nothing changed), 5 locked by another process, "
    "6 newer format, 7 salvaged with stated loss, 8 I/O error, 130 interrupted (SIGINT), 143 terminated (SIGTERM).",
)
for command in (recover, verify, inspect, stats, load, copy, bench):
    app.command()(guarded(command))
app.command()(guarded(dump, json_errors=False))
app.add_typer(dlq, name="dlq", help="See, requeue, drop and export dead letters.")


def _show_version(*, wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version  # noqa: PLC0415 - slow to import, and for this alone

        typer.echo(f"walbatch {version('walbatch')}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    show_version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=lambda value: _show_version(wanted=value),
            is_eager=True,
            help="Show the version.",
        ),
    ] = False,
) -> None:
    del show_version


def main() -> NoReturn:
    """Run the program. Ends the process with an exit code of `walbatch.cli.exits.Exit`; never shows a traceback."""
    # What the engine logs would come between the lines of the result; what matters of it is in the result.
    logging.getLogger("walbatch").addHandler(logging.NullHandler())
    logging.getLogger("walbatch").propagate = False
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        code = app(standalone_mode=False, prog_name="walbatch") or Exit.DONE
        sys.stdout.flush()
    except Terminated as error:  # outside a command
        typer.echo(f"walbatch: {explain(error)}", err=True)
        code = exit_code(error)
    except Exception as error:  # noqa: BLE001 - wrong usage, whose class is typer's own affair
        is_stdout_usable()
        code = _complain(error)
    sys.exit(code)


def _terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise Terminated


def _complain(error: Exception) -> int:
    """Say in one line what is wrong with the arguments."""
    format_message = getattr(error, "format_message", None)
    if format_message is None:
        if os.environ.get("WALBATCH_DEBUG"):
            raise error
        typer.echo(f"walbatch: {explain(error)}", err=True)
        return exit_code(error)
    message = str(format_message())
    if message.count("\n") > 1:  # no arguments at all: the help itself
        typer.echo(message, err=True)
    else:
        path = getattr(getattr(error, "ctx", None), "command_path", "walbatch")
        typer.echo(f"walbatch: {' '.join(message.split()).rstrip('.')}: see '{path} --help'", err=True)
    return Exit.USAGE
