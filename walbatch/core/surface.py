"""The size controller that learns: it finds the batch size at which an operation costs least, and stays there.

Not here: what it is compared with (`controller`), the sums it learns from (`evidence`), the arithmetic of the fit
(`parabola`), and the ceilings from failures and from a latency target (`ceiling`). docs/batching.md tells why it is made this way,
and how well it does.

The idea needed to read it: the logarithm of the cost of an operation is a smooth curve over the logarithm of the batch size.
Near the size in use (the lead) a parabola describes it. The controller strays from the lead by just as much as it needs
to see the parabola through the noise, and moves the lead to its lowest point. Sizes are compared with one another, not
with yesterday: a level, which follows the durations, is taken out of each sample first.
"""

from __future__ import annotations

import math
from typing import Final

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
from walbatch.core.evidence import Evidence
from walbatch.core.learnt import TAIL_MAX, VARIANCE_MIN, WEIGHT_MIN, Learnt, decode, encode
from walbatch.core.level import Level
from walbatch.core.parabola import CURVE_MEAN, CURVE_MIN, Parabola, fit
from walbatch.limits import BATCH_COUNT_MAX

OCTAVE: Final = 8
STEP: Final = OCTAVE_LN / OCTAVE
"""Between neighbouring sizes of the grid, in ln(count). The lead itself moves freely."""

SECONDS_MIN: Final = 1e-9
SECONDS_MAX: Final = 1e6
"""Durations beyond these are taken for these: a clock may jump."""

# --- slow start --------------------------------------------------------------------------------------------

SLOW_BATCHES: Final = 2
SLOW_WORSE: Final = 1.35
SLOW_FAR_WORSE: Final = 3.0
"""A size that costs so much more than the best one ends the slow start: the first only when twice as many batches agree."""

SLOW_GAIN: Final = 0.05
SLOW_BARREN: Final = 4
"""Doublings in a row that gain less than this."""

# --- evidence ----------------------------------------------------------------------------------------------

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
COLLAPSE_FADE: Final = 1e4
COLLAPSE_STEP: Final = 4 * OCTAVE_LN
"""So many clipped batches in a row are a collapse: a new slow start, a sixteenth of the size. It costs little: small batches
are short."""

# --- the lead and what is tried beside it --------------------------------------------------------------------

REFIT_EVERY: Final = 6
REACH_MIN: Final = 0.6
REACH_BOUND: Final = 1.4
REACH_MAX: Final = 2.0
REACH_STRAYS: Final = 6.0
"""How far a fit reaches, in ln(count): so many times as far as the controller strays. At a ceiling, further."""

LEAN: Final = 0.01
"""Growing must gain more than this for each e-fold of size: small batches are worth something."""

GAIN: Final = 0.8
MOVE_MAX: Final = 4 * STEP

DOUBT: Final = 0.5
CURVE_DOUBT: Final = 0.25
STRAY_STEPS_MAX: Final = 8
STRAY_CHANCE_MIN: Final = 0.03
STRAY_CHANCE_MAX: Final = 0.5
STRAY_CHANCE_BOUND: Final = 0.06
STRAY_CHANCE_UNSURE: Final = 0.2
"""At a ceiling straying is only downwards and costs as much as the slope says: less of it, above all when sure."""

SCOUT_CHANCE: Final = 1 / 48
SCOUT_CHANCE_HOPE: Final = 1 / 6
SCOUT_OCTAVES: Final = 3
SCOUT_NEAR: Final = 6 * STEP
SCOUT_MARGIN: Final = 0.04
SCOUTWEIGHT_MIN: Final = 1.5
SCOUT_SHARE: Final = 0.004
SCOUT_PURSE_MAX: Final = 8.0
"""Scouting may cost this share of the time; it saves up to so many batches' worth."""

_EPSILON: Final = 1e-6
_HALF: Final = 0.5


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
        self._evidence = Evidence(_grid(self._bounds))
        self._failure = FailureCeiling(STEP)
        self._latency = (
            None if latency_target_s is None else LatencyCeiling(latency_target_s, latency_quantile)
        )
        self._limit_at = math.log(self._bounds.largest)
        self._at = math.log(self._bounds.clamp(start))
        self._parabola = Parabola(self._at, 0.0, 0.0, CURVE_MEAN, 0.0, 1.0, 1.0)
        # Seconds for each operation at the parabola's centre: as they are now, and in the evidence's unit of account.
        self._level = Level()
        self._unit = 1.0
        self._variance = VARIANCE_START
        self._stray = STEP
        self._stray_chance = 0.0
        self._purse = 0.0
        self._hope: int | None = None
        self._samples = self._age = self._drifts = 0
        self._starting = True
        self._clipped = 0
        self._slow: list[float] = []
        self._slow_best = math.inf
        self._slow_barren = 0

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
            if draw < self._stray_chance:
                at += self._stray if draw < self._stray_chance / 2 else -self._stray
                reason = "explore"
            elif draw > 1 - (SCOUT_CHANCE if self._hope is None else SCOUT_CHANCE_HOPE):
                scout = self._scout(highest)
                if scout is not None:
                    at, reason = scout, "scout"
        if at >= highest:
            return Target(count=self._bounds.clamp(math.exp(highest) + _EPSILON), reason="capped")
        return Target(count=self._bounds.clamp(math.exp(at) + 0.5), reason=reason)

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
        return self._level.now * math.exp(self._parabola.rise(math.log(count))) * count

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
        """Slow start: some batches of a size, then double it, until that does not help any more."""
        self._remember(index, count, seconds, 0.0)
        self._slow.append(seconds / count)
        late = self._latency is not None and self._latency.is_late(seconds)
        if len(self._slow) < SLOW_BATCHES and not late:
            return
        middle = sorted(self._slow)[(len(self._slow) - 1) // 2 : len(self._slow) // 2 + 1]
        cost = sum(middle) / len(middle)
        worse = cost > self._slow_best * SLOW_WORSE
        doubtful = cost < self._slow_best * SLOW_FAR_WORSE and len(self._slow) < 2 * SLOW_BATCHES
        if worse and doubtful and not late:
            return
        self._slow.clear()
        barren = cost > self._slow_best * (1 - SLOW_GAIN)
        self._slow_barren = self._slow_barren + 1 if barren else 0
        self._slow_best = min(self._slow_best, cost)
        if late or worse or self._slow_barren >= SLOW_BARREN or self._at >= self._highest():
            self._go()
        else:
            self._at = min(self._at + OCTAVE_LN, self._highest())

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
        at = self._evidence.logs[index]
        shape = math.exp(self._parabola.rise(at))
        ratio = seconds / (self._level.now * shape * count)
        deviation = math.sqrt(self._variance)
        if self._latency is not None:
            self._latency.observed(math.log(ratio), deviation)
        clipped = min(ratio, CLIP)
        error = clipped - 1
        self._variance += (max(error * error, VARIANCE_MIN) - self._variance) * VARIANCE_RATE
        unit = self._unit * shape * count
        self._remember(index, count, clipped * unit, (ratio - clipped) * unit)
        self._purse = min(self._purse + SCOUT_SHARE * seconds, SCOUT_PURSE_MAX * seconds)
        far = abs(at - self._at) > SCOUT_NEAR
        if far:
            self._purse -= max(seconds - self._level.now * count, 0.0)
        aside = at - self._parabola.at
        side = 0 if abs(aside) < STEP / 2 else 1 if aside > 0 else -1
        if self._level.follow(error, error / deviation, side=side, age=self._age):
            self._drifts += 1
            self._age = 0
            self._evidence.fade(DRIFT_FADE)
        self._clipped = self._clipped + 1 if ratio > CLIP else 0
        if self._clipped == COLLAPSE_BATCHES:
            self._start_over()
            return
        if far:
            self._weigh(index)
        if not self._samples % REFIT_EVERY:
            self._refit()

    def _start_over(self) -> None:
        """The backend has collapsed at this size: find out from well below what it can do now."""
        self._drifts += 1
        self._age = 0
        self._evidence.fade(COLLAPSE_FADE)
        self._level.forget()
        self._at = max(self._at - COLLAPSE_STEP, self._evidence.logs[0])
        self._level.now = self._unit = 1.0
        self._starting = True
        self._slow.clear()
        self._slow_best = math.inf
        self._slow_barren = self._clipped = 0

    def _remember(self, index: int, count: int, seconds: float, excess: float) -> None:
        self._age += 1
        self._evidence.fade(1 + 1 / min(max(self._age * MEMORY_SHARE, MEMORY_MIN), MEMORY))
        self._evidence.add(index, count, seconds, excess)

    def _refit(self, *, jumped: bool = False) -> None:
        """Fit the parabola around the lead, and move the lead to its lowest point as far as that can be trusted."""
        evidence, at = self._evidence, self._at
        bound = at >= self._highest()
        reach = min(max(REACH_STRAYS * self._stray, REACH_BOUND if bound else REACH_MIN), REACH_MAX)
        logs, costs, weights = evidence.near(at - reach, at + reach)
        if not any(weights):
            # The lead was moved away from all that is known, by a new limit or a ceiling.
            logs, costs, weights = evidence.near(-math.inf, math.inf)
        if not jumped:
            self._level.move(self._parabola.rise(at))
        parabola = fit(at, logs, costs, weights, variance=self._variance, reach=reach)
        self._parabola = parabola
        self._unit = math.exp(parabola.level)
        sharp = 2 * parabola.curve
        move = -(parabola.slope + LEAN) / sharp
        doubt = (parabola.slope_sd / sharp) ** 2
        move *= GAIN * move * move / (move * move + doubt)
        if self._latency is not None:
            tried = evidence.tried(0.01)
            most = evidence.logs[tried[-1]] if tried else at
            self._latency.move(parabola, math.log(self._level.now), evidence.logs[0], most)
        highest = self._highest()
        self._at = min(max(at + min(max(move, -MOVE_MAX), MOVE_MAX), evidence.logs[0]), highest)
        self._set_stray(parabola, doubt, bound=self._at >= highest)

    def _set_stray(self, parabola: Parabola, doubt: float, *, bound: bool) -> None:
        """How far and how often to stray: docs/batching.md derives the spread that costs as much as the error it leaves."""
        sharp = 2 * max(parabola.curve - CURVE_DOUBT * parabola.curve_sd, CURVE_MIN)
        spread = max(math.sqrt(self._variance / parabola.weight) / sharp, DOUBT * doubt)
        if bound:
            sure = parabola.slope + parabola.slope_sd < 0
            steps, most = (1, STRAY_CHANCE_BOUND) if sure else (2, STRAY_CHANCE_UNSURE)
        else:
            steps, most = round(math.sqrt(2 * spread) / STEP), STRAY_CHANCE_MAX
        self._stray = STEP * min(max(steps, 1), STRAY_STEPS_MAX)
        self._stray_chance = min(max(spread / self._stray**2, STRAY_CHANCE_MIN), most)

    # --- scouting ------------------------------------------------------------------------------------------

    def _scout(self, highest: float) -> float | None:
        """A place some octaves away, if what it should cost is in the purse."""
        evidence = self._evidence
        index = self._hope
        if index is None:
            octaves = 1 + int(self._chance() * SCOUT_OCTAVES)
            if self._chance() < _HALF:
                octaves = -octaves
            index = round(evidence.index(math.exp(self._at)) / OCTAVE + octaves) * OCTAVE
        if not 0 <= index < len(evidence.logs):
            return None
        at = evidence.logs[index]
        if abs(at - self._at) < SCOUT_NEAR or at > highest:
            self._hope = None
            return None
        known = evidence.weight(index) > _HALF
        rise = evidence.cost(index) - self._parabola.level if known else self._parabola.rise(at)
        price = (math.exp(rise) - 1) * self._level.now * math.exp(at)
        return at if price <= self._purse else None

    def _weigh(self, index: int) -> None:
        """Whether a scout found a better place: then the lead goes there. If it may have, it is tried again soon."""
        cost = self._evidence.cost(index)
        weight = self._evidence.weight(index)
        gain = self._parabola.level - cost
        doubt = math.sqrt(self._variance / (weight + 0.5))
        self._hope = None
        if weight > SCOUTWEIGHT_MIN and gain - doubt > SCOUT_MARGIN:
            self._at = min(self._evidence.logs[index], self._highest())
            self._level.move(-gain)
            self._refit(jumped=True)
        elif gain + doubt > SCOUT_MARGIN:
            self._hope = index

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
        self._hope, self._purse, self._clipped = None, 0.0, 0
        self._starting = learnt.starting
        self._slow.clear()
        self._slow_best, self._slow_barren = math.inf, 0
        if self._latency is not None:
            self._latency.tail = learnt.tail
            self._latency.at = learnt.at
        self._at = min(max(learnt.at, self._evidence.logs[0]), self._highest())
        if not self._starting:
            self._refit(jumped=True)
            self._level.now = self._unit
        return True


def _grid(bounds: SizeBounds) -> list[int]:
    """The sizes to keep evidence of: distinct, allowed under any ceiling, and about STEP apart."""
    every = SizeBounds(count_min=bounds.count_min, multiple_of=bounds.multiple_of)
    steps = int(math.log(every.largest / every.smallest) / STEP + _EPSILON)
    sizes = {every.clamp(round(every.smallest * math.exp(STEP * step))) for step in range(steps + 1)}
    return sorted(sizes | {every.largest})
