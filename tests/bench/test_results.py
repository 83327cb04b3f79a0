"""The arithmetic: medians, spreads, ratios within a round, the best peer; and targets."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.bench.tiny import made
from walbatch.bench.results import Results, Spread, quantile
from walbatch.bench.targets import TARGETS, verdicts


def test_a_spread_is_the_median_and_both_ends() -> None:
    assert Spread.of([3.0, 1.0, 10.0]) == Spread(median=3.0, low=1.0, high=10.0, count=3)
    assert Spread.of([3.0, 1.0]) == Spread(median=2.0, low=1.0, high=3.0, count=2)
    assert Spread.of([]) is None


def test_a_ratio_is_made_within_each_round() -> None:
    results = made({"w1": {"walbatch": [100.0, 10.0, 40.0], "raw": [50.0, 5.0, 10.0]}})
    assert results.ratios("w1", "walbatch", "raw") == [2.0, 2.0, 4.0]
    medians = [results.spread("w1", name) for name in ("walbatch", "raw")]
    assert [found.median for found in medians if found] == [40.0, 10.0]


def test_a_round_that_one_of_both_lacks_makes_no_ratio() -> None:
    results = made({"w1": {"walbatch": [100.0, 10.0, 40.0], "raw": [50.0]}})
    assert results.ratios("w1", "walbatch", "raw") == [2.0]
    assert results.ratios("w1", "walbatch", "sqlite") == []


def test_a_ratio_may_be_to_another_workload() -> None:
    results = made({"w3": {"raw": [10.0, 20.0]}, "w6": {"walbatch": [1.0, 4.0]}})
    assert results.ratios("w6", "walbatch", "raw", other_workload="w3") == [0.1, 0.2]


def test_the_best_peer_has_the_best_median_and_waits_for_the_disk() -> None:
    results = made(
        {
            "w1": {
                "walbatch": [90.0] * 3,
                "raw": [100.0] * 3,
                "raw-over": [300.0] * 3,
                "persist-file": [200.0] * 3,
                "nats": [200.0] * 3,
                "sqlite": [50.0, 60.0, 1.0],
                "lmdb": [40.0, 40.0, 99.0],
            }
        }
    )
    assert results.peers("w1") == ["sqlite", "lmdb"]


def test_a_peer_that_is_not_installed_is_none() -> None:
    results = made({"w1": {"sqlite": [1.0]}})
    results.subjects = [replace(note, missing="pip install it") for note in results.subjects]
    assert results.peers("w1") == []


def test_a_document_can_be_read_again() -> None:
    results = made({"w1": {"walbatch": [1.0, 2.0], "raw": [2.0, 2.0]}})
    document = json.loads(json.dumps(results.document()))
    assert document["medians"]["w1"]["walbatch"]["rate"] == 1.5
    assert Results.of_document(document) == results
    with pytest.raises(ValueError, match="format 99"):
        Results.of_document({**document, "format": 99})


def test_a_quantile_is_one_of_the_values() -> None:
    values = [float(number) for number in range(1, 101)]
    assert (quantile(values, 0.5), quantile(values, 0.99), quantile([7.0], 0.99)) == (51.0, 100.0, 7.0)


# --- targets ---------------------------------------------------------------------------------------------------------


def test_a_target_is_met_by_the_median_of_the_ratios() -> None:
    rates = {"walbatch": [80.0, 70.0, 200.0], "raw": [100.0, 100.0, 100.0], "lmdb": [80.0, 80.0, 80.0]}
    to_raw, to_peer = verdicts(made({"w3": rates}))
    assert (to_raw.bound, to_raw.is_met) == (">= 0.75 x", True)
    assert to_raw.found == Spread(median=0.8, low=0.7, high=2.0, count=3)
    assert (to_peer.bound, to_peer.is_met) == (">= 1.2 x", False)


def test_a_latency_must_stay_below_its_bound() -> None:
    found = verdicts(made({"w1": {"walbatch": [100.0], "raw": [110.0], "sqlite": [100.0]}}))
    assert [(verdict.what, verdict.is_met) for verdict in found] == [
        ("rate to the best peer", True),
        ("p50 latency to a raw append", False),
    ]


def test_a_target_without_its_other_side_is_not_measured() -> None:
    to_peer, flushed = verdicts(made({"w5": {"walbatch": [100.0]}}))
    assert (to_peer.found, to_peer.is_met, flushed.is_met) == (None, None, None)


def test_a_drain_is_held_to_its_target_until_flush_returns_and_until_it_is_durable() -> None:
    results = made({"w5": {"walbatch": [150.0], "lmdb": [100.0], "sqlite": [10.0]}})
    results.samples[0] = replace(results.samples[0], figures={"rate": 150.0, "flush_rate": 210.0})
    assert [(verdict.found and verdict.found.median, verdict.is_met) for verdict in verdicts(results)] == [
        (1.5, False),
        (2.1, True),
    ]


def test_targets_of_backlogs_look_at_the_largest_one() -> None:
    results = made({"w8": {}})
    sample = made({"w8": {"x": [1.0]}}).samples[0]
    for name, open_s in (("1,000,000 pending", 0.1), ("10,000,000 pending", 0.4), ("3,000,000 pending", 0.2)):
        results.samples.append(
            replace(sample, subject=name, figures={"open_s": open_s, "killed_open_s": 0.1})
        )
    results.samples.append(replace(sample, subject="10,000,000 drained", figures={"drain_rss_mib": 140.0}))
    found = {verdict.what: verdict for verdict in verdicts(results)}
    assert found["opening the largest backlog"].is_met is False
    assert found["the same after a kill"].is_met is True
    growth = found["opening the largest to opening the smallest"].found
    assert growth is not None
    assert growth.median == pytest.approx(4.0)
    assert found["peak memory of draining the largest"].is_met is True


def test_every_target_has_one_bound() -> None:
    assert all((target.at_least is None) != (target.at_most is None) for target in TARGETS)
