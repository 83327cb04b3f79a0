"""What memory that runs short asks of the engine: smaller batches first, then nothing new.

Not here: how memory is measured (`storage.memory`), and who obeys (the dispatcher).

The idea needed to read it: each step is taken at its mark and given back well below it, so that a value that wavers at a mark
does not make the engine waver with it. Memory that walbatch does not hold does not fall because walbatch waits: who obeys
PAUSE must go on flushing, and must let in what it needs for that while its own queues are empty.
"""

from __future__ import annotations

import enum
from typing import Final

SHRINK_AT: Final = 0.80
SHRINK_UNTIL: Final = 0.75
PAUSE_AT: Final = 0.90
PAUSE_UNTIL: Final = 0.85

assert SHRINK_UNTIL < SHRINK_AT <= PAUSE_UNTIL < PAUSE_AT


class Pressure(enum.StrEnum):
    """How short memory is."""

    NONE = "none"
    SHRINK = "shrink"
    """Batches shrink, and nothing is read ahead."""
    PAUSE = "pause"
    """Nothing new is taken in until memory falls; what is queued is flushed."""

    def after(self, used: int, limit: int) -> Pressure:
        """What follows this when `used` of `limit` bytes are in use. A limit of 0 is none."""
        if limit <= 0:
            return Pressure.NONE
        share = used / limit
        if share >= PAUSE_AT or (self is Pressure.PAUSE and share >= PAUSE_UNTIL):
            return Pressure.PAUSE
        if share >= SHRINK_AT or (self is not Pressure.NONE and share >= SHRINK_UNTIL):
            return Pressure.SHRINK
        return Pressure.NONE
