"""Which calls of the file system and the state fail, with what, and how often; and who in the engine made them.

What is not here: what a failing call leaves behind (`filesystem`, `state`).
"""

from __future__ import annotations

import errno
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

SYNCS: Final = frozenset({"datasync", "sync_directory"})


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


@dataclass(frozen=True, slots=True, order=True)
class CallSite:
    """A place of the engine that calls a port: the kind of call, the source file below walbatch/, the function."""

    call: str
    source: str
    function: str

    def __str__(self) -> str:
        return f"{self.source} {self.function} {self.call}"


def call_site(call: str) -> CallSite:
    """Who of the engine is calling: the innermost frame of walbatch that is no part of its testing kit.

    Where the stand-in for the state works on files to be opened, that is one call of the port.
    """
    frame = sys._getframe(2)  # noqa: SLF001 - the documented way to the caller
    while not (source := _source(frame.f_code.co_filename)):
        if frame.f_code.co_name == "open_state":
            call = "open state"
        if frame.f_back is None:
            return CallSite(call, "", "")
        frame = frame.f_back
    return CallSite(call, source, frame.f_code.co_qualname.partition(".<locals>.")[0])


_PACKAGE: Final = __file__.rpartition("testing/")[0]


def _source(path: str) -> str:
    """A source file below walbatch/; empty for one of the testing kit, or of somebody else."""
    below = path.removeprefix(_PACKAGE)
    return "" if below == path or below.startswith("testing/") else below


@dataclass(slots=True)
class FaultPlan:
    """The faults of one run, and how many calls there were: a run without faults tells where faults can be put."""

    faults: tuple[Fault, ...] = ()
    calls: Counter[str] = field(default_factory=Counter)
    hits: int = 0
    """How many calls failed."""
    struck: Counter[int] = field(default_factory=Counter)
    """The same by errno."""
    syncs: int = 0
    """Syncs of files that succeeded, before the first sync that failed: what may be believed."""
    sync_failed: bool = False
    """Whether a sync has failed. Who opens the store again begins anew, and clears it."""
    sites: list[tuple[str, int, CallSite]] | None = None
    """Each call so far, with its number among those of its kind, and where it came from; None: nobody asks, which is faster."""
    _seen: Counter[int] = field(default_factory=Counter)

    def due(self, call: str, path: str) -> Fault | None:
        """Count a call; the fault that strikes it, if any."""
        self.calls[call] += 1
        if self.sites is not None:
            self.sites.append((call, self.calls[call], call_site(call)))
        struck: Fault | None = None
        for index, fault in enumerate(self.faults):
            if fault.call != call or fault.path not in path:
                continue
            self._seen[index] += 1
            if self._seen[index] == fault.number or (fault.forever and self._seen[index] > fault.number):
                struck = struck or fault
        if call in SYNCS:
            self.sync_failed = self.sync_failed or struck is not None
            self.syncs += call == "datasync" and not self.sync_failed
        if struck is not None:
            self.hits += 1
            self.struck[struck.error] += 1
        return struck

    def stop(self) -> None:
        """No call fails any more."""
        self.faults = ()


class _NoFaults(FaultPlan):
    """Nothing fails, and nothing is counted."""

    def due(self, call: str, path: str) -> Fault | None:
        """None."""
        return None


NO_FAULTS: Final = _NoFaults()
"""The plan of a file system that no process has open."""


def injected(error: int, path: str) -> OSError:
    """The error that the system would raise."""
    return OSError(error, f"{os.strerror(error)} (injected)", path)
