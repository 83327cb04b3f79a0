"""Which operations of a shard are not settled yet, and what may therefore be forgotten.

The idea needed to read it: a shard keeps what is *pending*, which is bounded by its memory, and never what is
settled, which is not. Its mark covers every LSN up to its frontier except the pending ones; LSNs of other
shards may be covered too, since nobody asks this shard's mark about them.

Operations come in many at once and are mostly settled in the order in which they came. So what was admitted stands in
*blocks*, as it came, and what is settled goes from their front with one comparison. Only when an operation is settled before
an elder one are the blocks up to it taken apart, into LSNs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain, islice, pairwise, takewhile
from typing import TypeGuard

from walbatch.limits import RANGES_MAX, WINDOW_COUNT_MAX
from walbatch.types import Mark, Range, merge_ranges

_COMPACT_SLACK = 1024
_BLOCK_COUNT = 1024
"""LSNs of a block that grows: those that are settled go with the block, all at once."""


class ShardLedger:
    """Pending LSNs of one shard. Memory O(pending). Not thread-safe: its owner locks.

    `admit` in ascending LSN order; `settle` in any. `frontier` is the LSN up to which every operation of the
    shard has been admitted, or passed over because it was settled before this run. That is what `initial` covers: what the
    last checkpoint had `counted`, and what the backend's own mark says beyond that.
    """

    def __init__(self, initial: Mark, counted: Mark | None = None) -> None:
        self.initial = initial
        self.counted = initial if counted is None else counted
        self.frontier = 0
        # What is pending in blocks, all of it above what was taken apart; of the first block, those before `_start` are settled.
        self._blocks: deque[Sequence[int]] = deque()
        self._start = 0
        self._in_blocks = 0
        # The last block, as long as it may grow.
        self._growing: list[int] | None = None
        # What was taken apart: what is pending of it, and in which order.
        self._pending: set[int] = set()
        self._order: deque[int] = deque()
        self._highest_settled = 0
        # Of LSNs above the frontier that were admitted out of turn: pending, and settled already.
        self._ahead: set[int] = set()
        self._ahead_settled: set[int] = set()

    def __repr__(self) -> str:
        pending = len(self._pending) + self._in_blocks
        return f"<ShardLedger {pending} pending, watermark {self.watermark()}, frontier {self.frontier}>"

    def __len__(self) -> int:
        return len(self._pending) + self._in_blocks + len(self._ahead)

    def is_pending(self, lsn: int) -> bool:
        """Whether this operation was admitted and is not settled."""
        return lsn in self._pending or lsn in self._ahead or self._is_in_blocks(lsn)

    def _is_in_blocks(self, lsn: int) -> bool:
        """Whether it is pending in a block."""
        if not self._blocks or lsn < self._blocks[0][self._start]:
            return False
        block = next((block for block in self._blocks if block[-1] >= lsn), ())
        index = bisect_left(block, lsn)
        return index < len(block) and block[index] == lsn

    def admit_ahead(self, lsn: int) -> None:
        """An operation became pending out of turn: the frontier has still to come to it."""
        assert lsn > self.frontier
        assert not self.is_ahead(lsn)
        self._ahead.add(lsn)

    def is_ahead(self, lsn: int) -> bool:
        """Whether an operation above the frontier was admitted out of turn, settled since or not."""
        return lsn in self._ahead or lsn in self._ahead_settled

    @property
    def room_ahead(self) -> int:
        """How many more may be admitted out of turn: settled, each may cost the mark a range until the frontier is there."""
        known = len(self._ahead) + len(self._ahead_settled) + len(self.initial.ranges)
        return max(0, RANGES_MAX - WINDOW_COUNT_MAX - known)

    def reach(self, lsn: int) -> None:
        """The frontier comes to an operation that was admitted out of turn."""
        if lsn in self._ahead:
            self._ahead.remove(lsn)
            self.admit(lsn)
        else:
            self._ahead_settled.remove(lsn)
            self._highest_settled = max(self._highest_settled, lsn)
            self.frontier = lsn

    def admit(self, lsn: int) -> None:
        """An operation became pending."""
        assert lsn > self.frontier, "operations are admitted in LSN order, once"
        if self._growing is None or len(self._growing) >= _BLOCK_COUNT:
            self._growing = []
            self._blocks.append(self._growing)
        self._growing.append(lsn)
        self._in_blocks += 1
        self.frontier = lsn

    def admit_many(self, lsns: Sequence[int]) -> None:
        """Operations became pending: at least one, in LSN order. The sequence is kept: it must not change."""
        assert lsns[0] > self.frontier, "operations are admitted in LSN order, once"
        self._blocks.append(lsns)
        self._growing = None
        self._in_blocks += len(lsns)
        self.frontier = lsns[-1]

    def advance(self, lsn: int) -> None:
        """Everything of this shard up to `lsn` has been admitted."""
        self.frontier = max(self.frontier, lsn)
        if self._ahead_settled:
            # What was settled out of turn may be gone from the log before the frontier comes there.
            passed = {settled for settled in self._ahead_settled if settled <= lsn}
            self._highest_settled = max(self._highest_settled, *passed, 0)
            self._ahead_settled -= passed
        if self.initial.ranges or self.counted.ranges:
            self.initial = self._without_past(self.initial)
            self.counted = self._without_past(self.counted)

    def _without_past(self, known: Mark) -> Mark:
        """A mark without its ranges, once the frontier has passed them and nothing below them is pending."""
        if not known.ranges or self.frontier < known.ranges[-1][1]:
            return known
        first = self._first(())
        return known if first is not None and first < known.ranges[-1][1] else Mark(watermark=known.watermark)

    def pass_over(self, lsn: int) -> bool:
        """An operation that was settled before this run. Returns whether the checkpoint had not counted it yet."""
        self._highest_settled = max(self._highest_settled, lsn)
        return not self.counted.covers(lsn)

    def knows_from(self, lsn: int) -> bool:
        """Whether an operation from this LSN on may have been settled before this run, or admitted out of turn."""
        known = self.initial
        highest = known.ranges[-1][1] if known.ranges else known.watermark
        return bool(self._ahead or self._ahead_settled) or highest >= lsn

    def settle(self, lsns: Collection[int]) -> None:
        """Pending operations became settled. One comparison for many, where they are the eldest and in their order."""
        if not self._is_front(lsns):
            self._settle_apart(lsns)
            return
        left = len(lsns)
        self._in_blocks -= left
        self._highest_settled = max(self._highest_settled, lsns[-1])
        while left:
            count = min(left, len(self._blocks[0]) - self._start)
            left -= count
            self._start += count
            if self._start == len(self._blocks[0]):
                self._drop_block()

    def _drop_block(self) -> None:
        """All of the first block is settled, or taken apart."""
        block = self._blocks.popleft()
        self._start = 0
        if block is self._growing:
            self._growing = None

    def _is_front(self, lsns: Collection[int]) -> TypeGuard[Sequence[int]]:
        """Whether these are the eldest that are pending, in their order, and nothing was taken apart."""
        if (
            not lsns
            or self._order
            or not isinstance(lsns, (range, tuple, list))
            or len(lsns) > self._in_blocks
        ):
            return False
        start, seen = self._start, 0
        for block in self._blocks:
            if seen == len(lsns):
                break
            count = min(len(lsns) - seen, len(block) - start)
            mine, theirs = block[start : start + count], lsns[seen : seen + count]
            if mine != theirs and (type(mine) is type(theirs) or tuple(mine) != tuple(theirs)):
                return False
            start, seen = 0, seen + count
        return True

    def _take_apart(self, highest: int) -> None:
        """Blocks that begin at or below `highest` become single LSNs."""
        while self._blocks and self._blocks[0][self._start] <= highest:
            lsns = self._blocks[0][self._start :]
            self._pending.update(lsns)
            self._order.extend(lsns)
            self._in_blocks -= len(lsns)
            self._drop_block()

    def _settle_apart(self, lsns: Iterable[int]) -> None:
        """`settle` for all cases."""
        settled = set(lsns)
        if self._ahead:
            early = settled & self._ahead
            self._ahead -= early
            self._ahead_settled |= early
            settled -= early
        self._take_apart(max(settled, default=0))
        if not settled <= self._pending:
            raise KeyError(f"operations {sorted(settled - self._pending)[:3]} are not pending")
        self._pending -= settled
        self._highest_settled = max(self._highest_settled, max(settled, default=0))
        order = self._order
        while order and order[0] not in self._pending:
            order.popleft()
        if len(order) > 2 * len(self._pending) + _COMPACT_SLACK:
            self._order = deque(lsn for lsn in order if lsn in self._pending)

    def _each(self) -> Iterator[int]:
        """What is pending up to the frontier, in LSN order."""
        apart = (lsn for lsn in self._order if lsn in self._pending)
        return chain(apart, islice(chain.from_iterable(self._blocks), self._start, None))

    def _first(self, without: Collection[int]) -> int | None:
        """The oldest pending LSN that is not in `without`."""
        if not without:
            return self._order[0] if self._order else self._behind_front(0)
        return next((lsn for lsn in self._each() if lsn not in without), None)

    def _behind_front(self, count: int) -> int | None:
        """The oldest pending LSN in blocks but for so many."""
        index = self._start + count
        for block in self._blocks:
            if index < len(block):
                return block[index]
            index -= len(block)
        return None

    def watermark(self, without: Collection[int] = ()) -> int:
        """Every operation of this shard up to this LSN is settled, and has been seen to be; or is in `without`.

        What `initial` covers beyond the frontier does not count yet: the log may be trimmed up to a watermark, and the reader
        still has to pass there.
        """
        first = self._first(without)
        return self.frontier if first is None else first - 1

    def mark(self, *, epoch: int, settling: Collection[int] = frozenset()) -> Mark:
        """What is settled, or will be once `settling` is too: for a backend to store.

        O(settling), plus the pending LSNs below the highest settled; one comparison where `settling` is the eldest, in a sequence.
        """
        return self._mark(epoch, settling, self.initial)

    def checkpoint_mark(self, *, epoch: int) -> Mark:
        """What is settled and counted: for the checkpoint.

        What only the backend's mark knows is left out until it is passed over: the checkpoint's count goes with its marks.
        """
        return self._mark(epoch, frozenset(), self.counted)

    def _mark(self, epoch: int, settling: Collection[int], known: Mark) -> Mark:
        """What this run has settled, and what was known before it."""
        is_front = self._is_front(settling)
        apart: frozenset[int] = frozenset(() if is_front else settling)
        first = self._behind_front(len(settling)) if is_front else self._first(apart)
        if first is None:
            watermark, ranges = self.frontier, []
        else:
            watermark = first - 1
            highest = max(self._highest_settled, max(apart - self._ahead, default=0))
            ranges = self._ranges_above(first, highest, apart) if highest > first else []
        ahead = [(lsn, lsn) for lsn in (*self._ahead_settled, *(apart & self._ahead))]
        if ahead:
            ranges = [*ranges, *ahead]
        elif known.watermark <= watermark and not known.ranges:
            return Mark(epoch=epoch, watermark=watermark, ranges=tuple(ranges))
        watermark = max(watermark, known.watermark)
        return Mark(
            epoch=epoch, watermark=watermark, ranges=merge_ranges([*ranges, *known.ranges], watermark)
        )

    def _ranges_above(self, first: int, highest: int, settling: frozenset[int]) -> list[Range]:
        """The gaps between pending LSNs from `first` up to `highest`. Looks at nothing above it."""
        below = takewhile(lambda lsn: lsn <= highest, self._each())
        pending = [lsn for lsn in below if lsn >= first and lsn not in settling]
        pending.append(highest + 1)
        return [(low + 1, high - 1) for low, high in pairwise(pending) if low + 1 < high]
