"""Writes golden files of what flags of a segment allow in format version 1: options, and a compacted segment.

    python3 -m tools.make_golden_compacted fixtures/golden/v1-compacted

As `make_golden`: what is committed is never written again, and every input is chosen here.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from tools.make_golden import FIRST, SALTS, SEGMENT_BYTES, STORE, WALL_NS, fields_of
from walbatch.core.columns import Columns, encode_body
from walbatch.core.frame import EMPTY_BODY, FLAG_LOST, SEGMENT_COMPACTED, SEGMENT_OPTIONS, FrameType
from walbatch.storage.dropped import write_dropped
from walbatch.storage.filesystem import RealFileSystem
from walbatch.storage.layout import Layout, encode_identity, write_durably
from walbatch.storage.segment import SegmentWriter
from walbatch.types import NO_OPTIONS, Checkpoint, LaneMark, Mark, Options

COMPACTED: Final = replace(
    FIRST, number=4, salt=SALTS[1], epoch=2, flags=SEGMENT_COMPACTED, checkpointed_lsn=1
)
"""It stands for the segments 1 to 4."""
OPTIONS: Final = replace(
    COMPACTED, number=5, first_lsn=201, prev_number=4, prev_salt=SALTS[1], prev_last_lsn=200, operations_before=60,
    flags=SEGMENT_OPTIONS,
)  # fmt: skip
SPARSE: Final = Columns(
    kinds=("slow", "put"), kind_indexes=[0, 1, 0], priorities=[5, 9, 5], keys=[b"a", b"k", b"b"],
    payloads=[b"kept", b"", b"kept too"], lsn_offsets=[1, 40, 99],
)  # fmt: skip
SPARSE_SPAN: Final = 120
LOST: Final = 5
DENSE: Final = Columns(
    kinds=("slow",), kind_indexes=[0, 0], priorities=[5, 5], keys=[b"c", b"d"], payloads=[b"x", b"y"], lsn_offsets=[0, 74]
)  # fmt: skip
WITH_OPTIONS: Final = Columns(
    kinds=("put",), kind_indexes=[0, 0, 0], priorities=[5, 5, 5], keys=[b"a", b"b", b"c"], payloads=[b"1", b"2", b"3"],
    options=[
        Options(not_before_ns=WALL_NS + 1, deadline_ns=WALL_NS + 2, origin=7, idempotency_key=b"order-4711"),
        NO_OPTIONS,
        Options(idempotency_key=b"\x00\xff"),
    ],
)  # fmt: skip
DROPPED: Final = Checkpoint(
    generation=9, epoch=2, watermark=1, durable_lsn=200, segment=5, settled_count=55,
    lanes={
        "put": LaneMark(shards=(Mark(epoch=2, watermark=200), Mark(epoch=2, watermark=40, ranges=((42, 200),)))),
        "slow": LaneMark(shards=(Mark(epoch=2, watermark=1),)),
    },
)  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    if len(arguments) != 1:
        sys.exit("usage: python3 -m tools.make_golden_compacted FOLDER")
    make_golden_compacted(Path(arguments[0]).absolute())


def make_golden_compacted(folder: Path) -> None:
    """Write the store and its JSON into `folder`, which must be empty or not exist."""
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} holds files: golden files are never written again. Choose a new folder")
    layout = Layout(str(folder))
    fs = RealFileSystem()
    Path(layout.wal).mkdir(parents=True)
    write_durably(fs, layout.identity, encode_identity(STORE, WALL_NS))
    compacted = SegmentWriter.create(
        fs, layout.segment(COMPACTED.number), COMPACTED, segment_bytes=0, wall_ns=WALL_NS, first=[]
    )
    append(compacted, SPARSE, span=SPARSE_SPAN)
    compacted.append(
        EMPTY_BODY, type=FrameType.VOID, first_lsn=SPARSE_SPAN + 1, span=LOST, synced_lsn=SPARSE_SPAN, wall_ns=WALL_NS,
        flags=FLAG_LOST,
    )  # fmt: skip
    append(compacted, DENSE, span=OPTIONS.prev_last_lsn - compacted.last_lsn)
    compacted.seal(wall_ns=WALL_NS)
    compacted.close()
    options = SegmentWriter.create(
        fs, layout.segment(OPTIONS.number), OPTIONS, segment_bytes=SEGMENT_BYTES, wall_ns=WALL_NS, first=[]
    )
    append(options, WITH_OPTIONS, span=3)
    options.stamp(next_lsn=204, flags=0, wall_ns=WALL_NS)
    options.cut()
    options.close()
    write_dropped(fs, layout, STORE, DROPPED)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    expected: dict[str, Any] = {
        "headers": [fields_of(COMPACTED), fields_of(OPTIONS)],
        "frames": [rows_of(SPARSE, 1), rows_of(DENSE, SPARSE_SPAN + LOST + 1), rows_of(WITH_OPTIONS, 201)],
        "dropped": asdict(DROPPED),
        "files": {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
        },
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


def append(writer: SegmentWriter, columns: Columns, *, span: int) -> None:
    """Append a frame of operations that reaches over `span` LSNs."""
    counts = {
        kind: sum(columns.kinds[index] == kind for index in columns.kind_indexes) for kind in columns.kinds
    }
    writer.append(
        encode_body(columns), type=FrameType.OPERATIONS, first_lsn=writer.last_lsn + 1, span=span, synced_lsn=writer.last_lsn,
        wall_ns=WALL_NS, kind_counts=counts, priority=max(columns.priorities),
    )  # fmt: skip


def rows_of(columns: Columns, first_lsn: int) -> list[list[Any]]:
    """The operations of a frame in the form of the JSON."""
    options = columns.options or [NO_OPTIONS] * len(columns.keys)
    return [
        [
            lsn, columns.kinds[kind], priority, key.hex(), payload.hex(), option.not_before_ns, option.deadline_ns,
            option.origin, option.idempotency_key.hex(),
        ]
        for lsn, kind, priority, key, payload, option in zip(
            columns.lsns(first_lsn), columns.kind_indexes, columns.priorities, columns.keys, columns.payloads, options,
            strict=True,
        )
    ]  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
