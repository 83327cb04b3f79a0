"""Frames and segment headers: their bytes, written and read.

docs/format.md is the specification; this and `columns` (the bodies of operations) are its one writer.

What is not here: files, the search for damage (`scanner`), decisions (`recovery`).

The idea needed to read it: the header of a frame carries a CRC-32C seeded with the incarnation's salt, the segment's
number and the frame's offset: a frame found in another place, segment, store or life of the store does not validate.
"""

from __future__ import annotations

import enum
import functools
import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import zstandard

from walbatch import limits
from walbatch.core.checksum import crc32c

FORMAT_VERSION: Final = 1
SEGMENT_MAGIC: Final = b"\x89WBSEG\r\n"
FRAME_MAGIC: Final = b"\x8eWBF"
FOOTER_MAGIC: Final = b"WBFOOTER"
CHECKSUM_CRC32C: Final = 1

SECTOR: Final = limits.SECTOR_BYTES
ZERO_SECTOR: Final = bytes(SECTOR)
_HEADER_BYTES: Final = limits.FRAME_HEADER_BYTES

_SEGMENT: Final = struct.Struct("<8sII16sQQQQQQQQQI")
_SEGMENT_CRC: Final = struct.Struct("<I")
_WALL: Final = struct.Struct("<Q")
_FRAME: Final = struct.Struct("<4sBBHQQIIIIQQ")
_FRAME_FIELDS: Final = struct.Struct(_FRAME.format + "4x")
_FRAME_CRC: Final = struct.Struct("<I")
_SEED: Final = struct.Struct("<QQQ")
_FOOTER: Final = struct.Struct("<QQQIIII")
_TRAILER: Final = struct.Struct("<Q8s")

assert _FRAME_FIELDS.size + _FRAME_CRC.size == limits.FRAME_HEADER_BYTES
assert _SEGMENT.size + _SEGMENT_CRC.size <= SECTOR


class FrameError(ValueError):
    """Bytes that are not a valid frame, footer or header. The message says which rule they break."""


class NewerFrameError(FrameError):
    """A sound frame with something in it that only a later version of the format knows."""


class FrameType(enum.IntEnum):
    """What a frame is."""

    OPERATIONS = 1
    STAMP = 2
    """Idle stamp: no body. Proves that everything up to its synced LSN was durable."""
    SEAL = 3
    """Seal footer: the segment is complete and lists its frames."""
    VOID = 4
    """A range of LSNs that names no operation: skipped at an unclean open, or lost and salvaged."""


class Codec(enum.IntEnum):
    """How a body is stored."""

    RAW = 0
    ZSTD = 1


FLAG_CLEAN: Final = 1
"""On a stamp: the engine closed cleanly, and the first LSN is the next one to hand out."""
FLAG_COPIED: Final = 2
"""On a frame of operations: copied forward from the unproven tail of an earlier segment."""
FLAG_LOST: Final = 4
"""On a void: the LSNs may have named acknowledged operations, given up by a salvage."""
_FLAGS_KNOWN: Final = FLAG_CLEAN | FLAG_COPIED | FLAG_LOST

SEGMENT_COMPACTED: Final = 1
"""Of a segment: it was rewritten without operations that are settled, so its frames may have holes."""
SEGMENT_OPTIONS: Final = 2
"""Of a segment: its bodies may have the columns of options."""
_SEGMENT_FLAGS_KNOWN: Final = SEGMENT_COMPACTED | SEGMENT_OPTIONS


def aligned(size: int) -> int:
    """`size` rounded up to whole sectors."""
    return -(-size // SECTOR) * SECTOR


# --- segment header ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentHeader:
    """The first sector of a segment.

    `prev_last_lsn` cuts the previous segment off: what it holds above that was copied here, or never
    acknowledged. `first_lsn` is always prev_last_lsn + 1. `checkpointed_lsn` is the watermark that was
    durable when the segment was made.
    """

    store: bytes
    salt: int
    epoch: int
    number: int
    first_lsn: int
    prev_number: int
    prev_salt: int
    prev_last_lsn: int
    operations_before: int
    """Operations in all earlier segments, trimmed ones included."""
    checkpointed_lsn: int
    created_wall_ns: int
    flags: int = 0

    @property
    def compacted(self) -> bool:
        """Whether it was rewritten: it is sealed, was synced as a whole, and its frames may have holes."""
        return bool(self.flags & SEGMENT_COMPACTED)


def encode_segment_header(header: SegmentHeader) -> bytes:
    """One sector. The CRC covers all of it."""
    fields = _SEGMENT.pack(
        SEGMENT_MAGIC, FORMAT_VERSION, header.flags, header.store, header.salt, header.epoch, header.number, header.first_lsn,
        header.prev_number, header.prev_salt, header.prev_last_lsn, header.operations_before, header.checkpointed_lsn,
        CHECKSUM_CRC32C,
    )  # fmt: skip
    body = (fields + _WALL.pack(header.created_wall_ns)).ljust(SECTOR - _SEGMENT_CRC.size, b"\0")
    return body + _SEGMENT_CRC.pack(crc32c(body, 0))


class HeaderState(enum.StrEnum):
    """What the first sector of a segment file is. Magic, CRC and version are three different answers."""

    VALID = "valid"
    SHORT = "short"
    NO_MAGIC = "no magic"
    BAD_CRC = "bad crc"
    NEWER_VERSION = "newer version"
    INVALID = "invalid"


def decode_segment_header(sector: bytes) -> tuple[HeaderState, SegmentHeader | None]:
    """Check length, CRC, magic and version, in this order.

    The CRC stands at the same place in every version of the format, so that a flipped bit in the version is
    corruption and not a newer version.
    """
    if len(sector) < SECTOR:
        return HeaderState.SHORT, None
    body, (crc,) = (
        sector[: SECTOR - _SEGMENT_CRC.size],
        _SEGMENT_CRC.unpack_from(sector, SECTOR - _SEGMENT_CRC.size),
    )
    crc_valid = crc32c(body, 0) == crc
    if not sector.startswith(SEGMENT_MAGIC):
        return HeaderState.NO_MAGIC, None
    if not crc_valid:
        return HeaderState.BAD_CRC, None
    (_, version, flags, store, salt, epoch, number, first_lsn, prev_number, prev_salt, prev_last_lsn, before,
     checkpointed_lsn, algorithm) = _SEGMENT.unpack_from(body)  # fmt: skip
    if version != FORMAT_VERSION or algorithm != CHECKSUM_CRC32C or flags & ~_SEGMENT_FLAGS_KNOWN:
        return HeaderState.NEWER_VERSION, None
    (created_wall_ns,) = _WALL.unpack_from(body, _SEGMENT.size)
    if first_lsn != prev_last_lsn + 1 or first_lsn > limits.LSN_MAX or prev_number >= number:
        return HeaderState.INVALID, None
    if max(epoch, number, before, checkpointed_lsn) > limits.LSN_MAX:
        return HeaderState.INVALID, None  # what follows from them would not fit into the next header
    return HeaderState.VALID, SegmentHeader(
        store=store, salt=salt, epoch=epoch, number=number, first_lsn=first_lsn, prev_number=prev_number,
        prev_salt=prev_salt, prev_last_lsn=prev_last_lsn, operations_before=before, checkpointed_lsn=checkpointed_lsn,
        created_wall_ns=created_wall_ns, flags=flags,
    )  # fmt: skip


# --- frame header -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameHeader:
    """The fixed part of a frame. `span` LSNs from `first_lsn` on belong to it; `count` of them name operations."""

    type: FrameType
    codec: Codec
    flags: int
    first_lsn: int
    synced_lsn: int
    count: int
    stored_bytes: int
    raw_bytes: int
    body_crc: int
    span: int
    wall_ns: int

    @property
    def last_lsn(self) -> int:
        """The last LSN of the frame; first_lsn - 1 where it has none."""
        return self.first_lsn + self.span - 1

    @property
    def total_bytes(self) -> int:
        """Header, body and padding."""
        return aligned(limits.FRAME_HEADER_BYTES + self.stored_bytes)


def frame_seed(salt: int, number: int, offset: int) -> int:
    """The seed of the header's CRC: binds a frame to the incarnation, the segment and the offset."""
    return crc32c(_SEED.pack(salt, number, offset), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """An encoded body with its padding: everything of a frame that does not depend on where it goes.

    `parts`: the stored body and its padding, to be written one after the other. They are never joined, since a copy of a
    large body costs more than its sum.
    """

    codec: Codec
    count: int
    stored_bytes: int
    raw_bytes: int
    parts: tuple[bytes, ...]
    crc: int

    @property
    def padded(self) -> bytes:
        """Body and padding in one piece."""
        return b"".join(self.parts)

    @property
    def total_bytes(self) -> int:
        """Bytes of the frame that will hold this body."""
        return aligned(_HEADER_BYTES + self.stored_bytes)


def pad_body(stored: bytes, *, codec: Codec, count: int, raw_bytes: int, trailer: bytes = b"") -> Body:
    """Pad a stored body to the sector; the body's CRC covers the padding too. A trailer stands at its very end."""
    stored_bytes = len(stored) + len(trailer)
    tail = ZERO_SECTOR[: -(_HEADER_BYTES + stored_bytes) % SECTOR] + trailer
    return Body(
        codec=codec, count=count, stored_bytes=stored_bytes, raw_bytes=raw_bytes,
        parts=(stored, tail), crc=crc32c(tail, crc32c(stored, 0)),
    )  # fmt: skip


EMPTY_BODY: Final = pad_body(b"", codec=Codec.RAW, count=0, raw_bytes=0)


def encode_frame_header(
    body: Body,
    *,
    type: FrameType,
    first_lsn: int,
    span: int,
    synced_lsn: int,
    wall_ns: int,
    seed: int,
    flags: int = 0,
) -> bytes:
    """The 64 bytes before a body."""
    fields = _FRAME_FIELDS.pack(
        FRAME_MAGIC, type, body.codec, flags, first_lsn, synced_lsn, body.count, body.stored_bytes, body.raw_bytes,
        body.crc, span, wall_ns,
    )  # fmt: skip
    return fields + _FRAME_CRC.pack(crc32c(fields, seed))


def decode_frame_header(data: bytes, *, seed: int) -> FrameHeader:
    """Check magic, CRC and every limit. Raises FrameError. Nothing in a header is believed before its CRC holds."""
    if len(data) < limits.FRAME_HEADER_BYTES:
        raise FrameError("frame header cut short")
    if not data.startswith(FRAME_MAGIC):
        raise FrameError("no frame magic")
    crc_at = limits.FRAME_HEADER_BYTES - _FRAME_CRC.size
    if crc32c(data[:crc_at], seed) != _FRAME_CRC.unpack_from(data, crc_at)[0]:
        raise FrameError("frame header does not match its CRC")
    (_, type_, codec, flags, first_lsn, synced_lsn, count, stored_bytes, raw_bytes, body_crc, span,
     wall_ns) = _FRAME.unpack_from(data)  # fmt: skip
    if type_ not in _TYPES or codec not in _CODECS or flags & ~_FLAGS_KNOWN:
        raise FrameError(f"unknown frame type {type_}, codec {codec} or flags {flags:#x}")
    if first_lsn == 0 or first_lsn + span > limits.LSN_MAX or synced_lsn > limits.LSN_MAX:
        raise FrameError(f"LSN {first_lsn} out of range")
    ceiling = limits.FOOTER_RAW_BYTES_MAX if type_ == FrameType.SEAL else limits.FRAME_RAW_BYTES_MAX
    if count > limits.FRAME_COUNT_MAX or raw_bytes > ceiling or stored_bytes > ceiling + SECTOR:
        raise FrameError("count or length over its limit")
    spans = {FrameType.OPERATIONS: 0 < count <= span, FrameType.VOID: count == 0 < span}
    if not spans.get(type_, count == span == 0):
        raise FrameError(f"frame of type {type_} with {count} operations over {span} LSNs")
    return FrameHeader(
        type=FrameType(type_), codec=Codec(codec), flags=flags, first_lsn=first_lsn, synced_lsn=synced_lsn, count=count,
        stored_bytes=stored_bytes, raw_bytes=raw_bytes, body_crc=body_crc, span=span, wall_ns=wall_ns,
    )  # fmt: skip


_TYPES: Final = frozenset(FrameType)
_CODECS: Final = frozenset(Codec)


def check_body(header: FrameHeader, padded: bytes | memoryview) -> None:
    """Whether `padded` (body and padding) is what the header's CRC was made of. Raises FrameError."""
    expected = header.total_bytes - limits.FRAME_HEADER_BYTES
    if len(padded) != expected:
        raise FrameError(f"frame body cut short: {len(padded)} of {expected} bytes")
    if crc32c(padded, 0) != header.body_crc:
        raise FrameError("frame body does not match its CRC")


def inflate(header: FrameHeader, stored: bytes | memoryview) -> bytes:
    """The raw body of a zstd frame. Bounded by the header's raw length, which has been checked against its limit."""
    try:
        # The decompressor allocates what the zstd frame says that it holds, whatever max_output_size is.
        if zstandard.get_frame_parameters(stored).content_size != header.raw_bytes:
            raise FrameError("zstd body that does not say its length, or another one")
        return zstandard.ZstdDecompressor(max_window_size=2**27).decompress(
            stored, max_output_size=header.raw_bytes, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise FrameError(f"zstd: {error}") from error


# --- the table of kinds -------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2 * limits.KINDS_MAX)
def encode_kinds(kinds: tuple[str, ...]) -> bytes:
    """The names, each behind its length. Remembered, since the same few stand in every frame."""
    return b"".join(bytes((len(name),)) + name for name in (kind.encode() for kind in kinds))


def decode_kinds(
    raw: bytes, at: int, kind_count: int, names_bytes: int, *, raw_end: int
) -> tuple[tuple[str, ...], int]:
    """The names of the kinds in what ends at `raw_end`, and where they end. Raises FrameError."""
    end = at + names_bytes
    if not 0 < kind_count <= limits.KINDS_MAX or end > raw_end:
        raise FrameError("table of kinds out of range")
    kinds: list[str] = []
    for _ in range(kind_count):
        size = raw[at] if at < end else 0
        if not 0 < size <= limits.KIND_BYTES_MAX or at + 1 + size > end:
            raise FrameError("name of a kind out of range")
        try:
            kinds.append(raw[at + 1 : at + 1 + size].decode())
        except UnicodeDecodeError as error:
            raise FrameError("name of a kind is not UTF-8") from error
        at += 1 + size
    if at != end or len(set(kinds)) != kind_count:
        raise FrameError("table of kinds not exact")
    return tuple(kinds), end


# --- seal footer ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameIndex:
    """Every frame of a sealed segment: where it starts, its first LSN, its operations by kind, its highest priority.

    `kinds` names the kinds; `counts` is a matrix, one row per frame, one column per kind.
    """

    last_lsn: int
    operation_count: int
    kinds: tuple[str, ...]
    offsets: Sequence[int]
    first_lsns: Sequence[int]
    priorities: Sequence[int]
    counts: Sequence[int]

    def kind_totals(self) -> dict[str, int]:
        """Operations of the segment by kind."""
        width = len(self.kinds)
        return {kind: sum(self.counts[column::width]) for column, kind in enumerate(self.kinds)}


def encode_footer(index: FrameIndex, *, offset: int) -> Body:
    """The body of a seal frame that will stand at `offset`. Its last 16 bytes say where it starts."""
    names = encode_kinds(index.kinds)
    sectors = array("I", [at // SECTOR for at in index.offsets])
    arrays = (sectors, array("Q", index.first_lsns), array("B", index.priorities), array("I", index.counts))
    if sys.byteorder == "big":  # pragma: no cover - the format is little-endian
        for column in arrays:
            column.byteswap()
    raw = b"".join(
        (
            _FOOTER.pack(
                index.last_lsn, index.operation_count, 0, len(index.offsets), len(index.kinds), len(names), 0
            ),
            names,
            *(column.tobytes() for column in arrays),
        )
    )
    packed = zstandard.ZstdCompressor(level=1).compress(raw)
    return pad_body(
        packed, codec=Codec.ZSTD, count=0, raw_bytes=len(raw), trailer=_TRAILER.pack(offset, FOOTER_MAGIC)
    )


def footer_offset(tail: bytes) -> int | None:
    """Where the seal frame of a segment starts, told by the segment's last 16 bytes; None where they do not tell."""
    offset, magic = _TRAILER.unpack(tail) if len(tail) == _TRAILER.size else (0, b"")
    return offset if magic == FOOTER_MAGIC and offset % SECTOR == 0 and offset else None


TRAILER_BYTES: Final = _TRAILER.size


def decode_footer(header: FrameHeader, padded: bytes) -> FrameIndex:
    """Check and decode the body of a seal frame. Raises FrameError."""
    check_body(header, padded)
    if (
        header.type is not FrameType.SEAL
        or header.codec is not Codec.ZSTD
        or header.stored_bytes < _TRAILER.size
    ):
        raise FrameError("not a seal footer")
    raw = inflate(header, padded[: header.stored_bytes - _TRAILER.size])
    try:
        last_lsn, operations, _, frames, kind_count, names_bytes, _ = _FOOTER.unpack_from(raw)
    except struct.error as error:
        raise FrameError("footer cut short") from error
    at = _FOOTER.size
    kinds: tuple[str, ...] = ()
    if kind_count:
        kinds, at = decode_kinds(raw, at, kind_count, names_bytes, raw_end=len(raw))
    if len(raw) != at + frames * (4 + 8 + 1 + 4 * len(kinds)):
        raise FrameError("footer's lengths do not add up")
    columns: list[array[int]] = []
    for code, items in (("I", frames), ("Q", frames), ("B", frames), ("I", frames * len(kinds))):
        column = array(code)
        column.frombytes(raw[at : at + items * column.itemsize])
        if sys.byteorder == "big":  # pragma: no cover - the format is little-endian
            column.byteswap()
        at += items * column.itemsize
        columns.append(column)
    sectors, first_lsns, priorities, counts = columns
    if any(a >= b for a, b in pairwise(sectors)) or (sectors and sectors[0] == 0):
        raise FrameError("footer's offsets do not ascend")
    return FrameIndex(
        last_lsn=last_lsn, operation_count=operations, kinds=kinds, offsets=[sector * SECTOR for sector in sectors],
        first_lsns=first_lsns, priorities=priorities, counts=counts,
    )  # fmt: skip
