"""Dead letters of an open store: how many there are, whether there is room for more, and their burial.

What is not here: why an operation is given up (`core.delivery`), and how letters are stored (behind `ports.StateStore`).

The idea needed to read it: a letter is durable before its operation counts as settled, so a crash in between finds both, and
the letter wins. At a bound nothing is given up any more: its shard waits, which health reports; nothing is dropped for room.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from walbatch import limits
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
        # Guards both below, and is held while the state is written: burials wait for one another, nothing else waits here.
        self._guard = threads.condition()
        self._sizes = {letter.lsn: letter_bytes(letter) for letter in letters}
        self._died = {letter.lsn: letter.died_wall_ns for letter in letters}

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
            self._drop_old()
            size = sum(map(letter_bytes, letters))
            settings = self._settings
            if (
                len(self._sizes) + len(letters) > settings.count_max
                or sum(self._sizes.values()) + size > settings.bytes_max
            ):
                return False
            self._state.bury(letters)
            for letter in letters:
                self._sizes[letter.lsn] = letter_bytes(letter)
                self._died[letter.lsn] = letter.died_wall_ns
            return True

    def _drop_old(self) -> None:
        """What has been kept for as long as it should be makes room."""
        age_ns = self._settings.age_ns
        if age_ns is None:
            return
        oldest = self._clock.wall_ns() - age_ns
        old = [lsn for lsn, died in self._died.items() if died < oldest]
        if old:
            self._remove(old)

    def remove(self, lsns: Collection[int]) -> int:
        """Drop letters. Returns how many there were. Raises StorageError."""
        with self._guard:
            present = [lsn for lsn in lsns if lsn in self._sizes]
            self._remove(list(lsns))  # also what is damaged, and therefore not known
            return len(present)

    def _remove(self, lsns: Sequence[int]) -> None:
        self._state.unbury(lsns)
        for lsn in lsns:
            self._sizes.pop(lsn, None)
            self._died.pop(lsn, None)

    def holds(self, lsn: int) -> bool:
        """Whether there is a letter of this operation."""
        return lsn in self._sizes

    def read(self) -> list[DeadLetter]:
        """All of them, by LSN. Raises StorageError."""
        with self._guard:
            return self._state.load_letters()[0]
