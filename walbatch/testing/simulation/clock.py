"""Virtual time, and chance that repeats.

What is not here: who waits until when (`scheduler`).

The idea needed to read it: nothing sleeps. Time stands still while a thread can run (each reading moves it by a hair, so that
two readings differ), and jumps to the next deadline when all of them wait.
"""

from __future__ import annotations

import random
from typing import Final

START_NS: Final = 1_000_000_000
WALL_START_NS: Final = 1_700_000_000_000_000_000

READING_NS: Final = 100
"""What one reading of the clock costs."""


class ManualClock:
    """Implements `ports.Clock`. It moves when it is told to."""

    def __init__(self, *, start_ns: int = START_NS, wall_ns: int = WALL_START_NS) -> None:
        self.now_ns = start_ns
        self.wall_offset_ns = wall_ns - start_ns
        self._lowest_offset_ns = self._highest_offset_ns = self.wall_offset_ns

    def __repr__(self) -> str:
        return f"<ManualClock at {self.now_ns / 1e9:.6f} s>"

    def monotonic_ns(self) -> int:
        """The present moment."""
        self.now_ns += READING_NS
        return self.now_ns

    def wall_ns(self) -> int:
        """Wall time, which `jump_wall` moves either way."""
        return self.now_ns + self.wall_offset_ns

    def advance(self, by_ns: int) -> None:
        """Let time pass."""
        assert by_ns >= 0, "monotonic time never goes back"
        self.now_ns += by_ns

    def jump_wall(self, by_ns: int) -> None:
        """Set the wall clock forward or back; monotonic time does not notice."""
        self.wall_offset_ns += by_ns
        self._lowest_offset_ns = min(self._lowest_offset_ns, self.wall_offset_ns)
        self._highest_offset_ns = max(self._highest_offset_ns, self.wall_offset_ns)

    @property
    def wall_span_ns(self) -> tuple[int, int]:
        """The earliest and the latest wall time that it may be for somebody who has not noticed every jump so far."""
        return self.now_ns + self._lowest_offset_ns, self.now_ns + self._highest_offset_ns


class SeededEntropy:
    """Implements `ports.Entropy`: the same seed gives the same identities, salts and jitter."""

    def __init__(self, seed: object) -> None:
        self._random = random.Random(f"entropy {seed}")

    def random_bytes(self, size: int) -> bytes:
        """The next bytes."""
        return self._random.randbytes(size)

    def uniform(self) -> float:
        """In [0, 1)."""
        return self._random.random()
