"""The beginning of a size controller: some batches of a size, then twice as many operations, until that does not help any more.

Not here: what is learnt from these batches meanwhile (`evidence`), and what comes afterwards (`surface`).

The idea needed to read it: small batches are short, so that looking from below costs little. The middle of a size's batches is
compared, because with two of them one slow one would be half of the truth.
"""

from __future__ import annotations

import enum
import math
from typing import Final

BATCHES: Final = 2
WORSE: Final = 1.35
FAR_WORSE: Final = 3.0
"""A size that costs so much more than the best one is the last: the first only when twice as many batches agree."""

GAIN: Final = 0.05
BARREN_MAX: Final = 4
"""Doublings in a row that gain less than this."""

LATE_MAX: Final = 1
"""More batches of a size than this that exceed the latency target make it the last. One may be chance."""


class Next(enum.Enum):
    """What the next batch should hold."""

    THE_SAME = enum.auto()
    TWICE_AS_MUCH = enum.auto()
    THE_BEST = enum.auto()
    """The slow start is over."""


class SlowStart:
    """The batches of the size that is being tried, and the best size before it."""

    __slots__ = ("_barren", "_best", "_costs", "_late")

    def __init__(self) -> None:
        self._costs: list[float] = []
        self._best = math.inf
        self._barren = 0
        self._late = 0

    def __repr__(self) -> str:
        return f"<SlowStart best {self._best:.3g} s, {self._barren} doublings for nothing>"

    def delivered(self, cost: float, *, late: bool, highest: bool) -> Next:
        """A batch took `cost` seconds for each operation.

        `late`: longer than the latency target. `highest`: no larger size is allowed.
        """
        costs = self._costs
        costs.append(cost)
        self._late += late
        if len(costs) < BATCHES:
            return Next.THE_SAME
        middle = sorted(costs)[(len(costs) - 1) // 2 : len(costs) // 2 + 1]
        cost = sum(middle) / len(middle)
        worse = cost > self._best * WORSE
        too_late = self._late > LATE_MAX
        doubtful = (worse and cost < self._best * FAR_WORSE) or self._late > 0
        if doubtful and not too_late and len(costs) < 2 * BATCHES:
            return Next.THE_SAME
        costs.clear()
        self._late = 0
        barren = cost > self._best * (1 - GAIN)
        self._barren = self._barren + 1 if barren else 0
        self._best = min(self._best, cost)
        over = too_late or worse or self._barren >= BARREN_MAX or highest
        return Next.THE_BEST if over else Next.TWICE_AS_MUCH
