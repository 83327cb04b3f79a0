"""One controller in one world: how much longer it took than the best fixed size would have."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tools.score.worlds import World
from walbatch.core.controller import BatchResult, SizeController

WITHIN = 0.05
WINDOW = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What one run scored."""

    regret: float
    """Time beyond what the best fixed size takes for the same operations, as a share of that, after the warm-up."""
    regret_whole: float
    """The same from the first batch on."""
    violations: float
    """Share of batches, after the warm-up, that took longer than the latency target."""
    within_batches: int
    """Batches until a window of WINDOW batches loses at most WITHIN; all of them if none does."""
    stuck: bool
    """At the end the lead is below a quarter of the best size, and costs over a tenth more."""
    sizes: tuple[int, ...]
    best: int


def run_trial(controller: SizeController, world: World, *, warm_up: int) -> Trial:
    """Run all batches of the world."""
    spent: list[float] = []
    ideal: list[float] = []
    sizes: list[int] = []
    late = 0
    target_s = world.latency_target_s
    for index in range(world.batches):
        size = controller.target().count
        sizes.append(size)
        best_cost = world.best_cost()
        happening = world.run(size)
        observation = happening.observation
        controller.observe(observation)
        if happening.scored:
            delivered = observation.count if observation.result is BatchResult.DELIVERED else 0
            spent.append(happening.seconds_expected)
            ideal.append(delivered * best_cost)
        else:
            spent.append(0.0)
            ideal.append(0.0)
        late += target_s is not None and index >= warm_up and observation.seconds > target_s
    lead = controller.describe().lead_count
    best = world.best_now()
    return Trial(
        regret=_regret(spent[warm_up:], ideal[warm_up:]),
        regret_whole=_regret(spent, ideal),
        violations=late / (world.batches - warm_up),
        within_batches=_within(spent, ideal),
        stuck=lead * 4 < best and world.cost(lead) > 1.1 * world.cost(best),
        sizes=tuple(sizes),
        best=best,
    )


def _regret(spent: list[float], ideal: list[float]) -> float:
    """Infinite where nothing was delivered."""
    base = sum(ideal)
    return sum(spent) / base - 1 if base else math.inf


def _within(spent: list[float], ideal: list[float]) -> int:
    lost, base = sum(spent[:WINDOW]), sum(ideal[:WINDOW])
    for index in range(len(spent) - WINDOW):
        if lost <= base * (1 + WITHIN):
            return index
        lost += spent[index + WINDOW] - spent[index]
        base += ideal[index + WINDOW] - ideal[index]
    return len(spent)
