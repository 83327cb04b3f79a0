"""Operations that stand one behind the other, as columns: what a queue keeps instead of a tuple for each.

What is not here: operations by themselves (`entry`), and the order in which they go (`fairness`).

The idea needed to read it: what came together has one priority and one time of arrival, so three columns say all of it. A batch is
slices of columns; an operation becomes an entry only where somebody has to look at it by itself.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, repeat
from operator import add, itemgetter
from typing import Any, Final

from walbatch.core.entry import Entry
from walbatch.types import NO_OPTIONS, Options

_MANY: Final = 2


class Run:
    """Operations in LSN order with the same priority and arrival. `bytes` of keys and payloads.

    `options` has one for each of them, or none at all. An `open` one owns its columns, and may grow; of others nobody changes any.
    """

    __slots__ = ("arrival_ns", "bytes", "keys", "lsns", "open", "options", "payloads", "priority")

    def __init__(
        self, lsns: Sequence[int], keys: Sequence[bytes], payloads: Sequence[bytes], priority: int, arrival_ns: int, *,
        options: Sequence[Options] = (), size: int | None = None,
    ) -> None:  # fmt: skip
        """`size`: its bytes, where they are known."""
        self.lsns = lsns
        self.keys = keys
        self.payloads = payloads
        self.priority = priority
        self.arrival_ns = arrival_ns
        self.options = options
        self.bytes = sum(map(len, keys)) + sum(map(len, payloads)) if size is None else size
        self.open = False

    @classmethod
    def of(cls, entry: Entry) -> Run:
        """An open one of a single operation."""
        lsn, key, payload, priority, arrival_ns, options = entry
        listed = [] if options is NO_OPTIONS else [options]
        run = cls([lsn], [key], [payload], priority, arrival_ns, options=listed, size=len(key) + len(payload))
        run.open = True
        return run

    def __repr__(self) -> str:
        return f"<Run of {len(self)} from lsn {self.lsns[0]}, priority {self.priority}>"

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[Entry]:
        return zip(
            self.lsns, self.keys, self.payloads, repeat(self.priority), repeat(self.arrival_ns), self.options or repeat(NO_OPTIONS),
            strict=False,
        )  # fmt: skip

    def takes(self, other: Run) -> bool:
        """Whether the operations of another, all younger, may join these."""
        return (
            self.open
            and self.priority == other.priority
            and self.arrival_ns == other.arrival_ns
            and bool(self.options) == bool(other.options)
        )

    def join(self, other: Run) -> None:
        """Add the operations of another that this one takes."""
        self.lsns.extend(other.lsns)  # type: ignore[attr-defined]  # an open one has lists
        self.keys.extend(other.keys)  # type: ignore[attr-defined]
        self.payloads.extend(other.payloads)  # type: ignore[attr-defined]
        self.options.extend(other.options)  # type: ignore[attr-defined]
        self.bytes += other.bytes

    def opened(self) -> Run:
        """The same, with columns of its own."""
        run = Run(
            list(self.lsns), list(self.keys), list(self.payloads), self.priority, self.arrival_ns, options=list(self.options),
            size=self.bytes,
        )  # fmt: skip
        run.open = True
        return run

    def part(self, start: int, stop: int, size: int | None = None) -> Run:
        """The operations from index `start` to before `stop`. `size`: their bytes, where they are known."""
        return Run(
            self.lsns[start:stop], self.keys[start:stop], self.payloads[start:stop], self.priority, self.arrival_ns,
            options=self.options[start:stop], size=size,
        )  # fmt: skip

    def size_of(self, start: int, stop: int) -> int:
        """The bytes of a part."""
        return sum(map(len, self.keys[start:stop])) + sum(map(len, self.payloads[start:stop]))

    def count_within(self, start: int, stop: int, bytes_max: int, each: int = 0) -> int:
        """How many operations from index `start` to before `stop` fit in so many bytes, with `each` bytes more for each."""
        sizes = map(add, map(len, self.keys[start:stop]), map(len, self.payloads[start:stop]))
        if each:
            sizes = map(add, sizes, repeat(each))
        return bisect_right(list(accumulate(sizes)), bytes_max)


def runs_of(entries: Iterable[Entry]) -> Iterator[Run]:
    """Entries in LSN order as few runs."""
    last: Run | None = None
    for entry in entries:
        run = Run.of(entry)
        if last is not None and last.takes(run):
            last.join(run)
        else:
            if last is not None:
                yield last
            last = run
    if last is not None:
        yield last


def dealt(run: Run, hands: Sequence[int], count: int) -> dict[int, Run]:
    """A run without options, divided: `hands` says for each operation which of `count` runs it goes to. Empty ones are left out."""
    indexes: list[list[int]] = [[] for _ in range(count)]
    give = [hand.append for hand in indexes]
    for index, hand in enumerate(hands):
        give[hand](index)
    return {hand: _picked(run, chosen) for hand, chosen in enumerate(indexes) if chosen}


def _picked(run: Run, indexes: list[int]) -> Run:
    """The operations of these indexes."""
    if len(indexes) == len(run):
        return run
    if len(indexes) < _MANY:
        return run.part(indexes[0], indexes[0] + 1)
    pick: Callable[[Any], tuple[Any, ...]] = itemgetter(*indexes)
    return Run(pick(run.lsns), pick(run.keys), pick(run.payloads), run.priority, run.arrival_ns)
