"""A function of a batch as a backend, and async backends for an engine that has threads.

What is not here: what an answer means (`core.delivery`), time limits and retries (the engine's).

The idea needed to read it: the engine calls `apply` in its threads and wants an answer. Where the function gives an
awaitable instead, it runs on one event loop, in a thread of its own, which all calls of this backend share: so that a
client session that was made in one call can be used in the next.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import inspect
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, cast

from walbatch.errors import BackendError, ConfigError, EngineClosed
from walbatch.ports import Backend
from walbatch.types import Answer, Batch, Mark

CLOSE_WAIT_S: Final = 5.0
"""How long `close` waits for cancelled coroutines to end. One that blocks the loop is left behind; its thread cannot be
ended, and as a daemon it does not keep the process alive."""


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
        self._loop = _LoopThread(_name(function))
        self.url = url
        self.interruptible = _is_async(function)
        """Whether a call can be ended from outside."""

    def __repr__(self) -> str:
        return f"<FunctionBackend {_name(self._function)}{self._loop.describe()}>"

    def open(self, lane: str, shards: int, store: bytes) -> None:
        """Get ready to be used (again, after `close`)."""
        self._loop.allow()

    def apply(self, batch: Batch) -> Answer:
        """Call the function and wait for its answer. Raises what it raises; EngineClosed once `close` was called."""
        return cast("Answer", self._loop.finish(self._function(batch), name=id(batch)))

    def interrupt(self, batch: Batch) -> None:
        """Cancel the coroutine that applies `batch`, if there is one: its `apply` raises soon. From any thread; does not wait."""
        self._loop.cancel(id(batch))

    def close(self) -> None:
        """Cancel what runs on the event loop and end its thread, within CLOSE_WAIT_S. Idempotent."""
        self._loop.stop()


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
            self._loop.finish(opener(lane, shards, store))

    def close(self) -> None:
        closer = getattr(self._target, "close", None)
        try:
            if callable(closer):
                self._loop.finish(closer())
        finally:
            super().close()


class _AsyncTransactionalBackend(_AsyncBackend):
    """The same for a transactional backend."""

    def applied_mark(self, shard: int) -> Mark:
        return cast("Mark", self._loop.finish(self._target.applied_mark(shard)))


class _LoopThread:
    """One event loop in one thread, started by the first awaitable.

    `_lock` guards `_loop`, `_thread`, `_stopped` and `_waited_for`. The thread is a daemon, like the engine's own: an
    engine that was never closed must not keep the process alive, and its exit hook closes its backends in order.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._named: dict[int, concurrent.futures.Future[object]] = {}
        self._waited_for: set[concurrent.futures.Future[object]] = set()

    def describe(self) -> str:
        """State, for a repr."""
        return " closed" if self._stopped else "" if self._thread is None else " with its event loop"

    def allow(self) -> None:
        """Let it start again after `stop`."""
        self._stopped = False

    def finish(self, answer: object, *, name: int = 0) -> object:
        """`answer` itself, or, if it is awaitable, what it gives, waited for on the loop. `name` is for `cancel`."""
        if not inspect.isawaitable(answer):
            return answer
        coroutine = _guard(answer)
        try:
            future = self._schedule(coroutine)
        except BaseException:
            coroutine.close()
            if inspect.iscoroutine(answer):
                answer.close()
            raise
        self._named[name] = future
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            if self._stopped:
                raise EngineClosed(f"the backend {self._name} was closed while it applied a batch") from None
            raise
        finally:
            self._named.pop(name, None)
            with self._lock:
                self._waited_for.discard(future)

    def cancel(self, name: int) -> None:
        """Cancel what `finish` waits for under this name."""
        future = self._named.get(name)
        if future is not None:
            future.cancel()

    def stop(self) -> None:
        """Cancel every task and end the thread. Idempotent; not to be called from the loop's own thread."""
        if self._pid != os.getpid():
            return
        with self._lock:
            self._stopped = True
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is None or thread is None:
            return
        loop.call_soon_threadsafe(loop.stop)
        thread.join(CLOSE_WAIT_S)
        with self._lock:
            left = list(self._waited_for)
        for future in left:
            future.cancel()

    def _schedule(self, coroutine: Coroutine[Any, Any, object]) -> concurrent.futures.Future[object]:
        """Put a coroutine on the loop. Under the lock, so that it comes before the loop is told to stop, or not at all."""
        if self._pid != os.getpid():
            raise EngineClosed(
                f"the backend {self._name} belongs to the process that this one was forked from"
            )
        with self._lock:
            if self._stopped:
                raise EngineClosed(f"the backend {self._name} is closed")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=_run, args=(self._loop,), name=f"walbatch-async-{self._name}", daemon=True
                )
                self._thread.start()
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            self._waited_for.add(future)
            return future


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """The thread: run until stopped, then let every task see its cancellation."""
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        loop.run_until_complete(_cancel_all())
    finally:
        loop.close()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()


async def _guard(awaitable: Awaitable[object]) -> object:
    try:
        return await awaitable
    except (SystemExit, KeyboardInterrupt) as error:
        # asyncio would let these end the loop, and every other call would wait for ever.
        raise BackendError(f"the backend raised {error!r}") from error


def _is_async(function: object) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    call = getattr(type(function), "__call__", None)  # noqa: B004 - not whether it can be called, but how
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def _name(function: object) -> str:
    return getattr(function, "__qualname__", None) or type(function).__name__
