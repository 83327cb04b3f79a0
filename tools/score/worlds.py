"""Backends in virtual time: a curve with noise, and what else happens to a batch in real life.

A world knows what each size costs on average, so a controller is scored by that and not by the luck of the draw.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from statistics import NormalDist

from tools.score.curves import COUNT_MAX, Curve, best_count, draw_curve, log_uniform
from walbatch.core.controller import BatchResult, Observation

BYTES_EACH = 100
TIGHTEST = 1.25
"""A latency target leaves at least so much of the time of a batch of one (as a factor)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One row of the score: what the worlds of it have beside their curve."""

    name: str
    noise: float = 0.2
    """Standard deviation of the logarithm of a duration."""
    correlation: float = 0.0
    """Of the noise of one batch with that of the next."""
    spikes: float = 0.0
    """Share of batches that take ten times as long."""
    underfilled: str = ""
    """Half of the batches hold less than was asked for: "timer" (cut before there was enough) or "bytes" (cut by size)."""
    drift: str = ""
    """"jump": another curve from the middle of the run on. "growth": an operation costs ever more, four times at the end."""
    latency: bool = False
    """A target that the best size does not meet."""
    cliff: bool = False
    """Batches beyond a size just below the best one fail."""
    bump: bool = False
    """Two optima."""
    page: bool = False
    """Sawtooth."""
    stall: bool = False
    """The backend stops for a while after so many bytes."""
    burst: bool = False
    """Work comes in bursts; the first batch of each is slow and the last not full, and neither can be learnt from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening:
    """One batch in a world."""

    observation: Observation
    seconds_expected: float
    """What it costs on average, failed or not."""
    scored: bool
    """Whether its size was the controller's doing."""


class World:
    """One backend, from a scenario and a seed."""

    def __init__(self, scenario: Scenario, seed: int, batches: int) -> None:
        self.scenario = scenario
        self.batches = batches
        self._random = random.Random(f"{scenario.name} {seed}")
        curve = draw_curve(self._random)
        best = best_count(curve.cost)
        if scenario.page:
            curve = replace(curve, page=max(2, round(best / self._random.uniform(6, 40))))
        if scenario.bump:
            curve = replace(
                curve,
                bump=self._random.uniform(0.1, 0.5),
                bump_at=best * math.exp(self._random.uniform(-0.5, 0.5)),
                bump_width=self._random.uniform(0.3, 0.6),
            )
        self.curves = [curve]
        if scenario.drift == "jump":
            self.curves.append(
                replace(
                    curve,
                    fixed=curve.fixed * log_uniform(self._random, 0.5, 2),
                    each=curve.each * log_uniform(self._random, 0.5, 2),
                    knee=curve.knee * log_uniform(self._random, 0.25, 4),
                )
            )
        self.cliff_count = COUNT_MAX
        if scenario.cliff:
            self.cliff_count = max(1, int(best * self._random.uniform(0.5, 0.95)))
        self.latency_target_s: float | None = None
        if scenario.latency:
            size = max(1.0, best * log_uniform(self._random, 1 / 16, 1 / 1.5))
            while curve.seconds(size) < TIGHTEST * curve.seconds(1) and size < best:
                size *= 1.01
            z = NormalDist().inv_cdf(0.95)
            if scenario.spikes:
                z = NormalDist().inv_cdf(0.95 / (1 - scenario.spikes))
            noise = scenario.noise
            self.latency_target_s = curve.seconds(size) * math.exp(noise * z - noise**2 / 2)
            self.latency_count = size
        self._stall_items = self._stall_s = 0.0
        if scenario.stall:
            self._stall_items = best * log_uniform(self._random, 1, 30)
            self._stall_s = self._random.uniform(0.2, 1) * curve.cost(best) * self._stall_items
            self._since_stall = 0.0
        self._burst_left = 0
        self._noise = self._random.gauss(0, 1)
        self._index = 0
        self._bests = [self._best(index) for index in range(len(self.curves))]

    def _curve(self, index: int) -> Curve:
        return self.curves[-1] if 2 * index >= self.batches else self.curves[0]

    def _level(self, index: int) -> float:
        """What all durations are multiplied with."""
        level = 1 + 9 * self.scenario.spikes
        return level * 4 ** (index / self.batches) if self.scenario.drift == "growth" else level

    def _best(self, which: int) -> int:
        curve = self.curves[which]
        if self.scenario.latency:
            limit = self.latency_count
            return best_count(curve.cost, allowed=lambda count: count <= max(1.0, limit))
        if self.scenario.underfilled == "bytes":
            return best_count(lambda count: _mixed_cost(curve, count))
        return best_count(curve.cost, allowed=lambda count: count <= self.cliff_count)

    def best_now(self) -> int:
        """The best fixed size for the next batch."""
        return self._bests[-1] if 2 * self._index >= self.batches else self._bests[0]

    def cost(self, count: int, index: int | None = None) -> float:
        """Seconds for each operation in batches of `count`, on average."""
        index = self._index if index is None else index
        if count > self.cliff_count:
            return math.inf
        curve = self._curve(index)
        base = _mixed_cost(curve, count) if self.scenario.underfilled == "bytes" else curve.cost(count)
        stall = self._stall_s / self._stall_items if self._stall_items else 0.0
        return base * self._level(index) + stall

    def best_cost(self) -> float:
        """What an operation costs in batches of the best size."""
        return self.cost(self.best_now())

    def run(self, count: int) -> Happening:
        """The next batch, for which the controller asked for `count`."""
        scenario, random_ = self.scenario, self._random
        asked, learnable, scored, level = count, True, True, self._level(self._index)
        if scenario.underfilled == "timer" and random_.random() < 0.5:
            count = max(1, int(count * random_.random()))
            learnable = scored = False
        elif scenario.underfilled == "bytes" and random_.random() < 0.5:
            count = max(1, int(count * (random_.randrange(20) + 0.5) / 20))
        elif scenario.burst:
            if not self._burst_left:
                self._burst_left = random_.randint(5, 100)
                learnable = scored = False
                level *= 1.5
            elif self._burst_left == 1:
                count = max(1, int(count * random_.random()))
                learnable = scored = False
            self._burst_left -= 1
        fresh = random_.gauss(0, 1)
        self._noise = scenario.correlation * self._noise + math.sqrt(1 - scenario.correlation**2) * fresh
        mean = self._curve(self._index).seconds(count)
        seconds = mean * math.exp(scenario.noise * self._noise - scenario.noise**2 / 2)
        seconds *= level / (1 + 9 * scenario.spikes)
        if scenario.spikes and random_.random() < scenario.spikes:
            seconds *= 10
        expected = mean * level
        result = BatchResult.DELIVERED
        if asked > self.cliff_count and count > self.cliff_count:
            result = BatchResult.TOO_LARGE
        elif self._stall_items:
            self._since_stall += count
            stalls, self._since_stall = divmod(self._since_stall, self._stall_items)
            seconds += stalls * self._stall_s
            expected += count / self._stall_items * self._stall_s
        self._index += 1
        observation = Observation(
            count=count, bytes=count * BYTES_EACH, seconds=seconds, result=result, learnable=learnable
        )
        return Happening(observation=observation, seconds_expected=expected, scored=scored)


def _mixed_cost(curve: Curve, count: int) -> float:
    """The cost where half of the batches hold any part of what was asked for."""
    parts = [max(1, int(count * (part + 0.5) / 20)) for part in range(20)]
    seconds = curve.seconds(count) + sum(map(curve.seconds, parts)) / 20
    return seconds / (count + sum(parts) / 20)


SCENARIOS = [
    Scenario(name="knee, no noise", noise=0.0),
    Scenario(name="knee, 10 % noise", noise=0.1),
    Scenario(name="knee, 20 % noise"),
    Scenario(name="knee, 50 % noise", noise=0.5),
    Scenario(name="under-filled by time", underfilled="timer"),
    Scenario(name="under-filled by bytes", underfilled="bytes"),
    Scenario(name="drift", drift="jump"),
    Scenario(name="growing table", drift="growth"),
    Scenario(name="latency-bound", latency=True),
    Scenario(name="latency-bound, spikes", latency=True, spikes=0.02),
    Scenario(name="cliff", cliff=True),
    Scenario(name="two optima", bump=True),
    Scenario(name="spikes", spikes=0.02),
    Scenario(name="sawtooth", page=True),
    Scenario(name="stalls by bytes", stall=True),
    Scenario(name="bursts", burst=True),
    Scenario(name="correlated noise", noise=0.3, correlation=0.95),
]
