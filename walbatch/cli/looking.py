"""`walbatch verify` and `walbatch inspect`: look at a store, change nothing, also while an engine has it open."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from walbatch.cli.exits import Exit, exit_code, explain
from walbatch.cli.output import count_text, progress_bar, show_json, size_text
from walbatch.cli.recover import case_lines, found_json
from walbatch.inspection import SegmentReport, StoreReport, kept, look

PICTURE_COLUMNS = 76
"""Of the picture of the log."""

PICTURE_SEGMENTS_MAX = 24
"""Segments drawn one by one; of more, the newest are."""

StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="The store's directory.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Show one JSON document.")]


def verify(
    store: StoreArgument,
    *,
    audit: Annotated[
        bool, typer.Option("--audit", help="Check every CRC with a second implementation too (slow).")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Read every byte of STORE and check it: its log, and what state/ keeps.

    Changes nothing, also while an engine has the store open.

    Exit codes: 0 sound, 2 usage, 4 corruption, 6 newer format, 8 I/O error.
    """
    with progress_bar("verifying", hidden=as_json) as step:
        report = look(store, full=True, audit=audit, progress=step)
    found = report.store
    problems = [*report.problems, *found.findings]
    if found.uuid is not None:
        told = {case.message for case in found.cases}
        beside = kept(store)
        problems += [finding for finding in (*beside.damage, *beside.findings) if finding not in told]
    code = exit_code(found.refusal) if found.refusal else Exit.CORRUPT if problems else Exit.DONE
    if as_json:
        show_json(
            {
                **found_json(found), "frames": report.frames, "operations": report.operations, "bytes": report.bytes,
                "audited": audit, "problems": problems, "error": _without_verify(found) if found.refusal else None,
                "exit": code,
            }
        )  # fmt: skip
    else:
        typer.echo(
            f"{found.path}: {count_text(len(found.segments), 'segment')}, {count_text(report.frames, 'frame')}, "
            f"{count_text(report.operations, 'operation')}, {size_text(report.bytes)}"
            + (", every CRC checked twice" if audit else "")
        )
        for line in (*case_lines(found), *(f"  {problem}" for problem in problems)):
            typer.echo(line)
        if code == Exit.DONE:
            typer.echo("sound")
    if found.refusal is not None:
        typer.echo(f"walbatch: {_without_verify(found)}", err=True)
    elif problems:
        typer.echo(
            "walbatch: the store is damaged: keep a copy of it, and restore its files from an older one",
            err=True,
        )
    raise typer.Exit(code)


def _without_verify(found: StoreReport) -> str:
    """What is refused and what to do, which is not what has just been done."""
    assert found.refusal is not None
    return explain(found.refusal).replace(f"look with 'walbatch verify {found.path}', ", "")


def inspect(store: StoreArgument, *, as_json: JsonOption = False) -> None:
    """Show what STORE holds: segments, lanes, a picture of the log.

    Changes nothing, also while an engine has the store open. The letters and numbers beside each segment name the row of
    recovery's decision table that applies to it.

    Exit codes: 0 sound, 2 usage, 4 corruption, 6 newer format, 8 I/O error.
    """
    with progress_bar("reading", hidden=as_json) as step:
        found = look(store, full=True, progress=step).store
    if as_json:
        show_json(
            {
                **found_json(found), "checkpoint_generation": found.checkpoint_generation, "quarantine": list(found.quarantine),
                "segment_list": [
                    {"number": s.number, "bytes": s.file_bytes, "epoch": s.epoch, "first_lsn": s.first_lsn,
                     "last_lsn": s.last_lsn, "operations": s.operations, "pending": s.pending,
                     "frame_bytes": s.frame_bytes, "row": s.label, "decision": s.decision,
                     "damage": s.damage, "lost": s.lost}
                    for s in found.segments
                ],
                "error": explain(found.refusal) if found.refusal else None,
                "exit": exit_code(found.refusal) if found.refusal else Exit.DONE,
            }
        )  # fmt: skip
    else:
        for line in _lines(found):
            typer.echo(line)
    if found.refusal is not None:
        typer.echo(f"walbatch: {explain(found.refusal)}", err=True)
    raise typer.Exit(exit_code(found.refusal) if found.refusal else Exit.DONE)


def _lines(found: StoreReport) -> Iterator[str]:
    yield f"store       {found.path}{' (in use)' if found.live else ''}"
    yield f"uuid        {found.uuid or 'unknown'}"
    yield f"settled     LSN {found.settled_lsn:,}"
    yield f"durable     LSN {found.durable_lsn:,}"
    yield f"pending     {count_text(found.pending, 'operation')}"
    generation = found.checkpoint_generation
    yield f"checkpoint  {'none' if generation is None else f'generation {generation:,}'}"
    if found.segments:
        yield ""
        yield f"{'segment':>7} {'epoch':>5} {'first lsn':>15} {'last lsn':>15} {'operations':>11} {'size':>9} {'in frames':>9}  row"
        for segment in found.segments:
            size = size_text(segment.file_bytes)
            framed = "?" if segment.frame_bytes is None else size_text(segment.frame_bytes)
            yield (
                f"{segment.number:>7} {segment.epoch:>5} {segment.first_lsn:>15,} {segment.last_lsn:>15,} "
                f"{segment.operations:>11,} {size:>9} {framed:>9}  {segment.label} {segment.decision}"
            )
            if segment.damage:
                yield f"{'':>7} {segment.damage}"
            if segment.lost:
                yield f"{'':>7} {segment.lost:,} LSNs were given up by a salvage"
        yield ""
        yield from _picture(found.segments)
        rows = {segment.label: segment.situation for segment in found.segments if segment.label}
        yield from (f"  {label}: {situation}" for label, situation in rows.items())
    if found.lanes:
        yield ""
        width = max(4, *map(len, found.lanes))
        yield f"{'lane':<{width}} {'shards':>6} {'pending':>11}  backend"
        for lane in found.lanes.values():
            yield f"{lane.name:<{width}} {lane.shards or '?':>6} {lane.pending or 0:>11,}  {lane.url or 'none remembered'}"
    cases = list(case_lines(found))
    if cases or found.quarantine:
        yield ""
    yield from cases
    if found.quarantine:
        yield f"quarantine/ holds {count_text(len(found.quarantine), 'file')}: keep them until you know where they came from"


def _picture(segments: tuple[SegmentReport, ...]) -> Iterator[str]:
    """The log from its oldest to its newest segment, as wide as each has operations."""
    shown = segments[-PICTURE_SEGMENTS_MAX:]
    total = max(1, sum(segment.operations for segment in shown))
    room = PICTURE_COLUMNS - 2 * len(shown)
    cells = []
    before = 0
    for segment in shown:
        after = before + segment.operations
        width = 1 + room * after // total - room * before // total
        before = after
        if segment.decision == "corrupt":
            cells.append("!" * width)
            continue
        settled = segment.operations - (segment.pending or 0)
        filled = width * settled // max(1, segment.operations)
        cells.append("#" * filled + ("=" if segment.operations else ".") * (width - filled))
    yield f"{'...' if len(shown) < len(segments) else ''}[{'|'.join(cells)}]"
    yield "  # settled  = pending  . no operations  ! damaged"
