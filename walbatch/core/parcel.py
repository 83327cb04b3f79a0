"""Operations that failed together and come back together.

What is not here: what waits behind them (`places`).

The idea needed to read it: a parcel goes again as a batch of its own, or in parts from its front: while a culprit is searched for
in it, where it was too large, or where a batch may hold less than it did.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Collection, Iterator

from walbatch import limits
from walbatch.core.entry import Entry, lsn_of, size_of
from walbatch.core.fairness import LOW_SHARE
from walbatch.core.splitting import Search
from walbatch.core.timetable import Timetable
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

    def answered(self, count: int, *, isolated: bool = False) -> None:
        """A batch of it, of `count` operations, has its answer. `isolated`: it was one that failed alone."""
        self.busy = False
        if self.search is None:
            return
        if isolated:
            self.search.isolated()
        else:
            self.search.passed(count)

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


class Parcels:
    """The parcels of a shard, false without any: those in `front` go before what is ready, the others wait for their time.

    `blocking`: a parcel that waits holds up the shard: it stays in front, and nothing goes before `blocked_until_ns`.
    """

    __slots__ = ("_overtaken", "_waiting", "blocked_until_ns", "blocking", "front")

    def __init__(self, *, blocking: bool) -> None:
        self.blocking = blocking
        self.blocked_until_ns = 0
        self.front: deque[Parcel] = deque()
        self._waiting: Timetable[Parcel] = Timetable()
        # Batches with urgent operations that went before a parcel, in a row.
        self._overtaken = 0

    def __repr__(self) -> str:
        return f"<Parcels: {len(self.front)} in front, {len(self._waiting)} waiting>"

    def __len__(self) -> int:
        return len(self.front) + len(self._waiting)

    def __iter__(self) -> Iterator[Parcel]:
        return iter([*self.front, *self._waiting])

    def first_ns(self) -> int | None:
        """When time alone will let one go; 0 if one may go already; None if it will not."""
        return 0 if any(not parcel.busy for parcel in self.front) else self._waiting.first()

    def until_ns(self, parcel: Parcel) -> int | None:
        """How long a parcel waits; None if it does not."""
        return self._waiting.get(parcel)

    def release(self, now_ns: int) -> None:
        """Let go of what has waited long enough."""
        if now_ns >= self.blocked_until_ns:
            self.blocked_until_ns = 0
        self.front.extend(self._waiting.due(now_ns))

    def hurry(self, now_ns: int) -> None:
        """None waits beyond `now_ns`."""
        self.blocked_until_ns = min(self.blocked_until_ns, now_ns)
        for parcel in list(self._waiting):
            self._waiting.set(parcel, now_ns)

    def next(self, *, urgent: bool) -> Parcel | None:
        """The parcel that the next batch is taken from; None: it is taken from what is ready, some of which may be `urgent`."""
        for parcel in self.front:
            if not parcel.busy:
                return None if urgent and not self.blocking and self._overtaken < LOW_SHARE - 1 else parcel
        return None

    def took(self, parcel: Parcel | None) -> None:
        """A batch was taken from this parcel, or from what is ready."""
        self._overtaken = self._overtaken + 1 if parcel is None and self.front else 0
        if parcel is not None and not parcel.entries:
            self.front.remove(parcel)

    def wait(self, parcel: Parcel, until_ns: int) -> None:
        """A parcel goes after this time: until then the shard waits with it, or what it holds up, or nothing."""
        if self.blocking:
            self.put_in_front(parcel)
            self.blocked_until_ns = max(self.blocked_until_ns, until_ns)
            return
        if parcel in self.front:
            self.front.remove(parcel)
        self._waiting.set(parcel, until_ns)

    def put_in_front(self, parcel: Parcel) -> None:
        """A parcel is the next one to go, but for one that is there already."""
        if parcel not in self.front:
            self.front.appendleft(parcel)

    def look(self, parcel: Parcel) -> None:
        """A parcel without operations is none."""
        if parcel.entries:
            return
        if parcel in self.front:
            self.front.remove(parcel)
        self._waiting.discard(parcel)
