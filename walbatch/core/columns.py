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
from collections.abc import Sequence
from dataclasses import dataclass
from operator import ge
from typing import Final, NamedTuple

from walbatch import limits
from walbatch.core.compression import Compressor
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
    columns: Columns, *, compress_bytes_min: int | None = None, compressor: Compressor | None = None
) -> Body:
    """Encode a commit group. Bodies of at least `compress_bytes_min` bytes are compressed where that saves 1/16."""
    keys, payloads = columns.keys, columns.payloads
    count = len(keys)
    assert 0 < count <= limits.FRAME_COUNT_MAX
    payload_bytes = _encode_lengths(payloads)
    encoded = [(Column.KEY_BYTES, _encode_lengths(keys)), (Column.PAYLOAD_BYTES, payload_bytes)]
    # A column that has its usual value throughout is left out: the priority of most frames.
    if (priorities := _encode_column(columns.priorities)) != _USUAL_PRIORITY:
        encoded.insert(0, (Column.PRIORITY, priorities))
    if (kind_indexes := _encode_column(columns.kind_indexes)) != _USUAL_KIND:
        encoded.insert(0, (Column.KIND, kind_indexes))
    idempotency_keys: list[bytes] = []
    if columns.options:
        idempotency_keys = [options.idempotency_key for options in columns.options]
        encoded += _encode_options(columns.options, idempotency_keys)
    if columns.lsn_offsets:
        encoded.append((Column.LSN, _encode_column(columns.lsn_offsets)))
    names = encode_kinds(columns.kinds)
    parts = [_BODY.pack(len(columns.kinds), len(encoded), len(names))]
    parts += [_COLUMN.pack(id_, width, 0, constant) for id_, (width, constant, _) in encoded]
    parts.append(names)
    parts += [data for _, (_, _, data) in encoded]
    # One join and no other copy: in new memory a copy costs more than all the rest.
    parts += keys
    parts += payloads
    parts += idempotency_keys
    raw = b"".join(parts)
    assert len(raw) <= limits.FRAME_RAW_BYTES_MAX
    if compress_bytes_min is not None and len(raw) >= compress_bytes_min:
        compressor = compressor or Compressor(level=1)
        packed = compressor.compressed(raw, period=0 if idempotency_keys else payload_bytes[1])
        if packed is not None:
            return pad_body(packed, codec=Codec.ZSTD, count=count, raw_bytes=len(raw))
    return pad_body(raw, codec=Codec.RAW, count=count, raw_bytes=len(raw))


_ONE: Final = struct.Struct("<HHIBBHQBBHQ")
_ONE_PRIORITY: Final = struct.Struct("<HHIBBHQBBHQBBHQ")
_PRIORITY, _KEY_BYTES, _PAYLOAD_BYTES = map(int, (Column.PRIORITY, Column.KEY_BYTES, Column.PAYLOAD_BYTES))


def encode_one(kinds: tuple[str], priority: int, key: bytes, payload: bytes) -> Body:
    """What `encode_body` makes of one operation without options, not compressed, in a third of the time.

    A producer that waits for each of its operations waits for this, and between two syncs the processor has forgotten all code:
    what counts is how much of it there is.
    """
    names = encode_kinds(kinds)
    if priority == PRIORITY_NORMAL:
        head = _ONE.pack(1, 2, len(names), _KEY_BYTES, 0, 0, len(key), _PAYLOAD_BYTES, 0, 0, len(payload))
    else:
        head = _ONE_PRIORITY.pack(
            1, 3, len(names), _PRIORITY, 0, 0, priority, _KEY_BYTES, 0, 0, len(key), _PAYLOAD_BYTES, 0, 0, len(payload)
        )  # fmt: skip
    raw = b"".join((head, names, key, payload))
    return pad_body(raw, codec=Codec.RAW, count=1, raw_bytes=len(raw))


_Encoded = tuple[int, int, bytes]
"""(width, constant, array): width 0 means that all values equal the constant and no array follows."""

_USUAL_PRIORITY: Final[_Encoded] = (0, PRIORITY_NORMAL, b"")
_USUAL_KIND: Final[_Encoded] = (0, 0, b"")


def _encode_column(values: Sequence[int]) -> _Encoded:
    """A column of numbers in the smallest width that holds them."""
    first = values[0]
    if values.count(first) == len(values):
        return 0, first, b""
    high = max(values)
    width = 1 if high < 1 << 8 else 2 if high < 1 << 16 else 4 if high < 1 << 32 else 8
    column = array(_TYPECODES[width], values)
    if sys.byteorder == "big":  # pragma: no cover - the format is little-endian
        column.byteswap()
    return width, 0, column.tobytes()


def _encode_lengths(pieces: Sequence[bytes]) -> _Encoded:
    """The column of their lengths."""
    if len(pieces) == 1:
        return 0, len(pieces[0]), b""
    try:
        column = bytes(map(len, pieces))
    except ValueError:  # one of them has 256 bytes or more
        return _encode_column(list(map(len, pieces)))
    return (0, column[0], b"") if column.count(column[0]) == len(column) else (1, 0, column)


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


ONE_BYTES_MAX: Final = _ONE_PRIORITY.size + limits.KIND_BYTES_MAX + 1
"""What `encode_one` adds to key and payload at most."""


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


def decode_body(header: FrameHeader, padded: bytes, *, start: int = 0) -> Columns:
    """Check and decode the body of a frame of operations. Raises FrameError for anything that is not exact.

    The body with its padding is what stands in `padded` from `start` on; where that is 0, it is all of it. NewerFrameError
    where a later version of the format has written something that this one does not know.

    Memory: the raw body plus a few objects per operation, bounded by FRAME_RAW_BYTES_MAX and FRAME_COUNT_MAX.
    """
    if header.type is not FrameType.OPERATIONS:
        raise FrameError("not a frame of operations")
    whole = memoryview(padded)[start : start + header.total_bytes - limits.FRAME_HEADER_BYTES]
    check_body(header, whole if start else padded)
    if header.codec is Codec.RAW:
        if header.raw_bytes != header.stored_bytes:
            raise FrameError("raw body whose lengths differ")
        raw, at, raw_end = padded, start, start + header.stored_bytes
    else:
        raw, at, raw_end = inflate(header, whole[: header.stored_bytes]), 0, header.raw_bytes
    count = header.count
    directory, kinds, at = _decode_head(raw, at, raw_end)
    found, at = _decode_columns(raw, at, directory, count, raw_end)
    if Column.KEY_BYTES not in found or Column.PAYLOAD_BYTES not in found:
        raise FrameError("length column missing")
    key_bytes, payload_bytes = found[Column.KEY_BYTES], found[Column.PAYLOAD_BYTES]
    kind_indexes = found.get(Column.KIND) or _constant(0, count)
    priorities = found.get(Column.PRIORITY) or _constant(PRIORITY_NORMAL, count)
    if kind_indexes.high >= len(kinds) or priorities.high > PRIORITY_MAX:
        raise FrameError("kind or priority out of range")
    if key_bytes.high > limits.KEY_BYTES_MAX or payload_bytes.high > limits.PAYLOAD_BYTES_MAX:
        raise FrameError("key or payload over its limit")
    payloads_at = at + key_bytes.total
    payloads_end = payloads_at + payload_bytes.total
    options: Sequence[Options] = ()
    if not _OPTION_COLUMNS.isdisjoint(found):
        options, end = _decode_options(raw, payloads_end, found, count, raw_end)
    else:
        end = payloads_end
    if end != raw_end:
        raise FrameError("lengths do not add up to the body")
    return Columns(
        kinds=kinds, kind_indexes=kind_indexes.values, priorities=priorities.values,
        keys=_pieces(raw, at, key_bytes), payloads=_pieces(raw, payloads_at, payload_bytes),
        options=options, lsn_offsets=_checked_offsets(header, found.get(Column.LSN)),
    )  # fmt: skip


class _Decoded(NamedTuple):
    """A column: its values, the highest of them, and what they add up to."""

    values: Sequence[int]
    high: int
    total: int
    is_constant: bool


def _constant(value: int, count: int) -> _Decoded:
    return _Decoded([value] * count, value, value * count, is_constant=True)


_Directory = Sequence[tuple[int, int, int, int]]


def _decode_head(raw: bytes, at: int, raw_end: int) -> tuple[_Directory, tuple[str, ...], int]:
    """The directory of columns and the kinds, and where they end."""
    if at + _BODY.size > raw_end:
        raise FrameError("body cut short")
    kind_count, column_count, names_bytes = _BODY.unpack_from(raw, at)
    at += _BODY.size
    end = at + min(column_count, _DIRECTORY_MAX) * _COLUMN.size
    if end > raw_end:
        raise FrameError("body cut short")
    directory = [_COLUMN.unpack_from(raw, entry) for entry in range(at, end, _COLUMN.size)]
    kinds, at = decode_kinds(raw, end, kind_count, names_bytes, raw_end=raw_end)
    return directory, kinds, at


def _decode_columns(
    raw: bytes, at: int, directory: _Directory, count: int, raw_end: int
) -> tuple[dict[int, _Decoded], int]:
    """The columns by id, and where their arrays end."""
    found: dict[int, _Decoded] = {}
    for id_, width, zero, constant in directory:
        if id_ not in _COLUMNS:
            raise NewerFrameError(f"column {id_}, which this version does not know")
        if id_ in found or zero:
            raise FrameError(f"column {id_} repeated or with reserved bytes")
        if width == 0:
            found[id_] = _constant(constant, count)
            continue
        if width not in _TYPECODES or constant:
            raise FrameError(f"column {id_} of width {width}")
        end = at + width * count
        if end > raw_end:
            raise FrameError(f"column {id_} cut short")
        column = array(_TYPECODES[width])
        column.frombytes(raw[at:end])
        if sys.byteorder == "big":  # pragma: no cover - the format is little-endian
            column.byteswap()
        found[id_] = _Decoded(column, max(column), sum(column), is_constant=False)
        at = end
    return found, at


def _decode_options(
    raw: bytes, at: int, found: dict[int, _Decoded], count: int, raw_end: int
) -> tuple[Sequence[Options], int]:
    """The options of all operations, and where their idempotency keys end. Raises FrameError where that is not the body's end."""
    for id_, limit in _LIMITS.items():
        if id_ in found and found[id_].high > limit:
            raise FrameError(f"column {id_} over its limit")
    none = _constant(0, count)
    key_bytes = found.get(Column.IDEMPOTENCY_BYTES) or none
    end = at + key_bytes.total
    if end != raw_end:
        return (), end
    rows = zip(
        *((found.get(id_) or none).values for id_ in (Column.NOT_BEFORE, Column.DEADLINE, Column.ORIGIN)),
        _pieces(raw, at, key_bytes), strict=True,
    )  # fmt: skip
    options = [
        Options(not_before_ns=not_before, deadline_ns=deadline, origin=origin, idempotency_key=key)
        if not_before or deadline or origin or key
        else NO_OPTIONS
        for not_before, deadline, origin, key in rows
    ]
    return options, end


def _checked_offsets(header: FrameHeader, found: _Decoded | None) -> Sequence[int]:
    """The offsets of the LSNs, which stand in a frame with holes and in no other."""
    if (found is not None) != (header.count < header.span):
        raise FrameError(f"{header.count} operations over {header.span} LSNs, with or without their LSNs")
    if found is None:
        return ()
    offsets = found.values
    if any(map(ge, offsets, offsets[1:])) or offsets[-1] >= header.span:
        raise FrameError("LSNs that do not ascend within the frame")
    return offsets


def _pieces(raw: bytes, at: int, lengths: _Decoded) -> Sequence[bytes]:
    """Cut consecutive pieces of these lengths out of `raw`, which is long enough. A slice for each would take twice as long."""
    values = lengths.values
    if lengths.is_constant:
        layout = f"{lengths.high}s" * len(values)
    elif lengths.high < len(_PIECES):
        layout = "".join(map(_PIECES.__getitem__, values))
    else:
        layout = "%ds" * len(values) % tuple(values)
    return struct.Struct(f"<{layout}").unpack_from(raw, at)


_PIECES: Final = tuple(f"{size}s" for size in range(256))
"""Pieces of 0 to 255 bytes, as a layout for `struct`."""
