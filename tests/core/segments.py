"""Segments built in memory out of frames, and the ways to damage them. For the tests of the core."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

from walbatch import limits
from walbatch.core.columns import Columns, encode_body
from walbatch.core.frame import (
    EMPTY_BODY,
    FLAG_CLEAN,
    FLAG_LOST,
    SECTOR,
    Body,
    FrameHeader,
    FrameIndex,
    FrameType,
    SegmentHeader,
    decode_frame_header,
    encode_footer,
    encode_frame_header,
    encode_segment_header,
    frame_seed,
)
from walbatch.core.scanner import Read, SegmentScan, Visit, scan_segment

STORE = bytes(range(16))


def segment_header(
    *,
    number: int = 1,
    prev_last_lsn: int = 0,
    store: bytes = STORE,
    salt: int = 7,
    epoch: int = 1,
    prev_number: int | None = None,
    prev_salt: int = 7,
    operations_before: int = 0,
    checkpointed_lsn: int = 0,
) -> SegmentHeader:
    """A header with all that a test does not care about filled in."""
    return SegmentHeader(
        store=store,
        salt=salt,
        epoch=epoch,
        number=number,
        first_lsn=prev_last_lsn + 1,
        prev_number=number - 1 if prev_number is None else prev_number,
        prev_salt=prev_salt,
        prev_last_lsn=prev_last_lsn,
        operations_before=operations_before,
        checkpointed_lsn=checkpointed_lsn,
        created_wall_ns=0,
    )


def columns_of(payloads: Sequence[bytes], *, keys: Sequence[bytes] | None = None) -> Columns:
    """Operations of one kind and normal priority."""
    return Columns(
        kinds=("put",),
        kind_indexes=[0] * len(payloads),
        priorities=[5] * len(payloads),
        keys=list(keys) if keys is not None else [b"key"] * len(payloads),
        payloads=list(payloads),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A frame and where it stands."""

    offset: int
    header: FrameHeader

    @property
    def end(self) -> int:
        return self.offset + self.header.total_bytes


class Segment:
    """A segment in the making. `synced_lsn=None` says that everything before the frame was durable."""

    def __init__(self, header: SegmentHeader | None = None) -> None:
        self.header = header or segment_header()
        self.data = bytearray(encode_segment_header(self.header))
        self.frames: list[Placed] = []
        self.last_lsn = self.header.prev_last_lsn

    def put(
        self,
        body: Body,
        *,
        type_: FrameType,
        span: int,
        synced_lsn: int | None = None,
        flags: int = 0,
        first_lsn: int | None = None,
    ) -> Placed:
        offset = len(self.data)
        head = encode_frame_header(
            body,
            type=type_,
            first_lsn=self.last_lsn + 1 if first_lsn is None else first_lsn,
            span=span,
            synced_lsn=self.last_lsn if synced_lsn is None else synced_lsn,
            wall_ns=1,
            seed=self.seed(offset),
            flags=flags,
        )
        self.data += head + body.padded
        placed = Placed(offset=offset, header=decode_frame_header(head, seed=self.seed(offset)))
        self.frames.append(placed)
        self.last_lsn = placed.header.last_lsn
        return placed

    def operations(self, *payloads: bytes, synced_lsn: int | None = None) -> Placed:
        body = encode_body(columns_of(payloads))
        return self.put(body, type_=FrameType.OPERATIONS, span=len(payloads), synced_lsn=synced_lsn)

    def stamp(self, *, clean: bool = False, synced_lsn: int | None = None) -> Placed:
        flags = FLAG_CLEAN if clean else 0
        return self.put(EMPTY_BODY, type_=FrameType.STAMP, span=0, synced_lsn=synced_lsn, flags=flags)

    def void(self, span: int, *, lost: bool = False, synced_lsn: int | None = None) -> Placed:
        flags = FLAG_LOST if lost else 0
        return self.put(EMPTY_BODY, type_=FrameType.VOID, span=span, synced_lsn=synced_lsn, flags=flags)

    def seal(self) -> Placed:
        body = encode_footer(self.index(), offset=len(self.data))
        return self.put(body, type_=FrameType.SEAL, span=0)

    def index(self) -> FrameIndex:
        return FrameIndex(
            last_lsn=self.last_lsn,
            operation_count=sum(frame.header.count for frame in self.frames),
            kinds=("put",),
            offsets=[frame.offset for frame in self.frames],
            first_lsns=array("Q", [frame.header.first_lsn for frame in self.frames]),
            priorities=array("B", [5] * len(self.frames)),
            counts=array("I", [frame.header.count for frame in self.frames]),
        )

    def preallocated(self, sectors: int) -> Segment:
        self.data += bytes(sectors * SECTOR)
        return self

    def seed(self, offset: int) -> int:
        return frame_seed(self.header.salt, self.header.number, offset)

    def bytes_of(self, frame: Placed) -> bytes:
        return bytes(self.data[frame.offset : frame.end])


def reader(data: bytes | bytearray) -> Read:
    """A file that holds `data`."""
    held = bytes(data)

    def read(size: int, offset: int) -> bytes:
        return held[offset : offset + size]

    return read


def scan(
    data: bytes | bytearray,
    header: SegmentHeader,
    *,
    lsn_bound: int | None = None,
    visit: Visit | None = None,
) -> SegmentScan:
    return scan_segment(reader(data), header=header, file_bytes=len(data), lsn_bound=lsn_bound, visit=visit)


def flipped(data: bytes | bytearray, at: int, mask: int = 1) -> bytes:
    """`data` with the bits of `mask` flipped in the byte at `at`."""
    changed = bytearray(data)
    changed[at] ^= mask
    return bytes(changed)


def zeroed(data: bytes | bytearray, at: int, size: int = SECTOR) -> bytes:
    """`data` with zeros from `at` on, no longer than it was."""
    size = min(size, len(data) - at)
    return bytes(data[:at]) + bytes(size) + bytes(data[at + size :])


def overwritten(data: bytes | bytearray, at: int, piece: bytes) -> bytes:
    """`data` with `piece` written at `at`."""
    return bytes(data[:at]) + piece + bytes(data[at + len(piece) :])


def with_header(frame: bytes, header: FrameHeader, *, seed: int) -> bytes:
    """The bytes of a frame under another header, its CRC made right."""
    body = Body(
        codec=header.codec,
        count=header.count,
        stored_bytes=header.stored_bytes,
        raw_bytes=header.raw_bytes,
        parts=(frame[limits.FRAME_HEADER_BYTES :],),
        crc=header.body_crc,
    )
    head = encode_frame_header(
        body,
        type=header.type,
        first_lsn=header.first_lsn,
        span=header.span,
        synced_lsn=header.synced_lsn,
        wall_ns=header.wall_ns,
        seed=seed,
        flags=header.flags,
    )
    return head + body.padded


def renumbered(header: SegmentHeader, **changes: int | bytes) -> SegmentHeader:
    """The header of another segment, store or incarnation."""
    return replace(header, **changes)  # type: ignore[arg-type]
