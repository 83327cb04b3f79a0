"""Which operations of a shard are not settled yet, and what may therefore be forgotten.

The idea needed to read it: a shard keeps what is *pending*, which is bounded by its memory, and never what is
settled, which is not. Its mark covers every LSN up to its frontier except the pending ones; LSNs of other
shards may be covered too, since nobody asks this shard's mark about them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise, takewhile

from walbatch.limits import RANGES_MAX, WINDOW_COUNT_MAX
from walbatch.types import Mark, Range, merge_ranges

_COMPACT_SLACK = 1024


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
        self._pending: set[int] = set()
        self._order: deque[int] = deque()
        self._highest_settled = 0
        # Of LSNs above the frontier that were admitted out of turn: pending, and settled already.
        self._ahead: set[int] = set()
        self._ahead_settled: set[int] = set()

    def __repr__(self) -> str:
        return f"<ShardLedger {len(self._pending)} pending, watermark {self.watermark()}, frontier {self.frontier}>"

    def __len__(self) -> int:
        return len(self._pending) + len(self._ahead)

    def is_pending(self, lsn: int) -> bool:
        """Whether this operation was admitted and is not settled."""
        return lsn in self._pending or lsn in self._ahead

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
        self._pending.add(lsn)
        self._order.append(lsn)
        self.frontier = lsn

    def admit_many(self, lsns: Sequence[int]) -> None:
        """Operations became pending: at least one, in LSN order."""
        assert lsns[0] > self.frontier, "operations are admitted in LSN order, once"
        self._pending.update(lsns)
        self._order.extend(lsns)
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

    def settle(self, lsns: Iterable[int]) -> None:
        """Pending operations became settled."""
        settled = set(lsns)
        if self._ahead:
            early = settled & self._ahead
            self._ahead -= early
            self._ahead_settled |= early
            settled -= early
        if not settled <= self._pending:
            raise KeyError(f"operations {sorted(settled - self._pending)[:3]} are not pending")
        self._pending -= settled
        self._highest_settled = max(self._highest_settled, max(settled, default=0))
        order = self._order
        while order and order[0] not in self._pending:
            order.popleft()
        if len(order) > 2 * len(self._pending) + _COMPACT_SLACK:
            self._order = deque(lsn for lsn in order if lsn in self._pending)

    def _first(self, without: Collection[int]) -> int | None:
        """The oldest pending LSN that is not in `without`."""
        return next((lsn for lsn in self._order if lsn in self._pending and lsn not in without), None)

    def watermark(self, without: Collection[int] = ()) -> int:
        """Every operation of this shard up to this LSN is settled, and has been seen to be; or is in `without`.

        What `initial` covers beyond the frontier does not count yet: the log may be trimmed up to a watermark, and the reader
        still has to pass there.
        """
        first = self._first(without)
        return self.frontier if first is None else first - 1

    def mark(self, *, epoch: int, settling: frozenset[int] = frozenset()) -> Mark:
        """What is settled, or will be once `settling` is too: for a backend to store.

        O(settling), plus the pending LSNs below the highest settled.
        """
        return self._mark(epoch, settling, self.initial)

    def checkpoint_mark(self, *, epoch: int) -> Mark:
        """What is settled and counted: for the checkpoint.

        What only the backend's mark knows is left out until it is passed over: the checkpoint's count goes with its marks.
        """
        return self._mark(epoch, frozenset(), self.counted)

    def _mark(self, epoch: int, settling: frozenset[int], known: Mark) -> Mark:
        """What this run has settled, and what was known before it."""
        first = self._first(settling)
        if first is None:
            watermark, ranges = self.frontier, []
        else:
            watermark = first - 1
            highest = max(self._highest_settled, max(settling - self._ahead, default=0))
            ranges = self._ranges_above(first, highest, settling) if highest > first else []
        ahead = [(lsn, lsn) for lsn in (*self._ahead_settled, *(settling & self._ahead))]
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
        below = takewhile(lambda lsn: lsn <= highest, self._order)
        pending = [lsn for lsn in below if lsn >= first and lsn in self._pending and lsn not in settling]
        pending.append(highest + 1)
        return [(low + 1, high - 1) for low, high in pairwise(pending) if low + 1 < high]
