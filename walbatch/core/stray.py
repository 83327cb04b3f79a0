"""How far from the lead a controller strays, how often, and how far the fit therefore reaches.

Not here: where the lead goes (`surface`), and sizes far from it (`scout`).

The idea needed to read it: trying other sizes costs, and so does not knowing better. docs/batching.md derives the spread at
which both cost the same; it follows from the noise, the curve, and the evidence, and nothing else.
"""

from __future__ import annotations

import math
from typing import Final

from walbatch.core.evidence import STEP
from walbatch.core.parabola import CURVE_MIN, Parabola

DOUBT: Final = 0.5
CURVE_DOUBT: Final = 0.25
STEPS_MAX: Final = 8
CHANCE_MIN: Final = 0.03
CHANCE_MAX: Final = 0.5
CHANCE_BOUND: Final = 0.06
CHANCE_UNSURE: Final = 0.2
"""At a ceiling straying is only downwards and costs as much as the slope says: less of it, above all when sure."""

REACH_MIN: Final = 0.6
REACH_BOUND: Final = 1.4
REACH_MAX: Final = 2.0
REACH_STRAYS: Final = 6.0
REACH_RATE: Final = 0.25
"""How far a fit reaches, in ln(count): so many times as far as the controller strays. At a ceiling, further. It follows with this
rate: a narrow fit that is unsure asks to stray far, a wide one that is sure asks not to, and the two would take turns."""


class Stray:
    """Sizes `by` above and below the lead, in ln(count), are tried with a `chance`."""

    __slots__ = ("by", "chance", "reach")

    def __init__(self) -> None:
        self.by = STEP
        self.chance = 0.0
        self.reach = REACH_MIN

    def __repr__(self) -> str:
        return f"<Stray by {self.by:.2f}, chance {self.chance:.2f}, reach {self.reach:.2f}>"

    def follow_reach(self, *, bound: bool) -> float:
        """How far the next fit should reach. `bound`: the lead is at a ceiling."""
        wanted = min(max(REACH_STRAYS * self.by, REACH_BOUND if bound else REACH_MIN), REACH_MAX)
        self.reach += (wanted - self.reach) * REACH_RATE
        return self.reach

    def follow(self, parabola: Parabola, variance: float, doubt: float, *, bound: bool) -> None:
        """Take the spread from a fit. `doubt` is the variance of its lowest point, in ln(count)."""
        sharp = 2 * max(parabola.curve - CURVE_DOUBT * parabola.curve_sd, CURVE_MIN)
        spread = max(math.sqrt(variance / parabola.weight) / sharp, DOUBT * doubt)
        if bound:
            sure = parabola.slope + parabola.slope_sd < 0
            steps, most = (1, CHANCE_BOUND) if sure else (2, CHANCE_UNSURE)
        else:
            steps, most = round(math.sqrt(2 * spread) / STEP), CHANCE_MAX
        self.by = STEP * min(max(steps, 1), STEPS_MAX)
        self.chance = min(max(spread / self.by**2, CHANCE_MIN), most)
