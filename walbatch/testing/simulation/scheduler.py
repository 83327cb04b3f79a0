"""A seeded scheduler: simulated threads of which one runs at a time, and a schedule says which.

Implements `ports.Threads`. What is not here: what threads wait on (`waiting`), who is chosen (`schedules`), and the files they
work with (`filesystem`, which calls `step` before each of its calls).

The idea needed to read it: the threads are greenlets in one real thread. Whoever runs goes on until a port call, a lock or
a wait; there the schedule may let another one run. When none can, time jumps to the next deadline; when there is no deadline
either, that is a deadlock. When the process is killed, every thread gets `ProcessKilled` at its next port call, and
at all later ones. (A lock of `threading` that one simulated thread holds and another one wants would stop everything: code
under test waits through its ports only.)
"""

from __future__ import annotations

import hashlib
import threading
import traceback
from collections.abc import Callable
from typing import Any, Final, TypeVar

try:
    from greenlet import getcurrent, greenlet
except ImportError as error:
    raise ImportError("the simulation needs greenlet: pip install 'walbatch[testing]'") from error

from walbatch.testing.simulation.clock import ManualClock
from walbatch.testing.simulation.schedules import RandomSchedule, Schedule
from walbatch.testing.simulation.waiting import SimulatedCondition, SimulatedEvent

STEPS_MAX: Final = 2_000_000
"""Port calls of one run: beyond it the engine is taken to spin for ever."""

UNWINDS_MAX: Final = 1_000
"""How often a killed thread is told so before it is taken to survive its own death."""

TRACE_STEPS: Final = 4_096
"""Steps that are kept before they go into the trace's hash."""

_T = TypeVar("_T")


class ProcessKilled(BaseException):
    """The simulated process has ended: no thread of it ever runs again. Not an Exception, so that nobody handles it."""


class Deadlock(AssertionError):
    """All threads wait, and nothing will ever wake one. Names each thread's wait point."""


class Livelock(AssertionError):
    """The threads run on and on."""


class ForeignThread(RuntimeError):
    """A thread that is none of the process's has called a port: what it does is neither crashed nor repeatable."""


class SimulatedThread:
    """Implements `ports.Thread`. `waits_for` says what it waits for, or is empty while it can run."""

    __slots__ = (
        "_scheduler", "deadline_ns", "done", "error", "joiners", "name", "number", "target", "timed_out", "track", "waits_for",
    )  # fmt: skip

    def __init__(self, scheduler: Scheduler, number: int, name: str, target: Callable[[], object]) -> None:
        self._scheduler = scheduler
        self.number = number
        self.name = name
        self.target = target
        self.track: greenlet | None = None
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
        schedule: Schedule | None = None,
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
        self._schedule: Schedule = schedule or RandomSchedule(seed)
        self.steps_max = steps_max
        self._hash = hashlib.blake2b(digest_size=8)
        self._traced: list[tuple[int, str, str]] = []
        self._live: list[SimulatedThread] = []
        self._all: list[SimulatedThread] = []
        self._problem: BaseException | None = None
        self._outside: greenlet | None = None

    def __repr__(self) -> str:
        return f"<Scheduler step {self.steps}, {len(self._live)} threads, {self.clock!r}>"

    @property
    def trace(self) -> str:
        """A hash over every step: who, what, where. The same seed gives the same one."""
        self._hash.update(repr(self._traced).encode())
        self._traced = []
        return self._hash.hexdigest()

    # --- ports.Threads ---

    def condition(self) -> SimulatedCondition[SimulatedThread]:
        """A lock with waiting."""
        return SimulatedCondition(self)

    def event(self) -> SimulatedEvent[SimulatedThread]:
        """A flag."""
        return SimulatedEvent(self)

    def spawn(self, name: str, target: Callable[[], object]) -> SimulatedThread:
        """Start a thread; it runs when the schedule says so."""
        self.step("spawn", name)
        return self._add(name, target)

    # --- running ---

    def run(self, main: Callable[[], _T], name: str = "main") -> _T:
        """Run `main` and everything it starts. Call it once, from outside.

        Raises what main raised; ProcessKilled; Deadlock, Livelock, ForeignThread; or what another thread died of.
        """
        results: list[_T] = []
        self._outside = getcurrent()
        self._add(name, lambda: results.append(main()))
        while self._live and not self.is_dead:
            following = self._next()
            if following is None:
                self._problem = self._problem or self._deadlock()
                break
            self._resume(following)
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

    @property
    def is_alone(self) -> bool:
        """Whether the thread that runs is the last one."""
        return len(self._live) == 1

    def kill(self) -> None:
        """End the process here and now: raises ProcessKilled in the caller, and in every other thread."""
        self.is_dead = True
        raise ProcessKilled

    def step(self, call: str, detail: str = "") -> None:
        """One port call: count it, crash here if told to, and perhaps let another thread run first."""
        me = self.current
        if self.is_dead or getcurrent() is not me.track:
            self._refuse(call, detail)
        self.steps += 1
        traced = self._traced
        traced.append((me.number, call, detail))
        if self.on_step is not None:
            self.on_step(call, detail)
        if self.steps == self.crash_at:
            self.kill()
        if len(traced) >= TRACE_STEPS:
            self._hash.update(repr(traced).encode())
            traced.clear()
        if self.steps > self.steps_max:
            self._stop(Livelock(f"no end after {self.steps:,} steps: {self._wait_points()}"))
        if len(self._live) > 1:
            thread = self._schedule.at_step(me, self._live)
            if thread is not me:
                self._hand_over(thread)

    def _refuse(self, call: str, detail: str) -> None:
        here = getcurrent()
        if any(thread.track is here for thread in self._all):
            raise ProcessKilled
        if self._outside is None or self.is_dead:
            raise RuntimeError("the simulated process has ended, or has not begun")
        # Its caller may swallow this, and most do not look at what a thread of theirs has died of: `run` raises it as well.
        self._problem = ForeignThread(
            f"{call!r}{f' of {detail}' if detail else ''} was called from the real thread {threading.current_thread().name!r}: "
            "asyncio and real threads cannot run here; use Engine and process.threads"
        )
        raise self._problem

    # --- what waits is made of ---

    def deadline(self, timeout_ns: int | None) -> int | None:
        """The moment at which a wait that begins now ends."""
        return None if timeout_ns is None else self.clock.now_ns + max(0, timeout_ns)

    def block(self, what: str, deadline_ns: int | None) -> bool:
        """Wait until another thread calls `wake` for this one. False if the deadline came first."""
        me = self.current
        me.waits_for, me.deadline_ns, me.timed_out = what, deadline_ns, False
        thread = self._next()
        if thread is None:
            self._stop(self._deadlock())
        elif thread is not me:
            self._hand_over(thread)
        return not me.timed_out

    def wake(self, thread: SimulatedThread) -> None:
        """It can run again."""
        thread.waits_for, thread.deadline_ns = "", None

    def pick(self, threads: list[SimulatedThread]) -> SimulatedThread:
        """One of several, by the schedule."""
        return threads[0] if len(threads) == 1 else self._schedule.choose(threads)

    # --- the baton ---

    def _add(self, name: str, target: Callable[[], object]) -> SimulatedThread:
        thread = SimulatedThread(self, len(self._all), name, target)
        self._all.append(thread)
        self._live.append(thread)
        return thread

    def _hand_over(self, thread: SimulatedThread) -> None:
        self._resume(thread)
        if self.is_dead:
            raise ProcessKilled

    def _next(self) -> SimulatedThread | None:
        """Who runs next; time jumps if all wait. None: nobody ever will."""
        while True:
            ready = [thread for thread in self._live if not thread.waits_for]
            if ready:
                return ready[0] if len(ready) == 1 else self._schedule.of_ready(ready)
            deadline = min((t.deadline_ns for t in self._live if t.deadline_ns is not None), default=None)
            if deadline is None:
                return None
            self.clock.advance(max(0, deadline - self.clock.now_ns))
            for thread in self._live:
                if thread.deadline_ns is not None and thread.deadline_ns <= self.clock.now_ns:
                    thread.timed_out = True
                    self.wake(thread)

    def _resume(self, thread: SimulatedThread) -> None:
        """Let it run. Returns when the caller is resumed, in `run` also when it has ended."""
        self.current = thread
        if thread.track is None:
            thread.track = greenlet(self._carry, parent=self._outside)
            thread.track.switch(thread)
        else:
            thread.track.switch()

    def _carry(self, thread: SimulatedThread) -> None:
        """The life of a simulated thread. Its end leads back to `run`."""
        try:
            if not self.is_dead:
                thread.target()
        except BaseException as error:  # noqa: BLE001 - judged by `run`
            thread.error = error
            if thread.number == 0:
                self.is_dead = (
                    True  # what the first thread dies of ends the process: nobody is left to close anything
                )
        thread.done = True
        self._live.remove(thread)
        for joiner in thread.joiners:
            self.wake(joiner)

    def _deadlock(self) -> Deadlock:
        return Deadlock(f"all threads wait, and nothing will wake one: {self._wait_points()}")

    def _stop(self, problem: BaseException) -> None:
        self._problem = self._problem or problem
        self.kill()

    def _bury(self) -> None:
        """Let every thread that is left see that the process has ended, one after the other."""
        self.is_dead = True
        while self._live:
            thread = self._live[0]
            if thread.track is None:
                thread.done = True
                self._live.remove(thread)
                continue
            for _ in range(UNWINDS_MAX):
                if thread.track.dead:
                    break
                self.current = thread
                thread.track.throw(ProcessKilled)
            else:
                raise RuntimeError(f"{thread!r} survives its own death")
        # A thread holds its scheduler, and its track holds the frames: let go, so that both are freed at once.
        for thread in self._all:
            thread.joiners = []

    def _wait_points(self) -> str:
        """Each thread, what it waits for, and from where in the engine."""
        return "; ".join(
            f"{thread.name}: {thread.waits_for or 'can run'}{_place(thread.track)}" for thread in self._live
        )


def _place(track: greenlet | None) -> str:
    """The innermost line outside the simulation."""
    frame: Any = None
    if track is not None:
        frame = track.gr_frame  # None for the one that runs
    stack = [
        entry
        for entry in traceback.extract_stack(frame)
        if "/simulation/" not in entry.filename and "/greenlet" not in entry.filename
    ]
    return (
        f" at {stack[-1].filename.rpartition('/')[2]}:{stack[-1].lineno}"
        if track is not None and stack
        else ""
    )
