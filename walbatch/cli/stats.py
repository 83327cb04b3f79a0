"""`walbatch stats`: the figures of a store, as far as they can be told without an engine; changes nothing."""

from __future__ import annotations

from collections.abc import Iterator

import typer

from walbatch.cli.exits import Exit, exit_code, explain
from walbatch.cli.looking import JsonOption, StoreArgument
from walbatch.cli.output import count_text, progress_bar, show_json, size_text
from walbatch.cli.recover import case_lines
from walbatch.inspection import Count, KeptReport, LaneReport, StoreReport, kept, look


def stats(store: StoreArgument, *, as_json: JsonOption = False) -> None:
    """Show the figures of STORE, in all and by lane.

    Changes nothing, also while an engine has the store open. What an engine measures while it runs (times, rates, cut
    reasons) is in Engine.stats(). Reads the log once.

    Exit codes: 0 done, 2 usage, 4 corruption, 6 newer format, 8 I/O error.
    """
    with progress_bar("reading", hidden=as_json) as step:
        found = look(store, full=True, progress=step).store
    if found.refusal is not None and found.uuid is None:
        raise found.refusal
    beside = kept(store)
    error = explain(found.refusal) if found.refusal else None
    code = exit_code(found.refusal) if found.refusal else Exit.DONE
    if as_json:
        show_json({**_document(found, beside), "error": error, "exit": code})
    else:
        for line in _lines(found, beside):
            typer.echo(line)
    if error is not None:
        typer.echo(f"walbatch: {error}", err=True)
    elif any(count.operations for count in beside.letters.values()):
        typer.echo(f"next: see the dead letters with walbatch dlq list {store}", err=True)
    raise typer.Exit(code)


def _log_bytes(found: StoreReport) -> int:
    return sum(segment.file_bytes for segment in found.segments)


def _names(found: StoreReport, beside: KeptReport) -> list[str]:
    """Every lane that something is known of."""
    return sorted(
        {*found.lanes, *beside.letters, *beside.idempotency_keys, *(lane for lane, _ in beside.controllers)}
    )


def _lane(found: StoreReport, name: str) -> LaneReport:
    return found.lanes.get(name) or LaneReport(name=name, shards=None, url=None)


def _learnt(beside: KeptReport, name: str) -> list[dict[str, object]]:
    """What the controllers of a lane have learnt, by shard."""
    return [
        {"shard": shard, "name": state.name, "lead_count": state.lead_count, "cost_s": state.cost_s, "samples": state.samples}
        if state is not None else {"shard": shard, "name": None}
        for (lane, shard), state in beside.controllers.items() if lane == name
    ]  # fmt: skip


def _document(found: StoreReport, beside: KeptReport) -> dict[str, object]:
    """For programs."""
    lanes = {}
    for name in _names(found, beside):
        lane, letters = _lane(found, name), beside.letters.get(name, Count())
        lanes[name] = {
            "pending": lane.pending or 0, "pending_bytes": lane.pending_bytes or 0, "settled_lsn": lane.settled_lsn,
            "shards": lane.shards, "url": lane.url, "dead_letters": letters.operations, "dead_letter_bytes": letters.bytes,
            "idempotency_keys": beside.idempotency_keys.get(name, 0), "controllers": _learnt(beside, name),
        }  # fmt: skip
    return {
        "store": found.path, "uuid": found.uuid, "live": found.live, "pending": found.pending,
        "settled_count": found.settled_count, "durable_lsn": found.durable_lsn, "settled_lsn": found.settled_lsn,
        "dead_letters": sum(count.operations for count in beside.letters.values()),
        "dead_letter_bytes": sum(count.bytes for count in beside.letters.values()),
        "idempotency_keys": sum(beside.idempotency_keys.values()), "segments": len(found.segments),
        "log_bytes": _log_bytes(found), "state_bytes": beside.state_bytes, "lanes": lanes,
        "cases": [line.strip() for line in case_lines(found)], "findings": list(beside.findings),
    }  # fmt: skip


def _lines(found: StoreReport, beside: KeptReport) -> Iterator[str]:
    """For people."""
    letters = sum(count.operations for count in beside.letters.values())
    letter_bytes = sum(count.bytes for count in beside.letters.values())
    yield f"store         {found.path}{' (in use)' if found.live else ''}"
    yield f"settled       {count_text(found.settled_count, 'operation')}, all up to LSN {found.settled_lsn:,}"
    yield f"pending       {count_text(found.pending, 'operation')}, durable up to LSN {found.durable_lsn:,}"
    yield f"dead letters  {letters:,}, {size_text(letter_bytes)}"
    yield f"idempotency   {count_text(sum(beside.idempotency_keys.values()), 'key')} in state/"
    yield f"log           {count_text(len(found.segments), 'segment')}, {size_text(_log_bytes(found))}"
    yield f"state         {size_text(beside.state_bytes)}"
    names = _names(found, beside)
    width = max([4, *map(len, names)])
    if names:
        yield ""
        yield f"{'lane':<{width}} {'shards':>6} {'pending':>11} {'bytes':>9} {'dead':>7} {'keys':>9}  learnt batch sizes"
    for name in names:
        lane, dead = _lane(found, name), beside.letters.get(name, Count())
        yield (
            f"{name:<{width}} {lane.shards or '?':>6} {lane.pending or 0:>11,} {size_text(lane.pending_bytes or 0):>9} "
            f"{dead.operations:>7,} {beside.idempotency_keys.get(name, 0):>9,}  {_sizes(beside, name)}"
        )
    yield from case_lines(found)
    yield from (f"  {finding}" for finding in beside.findings)


def _sizes(beside: KeptReport, name: str) -> str:
    """The learnt sizes of a lane's shards, smallest and largest."""
    places = [state for (lane, _), state in beside.controllers.items() if lane == name]
    counts = [state.lead_count for state in places if state is not None]
    if not counts:
        return "none" if not places else "not readable"
    span = f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
    return span if len(counts) == 1 else f"{span}, over {len(counts):,} shards"
