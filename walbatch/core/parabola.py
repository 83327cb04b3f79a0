"""The curve near the size in use: a weighted parabola through what the sizes cost, and how far to trust it.

Pure arithmetic on what `evidence` collected. u is the distance from the lead in ln(count), y the ln of the cost.

The idea needed to read it: this is Bayesian regression in three numbers. What is known before the first batch keeps
few noisy samples from making a wild curve, and is soon outvoted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

SLOPE_MEAN: Final = -0.3
SLOPE_SD: Final = 0.5
"""The slope before anything is known. It lies between -1 (the call costs all, the operations nothing) and what a knee
makes of it."""

SLOPE_MIN: Final = -0.99
SLOPE_MAX: Final = 20.0
"""No batch gets shorter by holding more; and no curve is so steep that its exponential would overflow."""

CURVE_MEAN: Final = 0.25
CURVE_SD: Final = 1.0
"""The same for the coefficient of u^2."""

CURVE_MIN: Final = 0.02
CURVE_MAX: Final = 50.0
"""Flatter curves, and hills, are taken for so much of a valley: then a step goes far down the slope, but not to infinity."""

EXTENT: Final = 1.5
"""Beyond this distance the parabola goes on as a straight line."""

RISE_MAX: Final = 50.0
"""So far, in ln(cost), a prediction may lie above the lead."""


@dataclass(frozen=True, slots=True)
class Parabola:
    """ln cost = level + slope u + curve u^2, with u from ln count = `at`.

    `weight` is how many samples it rests on; the deviations say how far slope and curve can be trusted; of sizes
    further from the centre than `reach` it knows nothing.
    """

    at: float
    level: float
    slope: float
    curve: float
    weight: float
    slope_sd: float
    curve_sd: float
    reach: float

    def rise(self, at: float) -> float:
        """How much higher the ln of the cost is at ln count = `at` than at the centre."""
        u = at - self.at
        if u > EXTENT:
            return min(self.slope * u + self.curve * EXTENT * (2 * u - EXTENT), RISE_MAX)
        if u < -EXTENT:
            return min(self.slope * u - self.curve * EXTENT * (2 * u + EXTENT), RISE_MAX)
        return (self.slope + self.curve * u) * u

    def lowest(self, lean: float) -> tuple[float, float]:
        """How far the lowest point is, and the variance of that. Growing must gain more than `lean` for each e-fold."""
        sharp = 2 * self.curve
        return -(self.slope + lean) / sharp, (self.slope_sd / sharp) ** 2

    def slope_at(self, at: float) -> float:
        """Its slope there."""
        return self.slope + 2 * self.curve * min(max(at - self.at, -EXTENT), EXTENT)


def fit(
    at: float,
    logs: Sequence[float],
    costs: Sequence[float],
    weights: Sequence[float],
    *,
    variance: float,
    reach: float,
) -> Parabola:
    """The parabola around ln count = `at`, from parallel sequences of sizes (at least one with a weight).

    `variance` is that of one sample's relative error. The logarithm of a mean of few samples is too low, which is made up
    for. Sizes further away than `reach` do not count (a biweight kernel); where none is nearer, it is doubled.
    """
    sw = s1 = s2 = s3 = s4 = sy = sy1 = sy2 = 0.0
    half = variance / 2
    for place, y, samples in zip(logs, costs, weights, strict=True):
        if not samples:
            continue
        u = place - at
        near = 1 - u * u / (reach * reach)
        if near <= 0:
            continue
        w = samples * near * near
        wu = w * u
        wuu = wu * u
        wy = w * (y + half / (samples + 0.5))
        sw += w
        s1 += wu
        s2 += wuu
        s3 += wuu * u
        s4 += wuu * u * u
        sy += wy
        sy1 += wy * u
        sy2 += wy * u * u
    if sw <= 0:
        return fit(at, logs, costs, weights, variance=variance, reach=2 * reach)
    mean1, mean2, mean_y = s1 / sw, s2 / sw, sy / sw
    slope_ridge = variance / SLOPE_SD**2
    curve_ridge = variance / CURVE_SD**2
    a11 = s2 - s1 * mean1 + slope_ridge
    a12 = s3 - s1 * mean2
    a22 = s4 - s2 * mean2 + curve_ridge
    b1 = sy1 - s1 * mean_y + slope_ridge * SLOPE_MEAN
    b2 = sy2 - s2 * mean_y + curve_ridge * CURVE_MEAN
    determinant = a11 * a22 - a12 * a12
    slope = (b1 * a22 - b2 * a12) / determinant
    curve = (b2 * a11 - b1 * a12) / determinant
    if curve < CURVE_MIN:
        curve = CURVE_MIN
        slope = (b1 - a12 * curve) / a11
    if slope < SLOPE_MIN:
        slope = SLOPE_MIN
        curve = max((b2 - a12 * slope) / a22, CURVE_MIN)
    slope, curve = min(slope, SLOPE_MAX), min(curve, CURVE_MAX)
    return Parabola(
        at=at,
        level=mean_y - slope * mean1 - curve * mean2,
        slope=slope,
        curve=curve,
        weight=sw,
        slope_sd=math.sqrt(variance * a22 / determinant),
        curve_sd=math.sqrt(variance * a11 / determinant),
        reach=reach,
    )
