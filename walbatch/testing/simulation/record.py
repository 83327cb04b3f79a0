"""What an oracle remembers of a history: small tables of immutable values, so that a `fork` costs a few copies.

What is not here: what is a breach (`rules`).

The idea needed to read it: operations are named by their payloads, which are distinct. One that was acknowledged is *owed*
until it is applied, is dead (its letter is durable), or is cancelled. It has one LSN, and one more for each letter of it
that was requeued; of several with one idempotency key one is the operation, and the others repeat it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from walbatch.core.routing import shard_of
from walbatch.testing.simulation.history import Acknowledged, Predicted, Submitted
from walbatch.types import Checkpoint, DeadLetter

PAYLOAD_SHOWN_BYTES = 12

VALUES: Final = (
    "by_shard", "checkpoint", "exactly_once", "failed", "highest_lsn", "incarnation", "life", "predicted", "shards", "syncs",
    "unordered",
)  # fmt: skip
"""What a fork shares: it is replaced, never changed."""

TABLES: Final = (
    "acknowledged", "acknowledged_names", "applied", "asked", "astray", "blamed", "buried", "cancelled", "counted", "damaged",
    "doubted", "effects", "excused", "exposed", "forgotten", "fragile", "given_up", "letters", "lied", "lsns", "names",
    "newest", "of_key", "once", "operations", "outlived", "owed", "passed", "problems", "removable", "repeats", "requeued",
    "spans", "unclear",
)  # fmt: skip
"""What a fork copies. All hold immutable values."""


@dataclass(frozen=True, slots=True)
class Operation:
    """What was known of an operation when it was submitted."""

    submitted: Submitted
    above_lsn: int
    """The highest LSN that was acknowledged before it was submitted."""
    after_failure: bool
    """Submitted after a failed sync of the same incarnation."""
    life: int
    incarnation: int


class Record:
    """All that the rules look up and note down. `problems` are the breaches so far."""

    __slots__ = (*VALUES, *TABLES)

    def __init__(
        self, *, exactly_once: Collection[str], unordered: Collection[str], by_shard: Collection[str],
        shards: Mapping[str, int],
    ) -> None:  # fmt: skip
        self.problems: list[str] = []
        self.exactly_once = exactly_once
        self.unordered = unordered
        self.by_shard = by_shard
        self.shards = shards
        self.life = 0
        self.incarnation = 0
        self.failed = False
        self.highest_lsn = 0
        self.syncs = 0
        self.checkpoint: Checkpoint | None = None
        self.predicted: Predicted | None = None
        # By payload.
        self.operations: dict[bytes, Operation] = {}
        self.lsns: dict[bytes, int] = {}
        self.acknowledged: dict[bytes, Acknowledged] = {}
        self.applied: dict[bytes, int] = {}
        # Acknowledged (or exposed by a recovery), not applied, and not excused.
        self.owed: dict[bytes, None] = {}
        # A power cut may still lose it.
        self.fragile: dict[bytes, None] = {}
        self.excused: dict[bytes, None] = {}
        self.exposed: dict[bytes, None] = {}
        self.damaged: dict[bytes, None] = {}
        self.lied: dict[bytes, None] = {}
        # Those with the payload of a dead letter: LSN of the letter. Those that are not to be taken for overtaken.
        self.buried: dict[bytes, int] = {}
        self.blamed: dict[bytes, None] = {}
        self.astray: dict[bytes, None] = {}
        # In favour of which others its backend has passed over it: LSNs.
        self.passed: dict[bytes, tuple[int, ...]] = {}
        # Cancellations: how many are under way; whether it may be cancelled; whether it is.
        self.asked: dict[bytes, int] = {}
        self.doubted: dict[bytes, None] = {}
        self.cancelled: dict[bytes, None] = {}
        # Earlier LSNs, and letters of it that somebody wanted requeued.
        self.outlived: dict[bytes, tuple[int, ...]] = {}
        self.requeued: dict[bytes, tuple[int, ...]] = {}
        # Those that were nothing but a repeat of another; by lane and idempotency key, those that have it, and the operation.
        self.repeats: dict[bytes, None] = {}
        self.of_key: dict[tuple[str, bytes], tuple[bytes, ...]] = {}
        self.once: dict[tuple[str, bytes], bytes] = {}
        # By LSN: letters that are there; those that may be removed, and whether by being dropped; what was given up; whoever
        # of several it names.
        self.letters: dict[int, DeadLetter] = {}
        self.removable: dict[int, bool] = {}
        self.given_up: dict[int, None] = {}
        # By LSN: what had been given up when the state was lost. It may come again, although it was requeued long ago.
        self.forgotten: dict[int, None] = {}
        self.unclear: dict[int, tuple[str, bytes]] = {}
        # By LSN; by key or shard.
        self.effects: dict[int, int] = {}
        self.names: dict[tuple[bytes, int], bytes] = {}
        self.acknowledged_names: dict[int, bytes] = {}
        self.newest: dict[tuple[str, object], int] = {}
        # What an incarnation has handed out, as far as it is done with: the lowest and highest LSN, and how many.
        self.spans: dict[int, tuple[int, int, int]] = {}
        self.counted: dict[int, None] = {}

    def __repr__(self) -> str:
        counts = f"{len(self.operations)} operations, {len(self.owed)} owed, {len(self.problems)} problems"
        return f"<Record life {self.life}, {counts}>"

    def fork(self) -> Record:
        """A twin that has taken the same events, and goes its own way from here. O(operations), a few microseconds."""
        twin = Record.__new__(Record)
        for name in VALUES:
            setattr(twin, name, getattr(self, name))
        for name in TABLES:
            setattr(twin, name, getattr(self, name).copy())
        return twin

    def clear_fragile_keys(self) -> None:
        """Nobody knows of what was only written whose operation it was: it may be lost."""
        for lsn, scope in list(self.unclear.items()):
            if any(self.operations[payload].submitted.grace_ns != 0 for payload in self.of_key[scope]):
                del self.unclear[lsn]

    def excuse(self, payload: bytes) -> None:
        """It may come or not."""
        self.excused[payload] = None
        self.owed.pop(payload, None)

    def is_final(self, payload: bytes) -> bool:
        """Whether it is applied, dead or cancelled, or may be cancelled: nobody owes its delivery any more."""
        return any(
            payload in table
            for table in (
                self.applied,
                self.buried,
                self.cancelled,
                self.doubted,
                self.repeats,
                self.astray,
            )
        )

    def lsns_of(self, payload: bytes) -> tuple[int, ...]:
        """Its LSN, and those that it had before it was requeued."""
        known = self.lsns.get(payload)
        return () if known is None else (known, *self.outlived.get(payload, ()))

    @staticmethod
    def scope_of(operation: Operation) -> tuple[str, bytes]:
        """Where its idempotency key counts."""
        return operation.submitted.lane, operation.submitted.idempotency_key

    def unit(self, lane: str, key: bytes) -> tuple[str, object]:
        """Of what the lane keeps the order: a shard, or a key."""
        return (lane, shard_of(key, self.shards.get(lane, 1))) if lane in self.by_shard else (lane, key)

    def count(self, incarnation: int, lsn: int) -> None:
        """One more operation of an incarnation is done with."""
        self.counted[lsn] = None
        low, high, count = self.spans.get(incarnation, (lsn, lsn, 0))
        self.spans[incarnation] = (min(low, lsn), max(high, lsn), count + 1)

    def report(self, payload: bytes, what: str) -> None:
        """Something is wrong with an operation."""
        self.problems.append(f"{short(payload)} {what}")


Rule = Callable[[Record, Any], None]
"""rule(record, event): note the event down, and report what it breaks."""


def short(payload: bytes) -> str:
    """Enough of a payload to name its operation."""
    return repr(payload[:PAYLOAD_SHOWN_BYTES])
