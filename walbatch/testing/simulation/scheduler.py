"""A seeded scheduler: real threads of which one runs at a time, and the seed says which.

Implements `ports.Threads`. What is not here: what threads wait on (`waiting`), and the files they work with (`filesystem`,
which calls `step` before each of its calls).

The idea needed to read it: there is one baton. Whoever has it runs until a port call, a lock or a wait; there the seed
may hand it to another thread that can run. When none can, time jumps to the next deadline; when there is no deadline
either, that is a deadlock. When the process is killed, every thread gets `ProcessKilled` at its next port call, and
at all later ones.
"""

from __future__ import annotations

import hashlib
import random
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, Final, TypeVar

from walbatch.testing.simulation.clock import ManualClock
from walbatch.testing.simulation.waiting import SimulatedCondition, SimulatedEvent

SWITCH_CHANCE: Final = 0.2
"""How often a thread that could go on hands the baton over."""

STEPS_MAX: Final = 2_000_000
"""Port calls of one run: beyond it the engine is taken to spin for ever."""

UNWIND_S: Final = 20.0
"""Real time that a killed thread has to end in."""

_T = TypeVar("_T")


class ProcessKilled(BaseException):
    """The simulated process has ended: no thread of it ever runs again. Not an Exception, so that nobody handles it."""


class Deadlock(AssertionError):
    """All threads wait, and nothing will ever wake one. Names each thread's wait point."""


class Livelock(AssertionError):
    """The threads run on and on."""


class _Carrier:
    """A real thread that carries one simulated thread after the other."""

    idle: Final[list[_Carrier]] = []

    def __init__(self) -> None:
        self._job: Callable[[], None] | None = None
        self._wake = threading.Lock()
        self._wake.acquire()
        self.thread = threading.Thread(target=self._run, name="simulated", daemon=True)
        self.thread.start()

    def start(self, job: Callable[[], None]) -> None:
        self._job = job
        self._wake.release()

    def _run(self) -> None:
        while True:
            self._wake.acquire()
            job, self._job = self._job, None
            assert job is not None
            job()


class SimulatedThread:
    """Implements `ports.Thread`. `waits_for` says what it waits for, or is empty while it can run."""

    __slots__ = (
        "_scheduler", "baton", "carrier", "deadline_ns", "done", "error", "ident", "joiners", "name", "number", "target",
        "timed_out", "waits_for",
    )  # fmt: skip

    def __init__(self, scheduler: Scheduler, number: int, name: str, target: Callable[[], object]) -> None:
        self._scheduler = scheduler
        self.number = number
        self.name = name
        self.target = target
        self.baton = threading.Lock()
        self.baton.acquire()
        self.carrier: _Carrier | None = None
        self.ident = 0
        self.waits_for = ""
        self.deadline_ns: int | None = None
        self.timed_out = False
        self.done = False
        self.error: BaseException | None = None
        self.joiners: list[SimulatedThread] = []

    def __repr__(self) -> str:
        state = "ended" if self.done else self.waits_for or "can run"
        return f"<SimulatedThread {self.name}: {state}>"

    def join(self, timeout_ns: int | None = None) -> bool:
        """Wait for its end."""
        scheduler = self._scheduler
        scheduler.step("join", self.name)
        deadline = scheduler.deadline(timeout_ns)
        while not self.done:
            me = scheduler.current
            self.joiners.append(me)
            if not scheduler.block(f"the end of {self.name}", deadline) and not self.done:
                self.joiners.remove(me)
                return False
        return True

    def is_current(self) -> bool:
        """Whether the caller runs in it."""
        return self._scheduler.current is self


class Scheduler:
    """One simulated process. `run` executes its main function, and returns when all of its threads have ended.

    `crash_at`: kill the process at that step. `on_step(call, detail)` is called before every step; `trace` is the
    hash of all steps so far.
    """

    def __init__(
        self,
        seed: object = 0,
        *,
        clock: ManualClock | None = None,
        switch_chance: float = SWITCH_CHANCE,
        crash_at: int | None = None,
        on_step: Callable[[str, str], None] | None = None,
        steps_max: int = STEPS_MAX,
    ) -> None:
        self.clock = clock or ManualClock()
        self.steps = 0
        self.crash_at = crash_at
        self.on_step = on_step
        self.is_dead = False
        self.current: SimulatedThread = SimulatedThread(self, -1, "outside", lambda: None)
        self._chance = random.Random(f"schedule {seed}")
        self._switch_chance = switch_chance
        self._steps_max = steps_max
        self._hash = hashlib.blake2b(digest_size=8)
        self._live: list[SimulatedThread] = []
        self._all: list[SimulatedThread] = []
        self._finished = threading.Lock()
        self._finished.acquire()
        self._problem: BaseException | None = None

    def __repr__(self) -> str:
        return f"<Scheduler step {self.steps}, {len(self._live)} threads, {self.clock!r}>"

    @property
    def trace(self) -> str:
        """A hash over every step: who, what, where. The same seed gives the same one."""
        return self._hash.hexdigest()

    # --- ports.Threads ---

    def condition(self) -> SimulatedCondition[SimulatedThread]:
        """A lock with waiting."""
        return SimulatedCondition(self)

    def event(self) -> SimulatedEvent[SimulatedThread]:
        """A flag."""
        return SimulatedEvent(self)

    def spawn(self, name: str, target: Callable[[], object]) -> SimulatedThread:
        """Start a thread; it runs when the seed says so."""
        self.step("spawn", name)
        return self._add(name, target)

    # --- running ---

    def run(self, main: Callable[[], _T], name: str = "main") -> _T:
        """Run `main` and everything it starts. Call it once, from outside.

        Raises what main raised; ProcessKilled; Deadlock, Livelock; or what another thread died of.
        """
        results: list[_T] = []
        first = self._add(name, lambda: results.append(main()))
        self.current = first
        self._resume(first)
        self._finished.acquire()
        killed = self.is_dead
        self._bury()
        if self._problem is not None:
            raise self._problem
        for thread in self._all:
            if thread.error is not None and not isinstance(thread.error, ProcessKilled):
                raise thread.error
        if killed:
            raise ProcessKilled
        return results[0]

    def kill(self) -> None:
        """End the process here and now: raises ProcessKilled in the caller, and in every other thread."""
        self.is_dead = True
        raise ProcessKilled

    def step(self, call: str, detail: str = "") -> None:
        """One port call: count it, crash here if told to, and perhaps let another thread run first."""
        me = self.current
        if self.is_dead or threading.get_ident() != me.ident:
            self._refuse()
        self.steps += 1
        self._hash.update(f"{me.number} {call} {detail}\n".encode())
        if self.on_step is not None:
            self.on_step(call, detail)
        if self.steps == self.crash_at:
            self.kill()
        if self.steps > self._steps_max:
            self._stop(Livelock(f"no end after {self.steps:,} steps: {self._wait_points()}"))
        if len(self._live) > 1 and self._chance.random() < self._switch_chance:
            self._switch(me)

    def _refuse(self) -> None:
        if threading.get_ident() == self.current.ident or any(
            thread.ident == threading.get_ident() for thread in self._all
        ):
            raise ProcessKilled
        raise RuntimeError("the simulated process has ended, or the caller is none of its threads")

    # --- what waits is made of ---

    def deadline(self, timeout_ns: int | None) -> int | None:
        """The moment at which a wait that begins now ends."""
        return None if timeout_ns is None else self.clock.now_ns + max(0, timeout_ns)

    def block(self, what: str, deadline_ns: int | None) -> bool:
        """Wait until another thread calls `wake` for this one. False if the deadline came first."""
        me = self.current
        me.waits_for, me.deadline_ns, me.timed_out = what, deadline_ns, False
        self._pass_on(me)
        return not me.timed_out

    def wake(self, thread: SimulatedThread) -> None:
        """It can run again."""
        thread.waits_for, thread.deadline_ns = "", None

    def pick(self, threads: list[SimulatedThread]) -> SimulatedThread:
        """One of several, by the seed."""
        return threads[0] if len(threads) == 1 else self._chance.choice(threads)

    # --- the baton ---

    def _add(self, name: str, target: Callable[[], object]) -> SimulatedThread:
        thread = SimulatedThread(self, len(self._all), name, target)
        self._all.append(thread)
        self._live.append(thread)
        return thread

    def _switch(self, me: SimulatedThread) -> None:
        thread = self.pick([thread for thread in self._live if not thread.waits_for])
        if thread is not me:
            self._hand_over(me, thread)

    def _pass_on(self, me: SimulatedThread) -> None:
        thread = self._next()
        if thread is None:
            self._stop(Deadlock(f"all threads wait, and nothing will wake one: {self._wait_points()}"))
        elif thread is not me:
            self._hand_over(me, thread)

    def _hand_over(self, me: SimulatedThread, thread: SimulatedThread) -> None:
        self.current = thread
        self._resume(thread)
        me.baton.acquire()
        if self.is_dead:
            raise ProcessKilled

    def _next(self) -> SimulatedThread | None:
        """Who runs next; time jumps if all wait. None: nobody ever will."""
        while True:
            ready = [thread for thread in self._live if not thread.waits_for]
            if ready:
                return self.pick(ready)
            deadline = min((t.deadline_ns for t in self._live if t.deadline_ns is not None), default=None)
            if deadline is None:
                return None
            self.clock.advance(max(0, deadline - self.clock.now_ns))
            for thread in self._live:
                if thread.deadline_ns is not None and thread.deadline_ns <= self.clock.now_ns:
                    thread.timed_out = True
                    self.wake(thread)

    def _resume(self, thread: SimulatedThread) -> None:
        if thread.carrier is None:
            thread.carrier = _Carrier.idle.pop() if _Carrier.idle else _Carrier()
            thread.carrier.start(lambda: self._carry(thread))
        else:
            thread.baton.release()

    def _carry(self, thread: SimulatedThread) -> None:
        """The life of a simulated thread, in its carrier."""
        thread.ident = threading.get_ident()
        try:
            if not self.is_dead:
                thread.target()
        except BaseException as error:  # noqa: BLE001 - judged by `run`
            thread.error = error
        thread.done = True
        self._live.remove(thread)
        for joiner in thread.joiners:
            self.wake(joiner)
        assert thread.carrier is not None
        _Carrier.idle.append(thread.carrier)
        if self.is_dead:
            self._finished.release()
            return
        following = self._next()
        if following is None:
            if self._live:
                self._problem = Deadlock(
                    f"all threads wait, and nothing will wake one: {self._wait_points()}"
                )
                self.is_dead = True
            self._finished.release()
            return
        self.current = following
        self._resume(following)

    def _stop(self, problem: BaseException) -> None:
        self._problem = problem
        self.kill()

    def _bury(self) -> None:
        """Let every thread that is left see that the process has ended, one after the other."""
        self.is_dead = True
        while self._live:
            thread = self._live[0]
            if thread.carrier is None:
                thread.done = True
                self._live.remove(thread)
                continue
            self.current = thread
            thread.baton.release()
            if not self._finished.acquire(timeout=UNWIND_S):
                raise RuntimeError(f"{thread!r} survives its own death")

    def _wait_points(self) -> str:
        """Each thread, what it waits for, and from where in the engine."""
        frames = sys._current_frames()  # noqa: SLF001 - the documented way to another thread's stack
        return "; ".join(
            f"{thread.name}: {thread.waits_for or 'can run'}{_place(frames.get(thread.ident))}"
            for thread in self._live
        )


def _place(frame: Any) -> str:
    """The innermost line outside the simulation."""
    stack = [
        entry
        for entry in traceback.extract_stack(frame)
        if "/simulation/" not in entry.filename and "threading.py" not in entry.filename
    ]
    return f" at {stack[-1].filename.rpartition('/')[2]}:{stack[-1].lineno}" if frame and stack else ""
