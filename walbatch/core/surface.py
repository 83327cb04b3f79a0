"""The size controller that learns: it finds the batch size at which an operation costs least, and stays there.

Not here: what it is compared with (`controller`), the beginning (`slow_start`), the sums it learns from (`evidence`), the
arithmetic of the fit (`parabola`), the sizes that are tried beside the lead (`stray`) and far from it (`scout`), and the ceilings
from failures and from a latency target (`ceiling`). docs/batching.md tells why it is made this way, and how well it does.

The idea needed to read it: the logarithm of the cost of an operation is a smooth curve over the logarithm of the batch size.
Near the size in use (the lead) a parabola describes it. The controller strays from the lead by just as much as it needs
to see the parabola through the noise, and moves the lead to its lowest point. Sizes are compared with one another, not
with yesterday: a level, which follows the durations, is taken out of each sample first.
"""

from __future__ import annotations

import math
from typing import Final, assert_never

from walbatch.core.ceiling import OCTAVE_LN, TAIL_START, FailureCeiling, LatencyCeiling
from walbatch.core.controller import (
    START_COUNT,
    BatchResult,
    Chance,
    ControllerState,
    Observation,
    SizeBounds,
    Target,
)
from walbatch.core.evidence import STEP, Evidence, grid
from walbatch.core.learnt import TAIL_MAX, VARIANCE_MIN, WEIGHT_MIN, Learnt, decode, encode
from walbatch.core.level import Level
from walbatch.core.parabola import CURVE_MEAN, Parabola, fit
from walbatch.core.scout import NEAR, Scouts
from walbatch.core.slow_start import Next, SlowStart
from walbatch.core.stray import Stray
from walbatch.limits import BATCH_COUNT_MAX

SECONDS_MIN: Final = 1e-9
SECONDS_MAX: Final = 1e6
"""Durations beyond these are taken for these: a clock may jump."""

MEMORY: Final = 1024
MEMORY_MIN: Final = 64
MEMORY_SHARE: Final = 0.75
"""Samples after which evidence has faded to 1/e: a share of all so far, so that what was learnt first, when everything was
uncertain, does not last."""

CLIP: Final = 3.0
"""A duration beyond so many times the expected one counts as that; the rest is kept apart (see `evidence`)."""

VARIANCE_START: Final = 0.1
VARIANCE_RATE: Final = 1 / 64

DRIFT_FADE: Final = 20.0

COLLAPSE_BATCHES: Final = 3
COLLAPSE_STEP: Final = 4 * OCTAVE_LN
"""So many clipped batches in a row are a collapse: a new slow start, a sixteenth of the size. It costs little: small batches
are short."""

REFIT_EVERY: Final = 6
FIT_WEIGHT_MIN: Final = 0.5
"""Where fewer samples are within its reach, a fit reaches further."""

KNOWN_MIN: Final = 0.5
"""A size that the fit does not reach has a cost of its own from so many samples on."""

KNOWN_SLIGHTLY: Final = 0.01
"""Nothing beyond twice the largest size of which so much is left is tried."""

LEAN: Final = 0.01
"""Growing must gain more than this for each e-fold of size: small batches are worth something."""

GAIN: Final = 0.8
MOVE_MAX: Final = 4 * STEP

_EPSILON: Final = 1e-6


class ResponseSurface:
    """Finds the size with the least cost, within a latency target if there is one.

    `start` is the size of the first batches, `latency_quantile` the share of batches that should keep the target.
    """

    def __init__(
        self,
        *,
        count_min: int = 1,
        count_max: int = BATCH_COUNT_MAX,
        multiple_of: int = 1,
        start: int = START_COUNT,
        latency_target_s: float | None = None,
        latency_quantile: float = 0.95,
        seed: int = 0,
    ) -> None:
        self._bounds = SizeBounds(count_min=count_min, count_max=count_max, multiple_of=multiple_of)
        self._chance = Chance(seed)
        self._evidence = Evidence(grid(self._bounds))
        self._failure = FailureCeiling(STEP)
        self._latency = (
            None if latency_target_s is None else LatencyCeiling(latency_target_s, latency_quantile)
        )
        self._limit_at = math.log(self._bounds.largest)
        self._at = math.log(self._bounds.clamp(start))
        self._stray = Stray()
        self._frontier = math.inf
        self._parabola = Parabola(self._at, 0.0, 0.0, CURVE_MEAN, 0.0, 1.0, 1.0, self._stray.reach)
        # Seconds for each operation at the parabola's centre: as they are now, and in the evidence's unit of account.
        self._level = Level()
        self._unit = 1.0
        self._variance = VARIANCE_START
        self._scouts = Scouts()
        self._samples = self._age = self._drifts = 0
        self._starting = True
        self._clipped = 0
        self._slow_start = SlowStart()

    def __repr__(self) -> str:
        state = self.describe()
        return f"<ResponseSurface lead {state.lead_count}, {state.samples} samples, {state.drifts} drifts>"

    # --- the interface -------------------------------------------------------------------------------------

    def target(self) -> Target:
        """The lead, or a size beside it, or one far from it."""
        highest = self._highest()
        at, reason = self._at, "lead"
        if self._starting:
            reason = "slow start"
        else:
            draw = self._chance()
            if draw < self._stray.chance:
                at += self._stray.by if draw < self._stray.chance / 2 else -self._stray.by
                at = min(at, self._frontier)
                reason = "explore"
            elif draw > 1 - self._scouts.chance:
                scout = self._scouts.place(
                    self._evidence, self._parabola,
                    lead=self._at, highest=min(highest, self._frontier), level=self._level.now, chance=self._chance,
                )  # fmt: skip
                if scout is not None:
                    at, reason = scout, "scout"
        if at >= highest:
            return Target(count=self._bounds.clamp(math.exp(highest) + _EPSILON), reason="capped")
        count = self._bounds.clamp(math.exp(at) + 0.5)
        if reason == "explore":
            count = self._bounds.beside(count, self._bounds.clamp(math.exp(self._at) + 0.5), up=at > self._at)
        return Target(count=count, reason=reason)

    def observe(self, observation: Observation) -> None:
        """Learn what a size costs. Batches that are not learnable, throttled or unavailable say nothing about it."""
        count, result, seconds = observation.count, observation.result, observation.seconds
        if (
            not observation.learnable
            or result is BatchResult.THROTTLED
            or result is BatchResult.UNAVAILABLE
            or count < 1
            or not seconds >= 0
        ):
            return
        seconds = min(max(seconds, SECONDS_MIN), SECONDS_MAX)
        count = min(count, BATCH_COUNT_MAX)
        index = self._evidence.index(count)
        self._samples += 1
        if result is not BatchResult.DELIVERED:
            self._fail(index, count, seconds, result)
            return
        self._failure.delivered(count)
        if self._starting:
            self._start(index, count, seconds)
        else:
            self._learn(index, count, seconds)

    def limit(self, count_max: int) -> None:
        """Move the ceiling."""
        self._bounds = self._bounds.limited(count_max)
        self._limit_at = math.log(self._bounds.largest)
        self._at = min(self._at, self._highest())

    def predict_s(self, count: int) -> float | None:
        """How long a batch of `count` should take. None during the slow start."""
        if self._starting or count < 1:
            return None
        index = self._evidence.index(count)
        rise = self._rise(index, near=self._is_near(self._evidence.logs[index]))
        return self._level.now * math.exp(rise) * count

    def describe(self) -> ControllerState:
        """The lead, and what the fit says of it."""
        lead = self._bounds.clamp(math.exp(self._at) + 0.5)
        seconds = self.predict_s(lead)
        latency = self._latency
        return ControllerState(
            name="surface",
            lead_count=lead,
            cap_count=self._bounds.clamp(math.exp(self._highest()) + _EPSILON),
            cost_s=None if seconds is None else seconds / lead,
            latency_s=None if seconds is None or latency is None else seconds * math.exp(latency.tail),
            latency_unreachable=latency is not None and latency.unreachable,
            samples=self._samples,
            drifts=self._drifts,
        )

    # --- learning ------------------------------------------------------------------------------------------

    def _start(self, index: int, count: int, seconds: float) -> None:
        self._remember(index, count, seconds, 0.0)
        late = self._latency is not None and self._latency.is_late(seconds)
        match self._slow_start.delivered(seconds / count, late=late, highest=self._at >= self._highest()):
            case Next.THE_SAME:
                pass
            case Next.TWICE_AS_MUCH:
                self._at = min(self._at + OCTAVE_LN, self._highest())
            case Next.THE_BEST:
                self._go()
            case _ as never:
                assert_never(never)

    def _go(self) -> None:
        """End the slow start at the best size so far."""
        evidence = self._evidence
        tried = evidence.tried(WEIGHT_MIN)
        self._starting = False
        self._at = evidence.logs[min(tried, key=evidence.cost)]
        if self._latency is not None:
            self._latency.at = min(self._latency.at, evidence.logs[tried[-1]])
        self._refit(jumped=True)
        self._level.now = self._unit

    def _fail(self, index: int, count: int, seconds: float, result: BatchResult) -> None:
        """Charge a size with the time that it lost, and keep away from it where it is the reason."""
        self._evidence.lose(index, seconds * self._unit / self._level.now)
        if result is not BatchResult.FAILED:
            self._failure.failed(count, definite=result is BatchResult.TOO_LARGE)
        if self._starting and self._evidence.tried(WEIGHT_MIN):
            self._go()
        self._at = min(self._at, self._highest())

    def _learn(self, index: int, count: int, seconds: float) -> None:
        """Compare a batch with what the fit says of its size; where the fit does not reach, with others of that size."""
        evidence, level = self._evidence, self._level
        at = evidence.logs[index]
        near = self._is_near(at)
        known = near or evidence.weight(index) > KNOWN_MIN
        expected = math.exp(self._rise(index, near=near)) * count
        ratio = seconds / (level.now * expected)
        clipped = min(ratio, CLIP) if known else ratio
        self._remember(
            index, count, clipped * expected * self._unit, (ratio - clipped) * expected * self._unit
        )
        self._scouts.save(seconds)
        far = abs(at - self._at) > NEAR
        if far:
            self._scouts.pay(seconds - level.now * count)
        if near and self._follow(clipped - 1, ratio, at - self._parabola.at):
            return
        if far:
            self._follow_scout(index)
        if not self._samples % REFIT_EVERY:
            self._refit()

    def _is_near(self, at: float) -> bool:
        """Whether the fit knows something about ln count = `at`."""
        return abs(at - self._parabola.at) <= max(self._parabola.reach, self._stray.by)

    def _rise(self, index: int, *, near: bool) -> float:
        """How much higher the ln of the cost of a size is than at the fit's centre: by the fit, or by batches of that size."""
        if near or self._evidence.weight(index) <= KNOWN_MIN:
            return self._parabola.rise(self._evidence.logs[index])
        return self._evidence.clipped_cost(index) - math.log(self._unit)

    def _follow(self, error: float, ratio: float, aside: float) -> bool:
        """Learn from the error of a prediction: noise, tail and level. Whether it was one too many, and all starts over."""
        deviation = math.sqrt(self._variance)
        if self._latency is not None:
            self._latency.observed(math.log(ratio), deviation)
        self._variance += (max(error * error, VARIANCE_MIN) - self._variance) * VARIANCE_RATE
        side = 0 if abs(aside) < STEP / 2 else 1 if aside > 0 else -1
        if self._level.follow(error, error / deviation, side=side, age=self._age):
            self._drifts += 1
            self._age = 0
            self._evidence.fade(DRIFT_FADE)
        self._clipped = self._clipped + 1 if ratio > CLIP else 0
        if self._clipped < COLLAPSE_BATCHES:
            return False
        self._start_over()
        return True

    def _start_over(self) -> None:
        """The backend has collapsed at this size: find out from well below what it can do now."""
        self._drifts += 1
        self._age = 0
        self._evidence = Evidence(self._evidence.sizes)
        self._level.forget()
        self._at = max(self._at - COLLAPSE_STEP, self._evidence.logs[0])
        self._level.now = self._unit = 1.0
        self._starting = True
        self._slow_start = SlowStart()
        self._clipped = 0

    def _remember(self, index: int, count: int, seconds: float, excess: float) -> None:
        self._age += 1
        self._evidence.fade(1 + 1 / min(max(self._age * MEMORY_SHARE, MEMORY_MIN), MEMORY))
        self._evidence.add(index, count, seconds, excess)

    def _refit(self, *, jumped: bool = False) -> None:
        """Fit the parabola around the lead, and move the lead to its lowest point as far as that can be trusted."""
        evidence, at = self._evidence, self._at
        reach = self._stray.follow_reach(bound=at >= self._highest())
        # The lead may be far from what is known: by a new limit, or because bytes cut all batches shorter than it.
        near, reach = evidence.around(at, reach, FIT_WEIGHT_MIN)
        rise = self._parabola.rise(at) if self._is_near(at) else None
        before = self._unit
        parabola = fit(at, near.logs, near.costs, near.weights, variance=self._variance, reach=reach)
        self._parabola = parabola
        # Without the excesses: they are not in the samples that this unit is used for, and would inflate it again and again.
        self._unit = math.exp(parabola.level - near.beyond)
        if not jumped:
            self._level.now *= self._unit / before if rise is None else math.exp(rise)
        move, doubt = parabola.lowest(LEAN)
        move *= GAIN * move * move / (move * move + doubt)
        most = evidence.logs[evidence.largest(KNOWN_SLIGHTLY)]
        self._frontier = most + OCTAVE_LN
        if self._latency is not None:
            self._latency.move(parabola, math.log(self._level.now), evidence.logs[0], most)
        highest = self._highest()
        self._at = min(max(at + min(max(move, -MOVE_MAX), MOVE_MAX), evidence.logs[0]), highest)
        self._stray.follow(parabola, self._variance, doubt, bound=self._at >= highest)

    def _follow_scout(self, index: int) -> None:
        """Go where a scout found a better place, if it did."""
        gain = self._scouts.gain(index, self._evidence, self._parabola, self._variance)
        if gain is not None:
            self._at = min(self._evidence.logs[index], self._highest())
            self._level.move(-gain)
            self._refit(jumped=True)

    def _highest(self) -> float:
        highest = min(self._limit_at, self._failure.at)
        if self._latency is not None:
            highest = min(highest, self._latency.at)
        return max(highest, self._evidence.logs[0])

    # --- the snapshot --------------------------------------------------------------------------------------

    def snapshot(self) -> bytes:
        """What each size costs now, and the ceilings."""
        now = self._level.now / self._unit
        tail = TAIL_START if self._latency is None else self._latency.tail
        return encode(
            Learnt(
                starting=self._starting,
                samples=self._samples,
                drifts=self._drifts,
                age=self._age,
                chance=self._chance.state,
                at=self._at,
                variance=self._variance,
                level_rate=self._level.rate,
                events=self._evidence.events,
                tail=min(max(tail, -TAIL_MAX), TAIL_MAX),
                failure=self._failure.snapshot(),
                cells=[
                    (size, weight, cost * now, excess * now)
                    for size, weight, cost, excess in self._evidence.cells(WEIGHT_MIN)
                ],
            )
        )

    def restore(self, data: bytes) -> bool:
        """Take up a snapshot, of any bounds. The evidence counts half: the backend may have changed meanwhile."""
        learnt = decode(data)
        failure = FailureCeiling(STEP)
        if learnt is None or not failure.restore(learnt.failure):
            return False
        self._failure = failure
        self._evidence = Evidence(self._evidence.sizes)
        for size, weight, cost, excess in learnt.cells:
            self._evidence.put(size, weight / 2, cost, excess)
        self._evidence.put_events(learnt.events / 2)
        self._chance.state = learnt.chance
        self._samples, self._drifts, self._age = learnt.samples, learnt.drifts, learnt.age
        self._variance = learnt.variance
        self._level.restore(learnt.level_rate)
        self._level.now = self._unit = 1.0
        self._clipped = 0
        self._scouts = Scouts()
        self._slow_start = SlowStart()
        self._starting = learnt.starting
        if self._latency is not None:
            self._latency.tail = learnt.tail
            self._latency.at = learnt.at
        self._at = min(max(learnt.at, self._evidence.logs[0]), self._highest())
        if not self._starting:
            self._refit(jumped=True)
            self._level.now = self._unit
        return True
