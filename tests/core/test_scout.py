"""Scouts go as far as the purse pays, come back where there is hope, and are believed when they are sure."""

from __future__ import annotations

import math

import pytest

from walbatch.core.controller import Chance, SizeBounds
from walbatch.core.evidence import STEP, Evidence, grid
from walbatch.core.parabola import Parabola
from walbatch.core.scout import CHANCE, CHANCE_HOPE, MARGIN, NEAR, OCTAVES_MAX, Scouts

LEAD = math.log(256)
FAR = math.log(2048)


def parabola(*, slope: float = 0.0) -> Parabola:
    return Parabola(
        at=LEAD, level=0.0, slope=slope, curve=0.1, weight=500, slope_sd=0.1, curve_sd=0.1, reach=1.0
    )


def evidence_of(cost: float, *, samples: int, at: float = FAR) -> Evidence:
    """`samples` batches at e^`at` that cost `cost` times the lead's."""
    evidence = Evidence(grid(SizeBounds()))
    index = evidence.index(math.exp(at))
    for _ in range(samples):
        evidence.add(index, evidence.sizes[index], cost * evidence.sizes[index], 0.0)
    return evidence


def places(scouts: Scouts, evidence: Evidence, *, highest: float = math.inf, draws: int = 200) -> set[float]:
    chance = Chance(1)
    found = (
        scouts.place(evidence, parabola(), lead=LEAD, highest=highest, level=1e-5, chance=chance)
        for _ in range(draws)
    )
    return {place for place in found if place is not None}


def rich() -> Scouts:
    scouts = Scouts()
    for _ in range(10_000):
        scouts.save(10.0)
    return scouts


def test_scouts_go_octaves_up_and_down() -> None:
    found = sorted(places(rich(), evidence_of(1.0, samples=0)))
    assert len(found) == 2 * OCTAVES_MAX
    assert all(NEAR <= abs(place - LEAD) <= (OCTAVES_MAX + 0.5) * math.log(2) + STEP for place in found)
    below = places(rich(), evidence_of(1.0, samples=0), highest=LEAD + math.log(3))
    assert below == {place for place in found if place <= LEAD + math.log(3)}


def test_what_the_purse_cannot_pay_is_not_tried() -> None:
    evidence = evidence_of(1.0, samples=0)
    assert places(Scouts(), evidence) == set()
    scouts = rich()
    scouts.pay(-5.0)
    assert places(scouts, evidence)
    scouts.pay(80.0)
    assert places(scouts, evidence) == set()


def test_a_place_that_is_known_is_priced_by_what_it_cost() -> None:
    unknown = evidence_of(1.0, samples=0)
    at = max(places(rich(), unknown))
    assert at not in places(rich(), evidence_of(1e9, samples=5, at=at))
    assert places(Scouts(), unknown) == set()
    assert places(Scouts(), evidence_of(0.5, samples=5, at=at)) == {at}


@pytest.mark.parametrize(
    ("cost", "samples", "gain", "chance"),
    [
        (0.5, 8, math.log(2), CHANCE),
        (0.5, 1, None, CHANCE_HOPE),
        (0.97, 4, None, CHANCE_HOPE),
        (1.0 - MARGIN / 2, 10_000, None, CHANCE),
        (2.0, 8, None, CHANCE),
    ],
    ids=["better and sure", "better in one batch", "perhaps", "not worth it", "worse"],
)
def test_a_place_is_believed_when_it_is_better_by_more_than_its_error(
    cost: float, samples: int, gain: float | None, chance: float
) -> None:
    scouts, evidence = Scouts(), evidence_of(cost, samples=samples)
    found = scouts.gain(evidence.index(math.exp(FAR)), evidence, parabola(), 0.04)
    assert found == (None if gain is None else pytest.approx(gain, abs=1e-6))
    assert scouts.chance == chance


def test_hope_brings_the_next_scout_to_the_same_place_until_it_is_out_of_bounds() -> None:
    scouts, evidence = rich(), evidence_of(0.5, samples=1)
    index = evidence.index(math.exp(FAR))
    assert scouts.gain(index, evidence, parabola(), 0.04) is None
    assert repr(scouts).endswith(f"hope {index}>")
    assert places(scouts, evidence) == {evidence.logs[index]}
    assert places(scouts, evidence, highest=FAR - 1, draws=1) == set()
    assert scouts.chance == CHANCE


def test_a_scout_does_not_leave_the_grid() -> None:
    small = Evidence(grid(SizeBounds(count_min=200)))
    assert all(place >= small.logs[0] for place in places(rich(), small))
