"""What each batch size has cost so far, the older the less: decayed sums over a grid of sizes.

Not here: what is made of it (`parabola`, `surface`).

The idea needed to read it: the cost of a size is seconds over operations, sums over sums, never a mean of logarithms: that
would hide the rare batch that takes long. Nothing is ever multiplied to fade: each new sample weighs more instead.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise
from operator import mul, sub
from typing import Final, NamedTuple

from walbatch.core.controller import SizeBounds

SHRINK_EVENTS: Final = 64.0
"""Seconds beyond a clip are rare and large. A size's own share of them counts as much as what all sizes together say about
so many of them: spikes (equally rare at any size) then cost no precision, while stalls that come by the byte, and so strike
few small batches but every large one, are told apart in time."""

OCTAVE: Final = 8
STEP: Final = math.log(2) / OCTAVE
"""Between neighbouring sizes of the grid, in ln(count)."""

_SCALE_MAX: Final = 1e12
_EPSILON: Final = 1e-6


def grid(bounds: SizeBounds) -> list[int]:
    """The sizes to keep evidence of: distinct, allowed under any ceiling, and about STEP apart."""
    every = SizeBounds(count_min=bounds.count_min, multiple_of=bounds.multiple_of)
    steps = int(math.log(every.largest / every.smallest) / STEP + _EPSILON)
    sizes = {every.clamp(round(every.smallest * math.exp(STEP * step))) for step in range(steps + 1)}
    return sorted(sizes | {every.largest})


class Nearby(NamedTuple):
    """Parallel lists for some sizes: ln count, ln cost, weight.

    `weight` is the sum of the weights, `beyond` the mean of how much of the ln cost is due to what was beyond the clip.
    """

    logs: list[float]
    costs: list[float]
    weights: list[float]
    weight: float
    beyond: float


class Evidence:
    """Sums over samples, for each of ascending `sizes`. Seconds are in the caller's unit of account."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = sizes
        self.logs = [math.log(size) for size in sizes]
        self._edges = [(low + high) / 2 for low, high in pairwise(sizes)]
        self._weights = [0.0] * len(sizes)
        self._items = [0.0] * len(sizes)
        self._seconds = [0.0] * len(sizes)
        self._costs = [0.0] * len(sizes)
        self._excess = [0.0] * len(sizes)
        self._pool_items = 0.0
        self._pool_excess = 0.0
        self._pool_events = 0.0
        self._scale = 1.0

    def __repr__(self) -> str:
        return f"<Evidence {len(self.tried(0.0))} of {len(self.sizes)} sizes>"

    def index(self, count: float) -> int:
        """The size nearest to `count`."""
        return bisect_right(self._edges, count)

    def add(self, index: int, count: int, seconds: float, excess: float) -> None:
        """A batch of `count`; `excess` are seconds beyond the clip, on top of `seconds`."""
        scale = self._scale
        items = count * scale
        self._weights[index] += scale
        self._items[index] += items
        self._seconds[index] += seconds * scale
        self._costs[index] = math.log(self._seconds[index] / self._items[index])
        self._pool_items += items
        if excess:
            self._excess[index] += excess * scale
            self._pool_excess += excess * scale
            self._pool_events += scale

    def lose(self, index: int, seconds: float) -> None:
        """A batch that delivered nothing: its seconds count where its size is known at all."""
        if self._weights[index]:
            self._seconds[index] += seconds * self._scale
            self._costs[index] = math.log(self._seconds[index] / self._items[index])

    def fade(self, factor: float) -> None:
        """Let everything so far weigh `factor` times less (at least 1)."""
        self._scale *= factor
        if self._scale > _SCALE_MAX:
            self._rescale()

    def weight(self, index: int) -> float:
        """Samples at a size, as far as they have not faded."""
        return self._weights[index] / self._scale

    def tried(self, weight: float) -> list[int]:
        """The sizes that weigh more than that."""
        least = weight * self._scale
        return [index for index, value in enumerate(self._weights) if value > least]

    def largest(self, weight: float) -> int:
        """The largest size that weighs more than that; if none does, the smallest."""
        least, index = weight * self._scale, len(self._weights) - 1
        while index and self._weights[index] <= least:
            index -= 1
        return index

    def cost(self, index: int) -> float:
        """The ln of the cost of a size that has a weight."""
        return self._cost(index, *self._stalls())

    def clipped_cost(self, index: int) -> float:
        """The same without what was beyond the clip."""
        return self._costs[index]

    def near(self, least: float, most: float) -> Nearby:
        """The sizes with a ln(count) from `least` to `most`."""
        low, high = bisect_left(self.logs, least), bisect_right(self.logs, most)
        factor = 1 / self._scale
        weights = [weight * factor for weight in self._weights[low:high]]
        total = sum(weights)
        clipped = self._costs[low:high]
        if not self._pool_events or not total:
            return Nearby(self.logs[low:high], clipped, weights, total, 0.0)
        span, seconds = self._stalls()
        costs = [
            self._cost(index, span, seconds) if weight else 0.0 for index, weight in enumerate(weights, low)
        ]
        beyond = sum(map(mul, weights, map(sub, costs, clipped))) / total
        return Nearby(self.logs[low:high], costs, weights, total, beyond)

    def around(self, at: float, reach: float, weight: float) -> tuple[Nearby, float]:
        """The sizes within `reach` of ln(count) = `at`, which is doubled until they weigh so much, and as far as it went."""
        near = self.near(at - reach, at + reach)
        while near.weight < weight and len(near.logs) < len(self.logs):
            reach *= 2
            near = self.near(at - reach, at + reach)
        return near, reach

    def cells(self, weight: float) -> list[tuple[int, float, float, float]]:
        """For each size that weighs more than that: size, weight, and seconds and excess for each operation."""
        return [
            (
                self.sizes[index],
                self.weight(index),
                self._seconds[index] / self._items[index],
                self._excess[index] / self._items[index],
            )
            for index in self.tried(weight)
        ]

    @property
    def events(self) -> float:
        """Samples that had an excess, as far as they have not faded."""
        return self._pool_events / self._scale

    def put(self, size: int, weight: float, cost: float, excess: float) -> None:
        """Add what `cells` told of a size, in sizes that may be others."""
        index = self.index(size)
        items = size * weight * self._scale
        self._weights[index] += weight * self._scale
        self._items[index] += items
        self._seconds[index] += cost * items
        self._costs[index] = math.log(self._seconds[index] / self._items[index])
        self._excess[index] += excess * items
        self._pool_items += items
        self._pool_excess += excess * items

    def put_events(self, events: float) -> None:
        """Add what `events` told."""
        self._pool_events += events * self._scale

    def _stalls(self) -> tuple[float, float]:
        """The operations among which SHRINK_EVENTS excesses are to be expected, and the seconds of those."""
        if not self._pool_events:
            return 0.0, 0.0
        factor = SHRINK_EVENTS / self._pool_events
        return factor * self._pool_items, factor * self._pool_excess

    def _cost(self, index: int, span: float, seconds: float) -> float:
        if not span:
            return self._costs[index]
        items = self._items[index]
        return math.log(self._seconds[index] / items + (self._excess[index] + seconds) / (items + span))

    def _rescale(self) -> None:
        factor = 1 / self._scale
        for sums in (self._weights, self._items, self._seconds, self._excess):
            sums[:] = [value * factor for value in sums]
        self._pool_items *= factor
        self._pool_excess *= factor
        self._pool_events *= factor
        self._scale = 1.0
