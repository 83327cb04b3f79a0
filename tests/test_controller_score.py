"""The score of the size controller: its gates hold, and the tool that measures it measures what it says."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from tools import controller_score
from tools.score import gates, real, series
from tools.score.curves import COUNT_MAX, SIZES, Curve, best_count
from tools.score.series import QUICK, Effort, Score, score
from tools.score.trial import run_trial
from tools.score.worlds import SCENARIOS, Scenario, World
from walbatch.core.controller import BatchResult, FixedSize

GATED = sorted({gate.scenario for gate in gates.GATES})
TINY = Effort(worlds=3, batches=300, warm_up=50)


def scenario(name: str) -> Scenario:
    (found,) = (found for found in SCENARIOS if found.name == name)
    return found


@pytest.mark.parametrize("name", GATED)
def test_the_gates_hold(name: str) -> None:
    found = score(scenario(name), "surface", QUICK)
    scores = dict.fromkeys(GATED, found)
    assert [problem for problem in gates.broken(scores) if problem.startswith(f"{name}:")] == []


# --- the measure itself --------------------------------------------------------------------------------------


@pytest.mark.parametrize("found", SCENARIOS, ids=lambda found: found.name)
def test_the_best_fixed_size_has_hardly_any_regret_and_others_have(found: Scenario) -> None:
    if found.drift == "jump":
        pytest.skip("another size is best before than after")
    regrets = []
    for number in range(4):
        world = World(found, number, 400)
        best = world.best_now()
        regrets.append(run_trial(FixedSize(count=best), world, warm_up=0).regret)
        again = World(found, number, 400)
        # Beyond a cliff or a latency target all is cheap or nothing counts: there, the worse size is a smaller one.
        smaller = found.cliff or found.latency or best * 8 > COUNT_MAX
        worse = max(1, best // 8) if smaller else best * 8
        assert run_trial(FixedSize(count=worse), again, warm_up=0).regret >= regrets[-1]
    # What of a batch is not full, or which batch a stall hits, is the luck of the draw.
    assert all(abs(regret) < (0.15 if found.stall or found.underfilled == "bytes" else 1e-9) for regret in regrets)  # fmt: skip


def test_a_regret_is_time_beyond_what_the_best_size_takes() -> None:
    world = World(scenario("knee, no noise"), 0, 100)
    count = 3
    expected = world.cost(count) / world.best_cost() - 1
    assert run_trial(FixedSize(count=count), world, warm_up=10).regret == pytest.approx(expected)


def test_a_batch_beyond_the_cliff_costs_its_time_and_delivers_nothing() -> None:
    world = World(scenario("cliff"), 0, 100)
    happening = world.run(world.cliff_count + 1)
    assert happening.observation.result is BatchResult.TOO_LARGE
    assert happening.seconds_expected > 0
    assert world.cost(world.cliff_count + 1) == math.inf
    assert run_trial(FixedSize(count=world.cliff_count + 1), world, warm_up=0).regret == math.inf


def test_worlds_are_the_same_every_time() -> None:
    for found in SCENARIOS:
        first, second = World(found, 3, 50), World(found, 3, 50)
        assert [first.run(100) for _ in range(50)] == [second.run(100) for _ in range(50)]


def test_noise_has_the_mean_that_is_scored() -> None:
    world = World(scenario("spikes"), 1, 40_000)
    happenings = [world.run(50) for _ in range(40_000)]
    seconds = sum(happening.observation.seconds for happening in happenings)
    assert seconds == pytest.approx(sum(happening.seconds_expected for happening in happenings), rel=0.05)


def test_a_latency_target_can_be_met_by_the_size_that_it_was_made_for() -> None:
    for number in range(5):
        world = World(scenario("latency-bound"), number, 4000)
        trial = run_trial(FixedSize(count=world.best_now()), world, warm_up=0)
        assert trial.violations == pytest.approx(0.05, abs=0.015)


def test_the_best_size_is_the_best_of_all() -> None:
    curve = Curve(fixed=0.01, each=1e-5, knee=1000, bend=4, power=2.0)
    best = best_count(curve.cost)
    assert all(curve.cost(size) >= curve.cost(best) for size in SIZES)
    assert 1000 < best < 2000
    paged = replace(curve, page=128)
    assert best_count(paged.cost) % 128 in {0, *range(120, 128)}


# --- gates and output ----------------------------------------------------------------------------------------


def test_a_broken_gate_is_named_with_its_figure() -> None:
    found = score(scenario("knee, 20 % noise"), "fixed", TINY)
    found = replace(found, regret_median=0.0, regret_p90=0.0, stuck=0, violations=0.0)
    scores = dict.fromkeys(GATED, found)
    assert gates.broken(scores) == []
    scores["drift"] = replace(scores["drift"], regret_median=0.0501)
    assert gates.broken(scores) == ["drift: regret_median <= 0.05: is 0.0501"]
    scores["drift"] = replace(scores["drift"], regret_median=math.nan)
    assert gates.broken(scores) == ["drift: regret_median <= 0.05: is nan"]


def test_a_controller_that_stays_at_a_small_size_is_stuck() -> None:
    world = next(
        world
        for world in (World(scenario("knee, no noise"), number, 50) for number in range(100))
        if world.best_now() > 1000
    )
    assert run_trial(FixedSize(count=2), world, warm_up=0).stuck


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([1.0], 0.9, 1.0), ([1.0, 2.0], 0.5, 1.0), (list(range(1, 11)), 0.9, 9), (list(range(1, 41)), 0.9, 36)],
)
def test_a_quantile_is_one_of_the_values(values: list[float], share: float, expected: float) -> None:
    assert series.quantile(values, share) == expected


def test_the_command_prints_a_table_and_its_figures_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(controller_score, "QUICK", TINY)
    for options in ([], ["--json"]):
        monkeypatch.setattr("sys.argv", ["controller_score.py", "--quick", "--scenario", "20 %", *options])
        assert controller_score.run_virtual(controller_score.parse_arguments()) in {0, 1}
    out = capsys.readouterr().out
    assert out.startswith("3 curves for each scenario, 300 batches")
    assert "| knee, 20 % noise | " in out
    found = json.loads(out[out.index("\n{\n") :])
    assert {one["controller"] for one in found["scores"]} == {"surface", "aimd", "fixed"}
    assert set(found["cost_us"]) == set(controller_score.COST_SCENARIOS)


def test_scores_of_the_same_worlds_are_equal() -> None:
    first, second = (score(scenario("bursts"), "surface", TINY) for _ in range(2))
    assert isinstance(first, Score)
    assert first == second


@pytest.mark.parametrize("name", real.STORES)
def test_real_stores_are_measured_in_turns(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real, "TURN_S", 0.001)
    found = real.measure(name, tmp_path, turns=5)
    assert found.ratio > 0
    assert set(found.fixed_operations_s) < set(real.FIXED_COUNTS)
    assert found.best_count == max(found.fixed_operations_s, key=found.fixed_operations_s.__getitem__)
    assert 0 < found.error < 5
    (row,) = controller_score.real_table([found])[2:]
    assert row.startswith(f"| {name} | {found.ratio:.3f}, {found.error:.3f} | ")


def test_the_error_of_a_ratio_comes_from_how_much_rounds_differ() -> None:
    class Nothing:
        def apply(self, keys: Sequence[int]) -> None: ...
        def close(self) -> None: ...

    steady = real.Contender(Nothing(), None, [100] * 50, [1.0] * 50)
    random_ = Random(1)
    noisy = real.Contender(Nothing(), 4, [round(random_.gauss(100, 20)) for _ in range(50)], [1.0] * 50)
    assert real._ratio_error(steady, steady, 10) == 0
    assert real._ratio_error(noisy, steady, 10) == pytest.approx(0.2 / math.sqrt(40), rel=0.3)
