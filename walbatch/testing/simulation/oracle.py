"""The oracle: whether what happened to a store keeps the guarantees. It takes a history event by event.

What is not here: how the history came about. It knows nothing of the engine's inside.

The idea needed to read it: each rule is a method on the event that can break it, and says in one sentence what is
wrong. Operations are named by their payloads, which are distinct. One that was acknowledged is *owed* until it is applied, is
dead (its letter is durable), or is cancelled. It has one LSN, and one more for each letter of it that was requeued; of several
with one idempotency key one is the operation, and the others repeat it. What changes stands in small tables of immutable
values, so that a `fork` costs a few copies: a history with many ends is judged once up to where they part.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, assert_never

from walbatch.core.routing import shard_of
from walbatch.testing.simulation.history import (
    Acknowledged,
    AppliedTo,
    Blamed,
    Buried,
    CancelAsked,
    Cancelled,
    CancelRefused,
    Checkpointed,
    Damaged,
    Drained,
    DropAsked,
    Ended,
    Event,
    Given,
    Letters,
    Lied,
    Logged,
    Opened,
    Predicted,
    Refused,
    RequeueAsked,
    Resolved,
    StateLost,
    StatusTold,
    Submitted,
    SyncFailed,
    Unburied,
)
from walbatch.testing.simulation.images import Cut
from walbatch.types import Checkpoint, DeadLetter, DeathReason, OperationStatus

GRACE_SLACK_NS = 10_000_000
"""What an interval lane may exceed its interval by: one wake-up of the thread that syncs."""

DEADLINE_SLACK_NS = 1_000_000
"""What a batch may need from its cut to the call of its backend, while no time passes but that of reading clocks."""

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
    "_acknowledged", "_acknowledged_names", "_applied", "_asked", "_astray", "_blamed", "_buried", "_cancelled", "_damaged",
    "_doubted", "_effects", "_excused", "_exposed", "_fragile", "_given_up", "_letters", "_lied", "_lsns", "_names", "_newest",
    "_of_key", "_once", "_operations", "_outlived", "_owed", "_removable", "_repeats", "_requeued", "_spans", "_unclear",
    "problems",
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
        # Those with the payload of a dead letter: LSN of the letter. Those that are not to be taken for overtaken.
        self._buried: dict[bytes, int] = {}
        self._blamed: dict[bytes, None] = {}
        self._astray: dict[bytes, None] = {}
        # Cancellations: how many are under way; whether it may be cancelled; whether it is.
        self._asked: dict[bytes, int] = {}
        self._doubted: dict[bytes, None] = {}
        self._cancelled: dict[bytes, None] = {}
        # Earlier LSNs, and letters of it that somebody wanted requeued.
        self._outlived: dict[bytes, tuple[int, ...]] = {}
        self._requeued: dict[bytes, tuple[int, ...]] = {}
        # Those that were nothing but a repeat of another; by lane and idempotency key, those that have it, and the operation.
        self._repeats: dict[bytes, None] = {}
        self._of_key: dict[tuple[str, bytes], tuple[bytes, ...]] = {}
        self._once: dict[tuple[str, bytes], bytes] = {}
        # By LSN: letters that are there, and who may remove them; what was given up; whoever of several it names.
        self._letters: dict[int, DeadLetter] = {}
        self._removable: dict[int, None] = {}
        self._given_up: dict[int, None] = {}
        self._unclear: dict[int, tuple[str, bytes]] = {}
        # By LSN, by key or shard, by incarnation.
        self._effects: dict[int, int] = {}
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
                if payload not in kept and not self._is_final(payload) and not event.refusal:
                    self._report(payload, "was recovered before, and is no longer in the log")

    def _check_neighbours(self, one: tuple[_Operation, Logged], other: tuple[_Operation, Logged]) -> None:
        """What is recovered of an incarnation has no holes, but for what is settled.

        Trimmed segments may come back, and compactions drop what is settled above the watermark.
        """
        low, high = one[1].lsn, other[1].lsn
        if high <= low:
            self.problems.append(f"the log holds LSN {high} behind LSN {low}")
            return
        first = max(low, self._checkpoint.watermark if self._checkpoint else 0) + 1
        if first >= high or one[0].incarnation != other[0].incarnation:
            return
        settled = {
            self._lsns.get(payload) for table in (self._lied, self._doubted, self._asked) for payload in table
        }
        if not settled.union(self._effects, self._given_up).issuperset(range(first, high)):
            self.problems.append(
                f"the log holds LSN {low} and {high} of one incarnation, and nothing between"
            )

    def _open(self, event: Opened) -> None:
        """What was recovered is exposed: from here on it must stay. It is what a look has predicted."""
        self._failed = False
        self._incarnation += 1
        self._fragile.clear()
        self._doubt()
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
                if not self._is_final(payload):
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
        self._doubt()
        if event.cut is Cut.POWER:
            self._clear_fragile_keys()

    def _clear_fragile_keys(self) -> None:
        """Nobody knows of what was only written whose operation it was: it may be lost."""
        for lsn, scope in list(self._unclear.items()):
            if any(self._operations[payload].submitted.grace_ns != 0 for payload in self._of_key[scope]):
                del self._unclear[lsn]

    def _doubt(self) -> None:
        """Nobody will ever hear what became of the cancellations that were under way."""
        for payload in self._asked:
            self._doubted[payload] = None
            self._owed.pop(payload, None)
        self._asked.clear()

    def _lose_state(self, event: StateLost) -> None:
        """What was given up may come again, in whatever order; letters are gone; keys are known as far as the log has them."""
        del event
        for payload in (*self._buried, *self._cancelled, *self._doubted):
            self._excuse(payload)
            self._astray[payload] = None
        for table in (self._buried, self._cancelled, self._letters, self._once, self._removable):
            table.clear()

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
        if event.idempotency_key:
            scope = event.lane, event.idempotency_key
            self._of_key[scope] = (*self._of_key.get(scope, ()), event.payload)

    def _acknowledge(self, event: Acknowledged) -> None:
        """Acknowledged means synced: a sync that began after the submit has succeeded, and none failed before it."""
        payload = event.payload
        operation = self._operations[payload]
        self._syncs = event.syncs or 0
        if (
            operation.submitted.idempotency_key
            and event.lsn is not None
            and self._is_repeat(operation, event.lsn)
        ):
            return
        self._acknowledged[payload] = event
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
        if not self._is_final(payload) and payload not in self._excused:
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

    def _is_final(self, payload: bytes) -> bool:
        """Whether it is applied, dead or cancelled, or may be cancelled: nobody owes its delivery any more."""
        return any(
            payload in table
            for table in (
                self._applied,
                self._buried,
                self._cancelled,
                self._doubted,
                self._repeats,
                self._astray,
            )
        )

    def _name(self, operation: _Operation, lsn: int) -> None:
        """An operation has this LSN. Another one than before only for each letter of it that was requeued."""
        payload = operation.submitted.payload
        is_first = payload not in self._lsns
        known = self._lsns.setdefault(payload, lsn)
        if is_first and operation.submitted.idempotency_key:
            self._stand_alone(operation, lsn)
        if known != lsn and lsn not in self._outlived.get(payload, ()):
            if known > lsn or len(self._outlived.get(payload, ())) >= len(self._requeued.get(payload, ())):
                self._report(payload, f"has two LSNs: {known} and {lsn}")
            else:
                self._outlived[payload] = (*self._outlived.get(payload, ()), known)
                self._lsns[payload] = lsn
        elif lsn <= operation.above_lsn:
            problem = f"got LSN {lsn}, but {operation.above_lsn} was acknowledged before it was submitted"
            if f"{_short(payload)} {problem}" not in self.problems:
                self._report(payload, problem)

    def _is_repeat(self, operation: _Operation, lsn: int) -> bool:
        """Whether this LSN, with which a submission was acknowledged, is that of an earlier one with the same idempotency key.

        Who among them it is may show later, where no process lived to tell.
        """
        submitted = operation.submitted
        scope = submitted.lane, submitted.idempotency_key
        others = [
            other
            for other in self._of_key[scope]
            if other != submitted.payload and other not in self._repeats
        ]
        first = next((other for other in others if lsn in self._lsns_of(other)), None)
        if first is not None:
            self._repeats[submitted.payload] = None
            if not self._is_final(first) and first not in self._excused:
                self._owed[first] = None
            return True
        once = self._once.get(scope)
        if once == submitted.payload:
            return False  # it was seen before its user heard of it
        if once is not None and once not in self._excused:
            self._report(
                submitted.payload,
                f"(LSN {lsn}) was accepted, although {_short(once)} has its idempotency key",
            )
        if any(other not in self._acknowledged and other not in self._lsns for other in others):
            self._unclear[lsn] = scope
            return True
        self._once[scope] = submitted.payload
        return False

    def _lsns_of(self, payload: bytes) -> tuple[int, ...]:
        known = self._lsns.get(payload)
        return () if known is None else (known, *self._outlived.get(payload, ()))

    def _stand_alone(self, operation: _Operation, lsn: int) -> None:
        """It has an LSN of its own: so it is no repeat, and the others of its idempotency key are."""
        payload, scope = operation.submitted.payload, self._scope_of(operation)
        if payload in self._repeats:
            self._report(payload, "was only a repeat of another operation, and was accepted")
        once = self._once.get(scope)
        if once is None or once in self._excused:
            self._once[scope] = payload
        elif once != payload:
            self._report(payload, f"was accepted, and so was {_short(once)} with the same idempotency key")
        if self._unclear.pop(lsn, None) is not None and not self._is_final(payload):
            self._owed[payload] = None

    @staticmethod
    def _scope_of(operation: _Operation) -> tuple[str, bytes]:
        return operation.submitted.lane, operation.submitted.idempotency_key

    def _give(self, event: Given) -> None:
        """No backend sees what is cancelled or dead, nor what it is too early or too late for."""
        for lsn, payload in event.operations:
            operation = self._operations.get(payload)
            if operation is None:
                self.problems.append(
                    f"invented: {_short(payload)} (LSN {lsn}) was delivered and never submitted"
                )
                continue
            if payload in self._cancelled:
                self._report(payload, f"(LSN {lsn}) was delivered, although it had been cancelled")
            if lsn in self._letters:
                self._report(payload, f"(LSN {lsn}) was delivered, although it is a dead letter")
            submitted = operation.submitted
            if payload in self._requeued:
                continue  # then it has no times any more
            if event.latest_wall_ns < submitted.not_before_ns:
                early = submitted.not_before_ns - event.latest_wall_ns
                self._report(payload, f"(LSN {lsn}) was delivered {early / 1e9:.6f} s before its time")
            if submitted.deadline_ns and event.earliest_wall_ns > submitted.deadline_ns + DEADLINE_SLACK_NS:
                late = event.earliest_wall_ns - submitted.deadline_ns
                self._report(payload, f"(LSN {lsn}) was delivered {late / 1e9:.6f} s after its deadline")

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
        self._check_identity(event, payload)
        other = self._names.setdefault((event.store, lsn), payload)
        if other != payload:
            self._report(payload, f"and {_short(other)} were both applied as LSN {lsn}")
        effects = self._effects[lsn] = self._effects.get(lsn, 0) + 1
        if effects > 1:
            if event.lane in self._exactly_once:
                self._report(payload, f"took effect {effects} times on a transactional backend")
            return
        if not any(
            payload in table
            for table in (self._owed, self._excused, self._buried, self._doubted, self._requeued)
        ):
            self._check_settled(payload, lsn)  # it had been, before the user knew of it
        self._owed.pop(payload, None)
        self._damaged.pop(payload, None)
        if payload not in self._outlived:
            self._count(operation.incarnation, lsn)
        self._check_order(event, lsn)

    def _check_identity(self, event: AppliedTo, payload: bytes) -> None:
        """What was requeued is known by the LSN that it had first."""
        if event.identity is None:
            return
        identity = (*self._outlived.get(payload, ()), event.lsn)[0]
        if event.identity != identity:
            self._report(
                payload,
                f"(LSN {event.lsn}) was delivered as {event.identity}, and was submitted as {identity}",
            )

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
        if lane in self._unordered or event.payload in self._lied or event.payload in self._astray:
            return
        unit = self._unit(lane, event.key)
        newest = self._newest.get(unit, 0)
        if newest > lsn:
            what = f"shard {unit[1]}" if lane in self._by_shard else f"key {event.key!r}"
            self._report(event.payload, f"(LSN {lsn}) was applied after LSN {newest} of the same {what}")
        self._newest[unit] = max(newest, lsn)

    def _unit(self, lane: str, key: bytes) -> tuple[str, object]:
        """Of what the lane keeps the order: a shard, or a key."""
        return (lane, shard_of(key, self._shards.get(lane, 1))) if lane in self._by_shard else (lane, key)

    # --- what is given up ---

    def _blame(self, event: Blamed) -> None:
        self._blamed[event.payload] = None

    def _bury(self, event: Buried) -> None:
        """A letter is what was submitted, for a reason that there was."""
        for letter in event.letters:
            operation = self._operations.get(letter.payload)
            self._check_letter(operation, letter)
            if operation is None:
                continue
            known = self._letters.get(letter.lsn)
            if known is not None:
                if known != letter:
                    self._report(letter.payload, f"(LSN {letter.lsn}) has a dead letter that has changed")
                continue
            self._name(operation, letter.lsn)
            self._letters[letter.lsn] = letter
            self._given_up[letter.lsn] = None
            if letter.lsn == self._lsns.get(letter.payload):
                self._buried[letter.payload] = letter.lsn
                self._owed.pop(letter.payload, None)
                self._damaged.pop(letter.payload, None)

    def _check_letter(self, operation: _Operation | None, letter: DeadLetter) -> None:
        payload = letter.payload
        if operation is None or (operation.submitted.lane, operation.submitted.key) != (
            letter.lane,
            letter.key,
        ):
            self.problems.append(
                f"invented: {_short(payload)} (LSN {letter.lsn}) is a dead letter and was never submitted"
            )
        elif letter.reason is DeathReason.DEADLINE:
            if not operation.submitted.deadline_ns:
                self._report(payload, f"(LSN {letter.lsn}) missed a deadline that it does not have")
        elif payload not in self._blamed:
            self._report(
                payload, f"(LSN {letter.lsn}) was given up ({letter.reason}), and no backend had blamed it"
            )
        if payload in self._cancelled:
            self._report(payload, f"(LSN {letter.lsn}) was cancelled, and is a dead letter")

    def _unbury(self, event: Unburied) -> None:
        """A letter that somebody wanted requeued is an operation that is owed, unless that was applied meanwhile."""
        for lsn in event.lsns:
            letter = self._letters.pop(lsn, None)
            if letter is None:
                continue
            payload = letter.payload
            if lsn not in self._removable:
                self._report(payload, f"(LSN {lsn}) is no dead letter any more, and nobody wanted that")
            if self._buried.get(payload) != lsn:
                continue  # it has died again since, or was applied
            if lsn in self._requeued.get(payload, ()):
                del self._buried[payload]
                if self._lsns[payload] == lsn or self._lsns[payload] not in self._effects:
                    self._applied.pop(payload, None)
                    self._owed[payload] = None

    def _look_at_letters(self, event: Letters) -> None:
        """All letters are there, once, but those that somebody may have removed; and no others."""
        seen: dict[int, DeadLetter] = {}
        for letter in event.letters:
            if letter.lsn in seen:
                self._report(letter.payload, f"(LSN {letter.lsn}) has two dead letters")
            seen[letter.lsn] = letter
            if letter != self._letters.get(letter.lsn):
                self._report(
                    letter.payload,
                    f"(LSN {letter.lsn}) is shown as a dead letter, and was never buried like that",
                )
        gone = [lsn for lsn in self._letters if lsn not in seen]
        for lsn in gone:
            if lsn not in self._removable:
                self._report(self._letters[lsn].payload, f"(LSN {lsn}) has lost its dead letter")
        self._unbury(Unburied(lsns=tuple(lsn for lsn in gone if lsn in self._removable)))

    def _want_requeued(self, event: RequeueAsked) -> None:
        letter = self._letters.get(event.lsn)
        if letter is None:
            return
        self._removable[event.lsn] = None
        before = self._requeued.get(letter.payload, ())
        if event.lsn not in before:
            self._requeued[letter.payload] = (*before, event.lsn)

    def _want_dropped(self, event: DropAsked) -> None:
        self._removable[event.lsn] = None

    def _want_cancelled(self, event: CancelAsked) -> None:
        self._asked[event.payload] = self._asked.get(event.payload, 0) + 1
        if event.lsn is not None:
            self._name(self._operations[event.payload], event.lsn)

    def _cancel(self, event: Cancelled) -> None:
        """It is settled from here on: whatever is applied after it is a breach."""
        payload = event.payload
        self._refuse_cancel(event)
        if not event.told:
            self._report(payload, "was cancelled, and its ticket was not resolved by then")
        if payload in self._cancelled:
            self._report(payload, "was cancelled twice")
        if payload in self._buried:
            self._report(payload, "is a dead letter, and was cancelled")
        self._cancelled[payload] = None
        self._owed.pop(payload, None)
        lsn = self._lsns.get(payload)
        if lsn is not None:
            self._given_up[lsn] = None

    def _refuse_cancel(self, event: Cancelled | CancelRefused) -> None:
        count = self._asked.pop(event.payload, 0) - 1
        if count > 0:
            self._asked[event.payload] = count

    def _resolve(self, event: Resolved) -> None:
        """Every ticket resolves, once, and tells the truth."""
        if not event.done:
            self._report(event.payload, "has a ticket that nobody resolved")
        if event.times is not None and event.times > 1:
            self._report(event.payload, f"has a ticket that was resolved {event.times} times")
        if event.done and event.times == 0:
            self._report(event.payload, "has a ticket that was resolved, and did not tell its listener")
        payload = event.payload
        operation = self._operations[payload]
        is_repeat = (
            operation.submitted.idempotency_key and self._once.get(self._scope_of(operation)) != payload
        )
        if payload in self._excused or is_repeat:
            return
        if event.applied and payload not in self._applied:
            self._report(payload, "has a ticket that says applied, and was not")
        is_requeued = payload in self._requeued
        if event.applied and not is_requeued and (payload in self._buried or payload in self._cancelled):
            self._report(payload, "has a ticket that says applied, and was given up")
        if (
            event.dead
            and not is_requeued
            and payload not in self._buried
            and operation.submitted.grace_ns is not None
        ):
            self._report(payload, "has a ticket that says dead, and no letter")
        if event.cancelled and not any(
            payload in table for table in (self._cancelled, self._asked, self._doubted)
        ):
            self._report(payload, "has a ticket that says cancelled, and nobody wanted that")

    def _tell_status(self, event: StatusTold) -> None:
        """A status is true; what was given up long ago counts as applied, unless its letter is there."""
        payload = event.payload
        if payload in self._excused or payload in self._astray:
            return
        gone = any(
            payload in table
            for table in (self._cancelled, self._asked, self._doubted, self._buried, self._requeued)
        )
        lsn, watermark = self._lsns.get(payload, 0), self._checkpoint.watermark if self._checkpoint else 0
        match event.status:
            case OperationStatus.APPLIED:
                is_true = payload in self._applied or (gone and lsn <= watermark)
            case OperationStatus.DEAD:
                is_true = payload in self._buried
            case OperationStatus.CANCELLED:
                is_true = gone
            case OperationStatus.PENDING | OperationStatus.IN_FLIGHT:
                is_true = payload not in self._cancelled
            case _:
                assert_never(event.status)
        if not is_true:
            self._report(payload, f"(LSN {lsn}) is said to be {event.status}, and is not")

    # --- the store ---

    def _save(self, event: Checkpointed) -> None:
        """A checkpoint never says settled of what was acknowledged and not applied."""
        self._checkpoint = event.checkpoint
        for payload in self._owed:
            lsn = self._lsns.get(payload)
            if lsn is not None and payload not in self._asked and lsn not in self._given_up:
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
            # What is not logged has no letter when it is given up.
            may_be_dead = payload in self._blamed or operation.submitted.deadline_ns
            if payload in self._asked or (operation.submitted.grace_ns is None and may_be_dead):
                continue
            if payload in self._damaged:
                self._report(payload, "was damaged on the disk, and nobody was told")
            elif payload in self._acknowledged:
                self._report(payload, f"(LSN {self._lsns.get(payload)}) was acknowledged and is lost")
            else:
                self._report(payload, f"(LSN {self._lsns.get(payload)}) was recovered before and is lost")
        for lsn, (_, key) in self._unclear.items():
            self.problems.append(f"LSN {lsn}, acknowledged for the idempotency key {key!r}, is lost")
        doubted = {lsn for payload in (*self._doubted, *self._asked) for lsn in self._lsns_of(payload)}
        again = {
            lsn
            for payload in self._outlived
            for lsn in self._lsns_of(payload)
            if lsn != self._outlived[payload][0]
        }
        others = doubted.union(self._given_up).difference(self._effects) | again
        for low, high, count in self._spans.values():
            if high - low >= count + sum(low < lsn < high for lsn in others):
                self.problems.append(
                    f"of LSN {low} to {high}, handed out by one incarnation, only {count} were applied"
                )
        if event.segments is not None and event.segments > SEGMENTS_MAX:
            self.problems.append(f"{event.segments} segments are left although everything is settled")

    def _fail(self, event: SyncFailed) -> None:
        """What was only written, and not synced since, may be gone at once: some file systems throw it away."""
        self._failed = True
        self._clear_fragile_keys()
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
    Given: Oracle._give,  # noqa: SLF001
    AppliedTo: Oracle._apply,  # noqa: SLF001
    Blamed: Oracle._blame,  # noqa: SLF001
    Buried: Oracle._bury,  # noqa: SLF001
    Unburied: Oracle._unbury,  # noqa: SLF001
    Letters: Oracle._look_at_letters,  # noqa: SLF001
    RequeueAsked: Oracle._want_requeued,  # noqa: SLF001
    DropAsked: Oracle._want_dropped,  # noqa: SLF001
    CancelAsked: Oracle._want_cancelled,  # noqa: SLF001
    Cancelled: Oracle._cancel,  # noqa: SLF001
    CancelRefused: Oracle._refuse_cancel,  # noqa: SLF001
    StatusTold: Oracle._tell_status,  # noqa: SLF001
    StateLost: Oracle._lose_state,  # noqa: SLF001
    Resolved: Oracle._resolve,  # noqa: SLF001
    Lied: Oracle._lie,  # noqa: SLF001
    Checkpointed: Oracle._save,  # noqa: SLF001
    Drained: Oracle._drain,  # noqa: SLF001
    SyncFailed: Oracle._fail,  # noqa: SLF001
    Ended: Oracle._end,  # noqa: SLF001
}
