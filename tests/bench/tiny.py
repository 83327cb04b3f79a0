"""Benchmarks that take no time: a profile of a few operations, and results made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from walbatch.bench import catalogue
from walbatch.bench.place import Place
from walbatch.bench.profile import Profile
from walbatch.bench.results import Results, Sample, SubjectNote, WorkloadNote
from walbatch.bench.rounds import Bench

COUNTS: Final = {"w1": 6, "w2": 8, "w3": 20, "w4": 8, "w4c": 8, "w5": 20, "w6": 10, "w7": 20}
TINY: Final = Profile(
    name="tiny", rounds=2, seconds_max=60.0, counts=COUNTS, backlogs=(200, 400), opens=2, trace_bytes=400_000, window_s=0.05,
    starts=1, group_count=5, large_group_count=4, threads=4, tasks=5,
)  # fmt: skip
ALWAYS: Final = ("walbatch", "raw", "sqlite", "lmdb")
"""Subjects that need nothing installed."""


def bench(folder: Path, profile: Profile = TINY, **more: Path) -> Bench:
    return Bench(profile=profile, place=Place(folder), progress=lambda text: None, **more)


def made(rates: Mapping[str, Mapping[str, Sequence[float]]]) -> Results:
    """Results of workloads and subjects, a rate for each round."""
    results = Results(profile="tiny", machine={"cores": "2"}, elapsed_s=1.0)
    results.workloads = [WorkloadNote(name=name, title=f"the title of {name}", unit="op/s") for name in rates]
    results.subjects = [
        SubjectNote(
            name=subject.name, title=subject.title, role=subject.role, syncs=subject.syncs, note=subject.note, missing=""
        )
        for subject in catalogue.SUBJECTS
    ]  # fmt: skip
    results.samples = [
        Sample(workload=workload, subject=subject, round=turn, figures={"rate": rate, "p50_us": 1e6 / rate})
        for workload, subjects in rates.items()
        for subject, found in subjects.items()
        for turn, rate in enumerate(found)
    ]
    return results
