"""Runs the whole: every workload, every subject, round after round.

What is not here: what is measured (`workloads` and its neighbours), and what comes of it (`results`).

The idea needed to read it: in each round every subject comes once, and another one first each time. A round before the first is
not counted: it warms up, and says how many operations a slow subject can do in its time.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

import walbatch as wb
from walbatch.bench import backlog, catalogue, footprint, sick
from walbatch.bench.place import Place, file_system
from walbatch.bench.profile import Profile
from walbatch.bench.results import Results, Sample, WorkloadNote
from walbatch.bench.subject import Subject
from walbatch.bench.trace import TRACE, trace_workload
from walbatch.bench.workloads import WORKLOADS, Figures, Workload

WARM_UP: Final = 20
"""The warm-up does one operation for so many of a measurement."""
GROWTH: Final = 10
TRIED_PART: Final = 4
"""What takes a longer part of its time than one in so many is not tried with more."""
SPARE_BYTES: Final = 2 * 2**30
"""Of disk, beyond what w8 needs."""
REASON_CHARS: Final = 200

ALONE: Final = {
    backlog.WORKLOAD: "stores with millions of pending operations",
    sick.WORKLOAD: "four lanes, one of them with a sick backend",
    footprint.DISK: "bytes on disk, groups of 1,000 without compression",
    footprint.START: "starting a process",
}
"""Workloads that have no peers."""

TRACE_NAME: Final = "w9"
NAMES: Final = (*(workload.name for workload in WORKLOADS), "w8", "w9", "w10", "disk", "start")

Progress = Callable[[str], object]


@dataclass(slots=True, kw_only=True)
class Bench:
    """One run in one place."""

    profile: Profile
    place: Place
    progress: Progress
    trace: Path = TRACE

    def run(self, workloads: Collection[str] | None, subjects: Collection[str] | None) -> Results:
        """All samples. `workloads` and `subjects` are names; None: all. Raises ConfigError for a name that there is not."""
        started = time.monotonic()
        wanted = check_names(workloads)
        classes = catalogue.chosen(subjects)
        results = Results(profile=self.profile.name, machine=_machine(self.place.root))
        results.subjects = [catalogue.describe(subject) for subject in classes]
        missing = {note.name for note in results.subjects if note.missing}
        present = [subject for subject in classes if subject.name not in missing]
        self.place.warm_page_cache(self.profile.warm_bytes)
        for workload in WORKLOADS:
            if workload.name in wanted:
                self._compare(results, workload, present, self.profile.counts[workload.name])
        if backlog.WORKLOAD in wanted:
            self._alone(results, backlog.WORKLOAD, self._backlog)
        if TRACE_NAME in wanted:
            self._replay(results, present)
        if sick.WORKLOAD in wanted:
            self._alone(results, sick.WORKLOAD, self._sick)
        if footprint.DISK in wanted:
            self._alone(results, footprint.DISK, self._disk)
        if footprint.START in wanted:
            self._alone(results, footprint.START, self._starts)
        results.elapsed_s = time.monotonic() - started
        return results

    # --- one workload, several subjects ---

    def _compare(
        self, results: Results, workload: Workload, present: Sequence[type[Subject]], count: int
    ) -> None:
        """Warm up, then measure in rounds. A subject that fails once is left out from there on."""
        results.workloads.append(WorkloadNote(name=workload.name, title=workload.title, unit=workload.unit))
        names = [subject.name for subject in present]
        own = [subject for subject in workload.subjects if subject.name in names]
        takers = own if workload.subjects else [s for s in present if workload.name in s.workloads]
        counts: dict[type[Subject], int] = {}
        for subject in takers:
            self.progress(f"{workload.name}: warm-up, {subject.name}")
            fitting = self._fitting(results, workload, subject, count)
            if fitting:
                counts[subject] = fitting
        for turn in range(self.profile.rounds):
            first = turn % max(1, len(takers))
            for subject in (*takers[first:], *takers[:first]):
                if subject not in counts:
                    continue
                self.progress(f"{workload.name}: round {turn + 1} of {self.profile.rounds}, {subject.name}")
                figures = self._measure(results, workload, subject, counts[subject])
                if figures is None:
                    del counts[subject]
                    continue
                results.samples.append(
                    Sample(workload=workload.name, subject=subject.name, round=turn, figures=figures)
                )

    def _fitting(self, results: Results, workload: Workload, subject: type[Subject], count: int) -> int:
        """How many operations a measurement does, all that are asked for if time allows; 0 if the subject fails.

        Tried with a part of a group first, then with more: for some subjects a group takes longer than a measurement may, and
        others take their time however little there is to do.
        """
        step = workload.step(self.profile)
        warm = max(1, count // WARM_UP // step) * step
        seconds_max = self.profile.seconds_max * workload.patience
        tried, before, seconds_before = max(1, step // GROWTH), 0, 0.0
        while True:
            figures = self._measure(results, workload, subject, tried)
            if figures is None:
                return 0
            seconds = figures["seconds"] + figures.get("fill_seconds", 0.0)
            if tried >= warm or seconds > seconds_max / TRIED_PART:
                break
            tried, before, seconds_before = min(warm, tried * GROWTH), tried, seconds
        each = max(seconds - seconds_before, 0.0) / (tried - before)
        fitting = tried + (seconds_max - seconds) / each if each else count
        fitting = min(count, max(1, round(fitting)))
        return fitting // step * step or fitting

    def _measure(
        self, results: Results, workload: Workload, subject: type[Subject], count: int
    ) -> Figures | None:
        """One measurement in a folder of its own; None, and a problem, if it fails."""
        with self.place.passing() as folder:
            opened = subject()
            try:
                try:
                    figures = workload.measure(opened, folder, count, self.profile)
                    if subject.program:
                        figures.pop("cpu_us", None)  # it is spent in another process
                    return figures
                finally:
                    opened.close()
            except Exception as error:  # noqa: BLE001 - whatever a peer raises is its own affair, and no end of the others
                results.problems.append(f"{workload.name}: {subject.name} failed: {_reason(error)}")
                return None

    # --- one workload, walbatch alone ---

    def _alone(self, results: Results, name: str, measure: Callable[[Progress], list[Sample]]) -> None:
        results.workloads.append(WorkloadNote(name=name, title=ALONE[name], unit=""))
        self.progress(f"{name}: {ALONE[name]}")
        try:
            results.samples += measure(lambda text: self.progress(f"{name}: {text}"))
        except Exception as error:  # noqa: BLE001 - the other workloads have their figures all the same
            results.problems.append(f"{name}: {_reason(error)}")

    def _backlog(self, progress: Progress) -> list[Sample]:
        needed = backlog.needed_bytes(self.profile.backlogs) + SPARE_BYTES
        if self.place.free_bytes() < needed:
            raise wb.ConfigError(f"left out: it needs {needed / 2**30:.1f} GiB of disk")
        with self.place.passing() as folder:
            return backlog.measure(folder, self.profile.backlogs, self.profile.opens, progress)

    def _sick(self, progress: Progress) -> list[Sample]:
        with self.place.passing() as folder:
            own = Place(folder)
            return sick.measure(own.new, self.profile.rounds, self.profile.window_s, progress)

    def _disk(self, progress: Progress) -> list[Sample]:
        with self.place.passing() as folder:
            return footprint.measure_disk(folder, self.profile.counts["w3"], self.profile.group_count)

    def _starts(self, progress: Progress) -> list[Sample]:
        with self.place.passing() as folder:
            return footprint.measure_starts(folder, self.profile.starts, progress)

    def _replay(self, results: Results, present: Sequence[type[Subject]]) -> None:
        if not self.trace.exists():
            results.problems.append(
                f"{TRACE_NAME}: left out: {self.trace} does not exist; run from a source checkout, or name the trace with --trace"
            )
            return
        workload, count = trace_workload(self.trace, self.profile.trace_bytes)
        self._compare(results, workload, present, count)


def check_names(workloads: Collection[str] | None) -> set[str]:
    """The workloads of these names, or all. Raises ConfigError for a name that none has."""
    wrong = sorted(set(workloads or ()) - set(NAMES))
    if wrong:
        raise wb.ConfigError(
            f"no workload is named {', '.join(map(repr, wrong))}: the workloads are {', '.join(NAMES)}"
        )
    return set(NAMES if workloads is None else workloads)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:REASON_CHARS]
    return text if isinstance(error, wb.ConfigError) else f"{type(error).__name__}: {text}"


def _machine(folder: Path) -> dict[str, str]:
    """Where this was measured."""
    processor = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.processor() or "unknown",
    )
    return {
        "processor": processor, "cores": str(os.cpu_count()), "kernel": platform.release(), "file system": file_system(folder),
        "python": sys.version.split()[0], "walbatch": version("walbatch"),
    }  # fmt: skip
