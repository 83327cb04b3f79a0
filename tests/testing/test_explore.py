"""The explorer finds the mistakes that real systems have shipped, and nothing in what is right; its failures replay."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

import walbatch as wb
from tests.testing.engines import Mistake, ToyEngine
from walbatch.testing.shipped import open_engine
from walbatch.testing.simulation.backend import Manner
from walbatch.testing.simulation.explore import Explorer, Plan, sweep_faults
from walbatch.testing.simulation.faults import Fault
from walbatch.testing.simulation.filesystem import SimulatedFile, SimulatedFileSystem
from walbatch.testing.simulation.machine import Machine, Process
from walbatch.testing.simulation.workload import OpenEngine, Session, Workload


def three(session: Session) -> None:
    session.open()
    for _ in range(3):
        session.submit()
    session.close()


THREE = Workload(name="three", run=three)


def toy(*mistakes: Mistake) -> OpenEngine:
    def open_toy(process: Process, lanes: Mapping[str, wb.Lane], settings: wb.Settings) -> Any:
        return ToyEngine(process, lanes, mistakes)

    return open_toy


# --- a toy with mistakes ---


@pytest.mark.parametrize("strict", [False, True], ids=["prefix", "strict"])
def test_nothing_is_found_in_a_toy_without_mistakes(strict: bool) -> None:
    report = Explorer(toy(), THREE, Plan(depth=2, strict=strict)).run()
    assert not report.failures, report.failures[0]
    assert report.complete
    assert report.states > 100


FOUND_AS: Mapping[Mistake, str] = {
    Mistake.NO_SYNC: "was acknowledged and is lost",
    Mistake.NO_DIRECTORY_SYNC: "was acknowledged and is lost",
    Mistake.ACKNOWLEDGES_FIRST: "was acknowledged and is lost",
    Mistake.RETRIES_SYNC: "a sync had failed before",
    Mistake.APPENDS_BEHIND_TEAR: "is lost",
    Mistake.NO_CHECKSUM: "never submitted",
    Mistake.REUSES_LSN: "were both",
    Mistake.DELIVERS_UNSYNCED: "were both applied as LSN",
}


@pytest.mark.parametrize("mistake", Mistake, ids=str)
def test_each_mistake_of_the_toy_is_found_and_replays(mistake: Mistake) -> None:
    workload = THREE
    mistakes = [mistake]
    if mistake is Mistake.RETRIES_SYNC:
        workload = replace(THREE, faults=[Fault(call="datasync", number=3)])
    if mistake is Mistake.DELIVERS_UNSYNCED:
        mistakes.append(Mistake.REUSES_LSN)  # which is what makes it visible
    plan = Plan(depth=2, failures_max=20)
    report = Explorer(toy(*mistakes), workload, plan).run()
    failure = next(failure for failure in report.failures if FOUND_AS[mistake] in failure.problem)
    _, again = Explorer(toy(*mistakes), workload, plan).replay(failure.replay)
    assert failure.problem in {other.problem for other in again}


# --- the shipped engine on a file system that breaks its promises ---


class Passing:
    """Passes everything on to what it wraps."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)


class WithoutDirectorySync(Passing):
    def sync_directory(self, path: str) -> None:
        pass


class WithoutLogDirectorySync(Passing):
    def sync_directory(self, path: str) -> None:
        if not path.endswith("/wal"):
            self.wrapped.sync_directory(path)


class FileWithoutSync(Passing):
    def datasync(self) -> None:
        pass


class WithoutSync(Passing):
    def create(self, path: str) -> Any:
        return FileWithoutSync(self.wrapped.create(path))


class FileThatRetries(Passing):
    def datasync(self) -> None:
        try:
            self.wrapped.datasync()
        except OSError:
            self.wrapped.datasync()


class RetryingSync(Passing):
    def create(self, path: str) -> Any:
        return FileThatRetries(self.wrapped.create(path))


@pytest.mark.parametrize(
    "wrap", [WithoutDirectorySync, WithoutLogDirectorySync, WithoutSync], ids=lambda wrap: wrap.__name__
)
def test_the_shipped_engine_without_its_syncs_loses_what_it_acknowledged(wrap: Callable[..., Any]) -> None:
    report = Explorer(open_engine, THREE, Plan(seconds=20), wrap_fs=wrap).run()
    assert report.failures


def test_the_shipped_engine_whose_failed_sync_is_tried_again_loses_what_it_acknowledged() -> None:
    faulty = replace(THREE, faults=[Fault(call="datasync", number=4)])
    report = Explorer(open_engine, faulty, Plan(seconds=20, failures_max=20), wrap_fs=RetryingSync).run()  # type: ignore[arg-type]
    assert any("a sync had failed" in failure.problem for failure in report.failures)
    assert any("crash=" in failure.replay for failure in report.failures), "and an image that has lost it"


def test_a_backend_that_lies_is_found() -> None:
    liar = replace(THREE, manners=lambda batch, call: Manner.LIE)
    report = Explorer(open_engine, liar, Plan(seconds=20)).run()
    assert any("is settled by checkpoint" in failure.problem for failure in report.failures)


# --- the explorer itself ---


def test_the_same_seed_explores_the_same_and_another_one_another_trace() -> None:
    def explored(seed: int) -> tuple[str, int, int]:
        report = Explorer(open_engine, THREE, Plan(seed=seed, bound=8, samples=2)).run()
        return report.trace, report.points, report.states

    assert explored(5) == explored(5)
    assert explored(5)[0] != explored(6)[0]


def test_a_killed_process_leaves_what_the_copy_at_its_crash_point_held() -> None:
    explorer = Explorer(open_engine, THREE, Plan())
    life, _ = explorer._live(Machine(), [], "0", three, watch=True)
    assert len(life.points) > 30
    for point in life.points:
        machine = Machine()
        killed, _ = explorer._live(machine, [], "0", three, crash_at=point.step)
        assert machine.fingerprint() == point.machine.fingerprint()
        assert len(killed.events) == point.events


def test_a_sweep_makes_every_call_fail_once_and_for_ever() -> None:
    swept = [
        fault
        for fault, report in sweep_faults(toy(), THREE, [errno.EIO], Plan(cuts=()), calls={"datasync"})
        if not report.failures
    ]
    assert [(fault.number, fault.forever) for fault in swept] == [
        (number, forever) for number in range(1, 5) for forever in (False, True)
    ]


def test_time_that_is_over_ends_an_exploration_and_the_report_says_so() -> None:
    report = Explorer(open_engine, THREE, Plan(seconds=0)).run()
    assert not report.complete


def test_a_wrapped_file_system_is_what_the_engine_gets() -> None:
    files: list[SimulatedFile] = []

    class Watching(Passing):
        def create(self, path: str) -> SimulatedFile:
            file: SimulatedFile = self.wrapped.create(path)
            files.append(file)
            return file

    def wrap(fs: SimulatedFileSystem) -> Any:
        return Watching(fs)

    Explorer(toy(), THREE, Plan(cuts=()), wrap_fs=wrap).run()
    assert len(files) == 1
