"""What is ready to go: one line in LSN order, or a line for each priority with fair shares between them.

What is not here: what waits (`holds`, and the parcels of `batcher`), and when to cut (`trigger`).

The idea needed to read it: `Line` is for operations of one priority, or of a shard in strict order: columns (`run`), and no look
at any operation.
`Lines` has a deque for each priority and, where keys keep their order, a chain for each key. Taking an operation takes its
key's eldest first, wherever that stands; what was taken out of the middle of a line is skipped when the line gets there.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import chain, filterfalse, islice
from typing import Final

from walbatch.core.entry import Entry, lsn_of, size_of, sizes_of
from walbatch.core.run import Run, runs_of
from walbatch.types import PRIORITY_MAX, PRIORITY_URGENT

LOW_SHARE: Final = 10
"""One operation in that many goes to a lower priority, while one waits: the oldest."""

_SLACK: Final = 64
_LONG: Final = 64
"""Operations of a run that is worth keeping as it came. Shorter ones are joined."""


def _first_lsn(run: Run) -> int:
    return run.lsns[0]


_COSTS: Final = [1 << (PRIORITY_MAX - priority) for priority in range(PRIORITY_MAX + 1)]
"""What an operation of each priority costs in virtual time: half of what one of the priority below does."""


class Line:
    """Ready operations in LSN order. `bytes` of keys and payloads; `urgent`: how many have an urgent priority.

    Runs one behind the other. Of the first, those before `_start` are gone; what stays of it is copied once half of it is gone, so
    that payloads which were taken do not stay in memory.
    """

    __slots__ = ("_count", "_gone_bytes", "_runs", "_start", "bytes", "urgent")

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._runs: deque[Run] = deque()
        self._start = 0
        self._gone_bytes = 0
        self._count = 0
        self.bytes = 0
        self.urgent = 0
        for run in runs_of(entries):
            self.extend(run)

    def __repr__(self) -> str:
        return f"<Line of {len(self)}, {self.urgent} urgent>"

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Entry]:
        return islice(chain.from_iterable(self._runs), self._start, None)

    @property
    def priority(self) -> int | None:
        """The first one's; None if there is none."""
        return self._runs[0].priority if self._runs else None

    @property
    def highest_lsn(self) -> int:
        """The LSN of the last one; 0 if there is none."""
        return self._runs[-1].lsns[-1] if self._runs else 0

    def add(self, entry: Entry) -> None:
        """Add the youngest one."""
        self.extend(Run.of(entry))

    def extend(self, run: Run) -> None:
        """Add the youngest ones."""
        runs, count = self._runs, len(run)
        if count >= _LONG:
            runs.append(run)
        elif runs and runs[-1].takes(run):
            runs[-1].join(run)
        else:
            runs.append(run if run.open else run.opened())
        self._count_in(run, count)

    def _count_in(self, run: Run, count: int) -> None:
        self._count += count
        self.bytes += run.bytes
        if run.priority >= PRIORITY_URGENT:
            self.urgent += count

    def add_back(self, entry: Entry) -> None:
        """Add one where its LSN belongs."""
        runs, run, lsn = self._runs, Run.of(entry), entry[0]
        self._settle_start()
        index = bisect_left(runs, lsn, key=_first_lsn)  # behind the last run that begins before it
        before = runs[index - 1] if index else None
        if before is not None and before.lsns[-1] > lsn:
            middle = bisect_left(before.lsns, lsn)
            runs[index - 1] = before.part(0, middle)
            runs.insert(index, before.part(middle, len(before)))
            runs.insert(index, run)
        elif before is not None and before.takes(run):
            before.join(run)
        else:
            runs.insert(index, run)
        self._count_in(run, 1)

    def _settle_start(self) -> None:
        """Nothing of the first run is gone."""
        if self._start:
            run = self._runs[0]
            self._runs[0] = run.part(self._start, len(run), run.bytes - self._gone_bytes)
            self._start = self._gone_bytes = 0

    def take(self, count: int, bytes_max: int) -> tuple[list[Run], int]:
        """Up to `count` from the front, at least one, within `bytes_max`, and their bytes. One that is larger goes alone."""
        taken: list[Run] = []
        runs, size = self._runs, 0
        while count and runs:
            run, start = runs[0], self._start
            stop = min(start + count, len(run))
            part = run if stop - start == len(run) else self._part(run, start, stop)
            if size + part.bytes > bytes_max:
                stop = start + part.count_within(0, stop - start, bytes_max - size)
                if stop == start and taken:
                    break
                stop = max(stop, start + 1)
                part = run.part(start, stop)
                count = stop - start  # it is full
            taken.append(part)
            size += part.bytes
            count -= stop - start
            self._count -= stop - start
            if run.priority >= PRIORITY_URGENT:
                self.urgent -= stop - start
            self._pass(run, stop, part.bytes)
        self.bytes -= size
        return taken, size

    def _part(self, run: Run, start: int, stop: int) -> Run:
        """A part of the first run. Its bytes are told by what is fewer: that part, or what stands behind it."""
        if (stop - start) * 2 < len(run) - start:
            return run.part(start, stop)
        return run.part(start, stop, run.bytes - self._gone_bytes - run.size_of(stop, len(run)))

    def _pass(self, run: Run, stop: int, size: int) -> None:
        """What stands in the first run before `stop` is gone, `size` bytes more of it than before."""
        if stop == len(run):
            self._runs.popleft()
            self._start = self._gone_bytes = 0
        else:
            self._start = stop
            self._gone_bytes += size
            if stop * 2 > len(run):
                self._settle_start()

    def withdraw(self, lsns: Collection[int]) -> list[Entry]:
        """Take out those of `lsns` that are here."""
        first, last = min(lsns, default=1), max(lsns, default=0)

        def may_be(run: Run) -> bool:
            return run.lsns[0] <= last and run.lsns[-1] >= first

        return self._withdraw(may_be, lambda entry: entry[0] in lsns)

    def withdraw_keys(self, keys: Mapping[bytes, int]) -> list[Entry]:
        """Take out what is younger than the LSN given for its key, in LSN order. One pass over the keys that are here."""
        return self._withdraw(
            lambda run: not keys.keys().isdisjoint(run.keys),
            lambda entry: entry[0] > keys.get(entry[1], entry[0]),
        )

    def _withdraw(self, may_be: Callable[[Run], bool], is_wanted: Callable[[Entry], bool]) -> list[Entry]:
        """Take out what is wanted, from those runs where any may be."""
        self._settle_start()
        found: list[Entry] = []
        kept: deque[Run] = deque()
        for run in self._runs:
            here = list(filter(is_wanted, run)) if may_be(run) else []
            if here:
                found += here
                kept.extend(runs_of(filterfalse(is_wanted, run)))
            else:
                kept.append(run)
        if found:
            self._runs = kept
            self._count -= len(found)
            self.bytes -= sizes_of(found)
            self.urgent -= sum(entry[3] >= PRIORITY_URGENT for entry in found)
        return found

    def oldest_ns(self) -> int:
        """When the first one arrived; 0 if there is none."""
        return self._runs[0].arrival_ns if self._runs else 0

    def lowest_lsn(self) -> int:
        """The LSN of the first one; 0 if there is none."""
        return self._runs[0].lsns[self._start] if self._runs else 0


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

    def extend(self, run: Run) -> None:
        """Add the youngest ones of their keys."""
        entries = list(run)
        line = self._line(run.priority)
        if line and entries[0][0] < line[-1][0]:
            self._ordered = False
        line.extend(entries)
        if self._keyed:
            chains = self._chains
            for entry in entries:
                chain = chains.get(entry[1])
                if chain is None:
                    chains[entry[1]] = deque((entry,))
                else:
                    chain.append(entry)
        self._count += len(entries)
        self.bytes += run.bytes
        if run.priority >= PRIORITY_URGENT:
            self.urgent += len(entries)

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
            self._spent[priority] += _COSTS[priority]
            self._run = run
            self._remove(entry)
        return taken, size

    def _choose(self) -> tuple[int, int]:
        """The priority whose turn it is, and how many a higher one has had in a row by then."""
        lines, spent = self._lines, self._spent
        if len(lines) == 1:
            return next(iter(lines)), 0
        bar = PRIORITY_URGENT if self.urgent else max(lines)
        if self._run >= LOW_SHARE - 1:
            lower = [priority for priority in lines if priority < bar]
            if lower:
                return min(lower, key=lambda priority: lines[priority][0][0]), 0
        chosen, least = -1, 0
        for priority in lines:
            cost = spent[priority] + _COSTS[priority]
            may_go = priority >= bar or not self.urgent
            if may_go and (chosen < 0 or cost < least or (cost == least and priority > chosen)):
                chosen, least = priority, cost
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
