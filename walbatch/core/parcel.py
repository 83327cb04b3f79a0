"""Operations that failed together and come back together.

What is not here: when they come back, and what waits behind them (`batcher`).

The idea needed to read it: a parcel goes again as a batch of its own, or in parts from its front: while a culprit is searched for
in it, where it was too large, or where a batch may hold less than it did.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection

from walbatch import limits
from walbatch.core.entry import Entry, lsn_of
from walbatch.core.fairness import size_of
from walbatch.core.splitting import Search
from walbatch.types import CutReason


class Parcel:
    """What is left of a failed batch, in the order in which it was cut. `tries`: how often it failed as a whole, in a row.

    `busy`: a part of its search is in flight. `count_max`: what a batch of it may hold.
    """

    __slots__ = ("busy", "count_max", "entries", "search", "tries")

    def __init__(
        self, entries: list[Entry], *, tries: int, search: Search | None = None, count_max: int | None = None
    ) -> None:
        self.entries = entries
        self.tries = tries
        self.search = search
        self.count_max = limits.BATCH_COUNT_MAX if count_max is None else count_max
        self.busy = False

    def __repr__(self) -> str:
        return f"<Parcel of {len(self)}, {self.tries} tries{f', {self.search!r}' if self.search else ''}>"

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def reason(self) -> CutReason:
        """Why a batch of it is cut."""
        return CutReason.RETRY if self.search is None else CutReason.SPLIT

    def take(self, count: int, bytes_max: int) -> tuple[list[Entry], int]:
        """The next batch of it, within `count` and `bytes_max`, and its bytes. One that is larger goes alone."""
        count = min(count, self.count_max)
        if self.search is not None:
            count = min(count, self.search.part(len(self.entries)))
            self.busy = True
        size = taken = 0
        for entry in self.entries[:count]:
            if taken and size + size_of(entry) > bytes_max:
                break
            size += size_of(entry)
            taken += 1
        batch, self.entries = self.entries[:taken], self.entries[taken:]
        return batch, size

    def put_back(self, entries: list[Entry]) -> None:
        """What was taken last is in front again."""
        self.entries[:0] = entries
        self.busy = False

    def insert(self, entry: Entry) -> None:
        """Add an operation where its LSN belongs, in a parcel in LSN order."""
        insort(self.entries, entry, key=lsn_of)

    def withdraw(self, lsns: Collection[int]) -> list[Entry]:
        """Take out those of `lsns` that are here."""
        return self._without([index for index, entry in enumerate(self.entries) if entry[0] in lsns])

    def withdraw_keys(self, keys: dict[bytes, int]) -> list[Entry]:
        """Take out what is younger than the LSN given for its key."""
        return self._without(
            [index for index, entry in enumerate(self.entries) if entry[0] > keys.get(entry[1], entry[0])]
        )

    def _without(self, indexes: list[int]) -> list[Entry]:
        out: list[Entry] = []
        for index in reversed(indexes):
            out.append(self.entries.pop(index))
            if self.search is not None:
                self.search.removed(index)
        out.reverse()
        return out
