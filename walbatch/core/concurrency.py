"""How many batches of a lane may be in flight: the second, slower loop, beside the size of each.

Not here: the size (`controller`), and which lanes may overlap at all (their order says so).

The idea needed to read it: one more batch in flight is a trial. If durations grow by as much as the throughput should, the
backend was busy already, and the trial is taken back; the next one waits twice as long. Durations are compared with what the size
controller predicts for each size, so that a change of size does not look like congestion.
"""

from __future__ import annotations

import math
from typing import Final

from walbatch.core.controller import BatchResult, Observation

WINDOW_BATCHES: Final = 16
WINDOW_ROUNDS: Final = 4
"""A decision needs at least so many batches, and so many for each that may be in flight."""

REACHED_SHARE: Final = 0.5
"""More are tried only where so many of the batches ran beside as many others as allowed."""

CONGESTED: Final = 2.5
"""Standard deviations of a window's mean above the past mean."""

WORTH: Final = 0.5
"""What one more must bring, as a share of what it would bring if the others were not slowed down."""

SHRINK: Final = 0.9
HOLD_WINDOWS: Final = 2
HOLD_DOUBLINGS_MAX: Final = 8
"""A trial that did not pay is made again after so many windows, then twice as many, at most 512."""

ERROR_MAX: Final = math.log(3)
MEAN_RATE: Final = 0.25
_MEAN_DOUBT: Final = 1 + MEAN_RATE / (2 - MEAN_RATE)
"""The past mean is uncertain, too."""

VARIANCE_START: Final = 0.1
VARIANCE_RATE: Final = 1 / 64
_VARIANCE_MIN: Final = 1e-4


class Concurrency:
    """The limit of one lane, from 1 to `limit_max`. Not thread-safe: its owner locks."""

    def __init__(self, *, limit_max: int, start: int = 1) -> None:
        if not 1 <= start <= limit_max:
            raise ValueError(f"start is {start}, but must be from 1 to limit_max, which is {limit_max}")
        self._limit = start
        self._limit_max = limit_max
        self._mean: float | None = None
        self._variance = VARIANCE_START
        self._trial = False
        self._hold = 0
        self._doublings = 0
        self._skip = 0
        self._count = 0
        self._sum = 0.0
        self._reached = 0

    def __repr__(self) -> str:
        return f"<Concurrency {self._limit} of {self._limit_max}{' on trial' if self._trial else ''}>"

    @property
    def limit(self) -> int:
        """Batches that may be in flight."""
        return self._limit

    def observe(self, observation: Observation, *, predicted_s: float | None) -> None:
        """Learn from a batch that has ended, and from how long the size controller thought that it would take."""
        if observation.result is BatchResult.THROTTLED:
            if not self._skip:
                self._shrink()
            return
        if self._skip:
            # Was in flight when the limit changed: says nothing about the new one.
            self._skip -= 1
            return
        if (
            observation.result is not BatchResult.DELIVERED
            or not observation.learnable
            or not predicted_s
            or not observation.seconds > 0
        ):
            return
        error = math.log(observation.seconds / predicted_s)
        error = min(max(error, -ERROR_MAX), ERROR_MAX)
        self._count += 1
        self._sum += error
        self._reached += observation.concurrency >= self._limit
        mean = 0.0 if self._mean is None else self._mean
        self._variance += (max((error - mean) ** 2, _VARIANCE_MIN) - self._variance) * VARIANCE_RATE
        if self._count >= max(WINDOW_BATCHES, WINDOW_ROUNDS * self._limit):
            self._decide()

    def _decide(self) -> None:
        """A window has ended: keep the trial or take it back, shrink, or try one more."""
        mean = self._sum / self._count
        past = mean if self._mean is None else self._mean
        error = math.sqrt(self._variance / self._count * _MEAN_DOUBT)
        reached = self._reached >= REACHED_SHARE * self._count
        self._hold = max(0, self._hold - 1)
        self._open_window()
        if self._trial:
            self._trial = False
            if mean - past > WORTH * math.log(self._limit / (self._limit - 1)):
                self._give_way(self._limit - 1, self._doublings)
                self._doublings = min(self._doublings + 1, HOLD_DOUBLINGS_MAX)
                return
            self._doublings = 0
        elif mean > past + CONGESTED * error:
            self._mean = past + MEAN_RATE * (mean - past)
            self._shrink()
            return
        self._mean = past + MEAN_RATE * (mean - past)
        if reached and not self._hold and mean <= past + error and self._limit < self._limit_max:
            self._limit += 1
            self._trial = True
            self._skip = self._limit

    def _shrink(self) -> None:
        self._give_way(max(1, min(int(self._limit * SHRINK), self._limit - 1)), 0)

    def _give_way(self, limit: int, doublings: int) -> None:
        self._skip = self._limit
        self._limit = limit
        self._trial = False
        self._hold = HOLD_WINDOWS << doublings
        self._open_window()

    def _open_window(self) -> None:
        self._count = self._reached = 0
        self._sum = 0.0
