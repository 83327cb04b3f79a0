"""Crashes an application that is built around the engine at every point, in every way that a disk allows.

What is not here: pytest (`plugin`), and judging the engine itself (`simulation.explore`).

The idea needed to read it: the application's life is run once on a simulated machine, which is copied wherever anything on it, or
anything that the application has promised, differs from the moment before. Each copy is crashed into every machine that a
kill or a power cut may leave there, and the application's own check runs on each of them, in a new process.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from walbatch.engine import Environment
from walbatch.ports import Clock, FileSystem, Threads
from walbatch.testing.shipped import environment_of
from walbatch.testing.simulation.backend import BackendDisk, ModelBackend
from walbatch.testing.simulation.history import Event
from walbatch.testing.simulation.images import Cut
from walbatch.testing.simulation.machine import Machine, Process
from walbatch.testing.simulation.scheduler import ProcessKilled

STATES_MAX: Final = 2_000
"""Crash states that are checked, unless the caller wants more: some seconds of a small application."""

IMAGES_MAX: Final = 64
"""Images of one crash point that are checked one by one; beyond it there are extremes and samples."""

IMAGES_MIN: Final = 4


class SimulatedProcess:
    """One life of the application on the simulated machine. Everything that it does to the world goes through this.

    `environment` is for `Engine.open`; `fs`, `clock` and `threads` are for the application's own files, time and threads. It must
    not use real ones: they are neither crashed nor repeatable.
    """

    def __init__(self, process: Process, promises: list[Any]) -> None:
        """Not for users: one is given to them."""
        self._process = process
        self._promises = promises
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
        """Note what the application's user was told: from here on it must hold after any crash."""
        self._promises.append(value)

    @property
    def promises(self) -> Sequence[Any]:
        """What was promised before the crash, and since, in order."""
        return tuple(self._promises)

    def pause(self, seconds: float) -> None:
        """Let virtual time pass."""
        self._process.threads.event().wait(int(seconds * 1e9))

    def database(self, lane: str, *, transactional: bool = False) -> ModelBackend:
        """A stand-in for a database, as the backend of one lane: durable when it answers, and no crash takes anything back."""
        return self._process.backend(lane, transactional=transactional)

    def content(self, lane: str) -> Mapping[bytes, bytes]:
        """What the database of a lane holds: key -> payload."""
        return self._process.machine.backends.get(lane, BackendDisk()).content


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
    """What was done. `states` counts crash images, `checks` the different ones among them; `points` are crash points."""

    points: int = 0
    points_in_all: int = 0
    states: int = 0
    checks: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        points = (
            f"{self.points} of {self.points_in_all}" if self.points < self.points_in_all else f"{self.points}"
        )
        return f"{points} crash points, {self.states} states, {self.checks} checks in {self.seconds:.1f} s"


@dataclass(frozen=True, slots=True)
class _Point:
    """A moment at which the process may end."""

    step: int
    machine: Machine
    promises: int
    call: str
    inside_write: bool


@dataclass(slots=True)
class CrashRun:
    """One application under test: `use` is its life, `check` looks at what a crash has left, in a process of its own."""

    use: Use
    check: Use
    plan: CrashPlan = field(default_factory=CrashPlan)
    report: CrashReport = field(default_factory=CrashReport)
    _promises: list[Any] = field(default_factory=list)
    _checked: set[object] = field(default_factory=set)

    def run(self) -> CrashReport:
        """Crash everywhere. Raises CrashFailure for the first promise that is not kept; what `use` raises passes through."""
        __tracebackhide__ = True
        started = time.perf_counter()
        with _quiet():
            if self.plan.replay:
                self._replay(self.plan.replay)
            else:
                self._explore()
        self.report.seconds = time.perf_counter() - started
        return self.report

    def _explore(self) -> None:
        __tracebackhide__ = True
        points = self._live(Machine())
        images_max = IMAGES_MAX
        if self.plan.states_max is not None:
            images_max = min(IMAGES_MAX, max(IMAGES_MIN, self.plan.states_max // (2 * len(points))))
            # With fewer states than that takes, points are left out: other ones for another seed.
            stride = -(-len(points) * (IMAGES_MIN + 1) // self.plan.states_max)
            self.report.points_in_all = len(points)
            points = points[self.plan.seed % stride :: stride]
        self.report.points = len(points)
        given = f"seed={self.plan.seed} strict={int(self.plan.strict)} images={images_max}"
        for point in points:
            for cut in Cut:
                if point.inside_write and cut is Cut.POWER:
                    continue  # among the images of the point behind the write
                for label, machine in self._images(point.machine, cut, images_max):
                    line = f"{given} crash={point.step} image={label}"
                    self._judge(machine, self._promises[: point.promises], line, point.call)

    def _replay(self, line: str) -> None:
        """Do one crash again, with a real kill in the middle of the life."""
        __tracebackhide__ = True
        words = dict(word.partition("=")[::2] for word in line.split())
        try:
            seed, step, images_max = int(words["seed"]), int(words["crash"]), int(words["images"])
            self.plan = CrashPlan(seed=seed, strict=words["strict"] == "1")
            label = words["image"]
            cut = Cut(label.partition("/")[0])
        except (KeyError, ValueError) as error:
            raise ValueError(f"not the line of a failure: {line!r} ({error})") from error
        machine = Machine()
        self._live(machine, crash_at=step)
        self.report.points = 1
        found = dict(self._images(machine, cut, images_max))
        if label not in found:
            raise ValueError(
                f"the crash at step {step} has no image {label!r}: the application is not what it was"
            )
        self._judge(found[label], self._promises, line, "the step of the line")

    def _images(self, machine: Machine, cut: Cut, images_max: int) -> Iterator[tuple[str, Machine]]:
        return machine.images(
            cut,
            bound=images_max,
            samples=max(2, images_max // 3),
            seed=self.plan.seed,
            strict=self.plan.strict,
        )

    def _live(self, machine: Machine, crash_at: int | None = None) -> list[_Point]:
        """Run the application's life; its crash points."""
        self._promises.clear()
        history: list[Event] = []
        points: list[_Point] = []
        seen: object = None

        def look(process: Process, call: str) -> None:
            nonlocal seen
            now = (process.machine.version(), len(self._promises), call == "write page")
            if now != seen:
                seen = now
                points.append(_point(process, len(self._promises), call))

        process = Process(
            machine, history, seed=self.plan.seed, life="use", crash_at=crash_at,
            on_step=look if crash_at is None else None,
        )  # fmt: skip
        with contextlib.suppress(ProcessKilled):
            _run(process, lambda: self.use(SimulatedProcess(process, self._promises)))
        end = _point(process, len(self._promises), "the end")
        points.append(_Point(end.step + 1, end.machine, end.promises, end.call, inside_write=False))
        return points

    def _judge(self, machine: Machine, promises: list[Any], line: str, call: str) -> None:
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
            self.check(SimulatedProcess(process, list(promises)))

        try:
            _run(process, look)
        except Exception as error:
            raise CrashFailure(
                f"after a crash before {call!r} the check fails: {type(error).__name__}: {error}\n"
                f"promised by then: {_shown(promises)}\n"
                f"replay this crash alone with: --walbatch-replay '{line}'",
                line,
            ) from error


def _run(process: Process, main: Callable[[], object]) -> None:
    """Run a process. Where `main` raises, it ends at once: an engine that it left open would go on for ever."""
    __tracebackhide__ = True
    problems: list[Exception] = []

    def guarded() -> None:
        __tracebackhide__ = True
        try:
            main()
        except Exception as error:  # noqa: BLE001 - raised below, outside
            problems.append(error)
            process.threads.kill()

    try:
        process.run(guarded)
    except ProcessKilled:
        if problems:
            raise problems[0] from None
        raise


def _point(process: Process, promises: int, call: str) -> _Point:
    return _Point(process.threads.steps, process.machine.clone(), promises, call, call == "write page")


def _shown(promises: Sequence[Any]) -> str:
    """The last few promises."""
    shown = ", ".join(repr(value)[:60] for value in promises[-5:])
    return f"{len(promises)} things, the last of them {shown}" if promises else "nothing"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The engine logs what it finds; here that is thousands of times the same."""
    logger = logging.getLogger("walbatch")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
