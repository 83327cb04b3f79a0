"""Bit rot in state/: bits of a real LMDB file flipped, opened in a child process that LMDB may kill.

What is not here: the log's rot (`damages`); the simulated state has no bytes.

The idea needed to read it: state/ is only ever allowed to know less. A checkpoint that is gone, or an older one, costs delivery
again; one that claims more than was settled would cost data.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import walbatch as wb
from walbatch.core.routing import shard_of
from walbatch.errors import WalbatchError
from walbatch.runtime.clock import RealClock, RealEntropy, RealThreads
from walbatch.storage.checkpoint import LmdbState
from walbatch.storage.filesystem import RealFileSystem
from walbatch.storage.layout import Layout
from walbatch.storage.log import Log, LogSettings
from walbatch.storage.store import OpenStore, open_store
from walbatch.types import Checkpoint, Position

PAGE_BYTES: Final = 4096
META_BYTES: Final = 200
"""Of each of the two first pages, what LMDB reads at opening: half of the flips fall there."""
SETTINGS: Final = wb.Settings(
    segment_bytes=4096, disk_bytes_max=2**24, timer_ms=1, checkpoint_ms=2, compress_bytes_min=None
)

Found = tuple[int, str, str]
"""The bit, the outcome, and what is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A real store at rest."""

    root: Path
    payloads: dict[int, bytes]
    keys: dict[int, bytes]
    pending: frozenset[int]
    checkpoint: Checkpoint
    used_bytes: int
    """Of data.mdb; behind it there are only zeros."""


def flips(scratch: Path, *, seed: int, part: int, count: int, only: int | None = None) -> Iterator[Found]:
    """Flip `count` bits (or the one bit `only`), each in a fresh copy of the same store."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    made = _make(scratch / "made")
    chance = random.Random(f"state {seed} {part}")
    pending = [_some_bit(made, chance) for _ in range(count)] if only is None else [only]
    while pending:
        done = 0
        for bit, outcome, problem in _in_child(scratch / "copy", made, pending):
            done += 1
            yield bit, outcome, problem
        pending = pending[done:]
    shutil.rmtree(scratch)


def _some_bit(made: Made, chance: random.Random) -> int:
    if chance.random() < 0.5:
        return 8 * PAGE_BYTES * chance.randrange(2) + chance.randrange(8 * META_BYTES)
    return chance.randrange(8 * made.used_bytes)


def _in_child(copy: Path, made: Made, bits: list[int]) -> Iterator[Found]:
    """What a child process found, until all are done or one has killed it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            for bit in bits:
                outcome, problem = _flip(copy, made, bit)
                os.write(writing, f"{bit}\t{outcome}\t{problem}\n".replace("\0", "").encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    done = 0
    with os.fdopen(reading, encoding="utf-8", errors="replace") as answers:
        for line in answers:
            flipped, outcome, problem = line.rstrip("\n").split("\t", 2)
            done += 1
            yield int(flipped), outcome, problem
    _, status = os.waitpid(child, 0)
    if done < len(bits):
        how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"status {status}"
        yield bits[done], "silent", f"the process died of it ({how})"


def _flip(copy: Path, made: Made, bit: int) -> tuple[str, str]:
    """Flip one bit in a copy, open it, read everything back, save a checkpoint; the outcome and what is wrong."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(made.root, copy)
    with (copy / "state" / "data.mdb").open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes((byte ^ 1 << bit % 8,)))
    try:
        store = open_store(
            RealFileSystem(), str(copy), clock=RealClock(), entropy=RealEntropy(), note={"pid": os.getpid()},
            open_state=lambda path, uuid: LmdbState.open_for_engine(path, uuid, Layout(str(copy)).quarantine),
        )  # fmt: skip
    except wb.CorruptionError as error:
        if error.path.startswith(f"{copy}/state"):
            return "detected", ""
        return "silent", f"an error that blames another file: {error}"
    except WalbatchError as error:
        return "silent", f"damage is answered with {type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001 - an error that is not typed is a finding
        return "silent", f"an untyped error: {error!r}"
    try:
        return _outcome(made, store)
    finally:
        store.state.close()
        store.lock.release()


def _outcome(made: Made, store: OpenStore) -> tuple[str, str]:
    rows, checkpoint = _read_back(store), store.facts.checkpoint
    wrong = [lsn for lsn, payload in rows.items() if made.payloads.get(lsn) != payload]
    if wrong:
        return "silent", f"LSN {wrong[0]} is not what was submitted"
    if not made.pending <= rows.keys():
        return "silent", f"LSN {min(made.pending - rows.keys())} is lost"
    if checkpoint is not None and any(_covers(checkpoint, lsn, made.keys[lsn]) for lsn in made.pending):
        return "silent", f"a checkpoint settles what is pending: {checkpoint!r}"
    if store.facts.state_findings or checkpoint is None:
        return "detected", ""
    if checkpoint != made.checkpoint:
        return "an older checkpoint", ""
    return "harmless", ""


def _covers(checkpoint: Checkpoint, lsn: int, key: bytes) -> bool:
    marks = [lane.shards[shard_of(key, len(lane.shards))] for lane in checkpoint.lanes.values()]
    return lsn <= checkpoint.watermark or any(mark.covers(lsn) for mark in marks)


def _read_back(store: OpenStore) -> dict[int, bytes]:
    """Every operation that would be delivered."""
    settings = LogSettings(segment_bytes=4096, compress_bytes_min=None, compress_level=1)
    log = Log.open(
        RealFileSystem(), store.layout, RealClock(), RealEntropy(), RealThreads(), settings, facts=store.facts, plan=store.plan
    )  # fmt: skip
    rows: dict[int, bytes] = {}
    try:
        position = Position(store.plan.first_segment, wb.limits.SECTOR_BYTES)
        next_lsn = 0
        while (frame := log.read_frame(position, next_lsn=next_lsn)) is not None:
            rows.update(zip(frame.lsns, frame.payloads, strict=True))
            position, next_lsn = frame.next_position, frame.last_lsn + 1
    finally:
        log.close(next_lsn=None)
    return rows


def _make(root: Path) -> Made:
    """A store with trimmed segments, pending operations, and several checkpoints behind it."""
    payloads: dict[int, bytes] = {}
    keys: dict[int, bytes] = {}
    applied: list[int] = []

    def submit(engine: wb.Engine, number: int, text: bytes) -> None:
        key = b"key %d" % number
        lsn = engine.submit("put", key=key, payload=(text % number * 200)[:600]).lsn
        assert lsn is not None
        payloads[lsn], keys[lsn] = (text % number * 200)[:600], key

    engine = wb.Engine.open(
        root, {"put": wb.Lane(lambda batch: applied.extend(batch.lsns), shards=2)}, settings=SETTINGS
    )
    for number in range(30):
        submit(engine, number, b"%d ")
    engine.flush(timeout=60)
    engine.close()
    engine = wb.Engine.open(root, {"put": wb.Lane(None, shards=2)}, settings=SETTINGS)
    for number in range(10):
        submit(engine, number, b"pending %d ")
    engine.close(drain=False)
    (root / "lock").unlink()
    store = open_store(
        RealFileSystem(), str(root), clock=RealClock(), entropy=RealEntropy(), note={},
        open_state=lambda path, uuid: LmdbState.open_for_engine(path, uuid, Layout(str(root)).quarantine),
    )  # fmt: skip
    store.state.close()
    store.lock.release()
    assert store.facts.checkpoint is not None
    used = len((root / "state" / "data.mdb").read_bytes().rstrip(b"\0"))
    return Made(
        root=root, payloads=payloads, keys=keys, pending=frozenset(payloads.keys() - set(applied)),
        checkpoint=store.facts.checkpoint, used_bytes=used,
    )  # fmt: skip
