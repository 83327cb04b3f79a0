"""What a transactional backend, the state and the file system must do, tried on the shipped ones with real files.

What is not here: crashes. These are the promises that the simulation's stand-ins keep by themselves, so a mistake of the
shipped ones would not be seen there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final
from unittest import mock

from walbatch.backends.lmdb import LmdbBackend
from walbatch.errors import Fenced, StorageError
from walbatch.storage import statefile, statefolder
from walbatch.storage.checkpoint import LmdbState
from walbatch.storage.filesystem import RealFileSystem
from walbatch.types import Batch, Checkpoint, CutReason, LaneMark, Mark

STORE: Final = b"0123456789abcdef"
OTHER: Final = b"fedcba9876543210"


def batch(lsns: list[int], *, epoch: int = 1, watermark: int | None = None) -> Batch:
    """Operations whose key and payload tell their LSN, with a mark that covers them."""
    return Batch(
        lane="put", shard=0, store=STORE, lsns=lsns, keys=[b"k%d" % lsn for lsn in lsns], payloads=[b"p%d" % lsn for lsn in lsns],
        priorities=[5] * len(lsns), attempt=1, reason=CutReason.COUNT,
        mark=Mark(epoch=epoch, watermark=max(lsns) if watermark is None else watermark),
    )  # fmt: skip


def backend_problems(folder: Path) -> Iterator[str]:
    """What the LMDB backend does wrong. One step after the other."""
    counts: list[int] = []

    def write(txn: Any, operation: Any) -> None:
        if operation.payload == b"p13":
            raise ValueError("in the middle")
        counts.append(operation.lsn)
        txn.put(operation.key, operation.payload)

    backend = LmdbBackend(folder, write=write)
    backend.open("put", 1, STORE)
    backend.apply(batch([1, 2, 3]))
    if backend.applied_mark(0) != Mark(epoch=1, watermark=3):
        yield f"the mark is {backend.applied_mark(0)} after operations 1 to 3"
    backend.apply(batch([2, 3, 4]))
    if counts != [1, 2, 3, 4]:
        yield f"operations took effect as {counts} when they came again"
    with contextlib.suppress(ValueError):
        backend.apply(batch([12, 13]))
    if backend.get(b"k12") is not None or backend.applied_mark(0).covers(12):
        yield "a batch that failed in the middle took effect in part"
    backend.apply(batch([5], epoch=2))
    try:
        backend.apply(batch([6], epoch=1))
    except Fenced:
        pass
    else:
        yield "a batch of an engine that was replaced was applied"
    backend.close()
    backend = LmdbBackend(folder, write=write)
    backend.open("put", 1, STORE)
    if not backend.applied_mark(0).covers(5):
        yield "the mark is gone after a second opening"
    backend.close()


def file_problems(folder: Path) -> Iterator[str]:
    """What the port to the real file system does wrong while the kernel does what it may."""
    fs = RealFileSystem()
    path = str(folder / "file")
    file = fs.create(path)
    write, read = os.pwritev, os.pread

    def in_parts(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return write(fd, [buffers[0][:3]], offset)

    with mock.patch("os.pwritev", in_parts):
        file.write([b"0123456", b"", b"789"], 2)
    if file.read(100, 0) != b"\0\0" + b"0123456789":
        yield f"after short writes the file holds {file.read(100, 0)!r}"
    with mock.patch("os.pread", lambda fd, size, offset: read(fd, min(size, 5), offset)):
        if file.read(12, 0) != b"\0\0" + b"0123456789":
            yield "a short read is taken for all there is"
    with mock.patch("os.fdatasync") as datasync:
        file.datasync()
    if not datasync.called:
        yield "datasync does not sync"
    with mock.patch("os.fsync") as sync:
        fs.sync_directory(str(folder))
    if not sync.called:
        yield "sync_directory does not sync"
    first = fs.lock(str(folder / "lock"), b"first")
    second = fs.lock(str(folder / "lock"), b"second")
    if isinstance(first, bytes) or not isinstance(second, bytes):
        yield "two openers hold the lock"
    file.close()


def checkpoint(generation: int) -> Checkpoint:
    """A checkpoint that tells its generation."""
    return Checkpoint(
        generation=generation, epoch=1, watermark=10 * generation, durable_lsn=10 * generation, segment=1,
        settled_count=generation, lanes={"put": LaneMark(shards=(Mark(watermark=10 * generation),))},
    )  # fmt: skip


def state_problems(folder: Path) -> Iterator[str]:
    """What the state in LMDB does wrong."""
    path, quarantine = str(folder / "state"), str(folder / "quarantine")
    state = LmdbState.open_for_engine(path, STORE, quarantine)
    for generation in (1, 2, 3):
        state.save_checkpoint(checkpoint(generation))
    state.close()
    state = LmdbState.open_for_engine(path, STORE, quarantine)
    loaded, findings = state.load_checkpoint()
    if loaded != checkpoint(3) or findings:
        yield f"generation {loaded.generation if loaded else None} is loaded, and {findings}"
    state.close()
    yield from _stranger(path, quarantine)
    for generation, older in ((3, 2), (2, 3)):
        yield from _with_rot(folder, generation, older)
    yield from _after_a_failed_save(path, quarantine)


def _stranger(path: str, quarantine: str) -> Iterator[str]:
    copy = f"{path} of another"
    shutil.copytree(path, copy)
    state = LmdbState.open_for_engine(copy, OTHER, quarantine)
    loaded, findings = state.load_checkpoint()
    if loaded is not None or not findings:
        yield "the checkpoint of another store is believed"
    state.close()


def _with_rot(folder: Path, generation: int, older: int) -> Iterator[str]:
    """The value of one generation rots: the other one is loaded."""
    path = folder / f"rotten {generation}"
    shutil.copytree(folder / "state", path)
    data = bytearray((path / statefolder.DATA_NAME).read_bytes())
    wanted = (10 * generation).to_bytes(8, "little") * 2  # watermark and durable LSN, side by side
    at = data.find(wanted)
    while at >= 0:
        data[at + 1] ^= 1
        at = data.find(wanted, at + 1)
    (path / statefolder.DATA_NAME).write_bytes(data)
    state = LmdbState.open_for_engine(str(path), STORE, str(folder / "quarantine"))
    loaded, findings = state.load_checkpoint()
    state.close()
    if loaded != checkpoint(older) or not findings:
        yield f"with a damaged generation {generation}, this is loaded: {loaded}, and found: {findings}"


def _after_a_failed_save(path: str, quarantine: str) -> Iterator[str]:
    state = LmdbState.open_for_engine(path, STORE, quarantine)
    failed = StorageError("injected", errno=errno.EIO)
    with mock.patch.object(statefile.StateFile, "put", side_effect=failed):
        try:
            state.save_checkpoint(checkpoint(4))
        except StorageError:
            pass
        else:
            yield "a save that failed returned"
    try:
        state.save_checkpoint(checkpoint(5))
    except StorageError:
        pass
    else:
        yield "a save succeeded after one whose fate nobody knows"
    state.close()
