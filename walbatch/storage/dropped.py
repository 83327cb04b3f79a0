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
from walbatch.types import Checkpoint, LaneMark, LaneMemory, Mark

_KEY: Final = b"dropped"


def read_dropped(
    fs: FileSystem, layout: Layout, store: bytes | None
) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """The marks under which operations were dropped, and what was found wrong. Raises UnsupportedFormat, OSError.

    That there are none is no finding here: whether there should be some, the headers of the segments tell (S10).
    """
    if not fs.exists(layout.dropped):
        return None, ()
    if store is None:
        return None, ("wal/dropped cannot be read without the store's identity",)
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
        if other is not None and (noted := marks_for(lane, len(other.shards))):
            shards = (mark.union(old) for mark, old in zip(other.shards, noted, strict=True))
            lanes[name] = LaneMark(shards=tuple(shards))
    return replace(covered, watermark=max(before.watermark, covered.watermark), lanes=lanes)


def noted_lanes(dropped: Checkpoint | None) -> dict[str, LaneMemory]:
    """The lanes with more than one shard that operations were dropped of.

    A lane with one may have been held by an opening to which nothing told how many it had.
    """
    lanes = dropped.lanes if dropped is not None else {}
    return {
        name: LaneMemory(name=name, shards=len(lane.shards)) for name, lane in lanes.items() if len(lane.shards) > 1
    }  # fmt: skip


def marks_for(lane: LaneMark, shards: int) -> tuple[Mark, ...]:
    """The marks of a lane, for each of so many shards; none where these are others than it had.

    The mark of an only shard is true of every key, so of each part of them.
    """
    marks = lane.shards * shards if len(lane.shards) == 1 else lane.shards
    return marks if len(marks) == shards else ()


def with_dropped(checkpoint: Checkpoint | None, dropped: Checkpoint | None) -> Checkpoint | None:
    """What the next opening passes over, lane by lane: what the checkpoint covers, and under what operations were dropped."""
    if dropped is None:
        return checkpoint
    if checkpoint is None:
        return replace(dropped, watermark=0)
    lanes = dict(checkpoint.lanes)
    settled = Mark(watermark=checkpoint.watermark)
    for name, lane in dropped.lanes.items():
        known = lanes.get(name, LaneMark(shards=(settled,) * len(lane.shards)))
        if noted := marks_for(lane, len(known.shards)):
            shards = (mark.union(other) for mark, other in zip(known.shards, noted, strict=True))
            lanes[name] = LaneMark(shards=tuple(shards))
    return replace(checkpoint, lanes=lanes)
