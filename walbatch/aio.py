"""The engine for asyncio: the same surface, awaited.

What is not here: an event loop, or any I/O of its own. The work is done by the engine's threads; a coroutine
waits for a future.

The idea needed to read it: what resolves a commit group or a batch resolves many futures at once, so they are
collected for each loop and set in one wake-up of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from walbatch.config import Lane, Settings
from walbatch.engine import Engine, Environment, Payload
from walbatch.errors import DurabilityUnknown, Overloaded, ResultTimeout
from walbatch.metrics import CloseReport, EngineStats, Health
from walbatch.runtime.ticket import Promise, Ticket
from walbatch.types import PRIORITY_NORMAL, DeadLetter, OperationStatus, When

if TYPE_CHECKING:
    from types import TracebackType

ROOM_POLL_S = 0.005
"""How often a submit that waits for room looks again."""

FLUSHES_MAX = 256
"""Flushes under way at once, each in a thread: those that were cancelled count until they end."""

_T = TypeVar("_T")


class _LoopWaker:
    """Sets futures of one loop from other threads, many per wake-up."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._ready: deque[asyncio.Future[None]] = deque()
        self._scheduled = False

    def wake(self, future: asyncio.Future[None]) -> None:
        """Set `future` soon. From any thread."""
        self._ready.append(future)
        # A wake-up that is scheduled and has not run yet will see the future; the flag is cleared before it looks.
        if not self._scheduled:
            self._scheduled = True
            loop = self._loop()
            try:
                if loop is not None:
                    loop.call_soon_threadsafe(self._run)
            except RuntimeError:  # the loop was closed: nobody waits any more
                self._ready.clear()
                self._scheduled = False

    def _run(self) -> None:
        self._scheduled = False
        while self._ready:
            future = self._ready.popleft()
            if not future.done():
                future.set_result(None)


class _Waiting:
    """Awaits promises on whatever loop is running."""

    def __init__(self) -> None:
        self._wakers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopWaker] = (
            weakref.WeakKeyDictionary()
        )

    async def wait(self, promise: Promise, timeout: float | None) -> bool:
        """Wait until the promise is resolved, `timeout` seconds at most. Returns whether it is."""
        if promise.done:
            return True
        loop = asyncio.get_running_loop()
        waker = self._wakers.get(loop)
        if waker is None:
            waker = self._wakers[loop] = _LoopWaker(loop)
        future: asyncio.Future[None] = loop.create_future()

        def listener() -> None:
            waker.wake(future)

        promise.listen(listener)
        try:
            async with asyncio.timeout(timeout):
                await future
        except TimeoutError:
            return promise.done
        finally:
            promise.ignore(listener)  # or a task that looks now and then would leave a listener each time
        return True


class AsyncTicket:
    """A ticket to await. `lsn`, `lane`, `durability`, `durable` and `done` as on `Ticket`."""

    __slots__ = ("_ticket", "_waiting")

    def __init__(self, ticket: Ticket, waiting: _Waiting) -> None:
        self._ticket = ticket
        self._waiting = waiting

    def __repr__(self) -> str:
        return f"<Async{repr(self._ticket)[1:]}"

    @property
    def lsn(self) -> int | None:
        """The operation's LSN; None on a lane with durability "none"."""
        return self._ticket.lsn

    @property
    def lane(self) -> str:
        """The lane's name."""
        return self._ticket.lane

    @property
    def durability(self) -> str:
        """The lane's durability."""
        return self._ticket.durability

    @property
    def durable(self) -> bool:
        """Whether the lane's promise is kept."""
        return self._ticket.durable

    @property
    def done(self) -> bool:
        """Whether the operation is settled."""
        return self._ticket.done

    async def wait_durable(self, timeout: float | None = None) -> None:
        """Wait until the operation is durable.

        Cancelling the wait changes nothing else. Raises as `Ticket.wait_durable`.
        """
        durable, _ = self._ticket.promises
        if durable is None:
            raise DurabilityUnknown(
                f"lane {self.lane!r} has durability 'none': its operations are never logged"
            )
        if not await self._waiting.wait(durable, timeout):
            raise ResultTimeout(
                f"operation {self.lsn} is not durable after {timeout} s; it still may become so"
            )
        durable.take()

    async def result(self, timeout: float | None = None) -> Any:
        """Wait until the operation is applied; the backend's result. Raises as `Ticket.result`."""
        _, settled = self._ticket.promises
        if not await self._waiting.wait(settled, timeout):
            raise ResultTimeout(
                f"operation {self.lsn} of lane {self.lane!r} is not settled after {timeout} s; it goes on{self._ticket.obstacle}"
            )
        return settled.take()


class AsyncEngine:
    """An engine for asyncio. Make one with `await AsyncEngine.open(...)`; then `async with engine:`.

    Usable from any number of loops and tasks. Tasks that submit at once share commit groups; cancelling a
    task that waits loses nothing: the operation is in its group and goes on.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._waiting = _Waiting()
        self._flushes = threading.BoundedSemaphore(FLUSHES_MAX)

    def __repr__(self) -> str:
        return f"<Async{repr(self.engine)[1:]}"

    @classmethod
    async def open(
        cls, path: str | os.PathLike[str], lanes: Mapping[str, Lane], *, settings: Settings | None = None,
        environment: Environment | None = None, verify: bool = False,
    ) -> Self:  # fmt: skip
        """As `Engine.open`, in a thread. If the task is cancelled meanwhile, the engine is closed once it is open."""
        opening = _Opening()
        try:
            return cls(
                await _in_thread(
                    "walbatch-open",
                    lambda: opening.keep(
                        Engine.open(path, lanes, settings=settings, environment=environment, verify=verify)
                    ),
                )
            )
        except asyncio.CancelledError:
            opening.abandon()
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close; drain first unless an exception is on its way."""
        await self.close(drain=kind is None)

    async def submit(
        self,
        kind: str,
        *,
        key: Payload,
        payload: Payload = b"",
        priority: int = PRIORITY_NORMAL,
        timeout: float | None = 30.0,
        idempotency_key: Payload = b"",
        not_before: When = None,
        deadline: When = None,
    ) -> AsyncTicket:
        """Submit one operation; returns when it is durable in its lane's sense.

        `timeout` bounds the wait for room, in seconds. The other options are those of `Engine.submit`.

        If the task is cancelled while it waits, the operation may or may not have been accepted. Raises as
        `Engine.submit`.
        """

        def submit() -> Ticket:
            return self.engine.submit_nowait(
                kind, key=key, payload=payload, priority=priority, idempotency_key=idempotency_key, not_before=not_before,
                deadline=deadline,
            )  # fmt: skip

        ticket = await self._accepted(submit, timeout)
        awaited = AsyncTicket(ticket, self._waiting)
        if ticket.promises[0] is not None:
            await awaited.wait_durable()
        return awaited

    async def _accepted(self, submit: Callable[[], Ticket], timeout: float | None) -> Ticket:
        """The ticket, once there was room for the operation."""
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout
        while True:
            try:
                return submit()
            except Overloaded:
                if deadline is not None and loop.time() >= deadline:
                    raise
            await asyncio.sleep(ROOM_POLL_S)

    def submit_nowait(
        self,
        kind: str,
        *,
        key: Payload,
        payload: Payload = b"",
        priority: int = PRIORITY_NORMAL,
        idempotency_key: Payload = b"",
        not_before: When = None,
        deadline: When = None,
    ) -> AsyncTicket:
        """As `Engine.submit_nowait`. Does not wait for the disk."""
        ticket = self.engine.submit_nowait(
            kind, key=key, payload=payload, priority=priority, idempotency_key=idempotency_key, not_before=not_before,
            deadline=deadline,
        )  # fmt: skip
        return AsyncTicket(ticket, self._waiting)

    async def submit_many(
        self,
        kind: str,
        operations: Iterable[tuple[Payload, Payload]],
        *,
        priority: int = PRIORITY_NORMAL,
        timeout: float | None = 30.0,
    ) -> range:
        """As `Engine.submit_many`, in a thread. Cancelling it does not undo the submit."""
        pairs = list(operations)
        return await asyncio.to_thread(
            self.engine.submit_many, kind, pairs, priority=priority, timeout=timeout
        )

    async def flush(self, kind: str | None = None, *, timeout: float | None = None) -> None:
        """As `Engine.flush`, in a thread, which goes on to its end or to `timeout` if the task is cancelled.

        Raises Overloaded where too many are under way.
        """
        if not self._flushes.acquire(blocking=False):
            raise Overloaded(
                "FLUSHES_MAX", value=FLUSHES_MAX, maximum=FLUSHES_MAX, hint="wait until some have ended"
            )

        def flush() -> None:
            try:
                self.engine.flush(kind, timeout=timeout)
            finally:
                self._flushes.release()

        await _in_thread("walbatch-await-flush", flush)

    def pause(self, kind: str) -> None:
        """As `Engine.pause`."""
        self.engine.pause(kind)

    def resume(self, kind: str) -> None:
        """As `Engine.resume`."""
        self.engine.resume(kind)

    def configure(self, kind: str, **changes: Any) -> Lane:
        """As `Engine.configure`."""
        return self.engine.configure(kind, **changes)

    def stats(self) -> EngineStats:
        """As `Engine.stats`."""
        return self.engine.stats()

    def health(self) -> Health:
        """As `Engine.health`."""
        return self.engine.health()

    async def cancel(self, lsn: int) -> bool:
        """As `Engine.cancel`, in a thread. Cancelling the task does not undo it."""
        return await _in_thread("walbatch-await-cancel", lambda: self.engine.cancel(lsn))

    async def status(
        self, lsn: int | None = None, *, kind: str | None = None, idempotency_key: Payload = b""
    ) -> OperationStatus:
        """As `Engine.status`, in a thread."""
        return await _in_thread(
            "walbatch-await-status",
            lambda: self.engine.status(lsn, kind=kind, idempotency_key=idempotency_key),
        )

    async def dead_letters(self, kind: str | None = None) -> list[DeadLetter]:
        """As `Engine.dead_letters`, in a thread."""
        return await _in_thread("walbatch-await-letters", lambda: self.engine.dead_letters(kind))

    async def requeue(self, lsns: Iterable[int] | None = None, *, per_second: float = 100.0) -> int:
        """As `Engine.requeue`, in a thread, which goes on to its end if the task is cancelled."""
        wanted = None if lsns is None else list(lsns)
        return await _in_thread(
            "walbatch-await-requeue", lambda: self.engine.requeue(wanted, per_second=per_second)
        )

    async def drop(self, lsns: Iterable[int]) -> int:
        """As `Engine.drop`, in a thread."""
        wanted = list(lsns)
        return await _in_thread("walbatch-await-drop", lambda: self.engine.drop(wanted))

    async def close(self, *, drain: bool = True, timeout: float | None = 30.0) -> CloseReport:
        """As `Engine.close`, in a thread; not interrupted by cancelling the task."""
        return await _in_thread(
            "walbatch-await-close", lambda: self.engine.close(drain=drain, timeout=timeout)
        )


class _Opening:
    """An engine on its way to a task that may be cancelled before it gets there. `_guard` guards the other two."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._engine: Engine | None = None
        self._abandoned = False

    def keep(self, engine: Engine) -> Engine:
        """The engine is open. Called by the thread that has opened it."""
        with self._guard:
            self._engine = engine
            abandoned = self._abandoned
        if abandoned:
            engine.close(drain=False)
        return engine

    def abandon(self) -> None:
        """Nobody will take the engine: it is closed, now or as soon as it is open, without blocking the loop."""
        with self._guard:
            self._abandoned = True
            engine = self._engine
        if engine is not None:
            threading.Thread(
                target=engine.close, kwargs={"drain": False}, name="walbatch-unopen", daemon=True
            ).start()


async def _in_thread(name: str, function: Callable[[], _T]) -> _T:
    """Call a function in a thread of its own, and wait for it. Cancelling the wait leaves the call alone.

    The loop's default executor is not used: calls that block there for long would hold up the application's own, and
    `close`, which is what ends them.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(cast("_T", result))

    def run() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as caught:  # noqa: BLE001 - it is raised where the function was asked for
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, error)

    # In the caller's context, by which an engine knows that it is called from a backend.
    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(run,), name=name, daemon=True).start()
    return await future
