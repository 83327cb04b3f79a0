"""Thread schedules: by chance, by priority with few changes, and all of them (up to a bound) for two or three threads.

What is not here: the schedules themselves (`walbatch.testing.simulation.schedules`), and crashes: what is judged here is a whole
life, with its deadlocks, lost wake-ups, unresolved tickets, and order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from tools.modes.tally import Job, Progress, Tally
from tools.modes.workloads import WORKLOADS
from walbatch.testing.shipped import open_engine
from walbatch.testing.simulation import Explorer, LanePlan, Plan, Session, Workload
from walbatch.testing.simulation.explore import Report, word
from walbatch.testing.simulation.schedules import (
    BoundedSchedule,
    PrioritySchedule,
    RandomSchedule,
    Schedule,
)

MODE: Final = "schedules"
EXACT: Final = {"put": LanePlan(transactional=True, shards=2)}


def two_submit(session: Session) -> None:
    session.open()
    session.together(lambda: session.submit(b"a"), lambda: session.submit(b"a"))
    session.close()


def three_submit(session: Session) -> None:
    session.open()
    session.together(*[lambda key=key: session.submit(key) for key in (b"a", b"b", b"a")])
    session.close()


def submit_and_close(session: Session) -> None:
    session.open()
    engine = session.engine
    session.together(
        lambda: session.submit(b"a"), lambda: engine.close(timeout=60), lambda: session.submit(b"a")
    )
    session.close()


def submit_and_flush(session: Session) -> None:
    session.open()
    engine = session.engine
    session.together(lambda: session.submit(b"a"), lambda: engine.flush(timeout=60))
    session.close()


def nowait_and_submit(session: Session) -> None:
    session.open()

    def later() -> None:
        session.submit_nowait(b"a")()

    session.together(later, lambda: session.submit(b"a"))
    session.close()


def pause_and_submit(session: Session) -> None:
    session.open()
    engine = session.engine

    def hold() -> None:
        engine.pause("put")
        engine.resume("put")

    session.together(hold, lambda: session.submit(b"a"))
    session.close()


def group_and_single(session: Session) -> None:
    session.open()
    session.together(lambda: session.submit_many([b"a", b"b"]), lambda: session.submit(b"a"))
    session.close()


def close_twice(session: Session) -> None:
    session.open()
    engine = session.engine
    session.submit(b"a")
    session.together(lambda: engine.close(timeout=60), lambda: engine.close(timeout=30))
    session.close()


SMALL: Final[Mapping[str, Workload]] = {
    workload.name: workload
    for workload in (
        Workload(name="two submit", run=two_submit),
        Workload(name="two submit, exactly once", run=two_submit, lanes=EXACT),
        Workload(name="three submit", run=three_submit),
        Workload(name="submit and close", run=submit_and_close),
        Workload(name="submit and flush", run=submit_and_flush),
        Workload(name="nowait and submit", run=nowait_and_submit),
        Workload(name="pause and submit", run=pause_and_submit),
        Workload(name="group and single", run=group_and_single),
        Workload(name="close twice", run=close_twice),
        Workload(name="interval and submit", run=two_submit, lanes={"put": LanePlan(durability="interval")}),
    )
}
"""Lives of two or three threads, for the exhaustive search."""

ALL: Final[Mapping[str, Workload]] = {**SMALL, **WORKLOADS}


SEARCHES: Final = (("user", 2), ("", 1), ("user", 3), ("", 2))
"""Exhaustive searches of each small workload: which threads are switched ("" for all), and how many preemptions."""


def run(job: Job, progress: Progress) -> Tally:
    """A third of the count each: exhaustive (less if it is through), by priority, by chance."""
    tally = Tally(mode=MODE)
    total = job.count if job.count is not None else 1_000_000
    searches = [(SMALL[name], *search) for search in SEARCHES for name in SMALL][job.part :: job.parts]
    for workload, branching, preemptions_max in searches:
        _exhaust(
            job, tally, progress, workload, total // 2 // len(searches),
            first=BoundedSchedule(branching=branching, preemptions_max=preemptions_max),
        )  # fmt: skip
    half = (total - tally.figures["schedules"]) // 2
    for number in range(2 * half):
        if job.is_over(tally.figures["schedules"]) or tally.is_full:
            tally.complete = False
            break
        seed = job.seed + number * job.parts + job.part
        workload = list(ALL.values())[seed % len(ALL)]
        by_priority = number % 2 == 0
        report = live(workload, seed, PrioritySchedule if by_priority else RandomSchedule)
        tally.figures["by priority" if by_priority else "by chance"] += 1
        kind = "priority" if by_priority else "chance"
        _count(tally, report, f"{MODE} workload={word(workload.name)} kind={kind} seed={seed}")
        progress(tally)
    return tally


def _exhaust(
    job: Job, tally: Tally, progress: Progress, workload: Workload, count: int, *, first: BoundedSchedule
) -> None:  # fmt: skip
    """Schedules of one workload in depth-first order."""
    schedule: BoundedSchedule | None = first
    for _ in range(count):
        if schedule is None or job.is_over(tally.figures["schedules"]) or tally.is_full:
            break
        this = schedule
        report = live(workload, 0, lambda seed, this=this: this if seed[1] == "0" else RandomSchedule(seed))  # type: ignore[misc]
        tally.figures["in exhaustive searches"] += 1
        _count(tally, report, f"{MODE} workload={word(workload.name)} kind=bounded {this}")
        progress(tally)
        schedule = this.following()
    tally.figures[
        "exhaustive searches that came to an end" if schedule is None else "exhaustive searches cut short"
    ] += 1


def _count(tally: Tally, report: Report, line: str) -> None:
    tally.figures["schedules"] += 1
    for failure in report.failures:
        tally.fail(failure.problem, line)


def live(workload: Workload, seed: int, schedule: Callable[[object], Schedule]) -> Report:
    """One life without a crash."""
    return Explorer(open_engine, workload, replace(Plan(seed=seed, cuts=()), schedule=schedule)).run()


def replay(line: str, _scratch: Path) -> list[str]:
    """The same schedule again."""
    settings = dict(part.partition("=")[::2] for part in line.split())
    workload = next(workload for name, workload in ALL.items() if word(name) == settings["workload"])
    if settings["kind"] == "bounded":
        choices = [int(choice) for choice in settings["choices"].split(".") if choice]
        schedule = BoundedSchedule(
            choices, branching=settings["branching"], preemptions_max=int(settings["preemptions"])
        )
        report = live(workload, 0, lambda _seed: schedule)
    else:
        kind = PrioritySchedule if settings["kind"] == "priority" else RandomSchedule
        report = live(workload, int(settings["seed"]), kind)
    return [failure.problem for failure in report.failures]
