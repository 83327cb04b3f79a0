"""The real clock, threads and chance behind the ports."""

from __future__ import annotations

import random
import threading
import time
from _thread import LockType, allocate_lock
from collections.abc import Callable
from typing import Any


class RealClock:
    """The machine's clocks."""

    def monotonic_ns(self) -> int:
        """CLOCK_MONOTONIC."""
        return time.monotonic_ns()

    def wall_ns(self) -> int:
        """CLOCK_REALTIME; for people only."""
        return time.time_ns()


def _seconds(timeout_ns: int | None) -> float | None:
    return None if timeout_ns is None else min(max(0, timeout_ns) / 1e9, threading.TIMEOUT_MAX)


_RLock: Any = type(threading.RLock())


class RealCondition(_RLock):  # type: ignore[misc]  # the interpreter's own lock type, which has no static name
    """A lock with waiting, with a timeout in ns.

    It *is* the interpreter's lock, rather than having one: entering and leaving a `with` block then runs no bytecode at which
    a signal handler could raise and leave it locked for ever.
    """

    def __init__(self) -> None:
        self._condition = condition = threading.Condition(self)
        self.notify = condition.notify
        self.notify_all = condition.notify_all

    def wait(self, timeout_ns: int | None = None) -> bool:
        """Release, wait, take again."""
        return self._condition.wait(_seconds(timeout_ns))

    def is_held(self) -> bool:
        """Whether the calling thread has taken it."""
        return bool(self._is_owned())


class RealEvent:
    """A flag, and a lock of its own for each thread that waits for it: who is woken need not queue for anything.

    Nothing is held between two bytecodes, so a signal handler's exception can leave nothing locked. Setting it again wakes once
    more whom an exception has cut off.
    """

    __slots__ = ("_flag", "_waiters")

    def __init__(self) -> None:
        self._flag = False
        self._waiters: list[LockType] = []

    def set(self) -> None:
        """Wake all waiters."""
        self._flag = True  # first: who comes from here on sees it
        for lock in tuple(self._waiters):
            try:  # noqa: SIM105 - suppress() takes four times as long
                lock.release()
            except RuntimeError:
                pass  # somebody did so before

    def is_set(self) -> bool:
        """Whether it is set."""
        return self._flag

    def wait(self, timeout_ns: int | None = None) -> bool:
        """Wait until set."""
        if self._flag:
            return True
        lock = allocate_lock()
        lock.acquire()
        self._waiters.append(lock)
        if self._flag:
            return True
        if timeout_ns is None:
            lock.acquire()
        elif not lock.acquire(timeout=min(max(0, timeout_ns) / 1e9, threading.TIMEOUT_MAX)):
            self._waiters.remove(lock)
        return self._flag


class RealThread:
    """A thread of the engine.

    It is a daemon so that an engine that was never closed cannot keep the process alive; the
    engine's exit hook closes it in order.
    """

    def __init__(self, name: str, target: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=target, name=name, daemon=True)
        self._thread.start()

    def join(self, timeout_ns: int | None = None) -> bool:
        """Wait for the end."""
        self._thread.join(_seconds(timeout_ns))
        return not self._thread.is_alive()

    def is_current(self) -> bool:
        """Whether the caller is this thread."""
        return threading.current_thread() is self._thread


class RealThreads:
    """Threads of the interpreter."""

    def condition(self) -> RealCondition:
        """A lock with waiting."""
        return RealCondition()

    def event(self) -> RealEvent:
        """A flag."""
        return RealEvent()

    def spawn(self, name: str, target: Callable[[], None]) -> RealThread:
        """Start a thread."""
        return RealThread(name, target)


class RealEntropy:
    """The system's randomness for identities; a private generator for jitter."""

    def __init__(self) -> None:
        self._system = random.SystemRandom()
        self._random = random.Random()

    def random_bytes(self, size: int) -> bytes:
        """From the system."""
        return self._system.randbytes(size)

    def uniform(self) -> float:
        """In [0, 1)."""
        return self._random.random()
