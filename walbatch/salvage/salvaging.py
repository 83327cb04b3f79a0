"""A salvage from its look at the store to what it reports.

What is not here: what is repaired and how (`planning`, `rebuilding`).
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from walbatch.core.frame import FrameType
from walbatch.core.recovery import Plan, Severity, StoreFacts, make_plan
from walbatch.errors import CorruptionError
from walbatch.inspection import Count, Tally, find_store
from walbatch.ports import FileSystem
from walbatch.salvage.planning import plan_repairs
from walbatch.salvage.rebuilding import carry_out
from walbatch.salvage.repair import Repair, opened
from walbatch.storage.checkpoint import LmdbState
from walbatch.storage.dropped import read_dropped, with_dropped
from walbatch.storage.filesystem import RealFileSystem
from walbatch.storage.layout import Layout, read_identity
from walbatch.storage.observation import Settled
from walbatch.storage.store import STORE_ADVICE, raise_refusal, storage_errors, take_lock
from walbatch.storage.survey import survey
from walbatch.types import Range, merge_ranges


@dataclass(frozen=True, slots=True, kw_only=True)
class Salvage:
    """What a salvage gave up, or would."""

    lost: tuple[Range, ...] = ()
    """LSNs that are lost and were not settled. Some may never have named an operation."""
    end_lost_after: int | None = None
    """The end of the log is gone: what was acknowledged after this LSN cannot even be named. None: nothing."""
    rebuilt: tuple[int, ...] = ()
    """Numbers of the segments that were rebuilt, or put in the place of missing ones."""
    pending: Mapping[str, Count] = field(default_factory=dict)
    """What is left to deliver, by kind."""
    torn_bytes: int = 0
    copied_operations: int = 0
    next_lsn: int = 1
    """What the opening after it will copy, and hand out first."""

    @property
    def lost_something(self) -> bool:
        """Whether operations may be lost."""
        return bool(self.lost) or self.end_lost_after is not None


def salvage_store(path: str | os.PathLike[str], *, dry_run: bool = False) -> Salvage:
    """Rebuild every segment that recovery refuses; returns what that costs.

    With `dry_run` nothing is written. Otherwise the damaged files are in quarantine/, with a note of what is lost,
    before anything is replaced, and everything is durable at return. A crash at any point leaves a store on which it
    can be run again. A store that recovery does not refuse is left as it is (but for the count of what is pending, where a
    crash cut a salvage short).

    Raises CorruptionError for damage it cannot work around (nothing was changed), UnsupportedFormat, StoreLocked,
    ConfigError for a path that is no store, StorageError.
    """
    layout = find_store(path)
    fs = RealFileSystem()
    note = b"" if dry_run else json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
    with storage_errors(layout.root):
        lock = take_lock(fs, layout, note)
        try:
            return _salvage(fs, layout, dry_run=dry_run)
        finally:
            lock.release()


def _salvage(fs: FileSystem, layout: Layout, *, dry_run: bool) -> Salvage:
    seen = _see(fs, layout)
    _refuse_hopeless(seen.facts, layout)
    repairs, facts = plan_repairs(fs, layout, seen.facts, seen.settled.given_up)
    plan = make_plan(facts)
    if dry_run:
        return _report(repairs, plan, _pending(fs, layout, seen, repairs))
    for repair in repairs:
        carry_out(fs, layout, repair)
    if repairs:
        seen = _see(fs, layout)
        plan = make_plan(seen.facts)
        raise_refusal(plan, layout)
    pending = _pending(fs, layout, seen, ())
    # What an opening passes over is settled, but not yet to the checkpoint: it counts it when it covers it.
    uncounted = sum(tally.passed_over for tally in seen.tallies.values())
    _correct_count(layout, seen.facts, plan, uncounted + sum(count.operations for count in pending.values()))
    return _report(repairs, plan, pending)


def _report(repairs: Sequence[Repair], plan: Plan, pending: Mapping[str, Count]) -> Salvage:
    ends = [repair.known_lsn for repair in repairs if repair.last_lsn > repair.known_lsn]
    return Salvage(
        lost=merge_ranges((span for repair in repairs for span in repair.lost), 0),
        end_lost_after=min(ends, default=None),
        rebuilt=tuple(repair.header.number for repair in repairs),
        pending=pending,
        torn_bytes=sum(torn.end - torn.offset for torn in plan.torn),
        copied_operations=sum(frame.header.count for frame in plan.copied),
        next_lsn=plan.next_lsn,
    )


# --- what there is ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """The facts, and what was counted in each segment on the way."""

    facts: StoreFacts
    tallies: Mapping[int, Tally]
    settled: Settled


def _see(fs: FileSystem, layout: Layout) -> _Seen:
    """Read every byte of the store."""
    identity, uuid = read_identity(fs, layout)
    checkpoint, findings, given_up = None, list[str](), frozenset[int]()
    if uuid is not None:
        state = LmdbState.open(layout.state, uuid, readonly=True)
        try:
            checkpoint, findings = state.load_checkpoint()
            given_up, _ = state.load_given_up()
        finally:
            state.close()
    dropped, _ = read_dropped(fs, layout, uuid)
    settled = Settled(checkpoint=checkpoint, passed_over=with_dropped(checkpoint, dropped), given_up=given_up)
    tallies: dict[int, Tally] = {}
    facts = survey(
        fs, layout, identity=identity, store=uuid, checkpoint=checkpoint, state_findings=tuple(findings), full=True,
        visit=lambda number, header: tallies.setdefault(
            number, Tally(settled=settled)
        ).visit(number, header),
    )  # fmt: skip
    believed = (
        segment
        if segment.header is None or (segment.header.store, segment.header.number) == (uuid, segment.number)
        else replace(segment, header=None, scan=None)
        for segment in facts.segments
    )
    return _Seen(facts=replace(facts, segments=tuple(believed)), tallies=tallies, settled=settled)


def _refuse_hopeless(facts: StoreFacts, layout: Layout) -> None:
    """Raise where there is nothing to work with, or a newer walbatch has to do it."""
    plan = make_plan(facts)
    newer = next((case for case in plan.cases if case.severity is Severity.REFUSE_NEWER), None)
    if newer is not None:
        raise_refusal(replace(plan, cases=(newer,)), layout)
    refusal = plan.refusal
    if refusal is not None and refusal.segment is None:
        raise CorruptionError(
            f"{layout.root}: {refusal.message} ({refusal.label}), and a salvage has nothing to work with without it. Nothing was "
            f"changed; {STORE_ADVICE[refusal.label]}",
            path=layout.root, expected=refusal.message,
        )  # fmt: skip


def _pending(fs: FileSystem, layout: Layout, seen: _Seen, repairs: Sequence[Repair]) -> dict[str, Count]:
    """What is not settled, by kind: in the segments as they are, and as they would be rebuilt."""
    tallies = dict(seen.tallies)
    for repair in repairs:
        tallies[repair.header.number] = tally = Tally(settled=seen.settled)
        if not repair.kept:
            continue
        with opened(fs, layout, repair.header.number) as file:
            for whole in repair.kept:
                if whole.header.type is FrameType.OPERATIONS:
                    tally.count(repair.header.number, whole.offset, whole.header, whole.body(file))
    total: dict[str, Count] = {}
    for tally in tallies.values():
        for kind, count in tally.pending.items():
            entry = total.setdefault(kind, Count())
            entry.operations += count.operations
            entry.bytes += count.bytes
    return total


def _correct_count(layout: Layout, facts: StoreFacts, plan: Plan, unsettled: int) -> None:
    """Let the checkpoint count what was given up as settled, so that nobody waits for it.

    Crash story: nothing but this count depends on it. If it is not done, the next salvage does it.
    """
    checkpoint = facts.checkpoint
    if checkpoint is None or plan.pending == unsettled:
        return
    assert facts.store is not None
    state = LmdbState.open_for_engine(layout.state, facts.store, layout.quarantine)
    try:
        state.save_checkpoint(
            replace(
                checkpoint,
                generation=checkpoint.generation + 1,
                settled_count=max(0, checkpoint.settled_count + plan.pending - unsettled),
            )
        )
    finally:
        state.close()
