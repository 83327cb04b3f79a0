"""A function of a batch as a backend, and async backends for an engine that has threads.

What is not here: what an answer means (`core.delivery`), time limits and retries (the engine's).

The idea needed to read it: the engine calls `apply` in its threads and wants an answer. Where the function gives an
awaitable instead, it runs on one event loop (`eventloop`), in a thread of its own, which all calls of this backend share: so
that a client session that was made in one call can be used in the next.
"""

from __future__ import annotations

import functools
import inspect
import os
import threading
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, cast

from walbatch.errors import ConfigError
from walbatch.ports import Backend
from walbatch.types import Answer, Batch, Mark

if TYPE_CHECKING:
    from walbatch.backends.eventloop import LoopThread


class FunctionBackend:
    """A sync or async function of a batch as a backend. Safe from any thread; nothing is durable but what it does.

    The function returns an answer (see `ports.Backend`) or an awaitable of one; what it raises speaks for the whole
    batch. `url` is what the command line can make it again from, if anything.
    """

    def __init__(
        self, function: Callable[[Batch], Answer | Awaitable[Answer]], *, url: str | None = None
    ) -> None:
        if isinstance(function, type):
            raise ConfigError(
                f"a backend must be an object, but {function.__name__} is a class: make an object of it"
            )
        if not callable(function):
            raise ConfigError(f"a backend must be a function of a batch, not {type(function).__name__}")
        self._function = function
        self._pid = os.getpid()
        self._lock = threading.Lock()  # guards the next two
        self._is_closed = False
        self._loop: LoopThread | None = None
        """None until there is something to await."""
        self.url = url
        self.interruptible = _is_async(function)
        """Whether a call can be ended from outside."""
        if self.interruptible:
            self._coroutines()  # what has to be imported is imported now, not in the middle of a delivery

    def __repr__(self) -> str:
        state = self._loop.describe() if self._loop is not None else " closed" if self._is_closed else ""
        return f"<FunctionBackend {_name(self._function)}{state}>"

    def open(self, lane: str, shards: int, store: bytes) -> None:
        """Get ready to be used (again, after `close`)."""
        with self._lock:
            self._is_closed = False
            if self._loop is not None:
                self._loop.allow()

    def apply(self, batch: Batch) -> Answer:
        """Call the function and wait for its answer. Raises what it raises; EngineClosed once `close` was called."""
        return cast("Answer", self._finish(self._function(batch), name=id(batch)))

    def interrupt(self, batch: Batch) -> None:
        """Cancel the coroutine that applies `batch`, if there is one, and only once. Its `apply` ends when the coroutine does.

        From any thread; does not wait.
        """
        if self._loop is not None:
            self._loop.interrupt(id(batch))

    def is_own_thread(self) -> bool:
        """Whether the caller runs on the event loop: in a coroutine of the backend, or in a task that one has started."""
        return self._loop is not None and self._loop.is_own_thread()

    def close(self) -> None:
        """Cancel what runs on the event loop and wait for its end, for 5 s at most. Idempotent. `has_ended` says the rest."""
        if self._pid != os.getpid():
            return
        with self._lock:
            self._is_closed = True
            loop = self._loop
        if loop is not None:
            loop.stop()

    def has_ended(self, timeout_s: float | None = 0.0) -> bool:
        """Whether nothing runs on the event loop any more, after a wait of `timeout_s` at most (None: for ever).

        Asked after `close`. What still runs may still write.
        """
        return self._loop is None or self._loop.has_ended(timeout_s)

    def _finish(self, answer: object, *, name: int = 0) -> object:
        """`answer` itself, or, if it is awaitable, what it gives. `name` is for `interrupt`."""
        if not inspect.isawaitable(answer):
            return answer
        return (self._loop or self._coroutines()).finish(answer, name=name)

    def _coroutines(self) -> LoopThread:
        """The thread for what has to be awaited."""
        # Here, because most backends are plain functions, and asyncio takes as long to import as a third of the engine.
        from walbatch.backends.eventloop import LoopThread  # noqa: PLC0415

        with self._lock:
            if self._loop is None:
                self._loop = LoopThread(_name(self._function), pid=self._pid, stopped=self._is_closed)
            return self._loop


def as_backend(target: object) -> Backend:
    """A backend whose calls are all synchronous: `target` itself where it is one.

    `target` is an object with `apply` (a coroutine function or a plain one; a plain one must return an answer, not an
    awaitable) or a function of a batch. Raises ConfigError for anything else.
    """
    apply = getattr(target, "apply", None)
    if isinstance(target, type) or not callable(apply):
        return FunctionBackend(cast("Callable[[Batch], Answer]", target))
    if not _is_async(apply):
        return cast("Backend", target)
    return _AsyncTransactionalBackend(target) if hasattr(target, "applied_mark") else _AsyncBackend(target)


class _AsyncBackend(FunctionBackend):
    """A backend object whose methods are coroutine functions, some of them at least. Other attributes are its own."""

    def __init__(self, target: Any) -> None:
        super().__init__(target.apply)
        self._target = target
        self.url = getattr(target, "url", None)

    def __repr__(self) -> str:
        return repr(self._target)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._target, name)

    def open(self, lane: str, shards: int, store: bytes) -> None:
        super().open(lane, shards, store)
        opener = getattr(self._target, "open", None)
        if callable(opener):
            self._finish(opener(lane, shards, store))

    def close(self) -> None:
        closer = None if self._is_closed else getattr(self._target, "close", None)
        try:
            if callable(closer):
                self._finish(closer())
        finally:
            super().close()


class _AsyncTransactionalBackend(_AsyncBackend):
    """The same for a transactional backend."""

    def applied_mark(self, shard: int) -> Mark:
        return cast("Mark", self._finish(self._target.applied_mark(shard)))


def _is_async(function: object) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    call = getattr(type(function), "__call__", None)  # noqa: B004 - not whether it can be called, but how
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def _name(function: object) -> str:
    return getattr(function, "__qualname__", None) or type(function).__name__
