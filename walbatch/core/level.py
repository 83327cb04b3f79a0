"""What makes all batch sizes slower or faster at the same time, and the moment when that is not enough of an explanation.

Not here: the sizes (`evidence`, `parabola`), and what follows from a change (`surface`).

The idea needed to read it: errors that resemble the ones before them say that the level lags, and let it follow faster;
errors that do not are noise, and make it slower.
"""

from __future__ import annotations

import math
from typing import Final

RATE_START: Final = 0.02
RATE_MIN: Final = 1 / 256
RATE_MAX: Final = 0.5
RATE_STEP: Final = 0.05
RATE_PUSH: Final = 4.0
"""How fast the level follows, and by how much one pair of errors may change that."""

CUSUM_DRIFT: Final = 0.5
CUSUM_MAX: Final = 16.0
CUSUM_ERROR_MAX: Final = 2.0
TILT_MAX: Final = 10.0
"""Two-sided tests for a change (E. S. Page, "Continuous inspection schemes", 1954), on standardised errors: of all batches,
and of those beside the lead, where errors of opposite sign on either side say that the slope has turned."""


class Level:
    """Seconds for each operation at the centre of the fit, as they are now."""

    __slots__ = ("_down", "_error", "_left", "_right", "_up", "now", "rate")

    def __init__(self) -> None:
        self.now = 1.0
        self.rate = RATE_START
        self._error = 0.0
        self._up = self._down = self._left = self._right = 0.0

    def __repr__(self) -> str:
        return f"<Level {self.now:.3g}, rate {self.rate:.3g}>"

    def follow(self, error: float, standardised: float, *, side: int, age: int) -> bool:
        """Take in a relative error, also in standard deviations. Whether errors say that the curve is another one.

        `side` is where the batch was: -1 below the lead, 1 above, 0 at it. `age` counts samples since the last change.
        """
        alike = min(max(standardised * self._error, -RATE_PUSH), RATE_PUSH)
        self.rate = min(max(self.rate * (1 + RATE_STEP * alike), RATE_MIN), RATE_MAX)
        self._error = standardised
        self.now *= 1 + error * max(self.rate, 1 / (age + 4))
        step = min(max(standardised, -CUSUM_ERROR_MAX), CUSUM_ERROR_MAX)
        self._up = max(0.0, self._up + step - CUSUM_DRIFT)
        self._down = max(0.0, self._down - step - CUSUM_DRIFT)
        if side:
            self._right = max(0.0, self._right + step * side - CUSUM_DRIFT)
            self._left = max(0.0, self._left - step * side - CUSUM_DRIFT)
        changed = max(self._up, self._down) > CUSUM_MAX or max(self._left, self._right) > TILT_MAX
        if changed:
            self.forget()
        return changed

    def forget(self) -> None:
        """Begin the tests anew."""
        self._up = self._down = self._left = self._right = 0.0

    def restore(self, rate: float) -> None:
        """Go on at a rate."""
        self.rate = rate
        self._error = 0.0
        self.forget()

    def move(self, rise: float) -> None:
        """The centre of the fit was moved to where the ln of the cost is so much higher."""
        self.now *= math.exp(rise)
