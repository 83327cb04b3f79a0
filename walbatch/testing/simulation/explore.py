"""Exploration: a workload, cut off everywhere, in every way, recovered, and judged.

What is not here: the workloads, and the rules.

The idea needed to read it: one run of a workload passes through all of its crash points, so it is run once, and the machine
is copied wherever it or the user's knowledge differs from the point before. Killing the process there would leave
just this copy (`replay` does it so). Each copy is then crashed into its images, and each image is recovered by a second
run of the engine, with a second crash at every point inside it where that is asked for. What recovers the same is
recovered once, and judged with every history that led to it. "The same" is decided by a look, if there is one: a cheap
reading of the image with the property that images which look alike are recovered alike. Now and then that property is put to
the test: an image is recovered although it looks like one before.
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

from walbatch.testing.simulation.faults import Fault, FaultPlan
from walbatch.testing.simulation.filesystem import SimulatedFileSystem
from walbatch.testing.simulation.history import AppliedTo, Ended, Event, Letters, Opened, Submitted
from walbatch.testing.simulation.images import Cut
from walbatch.testing.simulation.machine import Machine, Process
from walbatch.testing.simulation.scheduler import ProcessKilled
from walbatch.testing.simulation.schedules import RandomSchedule, Schedule
from walbatch.testing.simulation.verify import verify_by_use
from walbatch.testing.simulation.workload import OpenEngine, Session, Workload

WrapFs = Callable[[SimulatedFileSystem], SimulatedFileSystem]
ScheduleOf = Callable[[object], Schedule]
Look = Callable[[Machine], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How far to go. `bound` and `samples` are those of `images`; `depth` is how many crashes follow one another."""

    seed: int = 0
    cuts: tuple[Cut, ...] = (Cut.POWER, Cut.KILL)
    strict: bool = False
    bound: int = 64
    samples: int = 24
    depth: int = 1
    inner_bound: int = 12
    """The bound of crashes inside recovery."""
    inner_samples: int = 4
    failures_max: int = 5
    schedule: ScheduleOf = RandomSchedule
    """Makes the schedule of each life from a seed."""
    recheck: float = 1 / 64
    """How often an image that looks like an earlier one is recovered all the same."""
    from_first_submit: bool = False
    """Leave out the crashes before anything was submitted: making a new store is the same for all workloads."""
    states_max: int | None = None
    seconds: float | None = None
    """Real time after which the exploration stops where it is; what it reports is then not everything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One breach, and the line that replays it."""

    problem: str
    replay: str

    def __str__(self) -> str:
        return f"{self.problem}\n  replay: {self.replay}"


@dataclass(slots=True)
class Report:
    """What was explored.

    `states` counts pairs of a history and a crash image, no two of them equal; each was read by the look, or recovered.
    `recoveries` counts lives of the whole engine on an image.
    """

    workload: str
    points: int = 0
    states: int = 0
    repeats: int = 0
    """Images that equalled an earlier one with the same history: not counted as states."""
    recoveries: int = 0
    rechecks: int = 0
    """Recoveries of images that looked like one before."""
    calls: Counter[str] = field(default_factory=Counter)
    """States by the call at which the process ended."""
    trace: str = ""
    seconds: float = 0.0
    complete: bool = True
    failures: list[Failure] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.workload}: {self.points} crash points, {self.states} states, {self.recoveries} recoveries, "
            f"{self.states / max(self.seconds, 1e-9):.0f} states/s, trace {self.trace}, {len(self.failures)} failures"
        )


@dataclass(frozen=True, slots=True)
class _Point:
    """A moment at which the process may end."""

    step: int
    now_ns: int
    machine: Machine
    events: int
    call: str

    @property
    def inside_write(self) -> bool:
        return self.call == "write page"


@dataclass(slots=True)
class _Life:
    """One recovered life: what it added to the history, what it died of, and its own crash points."""

    events: list[Event]
    error: str
    points: list[_Point]
    ended_ns: int = 0


class Explorer:
    """Explores one workload. `wrap_fs` may put a faulty file system between the engine and the disk.

    `look(machine)` reads a crash image without changing it, and returns a value such that images of equal value are recovered
    alike; None where it cannot say. Without it, only equal images are.
    """

    def __init__(
        self, open_engine: OpenEngine, workload: Workload, plan: Plan | None = None, *, wrap_fs: WrapFs | None = None,
        look: Look | None = None,
    ) -> None:  # fmt: skip
        self.plan = plan or Plan()
        self.workload = workload
        self.report = Report(workload.name)
        self._open_engine = open_engine
        self._wrap_fs = wrap_fs
        self._look = look
        self._lives: dict[object, _Life] = {}
        self._judged: set[int] = set()
        self._seen: set[int] = set()
        self._chance = random.Random(f"recheck {self.plan.seed}")
        self._deadline = 0.0
        self.calls: Counter[str] = Counter()
        """Calls that the workload made of the file system and the state, by kind, once it has run."""

    def run(self) -> Report:
        """Explore until done, the time is over, or there are enough failures."""
        started = time.perf_counter()
        self._deadline = started + (self.plan.seconds if self.plan.seconds is not None else 1e9)
        with quiet():
            self._run()
        self.report.seconds = time.perf_counter() - started
        return self.report

    def _run(self) -> None:
        history: list[Event] = []
        life, trace = self._live(
            self._machine(),
            history,
            "0",
            self.workload.run,
            faults=self.workload.faults,
            watch=bool(self.plan.cuts),
        )
        self.report.trace = trace
        self.report.points = len(life.points)
        where = f"workload={word(self.workload.name)} seed={self.plan.seed}" + " strict=1" * self.plan.strict
        if life.error:
            self._fail(life.error, where)
        self._judge(history, where)
        points = life.points
        if self.plan.from_first_submit:
            first = next((n for n, event in enumerate(history) if isinstance(event, Submitted)), len(history))
            points = [point for point in points if point.events > first]
        self._crash_at(points, history, (), where, depth=1)

    def _crash_at(
        self, points: Sequence[_Point], history: list[Event], past: tuple[object, ...], where: str, *, depth: int, base: int = 0
    ) -> None:  # fmt: skip
        """Crash at every point of a life whose events follow the first `base` ones of `history`. `past` names that history."""
        plan = self.plan
        bound, samples = (plan.bound, plan.samples) if depth == 1 else (plan.inner_bound, plan.inner_samples)
        for point in points:
            for cut in plan.cuts:
                if point.inside_write and cut is Cut.POWER:
                    continue  # among the images of the point behind the write
                before = [*history[: base + point.events], Ended(cut=cut, at_ns=point.now_ns)]
                images = point.machine.images(
                    cut, bound=bound, samples=samples, seed=plan.seed, strict=plan.strict
                )
                for label, machine in images:
                    if self._is_over():
                        self.report.complete = False
                        return
                    here = f"{where} crash={point.step} image={label}"
                    self._recover(machine, before, (*past, point.events, cut), here, point.call, depth=depth)

    def _is_over(self) -> bool:
        plan, report = self.plan, self.report
        return (
            time.perf_counter() > self._deadline
            or len(report.failures) >= plan.failures_max
            or (plan.states_max is not None and report.states >= plan.states_max)
        )

    def _recover(
        self, machine: Machine, before: list[Event], past: tuple[object, ...], where: str, call: str, *, depth: int
    ) -> None:  # fmt: skip
        # Hashes stand for what they are made of: 2^64 of them, and millions of states.
        exact = hash(machine.fingerprint())
        state = hash((past, exact))
        if state in self._seen:
            self.report.repeats += 1
            return
        self._seen.add(state)
        self.report.states += 1
        self.report.calls[call] += 1
        # What a kill leaves reads like what a power cut leaves, but may be lost yet by a later cut: where one can come, only equal
        # images are the same.
        comparable = past[-1] is Cut.POWER or depth == self.plan.depth
        seen = self._look(machine) if self._look is not None and comparable else None
        key = exact if seen is None else hash(seen)
        past = (*past, key)
        judged = hash(past)
        again = judged in self._judged
        if again and self._chance.random() >= self.plan.recheck:
            return
        self._judged.add(judged)
        life = self._lives.get((key, depth))
        if again and life is not None:
            self._compare(life, machine, where, depth)
            return
        if life is None:
            self.report.recoveries += 1
            life, _ = self._live(
                machine.clone(), [], str(depth), verify_by_use, watch=depth < self.plan.depth
            )
            self._lives[key, depth] = life
        history = [*before, *life.events]
        if life.error:
            self._fail(life.error, where)
        self._judge(history, where)
        if depth < self.plan.depth:
            self._crash_at(life.points, history, past, where, depth=depth + 1, base=len(before))

    def _compare(self, life: _Life, machine: Machine, where: str, depth: int) -> None:
        """Recover an image that looks like another one: the same must come of it."""
        self.report.recoveries += 1
        self.report.rechecks += 1
        again, _ = self._live(machine.clone(), [], str(depth), verify_by_use)
        if (again.error, _outcome(again.events)) != (life.error, _outcome(life.events)):
            self._fail("looks like another image, and was recovered differently", where)

    def _live(
        self, machine: Machine, history: list[Event], name: str, use: Callable[[Session], None], *,
        faults: Sequence[Fault] = (), watch: bool = False, crash_at: int | None = None,
    ) -> tuple[_Life, str]:  # fmt: skip
        """One process on `machine`."""
        life = _Life(history, "", [])
        seen: list[object] = [None]

        def look(process: Process, call: str) -> None:
            now = (machine.version(), len(history), call == "write page")
            if now != seen[0]:
                seen[0] = now
                life.points.append(_point(process, call))

        manners = self.workload.manners if name == "0" else None
        fault_plan = FaultPlan(tuple(faults))
        if name == "0":
            self.calls = fault_plan.calls
        process = Process(
            machine, history, seed=self.plan.seed, life=name, crash_at=crash_at, faults=fault_plan,
            manners=manners, on_step=look if watch else None, wrap_fs=self._wrap_fs,
            schedule=self.plan.schedule((self.plan.seed, name)),
        )  # fmt: skip
        session = Session(process, self._open_engine, self.workload, name)
        try:
            process.run(lambda: session.run(use))
        except ProcessKilled:
            pass
        except Exception as error:  # noqa: BLE001 - whatever a legal crash makes the engine raise is a finding
            life.error = f"{type(error).__name__}: {error}"
        life.ended_ns = process.clock.now_ns
        if watch:
            end = _point(process, "end")
            life.points.append(
                replace(end, step=end.step + 1)
            )  # a step that is never reached: all of it was done
        return life, process.threads.trace if name == "0" else ""

    def _machine(self) -> Machine:
        machine = Machine()
        if self.workload.prepare is not None:
            self.workload.prepare(machine)
        return machine

    def _judge(self, history: list[Event], where: str) -> None:
        for problem in self.workload.oracle().judge(history):
            self._fail(problem, where)

    def _fail(self, problem: str, where: str) -> None:
        if all(failure.problem != problem for failure in self.report.failures):
            self.report.failures.append(Failure(problem=problem, replay=where))

    # --- replay ---

    def replay(self, line: str) -> tuple[list[Event], list[Failure]]:
        """Do exactly what a failure's line says, with real kills; the history and what is wrong with it."""
        words = [word.partition("=")[::2] for word in line.split()]
        settings = dict(words)
        self.plan = replace(
            self.plan, seed=int(settings.get("seed", 0)), strict=settings.get("strict") == "1"
        )
        crashes = [int(value) for name, value in words if name == "crash"]
        labels = [value for name, value in words if name == "image"]
        self.report.failures.clear()
        history: list[Event] = []
        machine = self._machine()
        with quiet():
            for depth, (step, label) in enumerate(zip([*crashes, None], [*labels, ""], strict=True)):
                events: list[Event] = []
                use = self.workload.run if depth == 0 else verify_by_use
                faults = self.workload.faults if depth == 0 else ()
                life, _ = self._live(machine, events, str(depth), use, faults=faults, crash_at=step)
                history += life.events
                if step is None:
                    if life.error:
                        self._fail(life.error, line)
                    break
                cut = Cut(label.partition("/")[0])
                bound, samples = (
                    (self.plan.bound, self.plan.samples)
                    if depth == 0
                    else (self.plan.inner_bound, self.plan.inner_samples)
                )
                history.append(Ended(cut=cut, at_ns=life.ended_ns))
                images = machine.images(
                    cut, bound=bound, samples=samples, seed=self.plan.seed, strict=self.plan.strict
                )
                found = dict(images)
                if label not in found:
                    raise ValueError(
                        f"crash {step} has no image {label!r}: the code or the plan is another one"
                    )
                machine = found[label].clone()
            self._judge(history, line)
        return history, self.report.failures


def _outcome(events: Sequence[Event]) -> object:
    """What a life found and did, in whatever order: bytes that are torn take more or fewer steps, hence another schedule."""
    return Counter(repr(event) for event in events if isinstance(event, (Opened, AppliedTo, Letters)))


def word(name: str) -> str:
    """A name without blanks, as it stands in a line that replays."""
    return name.replace(" ", "_")


def _point(process: Process, call: str) -> _Point:
    return _Point(
        process.threads.steps, process.clock.now_ns, process.machine.clone(), len(process.history), call
    )


def sweep_faults(
    open_engine: OpenEngine, workload: Workload, errors: Sequence[int], plan: Plan, *, calls: Collection[str] = (),
    every: int = 1,
) -> Iterator[tuple[Fault, Report]]:  # fmt: skip
    """Explore the workload with each call of each kind failing with each error, once and from then on for ever.

    `calls` restricts the kinds; with `every`, only every n-th call of a kind fails.
    """
    counting = Explorer(open_engine, workload, replace(plan, seconds=0))
    counting.run()
    for call, count in sorted(counting.calls.items()):
        if calls and call not in calls:
            continue
        for number in range(1, count + 1, every):
            for error in errors:
                for forever in (False, True):
                    fault = Fault(call=call, number=number, error=error, forever=forever)
                    faulty = replace(workload, faults=(*workload.faults, fault))
                    yield fault, Explorer(open_engine, faulty, plan).run()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The engine logs what it finds; here that is thousands of times the same."""
    logger = logging.getLogger("walbatch")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
