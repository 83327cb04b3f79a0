"""Mutants: mistakes in our own code, each of which the crash harness must find.

What is not here: the mistakes (`tools.mutants.catalogue`), and what they are tried on (`tools.mutants.probes`).

The unit is a mutant. A mutant is killed by the first probe that reports a problem, beginning with the one that its definition
names. Every probe that has killed one is run on the code as it is as well, and must find nothing there: else it would prove
nothing. With a time limit a third of the mutants is tried, by the seed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from tools.modes.tally import Job, Progress, Tally
from tools.mutants.catalogue import CHAPTERS, MUTANTS, mutant_named
from tools.mutants.child import Kill
from tools.mutants.mutant import ROOT, UNHARMED, Mutant

MODE: Final = "mutants"
SAMPLE: Final = 3
"""With a time limit, one mutant of so many."""


def chosen(job: Job) -> list[Mutant]:
    """The mutants of a part."""
    mutants = list(MUTANTS)
    if job.seconds is not None:
        mutants = random.Random(f"mutants {job.seed}").sample(mutants, len(mutants) // SAMPLE)
    mutants = mutants[job.part :: job.parts]
    return mutants if job.count is None else mutants[: job.count]


def run(job: Job, progress: Progress) -> Tally:
    """Try the mutants of this part, then the probes that have killed them on unharmed code."""
    tally = Tally(mode=MODE)
    started = time.monotonic()
    probes: dict[str, None] = {}
    todo = [mutant.word for mutant in chosen(job)]
    for wanted in (todo, probes):
        words = list(wanted) if wanted is todo else [f"{UNHARMED.word}@{probe}" for probe in probes]
        for kill in _killed(words, job):
            if wanted is todo:
                _count(tally, kill)
                if kill.probe and not kill.probe.startswith("deadlock:"):
                    probes[kill.probe] = None
            else:
                _control(tally, kill)
            tally.seconds = time.monotonic() - started
            progress(tally)
    tally.complete = tally.figures["mutants"] == len(MUTANTS[job.part :: job.parts])
    return tally


def _count(tally: Tally, kill: Kill) -> None:
    tally.figures["mutants"] += 1
    if not kill.probe:
        tally.figures["survived"] += 1
        tally.fail(f"a mutant survived: {mutant_named(kill.mutant).name}", f"{MODE} mutant={kill.mutant}")
        return
    tally.figures["killed"] += 1
    tally.figures[f"killed by {_mode_of(kill.probe)}"] += 1
    tally.cells[f"{kill.mutant} {kill.probe}"] += kill.states


def _control(tally: Tally, kill: Kill) -> None:
    tally.figures["probes that find nothing in unharmed code"] += not kill.probe
    if kill.probe:
        tally.fail(
            f"unharmed code fails {kill.probe}: {kill.problem}",
            f"{MODE} mutant={kill.mutant} probe={kill.probe}",
        )


def _mode_of(probe: str) -> str:
    """How the table calls who killed."""
    mode, _, scene = probe.partition(":")
    return scene.partition("/")[0] if mode == "mode" else mode


def _killed(words: Sequence[str], job: Job) -> Iterator[Kill]:
    """What became of each, one after the other, until the time is over."""
    if not words or job.is_over(0):
        return
    command = [sys.executable, "-m", "tools.mutants.child", *words]
    errors = job.scratch / "mutants.log"
    with (
        errors.open("a", encoding="utf-8") as log,
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        ) as server,
    ):
        assert server.stdout is not None
        answered = 0
        try:
            for line in server.stdout:
                answered += 1
                yield Kill(**json.loads(line))
                if job.is_over(0):
                    return
        finally:
            if server.poll() is None and answered < len(words):
                os.killpg(server.pid, signal.SIGKILL)
    if answered < len(words):
        last = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"{words[answered]}: no answer ({' '.join(last)})")


def replay(line: str, scratch: Path) -> list[str]:
    """Try one mutant again: what is wrong is that it lives; or, with unharmed code, that a probe finds something."""
    settings = dict(part.partition("=")[::2] for part in line.split())
    word, probe = settings["mutant"], settings.get("probe", "")
    for kill in _killed([f"{word}@{probe}" if probe else word], Job(seed=0, scratch=scratch)):
        if word == UNHARMED.word:
            return [kill.problem] if kill.probe else []
        return [] if kill.probe else [f"the mutant survives: {mutant_named(word).name}"]
    return ["there was no time"]


def table(tally: Tally) -> str:
    """The kill table as markdown."""
    found: dict[str, tuple[str, int]] = {}
    for cell, states in tally.cells.items():
        word, _, probe = cell.partition(" ")
        found[word] = (probe, states)
    lines = ["| mutant | row of the checklist | killed by | states until killed |", "|---|---|---|---:|"]
    for chapter, mutants in CHAPTERS.items():
        rows = [(mutant, found[mutant.word]) for mutant in mutants if mutant.word in found]
        if rows:
            lines.append(f"| **{chapter}** | | | |")
        for mutant, (probe, states) in rows:
            lines.append(
                f"| {mutant.name} | {mutant.row} | {_mode_of(probe)} ({_scene_of(probe)}) | {states:,} |"
            )
    return "\n".join(lines)


def _scene_of(probe: str) -> str:
    """What it was killed on, without the number of seeds."""
    parts = probe.rpartition(":")[2].split("/")
    return ", ".join(part.replace("_", " ") for part in parts if not part.isdigit())
