"""Cuts the power of real file systems under a working engine, and checks what is left of it, and of the simulation's claims.

One unit is a cut: a process recovers the store, submits from several threads and tells this one what was acknowledged; at a
random moment, recovery included, the file system stops and loses what it had not written (`disks`). Then the process is
killed, the journal is replayed, the files are compared with what the simulation allows (`modelcheck`), and the next process
goes on from there. Some cuts follow a kill, and some fall into the recovery from it. Figures are told by the kind of disk:
`cached` ones lose what was not flushed, too.

What is not here: disks that lie about a flush, and damage at rest.

The idea needed to read it: cuts come in rounds on one disk, each with a store and settings of its own; a round ends with a
drain and a full check of everything that was acknowledged in it. Real time decides where the cut falls, so a replay does
the same round several times.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tools.modes.disks import Disk, NestedDisk, Unable, images_folder, unshare_mounts
from tools.modes.forks import ForkServer, Worker
from tools.modes.judge import EXCUSED_S, Judge
from tools.modes.kill import drain
from tools.modes.modelcheck import Model
from tools.modes.tally import FAILURES_MAX, Job, Progress, Tally
from tools.modes.worker import NEVER_MS, Task

MODE: Final = "powercut"
ROUND_CUTS: Final = 12
READY_S: Final = 30.0
LATE_SHARE: Final = 0.04
"""Cuts so late that what lanes with an interval acknowledged at first must have been synced."""
HURRY_S: Final = 0.05
"""How long a worker submits as fast as it can before a late cut: the disks are small."""
INTERVAL_SYNC: Final = "interval_sync"
"""What a control may skip, beside the calls of `SkippingFileSystem`: lanes that sync later never do."""
REPLAYS: Final = 20

PROMISES: Final = frozenset({"ack", "done", "ready"})
"""Messages that end with the time at which they were given."""

KINDS: Final[Mapping[str, Callable[[Path], Disk | NestedDisk]]] = {
    "ext4": lambda folder: Disk("ext4", folder),
    "xfs": lambda folder: Disk("xfs", folder),
    "ext4_cached": lambda folder: NestedDisk("ext4", folder),
    "xfs_cached": lambda folder: NestedDisk("xfs", folder),
}


@dataclass(slots=True, kw_only=True)
class Bench:
    """The disks of a run, made when they are first used, and the server that forks its workers."""

    folder: Path
    server: ForkServer
    tally: Tally
    skips: str = ""
    records: bool = True
    """Whether the files are compared with the model."""
    late_share: float = LATE_SHARE
    disks: dict[str, Disk | NestedDisk] = field(default_factory=dict)
    unable: dict[str, str] = field(default_factory=dict)
    ready_s: dict[str, float] = field(default_factory=dict)
    """How long recovery takes of late, by kind."""

    def disk(self, kind: str) -> Disk | NestedDisk | None:
        """The disk of that kind; None where this machine has none."""
        if kind not in self.disks and kind not in self.unable:
            folder = self.folder / kind
            folder.mkdir()
            try:
                self.disks[kind] = KINDS[kind](folder)
            except Unable as error:
                self.unable[kind] = f"{kind}: {error}"
        return self.disks.get(kind)

    def close(self) -> None:
        """Unmount everything."""
        for disk in self.disks.values():
            disk.close()


@dataclass(slots=True, kw_only=True)
class Round:
    """A store on a disk, until its full check."""

    bench: Bench
    kind: str
    disk: Disk | NestedDisk
    task: Task
    chance: random.Random
    judge: Judge
    model: Model = field(default_factory=Model)
    cycle: int = 0

    def cut(self) -> list[str]:
        """One power cut, and what is wrong with the files then."""
        figures = self.bench.tally.figures
        after_kill = self.chance.random() < 0.25
        if after_kill:
            worker = self._start()
            self._until_dying(worker, early=self.chance.random() < 0.3)
            self._end(worker, power=False, at=time.monotonic())
            self.model.killed(self.disk.place)
        late = self.chance.random() < self.bench.late_share
        early = not late and self.chance.random() < (0.7 if after_kill else 0.3)
        worker = self._start(late=late)
        self._until_dying(worker, early=early, late=late)
        self._listen(worker, time.monotonic())
        cut_at = time.monotonic()
        self.disk.cut(self.chance)
        self._end(worker, power=True, at=cut_at)
        self.disk.restart()
        figures["cuts later than every interval"] += late
        figures["power cuts"] += 1
        figures[f"power cuts on {self.kind}"] += 1
        figures["cuts before recovery was done"] += not self.judge.ready
        figures["cuts after a kill"] += after_kill
        if not self.task.records:
            return []
        problems = self.model.check(self.disk.place)
        self.model.restart(self.disk.place)
        return problems

    def _start(self, *, late: bool = False) -> Worker:
        self.cycle += 1
        self.judge.begin()
        task = dataclasses.replace(self.task, cycle=self.cycle)
        if late:
            task = dataclasses.replace(task, hurry_s=HURRY_S)
        return self.bench.server.start(task.to_request())

    def _until_dying(self, worker: Worker, *, early: bool, late: bool = False) -> None:
        """Listen until it is time."""
        started = time.monotonic()
        usual_s = self.bench.ready_s.get(self.kind, 0.03)
        deadline = started + (self.chance.uniform(0, 1.1 * usual_s) if early else READY_S)
        self._listen(worker, deadline, until_ready=not early)
        if early:
            return
        if not self.judge.ready:
            self.judge.problems.append(f"recovery took more than {READY_S:.0f} s, or failed ({worker.code})")
            return
        self.bench.ready_s[self.kind] = usual_s + 0.1 * (time.monotonic() - started - usual_s)
        rest_s = self.chance.uniform(0, self.chance.choice([0.01, 0.03, 0.1]))
        self._listen(worker, time.monotonic() + rest_s + late * (EXCUSED_S + HURRY_S))

    def _listen(self, worker: Worker, deadline: float, *, until_ready: bool = False) -> None:
        while not (until_ready and self.judge.ready) and (message := worker.hear(deadline)) is not None:
            fields, raw = message
            self._take_in(fields, raw)
            if fields[0] in {"error", "unknown"}:
                # The disk has its power, and room: nothing may fail.
                self.judge.problems.append(f"a worker met an error: {fields}")

    def _end(self, worker: Worker, *, power: bool, at: float) -> None:
        """All that it still said. What it promised when the cut had begun, at `at`, does not count.

        A sync that the shutdown meets in its middle may report success (seen on ext4: the size was not on the disk). Where
        the power really fails nobody hears of that, so what counts was given before the cut began, however late it is heard.
        """
        figures = self.bench.tally.figures
        for fields, raw in worker.end():
            promises = power and fields[0] in PROMISES
            if promises and fields[-1] >= at:
                figures["promises given after the cut had begun"] += 1
            else:
                figures["promises given before the cut, heard after it"] += promises
                self._take_in(fields, raw)
        self.judge.end(power=power, at=at)

    def _take_in(self, fields: list[Any], raw: bytes) -> None:
        self.judge.hear(self.cycle, fields)
        self.model.hear(fields, raw)


def task_of(chance: random.Random, place: Path, bench: Bench) -> Task:
    """The settings of a round."""
    skips = "" if bench.skips == INTERVAL_SYNC else bench.skips
    task = Task(
        directory=str(place), cycle=0, seed=str(chance.random()), threads=chance.choice([1, 2, 4]),
        records=str(place) if bench.records else "", skips=skips, shards=chance.choice([1, 2]),
        once=chance.choice(["sync", "sync", "interval"]), least=chance.choice(["sync", "interval"]),
        segment_bytes=chance.choice([8, 32, 128]) * 1024, compress_bytes_min=chance.choice([None, 200, 1024]),
        payload_bytes_max=chance.choice([0, 300, 3000]),
    )  # fmt: skip
    if bench.skips == INTERVAL_SYNC:
        # One segment, and no lane whose syncs would do for both.
        return dataclasses.replace(
            task, once="interval", least="interval", interval_ms=NEVER_MS, segment_bytes=2**20
        )
    return task


def run_round(bench: Bench, job: Job, kind: str, number: int, cuts: int = ROUND_CUTS) -> list[str]:
    """One round; what is wrong at its end, or with the first cut that shows anything."""
    disk = bench.disk(kind)
    assert disk is not None
    chance = random.Random(f"{MODE} {job.seed} {job.part} {kind} {number}")
    for name in ("store", "lmdb"):
        shutil.rmtree(disk.place / name, ignore_errors=True)
    task = task_of(chance, disk.place, bench)
    judge = Judge(durability={"once": task.once, "least": task.least})
    one = Round(bench=bench, kind=kind, disk=disk, task=task, chance=chance, judge=judge)
    # What was removed may come back with the first cut, unless its removal is on the disk.
    disk.restart()
    one.model.restart(disk.place)
    problems: list[str] = []
    for _ in range(cuts):
        problems = [f"{kind}: {problem}" for problem in one.cut()]
        if problems or judge.problems or job.is_over(0):
            break
    problems += [
        f"{kind}: {problem}"
        for problem in drain(bench.server, dataclasses.replace(task, cycle=one.cycle + 1), judge)
    ]
    bench.tally.figures.update(judge.figures)
    bench.tally.figures.update({f"{kind}: {name}": count for name, count in one.model.figures.items()})
    return problems


@contextlib.contextmanager
def bench_of(
    job: Job, tally: Tally, *, skips: str = "", records: bool = True, late_share: float = LATE_SHARE
) -> Iterator[Bench]:
    """Disks and a server. Raises Unable."""
    unshare_mounts()
    with images_folder(job.scratch) as folder, ForkServer() as server:
        bench = Bench(
            folder=folder, server=server, tally=tally, skips=skips, records=records, late_share=late_share
        )
        try:
            yield bench
        finally:
            bench.close()


def run(
    job: Job,
    progress: Progress,
    *,
    kinds: Sequence[str] = tuple(KINDS),
    skips: str = "",
    records: bool = True,
    late_share: float = LATE_SHARE,
    failures_max: int = FAILURES_MAX,
) -> Tally:
    """Rounds on each kind of disk in turn, until there are enough cuts. `skips`, `records` and `late_share`: see `Bench`."""
    started = time.monotonic()
    tally = Tally(mode=MODE)
    try:
        with bench_of(job, tally, skips=skips, records=records, late_share=late_share) as bench:
            able = [kind for kind in kinds if bench.disk(kind) is not None]
            tally.skipped = " ".join(bench.unable.values())
            number = 0
            while (
                able and not job.is_over(tally.figures["power cuts"]) and len(tally.failures) < failures_max
            ):
                kind = able[number % len(able)]
                left = ROUND_CUTS if job.count is None else -(-job.count // len(able))
                for problem in run_round(bench, job, kind, number, min(ROUND_CUTS, left)):
                    tally.fail(problem, f"{MODE} seed={job.seed} part={job.part} kind={kind} round={number}")
                number += 1
                progress(tally)
    except Unable as error:
        tally.skipped = str(error)
    tally.complete = bool(tally.skipped) or (
        job.count is not None and tally.figures["power cuts"] >= job.count
    )
    tally.seconds = time.monotonic() - started
    return tally


def replay(line: str, scratch: Path) -> list[str]:
    """The round of the line, again and again; real time is not the same twice."""
    words = dict(word.split("=", 1) for word in line.split()[1:])
    job = Job(seed=int(words["seed"]), part=int(words["part"]), scratch=scratch)
    try:
        with bench_of(job, Tally(mode=MODE)) as bench:
            if bench.disk(words["kind"]) is None:
                return [f"cannot be replayed here: {bench.unable[words['kind']]}"]
            for _ in range(REPLAYS):
                problems = run_round(bench, job, words["kind"], int(words["round"]))
                if problems:
                    return problems
    except Unable as error:
        return [f"cannot be replayed here: {error}"]
    return []
