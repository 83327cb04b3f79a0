"""Which calls of the file system fail, with what, and how often.

What is not here: what a failing call leaves behind (`filesystem`).
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """The `number`-th call (from 1) of kind `call` whose path contains `path` fails with `error`.

    With `forever`, so do all later ones. With ENOSPC and EDQUOT, a write is short first.
    """

    call: str
    number: int = 1
    error: int = errno.EIO
    forever: bool = False
    path: str = ""

    def __str__(self) -> str:
        how = "from call" if self.forever else "at call"
        return f"{self.call} fails {how} {self.number} with {errno.errorcode[self.error]}"


@dataclass(slots=True)
class FaultPlan:
    """The faults of one run, and how many calls there were: a run without faults tells where faults can be put."""

    faults: tuple[Fault, ...] = ()
    calls: Counter[str] = field(default_factory=Counter)
    hits: int = 0
    """How many calls failed."""
    _seen: Counter[int] = field(default_factory=Counter)

    def due(self, call: str, path: str) -> Fault | None:
        """Count a call; the fault that strikes it, if any."""
        self.calls[call] += 1
        struck: Fault | None = None
        for index, fault in enumerate(self.faults):
            if fault.call != call or fault.path not in path:
                continue
            self._seen[index] += 1
            if self._seen[index] == fault.number or (fault.forever and self._seen[index] > fault.number):
                struck = struck or fault
        self.hits += struck is not None
        return struck

    def stop(self) -> None:
        """No call fails any more."""
        self.faults = ()


def injected(error: int, path: str) -> OSError:
    """The error that the system would raise."""
    return OSError(error, f"{os.strerror(error)} (injected)", path)
