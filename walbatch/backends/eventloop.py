"""One event loop in a thread of its own, for the coroutines of a backend: a call waits for what runs there.

What is not here: backends (`function`). This module imports asyncio, so it is imported itself when there is a coroutine to run.

The idea needed to read it: a call has ended when its task has, and not before: one that was told to end, and takes its time or
does not listen, is still at work.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import logging
import os
import threading
from collections.abc import Awaitable, Callable
from typing import Final

from walbatch.errors import EngineClosed

_logger = logging.getLogger("walbatch")

CLOSE_WAIT_S: Final = 5.0
"""How long `stop` waits for cancelled tasks to end. What does not end cannot be made to; as a daemon its thread does not keep the
process alive."""


class LoopThread:
    """One event loop in one thread, started by the first awaitable.

    `_lock` guards `_loop`, `_threads`, `_stopped`, `_calls` and `_named`. The thread is a daemon, like the engine's own: an
    engine that was never closed must not keep the process alive, and its exit hook closes its backends in order.
    """

    def __init__(self, name: str, *, pid: int, stopped: bool) -> None:
        """`pid`: the process that it belongs to. `stopped`: it may not start, until `allow`."""
        self._name = name
        self._pid = pid
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._threads: list[threading.Thread] = []
        self._stopped = stopped
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

    def finish(self, awaitable: Awaitable[object], *, name: int = 0) -> object:
        """What it gives, waited for on the loop. `name` is for `interrupt`."""
        call = self._begin(awaitable, name)
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
