"""Where tables are, as the course of a copy sees it: what a database can tell of them, and how its rows are read.

What is not here: any database. `sqlite` and `postgres` implement this.

The idea needed to read it: rows are read in pages, in the order of a unique key, each page behind the last key of the one before. A
page is a statement of its own: nothing stays open between pages, and any page can be read again, by another process too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple, Protocol

from walbatch import limits
from walbatch.copying.rows import Values
from walbatch.copying.shapes import Dialect, Route, Shape
from walbatch.ports import TransactionalBackend

PART_ROWS_MAX: Final = 200
"""Rows that a page hands over at a time at most: what reading ahead costs in memory."""

PART_BYTES: Final = 512 * limits.KIB
"""What they may have together. A row with more is handed over alone."""


class Bookmark(NamedTuple):
    """How far a table has been read: rows, and the key of the last one, packed. (0, b"") at its beginning."""

    number: int
    key: bytes


class Landing(TransactionalBackend, Protocol):
    """The backend that the rows of a table go to, which stores the bookmark with them."""

    def expect(self, number: int | None) -> None:
        """Say how far the target must be, or None: it has no bookmark yet. Before `open`, which raises ConfigError otherwise."""

    def bookmark(self) -> Bookmark:
        """The highest one that was applied. Durable. Raises StorageError."""


Page = Callable[[Values, int, int], Generator[list[Values]]]
"""page(last key, rows, rows of a part): the rows behind that key (empty: from the beginning), in parts. It may be closed early."""


def in_parts(rows: Iterable[Values], count_max: int) -> Iterator[list[Values]]:
    """Rows in parts, none of them held back when a part is full: so no more is in memory than a part, and one row."""
    part: list[Values] = []
    size = 0
    for row in rows:
        weight = sum(map(sys.getsizeof, row))
        if part and size + weight > PART_BYTES:
            yield part
            part, size = [], 0
        part.append(row)
        size += weight
        if size >= PART_BYTES or len(part) >= count_max:
            yield part
            part, size = [], 0
    if part:
        yield part


Observer = Callable[[int, int, float, bool], None]
"""observe(rows, failed rows, seconds, whether the batch was applied)."""


class Database(Protocol):
    """A database that is read from or copied to. One thread uses it. Raises StorageError where it cannot be reached."""

    dialect: Dialect
    shown: str
    """Its URL without a password."""

    def tables(self) -> list[str]:
        """The names of its tables."""

    def shape(self, name: str) -> Shape | None:
        """A table; None where there is none. Raises ConfigError for what is no table."""

    def size(self, name: str) -> int:
        """About how many rows it has."""

    def key_problem(self, shape: Shape) -> str | None:
        """Why the rows that are there cannot be read in the order of the key."""

    def pages(self, shape: Shape, columns: Sequence[str]) -> Page:
        """How the table is read."""

    def create(self, shape: Shape, name: str, types: Mapping[str, str]) -> None:
        """Make a table with the columns of `shape`, of these types, and its primary key."""

    def landing(self, route: Route, *, source: str, observe: Observer) -> Landing:
        """A backend for the rows of a table. `source` is where they come from: it must stay the same until they have all come."""

    def forget(self, store: bytes) -> None:
        """Remove what landings of a store have kept beside the rows. The store must be gone."""

    def close(self) -> None:
        """Release the connection. Idempotent."""
