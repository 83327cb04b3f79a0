"""Model backends: plain and transactional, honest or as bad as real ones, and their durable content.

What is not here: the judgement of what they were given (`oracle`).

The idea needed to read it: the content lives on a `BackendDisk`, which survives the process. A plain backend applies
operation after operation, so a crash may fall between two of them; a transactional one applies all of a batch with its mark
at one moment.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from walbatch.core.mark import check_epoch, fresh_indexes
from walbatch.errors import BackendBroken, RetryBatch, Throttled
from walbatch.ports import Clock, Threads
from walbatch.types import Answer, Applied, Batch, Mark, Operation, Outcome, Retry, merge_ranges

SLOW_NS: Final = 50_000_000
HANG_NS: Final = 700_000_000
"""Longer than any time limit that a workload gives."""


class Manner(enum.StrEnum):
    """What a backend does with a batch."""

    APPLY = "apply"
    FAIL = "fail"
    """Raises; nothing was applied."""
    PART = "part"
    """Applies the first half, then raises."""
    ANSWER_PART = "answer part"
    """Applies the first half (a transactional one nothing) and asks to try the rest again."""
    TIMEOUT = "timeout"
    """Applies everything, then raises as if the answer had been lost."""
    SLOW = "slow"
    """Applies, after a while."""
    HANG = "hang"
    """Applies, long after the time limit of the call."""
    LIE = "lie"
    """Says that it applied, and did not."""


_OUTAGES: Final = (BackendBroken, RetryBatch, Throttled)
"""What speaks of the backend, and of no operation."""


class Poison(ValueError):
    """Raised for a whole batch because of some of its operations, which it does not name to the engine."""

    def __init__(self, culprits: Collection[bytes]) -> None:
        super().__init__("cannot be encoded")
        self.culprits = frozenset(culprits)


Reaction = Manner | Sequence[Outcome] | Exception
"""What a backend does: in some manner, or with these outcomes, or it raises this and applies nothing."""

Manners = Callable[[Batch, int], Reaction]
"""manners(batch, number of the call): what to do with it."""


@dataclass(slots=True)
class BackendDisk:
    """What a backend has made durable. `counts` says how often an operation (store, LSN) took effect."""

    content: dict[bytes, bytes] = field(default_factory=dict)
    counts: Counter[tuple[bytes, int]] = field(default_factory=Counter)
    marks: dict[tuple[bytes, str, int], Mark] = field(default_factory=dict)
    effects: int = 0

    def clone(self) -> BackendDisk:
        """A copy."""
        return BackendDisk(self.content.copy(), self.counts.copy(), self.marks.copy(), self.effects)

    def fingerprint(self) -> object:
        """Equal for equal contents."""
        return frozenset(self.content.items()), frozenset(self.counts.items()), frozenset(self.marks.items())

    def apply(self, store: bytes, operation: Operation) -> None:
        """One effect."""
        self.content[operation.key] = operation.payload
        self.effects += 1
        if operation.lsn is not None:
            self.counts[store, operation.lsn] += 1


OnBatch = Callable[[Batch], None]
OnOperation = Callable[[Batch, Operation], None]
OnBlamed = Callable[[Operation, Sequence[int]], None]
"""on_blamed(operation, LSNs of those that are applied in the same call)"""


def _always_apply(_batch: Batch, _call: int) -> Manner:
    return Manner.APPLY


def _ignore_batch(_batch: Batch) -> None:
    pass


def _ignore(_operation: Operation, _applied: Sequence[int]) -> None:
    pass


class ModelBackend:
    """A plain backend: durable when it returns, and an operation that comes again takes effect again.

    `on_given` hears of each call, `on_applied` of each effect, `on_blamed` of each operation whose own fault it may have been.
    """

    def __init__(
        self, disk: BackendDisk, *, clock: Clock, threads: Threads, on_call: Callable[[str, str], None], on_applied: OnOperation,
        on_given: OnBatch = _ignore_batch, on_blamed: OnBlamed = _ignore, manners: Manners | None = None,
    ) -> None:  # fmt: skip
        self.disk = disk
        self._clock = clock
        self._threads = threads
        self._on_call = on_call
        self._on_given = on_given
        self._on_applied = on_applied
        self._on_blamed = on_blamed
        self._manners = manners or _always_apply
        self.calls = 0

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.calls} calls, {self.disk.effects} effects>"

    def apply(self, batch: Batch) -> Answer:
        """Do what the manners say."""
        self._on_call("apply", batch.lane)
        self._on_given(batch)
        self.calls += 1
        reaction = self._manners(batch, self.calls)
        if isinstance(reaction, Exception):
            self._blame(batch, reaction)
            raise reaction
        if not isinstance(reaction, Manner):
            return self._give(batch, reaction)
        count = len(batch)
        match reaction:
            case Manner.FAIL:
                raise ConnectionError("the backend is away")
            case Manner.LIE:
                return None
            case Manner.SLOW:
                self._threads.event().wait(SLOW_NS)
            case Manner.HANG:
                self._threads.event().wait(HANG_NS)
            case Manner.PART | Manner.ANSWER_PART:
                count //= 2
            case Manner.APPLY | Manner.TIMEOUT:
                pass
        count = self.take_in(batch, count)
        if reaction is Manner.TIMEOUT:
            raise TimeoutError("no answer in time")
        if reaction is Manner.PART:
            raise ConnectionError("the connection broke")
        if reaction is Manner.ANSWER_PART:
            outcomes = self.answer(batch, count)
            self._blame_these(batch, outcomes)
            return outcomes
        return None

    def answer(self, batch: Batch, count: int) -> Sequence[Outcome]:
        """The first `count` operations are applied, the rest is to come again."""
        return [Applied()] * count + [Retry(error="later")] * (len(batch) - count)

    def _give(self, batch: Batch, outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
        """Apply what these outcomes say is applied."""
        self._blame_these(batch, outcomes)
        self.take_these(batch, [isinstance(outcome, Applied) for outcome in outcomes])
        return outcomes

    def _blame_these(self, batch: Batch, outcomes: Sequence[Outcome]) -> None:
        """Those that are not applied. Before the others are: power may fail in between."""
        pairs = list(zip(batch, outcomes, strict=True))
        applied = [
            operation.lsn
            for operation, outcome in pairs
            if isinstance(outcome, Applied) and operation.lsn is not None
        ]
        for operation, outcome in pairs:
            if not isinstance(outcome, Applied):
                self._on_blamed(operation, applied)

    def _blame(self, batch: Batch, error: Exception) -> None:
        """Who may have been the cause: those that a poison has in mind; all, where nobody knows; nobody, where it is an outage."""
        if isinstance(error, (OSError, *_OUTAGES)):
            return
        for operation in batch:
            if not isinstance(error, Poison) or operation.payload in error.culprits:
                self._on_blamed(operation, ())

    def take_in(self, batch: Batch, count: int) -> int:
        """Apply the first `count` operations; returns how many it did."""
        self.take_these(batch, [index < count for index in range(len(batch))])
        return count

    def take_these(self, batch: Batch, wanted: Iterable[bool]) -> None:
        """Apply the operations that are wanted. A crash may fall between any two."""
        fresh = True
        for operation, is_wanted in zip(batch, wanted, strict=True):
            if not is_wanted:
                continue
            if not fresh:
                self._on_call("apply next", batch.lane)
            fresh = False
            self.disk.apply(batch.store, operation)
            self._on_applied(batch, operation)


class TransactionalModelBackend(ModelBackend):
    """Applies a batch and its mark at one moment, and leaves out what its mark covers."""

    def applied_mark(self, shard: int) -> Mark:
        """The mark of `shard`, of the lane that `open` named."""
        return self.disk.marks.get((*self._scope, shard), Mark())

    def open(self, lane: str, shards: int, store: bytes) -> None:
        """Learn whose marks these are."""
        self._scope = (store, lane)

    def take_in(self, batch: Batch, count: int) -> int:
        """What is not covered, and the mark; all of the batch or nothing, since its mark speaks for all of it."""
        if count < len(batch):
            return 0
        self.take_these(batch, [True] * count)
        return count

    def take_these(self, batch: Batch, wanted: Iterable[bool]) -> None:
        """What is wanted and not covered, at one moment with the mark, which leaves out what is not wanted."""
        scope = (batch.store, batch.lane, batch.shard)
        held = self.disk.marks.get(scope, Mark())
        check_epoch(batch, held)
        fresh = fresh_indexes(batch, held)
        uncovered = None if fresh is None else set(fresh)
        left_out = set()
        for index, (operation, is_wanted) in enumerate(zip(batch, wanted, strict=True)):
            if not is_wanted:
                left_out.add(operation.lsn)
            elif uncovered is None or index in uncovered:
                self.disk.apply(batch.store, operation)
                self._on_applied(batch, operation)
        if batch.mark is not None:
            self.disk.marks[scope] = held.union(_without(batch.mark, left_out))

    def answer(self, batch: Batch, count: int) -> Sequence[Outcome]:
        """What its mark covers is applied: an earlier call may have done it whose answer was lost."""
        if not batch.lsns:
            return super().answer(batch, count)
        return [Applied() if covered else Retry(error="later") for covered in self._covered(batch)]

    def _give(self, batch: Batch, outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
        """The same: what is covered cannot be refused any more."""
        if batch.lsns:
            covered = self._covered(batch)
            outcomes = [
                Applied() if done else outcome for done, outcome in zip(covered, outcomes, strict=True)
            ]
        return super()._give(batch, outcomes)

    def _covered(self, batch: Batch) -> list[bool]:
        held = self.disk.marks.get((batch.store, batch.lane, batch.shard), Mark())
        return [held.covers(lsn) for lsn in batch.lsns]


def _without(mark: Mark, lsns: Collection[int | None]) -> Mark:
    """A mark that leaves out operations which it covers."""
    gone = sorted(lsn for lsn in lsns if lsn is not None and mark.covers(lsn))
    ranges = [(1, mark.watermark), *mark.ranges]
    for lsn in gone:
        first, last = next(known for known in ranges if known[0] <= lsn <= known[1])
        at = ranges.index((first, last))
        ranges[at : at + 1] = [part for part in ((first, lsn - 1), (lsn + 1, last)) if part[0] <= part[1]]
    whole = ranges[0][1] if ranges and ranges[0][0] == 1 else 0
    return Mark(epoch=mark.epoch, watermark=whole, ranges=merge_ranges(ranges, whole))
