"""Batches far from the size in use, to see whether it is better there: where, how often, and what they may cost.

Not here: the sizes beside the lead, which the fit needs (`surface` strays to them).

The idea needed to read it: a parabola knows its own valley only. A purse saves a small share of the time that batches
take; a scout goes where the purse pays for what it should cost, and is sent there again while it gives hope.
"""

from __future__ import annotations

import math
from typing import Final

from walbatch.core.controller import Chance
from walbatch.core.evidence import OCTAVE, STEP, Evidence
from walbatch.core.parabola import Parabola

CHANCE: Final = 1 / 48
CHANCE_HOPE: Final = 1 / 6
OCTAVES_MAX: Final = 3
NEAR: Final = 6 * STEP
"""What is nearer to the lead is no scout."""

MARGIN: Final = 0.04
WEIGHT_MIN: Final = 1.5
"""A place must be better by so much and by its own error, after so many samples."""

KNOWN_MIN: Final = 0.02
"""A place is expected to cost what it did before, as long as so much of a sample is left."""

PURSE_SHARE: Final = 0.004
PURSE_BATCHES_MAX: Final = 8.0
"""Scouting may cost this share of the time; it saves up to so many batches' worth."""

_HALF: Final = 0.5


class Scouts:
    """The purse, and the place that may be better."""

    __slots__ = ("_hope", "_purse_s")

    def __init__(self) -> None:
        self._hope: int | None = None
        self._purse_s = 0.0

    def __repr__(self) -> str:
        return f"<Scouts with {self._purse_s:.3g} s, hope {self._hope}>"

    @property
    def chance(self) -> float:
        """The share of batches that may be scouts."""
        return CHANCE if self._hope is None else CHANCE_HOPE

    def save(self, seconds: float) -> None:
        """A batch took so long: a share of it goes into the purse."""
        self._purse_s = min(self._purse_s + PURSE_SHARE * seconds, PURSE_BATCHES_MAX * seconds)

    def pay(self, seconds: float) -> None:
        """A scout took so much longer than the lead would have."""
        self._purse_s -= max(seconds, 0.0)

    def place(
        self,
        evidence: Evidence,
        parabola: Parabola,
        *,
        lead: float,
        highest: float,
        level: float,
        chance: Chance,
    ) -> float | None:
        """A ln(count) some octaves from the `lead`, if what it should cost is in the purse."""
        index = self._hope
        if index is None:
            octaves = 1 + int(chance() * OCTAVES_MAX)
            if chance() < _HALF:
                octaves = -octaves
            index = round(evidence.index(math.exp(lead)) / OCTAVE + octaves) * OCTAVE
        if not 0 <= index < len(evidence.logs):
            return None
        at = evidence.logs[index]
        if abs(at - lead) < NEAR or at > highest:
            self._hope = None
            return None
        known = evidence.weight(index) > KNOWN_MIN
        rise = evidence.cost(index) - parabola.level if known else parabola.rise(at)
        price_s = (math.exp(rise) - 1) * level * math.exp(at)
        return at if price_s <= self._purse_s else None

    def gain(self, index: int, evidence: Evidence, parabola: Parabola, variance: float) -> float | None:
        """By how much ln cost is lower at a place, if that is certain enough. If it may be, scouts go there again soon."""
        gain = parabola.level - evidence.cost(index)
        weight = evidence.weight(index)
        doubt = math.sqrt(variance / (weight + 0.5))
        self._hope = None
        if weight > WEIGHT_MIN and gain - doubt > MARGIN:
            return gain
        if gain + doubt > MARGIN:
            self._hope = index
        return None
