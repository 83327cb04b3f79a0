"""Stores to look at, damage and recover: made by a real engine, small, with many segments."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import walbatch as wb
from tests.support import FAST, QUICK_RETRY, Recorder, wait_until
from walbatch.inspection import operations
from walbatch.storage.dropped import write_dropped
from walbatch.storage.filesystem import RealFileSystem
from walbatch.storage.layout import Layout, read_identity
from walbatch.storage.observation import read_state
from walbatch.types import Checkpoint

TINY = wb.Settings(
    segment_bytes=4096,
    disk_bytes_max=2**30,
    timer_ms=5,
    checkpoint_ms=5,
    idle_stamp_ms=60_000,
    compress_bytes_min=None,
)
"""A few operations fill a segment; no stamp proves the end unless the engine is closed."""

PAYLOAD_BYTES = 600
"""With a key, one operation takes two sectors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A store that nobody has open, and the operations it was given: LSN to (kind, key, payload)."""

    path: Path
    submitted: Mapping[int, tuple[str, bytes, bytes]]
    settled: frozenset[int]
    known_lsn: int
    """Up to here, the store itself can tell that operations are gone."""

    @property
    def pending(self) -> set[int]:
        return set(self.submitted) - self.settled

    @property
    def segments(self) -> list[Path]:
        return sorted((self.path / "wal").glob("*.seg"))


def make_store(
    path: Path,
    *,
    count: int = 30,
    kinds: tuple[str, ...] = ("put",),
    settle: str = "",
    clean: bool = True,
    shards: int = 2,
) -> Made:
    """A store with `count` operations of each kind, one in a frame; those of kind `settle` are settled.

    Not `clean`: as a kill left it. Its segments are as they were written: nothing is compacted.
    """
    submitted = {}
    work = path if clean else path.with_name(f"{path.name}.work")
    lanes = {
        kind: wb.Lane(Recorder() if kind == settle else None, shards=shards, trigger=FAST, retry=QUICK_RETRY)
        for kind in kinds
    }
    engine = wb.Engine.open(work, lanes=lanes, settings=TINY)
    engine._assembly.log.compact = lambda covered: False  # type: ignore[method-assign]
    for number in range(count):
        for kind in kinds:
            key, payload = b"k%d" % (number % 7), (b"%d-" % number).ljust(PAYLOAD_BYTES, kind[:1].encode())
            ticket = engine.submit(kind, key=key, payload=payload)
            assert ticket.lsn is not None
            submitted[ticket.lsn] = (kind, key, payload)
    settled = {lsn for lsn, (kind, _, _) in submitted.items() if kind == settle}
    if settle:
        engine.flush(settle, timeout=30)
    wait_until(lambda: not unsettled_in(work) & settled, what="the checkpoint knows what is settled")
    last = int(max((work / "wal").glob("*.seg")).stem)
    wait_until(lambda: checkpoint_of(work).segment == last, what="the checkpoint knows the last segment")
    if not clean:
        shutil.copytree(work, path)
    engine.close(drain=False)
    if not clean:
        shutil.rmtree(work)
    return Made(
        path=path, submitted=submitted, settled=frozenset(settled), known_lsn=checkpoint_of(path).durable_lsn
    )


def checkpoint_of(path: Path) -> Checkpoint:
    """What the store's state says."""
    layout = Layout(str(path))
    _, uuid = read_identity(RealFileSystem(), layout)
    checkpoint, _ = read_state(layout, uuid)
    assert checkpoint is not None
    return checkpoint


def note_dropped(path: Path, **changes: Any) -> Checkpoint:
    """Let `wal/dropped` say what the checkpoint does, but for `changes`, as if a compaction had noted it."""
    layout = Layout(str(path))
    _, uuid = read_identity(RealFileSystem(), layout)
    assert uuid is not None
    noted = replace(checkpoint_of(path), **changes)
    write_dropped(RealFileSystem(), layout, uuid, noted)
    return noted


def unsettled_in(path: Path) -> set[int]:
    """The LSNs in the log that the checkpoint does not call settled."""
    return {operation.lsn for operation in operations(path) if not operation.settled}


def deliver(path: Path, *, kinds: Mapping[str, int]) -> list[tuple[int | None, bytes, bytes]]:
    """Open the store with a recording backend for each kind (and its shards), deliver everything, close."""
    recorder = Recorder()
    lanes = {kind: wb.Lane(recorder, shards=shards, trigger=FAST) for kind, shards in kinds.items()}
    with wb.Engine.open(path, lanes=lanes, settings=TINY) as engine:
        engine.flush(timeout=30)
    return recorder.applied


def flip(path: Path, offset: int, *, count: int = 1) -> None:
    """Change bytes of a file in place."""
    data = bytearray(path.read_bytes())
    for at in range(offset, offset + count):
        data[at] ^= 0x55
    path.write_bytes(data)


def picture(path: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file below a directory: its mtime in ns, its inode and its bytes. Directories have no bytes."""
    return {str(found.relative_to(path)): _state(found) for found in _walk(path)}


def _walk(path: Path) -> Iterator[Path]:
    yield path
    yield from path.rglob("*")


def _state(path: Path) -> tuple[int, int, bytes]:
    facts = path.stat()
    return facts.st_mtime_ns, facts.st_ino, b"" if path.is_dir() else path.read_bytes()
