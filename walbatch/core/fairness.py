"""What is ready to go: one line in LSN order, or a line for each priority with fair shares between them.

What is not here: what waits (`holds`, and the parcels of `batcher`), and when to cut (`trigger`).

The idea needed to read it: `Line` is for operations of one priority, or of a shard in strict order; it knows nothing but a deque.
`Lines` has a deque for each priority and, where keys keep their order, a chain for each key. Taking an operation takes its
key's eldest first, wherever that stands; what was taken out of the middle of a line is skipped when the line gets there.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from typing import Final

from walbatch.core.entry import Entry, lsn_of, size_of, sizes_of
from walbatch.types import PRIORITY_MAX, PRIORITY_URGENT

LOW_SHARE: Final = 10
"""One operation in that many goes to a lower priority, while one waits: the oldest."""

_SLACK: Final = 64


def _cost(priority: int) -> int:
    """What an operation costs in virtual time: half of what one of the priority below does."""
    return 1 << (PRIORITY_MAX - priority)


class Line(deque[Entry]):
    """Ready operations in LSN order. `bytes` of keys and payloads; `urgent`: how many have an urgent priority.

    A deque, so that its length costs nothing; what goes in and out past the methods here has to be counted by whoever does it.
    """

    __slots__ = ("bytes", "urgent")

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        super().__init__(entries)
        self.bytes = sizes_of(self)
        self.urgent = sum(entry[3] >= PRIORITY_URGENT for entry in self)

    def __repr__(self) -> str:
        return f"<Line of {len(self)}, {self.urgent} urgent>"

    def add(self, entry: Entry) -> None:
        """Add the youngest one."""
        self.append(entry)
        self.bytes += size_of(entry)
        self.urgent += entry[3] >= PRIORITY_URGENT

    def add_back(self, entry: Entry) -> None:
        """Add one where its LSN belongs."""
        if self and entry[0] < self[0][0]:
            self.appendleft(entry)
        else:
            insort(self, entry, key=lsn_of)
        self.bytes += size_of(entry)
        self.urgent += entry[3] >= PRIORITY_URGENT

    def take(self, count: int, bytes_max: int) -> tuple[list[Entry], int]:
        """Up to `count` from the front, at least one, within `bytes_max`, and their bytes. One that is larger goes alone."""
        entry = self.popleft()
        taken = [entry]
        size = len(entry[1]) + len(entry[2])
        if count > 1:
            for _ in range(min(count - 1, len(self))):
                entry = self[0]
                more = size + len(entry[1]) + len(entry[2])
                if more > bytes_max:
                    break
                size = more
                taken.append(self.popleft())
        self.bytes -= size
        if self.urgent:
            self.urgent -= sum(entry[3] >= PRIORITY_URGENT for entry in taken)
        return taken, size

    def withdraw(self, lsns: Collection[int]) -> list[Entry]:
        """Take out those of `lsns` that are here."""
        found = _withdraw(self, lsns)
        self.bytes -= sizes_of(found)
        self.urgent -= sum(entry[3] >= PRIORITY_URGENT for entry in found)
        return found

    def oldest_ns(self) -> int:
        """When the first one arrived; 0 if there is none."""
        return self[0][4] if self else 0

    def lowest_lsn(self) -> int:
        """The LSN of the first one; 0 if there is none."""
        return self[0][0] if self else 0


class Lines:
    """Ready operations of several priorities; `keyed`: those of one key leave in LSN order.

    Shares: each priority has twice the share of the one below it, by virtual time (A. Parekh, R. Gallager, "A Generalized
    Processor Sharing Approach", 1993, with operations as the unit). Urgent ones go before all others. After nine of
    a higher priority the next is the oldest of a lower one, if any waits: of those that are not urgent while urgent ones
    are there, else of those below the highest.
    """

    __slots__ = (
        "_chains",
        "_clock",
        "_count",
        "_gone",
        "_keyed",
        "_lines",
        "_ordered",
        "_run",
        "_spent",
        "bytes",
        "urgent",
    )

    def __init__(self, entries: Iterable[Entry], *, keyed: bool) -> None:
        self._keyed = keyed
        self._lines: dict[int, deque[Entry]] = {}
        self._chains: dict[bytes, deque[Entry]] = {}
        self._gone: set[int] = set()
        self._spent = [0] * (PRIORITY_MAX + 1)
        self._clock = 0
        self._run = 0
        # Whether each line is in LSN order: an operation that was fetched ahead of its turn may break it.
        self._ordered = True
        self._count = 0
        self.bytes = 0
        self.urgent = 0
        for entry in entries:
            self.add(entry)

    def __repr__(self) -> str:
        return f"<Lines of {len(self)}, {self.urgent} urgent, priorities {sorted(self._lines)}>"

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Entry]:
        return (entry for line in self._lines.values() for entry in line if entry[0] not in self._gone)

    @property
    def is_uniform(self) -> bool:
        """Whether all have one priority: a `Line` would do."""
        return len(self._lines) < 2  # noqa: PLR2004 - one, or none at all

    def add(self, entry: Entry) -> None:
        """Add one, the youngest of its key."""
        line = self._line(entry[3])
        if line and entry[0] < line[-1][0]:
            self._ordered = False
        line.append(entry)
        if self._keyed:
            chain = self._chains.get(entry[1])
            if chain is None:
                self._chains[entry[1]] = deque((entry,))
            else:
                chain.append(entry)
        self._count_in(entry)

    def add_back(self, entry: Entry) -> None:
        """Add one where its LSN belongs."""
        if entry[0] in self._gone:
            self._gone.remove(entry[0])
        else:
            line = self._line(entry[3])
            if line and entry[0] < line[0][0]:
                line.appendleft(entry)
            else:
                insort(line, entry, key=lsn_of)
        if self._keyed:
            insort(self._chains.setdefault(entry[1], deque()), entry, key=lsn_of)
        self._count_in(entry)

    def _line(self, priority: int) -> deque[Entry]:
        """The line of a priority. One that was empty has no credit from the time when it was."""
        line = self._lines.get(priority)
        if line is None:
            line = self._lines[priority] = deque()
            self._spent[priority] = max(self._spent[priority], self._clock)
        return line

    def _count_in(self, entry: Entry) -> None:
        self._count += 1
        self.bytes += size_of(entry)
        self.urgent += entry[3] >= PRIORITY_URGENT

    def take(self, count: int, bytes_max: int) -> tuple[list[Entry], int]:
        """Up to `count` in the order in which they are due, within `bytes_max`, and their bytes. One that is larger goes alone."""
        taken: list[Entry] = []
        size = 0
        while self._count and len(taken) < count:
            priority, run = self._choose()
            entry = self._lines[priority][0]
            if self._keyed:
                entry = self._chains[entry[1]][0]
            more = size + size_of(entry)
            if more > bytes_max and taken:
                break
            size = more
            taken.append(entry)
            self._clock = self._spent[priority]
            self._spent[priority] += _cost(priority)
            self._run = run
            self._remove(entry)
        return taken, size

    def _choose(self) -> tuple[int, int]:
        """The priority whose turn it is, and how many a higher one has had in a row by then."""
        lines = self._lines
        if len(lines) == 1:
            return next(iter(lines)), 0
        bar = PRIORITY_URGENT if self.urgent else max(lines)
        lower = [priority for priority in lines if priority < bar]
        if lower and self._run >= LOW_SHARE - 1:
            return min(lower, key=lambda priority: lines[priority][0][0]), 0
        pool = [priority for priority in lines if priority >= bar] if self.urgent else lines
        chosen = min(pool, key=lambda priority: (self._spent[priority] + _cost(priority), -priority))
        return chosen, 0 if chosen < bar else self._run + 1

    def _remove(self, entry: Entry) -> None:
        """Take out an entry that is here."""
        lsn, key, _, priority, _, _ = entry
        line = self._lines[priority]
        self._gone.add(lsn)
        self._trim(priority, line)
        if self._keyed:
            chain = self._chains[key]
            if chain[0] is entry:
                chain.popleft()
            else:
                chain.remove(entry)
            if not chain:
                del self._chains[key]
        self._count -= 1
        self.bytes -= size_of(entry)
        self.urgent -= priority >= PRIORITY_URGENT
        if len(self._gone) > self._count + _SLACK:
            self._sweep()

    def _trim(self, priority: int, line: deque[Entry]) -> None:
        """A line begins with an entry that is here, or is no more."""
        gone = self._gone
        while line and line[0][0] in gone:
            gone.remove(line.popleft()[0])
        if not line:
            del self._lines[priority]

    def _sweep(self) -> None:
        """Forget what is gone: its payloads would stay in memory as long as the line."""
        gone = self._gone
        self._lines = {
            priority: deque(entry for entry in line if entry[0] not in gone)
            for priority, line in self._lines.items()
        }
        self._gone = set()

    def withdraw(self, lsns: Collection[int]) -> list[Entry]:
        """Take out those of `lsns` that are here."""
        wanted = set(lsns) - self._gone
        found = [
            entry for line in self._lines.values() for entry in _find(line, wanted, ordered=self._ordered)
        ]
        for entry in found:
            self._remove(entry)
        return found

    def withdraw_key(self, key: bytes, above_lsn: int) -> list[Entry]:
        """Take out the operations of a key that are younger than `above_lsn`, in LSN order."""
        found = [entry for entry in self._chains.get(key, ()) if entry[0] > above_lsn]
        for entry in reversed(found):
            self._remove(entry)
        return found

    def oldest_ns(self) -> int:
        """When the first one of a line arrived, at the earliest; 0 if there is none."""
        return min((line[0][4] for line in self._lines.values()), default=0)

    def lowest_lsn(self) -> int:
        """The lowest LSN at the front of a line; 0 if there is none."""
        return min((line[0][0] for line in self._lines.values()), default=0)


def _find(line: deque[Entry], lsns: Collection[int], *, ordered: bool) -> list[Entry]:
    """Those of `lsns` that are in a line: by bisection for a few, in one pass for many, or where the line is out of order."""
    if not ordered or len(lsns) * _SLACK > len(line):
        return [entry for entry in line if entry[0] in lsns]
    indexes = ((lsn, bisect_left(line, lsn, key=lsn_of)) for lsn in sorted(lsns))
    return [line[index] for lsn, index in indexes if index < len(line) and line[index][0] == lsn]


def _withdraw(line: deque[Entry], lsns: Collection[int]) -> list[Entry]:
    """Take those of `lsns` out of a line."""
    found = _find(line, lsns, ordered=True)
    if len(found) == 1:
        line.remove(found[0])
    elif found:
        kept = [entry for entry in line if entry[0] not in lsns]
        line.clear()
        line.extend(kept)
    return found
