"""Names with a time each: which of them have come, and which comes first.

The idea needed to read it: a heap of (time, name) that may hold outdated rows, and a dictionary that says which are true.
The heap is made anew before outdated rows outnumber the others, so that memory stays O(names).
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from itertools import count as counter
from typing import Final, Generic, TypeVar

Name = TypeVar("Name", bound=Hashable)

_SLACK: Final = 64


class Timetable(Generic[Name]):
    """Each name has one time at most. `set` and `due` are O(log names)."""

    __slots__ = ("_heap", "_tie", "_times")

    def __init__(self) -> None:
        self._times: dict[Name, int] = {}
        self._heap: list[tuple[int, int, Name]] = []
        self._tie = counter()

    def __repr__(self) -> str:
        return f"<Timetable of {len(self._times)}, first {self.first()}>"

    def __len__(self) -> int:
        return len(self._times)

    def __iter__(self) -> Iterator[Name]:
        return iter(self._times)

    def get(self, name: Name) -> int | None:
        """The time of `name`; None if it has none."""
        return self._times.get(name)

    def set(self, name: Name, time_ns: int) -> None:
        """The time of `name`, whatever it was before."""
        self._times[name] = time_ns
        heapq.heappush(self._heap, (time_ns, next(self._tie), name))
        if len(self._heap) > 2 * len(self._times) + _SLACK:
            self._heap = [(time, next(self._tie), name) for name, time in self._times.items()]
            heapq.heapify(self._heap)

    def discard(self, name: Name) -> None:
        """`name` has no time any more."""
        self._times.pop(name, None)

    def first(self) -> int | None:
        """The earliest time; None without names."""
        heap = self._heap
        while heap and self._times.get(heap[0][2]) != heap[0][0]:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def due(self, now_ns: int) -> list[Name]:
        """Take out the names whose time has come, earliest first."""
        names: list[Name] = []
        while self._heap and self._heap[0][0] <= now_ns:
            time, _, name = heapq.heappop(self._heap)
            if self._times.get(name) == time:
                del self._times[name]
                names.append(name)
        return names
