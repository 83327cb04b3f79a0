"""`wal/dropped`: what compactions took for settled, kept in the log itself.

What is not here: dropping anything (`compaction`).

The idea needed to read it: trimming removes the oldest operations, so that what is left of a key is always its newest
part, and delivering it again ends where it had ended. A compaction removes operations from the middle: without state/,
an older operation of a key could be delivered again after the newer one is gone. So the log keeps the marks under which
it has dropped operations. What they cover is passed over, whatever becomes of state/.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from walbatch.ports import FileSystem
from walbatch.storage.envelope import (
    CHECKPOINT_BYTES_MAX,
    decode_checkpoint,
    encode_checkpoint,
    seal,
    unseal,
)
from walbatch.storage.layout import Layout, write_durably
from walbatch.types import Checkpoint, LaneMark

_KEY: Final = b"dropped"


def read_dropped(
    fs: FileSystem, layout: Layout, store: bytes | None
) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """The marks under which operations were dropped, and what was found wrong. Raises UnsupportedFormat, OSError."""
    if store is None or not fs.exists(layout.dropped):
        return None, ()
    file = fs.open_read(layout.dropped)
    try:
        size = file.size()
        value = file.read(size, 0) if size <= CHECKPOINT_BYTES_MAX else b""
    finally:
        file.close()
    try:
        return decode_checkpoint(unseal(_KEY, value, store)), ()
    except ValueError as error:
        return None, (f"wal/dropped is not usable: {error}",)


def write_dropped(fs: FileSystem, layout: Layout, store: bytes, covered: Checkpoint) -> None:
    """Replace the marks, durably. Raises ValueError for marks with too many ranges; OSError, StorageError."""
    write_durably(fs, layout.dropped, seal(_KEY, encode_checkpoint(covered), store))


def joined(before: Checkpoint | None, covered: Checkpoint) -> Checkpoint:
    """What either of them covers: what was dropped once stays dropped."""
    if before is None:
        return covered
    lanes = {**before.lanes, **covered.lanes}
    for name, lane in before.lanes.items():
        other = covered.lanes.get(name)
        if other is not None and len(other.shards) == len(lane.shards):
            shards = (mark.union(old) for mark, old in zip(other.shards, lane.shards, strict=True))
            lanes[name] = LaneMark(shards=tuple(shards))
    return replace(covered, watermark=max(before.watermark, covered.watermark), lanes=lanes)
