"""`walbatch recover`: make a store consistent, show what was found, drain what is pending."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Annotated

import typer

from walbatch.cli.exits import Exit, exit_code
from walbatch.cli.lanes import build_lanes, parse_lanes
from walbatch.cli.output import progress_bar, show_json, size_text
from walbatch.config import Lane
from walbatch.engine import Engine
from walbatch.errors import ConfigError, CorruptionError, ResultTimeout
from walbatch.inspection import StoreReport, look, remembered_lanes
from walbatch.metrics import CloseReport
from walbatch.salvage import salvage_store

POLL_S = 0.2
STOP_S = 5.0


def recover(
    store: Annotated[str, typer.Argument(help="The store's directory.")],
    to: Annotated[str | None, typer.Option(help="URL of the backend, for a store with one lane.")] = None,
    lane: Annotated[list[str] | None, typer.Option(help="KIND=URL; may be given several times.")] = None,
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write nothing; show what would be done.")
    ] = False,
    salvage: Annotated[
        bool, typer.Option("--salvage", help="Give up what is damaged, and say what that is.")
    ] = False,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds to drain; default: as long as it makes progress.")
    ] = None,
    stall: Annotated[float, typer.Option(help="Seconds without progress after which to give up.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Make STORE consistent, show what was found, and drain what is pending to its backends.

    Exit codes: 0 consistent and drained, 2 usage, 3 work left, 4 corruption (nothing changed), 5 locked, 6
    newer format, 7 salvaged with stated loss, 8 I/O error.
    """
    named = parse_lanes(lane or ())
    with progress_bar("checking", hidden=as_json) as step:
        found = look(store, full=True, lock=True, progress=step).store
    lost: tuple[tuple[int, int], ...] = ()
    if isinstance(found.refusal, CorruptionError) and salvage and not dry_run:
        lost = salvage_store(store)
        found = look(store, full=True, lock=True).store
    if found.refusal is not None:
        if as_json:
            show_json({**found_json(found), "error": str(found.refusal), "exit": exit_code(found.refusal)})
            raise typer.Exit(exit_code(found.refusal))
        raise found.refusal
    if found.uuid is None:
        raise ConfigError(f"{found.path} holds no store: nothing to recover; check the path")
    lanes = build_lanes(remembered_lanes(store), named=named, to=to)
    unserved = sorted(
        kind
        for kind, report in found.lanes.items()
        if report.pending and (kind not in lanes or lanes[kind].backend is None)
    )
    work_left = bool(unserved)
    drained: CloseReport | None = None
    if not dry_run and lanes:
        drained = _drain(store, lanes, found, timeout=timeout, stall=stall, quiet=as_json)
        work_left = drained.remaining > 0
    code = Exit.SALVAGED if lost else Exit.WORK_LEFT if work_left else Exit.DONE
    if as_json:
        show_json(
            {
                **found_json(found), "dry_run": dry_run, "lost": [list(span) for span in lost],
                "delivered": drained.settled if drained else 0, "remaining": drained.remaining if drained else found.pending,
                "elapsed_s": drained.elapsed_s if drained else 0.0, "without_backend": unserved, "exit": code,
            }
        )  # fmt: skip
    else:
        _show(found, lost, drained, unserved, dry_run=dry_run)
    raise typer.Exit(code)


def _drain(
    store: str,
    lanes: dict[str, Lane],
    found: StoreReport,
    *,
    timeout: float | None,
    stall: float,
    quiet: bool,
) -> CloseReport:
    """Open the store, drain it while that makes progress, close it."""
    engine = Engine.open(store, lanes=lanes)
    started = progressed = time.monotonic()
    settled = 0
    served = sum(
        report.pending or 0
        for kind, report in found.lanes.items()
        if kind in lanes and lanes[kind].backend is not None
    )
    try:
        with progress_bar("draining", hidden=quiet or not served) as step:
            while served:
                try:
                    engine.flush(timeout=POLL_S)
                except ResultTimeout:
                    pass
                else:
                    break
                now, done = time.monotonic(), found.pending - engine.stats().pending
                if done > settled:
                    settled, progressed = done, now
                step(done, served)
                if now - progressed > stall or (timeout is not None and now - started > timeout):
                    break
    finally:
        errors = [
            f"{kind}: {lane.last_error}" for kind, lane in engine.stats().lanes.items() if lane.last_error
        ]
        report = engine.close(drain=False, timeout=STOP_S)
        for error in errors if report.remaining else ():
            typer.echo(f"last error of lane {error}", err=True)
    return replace(report, settled=max(0, found.pending - report.remaining))


def found_json(found: StoreReport) -> dict[str, object]:
    """What a look found, for programs."""
    return {
        "store": found.path, "uuid": found.uuid, "live": found.live, "durable_lsn": found.durable_lsn,
        "settled_lsn": found.settled_lsn, "next_lsn": found.next_lsn, "pending": found.pending,
        "settled_count": found.settled_count,
        "segments": len(found.segments), "torn_bytes": found.torn_bytes, "copied_operations": found.copied_operations,
        "lanes": {
            name: {"pending": lane.pending, "shards": lane.shards, "url": lane.url} for name, lane in found.lanes.items()
        },
        "cases": [
            {"label": case.label, "severity": case.severity.name.lower(), "message": case.message, "segment": case.segment,
             "offset": case.offset, "first_lsn": case.first_lsn, "last_lsn": case.last_lsn}
            for case in found.cases
        ],
    }  # fmt: skip


def show_cases(found: StoreReport) -> None:
    """What recovery found, a line each; what is fine is left out."""
    for case in found.cases:
        if case.is_noteworthy:
            place = f" (segment {case.segment}, offset {case.offset})" if case.segment is not None else ""
            typer.echo(f"  {case.label}: {case.message}{place}")


def _show(
    found: StoreReport,
    lost: tuple[tuple[int, int], ...],
    drained: CloseReport | None,
    unserved: list[str],
    *,
    dry_run: bool,
) -> None:
    """For people."""
    size = sum(segment.file_bytes for segment in found.segments)
    typer.echo(
        f"{found.path}: {len(found.segments)} segments, {size_text(size)}, {found.pending:,} operations pending"
    )
    show_cases(found)
    for first, last in lost:
        typer.echo(f"  LOST: operations {first} to {last}; the damaged bytes are in quarantine/")
    for name, lane in found.lanes.items():
        if lane.pending:
            typer.echo(f"  lane {name}: {lane.pending:,} pending, to {lane.url or 'no remembered backend'}")
    if dry_run:
        if found.torn_bytes:
            typer.echo(f"would copy {found.torn_bytes:,} torn bytes to quarantine/")
        if found.copied_operations:
            typer.echo(f"would copy {found.copied_operations:,} unproven operations forward and sync them")
        typer.echo(f"would continue at LSN {found.next_lsn:,}; nothing was written")
    elif drained is not None:
        rate = drained.settled / drained.elapsed_s if drained.elapsed_s else 0
        typer.echo(
            f"delivered {drained.settled:,}, {drained.remaining:,} left"
            + (f" ({rate:,.0f} a second)" if rate else "")
        )
    else:
        typer.echo("nothing pending")
    if unserved:
        typer.echo(
            f"next: name a backend for {', '.join(unserved)}, for example --lane {unserved[0]}=lmdb:///path"
        )
    elif drained is not None and drained.remaining:
        typer.echo("next: repair the backend and run this again; the operations are safe in the log")
