"""The body of a frame of operations: one array per attribute, then all keys, then all payloads.

docs/format.md is the specification; this and `frame` are its one writer.

The idea needed to read it: encoding and decoding take a few C calls per column and no `struct` per operation. A column
in which all operations have the usual value is left out, so that what few operations have costs the others nothing.
"""

from __future__ import annotations

import enum
import struct
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import ge
from typing import Final

import zstandard

from walbatch import limits
from walbatch.core.frame import (
    Body,
    Codec,
    FrameError,
    FrameHeader,
    FrameType,
    NewerFrameError,
    check_body,
    decode_kinds,
    encode_kinds,
    inflate,
    pad_body,
)
from walbatch.types import NO_OPTIONS, PRIORITY_MAX, PRIORITY_NORMAL, Options

_BODY: Final = struct.Struct("<HHI")
_COLUMN: Final = struct.Struct("<BBHQ")
_DIRECTORY_MAX: Final = 64
_TYPECODES: Final = {1: "B", 2: "H", 4: "I", 8: "Q"}
assert all(array(code).itemsize == width for width, code in _TYPECODES.items())


class Column(enum.IntEnum):
    """Columns of a body. A reader refuses columns it does not know."""

    KIND = 1
    PRIORITY = 2
    KEY_BYTES = 3
    PAYLOAD_BYTES = 4
    NOT_BEFORE = 5
    DEADLINE = 6
    ORIGIN = 7
    IDEMPOTENCY_BYTES = 8
    LSN = 9
    """Offsets from the frame's first LSN, in a frame that a compaction has written."""


_COLUMNS: Final = frozenset(Column)
_OPTION_COLUMNS: Final = frozenset(
    (Column.NOT_BEFORE, Column.DEADLINE, Column.ORIGIN, Column.IDEMPOTENCY_BYTES)
)
_OPTIONS_BYTES: Final = 3 * 8 + 2
"""What the options of one operation take at most, without the idempotency key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """The operations of a frame as parallel columns. `kind_indexes` points into `kinds`."""

    kinds: tuple[str, ...]
    kind_indexes: Sequence[int]
    priorities: Sequence[int]
    keys: Sequence[bytes]
    payloads: Sequence[bytes]
    options: Sequence[Options] = ()
    """Empty where no operation has any."""
    lsn_offsets: Sequence[int] = ()
    """Ascending distances from the frame's first LSN; empty where the LSNs have no holes."""

    def lsns(self, first_lsn: int) -> Sequence[int]:
        """The LSNs of the operations, in a frame that begins at `first_lsn`."""
        if self.lsn_offsets:
            return [first_lsn + offset for offset in self.lsn_offsets]
        return range(first_lsn, first_lsn + len(self.keys))


# --- writing --------------------------------------------------------------------------------------------------------


def encode_body(
    columns: Columns,
    *,
    compress_bytes_min: int | None = None,
    compressor: zstandard.ZstdCompressor | None = None,
) -> Body:
    """Encode a commit group. Bodies of at least `compress_bytes_min` bytes are compressed where that saves 1/16."""
    count = len(columns.keys)
    assert 0 < count <= limits.FRAME_COUNT_MAX
    names = encode_kinds(columns.kinds)
    encoded = [
        (Column.KIND, _encode_column(columns.kind_indexes)),
        (Column.PRIORITY, _encode_column(columns.priorities)),
        (Column.KEY_BYTES, _encode_column(list(map(len, columns.keys)))),
        (Column.PAYLOAD_BYTES, _encode_column(list(map(len, columns.payloads)))),
    ]
    # A column that has its usual value throughout is left out: the priority of most frames.
    encoded = [
        (id_, value) for id_, value in encoded
        if not (id_ is Column.PRIORITY and value[:2] == (0, PRIORITY_NORMAL))
        and not (id_ is Column.KIND and value[:2] == (0, 0))
    ]  # fmt: skip
    idempotency_keys: list[bytes] = []
    if columns.options:
        idempotency_keys = [options.idempotency_key for options in columns.options]
        encoded += _encode_options(columns.options, idempotency_keys)
    if columns.lsn_offsets:
        encoded.append((Column.LSN, _encode_column(columns.lsn_offsets)))
    raw = b"".join(
        (
            _BODY.pack(len(columns.kinds), len(encoded), len(names)),
            *(_COLUMN.pack(id_, width, 0, constant) for id_, (width, constant, _) in encoded),
            names,
            *(data for _, (_, _, data) in encoded),
            *columns.keys,
            *columns.payloads,
            *idempotency_keys,
        )
    )
    assert len(raw) <= limits.FRAME_RAW_BYTES_MAX
    if compress_bytes_min is not None and len(raw) >= compress_bytes_min:
        packed = (compressor or zstandard.ZstdCompressor(level=1)).compress(raw)
        if len(packed) <= len(raw) - len(raw) // 16:
            return pad_body(packed, codec=Codec.ZSTD, count=count, raw_bytes=len(raw))
    return pad_body(raw, codec=Codec.RAW, count=count, raw_bytes=len(raw))


_Encoded = tuple[int, int, bytes]


def _encode_column(values: Sequence[int]) -> _Encoded:
    """(width, constant, array): width 0 means that all values equal the constant and no array follows."""
    high = max(values)
    if min(values) == high:
        return 0, high, b""
    width = 1 if high < 1 << 8 else 2 if high < 1 << 16 else 4 if high < 1 << 32 else 8
    column = array(_TYPECODES[width], values)
    if sys.byteorder == "big":  # pragma: no cover - the format is little-endian
        column.byteswap()
    return width, 0, column.tobytes()


def _encode_options(
    options: Sequence[Options], idempotency_keys: Sequence[bytes]
) -> list[tuple[Column, _Encoded]]:
    """The columns in which some operation has something. The limits are the reader's."""
    columns = (
        (Column.NOT_BEFORE, [option.not_before_ns for option in options]),
        (Column.DEADLINE, [option.deadline_ns for option in options]),
        (Column.ORIGIN, [option.origin for option in options]),
        (Column.IDEMPOTENCY_BYTES, list(map(len, idempotency_keys))),
    )
    assert all(max(values) <= _LIMITS[id_] for id_, values in columns)
    return [(id_, _encode_column(values)) for id_, values in columns if any(values)]


_LIMITS: Final = {
    Column.NOT_BEFORE: limits.LSN_MAX,
    Column.DEADLINE: limits.LSN_MAX,
    Column.ORIGIN: limits.LSN_MAX,
    Column.IDEMPOTENCY_BYTES: limits.IDEMPOTENCY_KEY_BYTES_MAX,
}


def encoded_bytes_max(keys_and_payloads_bytes: int, count: int, options: Sequence[Options] = ()) -> int:
    """An upper bound of the raw body of `count` operations, for limits that must hold before encoding."""
    fixed = 1024 + limits.KINDS_MAX * (limits.KIND_BYTES_MAX + 1)
    return keys_and_payloads_bytes + count * 10 + fixed + options_bytes(options)


def options_bytes(options: Sequence[Options]) -> int:
    """An upper bound of what options add to a body, and a fair estimate of the memory that they take."""
    if not options:
        return 0
    return len(options) * _OPTIONS_BYTES + sum(len(option.idempotency_key) for option in options)


# --- reading --------------------------------------------------------------------------------------------------------


def decode_body(header: FrameHeader, padded: bytes) -> Columns:
    """Check and decode the body of a frame of operations. Raises FrameError for anything that is not exact.

    NewerFrameError where a later version of the format has written something that this one does not know.

    Memory: the raw body plus a few objects per operation, bounded by FRAME_RAW_BYTES_MAX and FRAME_COUNT_MAX.
    """
    if header.type is not FrameType.OPERATIONS:
        raise FrameError("not a frame of operations")
    check_body(header, padded)
    raw = inflate(header, padded)
    count = header.count
    try:
        kind_count, column_count, names_bytes = _BODY.unpack_from(raw)
        at = _BODY.size
        directory: list[tuple[int, int, int, int]] = [
            _COLUMN.unpack_from(raw, at + i * _COLUMN.size) for i in range(min(column_count, _DIRECTORY_MAX))
        ]
    except struct.error as error:
        raise FrameError("body cut short") from error
    at += len(directory) * _COLUMN.size
    kinds, at = decode_kinds(raw, at, kind_count, names_bytes)
    found, at = _decode_columns(raw, at, directory, count)
    if Column.KEY_BYTES not in found or Column.PAYLOAD_BYTES not in found:
        raise FrameError("length column missing")
    key_bytes, payload_bytes = found[Column.KEY_BYTES], found[Column.PAYLOAD_BYTES]
    kind_indexes = found.get(Column.KIND) or [0] * count
    priorities = found.get(Column.PRIORITY) or [PRIORITY_NORMAL] * count
    if max(kind_indexes) >= len(kinds) or max(priorities) > PRIORITY_MAX:
        raise FrameError("kind or priority out of range")
    if max(key_bytes) > limits.KEY_BYTES_MAX or max(payload_bytes) > limits.PAYLOAD_BYTES_MAX:
        raise FrameError("key or payload over its limit")
    payloads_at = at + sum(key_bytes)
    payloads_end = payloads_at + sum(payload_bytes)
    options: Sequence[Options] = ()
    if not _OPTION_COLUMNS.isdisjoint(found):
        options, end = _decode_options(raw, payloads_end, found, count)
    else:
        end = payloads_end
    if end != len(raw):
        raise FrameError("lengths do not add up to the body")
    return Columns(
        kinds=kinds, kind_indexes=kind_indexes, priorities=priorities,
        keys=_slices(raw, at, key_bytes), payloads=_slices(raw, payloads_at, payload_bytes),
        options=options, lsn_offsets=_checked_offsets(header, found.get(Column.LSN)),
    )  # fmt: skip


def _decode_columns(
    raw: bytes, at: int, directory: Sequence[tuple[int, int, int, int]], count: int
) -> tuple[dict[int, Sequence[int]], int]:
    """The columns by id, and where their arrays end."""
    found: dict[int, Sequence[int]] = {}
    for id_, width, zero, constant in directory:
        if id_ not in _COLUMNS:
            raise NewerFrameError(f"column {id_}, which this version does not know")
        if id_ in found or zero:
            raise FrameError(f"column {id_} repeated or with reserved bytes")
        if width == 0:
            found[id_] = [constant] * count
            continue
        if width not in _TYPECODES or constant:
            raise FrameError(f"column {id_} of width {width}")
        column = array(_TYPECODES[width])
        data = raw[at : at + width * count]
        if len(data) != width * count:
            raise FrameError(f"column {id_} cut short")
        column.frombytes(data)
        if sys.byteorder == "big":  # pragma: no cover - the format is little-endian
            column.byteswap()
        found[id_] = column
        at += width * count
    return found, at


def _decode_options(
    raw: bytes, at: int, found: dict[int, Sequence[int]], count: int
) -> tuple[Sequence[Options], int]:
    """The options of all operations, and where their idempotency keys end."""
    for id_, limit in _LIMITS.items():
        if id_ in found and max(found[id_]) > limit:
            raise FrameError(f"column {id_} over its limit")
    none = [0] * count
    key_bytes = found.get(Column.IDEMPOTENCY_BYTES) or none
    end = at + sum(key_bytes)
    rows = zip(
        found.get(Column.NOT_BEFORE) or none, found.get(Column.DEADLINE) or none, found.get(Column.ORIGIN) or none,
        _slices(raw, at, key_bytes), strict=True,
    )  # fmt: skip
    options = [
        Options(not_before_ns=not_before, deadline_ns=deadline, origin=origin, idempotency_key=key)
        if not_before or deadline or origin or key
        else NO_OPTIONS
        for not_before, deadline, origin, key in rows
    ]
    return options, end


def _checked_offsets(header: FrameHeader, offsets: Sequence[int] | None) -> Sequence[int]:
    """The offsets of the LSNs, which stand in a frame with holes and in no other."""
    if (offsets is not None) != (header.count < header.span):
        raise FrameError(f"{header.count} operations over {header.span} LSNs, with or without their LSNs")
    if offsets is None:
        return ()
    if any(map(ge, offsets, offsets[1:])) or offsets[-1] >= header.span:
        raise FrameError("LSNs that do not ascend within the frame")
    return offsets


def _slices(raw: bytes, at: int, sizes: Iterable[int]) -> list[bytes]:
    """Cut consecutive pieces of the given sizes out of `raw`."""
    ends = list(accumulate(sizes, initial=at))
    return [raw[start:end] for start, end in pairwise(ends)]
