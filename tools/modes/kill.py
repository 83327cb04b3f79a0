"""Kills a working engine again and again, and checks that nothing is lost, invented, repeated or out of order.

One unit is a cycle: a process that recovers the store of the cycle before, submits from several threads and dies. Most are
ended by SIGKILL at a random moment: while they recover, again while the next one recovers from that, or while they work;
some are told to end by SIGTERM or SIGINT, and killed while they do, or not. Real time decides where the kill falls, so a replay
does the same things at nearly the same moments, and does them several times.

What is not here: what a power cut takes (`powercut`): after a kill everything written is still in the page cache.

The idea needed to read it: cycles come in rounds. A round has its own store and settings, and ends with a drain and a full
check of everything that was acknowledged in it; its seed is made of the run's seed, the part and the round's number.
"""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tools.modes.disks import MEMORY
from tools.modes.forks import ForkServer, Message, Worker
from tools.modes.judge import Judge
from tools.modes.tally import Job, Progress, Tally
from tools.modes.worker import Task

MODE: Final = "kill"
ROUND_CYCLES: Final = 25
"""Cycles between two full checks."""

DISK_EVERY: Final = 8
"""A kill takes nothing out of the page cache, so that a disk adds nothing but the time of its syncs: most rounds are done
on a file system in memory, where there are several times as many, and every eighth one on the disk."""

READY_S: Final = 30.0
"""A worker that has not recovered by then is a finding."""

REPLAYS: Final = 20
"""How often a replay does its round: where a kill falls is a matter of chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dying:
    """How a cycle ends: after so many seconds, counted from its start if `early`, else from when it has recovered."""

    early: bool
    after_s: float
    ask: signal.Signals | None = None
    """What it is told first..."""
    patience_s: float = 0.0
    """...and how long it may take to end by itself."""


def chance_of(seed: int, part: int, number: int) -> random.Random:
    """The chance of a round."""
    return random.Random(f"{MODE} {seed} {part} {number}")


def task_of(chance: random.Random, directory: str) -> Task:
    """The settings of a round."""
    return Task(
        directory=directory, cycle=0, seed=str(chance.random()), threads=chance.choice([1, 2, 4, 4, 8]),
        shards=chance.choice([1, 1, 2, 3]), payload_bytes_max=chance.choice([0, 300, 300, 3000]),
        once=chance.choice(["sync", "sync", "interval"]), least=chance.choice(["sync", "interval"]),
        segment_bytes=chance.choice([8, 32, 128, 1024]) * 1024, compress_bytes_min=chance.choice([None, 200, 1024]),
    )  # fmt: skip


def dying_of(chance: random.Random, before: Dying | None, ready_s: float) -> Dying:
    """How the next cycle ends. A kill in recovery is often followed by another one."""
    early = chance.random() < (0.6 if before is not None and before.early else 0.3)
    if early:
        return Dying(early=True, after_s=chance.uniform(0.0, 1.1 * ready_s))
    after_s = chance.uniform(0.0, 0.1 if chance.random() < 0.1 else 0.02)
    if chance.random() < 0.1:
        ask = chance.choice([signal.SIGTERM, signal.SIGINT])
        return Dying(early=False, after_s=after_s, ask=ask, patience_s=chance.choice([0.003, 0.01, 30.0]))
    return Dying(early=False, after_s=after_s)


@dataclass(slots=True)
class _Cycles:
    """What is common to the cycles of a run."""

    server: ForkServer
    tally: Tally
    ready_s: float = 0.03
    """How long recovery takes of late."""

    def run(self, task: Task, dying: Dying, judge: Judge) -> None:
        """One cycle."""
        started = time.monotonic()
        judge.begin()
        worker = self.server.start(task.to_request())
        deadline = started + (dying.after_s if dying.early else READY_S)
        heard = self._listen(worker, deadline, judge, task, until_ready=not dying.early)
        if judge.ready and not dying.early:
            self.ready_s += 0.05 * (time.monotonic() - started - self.ready_s)
            heard += self._listen(worker, time.monotonic() + dying.after_s, judge, task)
            if dying.ask is not None:
                worker.send(dying.ask)
                heard += self._listen(worker, time.monotonic() + dying.patience_s, judge, task)
        rest = worker.end()
        for fields, _ in rest:
            judge.hear(task.cycle, fields)
        judge.end(power=False, at=time.monotonic())
        self._count(dying, worker, heard + rest, judge)

    @staticmethod
    def _listen(
        worker: Worker, deadline: float, judge: Judge, task: Task, *, until_ready: bool = False
    ) -> list[Message]:
        heard = []
        while not (until_ready and judge.ready) and (message := worker.hear(deadline)) is not None:
            judge.hear(task.cycle, message[0])
            heard.append(message)
        return heard

    def _count(self, dying: Dying, worker: Worker, heard: list[Message], judge: Judge) -> None:
        figures = self.tally.figures
        figures["cycles"] += 1
        words = Counter(fields[0] for fields, _ in heard)
        errors = [fields for fields, _ in heard if fields[0] in {"error", "unknown"}]
        if errors:
            judge.problems.append(f"a worker met an error: {errors[0]}")
        if worker.code == -signal.SIGKILL:
            figures["kills"] += 1
            figures["kills before recovery was done"] += not judge.ready
            figures["kills while closing"] += dying.ask is not None
        elif worker.code == 0 and dying.ask is not None and words["interrupted"]:
            figures["ended by a signal, in order"] += 1
        else:
            judge.problems.append(f"a worker ended by itself with {worker.code}")
        if not dying.early and not judge.ready:
            judge.problems.append(f"recovery took more than {READY_S:.0f} s")


def drain(server: ForkServer, task: Task, judge: Judge) -> list[str]:
    """Let a last process deliver everything; what is wrong then."""
    judge.begin()
    worker = server.start(dataclasses.replace(task, drain=True, records="", skips="").to_request())
    deadline = time.monotonic() + 2 * READY_S
    found: list[tuple[str, str]] | None = None
    problems = []
    while (message := worker.hear(deadline)) is not None:
        fields, _ = message
        judge.hear(task.cycle, fields)
        match fields:
            case ["drained", reason] if reason != "drained":
                problems.append(f"closing after everything was flushed: {reason}")
            case ["error", *what]:
                problems.append(f"the store cannot be recovered: {what}")
            case ["counted", counted]:
                found = counted
            case _:
                pass
    worker.end()
    if found is None:
        return [*judge.problems, *problems, f"the drain did not finish (exit code {worker.code})"]
    return problems + judge.check(found)


def run_round(
    server: ForkServer, tally: Tally, job: Job, *, number: int, cycles: int = ROUND_CYCLES
) -> list[str]:
    """One round on a store of its own; what is wrong at its end."""
    chance = chance_of(job.seed, job.part, number)
    in_memory = number % DISK_EVERY != DISK_EVERY - 1 and os.access(MEMORY, os.W_OK)
    with tempfile.TemporaryDirectory(
        prefix="walbatch-kill-", dir=MEMORY if in_memory else job.scratch
    ) as directory:
        return _run_round(
            server, tally, job, task_of(chance, directory), chance, cycles=cycles, in_memory=in_memory
        )


def _run_round(
    server: ForkServer,
    tally: Tally,
    job: Job,
    task: Task,
    chance: random.Random,
    *,
    cycles: int,
    in_memory: bool,
) -> list[str]:
    judge = Judge(durability={"once": task.once, "least": task.least})
    runs = _Cycles(server, tally)
    dying = None
    for cycle in range(cycles):
        dying = dying_of(chance, dying, runs.ready_s)
        runs.run(dataclasses.replace(task, cycle=cycle), dying, judge)
        tally.figures["cycles in memory" if in_memory else "cycles on the disk"] += 1
        if judge.problems or job.is_over(0):
            break
    problems = drain(server, dataclasses.replace(task, cycle=cycles), judge)
    tally.figures.update(judge.figures)
    return problems


def run(job: Job, progress: Progress) -> Tally:
    """Rounds, until there are enough cycles."""
    started = time.monotonic()
    tally = Tally(mode=MODE)
    number = 0
    with ForkServer() as server:
        while not job.is_over(tally.figures["cycles"]) and not tally.is_full:
            left = ROUND_CYCLES if job.count is None else job.count - tally.figures["cycles"]
            problems = run_round(server, tally, job, number=number, cycles=min(ROUND_CYCLES, left))
            for problem in problems:
                tally.fail(problem, f"{MODE} seed={job.seed} part={job.part} round={number}")
            number += 1
            progress(tally)
    tally.complete = job.count is not None and tally.figures["cycles"] >= job.count
    tally.seconds = time.monotonic() - started
    return tally


def replay(line: str, scratch: Path) -> list[str]:
    """The round of the line, again and again; real time is not the same twice."""
    words = dict(word.split("=", 1) for word in line.split()[1:])
    job = Job(seed=int(words["seed"]), part=int(words["part"]), scratch=scratch)
    tally = Tally(mode=MODE)
    with ForkServer() as server:
        for _ in range(REPLAYS):
            problems = run_round(server, tally, job, number=int(words["round"]))
            if problems:
                return problems
    return []
