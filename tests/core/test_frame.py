"""Frames, footers and segment headers: what is written is read back, and nothing else is ever accepted."""

from __future__ import annotations

import struct
import tracemalloc
from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tests.core.segments import STORE, columns_of, flipped, segment_header
from walbatch import limits
from walbatch.core.checksum import crc32c
from walbatch.core.columns import Column, Columns, decode_body, encode_body, encoded_bytes_max
from walbatch.core.compression import Compressor
from walbatch.core.frame import (
    EMPTY_BODY,
    FLAG_COPIED,
    FORMAT_VERSION,
    FRAME_MAGIC,
    SECTOR,
    SEGMENT_MAGIC,
    TRAILER_BYTES,
    Body,
    Codec,
    FrameError,
    FrameHeader,
    FrameIndex,
    FrameType,
    HeaderState,
    SegmentHeader,
    check_body,
    decode_footer,
    decode_frame_header,
    decode_segment_header,
    encode_footer,
    encode_frame_header,
    encode_segment_header,
    footer_offset,
    frame_seed,
    pad_body,
)

HEADER_BYTES = limits.FRAME_HEADER_BYTES
SEED = frame_seed(7, 1, SECTOR)

T = TypeVar("T")


def exactly(count: int, elements: st.SearchStrategy[T]) -> st.SearchStrategy[list[T]]:
    return st.lists(elements, min_size=count, max_size=count)


kind_names = st.lists(st.text(min_size=1, max_size=16), min_size=1, max_size=4, unique=True).map(tuple)


@st.composite
def operations(draw: st.DrawFn, *, count_max: int = 40) -> Columns:
    kinds = draw(kind_names)
    count = draw(st.integers(1, count_max))
    return Columns(
        kinds=kinds,
        kind_indexes=draw(exactly(count, st.integers(0, len(kinds) - 1))),
        priorities=draw(exactly(count, st.integers(0, 10))),
        keys=draw(exactly(count, st.binary(max_size=12))),
        payloads=draw(exactly(count, st.binary(max_size=12))),
    )


def plain(columns: Columns) -> tuple[object, ...]:
    """Columns as values that compare by content."""
    return (
        columns.kinds,
        list(columns.kind_indexes),
        list(columns.priorities),
        list(columns.keys),
        list(columns.payloads),
    )


def frame_of(body: Body, *, type_: FrameType = FrameType.OPERATIONS, seed: int = SEED) -> bytes:
    head = encode_frame_header(
        body, type=type_, first_lsn=1, span=body.count, synced_lsn=0, wall_ns=1, seed=seed
    )
    return head + body.padded


def decode(data: bytes, *, seed: int = SEED) -> Columns:
    header = decode_frame_header(data, seed=seed)
    return decode_body(header, data[HEADER_BYTES : header.total_bytes])


# --- operations: round trip ---------------------------------------------------------------------------------


@given(columns=operations(), compress=st.sampled_from([None, 0]))
def test_what_was_encoded_is_what_is_decoded(columns: Columns, compress: int | None) -> None:
    data = frame_of(encode_body(columns, compress_bytes_min=compress))
    assert len(data) % SECTOR == 0
    assert plain(decode(data)) == plain(columns)


WIDE = 1 << 16

SIZES = {
    "one empty operation": ([b""], [b""]),
    "one byte each": ([b"k"], [b"p"]),
    "only a key": ([b"k"], [b""]),
    "only a payload": ([b""], [b"p"]),
    "exact-limit key": ([bytes(limits.KEY_BYTES_MAX)], [b""]),
    "exact-limit payload": ([b""], [bytes(limits.PAYLOAD_BYTES_MAX)]),
    "key and payload at their limits": ([bytes(limits.KEY_BYTES_MAX)], [bytes(limits.PAYLOAD_BYTES_MAX)]),
    "lengths of one byte": ([b"", bytes(255)], [b"", bytes(255)]),
    "lengths of two bytes": ([b"", bytes(256)], [b"", bytes(WIDE - 1)]),
    "lengths of four bytes": ([b"", b""], [b"", bytes(WIDE)]),
    "as many as a frame holds": ([b""] * limits.FRAME_COUNT_MAX, [b""] * limits.FRAME_COUNT_MAX),
}


@pytest.mark.parametrize("compress", [None, 0], ids=["raw", "compressed"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_operations_of_every_permitted_size_come_back(
    size: tuple[list[bytes], list[bytes]], compress: int | None
) -> None:
    keys, payloads = size
    columns = columns_of(payloads, keys=keys)
    assert plain(decode(frame_of(encode_body(columns, compress_bytes_min=compress)))) == plain(columns)


@pytest.mark.parametrize("room", range(SECTOR - 4, SECTOR + 5))
def test_a_body_may_end_anywhere_around_a_sector_boundary(room: int) -> None:
    overhead = HEADER_BYTES + encode_body(columns_of([b""])).stored_bytes
    columns = columns_of([bytes([1]) * (room - overhead)])
    data = frame_of(encode_body(columns))
    assert len(data) == (SECTOR if room <= SECTOR else 2 * SECTOR)
    assert plain(decode(data)) == plain(columns)


@given(columns=operations())
def test_the_bound_that_is_checked_before_encoding_holds(columns: Columns) -> None:
    size = sum(map(len, columns.keys)) + sum(map(len, columns.payloads))
    assert encode_body(columns).raw_bytes <= encoded_bytes_max(size, len(columns.keys))


def test_the_bound_holds_for_the_largest_tables_and_columns() -> None:
    kinds = tuple(f"{index:064d}" for index in range(limits.KINDS_MAX))
    count = limits.KINDS_MAX
    columns = Columns(
        kinds=kinds,
        kind_indexes=range(count),
        priorities=[index % 11 for index in range(count)],
        keys=[b"", *[bytes(300)] * (count - 1)],
        payloads=[b"", *[bytes(WIDE)] * (count - 1)],
    )
    size = sum(map(len, columns.keys)) + sum(map(len, columns.payloads))
    body = encode_body(columns)
    assert body.raw_bytes <= encoded_bytes_max(size, count)
    assert plain(decode(frame_of(body))) == plain(columns)


def test_a_body_is_compressed_only_where_that_saves_a_sixteenth() -> None:
    assert encode_body(columns_of([bytes(5000)]), compress_bytes_min=1024).codec is Codec.ZSTD
    assert encode_body(columns_of([bytes(5000)]), compress_bytes_min=6000).codec is Codec.RAW
    noise = b"".join(struct.pack("<I", crc32c(struct.pack("<I", index), 0)) for index in range(1000))
    assert encode_body(columns_of([noise]), compress_bytes_min=0).codec is Codec.RAW


def test_a_given_compressor_is_used() -> None:
    compressor = Compressor(level=9)
    columns = columns_of([bytes(5000)])
    body = encode_body(columns, compress_bytes_min=0, compressor=compressor)
    assert plain(decode(frame_of(body))) == plain(columns)
    raw = encode_body(columns).padded[: body.raw_bytes]
    assert body.parts[0] == zstandard.ZstdCompressor(level=9).compress(raw)


# --- headers of frames --------------------------------------------------------------------------------------

lsns = st.integers(1, limits.LSN_MAX - limits.FRAME_COUNT_MAX)


@given(
    type_=st.sampled_from(FrameType),
    codec=st.sampled_from(Codec),
    flags=st.integers(0, 7),
    first_lsn=lsns,
    synced_lsn=st.integers(0, limits.LSN_MAX),
    span=st.integers(1, limits.FRAME_COUNT_MAX),
    lengths=st.tuples(st.integers(0, limits.FRAME_RAW_BYTES_MAX), st.integers(0, limits.FRAME_RAW_BYTES_MAX)),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_frame_header_comes_back_field_by_field(
    type_: FrameType,
    codec: Codec,
    flags: int,
    first_lsn: int,
    synced_lsn: int,
    span: int,
    lengths: tuple[int, int],
    seed: int,
) -> None:
    count = span if type_ is FrameType.OPERATIONS else 0
    span = span if type_ in {FrameType.OPERATIONS, FrameType.VOID} else 0
    body = Body(codec=codec, count=count, stored_bytes=lengths[0], raw_bytes=lengths[1], parts=(), crc=9)
    head = encode_frame_header(
        body,
        type=type_,
        first_lsn=first_lsn,
        span=span,
        synced_lsn=synced_lsn,
        wall_ns=3,
        seed=seed,
        flags=flags,
    )
    assert len(head) == HEADER_BYTES
    assert decode_frame_header(head, seed=seed) == FrameHeader(
        type=type_,
        codec=codec,
        flags=flags,
        first_lsn=first_lsn,
        synced_lsn=synced_lsn,
        count=count,
        stored_bytes=lengths[0],
        raw_bytes=lengths[1],
        body_crc=9,
        span=span,
        wall_ns=3,
    )


def test_the_last_lsn_of_a_frame_without_lsns_is_the_one_before_it() -> None:
    header = decode_frame_header(frame_of(EMPTY_BODY, type_=FrameType.STAMP), seed=SEED)
    assert (header.first_lsn, header.last_lsn, header.total_bytes) == (1, 0, SECTOR)


@pytest.mark.parametrize(
    "payloads", [[b""], [b"payload"] * 3, [bytes(700)]], ids=["empty", "three", "compressed"]
)
def test_a_single_flipped_bit_anywhere_in_a_frame_is_rejected(payloads: list[bytes]) -> None:
    data = frame_of(encode_body(columns_of(payloads), compress_bytes_min=600))
    for bit in range(8 * len(data)):
        with pytest.raises(FrameError):
            decode(flipped(data, bit // 8, 1 << bit % 8))


def test_a_frame_is_valid_only_for_its_incarnation_segment_and_offset() -> None:
    data = frame_of(encode_body(columns_of([b"payload"])), seed=frame_seed(7, 1, 512))
    decode(data, seed=frame_seed(7, 1, 512))
    for elsewhere in (frame_seed(8, 1, 512), frame_seed(7, 2, 512), frame_seed(7, 1, 1024)):
        with pytest.raises(FrameError, match="CRC"):
            decode(data, seed=elsewhere)


@pytest.mark.parametrize("size", [0, 1, HEADER_BYTES - 1])
def test_a_header_cut_short_is_rejected(size: int) -> None:
    with pytest.raises(FrameError, match="cut short"):
        decode_frame_header(frame_of(EMPTY_BODY)[:size], seed=SEED)


@pytest.mark.parametrize("size", [0, 1, SECTOR - HEADER_BYTES - 1, SECTOR])
def test_a_body_of_another_length_is_rejected(size: int) -> None:
    header = decode_frame_header(frame_of(encode_body(columns_of([b""]))), seed=SEED)
    with pytest.raises(FrameError, match="cut short"):
        check_body(header, bytes(size))


def test_zeros_are_no_frame() -> None:
    with pytest.raises(FrameError, match="magic"):
        decode_frame_header(bytes(SECTOR), seed=SEED)


def raw_header(
    *,
    type_: int = 1,
    codec: int = 0,
    flags: int = 0,
    first_lsn: int = 1,
    synced_lsn: int = 0,
    count: int = 1,
    stored_bytes: int = 0,
    raw_bytes: int = 0,
    span: int = 1,
) -> bytes:
    """A header with a valid CRC whatever stands in it: what a hostile or mad writer would leave."""
    fields = struct.pack(
        "<4sBBHQQIIIIQQ", FRAME_MAGIC, type_, codec, flags, first_lsn, synced_lsn, count, stored_bytes, raw_bytes,
        0, span, 0,
    ).ljust(HEADER_BYTES - 4, b"\0")  # fmt: skip
    return fields + struct.pack("<I", crc32c(fields, SEED))


HOSTILE_HEADERS = {
    "unknown type": raw_header(type_=5),
    "type zero": raw_header(type_=0),
    "unknown codec": raw_header(codec=2),
    "unknown flag": raw_header(flags=8),
    "LSN zero": raw_header(first_lsn=0),
    "LSN beyond the last": raw_header(first_lsn=limits.LSN_MAX),
    "LSN that wraps": raw_header(type_=4, first_lsn=2**63, count=0, span=2**63),
    "void that wraps": raw_header(type_=4, first_lsn=2, count=0, span=2**64 - 1),
    "synced LSN beyond the last": raw_header(synced_lsn=limits.LSN_MAX + 1),
    "more operations than a frame holds": raw_header(
        count=limits.FRAME_COUNT_MAX + 1, span=limits.FRAME_COUNT_MAX + 1
    ),
    "2^32 - 1 operations": raw_header(count=2**32 - 1, span=2**32 - 1),
    "body of 4 GiB": raw_header(stored_bytes=2**32 - 1),
    "body that unpacks to 4 GiB": raw_header(raw_bytes=2**32 - 1),
    "body a byte over its limit": raw_header(raw_bytes=limits.FRAME_RAW_BYTES_MAX + 1),
    "footer of 4 GiB": raw_header(type_=3, count=0, span=0, raw_bytes=2**32 - 1),
    "no operations": raw_header(count=0, span=0),
    "operations over fewer LSNs": raw_header(count=2, span=1),
    "void with operations": raw_header(type_=4, count=1, span=1),
    "void over nothing": raw_header(type_=4, count=0, span=0),
    "stamp with operations": raw_header(type_=2, count=1, span=1),
    "stamp over LSNs": raw_header(type_=2, count=0, span=1),
    "seal over LSNs": raw_header(type_=3, count=0, span=1),
}


@pytest.mark.parametrize("data", HOSTILE_HEADERS.values(), ids=HOSTILE_HEADERS.keys())
def test_a_header_that_lies_is_rejected_although_its_crc_is_right(data: bytes) -> None:
    with pytest.raises(FrameError):
        decode_frame_header(data, seed=SEED)


@given(data=st.binary(max_size=200), valid_magic=st.booleans())
def test_arbitrary_bytes_are_no_header(data: bytes, *, valid_magic: bool) -> None:
    with pytest.raises(FrameError):
        decode_frame_header(FRAME_MAGIC + data if valid_magic else data, seed=SEED)


# --- bodies that lie ----------------------------------------------------------------------------------------


def hostile_frame(
    raw: bytes, *, count: int = 1, codec: Codec = Codec.RAW, raw_bytes: int | None = None
) -> tuple[FrameHeader, bytes]:
    """A frame with valid CRCs around whatever body."""
    body = pad_body(raw, codec=codec, count=count, raw_bytes=len(raw) if raw_bytes is None else raw_bytes)
    header = FrameHeader(
        type=FrameType.OPERATIONS,
        codec=codec,
        flags=0,
        first_lsn=1,
        synced_lsn=0,
        count=count,
        stored_bytes=body.stored_bytes,
        raw_bytes=body.raw_bytes,
        body_crc=body.crc,
        span=count,
        wall_ns=0,
    )
    return header, body.padded


def body_bytes(
    *entries: tuple[int, int, int, int],
    names: bytes = b"\x03put",
    kind_count: int = 1,
    names_bytes: int | None = None,
    columns: int | None = None,
    tail: bytes = b"",
) -> bytes:
    """A raw body out of parts that need not fit: directory entries are (id, width, reserved, constant)."""
    return b"".join(
        (
            struct.pack(
                "<HHI",
                kind_count,
                len(entries) if columns is None else columns,
                len(names) if names_bytes is None else names_bytes,
            ),
            *(struct.pack("<BBHQ", *entry) for entry in entries),
            names,
            tail,
        )
    )


KEY, PAYLOAD = (Column.KEY_BYTES, 0, 0, 0), (Column.PAYLOAD_BYTES, 0, 0, 0)
HUGE = 2**64 - 1

HOSTILE_BODIES = {
    "empty": b"",
    "shorter than its own header": bytes(7),
    "directory cut short": body_bytes(KEY, names=b"", columns=2),
    "65,535 columns": body_bytes(KEY, PAYLOAD, columns=65_535),
    "65,535 columns with room for them": body_bytes(*[KEY] * 70, columns=65_535),
    "no columns": body_bytes(),
    "no lengths of keys": body_bytes(PAYLOAD),
    "no lengths of payloads": body_bytes(KEY),
    "unknown column": body_bytes(KEY, PAYLOAD, (10, 0, 0, 0)),
    "column twice": body_bytes(KEY, PAYLOAD, KEY),
    "reserved field set": body_bytes(KEY, (Column.PAYLOAD_BYTES, 0, 1, 0)),
    "width three": body_bytes(KEY, (Column.PAYLOAD_BYTES, 3, 0, 0), tail=bytes(3)),
    "width 255": body_bytes(KEY, (Column.PAYLOAD_BYTES, 255, 0, 0), tail=bytes(255)),
    "array and constant": body_bytes(KEY, (Column.PAYLOAD_BYTES, 1, 0, 1), tail=b"\x00"),
    "array cut short": body_bytes(KEY, (Column.PAYLOAD_BYTES, 4, 0, 0), tail=bytes(3)),
    "no kinds": body_bytes(KEY, PAYLOAD, names=b"", kind_count=0),
    "more kinds than a store has": body_bytes(KEY, PAYLOAD, kind_count=limits.KINDS_MAX + 1),
    "names beyond the body": body_bytes(KEY, PAYLOAD, names_bytes=2**32 - 1),
    "names longer than said": body_bytes(KEY, PAYLOAD, names_bytes=3),
    "names shorter than said": body_bytes(KEY, PAYLOAD, names=b"\x03put\x00"),
    "more names than bytes": body_bytes(KEY, PAYLOAD, kind_count=2),
    "name of no bytes": body_bytes(KEY, PAYLOAD, names=b"\x00"),
    "name over its limit": body_bytes(KEY, PAYLOAD, names=bytes((65,)) + b"n" * 65),
    "name that leaves the table": body_bytes(KEY, PAYLOAD, names=b"\x09put"),
    "name that is not UTF-8": body_bytes(KEY, PAYLOAD, names=b"\x01\xff"),
    "same name twice": body_bytes(KEY, PAYLOAD, names=b"\x03put\x03put", kind_count=2),
    "kind out of the table": body_bytes(KEY, PAYLOAD, (Column.KIND, 0, 0, 1)),
    "priority eleven": body_bytes(KEY, PAYLOAD, (Column.PRIORITY, 0, 0, 11)),
    "key over its limit": body_bytes(
        (Column.KEY_BYTES, 0, 0, limits.KEY_BYTES_MAX + 1), PAYLOAD, tail=bytes(5000)
    ),
    "key of 2^64 - 1 bytes": body_bytes((Column.KEY_BYTES, 0, 0, HUGE), PAYLOAD),
    "payload of 2^64 - 1 bytes": body_bytes(KEY, (Column.PAYLOAD_BYTES, 0, 0, HUGE)),
    "payload of 2^64 - 1 bytes in an array": body_bytes(
        KEY, (Column.PAYLOAD_BYTES, 8, 0, 0), tail=b"\xff" * 8
    ),
    "a byte too many": body_bytes(KEY, PAYLOAD, tail=b"\x00"),
    "a byte too few": body_bytes((Column.KEY_BYTES, 0, 0, 1), PAYLOAD),
}


@pytest.mark.parametrize("codec", Codec, ids=lambda codec: codec.name)
@pytest.mark.parametrize("raw", HOSTILE_BODIES.values(), ids=HOSTILE_BODIES.keys())
def test_a_body_that_lies_is_rejected_although_its_crcs_are_right(raw: bytes, codec: Codec) -> None:
    stored = raw if codec is Codec.RAW else zstandard.ZstdCompressor().compress(raw)
    with pytest.raises(FrameError):
        decode_body(*hostile_frame(stored, codec=codec, raw_bytes=len(raw)))


def test_the_parts_that_the_lies_are_made_of_are_valid_when_they_fit() -> None:
    raw = body_bytes((Column.KEY_BYTES, 8, 0, 0), (Column.PAYLOAD_BYTES, 0, 0, 2), tail=bytes(8) + b"pp")
    assert plain(decode_body(*hostile_frame(raw))) == (("put",), [0], [5], [b""], [b"pp"])


@given(
    raw=st.binary(max_size=300), count=st.integers(1, limits.FRAME_COUNT_MAX), codec=st.sampled_from(Codec)
)
def test_arbitrary_bytes_under_valid_crcs_decode_or_raise_a_frame_error(
    raw: bytes, count: int, codec: Codec
) -> None:
    try:
        columns = decode_body(*hostile_frame(raw, count=count, codec=codec))
    except FrameError:
        return
    assert len(columns.keys) == len(columns.payloads) == count


@given(columns=operations(count_max=5), at=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_a_changed_byte_under_valid_crcs_decodes_or_raises_a_frame_error(
    columns: Columns, at: int, byte: int
) -> None:
    body = encode_body(columns)
    raw = bytearray(body.padded[: body.stored_bytes])
    raw[at % len(raw)] = byte
    try:
        changed = decode_body(*hostile_frame(bytes(raw), count=body.count))
    except FrameError:
        return
    assert len(changed.keys) == len(changed.payloads) == body.count


@pytest.mark.parametrize(
    "type_", [FrameType.STAMP, FrameType.SEAL, FrameType.VOID], ids=lambda type_: type_.name
)
def test_a_frame_without_operations_has_no_columns_to_decode(type_: FrameType) -> None:
    header, padded = hostile_frame(body_bytes(KEY, PAYLOAD))
    with pytest.raises(FrameError):
        decode_body(replace(header, type=type_, count=0), padded)


def test_a_raw_body_whose_two_lengths_differ_is_rejected() -> None:
    raw = body_bytes(KEY, PAYLOAD)
    with pytest.raises(FrameError, match="lengths differ"):
        decode_body(*hostile_frame(raw, raw_bytes=len(raw) + 1))


# --- bombs --------------------------------------------------------------------------------------------------

BOMB_BYTES = 64 * limits.MIB


def zstd_claiming(content_bytes: int) -> bytes:
    """A zstd frame of a few bytes that claims to hold `content_bytes`."""
    return b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", content_bytes) + b"\x01\x00\x00"


def zstd_resized(content_bytes: int, claimed_bytes: int) -> bytes:
    """A zstd frame of `content_bytes` that claims `claimed_bytes` (both from 256 to 65,791: two bytes at offset 5)."""
    data = bytearray(zstandard.ZstdCompressor().compress(bytes(content_bytes)))
    struct.pack_into("<H", data, 5, claimed_bytes - 256)
    assert zstandard.get_frame_parameters(bytes(data)).content_size == claimed_bytes
    return bytes(data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bomb:
    stored: Callable[[], bytes]
    raw_bytes: int


BOMBS = {
    "holds more than the header says": Bomb(
        stored=lambda: zstandard.ZstdCompressor().compress(bytes(BOMB_BYTES)), raw_bytes=1000
    ),
    "holds more, and does not say how much": Bomb(
        stored=lambda: zstandard.ZstdCompressor(write_content_size=False).compress(bytes(BOMB_BYTES)),
        raw_bytes=1000,
    ),
    "claims a terabyte": Bomb(stored=lambda: zstd_claiming(2**40), raw_bytes=1000),
    "claims 2^62 bytes": Bomb(stored=lambda: zstd_claiming(2**62), raw_bytes=1000),
    "holds less than the header says": Bomb(
        stored=lambda: zstandard.ZstdCompressor().compress(bytes(10)), raw_bytes=1000
    ),
    "says the same, but holds less": Bomb(stored=lambda: zstd_claiming(1000), raw_bytes=1000),
    "says the same, but holds more": Bomb(stored=lambda: zstd_resized(2000, 1000), raw_bytes=1000),
    "is followed by a second frame": Bomb(
        stored=lambda: zstandard.ZstdCompressor().compress(bytes(1000)) * 2, raw_bytes=1000
    ),
    "is no zstd": Bomb(stored=lambda: b"no zstd", raw_bytes=1000),
    "is nothing": Bomb(stored=lambda: b"", raw_bytes=0),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_a_compressed_body_that_is_not_what_the_header_says_costs_no_memory(bomb: Bomb) -> None:
    header, padded = hostile_frame(bomb.stored(), codec=Codec.ZSTD, raw_bytes=bomb.raw_bytes)
    tracemalloc.start()
    try:
        with pytest.raises(FrameError):
            decode_body(header, padded)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < limits.MIB


@pytest.mark.parametrize(
    "extra", [b"\0", zstandard.ZstdCompressor().compress(b"more")], ids=["a byte", "a frame"]
)
def test_nothing_may_follow_the_compressed_body(extra: bytes) -> None:
    raw = body_bytes(KEY, PAYLOAD)
    stored = zstandard.ZstdCompressor().compress(raw)
    assert list(decode_body(*hostile_frame(stored, codec=Codec.ZSTD, raw_bytes=len(raw))).keys) == [b""]
    with pytest.raises(FrameError, match="zstd"):
        decode_body(*hostile_frame(stored + extra, codec=Codec.ZSTD, raw_bytes=len(raw)))


# --- seal footers -------------------------------------------------------------------------------------------


@st.composite
def indexes(draw: st.DrawFn) -> FrameIndex:
    frames = draw(st.integers(0, 20))
    kinds = draw(kind_names) if frames else ()
    numbers = st.integers(0, 2**32 - 1)
    return FrameIndex(
        last_lsn=draw(lsns),
        operation_count=draw(st.integers(0, 2**40)),
        kinds=kinds,
        offsets=[
            SECTOR * sector
            for sector in sorted(draw(st.sets(st.integers(1, 2**21), min_size=frames, max_size=frames)))
        ],
        first_lsns=array("Q", draw(exactly(frames, lsns))),
        priorities=array("B", draw(exactly(frames, st.integers(0, 10)))),
        counts=array("I", draw(exactly(frames * len(kinds), numbers))),
    )


def footer_frame(index: FrameIndex) -> bytes:
    return frame_of(encode_footer(index, offset=SECTOR), type_=FrameType.SEAL)


def decode_footer_frame(data: bytes) -> FrameIndex:
    header = decode_frame_header(data, seed=SEED)
    return decode_footer(header, data[HEADER_BYTES:])


SMALL_INDEX = FrameIndex(
    last_lsn=3,
    operation_count=3,
    kinds=("get", "put"),
    offsets=[512, 1024],
    first_lsns=array("Q", [1, 3]),
    priorities=array("B", [5, 9]),
    counts=array("I", [2, 0, 0, 1]),
)


@given(index=indexes(), offset=st.integers(1, 2**20).map(lambda sector: sector * SECTOR))
def test_a_footer_comes_back_and_its_tail_says_where_it_starts(index: FrameIndex, offset: int) -> None:
    body = encode_footer(index, offset=offset)
    data = frame_of(body, type_=FrameType.SEAL)
    assert len(data) == body.total_bytes
    assert decode_footer_frame(data) == index
    assert footer_offset(data[-TRAILER_BYTES:]) == offset


def test_a_footer_counts_operations_by_kind() -> None:
    assert SMALL_INDEX.kind_totals() == {"get": 2, "put": 1}


def test_a_single_flipped_bit_anywhere_in_a_footer_is_rejected() -> None:
    data = footer_frame(SMALL_INDEX)
    for bit in range(8 * len(data)):
        with pytest.raises(FrameError):
            decode_footer_frame(flipped(data, bit // 8, 1 << bit % 8))


TAILS = {
    "empty": b"",
    "cut short": struct.pack("<Q8s", 512, b"WBFOOTER")[1:],
    "another magic": struct.pack("<Q8s", 512, b"WBFOOTEr"),
    "offset zero": struct.pack("<Q8s", 0, b"WBFOOTER"),
    "offset within a sector": struct.pack("<Q8s", 513, b"WBFOOTER"),
    "zeros": bytes(16),
}


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS.keys())
def test_a_tail_that_tells_no_footer(tail: bytes) -> None:
    assert footer_offset(tail) is None


def hostile_footer(raw: bytes, *, raw_bytes: int | None = None) -> tuple[FrameHeader, bytes]:
    stored = zstandard.ZstdCompressor().compress(raw)
    size = len(raw) if raw_bytes is None else raw_bytes
    body = pad_body(stored, codec=Codec.ZSTD, count=0, raw_bytes=size, trailer=bytes(TRAILER_BYTES))
    header = FrameHeader(
        type=FrameType.SEAL,
        codec=Codec.ZSTD,
        flags=0,
        first_lsn=1,
        synced_lsn=0,
        count=0,
        stored_bytes=body.stored_bytes,
        raw_bytes=size,
        body_crc=body.crc,
        span=0,
        wall_ns=0,
    )
    return header, body.padded


def footer_bytes(*, frames: int, kinds: int, names: bytes, names_bytes: int | None = None) -> bytes:
    return (
        struct.pack("<QQQIIII", 1, 1, 0, frames, kinds, len(names) if names_bytes is None else names_bytes, 0)
        + names
    )


HOSTILE_FOOTERS = {
    "empty": b"",
    "cut short": bytes(39),
    "2^32 - 1 frames": footer_bytes(frames=2**32 - 1, kinds=1, names=b"\x03put"),
    "2^32 - 1 kinds": footer_bytes(frames=0, kinds=2**32 - 1, names=b"\x03put"),
    "frames that are not there": footer_bytes(frames=1, kinds=0, names=b""),
    "names without kinds": footer_bytes(frames=0, kinds=0, names=b"\x03put"),
    "names beyond the footer": footer_bytes(frames=0, kinds=1, names=b"\x03put", names_bytes=5),
    "a byte too many": footer_bytes(frames=0, kinds=0, names=b"") + b"\0",
    "a frame where the header is": footer_bytes(frames=1, kinds=0, names=b"") + bytes(13),
    "two frames in one place": footer_bytes(frames=2, kinds=0, names=b"") + b"\1\0\0\0" * 2 + bytes(18),
}


@pytest.mark.parametrize("raw", HOSTILE_FOOTERS.values(), ids=HOSTILE_FOOTERS.keys())
def test_a_footer_that_lies_is_rejected_although_its_crcs_are_right(raw: bytes) -> None:
    with pytest.raises(FrameError):
        decode_footer(*hostile_footer(raw))


@given(raw=st.binary(max_size=200))
def test_arbitrary_bytes_as_a_footer_decode_or_raise_a_frame_error(raw: bytes) -> None:
    try:
        index = decode_footer(*hostile_footer(raw))
    except FrameError:
        return
    assert len(index.offsets) == len(index.first_lsns) == len(index.priorities)


def test_a_footer_bomb_costs_no_memory() -> None:
    header, padded = hostile_footer(bytes(BOMB_BYTES), raw_bytes=1000)
    tracemalloc.start()
    try:
        with pytest.raises(FrameError):
            decode_footer(header, padded)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < limits.MIB


NO_FOOTERS: dict[str, Callable[[FrameHeader], FrameHeader]] = {
    "another type": lambda header: replace(header, type=FrameType.STAMP),
    "not compressed": lambda header: replace(header, codec=Codec.RAW),
    "shorter than its trailer": lambda header: replace(header, stored_bytes=TRAILER_BYTES - 1),
}


@pytest.mark.parametrize("change", NO_FOOTERS.values(), ids=NO_FOOTERS.keys())
def test_a_frame_that_is_no_footer_is_not_read_as_one(change: Callable[[FrameHeader], FrameHeader]) -> None:
    data = footer_frame(SMALL_INDEX)
    header = change(decode_frame_header(data, seed=SEED))
    with pytest.raises(FrameError, match="not a seal footer"):
        decode_footer(header, data[HEADER_BYTES:])


# --- segment headers ----------------------------------------------------------------------------------------


@given(
    store=st.binary(min_size=16, max_size=16),
    salt=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, limits.LSN_MAX - 1),
    numbers=st.lists(st.integers(0, limits.SEGMENT_NUMBER_MAX), min_size=2, max_size=2, unique=True).map(
        sorted
    ),
    prev_last_lsn=st.integers(0, limits.LSN_MAX - 1),
    counts=st.tuples(st.integers(0, limits.LSN_MAX), st.integers(0, limits.LSN_MAX)),
    wall_ns=st.integers(0, 2**64 - 1),
)
def test_a_segment_header_comes_back_field_by_field(
    store: bytes,
    salt: int,
    epoch: int,
    numbers: list[int],
    prev_last_lsn: int,
    counts: tuple[int, int],
    wall_ns: int,
) -> None:
    header = SegmentHeader(
        store=store,
        salt=salt,
        epoch=epoch,
        number=numbers[1],
        first_lsn=prev_last_lsn + 1,
        prev_number=numbers[0],
        prev_salt=salt ^ 1,
        prev_last_lsn=prev_last_lsn,
        operations_before=counts[0],
        checkpointed_lsn=counts[1],
        created_wall_ns=wall_ns,
    )
    sector = encode_segment_header(header)
    assert len(sector) == SECTOR
    assert decode_segment_header(sector) == (HeaderState.VALID, header)


def test_a_single_flipped_bit_anywhere_in_a_segment_header_is_damage_and_never_another_version() -> None:
    sector = encode_segment_header(segment_header())
    for bit in range(8 * SECTOR):
        state, header = decode_segment_header(flipped(sector, bit // 8, 1 << bit % 8))
        assert header is None
        assert state is (HeaderState.NO_MAGIC if bit < 8 * len(SEGMENT_MAGIC) else HeaderState.BAD_CRC)


def resummed(sector: bytes, at: int, layout: str, *values: int) -> bytes:
    """A segment header with other fields at `at` and a CRC that fits them."""
    changed = bytearray(sector)
    struct.pack_into(layout, changed, at, *values)
    body = bytes(changed[:-4])
    return body + struct.pack("<I", crc32c(body, 0))


VALID_SECTOR = encode_segment_header(segment_header(number=2, prev_last_lsn=10, store=STORE))
# Offsets of the fields: version 8, flags 12, epoch 40, number 48, first LSN 56, previous number 64, previous last LSN 80,
# operations before 88, checkpointed 96, algorithm 104.
SEGMENT_CASES = {
    "empty file": (b"", HeaderState.SHORT),
    "cut short": (VALID_SECTOR[:-1], HeaderState.SHORT),
    "zeros": (bytes(SECTOR), HeaderState.NO_MAGIC),
    "newer version": (resummed(VALID_SECTOR, 8, "<I", FORMAT_VERSION + 1), HeaderState.NEWER_VERSION),
    "another checksum": (resummed(VALID_SECTOR, 104, "<I", 2), HeaderState.NEWER_VERSION),
    "unknown flags": (resummed(VALID_SECTOR, 12, "<I", 4), HeaderState.NEWER_VERSION),
    "known and unknown flags": (resummed(VALID_SECTOR, 12, "<I", 7), HeaderState.NEWER_VERSION),
    "first LSN with a gap": (resummed(VALID_SECTOR, 56, "<Q", 12), HeaderState.INVALID),
    "first LSN repeated": (resummed(VALID_SECTOR, 56, "<Q", 10), HeaderState.INVALID),
    "follows itself": (resummed(VALID_SECTOR, 64, "<Q", 2), HeaderState.INVALID),
    "follows a later one": (resummed(VALID_SECTOR, 64, "<Q", 3), HeaderState.INVALID),
    "first LSN beyond the last": (
        resummed(resummed(VALID_SECTOR, 56, "<Q", 2**63), 80, "<Q", 2**63 - 1),
        HeaderState.INVALID,
    ),
    "epoch that leaves none for the next": (resummed(VALID_SECTOR, 40, "<Q", HUGE), HeaderState.INVALID),
    "number over its limit": (resummed(VALID_SECTOR, 48, "<Q", 2**63), HeaderState.INVALID),
    "operations that overflow": (resummed(VALID_SECTOR, 88, "<Q", HUGE), HeaderState.INVALID),
    "checkpoint beyond the last LSN": (resummed(VALID_SECTOR, 96, "<Q", HUGE), HeaderState.INVALID),
    "untouched": (VALID_SECTOR, HeaderState.VALID),
}


@pytest.mark.parametrize(("sector", "state"), SEGMENT_CASES.values(), ids=SEGMENT_CASES.keys())
def test_the_first_sector_of_a_segment_is(sector: bytes, state: HeaderState) -> None:
    found, header = decode_segment_header(sector)
    assert found is state
    assert (header is None) == (state is not HeaderState.VALID)


@given(data=st.binary(max_size=600), magic=st.booleans())
def test_arbitrary_bytes_are_no_segment_header(data: bytes, *, magic: bool) -> None:
    state, header = decode_segment_header((SEGMENT_MAGIC if magic else b"") + data)
    assert header is None
    assert state is not HeaderState.VALID


def test_a_copied_frame_says_so() -> None:
    body = encode_body(columns_of([b"payload"]))
    head = encode_frame_header(
        body,
        type=FrameType.OPERATIONS,
        first_lsn=9,
        span=1,
        synced_lsn=8,
        wall_ns=1,
        seed=SEED,
        flags=FLAG_COPIED,
    )
    assert decode_frame_header(head, seed=SEED).flags == FLAG_COPIED
