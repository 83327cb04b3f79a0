"""The real clock, threads and chance behind the ports."""

from __future__ import annotations

import random
import secrets
import threading
import time
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
    """A flag on such a lock."""

    __slots__ = ("_condition", "_flag")

    def __init__(self) -> None:
        self._condition = RealCondition()
        self._flag = False

    def set(self) -> None:
        """Wake all waiters."""
        with self._condition:
            self._flag = True
            self._condition.notify_all()

    def is_set(self) -> bool:
        """Whether it is set."""
        return self._flag

    def wait(self, timeout_ns: int | None = None) -> bool:
        """Wait until set."""
        with self._condition:
            if not self._flag:
                self._condition.wait(timeout_ns)
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
        self._random = random.Random()

    def random_bytes(self, size: int) -> bytes:
        """From the system."""
        return secrets.token_bytes(size)

    def uniform(self) -> float:
        """In [0, 1)."""
        return self._random.random()
