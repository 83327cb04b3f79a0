"""Counting instead of timing: system calls, waits of threads, saves of the state, bytecodes, and memory blocks.

What is not here: how many there may be (the tests beside this).

The idea needed to read it: a figure of these is the same on every machine and on every run, so that a test can hold it. Calls are
counted where they leave the interpreter, in the module `os`, so that no change of what stands above goes unnoticed.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

import pytest

import walbatch as wb
from walbatch.runtime.clock import RealCondition, RealEvent, RealThreads
from walbatch.storage.checkpoint import LmdbState

WRITES: Final = ("write", "pwrite", "pwritev", "writev")
SYNCS: Final = ("fsync", "fdatasync")
READS: Final = ("read", "pread", "preadv", "readv")
NAMES: Final = ("open", "rename", "unlink", "mkdir", "truncate", "ftruncate", "posix_fallocate")

QUIET: Final = wb.Settings(
    timer_ms=60_000, checkpoint_ms=3_600_000, idle_stamp_ms=3_600_000, compress_bytes_min=None
)
"""Nothing happens because time passes, and no payload is made smaller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One system call. `place` is the folder of the store that it went to ("wal"), or "store" for its own."""

    name: str
    place: str
    size: int
    is_fill: bool = False
    """Whether it wrote nothing but zeros, and many: room for frames, not a frame."""


@dataclass(slots=True)
class SystemCalls:
    """The calls on a store's files since `start`, in their order. `before` is told of each and may wait."""

    root: Path
    calls: list[Call] = field(default_factory=list)
    before: Callable[[Call], None] = lambda _: None

    def start(self) -> None:
        """Forget what was counted."""
        self.calls.clear()

    def of(self, names: tuple[str, ...], place: str = "wal") -> list[Call]:
        """Those with one of these names, without the filling of room."""
        return [
            call
            for call in list(self.calls)
            if call.name in names and call.place == place and not call.is_fill
        ]

    @property
    def writes(self) -> int:
        """Writes to the log."""
        return len(self.of(WRITES))

    @property
    def syncs(self) -> int:
        """Syncs of the log's files, and of its directory."""
        return len(self.of(SYNCS))

    @property
    def reads(self) -> int:
        """Reads from the log."""
        return len(self.of(READS))

    @property
    def written_bytes(self) -> int:
        """To the log."""
        return sum(call.size for call in self.of(WRITES))

    @property
    def read_bytes(self) -> int:
        """From the log."""
        return sum(call.size for call in self.of(READS))

    def note(self, name: str, target: int | str, size: int, *, is_fill: bool) -> None:
        """One call, if it is on the store."""
        try:
            path = Path(os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target)
            parts = path.relative_to(self.root).parts
        except (OSError, ValueError):
            return
        call = Call(name=name, place=parts[0] if parts else "store", size=size, is_fill=is_fill)
        self.calls.append(call)
        self.before(call)


FILL_BYTES_MIN: Final = 4_096
"""No frame of these tests is that large and empty."""


def _wrap(name: str, real: Callable[..., Any], counted: SystemCalls) -> Callable[..., Any]:
    def call(target: Any, *rest: Any, **named: Any) -> Any:
        size, is_fill = 0, False
        if name in WRITES:
            buffers = rest[0] if name in {"pwritev", "writev"} else [rest[0]]
            size = sum(memoryview(one).nbytes for one in buffers)
            is_fill = size >= FILL_BYTES_MIN and not any(any(memoryview(one)) for one in buffers)
        if name in READS:
            answer = real(target, *rest, **named)
            counted.note(
                name, target, len(answer) if isinstance(answer, bytes) else int(answer), is_fill=False
            )
            return answer
        counted.note(name, target, size, is_fill=is_fill)
        return real(target, *rest, **named)

    return call


def count_system_calls(monkeypatch: pytest.MonkeyPatch, root: Path) -> SystemCalls:
    """Count from now on, until the test has ended, what is done to files below `root`."""
    counted = SystemCalls(root)
    for name in (*WRITES, *SYNCS, *READS, *NAMES):
        monkeypatch.setattr(os, name, _wrap(name, getattr(os, name), counted))
    return counted


# --- threads and the state -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Tally:
    """What went through ports."""

    waits: int = 0
    """Waits for conditions and events, by any thread. Each can cost two switches of threads."""
    saves: dict[str, int] = field(default_factory=dict)
    """Transactions on the state, by name."""


def counting_threads(tally: Tally) -> RealThreads:
    """The real threads, whose waits are counted."""

    class Condition(RealCondition):
        def wait(self, timeout_ns: int | None = None) -> bool:
            tally.waits += 1
            return super().wait(timeout_ns)

    class Event(RealEvent):
        def wait(self, timeout_ns: int | None = None) -> bool:
            tally.waits += not self.is_set()
            return super().wait(timeout_ns)

    class Threads(RealThreads):
        def condition(self) -> RealCondition:
            return Condition()

        def event(self) -> RealEvent:
            return Event()

    return Threads()


class CountingState:
    """A store's state, whose saves are counted."""

    def __init__(self, state: Any, tally: Tally) -> None:
        self._state = state
        self._tally = tally

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("save_", "bury", "cancel")):
            self._tally.saves[name] = self._tally.saves.get(name, 0) + 1
        return getattr(self._state, name)


def counting_environment(tally: Tally) -> wb.Environment:
    """The real machine, with what goes through it counted."""
    return wb.Environment(
        threads=counting_threads(tally),
        open_state=lambda path, store, quarantine: CountingState(
            LmdbState.open_for_engine(path, store, quarantine), tally
        ),
    )


# --- the interpreter -------------------------------------------------------------------------------------------------


@contextmanager
def counted_bytecodes() -> Iterator[list[int]]:
    """Count the bytecodes that threads run which begin in here, and this one. The sum stands in the list at the end."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        if event == "opcode":
            count += 1
        return trace

    before, before_in_threads = sys.gettrace(), threading.gettrace()
    found: list[int] = []
    threading.settrace(trace)
    sys.settrace(trace)
    try:
        yield found
    finally:
        sys.settrace(before)
        threading.settrace(before_in_threads)
        found.append(count)


@contextmanager
def counted_blocks() -> Iterator[list[int]]:
    """Count the blocks of memory that are held at the end, and were not at the beginning."""
    found: list[int] = []
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        at_first = sys.getallocatedblocks()
        yield found
        gc.collect()
        found.append(sys.getallocatedblocks() - at_first)
    finally:
        if was_enabled:
            gc.enable()
