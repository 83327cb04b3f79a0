"""`walbatch copy`: tables from one database to another."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TextIO

import typer

from walbatch import limits
from walbatch.cli.exits import Exit
from walbatch.cli.looking import JsonOption
from walbatch.cli.output import Step, count_text, duration_text, progress_bar, show_json, size_text
from walbatch.errors import ConfigError

if TYPE_CHECKING:
    from walbatch.copying import CopyProgress, CopyReport, TableReport

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(?:(K|M|G)(?:iB|B)?)?", re.IGNORECASE)
_UNITS: Final = {"": 1, "K": limits.KIB, "M": limits.MIB, "G": limits.GIB}


def copy(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="sqlite:///path or postgresql://...", show_default=False)
    ],
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="sqlite:///path or postgresql://...", show_default=False)
    ],
    *,
    table: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=TARGET]", help="A table to copy. May be repeated.", show_default=False),
    ] = None,
    create: Annotated[bool, typer.Option("--create", help="Make tables that the target has not.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare counts and checksums of both tables afterwards.")
    ] = False,
    store: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="What was read and is not in the target yet; else one of this copy's own."
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory of this process; at 80 % nothing more is read. Else 512M more than it begins with.",
        ),
    ] = None,
    batch_seconds: Annotated[
        float,
        typer.Option(min=0.1, max=3600, metavar="S", help="Time limit of a batch: locks are held no longer."),
    ] = 5.0,
    stall: Annotated[
        float, typer.Option(min=0, metavar="S", help="Seconds without progress after which to give up.")
    ] = 60.0,
    batches: Annotated[
        str | None, typer.Option(metavar="FILE", help="Append a line of JSON for each batch.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Copy tables from SOURCE to TARGET, each row exactly once.

    Run the same command again after an interruption, of whatever kind: it goes on where it was. What was read and is not in
    the target yet is in a store, which is removed when all is there. Rows that the target refuses are kept in it as dead
    letters, and tried again by the next run: see them with 'walbatch dlq list PATH'.

    Exit codes: 0 all copied (and equal, with --verify), 2 usage or tables that do not fit, 3 rows failed, tables differ, or given
    up, 4 corruption, 5 store locked by another process, 6 newer format, 8 a database or a file that cannot be reached.
    """
    from walbatch.copying import copy_tables  # noqa: PLC0415 - it brings the engine, for which no other command's help waits

    tables = _tables(table or ())
    place = store or default_store(source, target, tables)
    with progress_bar("copying", hidden=as_json) as step, _batch_lines(batches) as tell:
        progress = _Progress(step, tell)
        try:
            report = copy_tables(
                source, target, tables, store=place, create=create, verify=verify,
                memory_bytes=None if memory is None else _bytes(memory),
                batch_s=batch_seconds, stall_s=stall, progress=progress,
            )  # fmt: skip
        except BaseException as error:
            if Path(place).is_dir() and not isinstance(error, ConfigError):
                error.add_note(f"what was read is in {place}: run the same command again to go on")
            raise
    code = _exit(report)
    if as_json:
        show_json({**_document(report), "exit": code})
    else:
        for line in _lines(report):
            typer.echo(line)
    for line in _next_steps(report):
        typer.echo(line, err=True)
    raise typer.Exit(code)


def default_store(source: str, target: str, tables: Mapping[str, str]) -> str:
    """Where the store of a copy is that names none: the same for the same source, target and tables."""
    from walbatch.copying.opening import open_database  # noqa: PLC0415 - it brings databases

    parts = [
        open_database(source, role="source").shown,  # no password, and the whole path of a file
        open_database(target, role="target").shown,
        *sorted(f"{name}={to}" for name, to in tables.items()),
    ]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    state = os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    return str(Path(state) / "walbatch" / f"copy-{digest}")


def _tables(options: Sequence[str]) -> dict[str, str]:
    """`NAME` and `NAME=TARGET` options."""
    tables: dict[str, str] = {}
    for option in options:
        name, equals, target = option.partition("=")
        if not name or (equals and not target):
            raise ConfigError(
                f"--table {option!r} must be NAME, or NAME=TARGET for another name in the target"
            )
        if name in tables:
            raise ConfigError(f"--table names {name!r} twice: name it once")
        tables[name] = target
    return tables


def _bytes(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"--memory {text!r} must be a number of bytes, or with K, M or G: 512M")
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


class _Progress:
    """Moves the bar, and writes a line for each batch."""

    def __init__(self, step: Step, tell: Callable[[Mapping[str, object]], None]) -> None:
        self._step, self._tell = step, tell
        self._read: dict[str, tuple[int, int]] = {}
        self._batches: dict[str, int] = {}

    def __call__(self, now: CopyProgress) -> None:
        self._read[now.table] = (now.read, now.size)
        self._step(sum(read for read, _ in self._read.values()), sum(size for _, size in self._read.values()))
        ended = now.batches + now.failed_batches
        if ended > self._batches.get(now.table, 0):
            self._batches[now.table] = ended
            self._tell(dataclasses.asdict(now))


@contextlib.contextmanager
def _batch_lines(path: str | None) -> Iterator[Callable[[Mapping[str, object]], None]]:
    if path is None:
        yield lambda _: None
        return
    with open(path, "a", encoding="utf-8") as file:
        yield lambda fields: _write_line(file, fields)


def _write_line(file: TextIO, fields: Mapping[str, object]) -> None:
    file.write(f"{json.dumps(fields)}\n")
    file.flush()


# --- results ------------------------------------------------------------------------------------------------------


def _exit(report: CopyReport) -> Exit:
    is_done = report.is_complete and report.is_equal and not report.failed and not report.remaining
    return Exit.DONE if is_done else Exit.WORK_LEFT


def _document(report: CopyReport) -> dict[str, Any]:
    document = dataclasses.asdict(report)
    for table in document["tables"]:
        for name in ("batch_s_average", "batch_s_max", "seconds", "rows_per_s"):
            table[name] = round(table[name], 6)
    return {
        **document,
        "failed": report.failed,
        "is_complete": report.is_complete,
        "is_equal": report.is_equal,
    }


def _lines(report: CopyReport) -> Iterable[str]:
    for table in report.tables:
        yield _table_line(table)
    rows = sum(table.copied for table in report.tables)
    rate = f", {rows / report.seconds:,.0f} a second" if report.seconds else ""
    yield (
        f"copied {count_text(rows, 'row')} in {duration_text(report.seconds)}{rate}, with {size_text(report.peak_memory_bytes)} of "
        "memory at most"
    )


def _table_line(table: TableReport) -> str:
    name = table.table if table.table == table.target else f"{table.table} to {table.target}"
    parts = [f"{table.copied:,} copied"]
    if table.read_before:
        parts.append(f"{table.read_before:,} read before")
    if table.failed:
        parts.append(f"{table.failed:,} failed")
    if table.batches:
        parts.append(
            f"{count_text(table.batches, 'batch').replace('batchs', 'batches')} of {duration_text(table.batch_s_average)}"
        )
        parts.append(f"{table.rows_per_s:,.0f} a second")
    if not table.is_complete:
        parts.append("not complete")
    if table.verification is not None:
        found = table.verification
        parts.append(
            f"equal ({found.target_rows:,} rows)" if found.is_equal
            else f"DIFFERENT ({found.source_rows:,} rows in the source, {found.target_rows:,} in the target)"
        )  # fmt: skip
    return f"{name}: {', '.join(parts)}"


def _next_steps(report: CopyReport) -> Iterable[str]:
    if report.error is not None:
        yield f"walbatch: {' '.join(report.error.split())}"
        yield f"next: repair that and run the same command again; it goes on with what is in {report.store}"
    if report.failed:
        are = "row has" if report.failed == 1 else "rows have"
        yield (
            f"next: {report.failed:,} {are} failed: see walbatch dlq list {report.store}, repair the cause, and run the same "
            "command again; or drop them with walbatch dlq drop"
        )
    if not report.is_equal:
        yield (
            "next: the tables differ, because the source has changed since, or the target had other rows; "
            "run the same command again to copy all rows once more"
        )
