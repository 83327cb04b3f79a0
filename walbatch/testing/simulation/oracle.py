"""The oracle: whether what happened to a store keeps the guarantees. One pass over its history.

What is not here: how the history came about. It knows nothing of the engine's inside.

The idea needed to read it: each rule is a method on the event that can break it, and says in one sentence what is
wrong. Operations are named by their payloads, which are distinct.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from walbatch.core.routing import shard_of
from walbatch.testing.simulation.history import (
    Acknowledged,
    AppliedTo,
    Checkpointed,
    Drained,
    Ended,
    Event,
    Opened,
    Resolved,
    Submitted,
    SyncFailed,
)
from walbatch.testing.simulation.images import Cut

GRACE_SLACK_NS = 10_000_000
"""What an interval lane may exceed its interval by: one wake-up of the thread that syncs."""

PAYLOAD_SHOWN_BYTES = 12


@dataclass(slots=True)
class _Operation:
    """What is known of one operation."""

    submitted: Submitted
    above_lsn: int
    """The highest LSN that was acknowledged before it was submitted."""
    after_failure: bool
    """Submitted after a failed sync of the same life."""
    lsn: int | None = None
    acknowledged_ns: int | None = None
    life: int = 0
    fragile: bool = False
    """A power cut may still lose it."""
    excused: bool = False
    applied: int = 0


@dataclass(slots=True)
class Oracle:
    """Judges a history. `exactly_once`: lanes with a transactional backend. `unordered`: lanes that promise no order."""

    exactly_once: Collection[str] = ()
    unordered: Collection[str] = ()
    shards: Mapping[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    _lsns: dict[bytes, int] = field(default_factory=dict)
    """LSNs of all operations that are acknowledged at any time."""
    _operations: dict[bytes, _Operation] = field(default_factory=dict)
    _names: dict[tuple[bytes, int], bytes] = field(default_factory=dict)
    _acknowledged_names: dict[int, bytes] = field(default_factory=dict)
    _newest: dict[tuple[str, bytes], int] = field(default_factory=dict)
    _highest_lsn: int = 0
    _life: int = 0
    _failed: bool = False

    def judge(self, events: Iterable[Event]) -> list[str]:
        """Every breach of a guarantee, in the order of the events."""
        events = list(events)
        self._lsns = {e.payload: e.lsn for e in events if isinstance(e, Acknowledged) and e.lsn is not None}
        for event in events:
            match event:
                case Opened():
                    self._opened()
                case Submitted():
                    self._submitted(event)
                case Acknowledged():
                    self._acknowledged(event)
                case AppliedTo():
                    self._applied(event)
                case Checkpointed():
                    self._checkpointed(event)
                case SyncFailed():
                    self._failed = True
                case Resolved():
                    self._resolved(event)
                case Drained():
                    self._drained()
                case Ended():
                    self._ended(event)
        return self.problems

    # --- lives ---

    def _opened(self) -> None:
        """What was recovered is exposed: from here on it must stay."""
        self._failed = False
        for operation in self._operations.values():
            operation.fragile = False

    def _ended(self, event: Ended) -> None:
        for operation in self._operations.values():
            if not operation.fragile or operation.acknowledged_ns is None:
                continue
            grace = operation.submitted.grace_ns
            kept = grace is not None and event.at_ns - operation.acknowledged_ns >= grace + GRACE_SLACK_NS
            if kept and operation.life == self._life:
                operation.fragile = False
            elif event.cut is Cut.POWER or grace is None:
                operation.excused = True
        self._life += 1

    # --- operations ---

    def _submitted(self, event: Submitted) -> None:
        assert event.payload not in self._operations, "payloads name operations: they must be distinct"
        self._operations[event.payload] = _Operation(event, self._highest_lsn, self._failed, life=self._life)

    def _acknowledged(self, event: Acknowledged) -> None:
        operation = self._operations[event.payload]
        operation.acknowledged_ns = event.at_ns
        operation.fragile = operation.submitted.grace_ns != 0
        if operation.after_failure:
            self._report(operation, "was acknowledged although a sync had failed before it was submitted")
        if event.lsn is not None:
            self._name(operation, event.lsn)
            other = self._acknowledged_names.setdefault(event.lsn, event.payload)
            if other != event.payload:
                self._report(operation, f"and {_short(other)} were both acknowledged as LSN {event.lsn}")
            self._highest_lsn = max(self._highest_lsn, event.lsn)

    def _name(self, operation: _Operation, lsn: int) -> None:
        if operation.lsn is None:
            operation.lsn = lsn
            if lsn <= operation.above_lsn:
                self._report(
                    operation,
                    f"got LSN {lsn}, but {operation.above_lsn} was acknowledged before it was submitted",
                )
        elif operation.lsn != lsn:
            self._report(operation, f"has two LSNs: {operation.lsn} and {lsn}")

    def _applied(self, event: AppliedTo) -> None:
        operation = self._operations.get(event.payload)
        if operation is None:
            self.problems.append(
                f"invented: {_short(event.payload)} (LSN {event.lsn}) was applied and never submitted"
            )
            return
        submitted = operation.submitted
        if (submitted.lane, submitted.key) != (event.lane, event.key):
            self._report(
                operation,
                f"was submitted to {submitted.lane} as {submitted.key!r}, and applied to {event.lane} as {event.key!r}",
            )
        operation.applied += 1
        if event.lsn is None:
            return
        self._name(operation, event.lsn)
        other = self._names.setdefault((event.store, event.lsn), event.payload)
        if other != event.payload:
            self._report(operation, f"and {_short(other)} were both applied as LSN {event.lsn}")
        if operation.applied > 1:
            if event.lane in self.exactly_once:
                self._report(operation, f"took effect {operation.applied} times on a transactional backend")
            return
        newest = self._newest.get((event.lane, event.key), 0)
        if newest > event.lsn and event.lane not in self.unordered:
            self._report(
                operation, f"(LSN {event.lsn}) was applied after LSN {newest} of the same key {event.key!r}"
            )
        self._newest[event.lane, event.key] = max(newest, event.lsn)

    def _resolved(self, event: Resolved) -> None:
        operation = self._operations[event.payload]
        if not event.done:
            self._report(operation, "has a ticket that nobody resolved")
        if event.applied and not operation.applied:
            self._report(operation, "has a ticket that says applied, and was not")

    # --- the store ---

    def _checkpointed(self, event: Checkpointed) -> None:
        """A checkpoint never says settled of what was acknowledged and not applied."""
        checkpoint = event.checkpoint
        for operation in self._operations.values():
            lsn = self._lsns.get(operation.submitted.payload)
            if lsn is None or operation.applied or operation.excused:
                continue
            lane = operation.submitted.lane
            known = checkpoint.lanes.get(lane)
            shard = shard_of(operation.submitted.key, self.shards.get(lane, 1))
            covered = known is not None and shard < len(known.shards) and known.shards[shard].covers(lsn)
            if lsn <= checkpoint.watermark or covered:
                self._report(
                    operation,
                    f"(LSN {lsn}) is settled by checkpoint {checkpoint.generation}, and was not applied",
                )

    def _drained(self) -> None:
        for operation in self._operations.values():
            if operation.acknowledged_ns is None or operation.applied or operation.excused:
                continue
            if operation.submitted.grace_ns is None and operation.life != self._life:
                continue
            self._report(operation, f"(LSN {operation.lsn}) was acknowledged and is lost")

    def _report(self, operation: _Operation, what: str) -> None:
        self.problems.append(f"{_short(operation.submitted.payload)} {what}")


def _short(payload: bytes) -> str:
    """Enough of a payload to name its operation."""
    return repr(payload[:PAYLOAD_SHOWN_BYTES])
