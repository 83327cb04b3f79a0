"""Dead letters of an open store: how many there are, whether there is room for more, and their burial.

What is not here: why an operation is given up (`core.delivery`), and how letters are stored (behind `ports.StateStore`).

The idea needed to read it: a letter is durable before its operation counts as settled, so a crash in between finds both, and
the letter wins. At a bound nothing is given up any more: its shard waits, which health reports. Only what is older than the age
that somebody set makes room then, the oldest first, and no more of it than is needed: the wall clock may be wrong.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from walbatch import limits
from walbatch.errors import StorageError
from walbatch.ports import Clock, StateStore, Threads
from walbatch.types import DeadLetter


@dataclass(frozen=True, slots=True, kw_only=True)
class LetterSettings:
    """Bounds of the dead letters of a store. `age_ns` None: they are kept for ever."""

    count_max: int
    bytes_max: int
    age_ns: int | None


def letter_bytes(letter: DeadLetter) -> int:
    """What a letter counts for."""
    return len(letter.key) + len(letter.payload) + len(letter.error) + limits.OPERATION_OVERHEAD_BYTES


class DeadLetters:
    """The index of the dead letters. Safe from any thread; each change is durable when it returns."""

    def __init__(
        self, *, state: StateStore, threads: Threads, clock: Clock, settings: LetterSettings, letters: Iterable[DeadLetter]
    ) -> None:  # fmt: skip
        self._state = state
        self._clock = clock
        self._settings = settings
        # Guards all below, and is held while the state is written: burials wait for one another, nothing else waits here.
        self._guard = threads.condition()
        self._sizes = {letter.lsn: letter_bytes(letter) for letter in letters}
        self._died = {letter.lsn: letter.died_wall_ns for letter in letters}
        self._claimed: set[int] = set()

    def __repr__(self) -> str:
        return f"<DeadLetters {len(self._sizes)} of {self._settings.count_max}>"

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def bytes(self) -> int:
        """What all of them count for."""
        return sum(list(self._sizes.values()))

    def bury(self, letters: Sequence[DeadLetter]) -> bool:
        """Keep letters, all or none. Returns whether there was room; durable if so. Raises StorageError.

        Crash story: before the commit the operations are in the log and nothing is settled; after it the letters are found at
        the next opening, and keep their operations from being delivered.
        """
        with self._guard:
            if not self._make_room(len(letters), sum(map(letter_bytes, letters))):
                return False
            self._state.bury(letters)
            for letter in letters:
                self._sizes[letter.lsn] = letter_bytes(letter)
                self._died[letter.lsn] = letter.died_wall_ns
            return True

    def _make_room(self, count: int, size: int) -> bool:
        """Whether there is room for so much more, once what is too old has made as much of it as is needed, and no more."""
        settings = self._settings
        surplus_count = len(self._sizes) + count - settings.count_max
        surplus_bytes = sum(self._sizes.values()) + size - settings.bytes_max
        leaving: list[int] = []
        for lsn in self._too_old() if surplus_count > 0 or surplus_bytes > 0 else ():
            if surplus_count <= 0 and surplus_bytes <= 0:
                break
            leaving.append(lsn)
            surplus_count -= 1
            surplus_bytes -= self._sizes[lsn]
        if surplus_count > 0 or surplus_bytes > 0:
            return False
        if leaving:
            self._remove(leaving)
        return True

    def _too_old(self) -> list[int]:
        """Letters that were kept for as long as they should be, and that nobody is submitting again; the oldest first."""
        age_ns = self._settings.age_ns
        if age_ns is None:
            return []
        oldest_ns = self._clock.wall_ns() - age_ns
        old = (lsn for lsn, died_ns in self._died.items() if died_ns < oldest_ns and lsn not in self._claimed)
        return sorted(old, key=lambda lsn: (self._died[lsn], lsn))

    @contextlib.contextmanager
    def claimed(self, lsn: int) -> Iterator[bool]:
        """Whether the letter is there, for the caller alone to submit again: meanwhile nobody else may, nor drop it."""
        with self._guard:
            is_mine = lsn in self._sizes and lsn not in self._claimed
            if is_mine:
                self._claimed.add(lsn)
        try:
            yield is_mine
        finally:
            if is_mine:
                with self._guard:
                    self._claimed.discard(lsn)

    def remove(self, lsns: Collection[int]) -> int:
        """Drop letters, but for those that are being submitted again. Returns how many there were. Raises StorageError."""
        with self._guard:
            free = [lsn for lsn in lsns if lsn not in self._claimed]
            present = [lsn for lsn in free if lsn in self._sizes]
            self._remove(free)  # also what is damaged, and therefore not known
            return len(present)

    def remove_claimed(self, lsn: int) -> None:
        """Drop a letter that the caller has claimed and submitted again. Raises StorageError."""
        with self._guard:
            self._remove([lsn])

    def _remove(self, lsns: Sequence[int]) -> None:
        try:
            self._state.unbury(lsns)
        except StorageError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                self._forget(lsns)  # they may be there, and nobody counts on them
            raise
        self._forget(lsns)

    def _forget(self, lsns: Sequence[int]) -> None:
        for lsn in lsns:
            self._sizes.pop(lsn, None)
            self._died.pop(lsn, None)

    def holds(self, lsn: int) -> bool:
        """Whether there is a letter of this operation."""
        return lsn in self._sizes

    def read(self) -> list[DeadLetter]:
        """All of them, by LSN. Raises StorageError.

        Without those whose burial or removal failed: they may be there, and nobody counts on them.
        """
        with self._guard:
            return [letter for letter in self._state.load_letters()[0] if letter.lsn in self._sizes]
