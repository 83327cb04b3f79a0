"""Fills the disk under a working engine, and checks that it refuses loudly, loses nothing, and goes on when there is room again.

One unit is a run: a store on a small file system in memory of its own (tmpfs: the one that says "full" exactly when it
is); a ballast file takes what room is left, at a random moment or before the store is opened, but for a little. The worker is
told that it has no room, or killed, or lives to see the ballast go; a second one may open the store while the disk is still
full. Then there is room again: the last one recovers everything. The LMDB of the backend stands on the same disk or elsewhere.

What is not here: quotas and other errors that a full disk resembles (`syscalls`).

The idea needed to read it: what a worker says while the disk is full must be errors of walbatch's own; what it acknowledged
must be there in the end, and what it refused must not.
"""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tools.modes.disks import Unable, mount, unmount, unshare_mounts
from tools.modes.forks import ForkServer, Worker
from tools.modes.judge import Judge
from tools.modes.kill import drain
from tools.modes.tally import Job, Progress, Tally
from tools.modes.worker import Task

MODE: Final = "fulldisk"
KIB: Final = 1024
DISK_BYTES: Final = 8 * KIB * KIB
PAGE_BYTES: Final = 4 * KIB
READY_S: Final = 30.0
FULL_S: Final = 0.4
"""How long a worker works on a full disk before it is killed, unless it ends by itself."""
REPLAYS: Final = 10


class Ballast:
    """A file that takes the room that nobody shall have."""

    def __init__(self, place: Path) -> None:
        self._path = place / "ballast"

    def fill(self, left_bytes: int) -> None:
        """Take all room, and give a little back."""
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(file).st_size
            step = 256 * KIB
            while step >= PAGE_BYTES:
                try:
                    os.posix_fallocate(file, size, step)
                    size += step
                except OSError:
                    step //= 2
            os.ftruncate(file, max(0, size - left_bytes))
        finally:
            os.close(file)

    def drop(self) -> None:
        """There is room."""
        self._path.unlink(missing_ok=True)


@contextmanager
def small_disk(scratch: Path) -> Iterator[Path]:
    """A tmpfs. Raises Unable."""
    unshare_mounts()
    place = scratch / "small"
    place.mkdir()
    try:
        mount("walbatch", place, "tmpfs", f"size={DISK_BYTES},mode=700")
    except OSError as error:
        raise Unable(f"No tmpfs can be mounted here: {error}.") from error
    try:
        yield place
    finally:
        unmount(place)
        place.rmdir()


@dataclasses.dataclass(slots=True, kw_only=True)
class Run:
    """One run."""

    server: ForkServer
    tally: Tally
    task: Task
    judge: Judge
    chance: random.Random
    ballast: Ballast
    said: set[str] = dataclasses.field(default_factory=set)

    def go(self) -> list[str]:
        """What is wrong in the end."""
        chance, figures = self.chance, self.tally.figures
        opens_full = chance.random() < 0.25
        if opens_full:
            # A store with a past, on a disk that is full when it is opened.
            if chance.random() < 0.7:
                self._life(fills=False)
            self._fill()
        self._life(fills=not opens_full)
        if chance.random() < 0.4:
            self._fill()
            figures["opened again while full"] += 1
            self._life(fills=False)
        self.ballast.drop()
        if chance.random() < 0.5:
            self._life(fills=False)
        problems = drain(self.server, dataclasses.replace(self.task, cycle=self.task.cycle + 1), self.judge)
        figures["runs"] += 1
        figures["opened on a full disk"] += opens_full
        figures["runs that were told of it"] += bool(self.said & {"unknown", "refused", "error"})
        figures["runs on which opening was refused"] += "error" in self.said
        figures.update(self.judge.figures)
        return problems

    def _fill(self) -> None:
        room = self.chance.choice([0, 1, 2, 4, 16, 64])
        self.ballast.fill(self.chance.randint(0, room) * PAGE_BYTES)

    def _life(self, *, fills: bool) -> None:
        """A worker: it meets the end of the disk if it `fills`, and ends in one way or another."""
        chance = self.chance
        self.task = dataclasses.replace(self.task, cycle=self.task.cycle + 1)
        self.judge.begin()
        started = time.monotonic()
        worker = self.server.start(self.task.to_request())
        if fills:
            early = chance.random() < 0.3
            self._listen(
                worker, started + (chance.uniform(0, 0.03) if early else READY_S), until_ready=not early
            )
            if not early:
                self._listen(worker, time.monotonic() + chance.uniform(0, 0.05))
            self._fill()
        lives_on = chance.random() < 0.4
        self._listen(worker, time.monotonic() + chance.uniform(0, 0.06 if lives_on else FULL_S))
        if lives_on and fills:
            self.ballast.drop()
            self.tally.figures["room came back under it"] += 1
            self._listen(worker, time.monotonic() + chance.uniform(0, 0.05))
        asked = chance.random() < 0.3
        if asked:
            worker.send(signal.SIGTERM)
            self._listen(worker, time.monotonic() + READY_S)
        for fields, _ in worker.end():
            self._hear(fields)
        # SIGTERM itself ends a worker that has only just been forked.
        if asked and worker.code == -signal.SIGKILL:
            self.judge.problems.append("a worker on a full disk did not close")
        if worker.code not in {0, 1, -signal.SIGKILL, -signal.SIGTERM}:
            self.judge.problems.append(f"a worker ended with {worker.code}")
        self.judge.end(power=False, at=time.monotonic())

    def _listen(self, worker: Worker, deadline: float, *, until_ready: bool = False) -> None:
        while not (until_ready and self.judge.ready) and (message := worker.hear(deadline)) is not None:
            self._hear(message[0])

    def _hear(self, fields: list[object]) -> None:
        self.judge.hear(self.task.cycle, fields)
        self.said.add(str(fields[0]))
        if fields[0] == "error" and fields[1] not in {"StorageError", "DurabilityUnknown"}:
            self.judge.problems.append(f"a full disk is called {fields[1]}: {fields[2]}")


def run_one(server: ForkServer, tally: Tally, job: Job, place: Path, number: int) -> list[str]:
    """One run; what is wrong."""
    chance = random.Random(f"{MODE} {job.seed} {job.part} {number}")
    ballast = Ballast(place)
    ballast.drop()
    elsewhere = job.scratch / "elsewhere"
    for folder in (place / "store", place / "lmdb", elsewhere):
        shutil.rmtree(folder, ignore_errors=True)
    elsewhere.mkdir()
    task = Task(
        directory=str(place), backend=str(elsewhere) if chance.random() < 0.5 else "", cycle=0, seed=str(chance.random()),
        threads=chance.choice([1, 2, 4]), shards=chance.choice([1, 2]), once=chance.choice(["sync", "interval"]),
        segment_bytes=chance.choice([8, 64, 256]) * KIB, compress_bytes_min=chance.choice([None, 200]),
        payload_bytes_max=chance.choice([0, 300, 3000]), disk_full_wait_s=chance.choice([0.01, 0.1, 1.0]), close_s=1.0,
    )  # fmt: skip
    judge = Judge(durability={"once": task.once, "least": task.least})
    return Run(server=server, tally=tally, task=task, judge=judge, chance=chance, ballast=ballast).go()


def run(job: Job, progress: Progress) -> Tally:
    """Runs, until there are enough."""
    started = time.monotonic()
    tally = Tally(mode=MODE)
    try:
        with small_disk(job.scratch) as place, ForkServer() as server:
            number = 0
            while not job.is_over(number) and not tally.is_full:
                for problem in run_one(server, tally, job, place, number):
                    tally.fail(problem, f"{MODE} seed={job.seed} part={job.part} run={number}")
                number += 1
                progress(tally)
            tally.complete = job.count is not None and number >= job.count
    except Unable as error:
        tally.skipped = str(error)
    tally.seconds = time.monotonic() - started
    return tally


def replay(line: str, scratch: Path) -> list[str]:
    """The run of the line, again and again; real time is not the same twice."""
    words = dict(word.split("=", 1) for word in line.split()[1:])
    job = Job(seed=int(words["seed"]), part=int(words["part"]), scratch=scratch)
    try:
        with small_disk(scratch) as place, ForkServer() as server:
            for _ in range(REPLAYS):
                problems = run_one(server, Tally(mode=MODE), job, place, int(words["run"]))
                if problems:
                    return problems
    except Unable as error:
        return [f"cannot be replayed here: {error}"]
    return []
