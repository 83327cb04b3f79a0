"""What a batch costs: a family of curves with a knee, and the size that is best on each."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

COUNT_MAX = 65_536
_FINE = 1.01
"""Ratio of neighbouring sizes among which the best is looked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Seconds of a batch of n: `fixed + each n`, and beyond the knee also `each bend knee ((n - knee) / knee)^power`.

    Around `bump_at` (if it is not 0) an operation costs `bump` more, as a share: that makes two optima. With `page` above 1
    a batch costs as much as one of the next multiple of it.
    """

    fixed: float
    each: float
    knee: float
    bend: float
    power: float
    bump: float = 0.0
    bump_at: float = 0.0
    bump_width: float = 0.5
    page: int = 1

    def seconds(self, count: float) -> float:
        """How long a batch of `count` takes, on average."""
        if self.page > 1:
            count = -(-count // self.page) * self.page
        total = self.fixed + self.each * count
        if count > self.knee:
            total += self.each * self.bend * self.knee * (count / self.knee - 1) ** self.power
        if self.bump_at:
            total *= 1 + self.bump * math.exp(-0.5 * (math.log(count / self.bump_at) / self.bump_width) ** 2)
        return total

    def cost(self, count: float) -> float:
        """Seconds for each operation."""
        return self.seconds(count) / count


def sizes(count_max: int = COUNT_MAX) -> list[int]:
    """All sizes up to where they are one in a hundred apart, then such ones."""
    found, size = [], 1
    while size < count_max:
        found.append(size)
        size = max(size + 1, int(size * _FINE))
    return [*found, count_max]


SIZES = sizes()


def best_count(cost: Callable[[int], float], *, allowed: Callable[[int], bool] = lambda _: True) -> int:
    """The allowed size with the least cost."""
    return min((size for size in SIZES if allowed(size)), key=cost)


def log_uniform(random_: random.Random, low: float, high: float) -> float:
    return math.exp(random_.uniform(math.log(low), math.log(high)))


def draw_curve(random_: random.Random) -> Curve:
    """A curve with a fixed part of 0.2 to 200 ms, 1 us to 1 ms for each operation, and a knee at 16 to 30,000."""
    return Curve(
        fixed=log_uniform(random_, 0.2e-3, 200e-3),
        each=log_uniform(random_, 1e-6, 1e-3),
        knee=log_uniform(random_, 16, 30_000),
        bend=log_uniform(random_, 0.5, 8),
        power=random_.choice([1.5, 2.0, 3.0]),
    )
