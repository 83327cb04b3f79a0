"""What a size controller has learnt, as bytes: they are kept in `state/` with the checkpoint.

Not here: the checksum (its keeper adds one), and what the numbers mean (`surface`, `evidence`, `ceiling`).

Bytes are trusted in nothing: what `encode` cannot have written is refused, so that no number can make the controller fail.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from walbatch.core.ceiling import FailureCeiling
from walbatch.core.level import RATE_MAX, RATE_MIN
from walbatch.limits import BATCH_COUNT_MAX

MAGIC: Final = b"WBcs"
VERSION: Final = 1

WEIGHT_MIN: Final = 1e-3
WEIGHT_MAX: Final = 4096.0
"""Evidence that weighs less is not kept; none weighs more (four times the memory of `surface`)."""

VARIANCE_MIN: Final = 4e-4
VARIANCE_MAX: Final = 16.0
COST_MIN: Final = 1e-15
COST_MAX: Final = 1e9
TAIL_MAX: Final = 50.0

_HEADER: Final = struct.Struct("<4sBBHQQQQ")
_NUMBERS: Final = struct.Struct("<ddddd")
_CELL: Final = struct.Struct("<Iddd")
_FIXED_BYTES: Final = _HEADER.size + _NUMBERS.size + FailureCeiling.STATE.size

Cell = tuple[int, float, float, float]
"""A size, its weight, and seconds and excess for each operation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Learnt:
    """The numbers of a snapshot. `at` is the lead in ln(count)."""

    starting: bool
    samples: int
    drifts: int
    age: int
    chance: int
    at: float
    variance: float
    level_rate: float
    events: float
    tail: float
    failure: bytes
    cells: list[Cell]


def encode(learnt: Learnt) -> bytes:
    """105 bytes, and 28 for each cell. Cells that `decode` would refuse are left out; without any, the start goes on."""
    cells = [cell for cell in learnt.cells if _are_cells([cell])]
    header = _HEADER.pack(
        MAGIC, VERSION, learnt.starting or not cells, len(cells),
        learnt.samples, learnt.drifts, learnt.age, learnt.chance,
    )  # fmt: skip
    numbers = _NUMBERS.pack(learnt.at, learnt.variance, learnt.level_rate, learnt.events, learnt.tail)
    return header + numbers + learnt.failure + b"".join(_CELL.pack(*cell) for cell in cells)


def decode(data: bytes) -> Learnt | None:
    """What `encode` wrote; None for anything else. Whether `failure` holds a ceiling, the ceiling knows."""
    if len(data) < _FIXED_BYTES:
        return None
    magic, version, starting, count, samples, drifts, age, chance = _HEADER.unpack_from(data)
    if (magic, version) != (MAGIC, VERSION) or len(data) != _FIXED_BYTES + count * _CELL.size:
        return None
    at, variance, level_rate, events, tail = _NUMBERS.unpack_from(data, _HEADER.size)
    cells = list(_CELL.iter_unpack(data[_FIXED_BYTES:]))
    if not (
        starting <= 1
        and (cells or starting)
        and 0 <= at <= math.log(BATCH_COUNT_MAX)
        and VARIANCE_MIN / 2 <= variance <= VARIANCE_MAX
        and RATE_MIN <= level_rate <= RATE_MAX
        and 0 <= events <= WEIGHT_MAX
        and abs(tail) <= TAIL_MAX
        and _are_cells(cells)
    ):
        return None
    return Learnt(
        starting=bool(starting), samples=samples, drifts=drifts, age=age, chance=chance, at=at, variance=variance,
        level_rate=level_rate, events=events, tail=tail,
        failure=data[_HEADER.size + _NUMBERS.size : _FIXED_BYTES], cells=cells,
    )  # fmt: skip


def encoded_bytes(cells: int) -> int:
    """The size of a snapshot with so many cells."""
    return _FIXED_BYTES + cells * _CELL.size


def _are_cells(cells: list[Cell]) -> bool:
    """Whether these are cells that a controller may have written."""
    sizes = [cell[0] for cell in cells]
    return (
        all(1 <= size <= BATCH_COUNT_MAX for size in sizes)
        and all(low < high for low, high in pairwise(sizes))
        and all(
            0 < weight <= WEIGHT_MAX and COST_MIN <= cost <= COST_MAX and 0 <= excess <= COST_MAX
            for _, weight, cost, excess in cells
        )
    )
