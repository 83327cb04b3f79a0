"""The oracle: whether what happened to a store keeps the guarantees. It takes a history event by event.

What is not here: how the history came about. It knows nothing of the engine's inside.

The idea needed to read it: each rule is a method on the event that can break it, and says in one sentence what is
wrong. Operations are named by their payloads, which are distinct. What changes stands in small tables of immutable
values, so that a `fork` costs a few copies: a history with many ends is judged once up to where they part.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from walbatch.core.routing import shard_of
from walbatch.testing.simulation.history import (
    Acknowledged,
    AppliedTo,
    Checkpointed,
    Damaged,
    Drained,
    Ended,
    Event,
    Lied,
    Logged,
    Opened,
    Predicted,
    Refused,
    Resolved,
    Submitted,
    SyncFailed,
)
from walbatch.testing.simulation.images import Cut
from walbatch.types import Checkpoint

GRACE_SLACK_NS = 10_000_000
"""What an interval lane may exceed its interval by: one wake-up of the thread that syncs."""

SEGMENTS_MAX = 1
"""Segments that are left when everything is settled and checkpointed: the active one."""

NOTE_BYTES_MAX = 512
"""What the note beside a copy in quarantine/ may have."""

PAYLOAD_SHOWN_BYTES = 12


_VALUES: Final = (
    "_checkpoint", "_by_shard", "_exactly_once", "_failed", "_highest_lsn", "_incarnation", "_life", "_predicted", "_shards",
    "_syncs", "_unordered",
)  # fmt: skip
"""What a fork shares: it is replaced, never changed."""

_TABLES: Final = (
    "_acknowledged", "_acknowledged_names", "_applied", "_damaged", "_excused", "_exposed", "_fragile", "_lied", "_lsns", "_names",
    "_newest", "_operations", "_owed", "_spans", "problems",
)  # fmt: skip
"""What a fork copies. All hold immutable values."""


@dataclass(frozen=True, slots=True)
class _Operation:
    """What was known of an operation when it was submitted."""

    submitted: Submitted
    above_lsn: int
    """The highest LSN that was acknowledged before it was submitted."""
    after_failure: bool
    """Submitted after a failed sync of the same incarnation."""
    life: int
    incarnation: int


class Oracle:
    """Judges a history: `take` each event, or `judge` all of them; `problems` are the breaches so far.

    `exactly_once`: lanes with a transactional backend. `unordered`: lanes that promise no order. `by_shard`: lanes that
    keep the order of a whole shard. `shards`: the number of each lane, 1 where it is not named.
    """

    __slots__ = (*_VALUES, *_TABLES)

    def __init__(
        self, *, exactly_once: Collection[str] = (), unordered: Collection[str] = (), by_shard: Collection[str] = (),
        shards: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        self._exactly_once = exactly_once
        self._unordered = unordered
        self._by_shard = by_shard
        self._shards = shards or {}
        self.problems: list[str] = []
        self._life = 0
        self._incarnation = 0
        self._failed = False
        self._highest_lsn = 0
        self._syncs = 0
        self._checkpoint: Checkpoint | None = None
        self._predicted: Predicted | None = None
        # By payload.
        self._operations: dict[bytes, _Operation] = {}
        self._lsns: dict[bytes, int] = {}
        self._acknowledged: dict[bytes, Acknowledged] = {}
        self._applied: dict[bytes, int] = {}
        # Acknowledged (or exposed by a recovery), not applied, and not excused.
        self._owed: dict[bytes, None] = {}
        # A power cut may still lose it.
        self._fragile: dict[bytes, None] = {}
        self._excused: dict[bytes, None] = {}
        self._exposed: dict[bytes, None] = {}
        self._damaged: dict[bytes, None] = {}
        self._lied: dict[bytes, None] = {}
        # By LSN, by key or shard, by incarnation.
        self._names: dict[tuple[bytes, int], bytes] = {}
        self._acknowledged_names: dict[int, bytes] = {}
        self._newest: dict[tuple[str, object], int] = {}
        self._spans: dict[int, tuple[int, int, int]] = {}

    def __repr__(self) -> str:
        counts = f"{len(self._operations)} operations, {len(self._owed)} owed, {len(self.problems)} problems"
        return f"<Oracle life {self._life}, {counts}>"

    def fork(self) -> Oracle:
        """A twin that has taken the same events, and goes its own way from here. O(operations), a few microseconds."""
        twin = Oracle.__new__(Oracle)
        for name in _VALUES:
            setattr(twin, name, getattr(self, name))
        for name in _TABLES:
            setattr(twin, name, getattr(self, name).copy())
        return twin

    def judge(self, events: Iterable[Event]) -> list[str]:
        """Take all of them. Every breach of a guarantee so far, in the order of the events."""
        for event in events:
            _RULES[type(event)](self, event)
        return self.problems

    def take(self, event: Event) -> None:
        """What happened next."""
        _RULES[type(event)](self, event)

    # --- lives ---

    def _predict(self, event: Predicted) -> None:
        """A look writes nothing, and sees only what was submitted."""
        self._predicted = event
        if event.wrote:
            self.problems.append("looking at the store has changed it")
        before = None
        for logged in event.logged or ():
            operation = self._operations.get(logged.payload)
            if operation is None or (operation.submitted.lane, operation.submitted.key) != (
                logged.lane,
                logged.key,
            ):
                self.problems.append(
                    f"invented: {_short(logged.payload)} (LSN {logged.lsn}) is in the log and was never submitted"
                )
                continue
            self._name(operation, logged.lsn)
            if before is not None:
                self._check_neighbours(before, (operation, logged))
            before = (operation, logged)
        if event.logged is not None:
            kept = {logged.payload for logged in event.logged}
            for payload in self._exposed:
                if payload not in kept and payload not in self._applied and not event.refusal:
                    self._report(payload, "was recovered before, and is no longer in the log")

    def _check_neighbours(self, one: tuple[_Operation, Logged], other: tuple[_Operation, Logged]) -> None:
        """What is recovered of an incarnation has no holes, but for what is settled: trimmed segments may come back."""
        low, high = one[1].lsn, other[1].lsn
        settled_lsn = self._checkpoint.watermark if self._checkpoint else 0
        if high <= low:
            self.problems.append(f"the log holds LSN {high} behind LSN {low}")
        elif high > max(low, settled_lsn) + 1 and one[0].incarnation == other[0].incarnation:
            self.problems.append(
                f"the log holds LSN {low} and {high} of one incarnation, and nothing between"
            )

    def _open(self, event: Opened) -> None:
        """What was recovered is exposed: from here on it must stay. It is what a look has predicted."""
        self._failed = False
        self._incarnation += 1
        self._fragile.clear()
        predicted, self._predicted = self._predicted, None
        if predicted is None:
            return
        self._expose(predicted)
        if predicted.refusal:
            self.problems.append(f"a look predicted {predicted.refusal}, and the store was opened")
        if event.cases is not None and event.cases != predicted.cases:
            self.problems.append(f"a look predicted {predicted.cases}, and opening found {event.cases}")
        if event.next_lsn is not None and event.next_lsn != predicted.next_lsn:
            self.problems.append(
                f"a look predicted to go on at LSN {predicted.next_lsn}, and the engine went on at {event.next_lsn}"
            )
        if event.quarantine_bytes is not None:
            grown = event.quarantine_bytes - predicted.quarantine_bytes
            if grown > predicted.torn_bytes + NOTE_BYTES_MAX * predicted.torn_count:
                self.problems.append(
                    f"quarantine/ grew by {grown} bytes, where {predicted.torn_bytes} were torn"
                )

    def _expose(self, predicted: Predicted) -> None:
        for logged in predicted.logged or ():
            payload = logged.payload
            if payload in self._operations and payload not in self._lied:
                self._excused.pop(payload, None)
                self._exposed[payload] = None
                if payload not in self._applied:
                    self._owed[payload] = None

    def _refuse(self, event: Refused) -> None:
        """An error at opening tells of damage; and it is what a look has predicted."""
        predicted, self._predicted = self._predicted, None
        if predicted is not None and predicted.refusal != event.error:
            self.problems.append(
                f"a look predicted {predicted.refusal or 'no refusal'}, and opening raised {event.error}"
            )
        low, high = event.first_lsn, event.last_lsn
        for payload in list(self._damaged):
            lsn = self._lsns.get(payload)
            # What stands behind the damage cannot be reached either.
            if lsn is None or (lsn >= low if low is not None else high is None or lsn <= high):
                del self._damaged[payload]
                self._excuse(payload)

    def _damage(self, event: Damaged) -> None:
        """Damage to what was acknowledged and is not settled must be told, or do no harm."""
        if event.payload in self._owed:
            self._damaged[event.payload] = None

    def _end(self, event: Ended) -> None:
        fragile: dict[bytes, None] = {}
        for payload in self._fragile:
            operation = self._operations[payload]
            grace = operation.submitted.grace_ns
            age = event.at_ns - self._acknowledged[payload].at_ns
            if grace is not None and operation.life == self._life and age >= grace + GRACE_SLACK_NS:
                continue
            if event.cut is Cut.POWER or grace is None:
                self._excuse(payload)
            else:
                fragile[payload] = None  # a kill loses nothing, but a power cut that follows it may
        self._fragile = fragile
        self._life += 1

    def _excuse(self, payload: bytes) -> None:
        self._excused[payload] = None
        self._owed.pop(payload, None)

    # --- operations ---

    def _submit(self, event: Submitted) -> None:
        assert event.payload not in self._operations, "payloads name operations: they must be distinct"
        self._syncs = event.syncs or 0
        self._operations[event.payload] = _Operation(
            event, self._highest_lsn, self._failed, self._life, self._incarnation
        )

    def _acknowledge(self, event: Acknowledged) -> None:
        """Acknowledged means synced: a sync that began after the submit has succeeded, and none failed before it."""
        payload = event.payload
        operation = self._operations[payload]
        self._acknowledged[payload] = event
        self._syncs = event.syncs or 0
        if operation.submitted.grace_ns != 0:
            self._fragile[payload] = None
            if self._failed and not operation.after_failure and _unsynced(operation, event):
                self._excuse(payload)  # written before the sync failed, and heard of in that moment
        elif (
            event.syncs is not None
            and operation.submitted.syncs is not None
            and event.syncs <= operation.submitted.syncs
        ):
            self._report(payload, "was acknowledged, and no sync has succeeded since it was submitted")
        # What is not logged hangs on no sync, and may be taken in the moment before the engine learns of the failure.
        if operation.after_failure and operation.submitted.grace_ns is not None:
            self._report(payload, "was acknowledged although a sync had failed before it was submitted")
        if payload not in self._applied and payload not in self._excused:
            self._owed[payload] = None
        lsn = event.lsn
        if lsn is None:
            return
        self._name(operation, lsn)
        other = self._acknowledged_names.setdefault(lsn, payload)
        if other != payload:
            self._report(payload, f"and {_short(other)} were both acknowledged as LSN {lsn}")
        self._highest_lsn = max(self._highest_lsn, lsn)
        if payload in self._owed:
            self._check_settled(payload, lsn)

    def _name(self, operation: _Operation, lsn: int) -> None:
        payload = operation.submitted.payload
        known = self._lsns.setdefault(payload, lsn)
        if known != lsn:
            self._report(payload, f"has two LSNs: {known} and {lsn}")
        elif lsn <= operation.above_lsn:
            problem = f"got LSN {lsn}, but {operation.above_lsn} was acknowledged before it was submitted"
            if f"{_short(payload)} {problem}" not in self.problems:
                self._report(payload, problem)

    def _apply(self, event: AppliedTo) -> None:
        payload = event.payload
        operation = self._operations.get(payload)
        if operation is None:
            self.problems.append(
                f"invented: {_short(payload)} (LSN {event.lsn}) was applied and never submitted"
            )
            return
        submitted = operation.submitted
        if (submitted.lane, submitted.key) != (event.lane, event.key):
            self._report(
                payload,
                f"was submitted to {submitted.lane} as {submitted.key!r}, and applied to {event.lane} as {event.key!r}",
            )
        times = self._applied.get(payload, 0) + 1
        self._applied[payload] = times
        lsn = event.lsn
        if lsn is None:
            self._owed.pop(payload, None)
            return
        self._name(operation, lsn)
        other = self._names.setdefault((event.store, lsn), payload)
        if other != payload:
            self._report(payload, f"and {_short(other)} were both applied as LSN {lsn}")
        if times > 1:
            if event.lane in self._exactly_once:
                self._report(payload, f"took effect {times} times on a transactional backend")
            return
        if payload not in self._owed and payload not in self._excused:
            self._check_settled(payload, lsn)  # it had been, before the user knew of it
        self._owed.pop(payload, None)
        self._damaged.pop(payload, None)
        self._count(operation.incarnation, lsn)
        self._check_order(event, lsn)

    def _count(self, incarnation: int, lsn: int) -> None:
        low, high, count = self._spans.get(incarnation, (lsn, lsn, 0))
        self._spans[incarnation] = (min(low, lsn), max(high, lsn), count + 1)

    def _lie(self, event: Lied) -> None:
        """The engine is excused, the operation may still come."""
        payload = event.payload
        operation = self._operations.get(payload)
        if operation is None or payload in self._applied or payload in self._lied:
            return
        self._excuse(payload)
        self._exposed.pop(payload, None)
        self._lied[payload] = None
        if event.lsn is not None:
            self._count(operation.incarnation, event.lsn)

    def _check_order(self, event: AppliedTo, lsn: int) -> None:
        """First applications of a key (or of a shard) come in the order of their LSNs."""
        lane = event.lane
        if lane in self._unordered or event.payload in self._lied:
            return
        whole = lane in self._by_shard
        unit: tuple[str, object] = (
            (lane, shard_of(event.key, self._shards.get(lane, 1))) if whole else (lane, event.key)
        )
        newest = self._newest.get(unit, 0)
        if newest > lsn:
            what = f"shard {unit[1]}" if whole else f"key {event.key!r}"
            self._report(event.payload, f"(LSN {lsn}) was applied after LSN {newest} of the same {what}")
        self._newest[unit] = max(newest, lsn)

    def _resolve(self, event: Resolved) -> None:
        """Every ticket resolves, once, and tells the truth."""
        if not event.done:
            self._report(event.payload, "has a ticket that nobody resolved")
        if event.times is not None and event.times > 1:
            self._report(event.payload, f"has a ticket that was resolved {event.times} times")
        if event.done and event.times == 0:
            self._report(event.payload, "has a ticket that was resolved, and did not tell its listener")
        if event.applied and event.payload not in self._applied and event.payload not in self._excused:
            self._report(event.payload, "has a ticket that says applied, and was not")

    # --- the store ---

    def _save(self, event: Checkpointed) -> None:
        """A checkpoint never says settled of what was acknowledged and not applied."""
        self._checkpoint = event.checkpoint
        for payload in self._owed:
            lsn = self._lsns.get(payload)
            if lsn is not None:
                self._check_settled(payload, lsn)

    def _check_settled(self, payload: bytes, lsn: int) -> None:
        checkpoint = self._checkpoint
        if checkpoint is None:
            return
        submitted = self._operations[payload].submitted
        covered = lsn <= checkpoint.watermark
        if not covered:
            known = checkpoint.lanes.get(submitted.lane)
            shard = shard_of(submitted.key, self._shards.get(submitted.lane, 1))
            covered = known is not None and shard < len(known.shards) and known.shards[shard].covers(lsn)
        if covered:
            self._report(
                payload, f"(LSN {lsn}) is settled by checkpoint {checkpoint.generation}, and was not applied"
            )

    def _drain(self, event: Drained) -> None:
        """Nothing is owed, what was applied of an incarnation has no holes, and the log has shrunk to its minimum."""
        for payload in self._owed:
            operation = self._operations[payload]
            if operation.submitted.grace_ns is None and operation.incarnation != self._incarnation:
                continue
            if payload in self._damaged:
                self._report(payload, "was damaged on the disk, and nobody was told")
            elif payload in self._acknowledged:
                self._report(payload, f"(LSN {self._lsns.get(payload)}) was acknowledged and is lost")
            else:
                self._report(payload, f"(LSN {self._lsns.get(payload)}) was recovered before and is lost")
        for low, high, count in self._spans.values():
            if high - low >= count:
                self.problems.append(
                    f"of LSN {low} to {high}, handed out by one incarnation, only {count} were applied"
                )
        if event.segments is not None and event.segments > SEGMENTS_MAX:
            self.problems.append(f"{event.segments} segments are left although everything is settled")

    def _fail(self, event: SyncFailed) -> None:
        """What was only written, and not synced since, may be gone at once: some file systems throw it away."""
        self._failed = True
        for payload in list(self._fragile):
            syncs = self._acknowledged[payload].syncs
            if self._operations[payload].submitted.grace_ns and (syncs is None or syncs >= self._syncs):
                self._excuse(payload)

    def _report(self, payload: bytes, what: str) -> None:
        self.problems.append(f"{_short(payload)} {what}")


def _unsynced(operation: _Operation, event: Acknowledged) -> bool:
    """Whether no sync had succeeded since an operation was submitted, when it was acknowledged; or nobody can tell."""
    before = operation.submitted.syncs
    return event.syncs is None or before is None or event.syncs <= before


def _short(payload: bytes) -> str:
    """Enough of a payload to name its operation."""
    return repr(payload[:PAYLOAD_SHOWN_BYTES])


_RULES: Mapping[type, Callable[[Oracle, Any], None]] = {
    Predicted: Oracle._predict,  # noqa: SLF001 - its own rules
    Opened: Oracle._open,  # noqa: SLF001
    Refused: Oracle._refuse,  # noqa: SLF001
    Damaged: Oracle._damage,  # noqa: SLF001
    Submitted: Oracle._submit,  # noqa: SLF001
    Acknowledged: Oracle._acknowledge,  # noqa: SLF001
    AppliedTo: Oracle._apply,  # noqa: SLF001
    Resolved: Oracle._resolve,  # noqa: SLF001
    Lied: Oracle._lie,  # noqa: SLF001
    Checkpointed: Oracle._save,  # noqa: SLF001
    Drained: Oracle._drain,  # noqa: SLF001
    SyncFailed: Oracle._fail,  # noqa: SLF001
    Ended: Oracle._end,  # noqa: SLF001
}
