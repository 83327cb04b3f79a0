"""The program: its commands, and how it ends."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer

from walbatch.cli.exits import Exit, exit_code, explain
from walbatch.cli.looking import inspect, verify
from walbatch.cli.recover import recover
from walbatch.cli.transfer import dump, load

app = typer.Typer(
    name="walbatch",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Operate walbatch stores. Every command has --json, and says in one line what to do next when something is wrong.",
)
for command in (recover, verify, inspect, dump, load):
    app.command()(command)


def _show_version(*, wanted: bool) -> None:
    if wanted:
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
    try:
        app()
    except BrokenPipeError:
        # The reader of our output went away, as `head` does: no error, but nothing more may be flushed to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(Exit.DONE)
    except KeyboardInterrupt:
        typer.echo("interrupted; nothing acknowledged is lost", err=True)
        sys.exit(130)
    except Exception as error:  # the outermost frame
        if os.environ.get("WALBATCH_DEBUG"):
            raise
        typer.echo(f"walbatch: {explain(error)}", err=True)
        sys.exit(exit_code(error))
    sys.exit(Exit.DONE)
