"""Stores to be damaged: made by the shipped engine on a simulated machine, with everything in them that can rot.

What is not here: the damage (`damages`), and what may become of it (`verdict`).

The idea needed to read it: one history is ended in three ways (killed, killed after the log went quiet, closed), and forked once:
the fork has the same identity and the same segment numbers, and another life behind them. That is the nastiest place from
which a frame can be spliced in.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import walbatch as wb
from walbatch import limits
from walbatch.core.frame import FrameHeader, SegmentHeader, decode_segment_header
from walbatch.core.scanner import scan_segment
from walbatch.engine import Environment
from walbatch.testing.simulation.commits import newest_checkpoint
from walbatch.testing.simulation.directory import Directory
from walbatch.testing.simulation.disk import Inode
from walbatch.testing.simulation.history import AppliedTo, Event
from walbatch.testing.simulation.machine import Machine, Process
from walbatch.types import Checkpoint

ROOT: Final = "/store"
SECTOR: Final = limits.SECTOR_BYTES
STORE_BYTES: Final = 64 * limits.KIB
"""Segments are added until the closed store has at least this many bytes of them: 524,288 bits."""
SPARE_BYTES: Final = 3 * 8192
"""What compactions may take of it again until it is closed."""

QUIET_MS: Final = 1_000.0
TICK_S: Final = 0.05
SETTINGS: Final = wb.Settings(
    segment_bytes=8192, disk_bytes_max=2**24, timer_ms=5, checkpoint_ms=20, compress_bytes_min=512,
    idle_stamp_ms=QUIET_MS,
)  # fmt: skip
PROMPT: Final = wb.Trigger(count=4, linger_ms=1)

Files = Mapping[str, bytes]
"""A store at rest: name below its root -> bytes. The lock and state/ are not in it."""

Row = tuple[str, bytes, bytes, int]
"""Lane, key, payload, priority."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A frame of an undamaged store."""

    name: str
    offset: int
    header: FrameHeader

    @property
    def end(self) -> int:
        """Where the next one starts."""
        return self.offset + self.header.total_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """A store at rest, and the truth about it."""

    name: str
    files: Files
    checkpoint: Checkpoint | None
    rows: Mapping[int, Row]
    unsettled: frozenset[int]
    frames: tuple[Placed, ...]
    headers: Mapping[str, SegmentHeader]
    older: Mapping[str, tuple[bytes, ...]]
    """Contents that a segment had before, oldest first."""

    @property
    def segments(self) -> list[str]:
        """Names of the segments, ascending."""
        return sorted(self.headers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stores:
    """The same history, ended in three ways; its fork; and another store of the same shape."""

    killed: Store
    """In the middle of everything: nothing proves its last frame. A trimmed segment has come back."""
    stamped: Store
    """Killed after the log had gone quiet."""
    closed: Store
    fork: Store
    other: Store

    def get(self, name: str) -> Store:
        """One of them by its name."""
        store: Store = getattr(self, name)
        return store


@functools.cache
def make_stores(seed: int) -> Stores:
    """The stores of a seed."""
    history = _History(seed)
    machine = history.first_life()
    killed, stamped, closed = history.second_life(machine.clone(), "2")
    fork = _History(seed + 1, history).second_life(machine.clone(), "fork")[2]
    stranger = _History(seed + 2)
    other = stranger.second_life(stranger.first_life(), "2")[2]
    return Stores(killed=killed, stamped=stamped, closed=closed, fork=fork, other=other)


@dataclass(slots=True)
class _History:
    """What was submitted and applied, and what the files were like meanwhile."""

    seed: int
    before: _History | None = None
    rows: dict[int, Row] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    contents: dict[str, dict[bytes, None]] = field(default_factory=dict)
    """Every content that each segment has had."""
    chance: random.Random = field(init=False)
    engine: wb.Engine = field(init=False)

    def __post_init__(self) -> None:
        self.chance = random.Random(f"bitrot {self.seed}")
        if self.before is not None:
            self.rows = self.before.rows.copy()
            self.events = self.before.events.copy()
            self.contents = {name: known.copy() for name, known in self.before.contents.items()}

    def first_life(self) -> Machine:
        """Settled segments that are trimmed, others that a held operation pins, and a frame at the end that nothing proves."""
        machine = Machine()
        left: list[Machine] = []

        def live(process: Process) -> None:
            self._open(process, held=False)
            for _ in range(10):
                self._submit(process, "put", 3, 700)
            _rest(process)
            self.engine.flush(timeout=60)
            _rest(process)
            self._submit(process, "kept", 1, 100)
            for _ in range(3):
                self._some(process)
            self.engine.flush("put", timeout=60)
            self.engine.flush("soon", timeout=60)
            _rest(process)
            self.engine.pause("put")
            for _ in range(4):
                self._some(process)
            self._submit(process, "put", 1, 700)
            left.append(machine.clone())
            self.engine.close(drain=False)

        self._run(machine, "1", live)
        return left[0]

    def second_life(self, machine: Machine, life: str) -> tuple[Store, Store, Store]:
        """What was left is held, and much is added."""
        found: list[Store] = []

        def live(process: Process) -> None:
            self._open(process, held=True)
            while sum(map(len, self._files(machine).values())) < STORE_BYTES + SPARE_BYTES:
                self._some(process)
            _rest(process)
            self._submit(process, "put", 2, 300)
            self._submit(process, "put", 1, 500)
            killed = self._store("killed", machine)
            trimmed = max(name for name in self.contents if name < min(killed.headers))
            came_back = {trimmed: next(reversed(self.contents[trimmed]))}
            found.append(self._store("killed", machine, more=came_back))
            process.threads.event().wait(int(1.5 * QUIET_MS * 1e6))
            found.append(self._store("stamped", machine))
            self.engine.close(drain=False)
            found.append(self._store("closed", machine))

        self._run(machine, life, live)
        killed, stamped, closed = found
        assert sum(len(closed.files[name]) for name in closed.segments) >= STORE_BYTES
        return killed, stamped, closed

    def _run(self, machine: Machine, life: str, live: Callable[[Process], None]) -> None:
        process = Process(machine, self.events, seed=self.seed, life=life)
        process.run(lambda: live(process))

    def _open(self, process: Process, *, held: bool) -> None:
        lanes = {
            "put": wb.Lane(None if held else process.backend("put"), shards=2, trigger=PROMPT),
            "kept": wb.Lane(None),
            "soon": wb.Lane(
                None if held else process.backend("soon"),
                trigger=PROMPT,
                durability="interval",
                interval_ms=1,
            ),
        }
        environment = Environment(
            fs=process.fs, clock=process.clock, threads=process.threads, entropy=process.entropy,
            open_state=process.open_state,
        )  # fmt: skip
        self.engine = wb.Engine.open(ROOT, lanes, settings=SETTINGS, environment=environment)

    def _some(self, process: Process) -> None:
        """A few commit groups of every kind."""
        chance = self.chance
        self._submit(process, "put", chance.randrange(1, 6), chance.randrange(400))
        self._submit(process, "kept", 1, chance.randrange(4000))
        self._submit(process, "put", 1, chance.choice((0, 1, 1200, 2400)), priority=9)
        self._submit(process, "soon", 3, chance.randrange(600))
        self._submit(process, "kept", chance.randrange(20, 40), 20)

    def _submit(self, process: Process, lane: str, count: int, size: int, *, priority: int = 5) -> None:
        """One commit group, synced; every second one of noise that does not compress."""
        pairs: list[tuple[bytes, bytes]] = []
        for _ in range(count):
            text = b"%s %d: " % (lane.encode(), len(self.rows) + len(pairs))
            body = self.chance.randbytes(size) if len(self.rows) % 2 else text * (size // len(text) + 1)
            pairs.append((b"key %d" % self.chance.randrange(5), (text + body)[: max(size, len(text))]))
        lsns = self.engine.submit_many(lane, pairs, priority=priority)
        if lane == "soon":
            process.threads.event().wait(5_000_000)
        for lsn, (key, payload) in zip(lsns, pairs, strict=True):
            self.rows[lsn] = (lane, key, payload, priority)
        assert self.engine.stats().durable_lsn == lsns[-1]
        self._files(process.machine)

    def _files(self, machine: Machine) -> dict[str, bytes]:
        """The files as they are now; remembers what they were."""
        store = machine.fs.root.view[ROOT.strip("/")]
        assert isinstance(store, Directory)
        files = {"identity": _bytes_of(store, "identity")}
        wal = store.view["wal"]
        assert isinstance(wal, Directory)
        for name in sorted(wal.view):
            if name.endswith(".seg"):
                files[f"wal/{name}"] = data = _bytes_of(wal, name)
                known = self.contents.setdefault(f"wal/{name}", {})
                known.pop(data, None)
                known[data] = None
        return files

    def _store(self, name: str, machine: Machine, *, more: Files | None = None) -> Store:
        """The store as it is now on disk."""
        files = self._files(machine) | dict(more or {})
        (disk,) = machine.states.values()
        headers = {}
        frames: list[Placed] = []
        for segment in sorted(files):
            if segment.startswith("wal/"):
                _, header = decode_segment_header(files[segment][:SECTOR])
                assert header is not None
                headers[segment] = header
                frames += frames_of(segment, files[segment], header)
        applied = {event.lsn for event in self.events if isinstance(event, AppliedTo)}
        return Store(
            name=name, files=files, checkpoint=newest_checkpoint(disk.commits), rows=self.rows.copy(),
            unsettled=frozenset(self.rows.keys() - applied), frames=tuple(frames), headers=headers,
            older={
                segment: tuple(content for content in self.contents.get(segment, ()) if content != files[segment])
                for segment in headers
            },
        )  # fmt: skip


def _rest(process: Process) -> None:
    """Let what was applied be checkpointed, and trimmed."""
    process.threads.event().wait(int(TICK_S * 1e9))


def _bytes_of(directory: Directory, name: str) -> bytes:
    inode = directory.view[name]
    assert isinstance(inode, Inode)
    return inode.read(inode.size, 0)


def frames_of(name: str, data: bytes, header: SegmentHeader) -> Iterator[Placed]:
    """The valid frames of a segment."""
    found: list[Placed] = []
    scan_segment(
        lambda size, offset: data[offset : offset + size], header=header, file_bytes=len(data),
        visit=lambda offset, frame, _: found.append(Placed(name=name, offset=offset, header=frame)),
    )  # fmt: skip
    yield from found
