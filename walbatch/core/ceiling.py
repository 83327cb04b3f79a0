"""How large a batch may be: below what failed, and within the latency target.

Not here: which size is best below that (`surface`), and the ceilings in bytes and memory, which the cut keeps.

The idea needed to read it: both ceilings are places on the axis ln(count). `FailureCeiling` halves the distance between
what was delivered and what was not; `LatencyCeiling` follows the share of batches that take too long.
"""

from __future__ import annotations

import math
import struct
from typing import Final

from walbatch.core.parabola import Parabola
from walbatch.limits import BATCH_COUNT_MAX

OCTAVE_LN: Final = math.log(2)

HOLD_BATCHES: Final = 128
HOLD_DOUBLINGS_MAX: Final = 10
"""A size that failed is tried again after HOLD_BATCHES x 2^k batches: in the end one batch in 131,072 fails for that."""

FINE: Final = 0.01
"""The search for the largest size that does not fail ends at this ratio."""

TAIL_SHARE: Final = 0.9
"""Of the batches that may exceed the target, so many are aimed at: the ceiling wavers, and its error costs more on the far
side."""

TAIL_START: Final = 0.5
TAIL_STEP: Final = 0.04
TAIL_STEPS_FIRST: Final = 8.0
"""How far the tail moves for a batch beyond it, in standard deviations of a sample; at first, half of one."""

ELASTICITY_MIN: Final = 0.12
"""Where a batch that is smaller by some share is shorter by less than this part of that share, the call itself takes nearly
all of the time: meeting the target there would cost more than eight times the throughput."""

VAIN_REFITS: Final = 8
HOLD_REFITS: Final = 256
"""After so many fits in a row that ask for less where less does not help, the target is given up, for so many x 2^k."""

RELAXED: Final = math.log(1.5)
"""A target that is given up becomes so much, in ln(seconds), more than the time at which it was."""

CLIMB_MAX: Final = 0.2
DESCENT_MAX: Final = 0.35
"""How far one fit moves the latency ceiling, in ln(count)."""


class FailureCeiling:
    """The largest ln(count) that may be tried, from the counts that failed. Infinite until one does."""

    STATE: Final = struct.Struct("<ddIIB")

    def __init__(self, step: float) -> None:
        self.at = math.inf
        self._step = step
        self._failed = math.inf
        self._delivered = 0.0
        self._held = 0
        self._doublings = 0
        self._probing = False

    def __repr__(self) -> str:
        return f"<FailureCeiling {self._delivered:g} delivered, {self._failed:g} failed>"

    def failed(self, count: int, *, definite: bool) -> None:
        """A batch failed for its size.

        Where the size is `definite`ly the reason, the truth lies anywhere above what was delivered. A timeout may be
        chance, and so may be a limit in bytes that a smaller batch exceeds: they cost one step.
        """
        if self._probing:
            self._doublings = min(self._doublings + 1, HOLD_DOUBLINGS_MAX)
            self._probing = False
        self._failed = float(count)
        self._held = HOLD_BATCHES << self._doublings
        if not definite or count <= self._delivered:
            self._delivered = min(self._delivered, count * math.exp(-self._step))
            self.at = max(math.log(count) - self._step, 0.0)
        elif self._delivered:
            self._halve()
        else:
            self.at = max(math.log(count) - OCTAVE_LN, 0.0)

    def delivered(self, count: int) -> None:
        """A batch was delivered. At the ceiling, that moves the ceiling half of the way to what failed."""
        self._delivered = max(self._delivered, count)
        if self._failed == math.inf:
            return
        self._held -= 1
        if count >= self._failed:
            self._doublings = 0
            self._probing = False
            self._failed = 2.0 * count
            self._held = HOLD_BATCHES
            self._halve()
        elif count + 1 > math.exp(self.at) and not self._probing:
            self._halve()
        if self._held <= 0 and not self._probing:
            self._probing = True
            self.at = math.log(self._failed)

    def snapshot(self) -> bytes:
        """What failed and what did not."""
        failed = 0.0 if self._failed == math.inf else self._failed
        held = max(self._held, 0)
        return self.STATE.pack(failed, self._delivered, held, self._doublings, self._probing)

    def restore(self, data: bytes) -> bool:
        """Take up a snapshot. False, and nothing changed, if it is none."""
        failed, delivered, held, doublings, probing = self.STATE.unpack(data)
        if not (
            (failed == 0 or 1 <= failed <= 2 * BATCH_COUNT_MAX)
            and 0 <= delivered <= BATCH_COUNT_MAX
            and (failed == 0 or delivered < failed)
            and held <= HOLD_BATCHES << HOLD_DOUBLINGS_MAX
            and doublings <= HOLD_DOUBLINGS_MAX
            and probing <= (failed > 0)
        ):
            return False
        self._failed, self._delivered = failed or math.inf, delivered
        self._held, self._doublings, self._probing = held, doublings, bool(probing)
        if not failed:
            self.at = math.inf
        elif probing:
            self.at = math.log(failed)
        elif delivered >= 1:
            self._halve()
        else:
            self.at = max(math.log(failed) - OCTAVE_LN, 0.0)
        return True

    def _halve(self) -> None:
        count = self._delivered
        if self._failed > count * (1 + FINE) + 1:
            count = max(math.sqrt(count * self._failed), count + 1)
        self.at = math.log(count)


class LatencyCeiling:
    """The largest ln(count) at which few enough batches take longer than the target."""

    def __init__(self, target_s: float, quantile: float) -> None:
        self.at = math.inf
        self.tail = TAIL_START
        self.unreachable = False
        self._target = math.log(target_s)
        self._share = (1 - quantile) * TAIL_SHARE
        self._samples = 0
        self._floor = 0.0
        self._vain = 0
        self._held = 0
        self._doublings = 0

    def __repr__(self) -> str:
        return f"<LatencyCeiling at e^{self.at:.2f}, tail {self.tail:.2f}, unreachable {self.unreachable}>"

    def is_late(self, seconds: float) -> bool:
        """Whether a batch exceeded the target."""
        return math.log(seconds) > self._target

    def observed(self, error: float, deviation: float) -> None:
        """A batch took e^`error` times what was predicted: the tail moves to where a set share lies beyond it.

        `deviation` is that of a sample. Source of the step: H. Robbins, S. Monro, "A Stochastic Approximation Method",
        1951.
        """
        self._samples += 1
        step = deviation * max(TAIL_STEP, TAIL_STEPS_FIRST / (self._samples + 2 * TAIL_STEPS_FIRST))
        self.tail += step * ((error > self.tail) - self._share)

    def move(self, parabola: Parabola, level: float, least: float, most: float) -> None:
        """Follow a fit. `level` is the ln of the cost at its centre, `least` and `most` the ln(count) that were tried."""
        where = max(min(self.at, most + OCTAVE_LN), least)
        seconds = level + parabola.rise(where) + where
        goal = self._target - self.tail
        if self.unreachable:
            self._held -= 1
            self.unreachable = goal < seconds and self._held > 0
        else:
            elasticity = 1 + parabola.slope_at(where) + 2 * parabola.slope_sd
            vain = goal < seconds and (elasticity < ELASTICITY_MIN or where <= least)
            self._vain = self._vain + 1 if vain else 0
            if self._vain >= VAIN_REFITS:
                self._give_up(seconds)
        if self.unreachable:
            goal = self._floor + RELAXED
        self.at = where + min(max(goal - seconds, -DESCENT_MAX), CLIMB_MAX)

    def _give_up(self, seconds: float) -> None:
        self.unreachable = True
        self._vain = 0
        self._floor = seconds
        self._held = HOLD_REFITS << self._doublings
        self._doublings = min(self._doublings + 1, HOLD_DOUBLINGS_MAX)
