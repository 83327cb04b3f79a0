"""Fails the system calls of a real process one by one, and checks that it says so and that nothing acknowledged is lost.

One unit is a run: a worker opens a store, submits from two threads and closes, while one call of one kind on one of its files
fails with one errno, once or from then on (a shim that is preloaded before the C library sees to it, so that Python, LMDB
and the C library itself are hit where they really call). The worker must end by itself, with errors of walbatch's own or
none, acknowledge nothing after a failed sync of the log, and leave a store that the next process recovers as a whole.

What is not here: what the kernel loses when a sync fails (the simulation's knobs), and calls on memory maps, which fail with a
signal.

The idea needed to read it: a worker without a fault is counted first, which says how many calls of each kind there are; then
each of them is failed with each errno that Linux gives for such a call. Two beginnings: a new store, and one that was
killed. Threads make the count vary a little: a run whose call does not come is not counted as a visit of its cell.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
import errno
import mmap
import os
import random
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tools.modes.disks import MEMORY
from tools.modes.forks import ForkServer, Worker
from tools.modes.judge import Judge
from tools.modes.kill import drain
from tools.modes.tally import Job, Progress, Tally
from tools.modes.worker import Task

MODE: Final = "syscalls"
SOURCE: Final = Path(__file__).with_name("errno_shim.c")
END_S: Final = 45.0
"""A worker that has not ended by then waits for ever."""

SHORT: Final = 0
"""Instead of an errno: half of what was asked for."""

REPLAYS: Final = 3

_FIELDS: Final = struct.Struct("<8i")
_PATH_BYTES: Final = 512


class Kind(enum.IntEnum):
    """What fails; in the order of the enum in the shim."""

    OPEN = 0
    READ = 1
    WRITE = 2
    FDATASYNC = 3
    FSYNC = 4
    RENAME = 5
    UNLINK = 6
    TRUNCATE = 7
    ALLOCATE = 8
    MKDIR = 9
    LOCK = 10
    LISTDIR = 11
    STAT = 12


_EIO, _FULL, _READ_ONLY, _INTERRUPTED = errno.EIO, (errno.ENOSPC, errno.EDQUOT), errno.EROFS, errno.EINTR
ERRORS: Final[Mapping[Kind, Sequence[int]]] = {
    Kind.OPEN: (_EIO, *_FULL, _READ_ONLY, errno.EMFILE, errno.ENFILE, errno.EACCES, _INTERRUPTED),
    Kind.READ: (_EIO, _INTERRUPTED, SHORT),
    Kind.WRITE: (_EIO, *_FULL, _READ_ONLY, _INTERRUPTED, SHORT),
    Kind.FDATASYNC: (_EIO, *_FULL, _READ_ONLY, _INTERRUPTED),
    Kind.FSYNC: (_EIO, *_FULL, _READ_ONLY, _INTERRUPTED),
    Kind.RENAME: (_EIO, *_FULL, _READ_ONLY),
    Kind.UNLINK: (_EIO, _READ_ONLY),
    Kind.TRUNCATE: (_EIO, *_FULL, _READ_ONLY, _INTERRUPTED),
    Kind.ALLOCATE: (_EIO, *_FULL, _READ_ONLY, errno.EOPNOTSUPP, _INTERRUPTED),
    Kind.MKDIR: (_EIO, *_FULL, _READ_ONLY),
    Kind.LOCK: (_EIO, errno.ENOLCK, _INTERRUPTED),
    Kind.LISTDIR: (_EIO, errno.EMFILE, errno.EACCES),
    Kind.STAT: (_EIO, errno.EACCES),
}
"""What Linux may answer to such a call on a disk that fails, is full, or was mounted read-only by the kernel."""

ONCE_ONLY: Final = frozenset({_INTERRUPTED})
"""Who is always interrupted tries for ever, as POSIX has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """The `number`-th call of `kind` fails with `error`; `forever`: and all after it."""

    begin: str
    kind: Kind
    error: int
    number: int
    forever: bool

    @property
    def cell(self) -> str:
        """Where it stands in the matrix."""
        error = errno.errorcode[self.error] if self.error else "short"
        return f"{self.kind.name.lower()}|{error}|{'forever' if self.forever else 'once'}"

    def words(self) -> str:
        """For the line that replays it."""
        return f"begin={self.begin} kind={self.kind.name} error={self.error} number={self.number} forever={int(self.forever)}"


class Control:
    """The page that is shared with the shim."""

    def __init__(self, path: Path) -> None:
        self.path = path
        size = _FIELDS.size + 4 * len(Kind) + 2 * _PATH_BYTES
        path.write_bytes(bytes(size))
        with path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), size)
        self._counts = struct.Struct(f"<{len(Kind)}i")

    def watch(self, folder: Path, strike: Strike | None = None) -> None:
        """Count from zero what happens below `folder`, and fail what `strike` says."""
        fields = (1, strike.kind, strike.number, strike.forever, strike.error) if strike else (0, 0, 0, 0, 0)
        _FIELDS.pack_into(self._page, 0, *fields, 0, 0, 0)
        self._page[_FIELDS.size :] = bytes(self._counts.size + _PATH_BYTES) + f"{folder}/".encode().ljust(
            _PATH_BYTES, b"\0"
        )

    def rest(self) -> None:
        """Nothing fails any more."""
        self._page[0] = 0

    @property
    def hits(self) -> int:
        """How often it struck."""
        return int(_FIELDS.unpack_from(self._page)[5])

    @property
    def counts(self) -> tuple[int, ...]:
        """Calls of each kind."""
        return self._counts.unpack_from(self._page, _FIELDS.size)

    @property
    def place(self) -> str:
        """The path that was struck first, below the folder."""
        start = _FIELDS.size + self._counts.size
        path, folder = (
            self._page[at : at + _PATH_BYTES].partition(b"\0")[0].decode(errors="replace")
            for at in (start, start + _PATH_BYTES)
        )
        return path.removeprefix(folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """A store before the fault, and what happened to it."""

    folder: Path
    judge: Judge


@dataclass(slots=True, kw_only=True)
class Bench:
    """What the runs have in common."""

    scratch: Path
    server: ForkServer
    control: Control
    tally: Tally
    beginnings: dict[str, Beginning]

    @property
    def folder(self) -> Path:
        """Where the store of a run stands."""
        return self.scratch / "run"

    def task(self, cycle: int, *, control: bool = True) -> Task:
        """The work of one run: small, and over soon."""
        return Task(
            directory=str(self.folder), cycle=cycle, seed="work", threads=2, operations=5, shards=1, segment_bytes=8192,
            payload_bytes_max=200, disk_full_wait_s=0.05, close_s=0.5, control=str(self.control.path) if control else "",
        )  # fmt: skip

    def begin(self, name: str) -> Judge:
        """Put the store of that beginning in place."""
        beginning = self.beginnings[name]
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(beginning.folder, self.folder)
        return copy.deepcopy(beginning.judge)

    def prepare(self) -> dict[str, tuple[int, ...]]:
        """Make the beginnings; how many calls of each kind there are after each."""
        for name in ("new", "killed"):
            judge = Judge(durability={"once": "sync", "least": "sync"})
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            self.control.watch(self.folder)
            if name == "killed":
                worker = self.server.start(dataclasses.replace(self.task(0), operations=None).to_request())
                self._listen(worker, judge, 0, acknowledged=60)
                for fields, _ in worker.end():
                    judge.hear(0, fields)
                judge.end(power=False, at=time.monotonic())
            kept = self.scratch / name
            shutil.copytree(self.folder, kept)
            self.beginnings[name] = Beginning(folder=kept, judge=judge)
        counts = {}
        for name in self.beginnings:
            judge = self.begin(name)
            self.control.watch(self.folder)
            self._work(judge)
            counts[name] = self.control.counts
        return counts

    def run(self, strike: Strike) -> list[str]:
        """One run; what is wrong."""
        judge = self.begin(strike.begin)
        self.control.watch(self.folder, strike)
        problems = self._work(judge)
        self.control.rest()
        hits, place = self.control.hits, self.control.place
        figures = self.tally.figures
        figures["runs"] += 1
        figures["calls that failed"] += hits
        if hits:
            self.tally.cells[strike.cell] += 1
            figures[
                f"struck in {place.partition('/')[0]}/{place.partition('/')[2].partition('/')[0]}".rstrip("/")
            ] += 1
        else:
            figures["runs whose call did not come"] += 1
        problems += drain(self.server, self.task(2, control=False), judge)
        figures.update(judge.figures)
        return [
            f"{strike.cell} on {place} (call {strike.number}, {strike.begin} store): {problem}"
            for problem in problems
        ]

    def _work(self, judge: Judge) -> list[str]:
        """A worker, until it ends by itself."""
        judge.begin()
        worker = self.server.start(self.task(1).to_request())
        said = self._listen(worker, judge, 1)
        if "end" not in said:
            worker.send(signal.SIGABRT)  # faulthandler is on: it tells where all threads stand
            worker.end()
            return [f"the worker did not end (exit code {worker.code}); it said {' '.join(sorted(said))}"]
        for fields, _ in worker.end():
            judge.hear(1, fields)
        judge.end(power=False, at=time.monotonic())
        self.tally.figures["runs that ended with an error"] += bool(said & {"error", "unknown"})
        return []

    @staticmethod
    def _listen(worker: Worker, judge: Judge, cycle: int, acknowledged: int | None = None) -> set[str]:
        """Until it ends, or has so many acknowledged. The words that it said."""
        deadline = time.monotonic() + END_S
        said: set[str] = set()
        while (message := worker.hear(deadline)) is not None:
            judge.hear(cycle, message[0])
            said.add(message[0][0])
            if acknowledged is not None and judge.figures["acknowledged operations"] >= acknowledged:
                break
        return said


# --- all strikes -----------------------------------------------------------------------------------------------------------


def strikes_of(counts: Mapping[str, Sequence[int]], seed: int) -> list[Strike]:
    """Every call with every errno, once and for ever: first one of each cell, then the others, both by chance."""
    chance = random.Random(f"{MODE} {seed}")
    by_cell: dict[str, list[Strike]] = {}
    for begin, calls in counts.items():
        for kind, errors in ERRORS.items():
            for error in errors:
                for number in range(1, calls[kind] + 1):
                    for forever in (False, True):
                        if not forever or error not in ONCE_ONLY:
                            strike = Strike(
                                begin=begin, kind=kind, error=error, number=number, forever=forever
                            )
                            by_cell.setdefault(strike.cell, []).append(strike)
    first, rest = [], []
    for strikes in by_cell.values():
        chance.shuffle(strikes)
        first.append(strikes[0])
        rest += strikes[1:]
    chance.shuffle(first)
    chance.shuffle(rest)
    return first + rest


def compiler() -> str | None:
    """A C compiler."""
    return next((found for name in ("gcc", "cc", "clang") if (found := shutil.which(name))), None)


@contextlib.contextmanager
def working_folder(scratch: Path) -> Iterator[Path]:
    """In memory where that is possible: what fails is decided here, and a disk would add the time of its syncs."""
    base = MEMORY if os.access(MEMORY, os.W_OK) else scratch
    with tempfile.TemporaryDirectory(prefix="walbatch-syscalls-", dir=base) as folder:
        yield Path(folder).resolve()


@contextlib.contextmanager
def bench_of(scratch: Path, tally: Tally) -> Iterator[Bench | None]:
    """A shim, and a server under it; None (and the reason in the tally) where there is no compiler."""
    command = compiler()
    if command is None:
        tally.skipped = "There is no C compiler, which the failing calls take."
        yield None
        return
    with working_folder(scratch) as folder:
        yield from _bench(command, folder, tally)


def _bench(command: str, scratch: Path, tally: Tally) -> Iterator[Bench]:
    shim = scratch / "errno_shim.so"
    subprocess.run(
        [command, "-shared", "-fPIC", "-O2", "-o", str(shim), str(SOURCE), "-ldl"],
        check=True,
        capture_output=True,
    )
    control = Control(scratch / "control")
    environment = {"LD_PRELOAD": str(shim), "WALBATCH_SHIM_CONTROL": str(control.path)}
    with ForkServer(environment) as server:
        yield Bench(scratch=scratch, server=server, control=control, tally=tally, beginnings={})


def run(job: Job, progress: Progress) -> Tally:
    """Strikes of this part, until there are enough, or all were done."""
    started = time.monotonic()
    tally = Tally(mode=MODE)
    with bench_of(job.scratch, tally) as bench:
        if bench is not None:
            strikes = strikes_of(bench.prepare(), job.seed)[job.part :: job.parts]
            for strike in strikes:
                if job.is_over(tally.figures["runs"]) or tally.is_full:
                    break
                for problem in bench.run(strike):
                    tally.fail(problem, f"{MODE} {strike.words()}")
                progress(tally)
            tally.complete = tally.figures["runs"] >= min(len(strikes), job.count or len(strikes))
    tally.seconds = time.monotonic() - started
    return tally


def replay(line: str, scratch: Path) -> list[str]:
    """The strike of the line, a few times: threads take turns as they like."""
    words = dict(word.split("=", 1) for word in line.split()[1:])
    strike = Strike(
        begin=words["begin"], kind=Kind[words["kind"]], error=int(words["error"]), number=int(words["number"]),
        forever=words["forever"] == "1",
    )  # fmt: skip
    tally = Tally(mode=MODE)
    with bench_of(scratch, tally) as bench:
        if bench is None:
            return [f"cannot be replayed here: {tally.skipped}"]
        bench.prepare()
        for _ in range(REPLAYS):
            problems = bench.run(strike)
            if problems:
                return problems
    return []
