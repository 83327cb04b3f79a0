"""What the failure of a crash test says besides the assertion: what was promised, not synced, and wrong with a backend.

What is not here: when a test fails (`crashing`).

The idea needed to read it: a check that fails after a crash shows the effect. The cause was before it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Final

from walbatch.testing.simulation.directory import Directory
from walbatch.testing.simulation.disk import Inode
from walbatch.testing.simulation.machine import Machine

UNSYNCED_SHOWN_MAX: Final = 8


class BackendFailures(logging.Filter):
    """Swallows what the engine logs (here that is thousands of times the same) but for the last failure of a backend."""

    last: logging.LogRecord | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        """Let nothing through."""
        if "will be tried again" in record.msg:
            self.last = record
        return False

    def __str__(self) -> str:
        return f"the last failure of a backend: {self.last.getMessage()}" if self.last else ""


def promises_shown(promises: Sequence[Any]) -> str:
    """The last few promises."""
    if not promises:
        return "nothing"
    shown = ", ".join(repr(value)[:60] for value in promises[-5:])
    return (
        f"1 promise: {shown}" if len(promises) == 1 else f"{len(promises)} promises, the last of them {shown}"
    )


def unsynced(machine: Machine) -> str:
    """What a power cut may take back."""
    found = list(_unsynced_below(machine.fs.root, ""))
    more = len(found) - UNSYNCED_SHOWN_MAX
    return ", ".join(found[:UNSYNCED_SHOWN_MAX]) + (f", and {more} more" if more > 0 else "") or "nothing"


def _unsynced_below(directory: Directory, path: str) -> Iterator[str]:
    names = sorted({op.target or op.name for op in directory.ops if not op.sure})
    if names:
        yield f"in {path or '/'} the name{'s' * (len(names) > 1)} {', '.join(names)}"
    for name, node in sorted(directory.view.items()):
        if not isinstance(node, Inode):
            yield from _unsynced_below(node, f"{path}/{name}")
        elif node.is_dirty:
            yield f"the content of {path}/{name}"


@contextlib.contextmanager
def quiet(failures: BackendFailures) -> Iterator[None]:
    """Nobody reads what the engine logs but `failures`."""
    logger = logging.getLogger("walbatch")
    logger.addFilter(failures)
    try:
        yield
    finally:
        logger.removeFilter(failures)
