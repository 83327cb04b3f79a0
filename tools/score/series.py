"""Many worlds of a scenario, run with one kind of controller, and what they score together."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tools.score.trial import Trial, run_trial
from tools.score.worlds import Scenario, World
from walbatch.core.controller import AIMD_TARGET_S, FixedSize, LatencyAimd, Observation, SizeController
from walbatch.core.surface import ResponseSurface

FIXED_COUNT = 500
PLAYS = 3
"""A run is played so often to measure what it costs, and the quickest counts: what else the machine does only ever adds."""


def make_surface(world: World, seed: int) -> SizeController:
    return ResponseSurface(seed=seed, latency_target_s=world.latency_target_s)


def make_aimd(world: World, _seed: int) -> SizeController:
    target_s = AIMD_TARGET_S if world.latency_target_s is None else world.latency_target_s
    return LatencyAimd(latency_target_s=target_s)


def make_fixed(_world: World, _seed: int) -> SizeController:
    return FixedSize(count=FIXED_COUNT)


MAKERS: dict[str, Callable[[World, int], SizeController]] = {
    "surface": make_surface,
    "aimd": make_aimd,
    "fixed": make_fixed,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is run: worlds of each scenario, batches in each, and how many of them are warm-up."""

    worlds: int
    batches: int
    warm_up: int


FULL = Effort(worlds=60, batches=3000, warm_up=500)
QUICK = Effort(worlds=40, batches=1500, warm_up=300)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What the trials of a scenario come to. Regrets and violations are shares."""

    scenario: str
    controller: str
    worlds: int
    regret_median: float
    regret_p90: float
    regret_max: float
    regret_whole_median: float
    violations: float
    """Mean over the worlds."""
    within_median: float
    within_p90: float
    stuck: int
    """Worlds that ended at a small size."""
    regrets: tuple[float, ...]


def score(scenario: Scenario, controller: str, effort: Effort) -> Score:
    """Run the worlds 0, 1, 2, ... of a scenario: always the same ones."""
    trials = [run_world(scenario, controller, effort, number) for number in range(effort.worlds)]
    regrets = sorted(trial.regret for trial in trials)
    within = sorted(float(trial.within_batches) for trial in trials)
    return Score(
        scenario=scenario.name,
        controller=controller,
        worlds=effort.worlds,
        regret_median=statistics.median(regrets),
        regret_p90=quantile(regrets, 0.9),
        regret_max=regrets[-1],
        regret_whole_median=statistics.median(trial.regret_whole for trial in trials),
        violations=statistics.mean(trial.violations for trial in trials),
        within_median=statistics.median(within),
        within_p90=quantile(within, 0.9),
        stuck=sum(trial.stuck for trial in trials),
        regrets=tuple(regrets),
    )


def run_world(scenario: Scenario, controller: str, effort: Effort, number: int) -> Trial:
    """One world."""
    world = World(scenario, number, effort.batches)
    return run_trial(MAKERS[controller](world, number), world, warm_up=effort.warm_up)


def quantile(ascending: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    return ascending[min(len(ascending) - 1, max(0, -int(-len(ascending) * share // 1) - 1))]


def cost_us(scenario: Scenario, effort: Effort) -> float:
    """CPU microseconds of one `target` and one `observe`: a run is recorded, then played to a twin of its controller."""
    spent = 0.0
    for number in range(effort.worlds):
        world = World(scenario, number, effort.batches)
        controller = make_surface(world, number)
        observations: list[Observation] = []
        for _ in range(effort.batches):
            observations.append(world.run(controller.target().count).observation)
            controller.observe(observations[-1])
        plays = []
        for _ in range(PLAYS):
            twin = make_surface(world, number)
            started = time.process_time()
            for observation in observations:
                twin.target()
                twin.observe(observation)
            plays.append(time.process_time() - started)
            if twin.snapshot() != controller.snapshot():
                raise RuntimeError("a controller does not do the same twice")
        spent += min(plays)
    return spent / (effort.worlds * effort.batches) * 1e6
