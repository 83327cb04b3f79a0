"""Whether two tables have the same rows: their counts, and a checksum that does not depend on the order.

What is not here: repairing what differs.

The idea needed to read it: a row becomes bytes that are the same for equal values in both databases; their hashes are added up. So
each table is read once, by pages, and two databases need not agree on an order. A source row goes the way of the copy first: what
is compared is what should be there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Final

from walbatch.copying.databases import Database
from walbatch.copying.report import Verification
from walbatch.copying.rows import RowError, Values
from walbatch.copying.shapes import Route, Shape, key_of
from walbatch.copying.values import canonical, convert, converters

PAGE_ROWS: Final = 5_000
PART_ROWS: Final = 50
_HASH_BYTES: Final = 16
_MODULUS: Final = 1 << (8 * _HASH_BYTES)


Reach = Callable[[Database, str, Callable[[], bool]], bool]
"""reach(database, what, ask): what `ask` returns, tried again while the database cannot be reached."""


def verify(
    source: Database, target: Database, route: Route, *, tell: Callable[[int], None], reach: Reach
) -> Verification:
    """Compare the tables of a route. `tell` is called with the rows that were read."""
    by, names = converters(route), [other.name for _, other in route.pairs]
    forms = canonical(route.pairs)
    of_source = [one.name for one, _ in route.pairs]

    def arrived(row: Values) -> Values:
        try:
            return convert(row, by, names)
        except RowError:
            return row  # it was refused: the counts tell

    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        tell(done)

    here = _Sum(forms, arrived)
    here.add_all(source, route.source, of_source, step, reach)
    there = _Sum(forms, None)
    there.add_all(target, route.target, names, step, reach)
    is_equal = (here.rows, here.sum) == (there.rows, there.sum)
    return Verification(source_rows=here.rows, target_rows=there.rows, is_equal=is_equal)


class _Sum:
    """Adds up the rows of a table."""

    def __init__(
        self, forms: Sequence[Callable[[Any], bytes]], arrived: Callable[[Values], Values] | None
    ) -> None:
        self._forms = forms
        self._arrived = arrived
        self.rows = 0
        self.sum = 0

    def add_all(
        self, database: Database, shape: Shape, columns: Sequence[str], step: Callable[[int], None], reach: Reach
    ) -> None:  # fmt: skip
        """Read a table from its beginning to its end. After a lost connection it goes on behind the last part."""
        key = key_of(shape).columns
        # The key may have other columns than that of the source, or in another order: it is read in front.
        page = database.pages(shape, [*key, *columns])
        after: Values = ()

        def add_page() -> bool:
            """Whether there was anything."""
            nonlocal after
            before = self.rows
            for rows in page(after, PAGE_ROWS, PART_ROWS):
                for row in rows:
                    self._add(row[len(key) :])
                after = rows[-1][: len(key)]
            step(self.rows - before)
            return self.rows > before

        while reach(database, f"table {shape.name!r}", add_page):
            pass

    def _add(self, row: Values) -> None:
        if self._arrived is not None:
            row = self._arrived(row)
        digest = hashlib.blake2b(digest_size=_HASH_BYTES)
        for form, value in zip(self._forms, row, strict=True):
            data = form(value)
            digest.update(b"%d:%b" % (len(data), data))
        self.rows += 1
        self.sum = (self.sum + int.from_bytes(digest.digest())) % _MODULUS
