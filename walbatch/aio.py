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
from asyncio import Future, get_running_loop
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from walbatch.config import NS_PER_S, Lane, Settings
from walbatch.engine import FROM_SETTINGS, Engine, Environment, Payload
from walbatch.errors import Overloaded
from walbatch.metrics import CloseReport, EngineStats, Health
from walbatch.runtime.gathering import ROOM_POLL_S, ROW_MAX, Desk, Gathering, Sheaf
from walbatch.runtime.ticket import AnyTicket, Issuer, Promise, Ticket
from walbatch.types import NO_OPTIONS, PRIORITY_NORMAL, DeadLetter, Durability, OperationStatus, Options, When

if TYPE_CHECKING:
    from types import TracebackType

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
            try:
                self._scheduled = True
                loop = self._loop()
                if loop is not None:
                    loop.call_soon_threadsafe(self._run)
            except RuntimeError:  # the loop was closed: nobody waits any more
                self._ready.clear()
                self._scheduled = False
            except BaseException:  # a signal handler's, in a thread that has led a commit: it is told again
                self._scheduled = False
                raise

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


@dataclass(frozen=True, slots=True)
class _AsyncIssuer(Issuer):
    """What the tickets of one lane have in common, and how they wait."""

    waiting: _Waiting = field(default_factory=_Waiting)


class AsyncTicket(AnyTicket):
    """A ticket to await. `lsn`, `lane`, `durability`, `durable` and `done` as on `Ticket`."""

    __slots__ = ()

    @property
    def _waiting(self) -> _Waiting:
        assert isinstance(self._issuer, _AsyncIssuer)
        return self._issuer.waiting

    async def wait_durable(self, timeout: float | None = None) -> None:
        """Wait until the operation is durable.

        Cancelling the wait changes nothing else. Raises as `Ticket.wait_durable`.
        """
        durable = self._durable()
        if not await self._waiting.wait(durable, timeout):
            raise self._not_durable(timeout)
        durable.take()

    async def result(self, timeout: float | None = None) -> Any:
        """Wait until the operation is applied; the backend's result. Raises as `Ticket.result`."""
        settled = self._fate.settled(self._number)
        if not await self._waiting.wait(settled, timeout):
            raise self._not_settled(timeout)
        return settled.take()


class AsyncEngine:
    """An engine for asyncio. Make one with `await AsyncEngine.open(...)`; then `async with engine:`.

    Usable from any number of loops and tasks. Tasks that submit at once share commit groups; cancelling a
    task that waits loses nothing: the operation is in its group, or on its way there, and goes on.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._waiting = _Waiting()
        self._submission = engine._submission  # noqa: SLF001 - this is the other face of the same engine
        self._desks = {
            name: Desk(
                kind=name, issuer=self._issuer(intake.issuer), index=intake.index, shards=intake.shards,
                key_bytes_min=intake.limits.key_bytes_min, key_bytes_max=intake.limits.key_bytes_max,
                payload_bytes_max=intake.limits.payload_bytes_max,
            )
            for name, intake in self._submission.intakes.items() if intake.durability is not Durability.NONE
        }  # fmt: skip
        # Guards _gatherings, of which _gathering is the one that was used last.
        self._guard = threading.Lock()
        self._gatherings: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Gathering] = (
            weakref.WeakKeyDictionary()
        )
        self._gathering: Gathering | None = None
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
        timeout: float | None = FROM_SETTINGS,
        idempotency_key: Payload = b"",
        not_before: When = None,
        deadline: When = None,
    ) -> AsyncTicket:
        """Submit one operation; returns when it is durable in its lane's sense.

        `timeout` (seconds; default: `Settings.submit_timeout_s`; None: for ever) bounds the wait for room. The other options are
        those of `Engine.submit`.

        What the tasks of a loop submit in one iteration of it shares a commit group. If the task is cancelled while it waits, the
        operation goes on all the same, unless there was no room for it yet: then it may or may not be accepted. Raises as
        `Engine.submit`.
        """
        loop = get_running_loop()
        sheaf = None if self._gathering is None else self._gathering.sheaf
        if (
            sheaf is None or sheaf.loop is not loop or sheaf.kind is not kind or sheaf.priority is not priority
            or sheaf.timeout is not timeout or type(key) is not bytes or type(payload) is not bytes
            or len(payload) > sheaf.small_bytes_max or not sheaf.key_bytes_min <= len(key) <= sheaf.key_bytes_max
            or idempotency_key or not_before is not None or deadline is not None
        ):  # fmt: skip
            options = self._submission.options(kind, idempotency_key, not_before, deadline)
            key, payload = self._submission.checked(kind, key, payload, priority)
            desk = self._desks.get(kind)
            if desk is None or options is not NO_OPTIONS:
                return await self._submit_alone(kind, key, payload, priority, timeout, options)
            sheaf = await self._sheaf_for(loop, desk, priority, timeout, len(payload))
        future: Future[int] = Future(loop=loop)
        row = sheaf.row
        row += (key, payload, future)  # one step: a task that is cut off leaves all of it or nothing
        if len(row) >= ROW_MAX:
            self._gathering_of(loop).hand_over()
        lsn = await future
        return AsyncTicket(sheaf.desk.issuer, lsn, sheaf.fate or sheaf.fate_of(lsn), lsn)

    async def _sheaf_for(
        self, loop: asyncio.AbstractEventLoop, desk: Desk, priority: int, timeout: float | None, size: int
    ) -> Sheaf:
        """The sheaf that takes an operation, once there is room for one."""
        timeout_ns = self._submission.timeout_ns(timeout)
        timeout_s = None if timeout_ns is None else timeout_ns / NS_PER_S
        gathering = self._gathering_of(loop)
        gathering.make_room()
        if gathering.refusal is not None:
            await _in_room(gathering.check, timeout_s)
        return gathering.begin(loop, desk, priority, timeout, timeout_s, size)

    async def _submit_alone(
        self, kind: str, key: bytes, payload: bytes, priority: int, timeout: float | None, options: Options
    ) -> AsyncTicket:  # fmt: skip
        """Submit what cannot share a sheaf: it has options, or its lane logs nothing."""
        timeout_ns = self._submission.timeout_ns(timeout)

        def submit() -> Ticket:
            self._hand_over()
            return self._submission.submit(kind, key, payload, priority, 0.0, options, wait=False)

        ticket = await _in_room(submit, None if timeout_ns is None else timeout_ns / NS_PER_S)
        awaited = ticket._issued_by(self._issuer, AsyncTicket)  # noqa: SLF001 - of its own base
        if ticket.promises[0] is not None:
            await awaited.wait_durable()
        return awaited

    def _issuer(self, issuer: Issuer) -> _AsyncIssuer:
        return _AsyncIssuer(issuer.lane, issuer.durability, issuer.obstacle, self._waiting)

    def _gathering_of(self, loop: asyncio.AbstractEventLoop) -> Gathering:
        """What the tasks of a loop submit."""
        with self._guard:
            gathering = self._gatherings.get(loop)
            if gathering is None:
                for closed in [other for other in self._gatherings if other.is_closed()]:
                    del self._gatherings[closed]  # what it waited for room with keeps it alive
                gathering = self._gatherings[loop] = Gathering(loop, self._submission.committer)
        self._gathering = gathering
        return gathering

    def _hand_over(self, *, may_wait: bool = True) -> None:
        """What tasks of this loop have submitted goes before what comes next.

        Raises Overloaded where it waits for room, with `may_wait`: what comes next must not pass it.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # no loop is running here
            return
        gathering = self._gathering_of(loop)
        gathering.hand_over()
        if may_wait and gathering.shortage is not None:
            raise gathering.shortage

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
        self._hand_over()
        ticket = self.engine.submit_nowait(
            kind, key=key, payload=payload, priority=priority, idempotency_key=idempotency_key, not_before=not_before,
            deadline=deadline,
        )  # fmt: skip
        return ticket._issued_by(self._issuer, AsyncTicket)  # noqa: SLF001 - of its own base

    async def submit_many(
        self,
        kind: str,
        operations: Iterable[tuple[Payload, Payload]],
        *,
        priority: int = PRIORITY_NORMAL,
        timeout: float | None = FROM_SETTINGS,
    ) -> range:
        """As `Engine.submit_many`, in a thread. Cancelling it does not undo the submit."""
        pairs = list(operations)
        timeout_ns = self._submission.timeout_ns(timeout)
        await _in_room(self._hand_over, None if timeout_ns is None else timeout_ns / NS_PER_S)
        return await asyncio.to_thread(
            self.engine.submit_many, kind, pairs, priority=priority, timeout=timeout
        )

    async def flush(self, kind: str | None = None, *, timeout: float | None = None) -> None:
        """As `Engine.flush`, in a thread, which goes on to its end or to `timeout` if the task is cancelled.

        Raises Overloaded where too many are under way.
        """
        self._hand_over(may_wait=False)
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
        """As `Engine.close`, in a thread; not interrupted by cancelling the task.

        Whatever awaits an operation is answered: it is durable, or EngineClosed is raised.
        """
        self._hand_over(may_wait=False)
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


async def _in_room(attempt: Callable[[], _T], timeout_s: float | None) -> _T:
    """What `attempt` gives, once there is room for it. Raises its Overloaded at the timeout."""
    loop = asyncio.get_running_loop()
    ends_s = None if timeout_s is None else loop.time() + timeout_s
    while True:
        try:
            return attempt()
        except Overloaded:
            if ends_s is not None and loop.time() >= ends_s:
                raise
        await asyncio.sleep(ROOM_POLL_S)


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
