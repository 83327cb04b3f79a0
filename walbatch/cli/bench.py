"""`walbatch bench`: how fast walbatch is on this machine, beside the disk itself and other queues."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from walbatch.cli.output import show_json
from walbatch.errors import ConfigError

if TYPE_CHECKING:
    from walbatch.bench.results import Results

ERASE_LINE = "\r\x1b[K"


def bench(
    *,
    quick: Annotated[
        bool, typer.Option("--quick", help="Under a minute: few operations, two rounds.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Many rounds, ten million pending operations.")
    ] = False,
    directory: Annotated[
        str | None,
        typer.Option(
            "--dir", metavar="DIR", help="Work in a new folder there, on the disk that matters.", show_default="temporary"
        ),
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Only these workloads: w1,w3,...", show_default="all")
    ] = None,
    subjects: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Only these subjects: walbatch,raw,sqlite,...", show_default="all"),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, max=1000, metavar="N", help="Rounds that count.", show_default="as the profile")
    ] = None,
    scale: Annotated[
        float, typer.Option(min=0.0001, max=100, metavar="F", help="So many times the operations.")
    ] = 1.0,
    trace: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The disk trace of w9.", show_default="fixtures/ of a checkout"),
    ] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Measure in memory too, where a sync means nothing.")
    ] = False,
    plots: Annotated[
        str | None, typer.Option(metavar="DIR", help="Draw the whole there, as PNG and SVG (needs matplotlib).")
    ] = None,
    json_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the JSON document there as well.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Show one JSON document.")] = False,
) -> None:  # fmt: skip
    """Measure walbatch beside the raw disk and other durable queues, in one run on one disk.

    Peers that are not installed are named, with what to install. Works in a folder of its own and deletes it in the end; takes a
    few minutes and some gigabytes of disk (--quick: less than a minute; --full: about half an hour).

    Exit codes: 0 measured, also where a target is missed; 2 usage; 8 I/O error.
    """
    from walbatch.bench.place import check_disk, work_place  # noqa: PLC0415 - no other command waits for it
    from walbatch.bench.profile import DEFAULT, FULL, QUICK  # noqa: PLC0415 - the same
    from walbatch.bench.rounds import Bench, check_names  # noqa: PLC0415 - the same
    from walbatch.bench.table import text  # noqa: PLC0415 - the same
    from walbatch.bench.trace import TRACE  # noqa: PLC0415 - the same

    if quick and full:
        raise ConfigError("--quick and --full say different things: give one of them")
    profile = (QUICK if quick else FULL if full else DEFAULT).scaled(scale)
    if rounds is not None:
        profile = profile.with_rounds(rounds)
    workloads = _names(only)
    check_names(workloads)
    parent = Path(directory or tempfile.gettempdir())
    if not parent.is_dir():
        raise ConfigError(f"{parent} is no directory: make it, or name another with --dir")
    check_disk(parent, anyway=anyway)
    draw = _painter(plots)
    with _progress(hidden=as_json) as progress, work_place(parent) as place:
        run = Bench(profile=profile, place=place, progress=progress, trace=Path(trace) if trace else TRACE)
        results = run.run(workloads, _names(subjects))
    document = results.document()
    if json_file is not None:
        Path(json_file).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for path in draw(results):
        typer.echo(f"drawn: {path}", err=True)
    if as_json:
        show_json(document)
    else:
        for line in text(results):
            typer.echo(line)


def _names(given: str | None) -> list[str] | None:
    """Names between commas; None: all."""
    if given is None:
        return None
    names = [name.strip() for name in given.split(",") if name.strip()]
    if not names:
        raise ConfigError("an empty list of names measures nothing: leave the option out to measure all")
    return names


def _painter(folder: str | None) -> Callable[[Results], list[Path]]:
    """What draws the pictures in the end. Whether it can is found out before anything is measured."""
    if folder is None:
        return lambda _results: []
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plots needs matplotlib: pip install matplotlib, or leave --plots out")
    from walbatch.bench.picture import draw  # noqa: PLC0415 - it brings matplotlib

    Path(folder).mkdir(parents=True, exist_ok=True)
    return lambda results: draw(results, Path(folder))


@contextmanager
def _progress(*, hidden: bool) -> Iterator[Callable[[str], None]]:
    """Says on standard error what is being done: in one line on a terminal, else a line for each workload."""
    is_terminal = sys.stderr.isatty()
    told = ""

    def tell(what: str) -> None:
        nonlocal told
        if is_terminal:
            sys.stderr.write(f"{ERASE_LINE}{what}")
            sys.stderr.flush()
        elif (workload := what.partition(":")[0]) != told:
            told = workload
            typer.echo(f"measuring {workload}", err=True)

    if hidden:
        yield lambda _what: None
        return
    try:
        yield tell
    finally:
        if is_terminal:
            sys.stderr.write(ERASE_LINE)
