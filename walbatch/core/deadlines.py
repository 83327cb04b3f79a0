"""The deadlines of one shard's operations.

What is not here: what becomes of an operation that has missed its deadline (`batcher` takes it out).

The idea needed to read it: a deadline may pass while its operation cannot be taken out, since it is in flight or beyond the limit.
It was *missed* then, and is looked at again when the operation can be taken out.
"""

from __future__ import annotations

from collections.abc import Iterable

from walbatch.core.timetable import Timetable


class Deadlines:
    """Deadlines by LSN. Without any, it is false."""

    __slots__ = ("_missed", "_times")

    def __init__(self) -> None:
        self._times: Timetable[int] = Timetable()
        self._missed: set[int] = set()

    def __repr__(self) -> str:
        return f"<Deadlines of {len(self._times)} operations, {len(self._missed)} more were missed>"

    def __len__(self) -> int:
        return len(self._times) + len(self._missed)

    def set(self, lsn: int, deadline_ns: int) -> None:
        """The operation must not be delivered after this time."""
        self._times.set(lsn, deadline_ns)

    def first(self) -> int | None:
        """The earliest deadline that has not been looked at; None if there is none."""
        return self._times.first()

    def due(self, now_ns: int) -> list[int]:
        """Operations whose deadline has passed, each once: until `look_again`, for those of them that were `missed`."""
        return self._times.due(now_ns)

    def missed(self, lsns: Iterable[int]) -> None:
        """The deadlines of these have passed, and they cannot be taken out now."""
        self._missed.update(lsns)

    def look_again(self, lsn: int) -> None:
        """This one can be taken out now."""
        if lsn in self._missed:
            self._missed.remove(lsn)
            self._times.set(lsn, 0)

    def forget(self, lsns: Iterable[int]) -> None:
        """These are settled."""
        for lsn in lsns:
            self._times.discard(lsn)
            self._missed.discard(lsn)
