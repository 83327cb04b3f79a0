"""Rows as parameters of a statement: one array for each column, packed as PostgreSQL's binary protocol has it.

What is not here: the statements (`transaction`).

The idea needed to read it: the statement casts each value from text to the type of its column, as if it had been written into the
statement; only bytes travel as they are. Packed here, because what psycopg does for a list takes three times as long.

Format: `array_recv` in PostgreSQL's source: dimensions, whether there is a NULL, type, length, lower bound; then a length and the
bytes of each value, all numbers of 32 bits in network order; the length of NULL is -1.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import psycopg
from psycopg.adapt import Dumper
from psycopg.pq import Format

from walbatch.backends.postgres.schema import Column
from walbatch.backends.sql.table import Columns

_HEADER: Final = struct.Struct("!iiIii")
_LENGTH: Final = struct.Struct("!i")
_NULL: Final = _LENGTH.pack(-1)

BYTEA: Final = 17
TEXT: Final = 25


@dataclass(frozen=True, slots=True)
class BytesArray:
    """A parameter of type bytea[]."""

    packed: bytes


@dataclass(frozen=True, slots=True)
class TextArray:
    """A parameter of type text[]. The client's encoding must be UTF-8."""

    packed: bytes


class _BytesArrayDumper(Dumper):
    format = Format.BINARY
    oid = 1001

    def dump(self, obj: BytesArray) -> bytes:
        return obj.packed


class _TextArrayDumper(Dumper):
    format = Format.BINARY
    oid = 1009

    def dump(self, obj: TextArray) -> bytes:
        return obj.packed


# For everybody in the process: nobody else has values of these types.
psycopg.adapters.register_dumper(BytesArray, _BytesArrayDumper)
psycopg.adapters.register_dumper(TextArray, _TextArrayDumper)


def parameters(columns: Sequence[Column], rows: Columns) -> list[BytesArray | TextArray]:
    """An array for each column. Raises psycopg.DataError or UnicodeEncodeError for a value that its column cannot have."""
    return [
        BytesArray(_pack(_binary(column, values), BYTEA))
        if column.is_bytes
        else TextArray(_pack(_texts(column, values), TEXT))
        for column, values in zip(columns, rows, strict=True)
    ]


def _pack(values: Sequence[bytes | None], oid: int) -> bytes:
    count = len(values)
    parts = [b""] * (2 * count)
    has_null = None in values
    if has_null:
        parts[0::2] = [_NULL if value is None else _LENGTH.pack(len(value)) for value in values]
        parts[1::2] = [value or b"" for value in values]
    else:
        parts[0::2] = map(_LENGTH.pack, map(len, cast("Sequence[bytes]", values)))
        parts[1::2] = cast("Sequence[bytes]", values)
    return b"".join((_HEADER.pack(1, has_null, oid, count, 1), *parts))


def _binary(column: Column, values: Sequence[Any]) -> Sequence[bytes | None]:
    if set(map(type, values)) == {bytes}:
        return values
    return [value if value is None else _as_bytes(column, value) for value in values]


def _as_bytes(column: Column, value: Any) -> bytes:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, str):
        return value.encode()
    raise psycopg.DataError(f"column {column.name!r} of type bytea takes no {type(value).__name__}")


def _texts(column: Column, values: Sequence[Any]) -> Sequence[bytes | None]:
    """Values as PostgreSQL reads them."""
    texts = [value if value is None else _text(column, value).encode() for value in values]
    if any(text is not None and b"\0" in text for text in texts):
        raise psycopg.DataError(f"column {column.name!r}: PostgreSQL keeps no texts with NUL in them")
    return texts


def _text(column: Column, value: Any) -> str:
    if type(value) is str:
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (bytes, bytearray, memoryview)):
        try:
            return bytes(value).decode()
        except UnicodeDecodeError as error:
            raise psycopg.DataError(
                f"column {column.name!r} of type {column.type} takes no such bytes: {error}"
            ) from error
    return str(value)
