"""What a controller has learnt comes back from its bytes as it was, and nothing else comes back at all."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walbatch.core.ceiling import FailureCeiling
from walbatch.core.learnt import (
    COST_MAX,
    COST_MIN,
    TAIL_MAX,
    VARIANCE_MAX,
    VARIANCE_MIN,
    WEIGHT_MAX,
    Learnt,
    decode,
    encode,
    encoded_bytes,
)
from walbatch.core.level import RATE_MAX, RATE_MIN
from walbatch.limits import BATCH_COUNT_MAX

CELLS = [(1, 2.0, 1e-3, 0.0), (64, 100.0, 1e-5, 1e-6), (BATCH_COUNT_MAX, 0.5, 2e-5, 0.0)]
LEARNT = Learnt(
    starting=False, samples=1000, drifts=2, age=700, chance=2**64 - 1, at=math.log(64), variance=0.04,
    level_rate=0.02, events=1.5, tail=0.4, failure=bytes(FailureCeiling.STATE.size), cells=CELLS,
)  # fmt: skip


@pytest.mark.parametrize("learnt", [LEARNT, replace(LEARNT, starting=True, cells=[])], ids=["going", "new"])
def test_what_was_encoded_comes_back(learnt: Learnt) -> None:
    data = encode(learnt)
    assert len(data) == encoded_bytes(len(learnt.cells))
    assert decode(data) == learnt


@pytest.mark.parametrize(
    "cell",
    [
        (0, 2.0, 1e-3, 0.0),
        (BATCH_COUNT_MAX + 1, 2.0, 1e-3, 0.0),
        (65, 0.0, 1e-3, 0.0),
        (65, WEIGHT_MAX * 2, 1e-3, 0.0),
        (65, 2.0, math.nan, 0.0),
        (65, 2.0, COST_MIN / 2, 0.0),
        (65, 2.0, 1e-3, -1.0),
        (65, 2.0, 1e-3, COST_MAX * 2),
    ],
    ids=repr,
)
def test_a_cell_that_no_controller_can_use_is_not_encoded(cell: tuple[int, float, float, float]) -> None:
    assert decode(encode(replace(LEARNT, cells=sorted([*CELLS, cell])))) == LEARNT
    found = decode(encode(replace(LEARNT, cells=[cell])))
    assert found is not None
    assert (found.starting, found.cells) == (True, [])


REFUSED = {
    "lead below one": replace(LEARNT, at=-0.1),
    "lead too large": replace(LEARNT, at=12.0),
    "lead nan": replace(LEARNT, at=math.nan),
    "no variance": replace(LEARNT, variance=VARIANCE_MIN / 4),
    "too much variance": replace(LEARNT, variance=VARIANCE_MAX * 2),
    "level too slow": replace(LEARNT, level_rate=RATE_MIN / 2),
    "level too fast": replace(LEARNT, level_rate=RATE_MAX * 2),
    "events below none": replace(LEARNT, events=-1.0),
    "too many events": replace(LEARNT, events=WEIGHT_MAX * 2),
    "tail": replace(LEARNT, tail=-TAIL_MAX - 1),
    "tail infinite": replace(LEARNT, tail=math.inf),
    "cells out of order": replace(LEARNT, cells=CELLS[::-1]),
    "a size twice": replace(LEARNT, cells=[CELLS[0], CELLS[0]]),
}


@pytest.mark.parametrize("learnt", REFUSED.values(), ids=REFUSED.keys())
def test_numbers_that_no_controller_can_have_are_refused(learnt: Learnt) -> None:
    assert decode(encode(learnt)) is None


@pytest.mark.parametrize(
    ("place", "value"),
    [(0, b"x"), (4, b"\2"), (5, b"\2"), (6, b"\2"), (-28, bytes(4)), (-24, bytes(8))],
    ids=["magic", "version", "phase", "count", "size of a cell", "weight of a cell"],
)
def test_damaged_bytes_are_refused(place: int, value: bytes) -> None:
    data = bytearray(encode(LEARNT))
    start = place % len(data)
    data[start : start + len(value)] = value
    assert decode(bytes(data)) is None


def test_without_cells_only_a_slow_start_can_go_on() -> None:
    data = bytearray(encode(replace(LEARNT, starting=True, cells=[])))
    assert decode(bytes(data)) is not None
    data[5] = 0
    assert decode(bytes(data)) is None


@pytest.mark.parametrize("length", [0, 50, -1, 1])
def test_bytes_of_another_length_are_refused(length: int) -> None:
    data = encode(LEARNT)
    assert decode(data + b"\0" if length == 1 else data[:length]) is None


@given(st.binary(max_size=200), st.integers(0, 10**6), st.integers(0, 255))
def test_hostile_bytes_are_refused_or_could_have_been_written(noise: bytes, place: int, byte: int) -> None:
    assert decode(noise) is None
    data = bytearray(encode(LEARNT))
    data[place % len(data)] = byte
    found = decode(bytes(data))
    assert found is None or encode(found) == bytes(data)
