"""`walbatch verify` and `walbatch inspect`: look at a store, change nothing, also while an engine has it open."""

from __future__ import annotations

from typing import Annotated

import typer

from walbatch.cli.exits import Exit, exit_code
from walbatch.cli.output import progress_bar, show_json, size_text
from walbatch.cli.recover import found_json, show_cases
from walbatch.inspection import SegmentReport, StoreReport, look

PICTURE_COLUMNS = 64

StoreArgument = Annotated[str, typer.Argument(help="The store's directory.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document.")]


def verify(
    store: StoreArgument,
    *,
    audit: Annotated[
        bool, typer.Option("--audit", help="Also check every CRC with the second implementation (slow).")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Read every byte of STORE and check it.

    Changes nothing. Exit codes: 0 sound, 4 corruption, 6 newer format, 8 I/O error.
    """
    with progress_bar("verifying", hidden=as_json) as step:
        report = look(store, full=True, audit=audit, progress=step)
    found = report.store
    code = exit_code(found.refusal) if found.refusal else Exit.CORRUPT if report.problems else Exit.DONE
    if as_json:
        show_json(
            {
                **found_json(found), "frames": report.frames, "operations": report.operations, "bytes": report.bytes,
                "audited": audit, "problems": list(report.problems), "error": str(found.refusal) if found.refusal else None,
                "exit": code,
            }
        )  # fmt: skip
    else:
        typer.echo(
            f"{found.path}: {len(found.segments)} segments, {report.frames:,} frames, {report.operations:,} operations, "
            f"{size_text(report.bytes)} read" + (", CRCs checked twice" if audit else "")
        )
        show_cases(found)
        for problem in report.problems:
            typer.echo(f"  {problem}")
        if found.refusal is not None:
            typer.echo(str(found.refusal), err=True)
        else:
            typer.echo(
                "sound"
                if not report.problems
                else "damaged: keep a copy, then run 'walbatch recover --salvage'"
            )
    raise typer.Exit(code)


def inspect(store: StoreArgument, *, as_json: JsonOption = False) -> None:
    """Show segments, watermarks, lanes and a picture of the log of STORE. Changes nothing."""
    found = look(store, full=True).store
    if as_json:
        show_json(
            {
                **found_json(found), "checkpoint_generation": found.checkpoint_generation, "quarantine": list(found.quarantine),
                "segment_list": [
                    {"number": s.number, "bytes": s.file_bytes, "epoch": s.epoch, "first_lsn": s.first_lsn,
                     "last_lsn": s.last_lsn, "operations": s.operations, "row": s.label, "damage": s.damage}
                    for s in found.segments
                ],
            }
        )  # fmt: skip
    else:
        _show(found)
    raise typer.Exit(exit_code(found.refusal) if found.refusal else Exit.DONE)


def _show(found: StoreReport) -> None:
    typer.echo(f"store      {found.path}{' (in use)' if found.live else ''}")
    typer.echo(f"uuid       {found.uuid}")
    typer.echo(
        f"watermarks settled {found.settled_lsn:,} <= durable {found.durable_lsn:,}; next lsn {found.next_lsn:,}"
    )
    typer.echo(f"pending    {found.pending:,} operations")
    generation = found.checkpoint_generation
    typer.echo(f"checkpoint {'none' if generation is None else f'generation {generation:,}'}")
    typer.echo("")
    typer.echo(
        f"{'segment':>8} {'epoch':>6} {'first lsn':>16} {'last lsn':>16} {'operations':>12} {'size':>10}  row"
    )
    for segment in found.segments:
        typer.echo(
            f"{segment.number:>8} {segment.epoch:>6} {segment.first_lsn:>16,} {segment.last_lsn:>16,} {segment.operations:>12,} "
            f"{size_text(segment.file_bytes):>10}  {segment.label} {segment.decision}"
            + (f": {segment.damage}" if segment.damage else "")
        )
    if found.segments:
        typer.echo(
            f"\n{_picture(found.segments, found.settled_lsn)}\n  # settled   = pending   ! damaged   | segment boundary"
        )
    typer.echo("")
    for lane in found.lanes.values():
        shards = f"{lane.shards} shards" if lane.shards else "shards unknown"
        typer.echo(
            f"lane {lane.name}: {shards}, {lane.pending or 0:,} pending, backend {lane.url or 'not remembered'}"
        )
    show_cases(found)
    if found.quarantine:
        typer.echo(
            f"quarantine: {len(found.quarantine)} files; keep them until you know where they came from"
        )
    if found.refusal is not None:
        typer.echo(str(found.refusal), err=True)


def _picture(segments: tuple[SegmentReport, ...], settled_lsn: int) -> str:
    """The log from its oldest to its newest segment, as wide as each has operations."""
    total = max(1, sum(segment.operations for segment in segments))
    cells = []
    for segment in segments:
        width = max(1, round(PICTURE_COLUMNS * segment.operations / total))
        if segment.damage and segment.decision == "corrupt":
            cells.append("!" * width)
            continue
        span = max(1, segment.last_lsn - segment.first_lsn + 1)
        done = min(1.0, max(0.0, (settled_lsn - segment.first_lsn + 1) / span))
        filled = round(width * done)
        cells.append("#" * filled + "=" * (width - filled))
    return "  [" + "|".join(cells) + "]"
