"""What waits behind something: operations of a key, a shard, or one by itself, until a time has come or a block is gone.

The idea needed to read it: a hold is a queue in LSN order with a name. It lets go from its front, up to the first operation
whose own time has not come, and nothing while it is blocked (by an operation that failed together with others, say).
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Collection, Iterator

from walbatch.core.entry import Entry, lsn_of
from walbatch.core.timetable import Timetable

Name = bytes | int | None
"""A key, the LSN of an operation that waits by itself, or None for a whole shard."""


class Holds:
    """The holds of one shard. `count`: the operations in them."""

    __slots__ = ("_blocks", "_lines", "_times", "_until", "count")

    def __init__(self) -> None:
        self._lines: dict[Name, deque[Entry]] = {}
        self._blocks: dict[Name, int] = {}
        self._until: dict[int, int] = {}
        # When the first operation of a hold may go.
        self._times: Timetable[Name] = Timetable()
        self.count = 0

    def __repr__(self) -> str:
        return f"<Holds of {self.count} operations under {len(self._lines)} names>"

    def __len__(self) -> int:
        return len(self._lines)

    def __contains__(self, name: Name) -> bool:
        return name in self._lines

    def __iter__(self) -> Iterator[Entry]:
        return (entry for line in self._lines.values() for entry in line)

    def wait(self, lsn: int, until_ns: int) -> None:
        """The operation may not go before this time, wherever it is."""
        self._until[lsn] = until_ns

    def waits(self, lsn: int) -> bool:
        """Whether the operation has a time."""
        return lsn in self._until

    def forget(self, lsn: int) -> None:
        """The operation is settled."""
        self._until.pop(lsn, None)

    def delayed(self, retried: Collection[int]) -> frozenset[int]:
        """LSNs in holds whose first operation waits for its time and not for a retry. O(operations in holds)."""
        return frozenset(
            entry[0] for line in self._lines.values()
            if line and line[0][0] in self._until and line[0][0] not in retried for entry in line
        )  # fmt: skip

    def put(self, name: Name, entry: Entry) -> None:
        """Add an operation where its LSN belongs."""
        line = self._lines.get(name)
        if line is None:
            line = self._lines[name] = deque()
        if not line or entry[0] > line[-1][0]:
            line.append(entry)
        else:
            insort(line, entry, key=lsn_of)
        if line[0] is entry and name not in self._blocks:
            self._times.set(name, self._until.get(entry[0], 0))
        self.count += 1

    def eldest(self, name: Name) -> int:
        """The lowest LSN in a hold; 0 if there is none."""
        line = self._lines.get(name)
        return line[0][0] if line else 0

    def stops(self, name: Name, lsn: int) -> bool:
        """Whether the operation would have to wait behind what is held under this name."""
        return name in self._blocks or 0 < self.eldest(name) < lsn

    def block(self, name: Name) -> None:
        """Let nothing go until it is unblocked as often."""
        self._blocks[name] = self._blocks.get(name, 0) + 1
        self._lines.setdefault(name, deque())
        self._times.discard(name)

    def unblock(self, name: Name) -> list[Entry]:
        """What may go for this reason, in LSN order."""
        self._blocks[name] -= 1
        if self._blocks[name]:
            return []
        del self._blocks[name]
        return self._let_go(name, -1)

    def release(self, now_ns: int) -> list[Entry]:
        """What may go since its time has come."""
        freed: list[Entry] = []
        for name in self._times.due(now_ns):
            freed += self._let_go(name, now_ns)
        return freed

    def hurry(self, lsns: Collection[int], now_ns: int) -> None:
        """None of these waits beyond `now_ns`."""
        for name, line in self._lines.items():
            for entry in line:
                if entry[0] in lsns and self._until.get(entry[0], now_ns) > now_ns:
                    self._until[entry[0]] = now_ns
            self._look_again(name, line)

    def _let_go(self, name: Name, now_ns: int) -> list[Entry]:
        """What may go from the front of a hold that may have changed."""
        freed: list[Entry] = []
        line = self._lines[name]
        while line and name not in self._blocks:
            until = self._until.get(line[0][0])
            if until is not None and until > now_ns:
                break
            if until is not None:
                del self._until[line[0][0]]
            freed.append(line.popleft())
        self.count -= len(freed)
        self._look(name, line)
        return freed

    def _look(self, name: Name, line: deque[Entry]) -> None:
        """A hold without operations and blocks is none; the first operation of another says when to look again."""
        if line or name in self._blocks:
            self._look_again(name, line)
        else:
            self._times.discard(name)
            del self._lines[name]

    def _look_again(self, name: Name, line: deque[Entry]) -> None:
        """When the first operation of a hold may go may have changed."""
        if name in self._blocks:
            self._times.discard(name)
        else:
            self._times.set(name, self._until.get(line[0][0], 0))

    def withdraw(self, lsns: Collection[int]) -> list[Entry]:
        """Take out those of `lsns` that are here. What they were in the way of goes with the next `release`."""
        found: list[Entry] = []
        for name, line in list(self._lines.items()):
            here = [entry for entry in line if entry[0] in lsns]
            if here:
                found += here
                left = self._lines[name] = deque(entry for entry in line if entry[0] not in lsns)
                self._look(name, left)
        self.count -= len(found)
        return found

    def first(self) -> int | None:
        """When `release` will let something go; None if time alone does not."""
        return self._times.first()
