"""Crashes an application that is built around the engine at every point, in every way that a disk allows.

What is not here: pytest (`plugin`), and judging the engine itself (`simulation.explore`).

The idea needed to read it: the application's life is run once on a simulated machine, which is copied wherever anything on it, or
anything that the application has promised, differs from the moment before. Each copy is crashed into every machine that a
kill or a power cut may leave there, and the application's own check runs on each of them, in a new process.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from walbatch.engine import Environment
from walbatch.ports import Clock, FileSystem, Threads
from walbatch.testing.findings import BackendFailures, promises_shown, quiet, unsynced
from walbatch.testing.shipped import environment_of, real_world_refused
from walbatch.testing.simulation.backend import BackendDisk, ModelBackend
from walbatch.testing.simulation.history import Event
from walbatch.testing.simulation.images import Cut, crash_images
from walbatch.testing.simulation.machine import Machine, Process
from walbatch.testing.simulation.scheduler import ForeignThread, ProcessKilled

STATES_MAX: Final = 2_000
"""Crash states that are checked, unless the caller wants more: some seconds of a small application."""

IMAGES_MAX: Final = 64
"""Images of one crash point that are checked one by one; beyond it there are extremes and samples."""

IMAGES_MIN: Final = 4

STEPS_MAX: Final = 100_000
"""Port calls of one life or check: beyond it the application is taken to go on for ever."""

THREAD_CALLS: Final = frozenset({"join", "lock", "notify", "set", "spawn", "wait", "wait for event"})
"""Steps at which nothing is done but that another thread may run."""

THE_END: Final = "the end"


class SimulatedProcess:
    """One life of the application on the simulated machine. Everything that it does to the world goes through this.

    `environment` is for `Engine.open`; `fs`, `clock` and `threads` are for the application's own files, time and threads. It must
    not use real ones: they are neither crashed nor repeatable.
    """

    def __init__(self, process: Process, promises: list[Any], lanes: set[str]) -> None:
        """Not for users: one is given to them. `lanes`: those that had a database in any process of the run."""
        self._process = process
        self._promises = promises
        self._lanes = lanes
        self.environment: Environment = environment_of(process)

    def __repr__(self) -> str:
        return f"<SimulatedProcess {len(self._promises)} promises, {self._process!r}>"

    @property
    def fs(self) -> FileSystem:
        """The machine's file system. Paths are absolute; `/` is all that there is at the beginning."""
        return self._process.fs

    @property
    def clock(self) -> Clock:
        """Virtual time."""
        return self._process.clock

    @property
    def threads(self) -> Threads:
        """Simulated threads, of which one runs at a time, and what they wait on."""
        return self._process.threads

    def promise(self, value: Any) -> None:
        """Note what the application's user was told, a copy of it: from here on it must hold after any crash."""
        try:
            kept = copy.deepcopy(value)
        except Exception as error:
            raise TypeError(
                f"a promise must be a value that can be copied, and not {value!r}: {error}"
            ) from error
        self._promises.append(kept)

    @property
    def promises(self) -> Sequence[Any]:
        """What was promised before the crash, and since, in order."""
        return tuple(self._promises)

    def pause(self, seconds: float) -> None:
        """Let virtual time pass."""
        self._process.threads.event().wait(int(seconds * 1e9))

    def database(self, lane: str, *, transactional: bool = False) -> ModelBackend:
        """A stand-in for a database, as the backend of one lane: durable when it answers, and no crash takes anything back."""
        self._lanes.add(lane)
        return self._process.backend(lane, transactional=transactional)

    def content(self, lane: str) -> Mapping[bytes, bytes]:
        """What the database of a lane holds: key -> payload. KeyError for a lane of which no process has asked for one."""
        backends = self._process.machine.backends
        if lane not in backends and lane not in self._lanes:
            raise KeyError(
                f"lane {lane!r} has no database: there is one for {sorted({*self._lanes, *backends})}, each made by "
                "process.database(lane)"
            )
        return backends.get(lane, BackendDisk()).content


Use = Callable[[SimulatedProcess], object]
"""The life of an application, or the check of what a crash has left of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CrashPlan:
    """How much is done. `states_max` None: every image of every crash point, up to 64 for each."""

    seed: int = 0
    states_max: int | None = STATES_MAX
    strict: bool = True
    """A power cut keeps any subset of the names that were not synced; False: a prefix."""
    replay: str = ""
    """A line that a failure printed: nothing but this crash is done."""


class CrashFailure(AssertionError):
    """The application did not keep a promise. `replay` is the line that does just this crash again."""

    def __init__(self, message: str, replay: str) -> None:
        self.replay = replay
        super().__init__(message)


@dataclass(slots=True, kw_only=True)
class CrashReport:
    """What was done. `states` counts crash images, `checks` the different ones among them; `points` are crash points.

    `sampled` of the points have more images than were checked.
    """

    points: int = 0
    points_in_all: int = 0
    sampled: int = 0
    states: int = 0
    checks: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        points = (
            f"{self.points} of {self.points_in_all}" if self.points < self.points_in_all else f"{self.points}"
        )
        return f"{points} crash points, {self.states} states, {self.checks} checks in {self.seconds:.1f} s"

    @property
    def left_out(self) -> str:
        """What was not checked; empty where that is nothing."""
        points, images = "", ""
        if self.points < self.points_in_all:
            points = f"{self.points_in_all - self.points} of {self.points_in_all} crash points left out"
        if self.sampled:
            images = f"only extremes and samples of the images of {self.sampled} crash points"
        return "; ".join(filter(None, (points, images)))


@dataclass(frozen=True, slots=True)
class _Point:
    """A moment at which the process may end."""

    step: int
    machine: Machine
    promises: int
    call: str
    detail: str

    @property
    def inside_write(self) -> bool:
        """Whether a write had come to the end of a page, and not to its own."""
        return self.call == "write page"

    @property
    def call_word(self) -> str:
        """The call as a word of a line."""
        return self.call.replace(" ", "_")

    def __str__(self) -> str:
        if self.call in THREAD_CALLS:
            return "at a thread switch"
        if self.call == THE_END:
            return "at the end"
        return f"before {self.call} of {self.detail}" if self.detail else f"before {self.call}"


@dataclass(slots=True)
class CrashRun:
    """One application under test: `use` is its life, `check` looks at what a crash has left, in a process of its own.

    `failures`: the exceptions that mean that a check fails; others pass through.
    """

    use: Use
    check: Use
    plan: CrashPlan = field(default_factory=CrashPlan)
    failures: tuple[type[BaseException], ...] = (Exception,)
    report: CrashReport = field(default_factory=CrashReport)
    _promises: list[Any] = field(default_factory=list)
    _lanes: set[str] = field(default_factory=set)
    _checked: set[object] = field(default_factory=set)
    _backends: BackendFailures = field(default_factory=BackendFailures)

    def run(self) -> CrashReport:
        """Crash everywhere. Raises CrashFailure for the first promise that is not kept; what `use` raises passes through.

        ValueError where the test itself is wrong: `use` does nothing to the machine, or the line to be replayed is not of it.
        """
        __tracebackhide__ = True
        started = time.perf_counter()
        with quiet(self._backends), real_world_refused():
            try:
                if self.plan.replay:
                    self._replay(self.plan.replay)
                else:
                    self._explore()
            except CrashFailure:
                raise
            except Exception as error:
                if self._backends.last is not None:
                    error.add_note(str(self._backends))
                raise
        self.report.seconds = time.perf_counter() - started
        return self.report

    def _explore(self) -> None:
        __tracebackhide__ = True
        machine = Machine()
        before = machine.version()
        points = self._live(machine)
        if machine.version() == before:
            raise ValueError(
                "use changed nothing on the simulated disk: pass environment=process.environment to Engine.open, and do I/O "
                "through process.fs"
            )
        self.report.points_in_all = len(points)
        images_max, stride = IMAGES_MAX, 1
        most = self.plan.states_max
        if most is not None:
            images_max = min(IMAGES_MAX, max(IMAGES_MIN, most // (2 * len(points))))
            # With fewer states than that takes, points are left out: other ones for another seed.
            stride = -(-len(points) * (IMAGES_MIN + 1) // most)
        for first in range(stride):
            for point in points[(self.plan.seed + first) % stride :: stride]:
                if most is not None and first and self.report.states + images_max >= most:
                    return
                self._crash(point, images_max)

    def _crash(self, point: _Point, images_max: int) -> None:
        """Crash at one point, in all ways."""
        __tracebackhide__ = True
        self.report.points += 1
        given = f"seed={self.plan.seed} strict={int(self.plan.strict)} images={images_max}"
        for cut in Cut:
            if point.inside_write and cut is Cut.POWER:
                continue  # among the images of the point behind the write
            if not next(
                crash_images(point.machine.fs, cut, bound=images_max, strict=self.plan.strict)
            ).exhaustive:
                self.report.sampled += 1
            for label, machine in self._images(point.machine, cut, images_max):
                line = f"{given} crash={point.step} call={point.call_word} image={label}"
                self._judge(machine, self._promises[: point.promises], line, point)

    def _replay(self, line: str) -> None:
        """Do one crash again, with a real kill in the middle of the life."""
        __tracebackhide__ = True
        words = dict(word.partition("=")[::2] for word in line.split())
        try:
            seed, step, images_max = int(words["seed"]), int(words["crash"]), int(words["images"])
            self.plan = CrashPlan(seed=seed, strict=words["strict"] == "1")
            label, call = words["image"], words["call"]
            cut = Cut(label.partition("/")[0])
        except (KeyError, ValueError) as error:
            raise ValueError(f"not the line of a failure: {line!r} ({error})") from error
        changed = "it is not what it was when the line was printed; run the whole test again"
        self._live(Machine())  # for what only the whole life tells: which lanes have a database
        point = self._live(Machine(), crash_at=step)[-1]
        if point.step != step:
            raise ValueError(f"the application ends before step {step}: {changed}")
        if point.call_word != call:
            raise ValueError(
                f"step {step} of the application is {point.call_word!r} and no more {call!r}: {changed}"
            )
        self.report.points = self.report.points_in_all = 1
        found = dict(self._images(point.machine, cut, images_max))
        if label not in found:
            raise ValueError(f"the crash at step {step} has no image {label!r}: {changed}")
        self._judge(found[label], self._promises, line, point)

    def _images(self, machine: Machine, cut: Cut, images_max: int) -> Iterator[tuple[str, Machine]]:
        return machine.images(
            cut,
            bound=images_max,
            samples=max(2, images_max // 3),
            seed=self.plan.seed,
            strict=self.plan.strict,
        )

    def _live(self, machine: Machine, crash_at: int | None = None) -> list[_Point]:
        """Run the application's life; its crash points, or nothing but the last of them where it is told to crash."""
        self._promises.clear()
        history: list[Event] = []
        points: list[_Point] = []
        seen: object = None
        last = (THE_END, "")
        process = Process(machine, history, seed=self.plan.seed, life="use", crash_at=crash_at)
        threads = process.threads

        def look(call: str, detail: str) -> None:
            nonlocal seen, last
            if crash_at is not None:
                last = (call, detail)
                return
            now = (machine.version(), len(self._promises), call == "write page")
            if now != seen:
                seen = now
                points.append(_Point(threads.steps, machine.clone(), len(self._promises), call, detail))

        threads.on_step = look
        with contextlib.suppress(ProcessKilled):
            self._run(process, lambda: self.use(SimulatedProcess(process, self._promises, self._lanes)))
        step = threads.steps
        if step != crash_at:
            step, last = step + 1, (THE_END, "")
        points.append(_Point(step, machine.clone(), len(self._promises), *last))
        return points

    def _judge(self, machine: Machine, promises: list[Any], line: str, point: _Point) -> None:
        """Run the check on what a crash has left. What is the same to the last byte, and was promised the same, is checked once."""
        __tracebackhide__ = True
        self.report.states += 1
        key = (machine.fingerprint(), len(promises))
        if key in self._checked:
            return
        self._checked.add(key)
        self.report.checks += 1
        process = Process(machine.clone(), [], seed=self.plan.seed, life="check")

        def look() -> None:
            __tracebackhide__ = True
            self.check(SimulatedProcess(process, list(promises), self._lanes))

        try:
            self._run(process, look)
        except ForeignThread:
            raise
        except self.failures as error:
            lines = [
                f"after a crash {point} the check fails: {type(error).__name__}: {error}",
                f"promised by then: {promises_shown(promises)}",
                f"not synced by then: {unsynced(point.machine)}",
                str(self._backends),
                f"replay this crash alone with: --walbatch-replay '{line}'",
            ]
            raise CrashFailure("\n".join(filter(None, lines)), line) from error

    def _run(self, process: Process, main: Callable[[], object]) -> None:
        """Run a process. It ends with `main`, however that ends: an engine that is left open would go on for ever."""
        __tracebackhide__ = True
        problems: list[Exception] = []
        returned = False
        self._backends.last = None
        process.threads.steps_max = STEPS_MAX

        def guarded() -> None:
            nonlocal returned
            __tracebackhide__ = True
            try:
                main()
                returned = True
            except Exception as error:  # noqa: BLE001 - raised below, outside
                problems.append(error)
            if problems or not process.threads.is_alone:
                process.threads.kill()

        try:
            process.run(guarded)
        except ProcessKilled:
            if problems:
                raise problems[0] from None
            if not returned:
                raise
