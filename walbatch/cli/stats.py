"""`walbatch stats`: the figures of a store, as far as they can be told without an engine; changes nothing."""

from __future__ import annotations

from collections.abc import Iterator

import typer

from walbatch.cli.exits import Exit, exit_code, explain
from walbatch.cli.looking import JsonOption, StoreArgument
from walbatch.cli.output import count_text, duration_text, progress_bar, show_json, size_text
from walbatch.cli.recover import case_lines
from walbatch.inspection import Count, Expectation, KeptReport, LaneReport, StoreReport, kept, look


def stats(store: StoreArgument, *, as_json: JsonOption = False) -> None:
    """Show the figures of STORE, in all and by lane.

    Changes nothing, also while an engine has the store open. Reads the log once. What an engine counts and measures while it runs
    (times, throughput, cut reasons, savings) is in its Engine.stats(); of that, the store keeps the learnt batch sizes, and what
    the last days were like at this hour.

    Exit codes: 0 done, 2 usage, 4 corruption (also of dead letters), 6 newer format, 8 I/O error.
    """
    with progress_bar("reading", hidden=as_json) as step:
        found = look(store, full=True, progress=step).store
    if found.refusal is not None and found.uuid is None:
        raise found.refusal
    beside = kept(store)
    error = explain(found.refusal) if found.refusal else None
    told = {case.message for case in found.cases}
    damage = [finding for finding in beside.damage if finding not in told]
    code = exit_code(found.refusal) if found.refusal else Exit.CORRUPT if damage else Exit.DONE
    if as_json:
        show_json({**_document(found, beside), "error": error, "exit": code})
    else:
        for line in _lines(found, beside):
            typer.echo(line)
    if error is not None:
        typer.echo(f"walbatch: {error}", err=True)
    elif damage:
        typer.echo(f"walbatch: dead letters are damaged: see them with walbatch dlq list {store}", err=True)
    elif any(count.operations for count in beside.letters.values()):
        typer.echo(f"next: see the dead letters with walbatch dlq list {store}", err=True)
    raise typer.Exit(code)


def _log_bytes(found: StoreReport) -> int:
    return sum(segment.file_bytes for segment in found.segments)


def _names(found: StoreReport, beside: KeptReport) -> list[str]:
    """Every lane that something is known of."""
    return sorted(
        {
            *found.lanes,
            *beside.letters,
            *beside.idempotency_keys,
            *beside.usual,
            *(lane for lane, _ in beside.controllers),
        }
    )


def _lane(found: StoreReport, name: str) -> LaneReport:
    return found.lanes.get(name) or LaneReport(name=name, shards=None, url=None)


def _learnt(beside: KeptReport, name: str) -> list[dict[str, object]]:
    """What the controllers of a lane have learnt, by shard."""
    return [
        {"shard": shard, "name": None if state is None else state.name} if state is None or state.name == "fixed" else
        {"shard": shard, "name": state.name, "lead_count": state.lead_count, "cost_s": state.cost_s, "samples": state.samples}
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
            "usual": _usual(beside.usual.get(name)),
        }  # fmt: skip
    return {
        "store": found.path, "uuid": found.uuid, "live": found.live, "pending": found.pending, "passed_over": found.passed_over,
        "settled_count": found.settled_count, "durable_lsn": found.durable_lsn, "settled_lsn": found.settled_lsn,
        "dead_letters": sum(count.operations for count in beside.letters.values()),
        "dead_letter_bytes": sum(count.bytes for count in beside.letters.values()),
        "idempotency_keys": sum(beside.idempotency_keys.values()), "segments": len(found.segments),
        "log_bytes": _log_bytes(found), "state_bytes": beside.state_bytes, "lanes": lanes,
        "cases": [line.strip() for line in case_lines(found)], "findings": _findings(found, beside),
    }  # fmt: skip


def _lines(found: StoreReport, beside: KeptReport) -> Iterator[str]:
    """For people."""
    letters = sum(count.operations for count in beside.letters.values())
    letter_bytes = sum(count.bytes for count in beside.letters.values())
    yield f"store         {found.path}{' (in use)' if found.live else ''}"
    upto = f"; none up to LSN {found.settled_lsn:,} is pending" if found.settled_lsn else ""
    yield f"settled       {count_text(found.settled_count, 'operation')}{upto}"
    yield f"pending       {count_text(found.pending, 'operation')}, durable up to LSN {found.durable_lsn:,}"
    if found.passed_over:
        yield f"passed over   {count_text(found.passed_over, 'operation')} that the log still holds: dead, cancelled or dropped"
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
    yield from (f"  {finding}" for finding in _findings(found, beside))
    if beside.usual:
        yield ""
        yield "usual at this hour"
        yield f"{'lane':<{width}} {'operations/s':>13} {'operations/batch':>16} {'time/batch':>10}"
    for name, usual in beside.usual.items():
        rate = f"{usual.rate:,.1f}" if usual.rate else "unknown yet"
        yield f"{name:<{width}} {rate:>13} {usual.count:>16,.1f} {duration_text(usual.seconds):>10}"
    yield ""
    yield "times, throughput, cut reasons and savings: Engine.stats() of the process that has the store open"


def _findings(found: StoreReport, beside: KeptReport) -> list[str]:
    """What could not be read of state/, and is no case of recovery's."""
    told = {case.message for case in found.cases}
    findings = dict.fromkeys((*found.findings, *beside.damage, *beside.findings))
    return [finding for finding in findings if finding not in told]


def _usual(usual: Expectation | None) -> dict[str, float | None] | None:
    """What this hour is usually like; the rate is None where it was not watched for long enough."""
    if usual is None:
        return None
    return {
        "rate": usual.rate or None,
        "batch_count": usual.count,
        "operation_bytes": usual.bytes,
        "batch_s": usual.seconds,
    }


def _sizes(beside: KeptReport, name: str) -> str:
    """The learnt sizes of a lane's shards, smallest and largest."""
    places = [state for (lane, _), state in beside.controllers.items() if lane == name]
    if places and all(state is not None and state.name == "fixed" for state in places):
        return "fixed"  # the size is a setting of the lane's, and not in the store
    counts = [state.lead_count for state in places if state is not None and state.name != "fixed"]
    if not counts:
        return "none" if not places else "not readable"
    span = f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
    return span if len(counts) == 1 else f"{span}, over {len(counts):,} shards"
