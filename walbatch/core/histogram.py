"""How a quantity is distributed: counts in buckets whose width grows with the value.

Not here: units. Values are non-negative integers, nanoseconds or counts.

The idea needed to read it: a value is cut to its five leading bits, so a bucket is at most 1/16 of its value wide, and its
middle is within 1/32 (3.2 %) of everything in it. Below 32 every value has its own bucket. There are BUCKETS_MAX of them in
all; a quantity that stays within a factor of a thousand uses about 160.

Source: G. Tene, HdrHistogram (the same layout, with more bits).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final, Self

VALUE_MAX: Final = 2**63 - 1
"""Larger values are counted as this one: 292 years in nanoseconds."""

_LINEAR: Final = 32
"""Up to here each value has its own bucket."""
_STEPS: Final = 16
"""Buckets from a power of two to the next."""
_BITS: Final = 5

BUCKETS_MAX: Final = _LINEAR + (VALUE_MAX.bit_length() - _BITS) * _STEPS


class Histogram:
    """Counts of values. O(1) to add to, bounded in memory. Not thread-safe: its owner locks."""

    __slots__ = ("_buckets", "count", "maximum", "total")

    def __init__(self) -> None:
        self.count = 0
        self.total = 0
        self.maximum = 0
        self._buckets: dict[int, int] = {}

    def __repr__(self) -> str:
        return f"<Histogram of {self.count}, up to {self.maximum}>"

    @classmethod
    def merged(cls, histograms: Iterable[Histogram]) -> Self:
        """One that counts what all of them have counted."""
        whole = cls()
        for histogram in histograms:
            whole.merge(histogram)
        return whole

    @property
    def average(self) -> float:
        """The exact mean; 0 where nothing was counted."""
        return self.total / self.count if self.count else 0.0

    def add(self, value: int, times: int = 1) -> None:
        """Count `value`, as many `times`."""
        assert value >= 0, "what is counted is a time or a number of things"
        self.count += times
        self.total += value * times
        if value > self.maximum:  # noqa: PLR1730 - a call of max would be a third of the time
            self.maximum = value
        shift = value.bit_length() - _BITS
        if shift > 0:
            if value > VALUE_MAX:
                value, shift = VALUE_MAX, VALUE_MAX.bit_length() - _BITS
            value = (shift << 4) + (value >> shift)
        buckets = self._buckets
        buckets[value] = buckets.get(value, 0) + times

    def merge(self, other: Histogram) -> None:
        """Count all that `other` has counted."""
        self.count += other.count
        self.total += other.total
        self.maximum = max(self.maximum, other.maximum)
        buckets = self._buckets
        for bucket, times in other._buckets.items():
            buckets[bucket] = buckets.get(bucket, 0) + times

    def quantile(self, q: float) -> int:
        """The value that a share `q` of all are not above: within 5 % of the exact one, which is the nearest rank.

        0 where nothing was counted; the maximum is exact.
        """
        return self.quantiles((q,))[0]

    def quantiles(self, shares: Iterable[float]) -> list[int]:
        """The same for several shares, ascending, at the price of one."""
        ranked = sorted(self._buckets.items())
        count = sum(times for _, times in ranked)  # that of these buckets, whoever adds meanwhile
        found: list[int] = []
        walk = iter(ranked)
        reached, bucket = 0, 0
        for share in shares:
            rank = max(1, math.ceil(share * count))
            if rank >= count:
                found.append(self.maximum)
                continue
            while reached < rank:
                bucket, times = next(walk)
                reached += times
            found.append(min(_middle(bucket), self.maximum))
        return found


class RecentHistogram:
    """Counts of the values of late: of one to two windows. Not thread-safe: its owner locks.

    Two histograms take turns: when the newer one is a window old, the older one is dropped.
    """

    __slots__ = ("_began_ns", "_newer", "_older", "_window_ns")

    def __init__(self, *, window_ns: int, now_ns: int) -> None:
        self._window_ns = window_ns
        self._began_ns = now_ns
        self._newer = Histogram()
        self._older = Histogram()

    def __repr__(self) -> str:
        return f"<RecentHistogram of {self._newer.count} and {self._older.count}>"

    def add(self, value: int, *, now_ns: int) -> None:
        """Count `value`."""
        if now_ns - self._began_ns >= self._window_ns:
            self._turn(now_ns)
        self._newer.add(value)

    def whole(self, *, now_ns: int) -> Histogram:
        """What was counted of late."""
        self._turn(now_ns)
        return Histogram.merged((self._older, self._newer))

    def _turn(self, now_ns: int) -> None:
        age_ns = now_ns - self._began_ns
        if age_ns < self._window_ns:
            return
        self._older = self._newer if age_ns < 2 * self._window_ns else Histogram()
        self._newer = Histogram()
        self._began_ns += age_ns // self._window_ns * self._window_ns


def _middle(bucket: int) -> int:
    """The value in the middle of a bucket."""
    if bucket < _LINEAR:
        return bucket
    shift = (bucket >> 4) - 1
    return ((bucket & (_STEPS - 1) | _STEPS) << shift) + (1 << shift >> 1)
