"""A batch that was cut and has not come back: its operations, as columns and one by one.

The idea needed to read it: what was cut in order is runs of columns, and stays that as long as nothing fails. Who has to look at an
operation by itself asks for `entries`; they are made then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from walbatch import limits
from walbatch.core.entry import Entry
from walbatch.core.parcel import Parcel
from walbatch.core.run import Run
from walbatch.types import NO_OPTIONS, CutReason, Options


class Columns(NamedTuple):
    """The operations of a batch as parallel columns. `options` is empty where none has any."""

    lsns: Sequence[int]
    keys: Sequence[bytes]
    payloads: Sequence[bytes]
    priorities: Sequence[int]
    options: Sequence[Options]


class Flight:
    """A batch on its way. `tries`: how often the same operations failed as a whole before, in a row. `bytes`: its memory.

    `parcel`: what it was taken from; None: from what was ready.
    """

    __slots__ = ("_entries", "_lsns", "_runs", "bytes", "count", "number", "parcel", "reason", "tries")

    def __init__(
        self, number: int, reason: CutReason, *, runs: Sequence[Run] = (), entries: list[Entry] | None = None, tries: int = 0,
        bytes: int = 0, parcel: Parcel | None = None,
    ) -> None:  # fmt: skip
        """Of `runs`, or of `entries`."""
        self.number = number
        self.reason = reason
        self._runs = runs
        self._entries = entries
        self._lsns: Sequence[int] | None = None
        self.tries = tries
        self.bytes = bytes
        self.parcel = parcel
        self.count = sum(map(len, runs)) if entries is None else len(entries)

    def __repr__(self) -> str:
        return f"<Flight {self.number} of {self.count}, cut by {self.reason}, {self.tries} tries>"

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    @property
    def entries(self) -> list[Entry]:
        """Its operations one by one."""
        if self._entries is None:
            self._entries = list(chain.from_iterable(self._runs))
        return self._entries

    @property
    def is_part(self) -> bool:
        """Whether it is a part of a search."""
        return self.parcel is not None and self.parcel.search is not None

    @property
    def lsns(self) -> Sequence[int]:
        """The LSNs of its operations, in the order in which to apply them."""
        if self._lsns is None:
            self._lsns = self._joined_lsns()
        return self._lsns

    def _joined_lsns(self) -> Sequence[int]:
        runs = self._runs
        if not runs:
            return [entry[0] for entry in self.entries]
        if len(runs) == 1:
            return runs[0].lsns
        first, last = runs[0].lsns[0], runs[-1].lsns[-1]
        if last - first + 1 == self.count:  # they ascend
            return range(first, last + 1)
        return tuple(chain.from_iterable(run.lsns for run in runs))

    @property
    def size(self) -> int:
        """The bytes of its keys and payloads."""
        return self.bytes - self.count * limits.OPERATION_OVERHEAD_BYTES

    @property
    def arrivals_ns(self) -> list[tuple[int, int]]:
        """When its operations arrived, and how many at that time. A time may come several times."""
        if self._runs:
            return [(run.arrival_ns, len(run)) for run in self._runs]
        return [(entry[4], 1) for entry in self.entries]

    def columns(self) -> Columns:
        """Its operations, in the order in which to apply them."""
        runs = self._runs
        if not runs:
            _, keys, payloads, priorities, _, options = zip(*self.entries, strict=True)
            some = options if any(option is not NO_OPTIONS for option in options) else ()
            return Columns(self.lsns, keys, payloads, priorities, some)
        if len(runs) == 1:
            (run,) = runs
            return Columns(
                self.lsns, tuple(run.keys), tuple(run.payloads), (run.priority,) * self.count, tuple(run.options)
            )  # fmt: skip
        chained = chain.from_iterable
        return Columns(
            self.lsns, tuple(chained(run.keys for run in runs)), tuple(chained(run.payloads for run in runs)),
            tuple(chained((run.priority,) * len(run) for run in runs)),
            tuple(chained(run.options or (NO_OPTIONS,) * len(run) for run in runs)) if any(run.options for run in runs) else (),
        )  # fmt: skip
