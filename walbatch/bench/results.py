"""What was measured, as a flat list of samples, and the arithmetic on it: medians, spreads, ratios within a round.

What is not here: clocks, and how it is shown (`table`, `picture`).

The idea needed to read it: a ratio is made of two samples of the same round, and the median is that of the ratios, so that what
disturbed the machine for a while counts on both sides.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Self

FORMAT: Final = 1
"""Of the JSON document."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One subject's figures of one workload in one round."""

    workload: str
    subject: str
    round: int
    figures: Mapping[str, float]
    """`rate` in the workload's unit, `count`, `seconds`, `p50_us`, `p99_us`, `cpu_us` of an operation, and what else it has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The median of some values, and how far they went."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Self | None:
        """None of no values."""
        found = sorted(values)
        if not found:
            return None
        return cls(median=statistics.median(found), low=found[0], high=found[-1], count=len(found))


@dataclass(frozen=True, slots=True, kw_only=True)
class SubjectNote:
    """What is to be known of a subject that was asked for."""

    name: str
    title: str
    role: str
    syncs: bool
    note: str
    missing: str
    """What to install; empty where it was measured."""
    version: str = ""
    """Of its binding, and of its server."""

    @property
    def is_peer(self) -> bool:
        """Whether walbatch is compared with it."""
        return self.role == "peer" and self.syncs and not self.missing


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadNote:
    """What is to be known of a workload."""

    name: str
    title: str
    unit: str


@dataclass(slots=True, kw_only=True)
class Results:
    """All samples of a run, with what they are about."""

    profile: str
    machine: Mapping[str, str] = field(default_factory=dict)
    workloads: list[WorkloadNote] = field(default_factory=list)
    subjects: list[SubjectNote] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Subjects that failed and workloads that were left out, each with its reason."""
    elapsed_s: float = 0.0

    def values(self, workload: str, subject: str, figure: str) -> dict[int, float]:
        """A figure by round."""
        return {
            sample.round: sample.figures[figure]
            for sample in self.samples
            if sample.workload == workload and sample.subject == subject and figure in sample.figures
        }

    def spread(self, workload: str, subject: str, figure: str = "rate") -> Spread | None:
        """A figure over all rounds."""
        return Spread.of(self.values(workload, subject, figure).values())

    def ratios(
        self, workload: str, subject: str, other: str, *, figure: str = "rate", other_workload: str | None = None
    ) -> list[float]:  # fmt: skip
        """A figure of one subject through that of another, for each round that has both."""
        mine = self.values(workload, subject, figure)
        theirs = self.values(other_workload or workload, other, figure)
        return [mine[turn] / theirs[turn] for turn in sorted(mine.keys() & theirs.keys()) if theirs[turn]]

    def peers(self, workload: str) -> list[str]:
        """The peers that were measured, the best one first."""
        medians = {
            note.name: spread.median
            for note in self.subjects
            if note.is_peer and (spread := self.spread(workload, note.name)) is not None
        }
        return sorted(medians, key=lambda name: medians[name], reverse=True)

    def measured(self, workload: str) -> list[str]:
        """The subjects of a workload, in their order."""
        found = dict.fromkeys(sample.subject for sample in self.samples if sample.workload == workload)
        return list(found)

    def title(self, subject: str) -> str:
        """A subject's title; its name where it is none of the catalogue."""
        return next((note.title for note in self.subjects if note.name == subject), subject)

    # --- as JSON ---

    def document(self) -> dict[str, Any]:
        """All of it, with the medians that everybody looks for first."""
        return {"format": FORMAT, **asdict(self), "medians": self._medians()}

    @classmethod
    def of_document(cls, document: Mapping[str, Any]) -> Self:
        """What `document` made. Raises ValueError for another format."""
        if document.get("format") != FORMAT:
            raise ValueError(
                f"the document has format {document.get('format')!r}, and this version reads {FORMAT}"
            )
        return cls(
            profile=document["profile"], machine=document["machine"], elapsed_s=document["elapsed_s"],
            workloads=[WorkloadNote(**note) for note in document["workloads"]],
            subjects=[SubjectNote(**note) for note in document["subjects"]],
            samples=[Sample(**sample) for sample in document["samples"]], problems=document["problems"],
        )  # fmt: skip

    def _medians(self) -> dict[str, dict[str, dict[str, float]]]:
        return {
            note.name: {
                subject: {
                    figure: spread.median
                    for figure in self._figures(note.name, subject)
                    if (spread := self.spread(note.name, subject, figure)) is not None
                }
                for subject in self.measured(note.name)
            }
            for note in self.workloads
        }

    def _figures(self, workload: str, subject: str) -> Sequence[str]:
        return list(
            dict.fromkeys(
                figure
                for sample in self.samples
                if sample.workload == workload and sample.subject == subject
                for figure in sample.figures
            )
        )


def quantile(values: Sequence[float], part: float) -> float:
    """The value below which `part` of the sorted `values` lies."""
    return values[min(len(values) - 1, int(len(values) * part))]
