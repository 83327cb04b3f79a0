"""What submit returns: the LSN now, the result later.

The idea needed to read it: an outcome is one attribute that is set once, under a lock that all promises share and
nobody holds for longer than an assignment. Who waits leaves an event or a listener under the same lock, unless it has
happened already; who resolves takes both under it and calls them after. Operations that share a commit group share one fate,
which their tickets keep alive; a promise for one of them is made only when somebody waits for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from walbatch.errors import DurabilityUnknown, ResultTimeout, WalbatchError
from walbatch.ports import Event, Threads
from walbatch.types import Durability

NS_PER_S = 1_000_000_000

_T = TypeVar("_T", bound="AnyTicket")

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

    @property
    def error(self) -> WalbatchError | None:
        """The error with which it happened, if it did."""
        return None if self._outcome is None else self._outcome[1]

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


Outcome = tuple[Any, WalbatchError | None]
"""How an operation ended: with a result, or an error."""
APPLIED: Final[Outcome] = (None, None)
"""The outcome of nearly all operations."""


class Fate:
    """What becomes of the operations that share a commit group, for whoever keeps a ticket of one.

    Safe from any thread, without a lock: who settles an operation notes its outcome, then looks for a promise; who waits leaves a
    promise, then looks for an outcome.

    Their numbers go from `first` to `last`, which grows as long as others join: LSNs, or sequence numbers on a lane that logs
    nothing, where `durable` is None. The results of all of them are kept as long as a ticket of any of them is.
    """

    __slots__ = ("__weakref__", "_end", "_outcomes", "_promises", "_threads", "durable", "first", "last")

    def __init__(self, threads: Threads, first: int, last: int, durable: Promise | None) -> None:
        self._threads = threads
        self.first = first
        self.last = last
        self.durable = durable
        self._outcomes: dict[int, Outcome] = {}
        self._promises: dict[int, Promise] = {}
        self._end: Outcome | None = None

    def __repr__(self) -> str:
        return f"<Fate of {self.first}..{self.last}, {len(self._outcomes)} settled>"

    @property
    def is_whole(self) -> bool:
        """Whether all of them are settled."""
        return len(self._outcomes) > self.last - self.first

    def outcome(self, number: int) -> Outcome | None:
        """How an operation ended; None if it has not."""
        return self._outcomes.get(number) or self._end

    def settled(self, number: int) -> Promise:
        """The promise that an operation will end, in whatever way."""
        promise = self._promises.get(number)
        if promise is None:
            promise = Promise(self._threads)
            outcome = self.outcome(number)
            if outcome is None:
                promise = self._promises.setdefault(number, promise)
                outcome = self.outcome(number)  # whoever settles it looks for a promise after that
            if outcome is not None:
                promise.resolve(*outcome)
        elif not promise.done and (outcome := self.outcome(number)) is not None:
            promise.resolve(*outcome)  # whoever left it was cut off before that
        return promise

    def settle(self, number: int, outcome: Outcome) -> None:
        """An operation has ended. Only its first outcome counts."""
        if self._end is not None:
            outcome = self._outcomes.get(number, self._end)
        outcome = self._outcomes.setdefault(number, outcome)
        promise = self._promises.get(number)
        if promise is not None:
            promise.resolve(*outcome)

    def end(self, error: WalbatchError) -> None:
        """Nobody will settle any more what is not settled yet."""
        if self._end is None:
            self._end = (None, error)
        for number, promise in list(self._promises.items()):  # a list made in one step
            promise.resolve(*self._outcomes.get(number, self._end))


@dataclass(frozen=True, slots=True)
class Issuer:
    """What the tickets of one lane have in common. `obstacle` says what is in the way of a lane, as the end of a sentence."""

    lane: str
    durability: Durability
    obstacle: Callable[[str], str] | None = None


class AnyTicket:
    """One submitted operation, whoever waits for it and however."""

    __slots__ = ("__weakref__", "_fate", "_issuer", "_number", "lsn")

    def __init__(self, issuer: Issuer, lsn: int | None, fate: Fate, number: int) -> None:
        """`number`: the operation's in its fate."""
        self._issuer = issuer
        self.lsn = lsn
        self._fate = fate
        self._number = number

    def __repr__(self) -> str:
        state = "settled" if self.done else "durable" if self.durable else "pending"
        return f"<{type(self).__name__} {self.lane} lsn {self.lsn} {self.durability} {state}>"

    def _issued_by(self, issuer: Callable[[Issuer], Issuer], kind: type[_T]) -> _T:
        """A ticket of the same operation that is waited for in another way."""
        return kind(issuer(self._issuer), self.lsn, self._fate, self._number)

    @property
    def lane(self) -> str:
        """The lane's name."""
        return self._issuer.lane

    @property
    def durability(self) -> Durability:
        """The lane's durability."""
        return self._issuer.durability

    @property
    def durable(self) -> bool:
        """Whether the lane's promise is kept: synced ("sync") or written ("interval"). Always False for "none"."""
        durable = self._fate.durable
        return durable is not None and durable.kept

    @property
    def done(self) -> bool:
        """Whether the operation is settled, or the engine gave up waiting for it."""
        return self._fate.outcome(self._number) is not None

    def _durable(self) -> Promise:
        """The promise that it is durable. Raises DurabilityUnknown on a lane with durability "none"."""
        if self._fate.durable is None:
            raise DurabilityUnknown(
                f"lane {self.lane!r} has durability 'none': its operations are never logged"
            )
        return self._fate.durable

    def _not_durable(self, timeout: float | None) -> ResultTimeout:
        return ResultTimeout(f"operation {self.lsn} is not durable after {timeout} s; it still may become so")

    def _not_settled(self, timeout: float | None) -> ResultTimeout:
        ask = self._issuer.obstacle
        obstacle = "" if ask is None else ask(self.lane)
        return ResultTimeout(
            f"operation {self.lsn} of lane {self.lane!r} is not settled after {timeout} s; it goes on{obstacle}"
        )


class Ticket(AnyTicket):
    """One submitted operation. Safe from any thread.

    `lsn` is known at once (None on a lane with durability "none"). Keeping a ticket costs memory, also that of the results of
    operations that were committed together with its own; dropping it loses nothing but the result.
    """

    __slots__ = ()

    @property
    def promises(self) -> tuple[Promise | None, Promise]:
        """What to await: durable (None on a lane with durability "none") and settled."""
        return self._fate.durable, self._fate.settled(self._number)

    @property
    def obstacle(self) -> str:
        """What is in the way of the ticket's lane, as the end of a sentence; empty if nothing is known to be."""
        ask = self._issuer.obstacle
        return "" if ask is None else ask(self.lane)

    def wait_durable(self, timeout: float | None = None) -> None:
        """Wait until the operation is durable in its lane's sense. Seconds; None: for ever.

        Raises ResultTimeout, DurabilityUnknown after a failed write or sync, EngineClosed.
        """
        durable = self._durable()
        if not durable.wait(timeout_to_ns(timeout)):
            raise self._not_durable(timeout)
        durable.take()

    def result(self, timeout: float | None = None) -> Any:
        """Wait until the operation is applied; returns the backend's result. Seconds; None: for ever.

        Raises OperationDead or OperationCancelled if it never will be; ResultTimeout; EngineClosed when the engine closed first
        (the operation is in the log and will be replayed); DurabilityUnknown, StorageError or CorruptionError when
        the engine failed.
        """
        settled = self._fate.settled(self._number)
        if not settled.wait(timeout_to_ns(timeout)):
            raise self._not_settled(timeout)
        return settled.take()
