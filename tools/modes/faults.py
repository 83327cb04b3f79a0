"""Every call that the engine makes of a port, failing: each place of the source x each errno x once and for ever.

The unit is a cell of that matrix. A cell is visited a few times: with the first, the last and a middle call that its place
makes, in several workloads. Behind the fault the machine loses power here and there, is recovered without faults, and is judged.

The idea needed to read it: a run without faults tells which call comes from which place (a *call site*), and until its fault
strikes, a run with a fault is the same run. Places that only recovery reaches are found by recovering machines that crashed,
so that a *scenario* is a workload on a new machine, or the use of a store after one or two crashes.
"""

from __future__ import annotations

import ast
import errno
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import walbatch
from tools.modes.lives import Life, images_of, live
from tools.modes.prediction import predict
from tools.modes.tally import Job, Progress, Tally
from tools.modes.workloads import WORKLOADS
from walbatch.ports import StateStore
from walbatch.testing.simulation import (
    Cut,
    FailedSync,
    Fault,
    FaultPlan,
    Machine,
    Oracle,
    Process,
    Session,
    Workload,
)
from walbatch.testing.simulation.backend import Manners
from walbatch.testing.simulation.explore import quiet
from walbatch.testing.simulation.faults import CallSite
from walbatch.testing.simulation.history import Ended, Event
from walbatch.testing.simulation.machine import OnStep
from walbatch.testing.simulation.verify import verify_by_use

MODE: Final = "faults"
ERRORS: Final = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS)
OPENING: Final = frozenset({"create", "open_read", "lock", "list_directory", "sync_directory"})
"""Calls that take a descriptor, and may find none left."""

TURNS: Final = 3
"""Visits of a cell: the first call of its place, the last, and one between."""

POINTS_MAX: Final = 5
"""Power cuts behind a fault, the one at the end included."""

IMAGES: Final = 2
"""Machines that one power cut leaves."""

TORN_IN: Final = ("single", "interval", "roll", "transactional", "reopen", "merge")
"""Workloads whose crashed machines are the scenarios of recovery."""

MERGED_IN: Final = ("merge",)
"""Workloads that are killed right before each removal of a file: the next opening finds what it was to remove."""

PACKAGE: Final = Path(walbatch.__file__).parent
SOURCES: Final = ("storage", "runtime", "engine", "lanes.py")

REAL: Final = {
    "storage/filesystem.py": "the real file system itself: its calls are made to fail in the kernel",
    "storage/checkpoint.py": "the real state, whose place the simulated one takes",
    "storage/statefile.py": "the real state's file",
    "storage/statefolder.py": "the real state's folder",
    "storage/tables.py": "the tables of the real state",
    "storage/holder.py": "asks the kernel who holds a real lock",
    "storage/observation.py": "a look beside a live engine, on real files",
}
"""Sources whose calls the simulation cannot reach, and why."""

PASSED_ON: Final = (
    CallSite("read", "core/scanner.py", "_Reader.get"),
    CallSite("read", "core/scanner.py", "read_frame_header"),
)
"""Where core calls `read` of a file that storage has handed to it."""

UNREACHED: Final[Mapping[CallSite, str]] = {}
"""Places that no scenario reaches, and why."""

_FILES: Final = frozenset({
    "write", "read", "datasync", "preallocate", "truncate", "size", "make_directory", "list_directory", "create", "open_read",
    "rename", "unlink", "sync_directory", "lock", "exists", "is_directory",
})  # fmt: skip
_STATES: Final = frozenset(
    {name for name in vars(StateStore) if not name.startswith("_")} - {"close", "forget_given_up"}
    | {"open_state"}
)
"""Calls of the state. Two of its methods write nothing and cannot fail."""
_PORTS: Final = frozenset({
    "fs", "_fs", "file", "_file", "source", "target", "copy", "state", "_state", "environment",
})  # fmt: skip


# --- the call sites, from the source ---------------------------------------------------------------------------------


def call_sites() -> set[CallSite]:
    """Every place in the source that calls a port which can fail."""
    found = set(PASSED_ON)
    for name in SOURCES:
        path = PACKAGE / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            source = file.relative_to(PACKAGE).as_posix()
            if source not in REAL:
                found |= set(_calls(ast.parse(file.read_text()), source, ""))
    return found


def _calls(node: ast.AST, source: str, function: str) -> Iterator[CallSite]:
    for child in ast.iter_child_nodes(node):
        inside = function
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and not function.startswith("="):
            prefix = f"{function}." if function else ""
            # What stands in a function belongs to it, however deep.
            inside = prefix + child.name if isinstance(child, ast.ClassDef) else f"={prefix}{child.name}"
        if isinstance(child, ast.Call) and isinstance(child.func, ast.Attribute):
            name, owner = child.func.attr, ast.unparse(child.func.value).rpartition(".")[2]
            if owner in _PORTS and name in _FILES | _STATES:
                call = name.replace("_", " ") if name in _STATES else name
                yield CallSite(call, source, inside.removeprefix("="))
        yield from _calls(child, source, inside)


# --- the scenarios ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A life to which a fault comes: on a new machine, or on one that has crashed, whose history is `past`."""

    name: str
    workload: Workload
    machine: Machine | None = None
    past: tuple[Event, ...] = ()
    calls: Sequence[tuple[str, int, CallSite]] = ()
    """What it calls without faults: the call, its number among those of its kind, and the place."""

    @property
    def use(self) -> Callable[[Session], None]:
        """What the life does."""
        return self.workload.run if self.machine is None else verify_by_use

    @property
    def seed(self) -> int:
        """Of the schedule."""
        return len(self.name)

    def start(self) -> Machine:
        """The machine, which nobody else has."""
        if self.machine is not None:
            return self.machine.clone()
        machine = Machine()
        if self.workload.prepare is not None:
            self.workload.prepare(machine)
        return machine

    def traced(self) -> Scenario:
        """With its calls."""
        plan = FaultPlan(self._faults(), sites=[])
        history = list(self.past)
        live(
            self.start(), history, self.workload, seed=self.seed, name=self.life, use=self.use, faults=plan, manners=self.manners
        )  # fmt: skip
        return replace(self, calls=tuple(plan.sites or ()))

    @property
    def life(self) -> str:
        """Tells lives of one history apart: payloads must be distinct."""
        return f"f{sum(isinstance(event, Ended) for event in self.past)}"

    @property
    def manners(self) -> Manners | None:
        """The backend is as bad as the workload says, in its first life."""
        return self.workload.manners if self.machine is None else None

    def _faults(self) -> tuple[Fault, ...]:
        return tuple(self.workload.faults) if self.machine is None else ()

    def plan(self, fault: Fault) -> FaultPlan:
        """The workload's own faults, and one more."""
        return FaultPlan((*self._faults(), fault))


def scenarios() -> list[Scenario]:
    """All of them, traced. Recoveries are taken in as long as they reach places that none before has reached."""
    found = [
        Scenario(name=name, workload=replace(workload, predict=predict)).traced()
        for name, workload in WORKLOADS.items()
    ]
    reached = {site for scenario in found for _, _, site in scenario.calls}
    for name in TORN_IN:
        scenario = _named(found, name)
        for candidate in _crashed(scenario, Cut.POWER, _spread(scenario, 9)):
            traced = candidate.traced()
            sites = {site for _, _, site in traced.calls}
            if not sites - reached:
                continue
            reached |= sites
            found.append(traced)
            for later in _crashed(traced, Cut.KILL, _spread(traced, len(traced.calls))):
                again = later.traced()
                sites = {site for _, _, site in again.calls}
                if sites - reached:
                    reached |= sites
                    found.append(again)
    for name in MERGED_IN:
        scenario = _named(found, name)
        for candidate in _crashed(scenario, Cut.KILL, _steps(scenario, "unlink")):
            traced = candidate.traced()
            sites = {site for _, _, site in traced.calls}
            if sites - reached:
                reached |= sites
                found.append(traced)
    return found


def _named(found: Sequence[Scenario], name: str) -> Scenario:
    return next(scenario for scenario in found if scenario.name == name)


def _whole(scenario: Scenario, on_step: OnStep | None = None) -> Life:
    """The life of `scenario`, which nothing cuts off."""
    return live(
        scenario.start(), list(scenario.past), scenario.workload, seed=scenario.seed, name=scenario.life, use=scenario.use,
        manners=scenario.manners, on_step=on_step,
    )  # fmt: skip


def _spread(scenario: Scenario, count: int) -> list[int]:
    """Steps of the life of `scenario`, evenly spread: one less than `count`."""
    total = _whole(scenario).process.threads.steps
    return [total * number // count for number in range(1, count)]


def _steps(scenario: Scenario, wanted: str) -> list[int]:
    """The steps right before each call of a kind."""
    steps: list[int] = []

    def look(process: Process, call: str) -> None:
        if call == wanted:
            steps.append(process.threads.steps)

    _whole(scenario, look)
    return steps


def _crashed(scenario: Scenario, cut: Cut, steps: Iterable[int]) -> Iterator[Scenario]:
    """The machines that are left when the life of `scenario` is cut off at some step."""
    for step in steps:
        past = list(scenario.past)
        life = live(
            scenario.start(), past, scenario.workload, seed=scenario.seed, name=scenario.life, use=scenario.use,
            manners=scenario.manners, crash_at=step,
        )  # fmt: skip
        past.append(Ended(cut=cut, at_ns=life.process.clock.now_ns))
        for label, machine in images_of(life.process.machine, cut, seed=0)[:6:2]:
            yield Scenario(
                name=f"{scenario.name}@{step}@{label}", workload=replace(scenario.workload, predict=None), machine=machine,
                past=tuple(past),
            )  # fmt: skip


# --- the cells -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One faulty run."""

    cell: str
    scenario: Scenario
    fault: Fault
    turn: int

    def turn_knobs(self, machine: Machine) -> None:
        """Each turn has another disk: what a failed sync leaves differs."""
        machine.fs.failed_sync = FailedSync.REVERT if self.turn == 1 else FailedSync.DROP
        machine.fs.failed_sync_drops_names = self.turn == 2

    @property
    def line(self) -> str:
        """What replays it."""
        fault = self.fault
        return (
            f"{MODE} scenario={self.scenario.name} call={fault.call.replace(' ', '_')} number={fault.number} "
            f"errno={errno.errorcode[fault.error]} forever={int(fault.forever)} "
            f"turn={self.turn}"
        )


def visits(found: Sequence[Scenario]) -> Iterator[Visit]:
    """Every cell once, then every cell once more, and so on."""
    places: dict[tuple[CallSite, str], list[tuple[Scenario, list[int]]]] = {}
    for scenario in found:
        numbers: dict[tuple[CallSite, str], list[int]] = {}
        for call, number, site in scenario.calls:
            numbers.setdefault((site, call), []).append(number)
        for place, of_it in numbers.items():
            places.setdefault(place, []).append((scenario, of_it))
    for turn in range(TURNS):
        cell = turn
        for (site, call), reached in sorted(places.items(), key=lambda item: (str(item[0][0]), item[0][1])):
            for error in (*ERRORS, errno.EMFILE) if call in OPENING else ERRORS:
                for forever in (False, True):
                    cell += 1
                    scenario, numbers_here = reached[cell * 7 % len(reached)]
                    number = numbers_here[(0, -1, len(numbers_here) // 2)[turn]]
                    yield Visit(
                        cell=f"{site}|{errno.errorcode[error]}|{'forever' if forever else 'once'}", scenario=scenario,
                        fault=Fault(call=call, number=number, error=error, forever=forever), turn=turn,
                    )  # fmt: skip


def run(job: Job, progress: Progress) -> Tally:
    """Visit this part's cells."""
    started = time.monotonic()
    tally = Tally(mode=MODE)
    with quiet():
        found = scenarios()
        if job.part == 0:
            _compare(found, tally)
        mine = [visit for number, visit in enumerate(visits(found)) if number % job.parts == job.part]
        for done, visit in enumerate(mine):
            if job.is_over(done) or tally.is_full:
                tally.complete = False
                break
            _visit(visit, tally)
            if done % 50 == 0:
                progress(tally)
    tally.seconds = time.monotonic() - started
    return tally


def _compare(found: Sequence[Scenario], tally: Tally) -> None:
    """The places in the source, and those that were reached."""
    sites = call_sites()
    reached = {site for scenario in found for _, _, site in scenario.calls}
    tally.figures["call sites in the source"] = len(sites)
    tally.figures["call sites reached"] = len(reached & sites)
    for site in sorted(sites - reached - UNREACHED.keys()):
        tally.fail(f"no scenario reaches {site}", f"{MODE} scenario=none")
    for site in sorted(reached - sites):
        tally.fail(f"{site} calls a port, and is not known to", f"{MODE} scenario=none")


@dataclass(slots=True)
class _Point:
    machine: Machine
    events: int
    now_ns: int


def _visit(visit: Visit, tally: Tally) -> None:
    """One faulty run with its power cuts."""
    scenario = visit.scenario
    chance = random.Random(visit.line)
    history = list(scenario.past)
    points: list[_Point] = []
    seen = [0]
    plan = scenario.plan(visit.fault)
    own = len(plan.faults) - 1
    machine = scenario.start()
    visit.turn_knobs(machine)

    def look(process: Process, call: str) -> None:
        if not plan.hits or call == "write page":
            return
        now = (process.machine.fs.version, len(process.history))
        if now == (points[-1].machine.fs.version, points[-1].events) if points else False:
            return
        seen[0] += 1
        if len(points) < POINTS_MAX - 1:
            points.append(_Point(process.machine.clone(), len(process.history), process.clock.now_ns))
        elif (
            chance.random() < (POINTS_MAX - 2) / seen[0]
        ):  # the first one stays, the others are a fair sample
            points[chance.randrange(1, len(points))] = _Point(
                process.machine.clone(), len(process.history), process.clock.now_ns
            )

    life = live(
        machine, history, scenario.workload, seed=scenario.seed, name=scenario.life, use=scenario.use, faults=plan,
        manners=scenario.manners, on_step=look,
    )  # fmt: skip
    tally.figures["runs"] += 1
    tally.figures["faults injected"] += plan.hits
    tally.figures[f"faults injected: {errno.errorcode[visit.fault.error]}"] += plan.hits
    tally.cells[visit.cell] += 1
    if not plan.hits and not own:
        tally.fail(f"{visit.cell}: the fault did not strike", visit.line)
    if life.error:
        tally.fail(f"{visit.cell}: {life.error}", visit.line)
    points.sort(key=lambda point: point.events)
    points.append(_Point(life.process.machine, len(history), life.process.clock.now_ns))
    oracle = scenario.workload.oracle()
    judged = 0
    for point in points:
        oracle.judge(history[judged : point.events])
        judged = point.events
        found = images_of(point.machine, Cut.POWER, seed=len(history), strict=visit.turn == 2)
        for label, image in chance.sample(found, min(IMAGES, len(found))):
            tally.figures["crash states"] += 1
            twin = oracle.fork()
            twin.take(Ended(cut=Cut.POWER, at_ns=point.now_ns))
            after: list[Event] = []
            last = live(image.clone(), after, scenario.workload, seed=1, name="last")
            for problem in [*([last.error] if last.error else []), *twin.judge(after)]:
                tally.fail(f"{visit.cell}: {problem} ({label})", visit.line)
    _kill_then_cut(visit, oracle, points[-1], tally)


def _kill_then_cut(visit: Visit, oracle: Oracle, point: _Point, tally: Tally) -> None:
    """The process is killed, so that the next one finds what the cache holds; then the power goes, and comes back.

    Not where a failed sync has dropped names for good: they are still seen, later syncs of their directory succeed without
    them, and no other process can know of it.
    """
    if point.machine.fs.failed_sync_drops_names:
        return
    workload = visit.scenario.workload
    (_, machine), *_ = images_of(point.machine, Cut.KILL, seed=0)
    history: list[Event] = [Ended(cut=Cut.KILL, at_ns=point.now_ns)]
    life = live(machine.clone(), history, workload, seed=1, name="killed")
    history.append(Ended(cut=Cut.POWER, at_ns=life.process.clock.now_ns))
    found = images_of(life.process.machine, Cut.POWER, seed=len(history), strict=visit.turn == 2)
    label, image = found[len(history) % len(found)]
    last = live(image.clone(), history, workload, seed=1, name="last")
    tally.figures["crash states"] += 2
    for error in (life.error, last.error):
        if error:
            tally.fail(f"{visit.cell}, killed: {error}", visit.line)
    for problem in oracle.fork().judge(history):
        tally.fail(f"{visit.cell}, killed: {problem} ({label})", visit.line)


def replay(line: str, _scratch: Path) -> list[str]:
    """Do one run again."""
    words = dict(word.partition("=")[::2] for word in line.split()[1:])
    tally = Tally(mode=MODE)
    with quiet():
        found = scenarios()
        if words["scenario"] == "none":
            _compare(found, tally)
        else:
            call = words["call"]
            fault = Fault(
                call=call.replace("_", " ") if call in _STATES else call, number=int(words["number"]),
                error=getattr(errno, words["errno"]), forever=words["forever"] == "1",
            )  # fmt: skip
            scenario = next(scenario for scenario in found if scenario.name == words["scenario"])
            _visit(Visit(cell="replay", scenario=scenario, fault=fault, turn=int(words["turn"])), tally)
    return [failure.problem for failure in tally.failures]
