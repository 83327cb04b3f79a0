"""Probes: runs of the crash harness, each of which a right engine survives and a mutant may not.

What is not here: the harness itself (`walbatch.testing.simulation`), and the order in which probes are tried on a mutant
(`child`). This is imported in a process that has its mutant installed.

The idea needed to read it: a probe is a name, `mode:scene`, and a function that ends at the first problem and says how many
states (crash images, or runs where nothing crashes) it had tried until then.
"""

from __future__ import annotations

import errno
import functools
import importlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import walbatch as wb
from tools.modes import schedules
from tools.modes.tally import Job, Tally
from tools.modes.workloads import STORM
from tools.mutants import answers, conformance, rot
from tools.mutants.signals import Signals, open_interrupted, undeterred
from tools.mutants.watched import (
    open_and_look,
    open_changing,
    open_deep,
    open_naming,
    open_stale,
    open_strictly,
    open_ticking,
)  # fmt: skip
from tools.mutants.workloads import WORKLOADS as OWN
from walbatch.testing.shipped import open_engine
from walbatch.testing.simulation import (
    Explorer,
    FailedSync,
    FaultPlan,
    Machine,
    Oracle,
    Plan,
    Process,
    Session,
    Workload,
    sweep_faults,
)
from walbatch.testing.simulation.schedules import PrioritySchedule, RandomSchedule

SECONDS: Final = 25.0
"""Real time for one probe: far more than the slowest takes on a right engine."""
SCHEDULES: Final = 24
INTERRUPTS: Final = 24
WORKLOADS: Final[Mapping[str, Workload]] = {
    name.replace(" ", "_"): workload for name, workload in {**schedules.ALL, STORM.name: STORM, **OWN}.items()
}
CALLS: Final = ("datasync", "sync_directory", "write", "read", "save_checkpoint")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a probe has seen. `problem`: the first breach; "" for none."""

    states: int
    problem: str = ""
    replay: str = ""


Probe = Callable[[], Found]
OpenEngine = Callable[[Process, Mapping[str, wb.Lane], wb.Settings], Any]


def probe_named(name: str) -> Probe:
    """The probe `mode:scene`. Raises KeyError."""
    mode, _, scene = name.partition(":")
    return functools.partial(_MODES[mode], scene)


def all_probes() -> Iterator[str]:
    """Every probe, the cheap ones first."""
    names = [name for name in WORKLOADS if name not in {"full_frame", "largest", "eleven_segments", "storm"}]
    yield from (f"conformance:{name}" for name in _CONFORMANCE)
    yield from (f"answers:{name}" for name in answers.ANSWERS)
    yield from (f"schedules:{name}" for name in (*names, "storm", "full_frame/1"))
    yield from (f"images:{name}" for name in names)
    yield from (f"ticks:{name}" for name in ("awaited", "threads", "nowait"))
    yield from (f"reads:{name}" for name in rot.STORIES)
    yield from (f"interrupts:{name}" for name in ("threads", "single"))
    yield from (
        f"{mode}:{name}" for mode in ("quarantine", "names", "stale") for name in ("single", "nowait", "roll")
    )
    yield "images:deep"
    # The single frame of `one` has no proof behind it: damaged, it is a torn tail.
    proven = [name for name in rot.STORIES if name != "one"]
    yield from (f"zeros:{name}" for name in proven)
    yield from (f"splice:{name}" for name in ("killed",))
    yield "cuts:backlog"
    yield from (f"loss:{name}" for name in rot.STORIES)
    yield from (f"twice:{name}" for name in ("single", "reopen", "transactional", "interval"))
    yield from (f"bits:{name}" for name in proven)
    yield "images:eleven_segments"
    yield from (
        f"faults:{name}/{call}"
        for name in ("single", "reopen", "roll", "interval", "stubborn")
        for call in CALLS
    )
    yield from (f"images:{name}/16" for name in names)
    yield from ("mode:bitrot/4000", "mode:seeded/600")


# --- crashes ----------------------------------------------------------------------------------------------------------

NARROW: Final = Plan(strict=True, bound=16, samples=8, failures_max=1, seconds=SECONDS)
TWICE: Final = Plan(
    strict=True, bound=12, samples=4, depth=2, inner_bound=6, inner_samples=2, failures_max=1, seconds=SECONDS
)


def _explored(explorer: Explorer) -> Found:
    report = explorer.run()
    if not report.failures:
        return Found(states=report.states + 1)
    failure = report.failures[0]
    return Found(states=report.states + 1, problem=failure.problem, replay=failure.replay)


def _images(scene: str) -> Found:
    name, _, seeds = scene.partition("/")
    opener, workload = (open_deep, WORKLOADS["single"]) if name == "deep" else (open_engine, WORKLOADS[name])
    states = 0
    found = Found(states=0)
    for seed in range(int(seeds or 1)):
        found = _explored(Explorer(opener, workload, replace(NARROW, seed=seed)))
        states += found.states
        if found.problem:
            break
    return replace(found, states=states)


def _twice(scene: str) -> Found:
    return _explored(Explorer(open_engine, WORKLOADS[scene], TWICE))


def _stale(scene: str) -> Found:
    return _explored(Explorer(open_stale, WORKLOADS[scene], NARROW))


def _quarantine(scene: str) -> Found:
    return _explored(Explorer(open_and_look, WORKLOADS[scene], NARROW))


def _names(scene: str) -> Found:
    return _explored(Explorer(open_naming, WORKLOADS[scene], NARROW))


def _schedules(scene: str, *, ticking: bool = False) -> Found:
    opener = open_changing if scene == "changed_bytes" else open_ticking if ticking else open_strictly
    name, _, seeds = scene.partition("/")
    workload = WORKLOADS["single" if name == "changed_bytes" else name]
    started = time.monotonic()
    seed = 0
    while seed < int(seeds or SCHEDULES) and time.monotonic() < started + SECONDS:
        problem = _lived(opener, workload, seed)
        seed += 1
        if problem:
            return Found(states=seed, problem=problem, replay=f"workload={scene} seed={seed - 1}")
    return Found(states=seed)


def _lived(opener: OpenEngine, workload: Workload, seed: int) -> str:
    """One life that nothing cuts off, and what is wrong with it."""
    machine = Machine()
    if workload.prepare is not None:
        workload.prepare(machine)
    schedule = (RandomSchedule if seed % 2 else PrioritySchedule)((seed, "0"))
    process = Process(
        machine, [], seed=seed, life="0", faults=FaultPlan(tuple(workload.faults)), manners=workload.manners, schedule=schedule
    )  # fmt: skip
    session = Session(process, opener, workload, "0")
    try:
        process.run(lambda: session.run(workload.run))
    except Exception as error:  # noqa: BLE001 - whatever comes out is a finding
        return f"{type(error).__name__}: {error}"
    lanes = workload.lanes
    oracle = Oracle(
        exactly_once={name for name, lane in lanes.items() if lane.transactional},
        unordered={name for name, lane in lanes.items() if lane.order == "none"},
        shards={name: lane.shards for name, lane in lanes.items()},
    )
    return next(iter(oracle.judge(process.history)), "")


def _faults(scene: str) -> Found:
    name, _, call = scene.partition("/")
    states = 0
    deadline = time.monotonic() + SECONDS
    for how in (FailedSync.DROP, FailedSync.REVERT):
        workload = replace(WORKLOADS[name], prepare=functools.partial(_turn, how))
        plan = Plan(bound=6, samples=2, failures_max=1, seconds=SECONDS)
        for fault, report in sweep_faults(
            open_engine, workload, [errno.EIO, errno.ENOSPC], plan, calls={call.replace("save_c", "save c")}
        ):
            states += report.states + 1
            if report.failures:
                failure = report.failures[0]
                return Found(states=states, problem=failure.problem, replay=f"{fault}: {failure.replay}")
            if time.monotonic() > deadline:
                break
    return Found(states=states)


def _turn(how: FailedSync, machine: Machine) -> None:
    machine.fs.failed_sync = how


# --- signals ---


def _interrupts(scene: str) -> Found:
    """One signal at each call of the disk inside a submit. Whoever was interrupted goes on."""

    def alone(session: Session) -> None:
        for key in (b"a", b"b", b"a"):
            undeterred(session, key)

    def together(session: Session) -> None:
        session.together(*(functools.partial(undeterred, session, key) for key in (b"a", b"b", b"a")))
        alone(session)

    def use(session: Session) -> None:
        session.open()
        (together if scene == "threads" else alone)(session)
        session.engine.flush(timeout=60)
        session.close()

    states = 0
    for number in range(1, INTERRUPTS // 2 + 1):
        for after in (False, True):
            for seed in range(3 if scene == "threads" else 1):
                states += 1
                signals = Signals(number, after=after)
                problem = _lived(
                    functools.partial(open_interrupted, signals), Workload(name="interrupted", run=use), seed
                )
                if problem:
                    return Found(
                        states=states, problem=problem, replay=f"signal={number} after={after} seed={seed}"
                    )
    return Found(states=states)


# --- the rest ---------------------------------------------------------------------------------------------------------


def _rotten(mode: str, scene: str) -> Found:
    taken = rot.told(scene)
    states = 0
    for what, damaged in rot.DAMAGES[mode](taken, scene):
        states += 1
        problem = rot.verdict(damaged, rot.STORIES[scene][1])
        if problem:
            return Found(states=states, problem=problem, replay=what)
    return Found(states=states)


def _reads(scene: str) -> Found:
    states = 0
    for what, problem in rot.after_failing_reads(rot.told(scene), rot.STORIES[scene][1]):
        states += 1
        if problem:
            return Found(states=states, problem=problem, replay=what)
    return Found(states=states)


def _answers(scene: str) -> Found:
    for seed in range(SCHEDULES):
        problem = answers.breach(scene, seed)
        if problem:
            return Found(states=seed + 1, problem=problem, replay=f"seed={seed}")
    return Found(states=SCHEDULES)


# --- whole modes ------------------------------------------------------------------------------------------------------


def _mode(scene: str) -> Found:
    """A part of another mode of the torture run: `name/count`."""
    name, _, count = scene.partition("/")
    module = importlib.import_module(f"tools.modes.{name}")
    done = Tally(mode=name)

    def progress(tally: Tally) -> None:
        if tally.failures:
            raise _EnoughError(tally)

    with tempfile.TemporaryDirectory() as scratch:
        try:
            done = module.run(Job(seed=1, count=int(count), seconds=60, scratch=Path(scratch)), progress)
        except _EnoughError as enough:
            done = enough.tally
    states = sum(
        done.figures[unit]
        for unit in ("crash states", "seeded runs", "damaged stores", "cycles", "power cuts")
    )
    for failure in done.failures:
        return Found(states=max(1, states), problem=failure.problem, replay=failure.replay)
    return Found(states=max(1, states))


class _EnoughError(Exception):
    """The mode has found something."""

    def __init__(self, tally: Tally) -> None:
        super().__init__(tally.mode)
        self.tally = tally


_CONFORMANCE: Final = {
    "state": conformance.state_problems,
    "backend": conformance.backend_problems,
    "files": conformance.file_problems,
}


def _conformance(scene: str) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        for problem in _CONFORMANCE[scene](Path(folder)):
            return Found(states=1, problem=problem)
    return Found(states=1)


_MODES: Final[dict[str, Callable[[str], Found]]] = {
    "images": _images,
    "twice": _twice,
    "stale": _stale,
    "quarantine": _quarantine,
    "names": _names,
    "schedules": _schedules,
    "faults": _faults,
    "interrupts": _interrupts,
    "answers": _answers,
    "reads": _reads,
    "ticks": functools.partial(_schedules, ticking=True),
    "mode": _mode,
    "conformance": _conformance,
    **{mode: functools.partial(_rotten, mode) for mode in rot.DAMAGES},
}
