"""Writes golden files of format version 1: a small store on disk, and a JSON of what it must decode to.

    python3 tools/make_golden.py fixtures/golden/v1

The files that are committed pin the format: they are never written again, and this refuses a folder that
holds any of them. Every input is chosen here (UUID, salts, times), so the same code writes the same bytes;
only what zstd makes of a compressed frame depends on its version. The JSON is made from the inputs, never by
decoding.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from walbatch import limits
from walbatch.core.columns import Columns, encode_body
from walbatch.core.frame import (
    EMPTY_BODY,
    FLAG_CLEAN,
    FLAG_COPIED,
    FLAG_LOST,
    Codec,
    FrameType,
    SegmentHeader,
    encode_frame_header,
    frame_seed,
)
from walbatch.core.mark import encode_mark
from walbatch.storage.envelope import encode_checkpoint, encode_lane, seal
from walbatch.storage.filesystem import RealFileSystem
from walbatch.storage.layout import Layout, encode_identity, write_durably
from walbatch.storage.segment import SegmentWriter
from walbatch.types import Checkpoint, LaneMark, LaneMemory, Mark

STORE: Final = bytes.fromhex("00112233445566778899aabbccddeeff")
SALTS: Final = (0x1111_2222_3333_4444, 0x5555_6666_7777_8888, 0x9999_AAAA_BBBB_CCCC, 0xDDDD_EEEE_FFFF_0001)
WALL_NS: Final = 1_700_000_000_000_000_000
SEGMENT_BYTES: Final = limits.SEGMENT_BYTES_MIN

Row = tuple[str, int, bytes, bytes]
"""Kind, priority, key, payload."""


def main(arguments: Sequence[str]) -> None:
    if len(arguments) != 1:
        sys.exit("usage: python3 tools/make_golden.py FOLDER")
    make_golden(Path(arguments[0]).absolute())


def make_golden(folder: Path) -> None:
    """Write the store and its JSON into `folder`, which must be empty or not exist."""
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} holds files: golden files are never written again. Choose a new folder")
    layout = Layout(str(folder))
    Path(layout.wal).mkdir(parents=True)
    write_durably(RealFileSystem(), layout.identity, encode_identity(STORE, WALL_NS))
    segments = [
        sealed_segment(layout),
        torn_segment(layout),
        copied_segment(layout),
        small_segment(layout),
        salvaged_segment(layout),
    ]
    values = state_values()
    (folder / "values").mkdir()
    for name, value in values.items():
        (folder / "values" / name).write_bytes(value)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    expected = {
        "format_version": 1,
        "identity": {"store": STORE.hex(), "wall_ns": WALL_NS},
        "segments": segments,
        "mark": asdict(MARK),
        "checkpoint": asdict(CHECKPOINT),
        "lane": asdict(LANE),
        "files": {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
        },
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


# --- the segments ------------------------------------------------------------------------------------------------


FIRST: Final = SegmentHeader(
    store=STORE,
    salt=SALTS[0],
    epoch=1,
    number=1,
    first_lsn=1,
    prev_number=0,
    prev_salt=0,
    prev_last_lsn=0,
    operations_before=0,
    checkpointed_lsn=0,
    created_wall_ns=WALL_NS,
)
TORN: Final = replace(
    FIRST,
    number=2,
    first_lsn=21,
    prev_number=1,
    prev_salt=SALTS[0],
    prev_last_lsn=20,
    operations_before=20,
    checkpointed_lsn=6,
)
COPIED: Final = replace(
    TORN,
    salt=SALTS[1],
    epoch=2,
    number=3,
    first_lsn=23,
    prev_number=2,
    prev_last_lsn=22,
    operations_before=22,
)
AFTER_JUMP: Final = 26 + limits.LSN_JUMP + 1
"""26 is the highest LSN that the torn segment names."""
SMALL: Final = replace(
    COPIED,
    salt=SALTS[2],
    epoch=3,
    number=4,
    first_lsn=AFTER_JUMP + 1,
    prev_number=3,
    prev_salt=SALTS[1],
    prev_last_lsn=AFTER_JUMP,
    operations_before=26,
)
SALVAGED: Final = replace(
    SMALL,
    salt=SALTS[3],
    epoch=4,
    number=5,
    first_lsn=AFTER_JUMP + 3,
    prev_number=4,
    prev_salt=SALTS[2],
    prev_last_lsn=AFTER_JUMP + 2,
    operations_before=28,
    checkpointed_lsn=18,
)

UNPROVEN: Final[tuple[tuple[int, list[Row]], ...]] = (
    (23, [("put", 5, b"key-23", b"synced, but nothing in its segment proves it")]),
    (24, [("put", 5, b"key-24", b"written, not synced"), ("notify", 3, b"key-25", b"the same frame")]),
)
"""The frames of the torn segment that are copied forward, with their first LSNs."""


def sealed_segment(layout: Layout) -> dict[str, Any]:
    """Every kind of column, an idle stamp, compressed frames, and a seal footer."""
    segment = Golden.create(layout, FIRST)
    segment.operations(
        [
            ("put", 5, b"", b""),
            ("put", 9, b"k", b"\0"),
            ("notify", 0, b"\x00\xff\x80\n", b"hello"),
            ("put", 10, b"k", b"\xff\xff\xff"),
            ("notify", 5, "schlüssel".encode(), b""),
        ],
        synced_lsn=0,
    )
    segment.operations([("put", 5, b"", b"")], synced_lsn=5)
    segment.stamp(flags=0)
    segment.operations([("notify", 7, b"key-%02d" % i, bytes((i,))) for i in range(7, 11)], synced_lsn=6)
    segment.operations(
        [("put", 5, b"block-%d" % i, bytes((i,)) * 256) for i in range(11, 19)], synced_lsn=10, compress=True
    )
    # A key column of two bytes and a payload column of four.
    segment.operations(
        [("put", 5, b"\x55" * 300, bytes(70_000)), ("put", 5, b"kk", b"x")], synced_lsn=18, compress=True
    )
    return segment.seal()


def torn_segment(layout: Layout) -> dict[str, Any]:
    """Frames with and without proof, then the first sector of a frame of two; preallocated room behind it."""
    segment = Golden.create(layout, TORN)
    segment.operations([("put", 5, b"a", b"1"), ("put", 5, b"b", b"2")], synced_lsn=20)
    for _, rows in UNPROVEN:
        segment.operations(rows, synced_lsn=22)
    return segment.tear([("put", 5, b"torn", bytes(range(256)) * 3)], synced_lsn=22)


def copied_segment(layout: Layout) -> dict[str, Any]:
    """What an unclean open writes: copied frames, the skipped LSNs, a stamp; then one operation and a clean close."""
    segment = Golden.create(layout, COPIED)
    for _, rows in UNPROVEN:
        segment.operations(rows, synced_lsn=22, flags=FLAG_COPIED)
    segment.void(AFTER_JUMP - segment.next_lsn, synced_lsn=22)
    segment.stamp(flags=0)
    segment.operations([("put", 5, b"after", b"the jump")], synced_lsn=AFTER_JUMP - 1)
    segment.stamp(flags=FLAG_CLEAN)
    return segment.cut()


def small_segment(layout: Layout) -> dict[str, Any]:
    """The example of docs/format.md: one frame of two operations, one stamp."""
    segment = Golden.create(layout, SMALL)
    segment.operations([("put", 5, b"alpha", b"one"), ("put", 8, b"beta", b"")], synced_lsn=AFTER_JUMP)
    segment.stamp(flags=FLAG_CLEAN)
    return segment.cut()


def salvaged_segment(layout: Layout) -> dict[str, Any]:
    """LSNs that a salvage gave up, and an end without proof."""
    segment = Golden.create(layout, SALVAGED)
    segment.void(3, synced_lsn=AFTER_JUMP + 2, flags=FLAG_LOST)
    segment.stamp(flags=0)
    segment.operations([("notify", 2, b"last", b"unproven")], synced_lsn=AFTER_JUMP + 5)
    return segment.expected()


# --- the values of state/ and of transactional backends -------------------------------------------------------------

MARK: Final = Mark(epoch=4, watermark=18, ranges=((20, 20), (23, 2**40)))
CHECKPOINT: Final = Checkpoint(
    generation=7,
    epoch=4,
    watermark=18,
    durable_lsn=AFTER_JUMP + 5,
    segment=5,
    settled_count=21,
    lanes={
        "notify": LaneMark(shards=(Mark(epoch=4, watermark=24),)),
        "put": LaneMark(shards=(MARK, Mark(), Mark(epoch=1, watermark=19, ranges=((21, 22),)))),
    },
)
LANE: Final = LaneMemory(name="put", shards=3, url="lmdb:///data/blöcke")


def state_values() -> dict[str, bytes]:
    """A mark as a backend keeps it, a checkpoint as it stands under the key `1`, a lane under its name."""
    return {
        "mark": encode_mark(MARK),
        "checkpoint": seal(b"1", encode_checkpoint(CHECKPOINT), STORE),
        "lane": seal(LANE.name.encode(), encode_lane(LANE), STORE),
    }


# --- writing one segment, and keeping account of it ----------------------------------------------------------------


@dataclass(slots=True)
class Golden:
    """A segment in the making and the JSON of what it must decode to."""

    header: SegmentHeader
    writer: SegmentWriter
    path: Path
    frames: list[dict[str, Any]] = field(default_factory=list)
    operation_count: int = 0
    footer: bool = False
    torn: dict[str, Any] | None = None

    @classmethod
    def create(cls, layout: Layout, header: SegmentHeader) -> "Golden":
        """Make the segment, preallocated."""
        path = layout.segment(header.number)
        writer = SegmentWriter.create(
            RealFileSystem(), path, header, segment_bytes=SEGMENT_BYTES, wall_ns=WALL_NS, first=[]
        )
        return cls(header, writer, Path(path))

    @property
    def next_lsn(self) -> int:
        """First LSN of the next frame."""
        return self.writer.last_lsn + 1

    @property
    def wall_ns(self) -> int:
        """A time that differs from frame to frame."""
        return WALL_NS + 1_000_000_000 * self.header.number + 1_000 * len(self.frames)

    def operations(
        self, rows: Sequence[Row], *, synced_lsn: int, compress: bool = False, flags: int = 0
    ) -> None:
        """Append a frame of operations."""
        columns = columns_of(rows)
        body = encode_body(columns, compress_bytes_min=1 if compress else None)
        assert body.codec is (Codec.ZSTD if compress else Codec.RAW)
        counts = {kind: sum(row[0] == kind for row in rows) for kind in columns.kinds}
        entry = self.entry(
            FrameType.OPERATIONS, flags=flags, span=len(rows), synced_lsn=synced_lsn, codec=body.codec
        )
        self.writer.append(
            body,
            type=FrameType.OPERATIONS,
            first_lsn=self.next_lsn,
            span=len(rows),
            synced_lsn=synced_lsn,
            wall_ns=entry["wall_ns"],
            flags=flags,
            kind_counts=counts,
            priority=max(row[1] for row in rows),
        )
        entry["operations"] = [
            [kind, priority, short(key), short(payload)] for kind, priority, key, payload in rows
        ]
        self.operation_count += len(rows)
        self.frames.append(entry)

    def stamp(self, *, flags: int) -> None:
        """Append an idle stamp."""
        entry = self.entry(FrameType.STAMP, flags=flags, span=0, synced_lsn=self.next_lsn - 1)
        self.writer.stamp(next_lsn=self.next_lsn, flags=flags, wall_ns=entry["wall_ns"])
        self.frames.append(entry)

    def void(self, span: int, *, synced_lsn: int, flags: int = 0) -> None:
        """Append a range of LSNs that names no operation."""
        entry = self.entry(FrameType.VOID, flags=flags, span=span, synced_lsn=synced_lsn)
        self.writer.append(
            EMPTY_BODY,
            type=FrameType.VOID,
            first_lsn=self.next_lsn,
            span=span,
            synced_lsn=synced_lsn,
            wall_ns=entry["wall_ns"],
            flags=flags,
        )
        self.frames.append(entry)

    def seal(self) -> dict[str, Any]:
        """Write the footer and cut the file behind it."""
        entry = self.entry(FrameType.SEAL, flags=0, span=0, synced_lsn=self.writer.last_lsn, codec=Codec.ZSTD)
        self.writer.seal(wall_ns=entry["wall_ns"])
        self.frames.append(entry)
        self.footer = True
        return self.expected()

    def cut(self) -> dict[str, Any]:
        """Give back the preallocated room."""
        self.writer.cut()
        return self.expected()

    def tear(self, rows: Sequence[Row], *, synced_lsn: int) -> dict[str, Any]:
        """Write the first sector only of a frame of two."""
        offset = self.writer.offset
        body = encode_body(columns_of(rows))
        head = encode_frame_header(
            body,
            type=FrameType.OPERATIONS,
            first_lsn=self.next_lsn,
            span=len(rows),
            synced_lsn=synced_lsn,
            wall_ns=self.wall_ns,
            seed=frame_seed(self.header.salt, self.header.number, offset),
        )
        written = (head + body.padded)[: limits.SECTOR_BYTES]
        assert len(head) + len(body.padded) == 2 * limits.SECTOR_BYTES
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(written)
        self.torn = {
            "offset": offset,
            "end": offset + len(written.rstrip(b"\0")),
            "evidence_lsn": synced_lsn,
            "seen_lsn": self.writer.last_lsn + len(rows),
        }
        return self.expected()

    def entry(
        self, frame_type: FrameType, *, flags: int, span: int, synced_lsn: int, codec: Codec = Codec.RAW
    ) -> dict[str, Any]:
        """What the next frame's header must say."""
        return {
            "offset": self.writer.offset,
            "type": frame_type.name,
            "codec": codec.name,
            "flags": flags,
            "first_lsn": self.next_lsn,
            "synced_lsn": synced_lsn,
            "span": span,
            "wall_ns": self.wall_ns,
        }

    def expected(self) -> dict[str, Any]:
        """The segment's part of the JSON. The last call: it closes the file."""
        self.writer.close()
        proven = max([self.header.prev_last_lsn, *(frame["synced_lsn"] for frame in self.frames)])
        return {
            "file": f"wal/{self.path.name}",
            "header": fields_of(self.header),
            "frames": self.frames,
            "last_lsn": self.writer.last_lsn,
            "proven_lsn": proven,
            "operations": self.operation_count,
            "sealed": self.footer,
            "clean": bool(self.frames[-1]["flags"] & FLAG_CLEAN),
            "unproven": [
                frame["offset"]
                for frame in self.frames
                if frame["span"] and frame["first_lsn"] + frame["span"] - 1 > proven
            ],
            "torn": self.torn,
        }


def fields_of(header: SegmentHeader) -> dict[str, Any]:
    """A header in the form of the JSON, where no flags are left out."""
    fields = {**asdict(header), "store": STORE.hex()}
    if not header.flags:
        del fields["flags"]
    return fields


def columns_of(rows: Sequence[Row]) -> Columns:
    """Rows as columns, the kinds in the order in which they appear."""
    kinds = tuple(dict.fromkeys(row[0] for row in rows))
    return Columns(
        kinds=kinds,
        kind_indexes=[kinds.index(row[0]) for row in rows],
        priorities=[row[1] for row in rows],
        keys=[row[2] for row in rows],
        payloads=[row[3] for row in rows],
    )


def short(data: bytes) -> str:
    """Bytes in hexadecimal; one repeated byte as `hh*count`."""
    if len(data) > 64 and data == data[:1] * len(data):
        return f"{data[:1].hex()}*{len(data)}"
    return data.hex()


if __name__ == "__main__":
    main(sys.argv[1:])
