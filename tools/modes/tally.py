"""What a mode of the torture run is told, and what it answers: a job, and a tally of figures and failures.

A mode is a module of this folder with two functions:

    def run(job: Job, progress: Progress) -> Tally
    def replay(line: str, scratch: Path) -> list[str]

`run` does its part of the work until its count is reached or its time is over, and calls `progress(tally)` now and then. It is
deterministic: the same seed, part and count do the same things (except where the mode is about real time). `replay` takes a
line that a failure printed, whose first word is the mode's name, does exactly that again, and returns what is wrong.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

FAILURES_MAX = 20
"""Failures that a tally keeps. A mode stops when it has as many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One part of a mode's work. Parts run in processes of their own, with different chance."""

    seed: int
    part: int = 0
    parts: int = 1
    count: int | None = None
    """How much of the mode's unit this part is to do (crash states, seeded runs, cycles...); None: all there is."""
    seconds: float | None = None
    """Real time after which it stops where it is."""
    scratch: Path
    """An empty folder of its own on a real disk."""
    _started: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float | None:
        """Real time that is left; None without a bound."""
        return None if self.seconds is None else self._started + self.seconds - time.monotonic()

    def is_over(self, done: int) -> bool:
        """Whether the count is reached or the time is over."""
        if self.count is not None and done >= self.count:
            return True
        left = self.seconds_left
        return left is not None and left <= 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One breach, and the line that does it again: `python3 tools/torture.py --replay 'LINE'`."""

    problem: str
    replay: str


@dataclass(slots=True, kw_only=True)
class Tally:
    """What was done. `figures` and `cells` add up over parts and runs."""

    mode: str
    figures: Counter[str] = field(default_factory=Counter)
    """What stands in the table, by name: "crash states", "of them kept pieces", "virtual hours"..."""
    cells: Counter[str] = field(default_factory=Counter)
    """A matrix, by cell: how often it was visited, such as "storage/segment.py append write|EIO"."""
    failures: list[Failure] = field(default_factory=list)
    skipped: str = ""
    """Why this machine cannot do it, as a sentence."""
    complete: bool = True
    """Whether everything that there was to do was done (False when the time was over first)."""
    seconds: float = 0.0

    @property
    def is_full(self) -> bool:
        """Whether it has failed often enough."""
        return len(self.failures) >= FAILURES_MAX

    def fail(self, problem: str, replay: str) -> None:
        """Note a breach; the same problem is kept once."""
        self.figures["failures"] += 1
        if not self.is_full and all(failure.problem != problem for failure in self.failures):
            self.failures.append(Failure(problem=problem, replay=replay))

    def add(self, other: Tally) -> None:
        """Take in what another part did."""
        self.figures.update(other.figures)
        self.cells.update(other.cells)
        for failure in other.failures:
            if failure not in self.failures:
                self.failures.append(failure)
        self.skipped = self.skipped or other.skipped
        self.complete = self.complete and other.complete
        self.seconds += other.seconds

    def to_json(self) -> str:
        """One line."""
        return json.dumps({
            "mode": self.mode, "figures": self.figures, "cells": self.cells, "skipped": self.skipped,
            "failures": [[failure.problem, failure.replay] for failure in self.failures],
            "complete": self.complete, "seconds": self.seconds,
        })  # fmt: skip

    @classmethod
    def from_json(cls, line: str) -> Self:
        """What `to_json` wrote."""
        found: dict[str, Any] = json.loads(line)
        return cls(
            mode=found["mode"], figures=Counter(found["figures"]), cells=Counter(found["cells"]),
            skipped=found["skipped"], complete=found["complete"], seconds=found["seconds"],
            failures=[Failure(problem=problem, replay=replay) for problem, replay in found["failures"]],
        )  # fmt: skip


Progress = Callable[[Tally], None]
