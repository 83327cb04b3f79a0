"""What becomes of a store whose bytes were changed: damage is refused or costs nothing, and never tells a lie.

The model, computed here from the undamaged bytes and not with the scanner's search for evidence: a *witness* of an LSN
is a header (of a frame or a segment) that was not touched and says that the LSN was durable, or the checkpoint. Then:

- what is delivered is byte for byte what was submitted under that LSN;
- an unsettled operation that has a witness is delivered, or the store is refused with a typed error;
- an unsettled operation without a witness stands at the unclean end of the log. It may be given up from the first
  touched frame on, as a torn tail that is reported (W9). Only where nothing but zeros is left of it, or the file ends
  there or is gone, there is nothing that could be reported;
- damage that touches no frame and no header costs nothing and refuses nothing.
"""

from __future__ import annotations

import os
import shutil
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import walbatch as wb
from tests.memory import MemoryFileSystem, environment
from tests.stores import checkpoint_of, note_dropped, picture
from tests.support import FAST, Recorder, wait_until
from walbatch import limits
from walbatch.core.checksum import crc32c
from walbatch.core.frame import FrameHeader, FrameType, SegmentHeader, decode_segment_header
from walbatch.core.recovery import make_plan
from walbatch.core.scanner import scan_segment
from walbatch.errors import CorruptionError, WalbatchError
from walbatch.inspection import look, remembered_lanes
from walbatch.runtime.clock import RealClock, RealEntropy, RealThreads
from walbatch.storage.layout import Layout, read_identity
from walbatch.storage.log import Log, LogSettings
from walbatch.storage.store import refusal_error
from walbatch.storage.survey import survey
from walbatch.types import Checkpoint, LaneMark, LaneMemory, Mark, Position

ROOT = "/q"
SECTOR = limits.SECTOR_BYTES
NEVER_MS = 3_600_000
SETTINGS = wb.Settings(
    segment_bytes=4096, disk_bytes_max=2**30, timer_ms=1, compress_bytes_min=512, idle_stamp_ms=NEVER_MS,
    checkpoint_ms=NEVER_MS,
)  # fmt: skip
LOG_SETTINGS = LogSettings(segment_bytes=4096, compress_bytes_min=512, compress_level=1)

Files = Mapping[str, bytes]
Row = tuple[str, bytes, bytes, int]
"""Kind, key, payload, priority."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A frame of the undamaged store."""

    name: str
    offset: int
    header: FrameHeader

    @property
    def end(self) -> int:
        return self.offset + self.header.total_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """A store at rest, and the truth about it."""

    files: Files
    checkpoint: Checkpoint
    lanes: Mapping[str, LaneMemory]
    rows: Mapping[int, Row]
    unsettled: frozenset[int]
    frames: tuple[Placed, ...]
    headers: Mapping[str, SegmentHeader]

    @property
    def segments(self) -> list[str]:
        return sorted(self.headers)


# --- making it -------------------------------------------------------------------------------------------------------


class Maker:
    """Makes a store with an engine in memory, and keeps what it was told."""

    def __init__(self, fs: MemoryFileSystem | None = None, seed: int = 0) -> None:
        self.fs = fs or MemoryFileSystem()
        self.rows: dict[int, Row] = {}
        self.applied: set[int] = set()
        self._seed = seed

    def open(self, *, held: bool) -> wb.Engine:
        recorder = self.recorder = Recorder()
        backend = None if held else recorder
        lanes = {
            "put": wb.Lane(backend, trigger=FAST, shards=2),
            "kept": wb.Lane(None),
            "soon": wb.Lane(backend, trigger=FAST, durability="interval", interval_ms=1),
        }
        self.engine = wb.Engine.open(ROOT, lanes=lanes, settings=SETTINGS, environment=environment(self.fs))
        return self.engine

    def submit(self, lane: str, count: int, size: int, *, raw: bool = False, priority: int = 5) -> None:
        """A group of `count` operations of `size` bytes."""
        pairs = []
        for _ in range(count):
            self._seed += 1
            unit = b"%d of %s " % (self._seed, lane.encode())
            payload = (self._noise(size) if raw else unit * size)[:size]
            pairs.append((b"key %d" % (self._seed % 5), payload))
        before = self.engine.stats().durable_lsn
        lsns = self.engine.submit_many(lane, pairs, priority=priority)
        for lsn, (key, payload) in zip(lsns, pairs, strict=True):
            self.rows[lsn] = (lane, key, payload, priority)
        assert lane == "soon" or self.engine.stats().durable_lsn == lsns[-1] > before
        wait_until(lambda: self.engine.stats().durable_lsn == lsns[-1], what="the group is synced")

    def _noise(self, size: int) -> bytes:
        """Bytes that do not compress, the same ones in every run."""
        words = [crc32c(b"%d %d" % (self._seed, at), 0) for at in range(size // 4 + 1)]
        return struct.pack(f"<{len(words)}I", *words)

    def checkpoint(self) -> None:
        """Settle what can be, and checkpoint it."""
        self.engine.flush(timeout=30)
        self.applied |= {lsn for lsn, _, _ in self.recorder.applied if lsn is not None}
        self.engine._assembly.checkpointer.checkpoint()

    def store(self) -> Store:
        """The store as it is now on disk."""
        files = {
            path.removeprefix(f"{ROOT}/"): bytes(content.data) for path, content in self.fs.files.items() if path != f"{ROOT}/lock"
        }  # fmt: skip
        checkpoint = max(self.fs.checkpoints.values(), key=lambda c: c.generation)
        headers: dict[str, SegmentHeader] = {}
        frames: list[Placed] = []
        for name in sorted(files):
            if name.endswith(".seg"):
                data = files[name]
                _, header = decode_segment_header(data[:SECTOR])
                assert header is not None
                headers[name] = header
                frames += frames_of(name, data, header)
        return Store(
            files=files, checkpoint=checkpoint, lanes=dict(self.fs.lanes), rows=dict(self.rows),
            unsettled=frozenset(self.rows.keys() - self.applied), frames=tuple(frames), headers=headers,
        )  # fmt: skip


def frames_of(name: str, data: bytes, header: SegmentHeader) -> list[Placed]:
    found: list[Placed] = []
    scan_segment(
        lambda size, offset: data[offset : offset + size], header=header, file_bytes=len(data),
        visit=lambda offset, frame, _: found.append(Placed(name=name, offset=offset, header=frame)),
    )  # fmt: skip
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Stores:
    """The same history, ended in three ways; and another store of the same shape."""

    killed: Store
    """In the middle of everything: the last frame has no witness."""
    stamped: Store
    """Killed after the log had gone quiet."""
    clean: Store
    other: Store

    def get(self, name: str) -> Store:
        store: Store = getattr(self, name)
        return store


def make_stores(seed: int = 0) -> tuple[Store, Store, Store]:
    """Two lives of a store: the first is killed with a frame that nothing proves."""
    maker = Maker(seed=seed)
    engine = maker.open(held=False)
    maker.submit("kept", 2, 30)
    maker.submit("put", 3, 300, priority=9)
    maker.submit("put", 1, 1200, raw=True)
    maker.submit("soon", 2, 200, raw=True)
    maker.submit("put", 4, 500)
    maker.submit("kept", 1, 900, raw=True)
    maker.submit("put", 2, 100)
    maker.checkpoint()
    engine.pause("put")
    maker.submit("put", 2, 700, raw=True)
    maker.submit("put", 1, 0)
    maker.submit("kept", 40, 60)
    maker.submit("put", 1, 100)
    life = Maker(copy_of(maker.fs), seed=seed + 1000)
    life.rows, life.applied = maker.rows, maker.applied
    maker.fs.fail = None
    engine.close(drain=False)

    engine = life.open(held=True)
    assert engine.recovery[-1].label == "W11"
    life.submit("put", 3, 400)
    life.submit("soon", 1, 1000, raw=True)
    life.submit("kept", 2, 1000, raw=True)
    life.submit("put", 5, 80)
    life.submit("put", 2, 120, raw=True)
    life.submit("soon", 2, 90)
    life.submit("kept", 1, 700, raw=True)
    life.submit("put", 3, 90, raw=True)
    killed = life.store()
    engine._assembly.log.stamp(next_lsn=engine.stats().durable_lsn + 1, clean=False)
    stamped = life.store()
    engine.close(drain=False)
    return killed, stamped, life.store()


def copy_of(fs: MemoryFileSystem) -> MemoryFileSystem:
    files = {
        path.removeprefix(f"{ROOT}/"): bytes(content.data) for path, content in fs.files.items() if path != f"{ROOT}/lock"
    }  # fmt: skip
    return in_memory(files, checkpoints=fs.checkpoints, lanes=fs.lanes)


def in_memory(
    files: Files, *, checkpoints: Mapping[int, Checkpoint], lanes: Mapping[str, LaneMemory]
) -> MemoryFileSystem:
    fs = MemoryFileSystem.of(ROOT, files)
    fs.checkpoints, fs.lanes = dict(checkpoints), dict(lanes)
    return fs


@pytest.fixture(scope="module")
def stores() -> Stores:
    killed, stamped, clean = make_stores()
    return Stores(killed=killed, stamped=stamped, clean=clean, other=make_stores(seed=5000)[2])


# --- opening what is left of it --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What came of it: an error, or what is delivered."""

    error: WalbatchError | None
    labels: frozenset[str] = frozenset()
    rows: Mapping[int, Row]


def open_log(files: Files, checkpoint: Checkpoint | None) -> Opened:
    """Open the log as an engine does and read everything back that it would deliver."""
    fs = MemoryFileSystem.of(ROOT, files)
    layout = Layout(ROOT)
    identity, uuid = read_identity(fs, layout)
    facts = survey(fs, layout, identity=identity, store=uuid, checkpoint=checkpoint)
    plan = make_plan(facts)
    error = refusal_error(plan, layout)
    if error is not None:
        assert {path: bytes(content.data) for path, content in fs.files.items()} == {
            f"{ROOT}/{name}": data for name, data in files.items()
        }, "a refusal changes nothing"
        return Opened(error=error, rows={})
    log = Log.open(
        fs, layout, RealClock(), RealEntropy(), RealThreads(), LOG_SETTINGS, facts=facts, plan=plan
    )
    rows: dict[int, Row] = {}
    position = Position(plan.first_segment, SECTOR)
    next_lsn = 0
    try:
        while (frame := log.read_frame(position, next_lsn=next_lsn)) is not None:
            kinds = [frame.kinds[index] for index in frame.kind_indexes]
            rows.update(
                zip(
                    frame.lsns,
                    zip(kinds, frame.keys, frame.payloads, frame.priorities, strict=True),
                    strict=True,
                )
            )
            position, next_lsn = frame.next_position, frame.last_lsn + 1
    except wb.CorruptionError as error:
        return Opened(error=error, rows=rows)
    finally:
        log.close(next_lsn=None)
    return Opened(error=None, labels=frozenset(case.label for case in plan.cases), rows=rows)


def check(
    store: Store, files: Files, *, checkpoint: Checkpoint | None, opened: Opened | None = None
) -> Opened:
    """Hold what opening `files` gives against the model."""
    opened = opened or open_log(files, checkpoint)
    for lsn, row in opened.rows.items():
        assert store.rows.get(lsn) == row, f"lsn {lsn} is not what was submitted"
    touched = [frame for frame in store.frames if not is_intact(store, files, frame)]
    intact_headers = [
        header for name, header in store.headers.items()
        if name in files and files[name][:SECTOR] == store.files[name][:SECTOR]
    ]  # fmt: skip
    if opened.error is not None:
        check_refusal(store, opened.error)
        whole = (
            not touched and len(intact_headers) == len(store.headers) and files.keys() == store.files.keys()
        )
        assert not whole or files["identity"] != store.files["identity"], "nothing that counts was touched"
        return opened
    witnessed = max(
        [checkpoint.durable_lsn if checkpoint else 0]
        + [header.prev_last_lsn for header in intact_headers]
        + [frame.header.synced_lsn for frame in store.frames if has_header(store, files, frame)]
    )
    missing = store.unsettled - opened.rows.keys()
    if missing:
        assert min(missing) > witnessed, f"{sorted(missing)} are lost, but {witnessed} was proven durable"
        lost = [frame for frame in touched if frame.header.first_lsn <= min(missing) <= frame.header.last_lsn]
        assert lost, "an intact frame was given up before the first that was touched"
        left = files.get(lost[-1].name, b"")[lost[-1].offset :]
        assert "W9" in opened.labels or not left.strip(b"\0"), "a loss that nobody reports"
    return opened


def is_intact(store: Store, files: Files, frame: Placed) -> bool:
    place = slice(frame.offset, frame.end)
    return files.get(frame.name, b"")[place] == store.files[frame.name][place]


def has_header(store: Store, files: Files, frame: Placed) -> bool:
    """Whether the header of a frame can be read in its place, under an untouched segment header."""
    data, before = files.get(frame.name, b""), store.files[frame.name]
    place = slice(frame.offset, frame.offset + limits.FRAME_HEADER_BYTES)
    return data[:SECTOR] == before[:SECTOR] and data[place] == before[place]


def check_refusal(store: Store, error: WalbatchError) -> None:
    if isinstance(error, wb.CorruptionError):
        assert error.path.startswith(ROOT)
        assert error.offset % SECTOR == 0
        assert error.expected
        if error.first_lsn is not None and error.last_lsn is not None:
            assert 0 < error.first_lsn <= error.last_lsn + 1
    else:
        assert isinstance(error, wb.UnsupportedFormat)


def changed(files: Files, name: str, offset: int, data: bytes) -> Files:
    """The files with `data` written over those of one of them."""
    before = files[name]
    return {**files, name: before[:offset] + data + before[offset + len(data) :]}


# --- every byte ------------------------------------------------------------------------------------------------------


def test_the_store_under_test_has_what_can_be_damaged(stores: Stores) -> None:
    store = stores.killed
    kinds = {frame.header.type for frame in store.frames}
    assert kinds == {FrameType.OPERATIONS, FrameType.STAMP, FrameType.SEAL, FrameType.VOID}
    assert {frame.header.codec for frame in store.frames if frame.header.count} == {0, 1}
    assert len(store.segments) >= 5
    assert len({header.epoch for header in store.headers.values()}) == 2
    assert 0 < len(store.unsettled) < len(store.rows)
    for name in ("killed", "stamped", "clean", "other"):
        whole = stores.get(name)
        opened = check(whole, whole.files, checkpoint=whole.checkpoint)
        assert opened.error is None
        assert opened.rows.keys() >= whole.unsettled


def flips(store: Store, names: list[str], *, step: int, mask: int) -> Iterator[tuple[str, int, Files]]:
    """Every `step`th byte of these segments, one after the other: one bit of it flipped, or those of `mask`."""
    for name in names:
        for at in range(0, len(store.files[name]), step):
            byte = store.files[name][at] ^ (mask or 1 << (at * 5 % 8))
            yield name, at, changed(store.files, name, at, bytes((byte,)))


def unsealed(store: Store) -> str:
    """The segment that a crash has left behind, in the middle of the log."""
    sealed = {frame.name for frame in store.frames if frame.header.type is FrameType.SEAL}
    (name,) = [name for name in store.segments[:-1] if name not in sealed]
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Which bytes of which segments are flipped, one after the other."""

    ending: str
    segments: Callable[[Store], list[str]]
    step: int = 1
    mask: int = 0


SWEEPS = {
    "every bit of a sealed, a crashed and the last segment": Sweep(
        ending="killed", segments=lambda s: [s.segments[0], unsealed(s), s.segments[-1]]
    ),
    "a third of the bits of all segments": Sweep(ending="killed", segments=lambda s: s.segments, step=3),
    "a part of the bytes of all segments": Sweep(
        ending="killed", segments=lambda s: s.segments, step=7, mask=0xFF
    ),
    "the end, stamped": Sweep(ending="stamped", segments=lambda s: s.segments[-1:]),
    "the end, closed": Sweep(ending="clean", segments=lambda s: s.segments[-1:]),
    "the end, closed, whole bytes": Sweep(
        ending="clean", segments=lambda s: s.segments[-1:], step=3, mask=0xFF
    ),
}


@pytest.mark.parametrize("sweep", SWEEPS.values(), ids=SWEEPS.keys())
def test_a_flip_in_any_byte_of_any_segment_is_found_or_harmless(stores: Stores, sweep: Sweep) -> None:
    ending = sweep.ending
    store = stores.get(ending)
    refused = given_up = harmless = 0
    for _, _, files in flips(store, sweep.segments(store), step=sweep.step, mask=sweep.mask):
        opened = check(store, files, checkpoint=store.checkpoint)
        if opened.error is not None:
            refused += 1
        elif store.unsettled - opened.rows.keys():
            given_up += 1
        else:
            harmless += 1
    print(f"{ending}: {refused:,} refused, {given_up:,} given up as torn, {harmless:,} harmless, 0 silent")
    assert (given_up > 0) == (ending == "killed"), "only an operation without a witness may be given up"


@pytest.mark.parametrize("ending", ["killed", "clean"])
def test_without_a_checkpoint_a_flip_is_found_just_as_well(stores: Stores, ending: str) -> None:
    store = stores.get(ending)
    for _, _, files in flips(store, store.segments, step=29, mask=0xFF):
        check(store, files, checkpoint=None)


@pytest.mark.parametrize("ending", ["killed", "clean"])
def test_a_flip_is_found_by_the_engine_as_by_its_parts(stores: Stores, ending: str) -> None:
    store = stores.get(ending)
    for _, _, files in flips(store, store.segments, step=173, mask=0):
        check_engine(store, files, store.checkpoint)


def check_engine(store: Store, files: Files, checkpoint: Checkpoint) -> Opened:
    """As `check`, with everything delivered by an engine."""
    fs = in_memory(files, checkpoints={0: checkpoint}, lanes=store.lanes)
    recorder = Recorder()
    lanes = {
        name: wb.Lane(recorder, trigger=FAST, shards=memory.shards) for name, memory in store.lanes.items()
    }
    error: WalbatchError | None = None
    labels: frozenset[str] = frozenset()
    try:
        engine = wb.Engine.open(ROOT, lanes=lanes, settings=SETTINGS, environment=environment(fs))
    except WalbatchError as refusal:
        error = refusal
    else:
        labels = frozenset(case.label for case in engine.recovery)
        try:
            engine.flush(timeout=30)
        except WalbatchError as refusal:
            error = refusal
        report = engine.close(timeout=30)
        assert (error is None) == (report.reason == "drained")
    assert fs.open_files == 0
    assert not fs.locks
    rows: dict[int, Row] = {}
    for batch in recorder.batches:
        for operation in batch:
            assert operation.lsn is not None
            assert operation.lsn not in rows, "it is delivered once"
            rows[operation.lsn] = (batch.lane, operation.key, operation.payload, operation.priority)
    return check(store, files, checkpoint=checkpoint, opened=Opened(error=error, labels=labels, rows=rows))


# --- pieces cut off, zeroed, moved -----------------------------------------------------------------------------------

Damage = Callable[[Store, Stores], Iterator[Files]]
"""Every way in which one kind of damage is done to a store."""


def sectors_of(store: Store) -> Iterator[tuple[str, int]]:
    for name in store.segments:
        for offset in range(0, len(store.files[name]), SECTOR):
            yield name, offset


def cut_at_every_sector_and_beside(store: Store, stores: Stores) -> Iterator[Files]:
    for name, offset in sectors_of(store):
        for beside in (0, 1, 63, 64, 65, 511):
            yield {**store.files, name: store.files[name][: offset + beside]}


def grown_by_zeros_and_by_garbage(store: Store, stores: Stores) -> Iterator[Files]:
    for name in store.segments:
        for tail in (b"\0", bytes(4096), b"\xff" * 4096, b"\x8eWBF" * 256, store.files[name]):
            yield {**store.files, name: store.files[name] + tail}


def every_sector_zeroed(store: Store, stores: Stores) -> Iterator[Files]:
    for name, offset in sectors_of(store):
        yield changed(store.files, name, offset, bytes(len(store.files[name][offset : offset + SECTOR])))


def every_tail_zeroed(store: Store, stores: Stores) -> Iterator[Files]:
    for name, offset in sectors_of(store):
        yield changed(store.files, name, offset, bytes(len(store.files[name]) - offset))


def every_sector_garbage(store: Store, stores: Stores) -> Iterator[Files]:
    for name, offset in sectors_of(store):
        for unit in (b"\xff", b"\x8eWBF", b"\x89WBSEG\r\n"):
            yield changed(store.files, name, offset, (unit * SECTOR)[:SECTOR])


def sectors_swapped(store: Store, stores: Stores) -> Iterator[Files]:
    places = list(sectors_of(store))
    for index, (name, offset) in enumerate(places):
        # All in the neighbourhood, and some far away in other segments.
        for other, at in [*places[index + 1 : index + 8], *places[index + 8 :: 11]]:
            piece = store.files[name][offset : offset + SECTOR]
            swapped = store.files[other][at : at + SECTOR]
            if len(piece) == len(swapped):
                yield changed(changed(store.files, name, offset, swapped), other, at, piece)


def frames_spliced_from_elsewhere(store: Store, stores: Stores) -> Iterator[Files]:
    """Every third frame of the store, of its earlier life, and of another store, over every sector behind a header."""
    pieces = [store.files[frame.name][frame.offset : frame.end] for frame in store.frames[::3]]
    pieces += [
        stores.other.files[frame.name][frame.offset : frame.end]
        for frame in stores.other.frames[::3]
        if frame.name in store.files
    ]
    for piece in pieces:
        for name, offset in sectors_of(store):
            if offset:
                yield changed(store.files, name, offset, piece)


def segments_missing(store: Store, stores: Stores) -> Iterator[Files]:
    names = store.segments
    for first in range(len(names)):
        for last in range(first, len(names)):
            gone = set(names[first : last + 1])
            if len(gone) < len(names):
                yield {name: data for name, data in store.files.items() if name not in gone}


def segments_of_another_store(store: Store, stores: Stores) -> Iterator[Files]:
    for name in store.segments:
        if name in stores.other.files:
            yield {**store.files, name: stores.other.files[name]}


def segments_under_another_number(store: Store, stores: Stores) -> Iterator[Files]:
    names = store.segments
    for name in names:
        for other in names:
            if name != other:
                yield {**store.files, other: store.files[name]}
        yield {**store.files, f"wal/{999:019d}.seg": store.files[name]}


def segments_that_come_back_as_they_were(store: Store, stores: Stores) -> Iterator[Files]:
    """The last segment as it was at some earlier moment: each of its frames may have been the last."""
    name = store.segments[-1]
    for frame in store.frames:
        if frame.name == name:
            data = store.files[name]
            yield {**store.files, name: data[: frame.offset] + bytes(len(data) - frame.offset)}


DAMAGES: list[Damage] = [
    cut_at_every_sector_and_beside,
    grown_by_zeros_and_by_garbage,
    every_sector_zeroed,
    every_tail_zeroed,
    every_sector_garbage,
    sectors_swapped,
    frames_spliced_from_elsewhere,
    segments_missing,
    segments_of_another_store,
    segments_under_another_number,
    segments_that_come_back_as_they_were,
]


@pytest.mark.parametrize("ending", ["killed", "stamped", "clean"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_refused_or_costs_nothing_that_was_proven(
    stores: Stores, damage: Damage, ending: str
) -> None:
    store = stores.get(ending)
    outcomes = [
        check(store, files, checkpoint=store.checkpoint).error is not None for files in damage(store, stores)
    ]
    assert outcomes
    print(f"{damage.__name__}, {ending}: {len(outcomes):,} times, {sum(outcomes):,} refused, 0 silent")


def test_recovery_of_a_damaged_store_can_be_repeated(stores: Stores) -> None:
    store = stores.killed
    last = store.frames[-1]
    assert last.header.synced_lsn < last.header.first_lsn
    files = changed(store.files, last.name, last.offset + 70, b"rot")
    fs = in_memory(files, checkpoints={0: store.checkpoint}, lanes=store.lanes)
    quarantined: list[dict[str, bytes]] = []
    for _ in range(3):
        fs = fs.after_power_cut()
        engine = wb.Engine.open(
            ROOT, lanes={"put": wb.Lane(None, shards=2)}, settings=SETTINGS, environment=environment(fs)
        )
        quarantined.append(
            {path: bytes(file.data) for path, file in fs.files.items() if "quarantine" in path}
        )
        fs = fs.after_power_cut()
        engine.close(drain=False)
    assert quarantined[0] == quarantined[1] == quarantined[2]
    number = store.headers[last.name].number
    prefix = f"{ROOT}/quarantine/{number:019d}-{last.offset}."
    suspect = [data for path, data in sorted(quarantined[0].items()) if path.startswith(prefix)]
    assert len(suspect) == 2
    assert suspect[0] == files[last.name][last.offset :].rstrip(b"\0")
    assert f"offset {last.offset}".encode() in suspect[1]
    left = {path.removeprefix(f"{ROOT}/"): bytes(file.data) for path, file in fs.files.items()}
    rows = open_log(left, store.checkpoint).rows
    assert store.unsettled - rows.keys() == set(range(last.header.first_lsn, last.header.last_lsn + 1))


# --- names -----------------------------------------------------------------------------------------------------------


def resealed(data: bytes) -> bytes:
    """Bytes under a sum in their last four."""
    return data[:-4] + struct.pack("<I", crc32c(data[:-4], 0))


def newer(data: bytes) -> bytes:
    """A valid header or identity of a later version."""
    return resealed(data[:8] + struct.pack("<I", 99) + data[12:])


def first_segment_of(store: Store, change: Callable[[bytes], bytes]) -> Files:
    name = store.segments[0]
    return {**store.files, name: change(store.files[name][:SECTOR]) + store.files[name][SECTOR:]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """Damage to a whole file, and what opening must answer (None: everything is delivered)."""

    name: str
    files: Callable[[Store, Stores], Files]
    error: type[WalbatchError] | None
    says: str = ""


def without(files: Files, *names: str) -> Files:
    return {name: data for name, data in files.items() if name not in names}


SITUATIONS = [
    Situation(name="nothing", files=lambda s, _: s.files, error=None),
    Situation(name="identity missing", files=lambda s, _: without(s.files, "identity"), error=wb.CorruptionError, says="identity"),
    Situation(name="identity empty", files=lambda s, _: {**s.files, "identity": b""}, error=wb.CorruptionError, says="S2"),
    Situation(
        name="identity cut short", files=lambda s, _: {**s.files, "identity": s.files["identity"][:63]},
        error=wb.CorruptionError, says="S2",
    ),
    Situation(
        name="identity with more behind it", files=lambda s, _: {**s.files, "identity": s.files["identity"] + b"\0"},
        error=wb.CorruptionError, says="S2",
    ),
    Situation(
        name="identity newer", files=lambda s, _: {**s.files, "identity": newer(s.files["identity"])},
        error=wb.UnsupportedFormat, says="S3",
    ),
    Situation(
        name="identity of another version without its sum",
        files=lambda s, _: changed(s.files, "identity", 8, b"\x02"), error=wb.CorruptionError, says="S2",
    ),
    Situation(
        name="identity of another store", files=lambda s, all_: {**s.files, "identity": all_.other.files["identity"]},
        error=wb.CorruptionError, says="W3",
    ),
    Situation(
        name="segment newer", files=lambda s, _: first_segment_of(s, newer), error=wb.UnsupportedFormat, says="W2"
    ),
    Situation(
        name="segment of another version without its sum",
        files=lambda s, _: first_segment_of(s, lambda sector: sector[:8] + b"\x02" + sector[9:]),
        error=wb.CorruptionError, says="W3",
    ),
    Situation(
        name="segment empty", files=lambda s, _: {**s.files, s.segments[0]: b""}, error=wb.CorruptionError, says="short"
    ),
    Situation(
        name="wal empty", files=lambda s, _: without(s.files, *s.segments), error=wb.CorruptionError, says="S4"
    ),
    Situation(
        name="first segment missing", files=lambda s, _: without(s.files, s.segments[0]), error=wb.CorruptionError, says="W4"
    ),
    Situation(
        name="middle segment missing", files=lambda s, _: without(s.files, s.segments[2]), error=wb.CorruptionError, says="W4"
    ),
    Situation(
        name="last segment missing", files=lambda s, _: without(s.files, s.segments[-1]), error=wb.CorruptionError, says="W8"
    ),
    Situation(
        name="left-over temporary files",
        files=lambda s, _: {
            **s.files, f"wal/{999:019d}.seg.tmp": s.files[s.segments[0]], "wal/x.tmp": b"", "identity.tmp": b"half",
            "quarantine/x.bytes.tmp": b"",
        },
        error=None,
    ),
    Situation(
        name="foreign files",
        files=lambda s, _: {
            **s.files, "wal/readme.txt": b"", "wal/1.seg": s.files[s.segments[0]], "wal/core": b"x" * 9999,
            "wal/00000000000000000001.seg": b"twenty digits", "notes": b"",
        },
        error=None,
    ),
    Situation(
        name="a file with a segment's name",
        files=lambda s, _: {**s.files, f"wal/{2**63 - 1:019d}.seg": b"hello"}, error=wb.CorruptionError, says="W3",
    ),
    Situation(
        name="a name with digits of another script",
        files=lambda s, _: {**s.files, "wal/" + "\u0661" * 19 + ".seg": b"hello"}, error=None,
    ),
]  # fmt: skip


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.name)
def test_a_damaged_file_is_answered_with_what_it_is(stores: Stores, situation: Situation) -> None:
    store = stores.clean
    files = situation.files(store, stores)
    fs = in_memory(files, checkpoints={0: store.checkpoint}, lanes=store.lanes)
    recorder = Recorder()
    lanes = {
        name: wb.Lane(recorder, trigger=FAST, shards=memory.shards) for name, memory in store.lanes.items()
    }
    if situation.error is not None:
        with pytest.raises(situation.error, match=situation.says):
            wb.Engine.open(ROOT, lanes=lanes, settings=SETTINGS, environment=environment(fs))
        assert {
            path.removeprefix(f"{ROOT}/"): bytes(file.data)
            for path, file in fs.files.items()
            if path != f"{ROOT}/lock"
        } == files, "a refusal changes nothing"
    else:
        with wb.Engine.open(ROOT, lanes=lanes, settings=SETTINGS, environment=environment(fs)) as engine:
            engine.flush(timeout=30)
        assert set(recorder.lsns) == store.unsettled
        assert not [path for path in fs.files if path.startswith(f"{ROOT}/wal/") and path.endswith(".tmp")]
    assert not fs.locks
    assert fs.open_files == 0


def test_every_byte_of_the_identity_counts_but_never_lies(stores: Stores) -> None:
    store = stores.clean
    for at in range(len(store.files["identity"])):
        for mask in (1, 0x80, 0xFF):
            byte = store.files["identity"][at] ^ mask
            opened = open_log(changed(store.files, "identity", at, bytes((byte,))), store.checkpoint)
            assert isinstance(opened.error, wb.CorruptionError)


# --- state/ ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class OnDisk:
    """A store on the real file system with pending operations and trimmed segments."""

    root: Path
    old_state: Path
    """state/ as it was before segments were trimmed."""
    other: Path
    """Another store."""
    payloads: Mapping[int, bytes]
    pending: frozenset[int]


STATE_SETTINGS = wb.Settings(
    segment_bytes=4096, disk_bytes_max=2**30, timer_ms=1, checkpoint_ms=2, compress_bytes_min=None
)


def open_on_disk(root: Path, recorder: Recorder | None) -> wb.Engine:
    lanes = {"put": wb.Lane(recorder, trigger=FAST, shards=2)}
    return wb.Engine.open(root, lanes=lanes, settings=STATE_SETTINGS)


def make_on_disk(root: Path, old_state: Path) -> tuple[dict[int, bytes], set[int]]:
    """Make a store; returns all payloads by LSN, and which operations are pending."""
    payloads: dict[int, bytes] = {}
    pending: set[int] = set()
    engine = open_on_disk(root, Recorder())
    payloads[engine.submit("put", key=b"k", payload=b"first").lsn or 0] = b"first"
    engine.close()
    shutil.copytree(root / "state", old_state)
    engine = open_on_disk(root, Recorder())
    for _ in range(20):
        batch = [os.urandom(500) for _ in range(3)]
        lsns = engine.submit_many("put", [(b"%d" % at, payload) for at, payload in enumerate(batch)])
        payloads.update(zip(lsns, batch, strict=True))
    engine.flush(timeout=30)
    # Only then do the headers of the segments to come know of all that was trimmed.
    wait_until(lambda: len(list((root / "wal").glob("*.seg"))) == 1, what="all but one segment are trimmed")
    engine.pause("put")
    for _ in range(10):
        payload = os.urandom(600)
        lsn = engine.submit("put", key=b"k", payload=payload).lsn or 0
        payloads[lsn] = payload
        pending.add(lsn)
    engine.close(drain=False)
    return payloads, pending


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> OnDisk:
    base = tmp_path_factory.mktemp("damage")
    make_on_disk(base / "other", base / "unused")
    payloads, pending = make_on_disk(base / "store", base / "old")
    return OnDisk(
        root=base / "store",
        old_state=base / "old",
        other=base / "other",
        payloads=payloads,
        pending=frozenset(pending),
    )


@pytest.fixture
def copied(on_disk: OnDisk, tmp_path: Path) -> OnDisk:
    shutil.copytree(on_disk.root, tmp_path / "q")
    return replace(on_disk, root=tmp_path / "q")


def deliver_all(store: OnDisk) -> tuple[frozenset[str], Recorder]:
    recorder = Recorder()
    engine = open_on_disk(store.root, recorder)
    try:
        engine.flush(timeout=30)
    finally:
        engine.close()
    for lsn, _, payload in recorder.applied:
        assert lsn is not None
        assert store.payloads[lsn] == payload
    assert store.pending <= set(recorder.lsns)
    return frozenset(case.label for case in engine.recovery), recorder


def test_an_intact_store_on_disk_delivers_what_is_pending_and_nothing_else(copied: OnDisk) -> None:
    labels, recorder = deliver_all(copied)
    assert labels == {"W10"}
    assert set(recorder.lsns) == copied.pending


@pytest.mark.parametrize(
    "what", ["removed", "emptied", "of another store", "older than the trimmed segments"]
)
def test_a_wrong_state_costs_delivery_again_and_nothing_else(copied: OnDisk, what: str) -> None:
    state = copied.root / "state"
    shutil.rmtree(state)
    if what == "emptied":
        state.mkdir()
    elif what == "of another store":
        shutil.copytree(copied.other / "state", state)
    elif what == "older than the trimmed segments":
        shutil.copytree(copied.old_state, state)
    labels, _ = deliver_all(copied)
    assert {"removed": "S7", "emptied": "S7", "of another store": "S6"}.get(what, "W10") in labels


# --- state/ is lost, and the log remembers what compactions noted in it -------------------------------------------------


def lose_state(store: OnDisk) -> None:
    shutil.rmtree(store.root / "state")


def test_a_log_put_back_from_an_older_copy_is_refused_by_what_compactions_noted(
    copied: OnDisk, tmp_path: Path
) -> None:
    """Else its LSNs would be handed out again, and what is submitted under them would pass for settled."""
    with open_on_disk(copied.root, Recorder()) as engine:
        engine.flush(timeout=30)
    shutil.copytree(copied.root / "wal", tmp_path / "copy")
    with open_on_disk(copied.root, Recorder()) as engine:
        for _ in range(40):
            engine.submit("put", key=b"k", payload=os.urandom(500))
        engine.flush(timeout=30)
    noted = note_dropped(copied.root)
    for path in (copied.root / "wal").glob("*.seg"):
        path.unlink()
    for path in (tmp_path / "copy").glob("*.seg"):
        shutil.copy(path, copied.root / "wal")
    lose_state(copied)
    predicted = look(copied.root, full=True, lock=True).store.cases
    before = picture(copied.root / "wal")
    recorder = Recorder()
    with pytest.raises(CorruptionError, match="W8") as caught:
        open_on_disk(copied.root, recorder)
    assert caught.value.last_lsn == noted.durable_lsn
    assert [case.label for case in predicted] == ["S7", "W8"]
    assert (recorder.applied, picture(copied.root / "wal")) == ([], before)


def test_a_lost_log_is_not_a_new_store_while_it_stands_what_compactions_noted(copied: OnDisk) -> None:
    note_dropped(copied.root)
    for path in (copied.root / "wal").glob("*.seg"):
        path.unlink()
    lose_state(copied)
    assert "S4" in {case.label for case in look(copied.root).store.cases}
    with pytest.raises(CorruptionError, match="S4"):
        open_on_disk(copied.root, Recorder())


def test_without_state_what_compactions_noted_is_passed_over(copied: OnDisk) -> None:
    note_dropped(copied.root)
    lose_state(copied)
    labels, recorder = deliver_all(copied)
    assert labels == {"S7", "W10"}
    assert set(recorder.lsns) == copied.pending


@pytest.mark.parametrize("shards", [1, 3])
def test_without_state_a_lane_still_cannot_change_its_shards(copied: OnDisk, shards: int) -> None:
    note_dropped(copied.root)
    lose_state(copied)
    before = picture(copied.root / "wal")
    recorder = Recorder()
    with pytest.raises(wb.ConfigError, match=rf"'put' was made with 2 shards and is opened with {shards}"):
        wb.Engine.open(copied.root, lanes={"put": wb.Lane(recorder, shards=shards)}, settings=STATE_SETTINGS)
    assert (recorder.applied, picture(copied.root / "wal")) == ([], before)
    assert remembered_lanes(copied.root)["put"].shards == 2
    deliver_all(copied)


def test_a_lane_that_is_not_named_keeps_the_shards_that_compactions_noted(copied: OnDisk) -> None:
    note_dropped(copied.root)
    lose_state(copied)
    with wb.Engine.open(copied.root, lanes={"other": wb.Lane(None)}, settings=STATE_SETTINGS) as engine:
        assert engine.stats().pending == len(copied.pending)
    assert len(checkpoint_of(copied.root).lanes["put"].shards) == 2
    _, recorder = deliver_all(copied)
    assert set(recorder.lsns) == copied.pending


def test_what_was_noted_of_an_only_shard_is_passed_over_by_each_of_several(copied: OnDisk) -> None:
    """A lane that nobody named while state/ was lost is held with one shard, whatever it had."""
    settled = LaneMark(shards=(Mark(watermark=min(copied.pending) - 1),))
    note_dropped(copied.root, lanes={"put": settled})
    lose_state(copied)
    _, recorder = deliver_all(copied)
    assert set(recorder.lsns) == copied.pending


def test_damage_in_any_page_of_the_state_costs_delivery_again_and_nothing_else(
    on_disk: OnDisk, tmp_path: Path
) -> None:
    size = (on_disk.root / "state/data.mdb").stat().st_size
    used = len((on_disk.root / "state/data.mdb").read_bytes().rstrip(b"\0"))
    reported = 0
    for at in [*range(0, used, max(1, used // 60)), size - 1]:
        root = tmp_path / f"{at}"
        shutil.copytree(on_disk.root, root)
        with (root / "state/data.mdb").open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes((byte ^ 0xFF,)))
        labels, recorder = deliver_all(replace(on_disk, root=root))
        reported += bool(labels & {"S6", "S7"})
        assert set(recorder.lsns) == on_disk.pending or labels & {"S6", "S7"}, (
            "delivered again without a word"
        )
        shutil.rmtree(root)
    assert reported


def test_state_cut_short_costs_delivery_again_and_nothing_else(on_disk: OnDisk, tmp_path: Path) -> None:
    size = (on_disk.root / "state/data.mdb").stat().st_size
    for keep in [0, 1, 100, 4096, 8192, 8193, 12288, 20480, size // 2]:
        root = tmp_path / f"{keep}"
        shutil.copytree(on_disk.root, root)
        os.truncate(root / "state/data.mdb", keep)
        deliver_all(replace(on_disk, root=root))


@pytest.mark.parametrize("what", ["file", "link"])
def test_a_state_that_is_no_directory_is_not_followed(copied: OnDisk, tmp_path: Path, what: str) -> None:
    shutil.rmtree(copied.root / "state")
    (tmp_path / "elsewhere").mkdir()
    if what == "file":
        (copied.root / "state").write_bytes(b"hello")
    else:
        (copied.root / "state").symlink_to(tmp_path / "elsewhere")
    try:
        labels, _ = deliver_all(copied)
    except wb.StorageError:
        pass
    else:
        assert labels & {"S6", "S7"}
    assert not os.listdir(tmp_path / "elsewhere")


def test_a_segment_that_is_a_link_is_not_followed(copied: OnDisk, tmp_path: Path) -> None:
    segment = next((copied.root / "wal").iterdir())
    shutil.move(segment, tmp_path / "moved")
    segment.symlink_to(tmp_path / "moved")
    with pytest.raises(wb.StorageError):
        deliver_all(copied)


# --- while the engine runs -------------------------------------------------------------------------------------------


def test_damage_to_a_backlog_that_appears_after_opening_stops_delivery_loudly() -> None:
    fs = MemoryFileSystem()
    settings = wb.Settings(
        segment_bytes=2**16, memory_bytes_max=2**20, timer_ms=1, checkpoint_ms=1, compress_bytes_min=None
    )
    recorder = Recorder()
    lanes = {"put": wb.Lane(recorder, trigger=FAST)}
    engine = wb.Engine.open(ROOT, lanes=lanes, settings=settings, environment=environment(fs))
    engine.pause("put")
    payloads: dict[int, bytes] = {}
    for _ in range(60):
        batch = [os.urandom(600) for _ in range(50)]
        lsns = engine.submit_many("put", [(b"k", payload) for payload in batch])
        payloads.update(zip(lsns, batch, strict=True))
    ticket = engine.submit("put", key=b"k", payload=b"last")
    payloads[ticket.lsn or 0] = b"last"
    assert engine.stats().lanes["put"].reading_back == 1
    name = f"{ROOT}/wal/{20:019d}.seg"
    assert name in fs.files
    at = 3 * SECTOR + 200
    fs.files[name].data[at] ^= 4
    engine.resume("put")
    with pytest.raises(wb.CorruptionError, match=name) as caught:
        engine.flush(timeout=30)
    assert caught.value.path == name
    assert caught.value.offset <= at
    with pytest.raises(wb.CorruptionError):
        ticket.result(timeout=30)
    with pytest.raises(wb.StorageError, match="stopped"):
        engine.submit("put", key=b"k")
    report = engine.close(timeout=30)
    assert report.reason.startswith("failed")
    assert name in report.reason
    assert fs.open_files == 0
    first = [(lsn, payload) for lsn, _, payload in recorder.applied]
    assert first == list(payloads.items())[: len(first)]
    assert len(first) < len(payloads)

    # Opening trusts the seal footer; the damage is met again when its operations are read, and only then.
    engine = wb.Engine.open(ROOT, lanes=lanes, settings=settings, environment=environment(fs))
    with pytest.raises(wb.CorruptionError, match=name):
        engine.flush(timeout=30)
    engine.close(timeout=30)
    with pytest.raises(wb.CorruptionError, match="W6"):
        wb.Engine.open(ROOT, lanes=lanes, settings=settings, environment=environment(fs), verify=True)

    fs.files[name].data[at] ^= 4
    with wb.Engine.open(
        ROOT, lanes=lanes, settings=settings, environment=environment(fs), verify=True
    ) as engine:
        engine.flush(timeout=30)
    applied = {lsn: payload for lsn, _, payload in recorder.applied}
    assert applied == payloads


@pytest.mark.parametrize("how", ["missing", "cut", "zeroed", "another segment"])
def test_a_backlog_segment_that_goes_away_after_opening_is_reported(how: str) -> None:
    fs = MemoryFileSystem()
    settings = wb.Settings(segment_bytes=2**16, memory_bytes_max=2**20, timer_ms=1, checkpoint_ms=1)
    lanes = {"put": wb.Lane(None)}
    engine = wb.Engine.open(ROOT, lanes=lanes, settings=settings, environment=environment(fs))
    for _ in range(40):
        engine.submit_many("put", [(b"k", os.urandom(600)) for _ in range(50)])
    engine.close()
    gate = threading.Event()
    recorder = Recorder(lambda _: gate.wait(30) and None)
    lanes = {"put": wb.Lane(recorder, trigger=FAST)}
    engine = wb.Engine.open(ROOT, lanes=lanes, settings=settings, environment=environment(fs))
    name = f"{ROOT}/wal/{18:019d}.seg"
    if how == "missing":
        fs.unlink(name)
    elif how == "cut":
        del fs.files[name].data[8192:]
    elif how == "zeroed":
        fs.files[name].data[512:] = bytes(len(fs.files[name].data) - 512)
    else:
        fs.files[name].data[:] = fs.files[f"{ROOT}/wal/{19:019d}.seg"].data
    gate.set()
    with pytest.raises(wb.StorageError, match=name):
        engine.flush(timeout=30)
    assert engine.close(timeout=30).reason.startswith("failed")
    assert recorder.lsns == list(range(1, len(recorder.lsns) + 1))
