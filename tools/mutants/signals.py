"""Signals: a handler that raises in the middle of a submit.

What is not here: what a caller does then (`probes`), and signals of the real system.

The idea needed to read it: the handler runs in the thread of the caller, between any two bytecodes. It matters where that thread
leads a commit; so it raises there, right before or after a call of the disk, or when a lock was given back.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import walbatch as wb
from walbatch.engine import Engine
from walbatch.testing.shipped import environment_of
from walbatch.testing.simulation import Process, Session
from walbatch.testing.simulation.looks import STORE


class Interrupted(BaseException):
    """What the handler of a signal raises."""


class Signals:
    """Raises in a leading user's thread, once, right before or right after the `number`-th call of the disk there."""

    def __init__(self, number: int, *, after: bool) -> None:
        self.left = number
        self.after = after

    def around(self, call: Callable[[], None]) -> None:
        """Make a call, and count it where a signal may come."""
        if not _is_leading():
            call()
            return
        self.left -= 1
        if self.left == 0 and not self.after:
            raise Interrupted
        call()
        if self.left == 0:
            raise Interrupted


def _is_leading() -> bool:
    frame: Any = sys._getframe()  # noqa: SLF001 - whose thread it is, only its stack tells
    while frame is not None:
        if frame.f_code.co_name == "_lead":
            return True
        frame = frame.f_back
    return False


class _InterruptedFile:
    def __init__(self, wrapped: Any, signals: Signals) -> None:
        self._wrapped = wrapped
        self._signals = signals

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def write(self, buffers: Any, offset: int) -> None:
        self._signals.around(lambda: self._wrapped.write(buffers, offset))

    def datasync(self) -> None:
        self._signals.around(self._wrapped.datasync)


class _InterruptedCondition:
    """A signal may also come when a lock has been given back."""

    def __init__(self, wrapped: Any, signals: Signals) -> None:
        self._wrapped = wrapped
        self._signals = signals

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def __enter__(self) -> Any:
        return self._wrapped.__enter__()

    def __exit__(self, *exc: object) -> None:
        self._wrapped.__exit__(*exc)
        if exc[0] is None:
            self._signals.around(lambda: None)


class _InterruptedThreads:
    def __init__(self, wrapped: Any, signals: Signals) -> None:
        self._wrapped = wrapped
        self._signals = signals

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def condition(self) -> Any:
        return _InterruptedCondition(self._wrapped.condition(), self._signals)


class _InterruptedFileSystem:
    def __init__(self, wrapped: Any, signals: Signals) -> None:
        self._wrapped = wrapped
        self._signals = signals

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def create(self, path: str) -> Any:
        return _InterruptedFile(self._wrapped.create(path), self._signals)


def open_interrupted(
    signals: Signals, process: Process, lanes: Mapping[str, wb.Lane], settings: wb.Settings
) -> Engine:
    environment = replace(
        environment_of(process),
        fs=_InterruptedFileSystem(process.fs, signals),
        threads=_InterruptedThreads(process.threads, signals),
    )
    return Engine.open(STORE, lanes, settings=settings, environment=environment)


def undeterred(session: Session, key: bytes) -> None:
    try:
        session.submit(key)
    except Interrupted:
        session.submit(key)
