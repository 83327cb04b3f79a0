"""The real clock, threads and chance behind the ports."""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections.abc import Callable


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


class RealEvent:
    """threading.Event with a timeout in ns."""

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        """Wake all waiters."""
        self._event.set()

    def is_set(self) -> bool:
        """Whether it is set."""
        return self._event.is_set()

    def wait(self, timeout_ns: int | None = None) -> bool:
        """Wait until set."""
        return self._event.wait(_seconds(timeout_ns))


class RealCondition:
    """threading.Condition over a plain lock, with a timeout in ns."""

    __slots__ = ("_condition", "notify", "notify_all")

    def __init__(self) -> None:
        self._condition = condition = threading.Condition(threading.Lock())
        self.notify = condition.notify
        self.notify_all = condition.notify_all

    def __enter__(self) -> None:
        self._condition.__enter__()

    def __exit__(self, *exc: object) -> None:
        self._condition.__exit__(None, None, None)

    def wait(self, timeout_ns: int | None = None) -> bool:
        """Release, wait, take again."""
        return self._condition.wait(_seconds(timeout_ns))


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
