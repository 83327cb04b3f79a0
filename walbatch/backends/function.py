"""A function of a batch as a backend, and async backends for an engine that has threads.

What is not here: what an answer means (`core.delivery`), time limits and retries (the engine's).

The idea needed to read it: the engine calls `apply` in its threads and wants an answer. Where the function gives an
awaitable instead, it runs on one event loop, in a thread of its own, which all calls of this backend share: so that a
client session that was made in one call can be used in the next. A call has ended when its task has, and not before: one that was
told to end, and takes its time or does not listen, is still at work.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import inspect
import logging
import os
import threading
from collections.abc import Awaitable, Callable
from typing import Any, Final, cast

from walbatch.errors import ConfigError, EngineClosed
from walbatch.ports import Backend
from walbatch.types import Answer, Batch, Mark

_logger = logging.getLogger("walbatch")

CLOSE_WAIT_S: Final = 5.0
"""How long `close` waits for cancelled tasks to end. What does not end cannot be made to; as a daemon its thread does not keep the
process alive."""


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
        """Cancel the coroutine that applies `batch`, if there is one, and only once. Its `apply` ends when the coroutine does.

        From any thread; does not wait.
        """
        self._loop.interrupt(id(batch))

    def is_own_thread(self) -> bool:
        """Whether the caller runs on the event loop: in a coroutine of the backend, or in a task that one has started."""
        return self._loop.is_own_thread()

    def close(self) -> None:
        """Cancel what runs on the event loop and wait for its end, CLOSE_WAIT_S at most. Idempotent. `has_ended` says the rest."""
        self._loop.stop()

    def has_ended(self, timeout_s: float | None = 0.0) -> bool:
        """Whether nothing runs on the event loop any more, after a wait of `timeout_s` at most (None: for ever).

        Asked after `close`. What still runs may still write.
        """
        return self._loop.has_ended(timeout_s)


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

    `_lock` guards `_loop`, `_threads`, `_stopped`, `_calls` and `_named`. The thread is a daemon, like the engine's own: an
    engine that was never closed must not keep the process alive, and its exit hook closes its backends in order.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._threads: list[threading.Thread] = []
        self._stopped = False
        self._calls: set[_Call] = set()
        self._named: dict[int, _Call] = {}

    def describe(self) -> str:
        """State, for a repr."""
        if self._stopped:
            return " closed" if self.has_ended(0.0) else " closed, with tasks that have not ended"
        return "" if self._loop is None else " with its event loop"

    def allow(self) -> None:
        """Let it start again after `stop`."""
        self._stopped = False

    def is_own_thread(self) -> bool:
        """Whether the caller runs on the loop."""
        return threading.current_thread() in self._threads

    def finish(self, answer: object, *, name: int = 0) -> object:
        """`answer` itself, or, if it is awaitable, what it gives, waited for on the loop. `name` is for `interrupt`."""
        if not inspect.isawaitable(answer):
            return answer
        call = self._begin(answer, name)
        try:
            return call.outcome()
        except concurrent.futures.CancelledError:
            if self._stopped:
                raise EngineClosed(f"the backend {self._name} was closed while it applied a batch") from None
            raise
        finally:
            with self._lock:
                self._calls.discard(call)
                if self._named.get(name) is call:
                    del self._named[name]
            del call  # its error knows this frame

    def interrupt(self, name: int) -> None:
        """Cancel what `finish` waits for under this name."""
        with self._lock:
            call = self._named.get(name)
        if call is not None:
            call.interrupt()

    def stop(self) -> None:
        """Cancel every task and end the thread. Idempotent; not to be called from the loop's own thread."""
        if self._pid != os.getpid():
            return
        with self._lock:
            self._stopped = True
            loop, self._loop = self._loop, None
            if loop is not None:
                loop.call_soon_threadsafe(loop.stop)
        if not self.has_ended(CLOSE_WAIT_S):
            _logger.warning(
                "the backend %s was closed, but what it left on its event loop has not ended within %g s",
                self._name,
                CLOSE_WAIT_S,
            )

    def has_ended(self, timeout_s: float | None) -> bool:
        """Whether no loop is running any more, after a wait for those that were stopped."""
        with self._lock:
            threads = list(self._threads)
        if self._pid == os.getpid():
            for thread in threads:
                thread.join(timeout_s)
        return not any(thread.is_alive() for thread in threads)

    def _begin(self, awaitable: Awaitable[object], name: int) -> _Call:
        """Put an awaitable on the loop."""
        try:
            if self._pid != os.getpid():
                raise EngineClosed(
                    f"the backend {self._name} belongs to the process that this one was forked from"
                )
            # Under the lock, so that it comes before the loop is told to stop, or not at all.
            with self._lock:
                if self._stopped:
                    raise EngineClosed(f"the backend {self._name} is closed")
                loop = self._loop or self._start()
                call = self._named[name] = _Call(awaitable, loop)
                self._calls.add(call)
                loop.call_soon_threadsafe(call.begin)
                return call
        except BaseException:
            _never_awaited(awaitable)
            raise

    def _start(self) -> asyncio.AbstractEventLoop:
        """A new loop in a new thread. With the lock held."""
        loop = self._loop = asyncio.new_event_loop()
        thread = threading.Thread(
            target=self._run, args=(loop,), name=f"walbatch-async-{self._name}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:
            self._loop = None
            loop.close()
            raise ConnectionError(f"the backend {self._name} got no thread for its event loop") from error
        self._threads = [*filter(threading.Thread.is_alive, self._threads), thread]
        return loop

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        """The thread: run until stopped, then let every task see its cancellation.

        A loop that fails by itself is given up: what was under way on it can never go on, and the next call starts another one.
        """
        asyncio.set_event_loop(loop)
        try:
            self._drive(loop, lambda: self._loop is not loop)
            ending = loop.create_task(_end_tasks())
            ending.add_done_callback(lambda _: loop.stop())
            self._drive(loop, ending.done)
        except BaseException:
            _logger.critical("the event loop of the backend %s failed", self._name, exc_info=True)
        finally:
            with self._lock:
                if self._loop is loop:
                    self._loop = None
                lost = [call for call in self._calls if call.loop is loop]
            for call in lost:
                call.lose(ConnectionError(f"the event loop of the backend {self._name} is gone"))
            loop.close()

    def _drive(self, loop: asyncio.AbstractEventLoop, until: Callable[[], bool]) -> None:
        """Run the loop until this holds, whoever else stops it.

        A task that exits (`sys.exit` in one that a backend has started) ends `run_forever`, and itself, but nothing else: what the
        loop had to do, and what belongs to it, a client's session for example, is still there when it runs again.
        """
        while not until():
            try:
                loop.run_forever()
            except (SystemExit, KeyboardInterrupt):
                _logger.exception(
                    "a task of the backend %s wanted to end the process: it alone ends", self._name
                )


class _Call:
    """An awaitable on a loop, until its task has ended."""

    def __init__(self, awaitable: Awaitable[object], loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._awaitable = awaitable
        self._ended = threading.Event()
        # These belong to the loop's thread until `_ended` is set.
        self._task: asyncio.Task[object] | None = None
        self._interrupted = False
        self._result: object = None
        self._error: BaseException | None = None

    def outcome(self) -> object:
        """Wait for the end, however long it takes. Returns or raises as the awaitable did."""
        self._ended.wait()
        error, self._error = self._error, None
        if error is None:
            return self._result
        try:
            raise error
        finally:
            del error, self  # a traceback knows its frame, and would keep it alive

    def interrupt(self) -> None:
        """Cancel the task, once: what it does in order to end is not disturbed by another cancellation. From any thread."""
        with contextlib.suppress(RuntimeError):  # the loop was closed: it has ended
            self.loop.call_soon_threadsafe(self._cancel)

    def begin(self) -> None:
        """Make a task of it. In the loop's thread."""
        self._task = self.loop.create_task(_guard(self._awaitable))
        self._task.add_done_callback(self._end)

    def lose(self, error: BaseException) -> None:
        """The loop will not run again, and so nor will this. In the loop's thread."""
        if not self._ended.is_set():
            if self._task is None:
                _never_awaited(self._awaitable)
            self._error = error
            self._ended.set()

    def _cancel(self) -> None:
        if self._task is not None and not self._interrupted:
            self._interrupted = True
            self._task.cancel()

    def _end(self, task: asyncio.Task[object]) -> None:
        """The task is done: nothing of it runs any more."""
        if task.cancelled():
            self._error = concurrent.futures.CancelledError()
        elif (error := task.exception()) is not None:
            self._error = error.error if isinstance(error, _Exit) else error
        else:
            self._result = task.result()
        _never_awaited(self._awaitable)  # it was cancelled before it began
        self._ended.set()


class _Exit(Exception):
    """What a coroutine raised to end the interpreter."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(repr(error))
        self.error = error


async def _guard(awaitable: Awaitable[object]) -> object:
    try:
        return await awaitable
    except (SystemExit, KeyboardInterrupt) as error:
        # asyncio would let these end the loop. They are raised where the call is waited for, as from a function that is not async.
        raise _Exit(error) from None


async def _end_tasks() -> None:
    """Cancel all tasks, and those that they start in order to end; wait for them, and for what they gave to threads."""
    loop = asyncio.get_running_loop()
    while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await loop.shutdown_asyncgens()
    await loop.shutdown_default_executor()


def _never_awaited(awaitable: object) -> None:
    """Close a coroutine that will not be awaited, so that Python does not warn of it. Nothing where it has ended."""
    if inspect.iscoroutine(awaitable):
        awaitable.close()


def _is_async(function: object) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    call = getattr(type(function), "__call__", None)  # noqa: B004 - not whether it can be called, but how
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def _name(function: object) -> str:
    return getattr(function, "__qualname__", None) or type(function).__name__
