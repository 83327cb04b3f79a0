"""A batch between its cut and its answer.

The idea needed to read it: a flight is a value. What becomes of its operations is told to the queue, which knows it by its number.
"""

from __future__ import annotations

from typing import NamedTuple

from walbatch.core.entry import Entry
from walbatch.core.parcel import Parcel
from walbatch.types import CutReason


class Flight(NamedTuple):
    """A batch on its way. `tries`: how often the same operations failed as a whole before, in a row. `bytes`: its memory."""

    number: int
    entries: list[Entry]
    reason: CutReason
    tries: int
    bytes: int
    parcel: Parcel | None
    """What it was taken from; None: from what was ready."""

    @property
    def is_part(self) -> bool:
        """Whether it is a part of a search."""
        return self.parcel is not None and self.parcel.search is not None
