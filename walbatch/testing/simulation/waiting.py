"""What simulated threads wait on: a lock with waiting, and a flag.

Implement `ports.Condition` and `ports.Event`. What is not here: who runs (`scheduler`).
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

T = TypeVar("T")


class Turns(Protocol[T]):
    """What a scheduler of threads `T` offers to what they wait on. It runs one of them at a time."""

    @property
    def is_dead(self) -> bool:
        """Whether the process has ended."""

    @property
    def current(self) -> T:
        """The thread that runs."""

    def step(self, call: str, detail: str = "") -> None:
        """A moment at which another thread may run first."""

    def deadline(self, timeout_ns: int | None) -> int | None:
        """The moment at which a wait that begins now ends."""

    def block(self, what: str, deadline_ns: int | None) -> bool:
        """Let others run until this thread is woken. False if the deadline came first."""

    def wake(self, thread: T) -> None:
        """Let a blocked thread run again."""

    def pick(self, threads: list[T]) -> T:
        """One of several, by the seed."""


class SimulatedCondition(Generic[T]):
    """A lock with waiting. Not re-entrant: taking it twice is an error, not a wait for ever."""

    __slots__ = ("_owner", "_queue", "_scheduler", "_waiters")

    def __init__(self, scheduler: Turns[T]) -> None:
        self._scheduler = scheduler
        self._owner: T | None = None
        self._queue: list[T] = []
        self._waiters: list[T] = []

    def __repr__(self) -> str:
        return f"<SimulatedCondition of {self._owner or 'nobody'}>"

    def __enter__(self) -> None:
        self._scheduler.step("lock")
        self._take()

    def __exit__(self, *exc: object) -> None:
        if not self._scheduler.is_dead:
            self._give_back()

    def wait(self, timeout_ns: int | None = None) -> bool:
        """Give the lock back, wait for a notification, take it again. Whether there was one."""
        scheduler = self._scheduler
        me = scheduler.current
        assert self._owner is me, "only the owner of the lock waits"
        deadline = scheduler.deadline(timeout_ns)
        self._give_back()
        self._waiters.append(me)
        scheduler.step("wait")
        if me in self._waiters:
            scheduler.block("a notification", deadline)
        notified = me not in self._waiters
        if not notified:
            self._waiters.remove(me)
        self._take()
        return notified

    def notify(self) -> None:
        """Wake one of the waiters: the seed says which."""
        self._check_owner()
        if self._waiters:
            thread = self._scheduler.pick(self._waiters)
            self._waiters.remove(thread)
            self._scheduler.wake(thread)

    def notify_all(self) -> None:
        """Wake all waiters."""
        self._check_owner()
        waiters, self._waiters = self._waiters, []
        for thread in waiters:
            self._scheduler.wake(thread)

    def _check_owner(self) -> None:
        scheduler = self._scheduler
        if scheduler.is_dead:
            scheduler.step("notify")
        assert self._owner is scheduler.current, "only the owner of the lock notifies"

    def _take(self) -> None:
        scheduler = self._scheduler
        me = scheduler.current
        assert self._owner is not me, "the lock is not re-entrant"
        while self._owner is not None:
            self._queue.append(me)
            scheduler.block("a lock", None)
        self._owner = me

    def _give_back(self) -> None:
        self._owner = None
        queue, self._queue = self._queue, []
        for thread in queue:
            self._scheduler.wake(thread)


class SimulatedEvent(Generic[T]):
    """A flag that threads wait for."""

    __slots__ = ("_scheduler", "_set", "_waiters")

    def __init__(self, scheduler: Turns[T]) -> None:
        self._scheduler = scheduler
        self._set = False
        self._waiters: list[T] = []

    def set(self) -> None:
        """Set it and wake all waiters."""
        self._scheduler.step("set")
        self._set = True
        waiters, self._waiters = self._waiters, []
        for thread in waiters:
            self._scheduler.wake(thread)

    def is_set(self) -> bool:
        """Whether it is set."""
        return self._set

    def wait(self, timeout_ns: int | None = None) -> bool:
        """Wait until it is set. Returns whether it is."""
        scheduler = self._scheduler
        deadline = scheduler.deadline(timeout_ns)
        scheduler.step("wait for event")
        while not self._set:
            me = scheduler.current
            self._waiters.append(me)
            if not scheduler.block("an event", deadline):
                if me in self._waiters:
                    self._waiters.remove(me)
                break
        return self._set
