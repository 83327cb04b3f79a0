"""A table as groups of operations, from a bookmark on.

What is not here: submitting them (`course`), and asking the database (`databases`).

The idea needed to read it: a group is what one page gave, or the beginning of it where rows are large. The reader goes on behind
its last row; if the database goes away in the middle, the same group can be asked for again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Final

from walbatch import limits
from walbatch.copying.databases import PART_BYTES, PART_ROWS_MAX, Bookmark, Database
from walbatch.copying.rows import (
    NUMBER_BYTES,
    Decoder,
    Encoder,
    RowError,
    Values,
    refused_payload,
    row_payload,
)
from walbatch.copying.shapes import NOTES, Route
from walbatch.errors import ConfigError, CorruptionError

PAGE_ROWS_MIN: Final = 200
PAGE_ROWS_MAX: Final = 5_000
GROUP_BYTES_MAX: Final = 4 * limits.MIB
"""What a group has at most, but for a row that is larger: it is a group of its own."""

ASKED_MIN: Final = 2
"""Rows that a page asks for where each fills a group."""

VALUES_BYTES_MAX: Final = limits.PAYLOAD_BYTES_MAX - NUMBER_BYTES

PART_ROWS_FIRST: Final = 10
"""Before anything is known of the size of rows."""

_KNOWN: Final = (str, int, float, bytes, NoneType)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Operations that are submitted together. `is_last`: there was nothing behind them."""

    operations: list[tuple[bytes, bytes]]
    is_last: bool


class Reader:
    """Reads a table. One thread uses it."""

    def __init__(self, database: Database, way: Route, bookmark: Bookmark) -> None:
        count = self._key_count = way.key_count
        notes = "".join(NOTES.get(column.kind, "s") for column, _ in way.pairs)
        self._keys, self._values = Encoder(notes[:count]), Encoder(notes[count:])
        self._page = database.pages(way.source, way.source_columns)
        self._number = bookmark.number
        self._after = _key(bookmark, count)
        self._rows = PAGE_ROWS_MIN
        self._part_rows = PART_ROWS_FIRST
        self.size = 0
        """Bytes of the last group."""

    def __repr__(self) -> str:
        return f"<Reader behind row {self._number:,}>"

    def read(self, *, is_short: bool, is_full: Callable[[], bool] = lambda: False) -> Group:
        """Read the next group, a small one where memory `is_short`, and no more of it once memory `is_full`.

        Raises StorageError; then it may be called again.
        """
        asked = min(PAGE_ROWS_MIN, self._rows) if is_short else self._rows
        operations: list[tuple[bytes, bytes]] = []
        size, after, is_whole = 0, self._after, True
        with contextlib.closing(self._page(self._after, asked, self._part_rows)) as parts:
            for rows in parts:
                part = self._operations(rows, self._number + len(operations) + 1)
                part_size = sum(len(key) + len(payload) for key, payload in part)
                if operations and size + part_size > GROUP_BYTES_MAX:
                    is_whole = False  # what does not fit is read again
                    break
                operations += part
                size += part_size
                after = rows[-1][: self._key_count]
                if size >= GROUP_BYTES_MAX or is_full():
                    is_whole = False
                    break
        self._number += len(operations)
        self._after = after
        self.size = size
        fitting = GROUP_BYTES_MAX * len(operations) // max(1, size)
        self._part_rows = max(1, min(PART_ROWS_MAX, PART_BYTES * len(operations) // max(1, size)))
        self._rows = min(PAGE_ROWS_MAX, max(2 * self._rows, PAGE_ROWS_MIN), max(ASKED_MIN, fitting))
        return Group(operations=operations, is_last=is_whole and len(operations) < asked)

    def _operations(self, rows: Sequence[Values], first: int) -> list[tuple[bytes, bytes]]:
        """Rows as keys and payloads; one that cannot be an operation says why, and keeps its number."""
        count = self._key_count
        if strange := {type(value) for row in rows for value in row if not isinstance(value, _KNOWN)}:
            # No fault of the row: it must not be taken for one that cannot be copied.
            raise TypeError(f"a database gave values of {', '.join(sorted(one.__name__ for one in strange))}")
        keys = self._keys.encode_all([row[:count] for row in rows])
        values = self._values.encode_all([row[count:] for row in rows])
        return [
            (key, row_payload(number, data))
            if type(key) is bytes
            and type(data) is bytes
            and len(key) <= limits.KEY_BYTES_MAX
            and len(data) <= VALUES_BYTES_MAX
            else _refused(number, key, data)
            for number, (key, data) in enumerate(zip(keys, values, strict=True), first)
        ]


def _key(bookmark: Bookmark, count: int) -> Values:
    if not bookmark.number:
        return ()
    try:
        return Decoder(count).decode(bookmark.key)
    except RowError as error:
        raise CorruptionError(
            f"the bookmark of the copy, at row {bookmark.number:,}, is damaged ({error}): remove the store to begin anew, which "
            "copies all rows again", path="", expected="a key",
        ) from error  # fmt: skip


def _refused(number: int, key: bytes | RowError, values: bytes | RowError) -> tuple[bytes, bytes]:
    """An operation that says why a row is none. Without a key there is nowhere to go on: raises ConfigError."""
    if isinstance(key, RowError):
        raise ConfigError(f"the key of row {number:,} of the source cannot be copied: {key}")
    if isinstance(values, RowError):
        why = str(values)
    else:
        why = (
            f"the row has {len(values):,} bytes, and its key {len(key):,}: at most {VALUES_BYTES_MAX:,} and "
            f"{limits.KEY_BYTES_MAX:,} can be copied"
        )
    return key[: limits.KEY_BYTES_MAX], refused_payload(number, key, why)
