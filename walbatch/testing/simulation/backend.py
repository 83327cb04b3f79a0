"""Model backends: plain and transactional, honest or as bad as real ones, and their durable content.

What is not here: the judgement of what they were given (`oracle`).

The idea needed to read it: the content lives on a `BackendDisk`, which survives the process. A plain backend applies
operation after operation, so a crash may fall between two of them; a transactional one applies all of a batch with its mark
at one moment.
"""

from __future__ import annotations

import enum
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from walbatch.core.mark import check_epoch, fresh_indexes
from walbatch.ports import Clock, Threads
from walbatch.types import Answer, Applied, Batch, Mark, Operation, Retry

SLOW_NS: Final = 50_000_000


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
    LIE = "lie"
    """Says that it applied, and did not."""


Manners = Callable[[Batch, int], Manner]
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


OnApplied = Callable[[Batch, Operation], None]


def _always_apply(_batch: Batch, _call: int) -> Manner:
    return Manner.APPLY


class ModelBackend:
    """A plain backend: durable when it returns, and an operation that comes again takes effect again."""

    def __init__(
        self, disk: BackendDisk, *, clock: Clock, threads: Threads, on_call: Callable[[str, str], None], on_applied: OnApplied,
        manners: Manners | None = None,
    ) -> None:  # fmt: skip
        self.disk = disk
        self._clock = clock
        self._threads = threads
        self._on_call = on_call
        self._on_applied = on_applied
        self._manners = manners or _always_apply
        self.calls = 0

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.calls} calls, {self.disk.effects} effects>"

    def apply(self, batch: Batch) -> Answer:
        """Do what the manners say."""
        self._on_call("apply", batch.lane)
        self.calls += 1
        manner = self._manners(batch, self.calls)
        count = len(batch)
        match manner:
            case Manner.FAIL:
                raise ConnectionError("the backend is away")
            case Manner.LIE:
                return None
            case Manner.SLOW:
                self._threads.event().wait(SLOW_NS)
            case Manner.PART | Manner.ANSWER_PART:
                count //= 2
            case Manner.APPLY | Manner.TIMEOUT:
                pass
        count = self.take_in(batch, count)
        if manner is Manner.TIMEOUT:
            raise TimeoutError("no answer in time")
        if manner is Manner.PART:
            raise ConnectionError("the connection broke")
        if manner is Manner.ANSWER_PART:
            return self.answer(batch, count)
        return None

    def answer(self, batch: Batch, count: int) -> Answer:
        """The first `count` operations are applied, the rest is to come again."""
        return [Applied()] * count + [Retry(error="later")] * (len(batch) - count)

    def take_in(self, batch: Batch, count: int) -> int:
        """Apply the first `count` operations; returns how many it did. A crash may fall between any two."""
        for index, operation in enumerate(itertools.islice(batch, count)):
            if index:
                self._on_call("apply next", batch.lane)
            self.disk.apply(batch.store, operation)
            self._on_applied(batch, operation)
        return count


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
        scope = (batch.store, batch.lane, batch.shard)
        held = self.disk.marks.get(scope, Mark())
        check_epoch(batch, held)
        fresh = fresh_indexes(batch, held)
        wanted = None if fresh is None else set(fresh)
        for index, operation in enumerate(batch):
            if wanted is None or index in wanted:
                self.disk.apply(batch.store, operation)
                self._on_applied(batch, operation)
        if batch.mark is not None:
            self.disk.marks[scope] = held.union(batch.mark)
        return count

    def answer(self, batch: Batch, count: int) -> Answer:
        """What its mark covers is applied: an earlier call may have done it whose answer was lost."""
        if not batch.lsns:
            return super().answer(batch, count)
        held = self.disk.marks.get((batch.store, batch.lane, batch.shard), Mark())
        return [Applied() if held.covers(lsn) else Retry(error="later") for lsn in batch.lsns]
