"""What submit returns: the LSN now, the result later.

The idea needed to read it: an outcome is one attribute that is set once, under a lock that all promises share and
nobody holds for longer than an assignment. Who waits leaves an event or a listener under the same lock, unless it has
happened already; who resolves takes both under it and calls them after.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from walbatch.errors import DurabilityUnknown, ResultTimeout, WalbatchError
from walbatch.ports import Event, Threads
from walbatch.types import Durability

NS_PER_S = 1_000_000_000

_making = threading.RLock()
"""Guards every promise's fields, for an assignment or two: no port is called under it, so it needs none itself. It is
re-entrant because making an object may run a finalizer, which may do anything."""


def timeout_to_ns(timeout: float | None) -> int | None:
    """Seconds to nanoseconds; None means for ever."""
    return None if timeout is None else max(0, int(timeout * NS_PER_S))


class Promise:
    """Something that happens once, with a value or an error. Safe from any thread."""

    __slots__ = ("__weakref__", "_event", "_listeners", "_outcome", "_threads")

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._event: Event | None = None
        self._listeners: dict[Callable[[], None], None] | None = None
        self._outcome: tuple[Any, WalbatchError | None] | None = None

    @property
    def done(self) -> bool:
        """Whether it happened."""
        return self._outcome is not None

    def resolve(self, value: Any = None, error: WalbatchError | None = None) -> None:
        """It happened. Only the first outcome counts.

        A call that a signal handler's exception has cut short may be made again: then everybody is told again.
        """
        with _making:
            if self._outcome is None:
                self._outcome = (value, error)
            event, listeners = self._event, tuple(self._listeners or ())
        if event is not None:
            event.set()
        for listener in listeners:
            listener()
        self._listeners = None

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener` once it happened: from the resolving thread, or at once.

        It must not block and may be called twice.
        """
        with _making:
            happened = self._outcome is not None
            if not happened:
                if self._listeners is None:
                    self._listeners = {}
                self._listeners[listener] = None
        if happened:
            listener()

    def ignore(self, listener: Callable[[], None]) -> None:
        """Forget a listener whose owner has stopped waiting. It may still be called once."""
        with _making:
            if self._listeners is not None:
                self._listeners.pop(listener, None)

    @property
    def kept(self) -> bool:
        """Whether it happened, and without an error."""
        return self._outcome is not None and self._outcome[1] is None

    def wait(self, timeout_ns: int | None) -> bool:
        """Wait until it happened. Returns whether it has."""
        if self._outcome is None:
            event = self._event or self._threads.event()
            with _making:  # two waiters must end up with the same event
                self._event = event = self._event or event
                happened = self._outcome is not None
            if not happened:
                event.wait(timeout_ns)
        return self._outcome is not None

    def take(self) -> Any:
        """The value, or raise the error."""
        assert self._outcome is not None
        value, error = self._outcome
        if error is not None:
            raise error
        return value


def kept_promise(threads: Threads) -> Promise:
    """A promise that was kept before anybody asked."""
    promise = Promise(threads)
    promise.resolve()
    return promise


class Ticket:
    """One submitted operation. Safe from any thread.

    `lsn` is known at once (None on a lane with durability "none"). Keeping a ticket costs memory; dropping it
    loses nothing but the result.
    """

    __slots__ = ("__weakref__", "_durable", "_obstacle", "_settled", "durability", "lane", "lsn")

    def __init__(
        self, *, lane: str, lsn: int | None, durability: Durability, durable: Promise | None, settled: Promise,
        obstacle: Callable[[str], str] | None = None,
    ) -> None:  # fmt: skip
        """`obstacle` says what is in the way of a lane, as the end of a sentence."""
        self.lane = lane
        self.lsn = lsn
        self.durability = durability
        self._durable = durable
        self._settled = settled
        self._obstacle = obstacle

    def __repr__(self) -> str:
        state = "settled" if self.done else "durable" if self.durable else "pending"
        return f"<Ticket {self.lane} lsn {self.lsn} {self.durability} {state}>"

    @property
    def durable(self) -> bool:
        """Whether the lane's promise is kept: synced ("sync") or written ("interval"). Always False for "none"."""
        return self._durable is not None and self._durable.kept

    @property
    def promises(self) -> tuple[Promise | None, Promise]:
        """What to await: durable (None on a lane with durability "none") and settled."""
        return self._durable, self._settled

    @property
    def obstacle(self) -> str:
        """What is in the way of the ticket's lane, as the end of a sentence; empty if nothing is known to be."""
        return "" if self._obstacle is None else self._obstacle(self.lane)

    @property
    def done(self) -> bool:
        """Whether the operation is settled, or the engine gave up waiting for it."""
        return self._settled.done

    def wait_durable(self, timeout: float | None = None) -> None:
        """Wait until the operation is durable in its lane's sense. Seconds; None: for ever.

        Raises ResultTimeout, DurabilityUnknown after a failed write or sync, EngineClosed.
        """
        if self._durable is None:
            raise DurabilityUnknown(
                f"lane {self.lane!r} has durability 'none': its operations are never logged"
            )
        if not self._durable.wait(timeout_to_ns(timeout)):
            raise ResultTimeout(
                f"operation {self.lsn} is not durable after {timeout} s; it still may become so"
            )
        self._durable.take()

    def result(self, timeout: float | None = None) -> Any:
        """Wait until the operation is applied; returns the backend's result. Seconds; None: for ever.

        Raises OperationDead or OperationCancelled if it never will be; ResultTimeout; EngineClosed when the engine closed first
        (the operation is in the log and will be replayed); DurabilityUnknown, StorageError or CorruptionError when
        the engine failed.
        """
        if not self._settled.wait(timeout_to_ns(timeout)):
            raise ResultTimeout(
                f"operation {self.lsn} of lane {self.lane!r} is not settled after {timeout} s; it goes on{self.obstacle}"
            )
        return self._settled.take()
