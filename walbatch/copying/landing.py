"""Where rows arrive: backends that apply them exactly once, and store how far the source was read in the same transaction.

What is not here: making operations of rows (`course`), and the transaction itself (`backends.sql`).

The idea needed to read it: the bookmark lives in the target, with the rows that it stands for. Whatever is killed, and whatever the
target is taken back to, it says what is there. What lies between it and what was read waits in the store's log, and only there: a
group of rows is durable as a whole before the next one is read. So whoever goes on lets the log run dry, and asks the target then.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

from walbatch.backends.sql.applying import Transaction, Work, apply_batch
from walbatch.backends.sql.backend import SqlBackend
from walbatch.backends.sql.table import Row, Table, UnreadableError
from walbatch.copying.databases import Observer
from walbatch.copying.rows import NUMBER_BYTES, Decoder, RowError, key_of, latest, number_of, refusal_of
from walbatch.copying.shapes import Route
from walbatch.copying.values import Converter, convert, converters
from walbatch.errors import BackendBroken, ConfigError, CorruptionError
from walbatch.types import Answer, Batch, Failures

COPIES_TABLE: Final = "walbatch_copies"

CHANGED: Final = (
    "was begun for something else: {was}. Now it is: {now}. Go on with what it was begun for, or remove the store to begin anew, "
    "which copies all rows again"
)

LOST: Final = (
    "Remove the store, and what is in the target, and begin anew: rows in between are in neither of them"
)


class CopiedTable(Table):
    """A table whose operations are rows as `rows` packs them."""

    __slots__ = ("_by", "_is_plain", "_keys", "_names", "_values")
    _by: tuple[tuple[Converter | None, ...], tuple[Converter | None, ...]]
    _names: tuple[tuple[str, ...], tuple[str, ...]]
    _keys: Decoder
    _values: Decoder
    _is_plain: tuple[bool, bool]

    def __init__(self, route: Route) -> None:
        names = tuple(other.name for _, other in route.pairs)
        super().__init__(
            route.target.name, key=names[: route.key_count], columns=names[route.key_count :],
            key_codec=_not_used, codec=_not_used, create=False,
        )  # fmt: skip
        by, count = converters(route), route.key_count
        values: dict[str, Any] = {
            "_by": (by[:count], by[count:]), "_names": (names[:count], names[count:]),
            "_is_plain": (not any(by[:count]), not any(by[count:])), "_keys": Decoder(count),
            "_values": Decoder(len(names) - count),
        }  # fmt: skip
        for name, value in values.items():
            object.__setattr__(self, name, value)  # a frozen dataclass

    def read_key(self, key: bytes) -> Row:
        """See `Table`."""
        try:
            row = self._keys.decode(key)
            return row if self._is_plain[0] else convert(row, self._by[0], self._names[0])
        except RowError as error:
            raise UnreadableError(f"the key of the row cannot be read: {error}") from error

    def read_payload(self, payload: bytes) -> Row | None:
        """See `Table`."""
        refusal = refusal_of(payload)
        if refusal is not None:
            raise UnreadableError(refusal)
        try:
            row = self._values.decode(payload, NUMBER_BYTES)
            return row if self._is_plain[1] else convert(row, self._by[1], self._names[1])
        except RowError as error:
            raise UnreadableError(str(error)) from error


def _not_used(_: bytes) -> Any:
    raise AssertionError("rows are read by CopiedTable itself")


class Landed(SqlBackend):
    """What both landings share. A subclass says how the bookmark is written and read."""

    def arrange(self, route: Route, *, source: str, observe: Observer) -> None:
        """Say what comes here, and who is told of batches. Before `open`."""
        self._begun_for = f"{source}: {route.digest_text}"
        self._observe = observe
        self._name = route.target.name
        self._least: int | None = None

    def expect(self, number: int | None) -> None:
        """See `Landing`."""
        self._least = number

    @property
    def _is_first(self) -> bool:
        """Whether nothing was submitted yet, so that the bookmark is made when it is not there."""
        return self._least is None

    def apply(self, batch: Batch) -> Answer:
        """See `SqlBackend`. The bookmark is stored in the transaction of the batch.

        Crash story: what is committed is rows, mark and bookmark, or none of them. The bookmark is the highest of a batch, refused
        rows included: those are in the log until they are dead letters. Rows before it that are not here are in the log as well.
        """
        started = time.monotonic()
        self._check_open()
        has_bookmark = False

        def land(tx: Transaction) -> Work:
            nonlocal has_bookmark
            work = apply_batch(tx, batch, self.table, None)
            index = latest(batch.payloads)
            number, key = number_of(batch.payloads[index]), key_of(batch.keys[index], batch.payloads[index])
            self._store_bookmark(tx.cursor, number, key)
            has_bookmark = True
            return work

        try:
            work = self._transaction(batch, land)
            assert has_bookmark, "a batch was applied without its bookmark"
        except CorruptionError as error:
            raise BackendBroken(str(error)) from error
        except BaseException:
            self._observe(0, 0, time.monotonic() - started, False)
            raise
        failed = len(work.answer.outcomes) if isinstance(work.answer, Failures) else 0
        self._observe(len(work.lsns), failed, time.monotonic() - started, True)
        return work.answer

    def _store_bookmark(self, cursor: Any, number: int, key: bytes) -> None:
        raise NotImplementedError

    def _check_bookmark(self, row: Sequence[Any] | None) -> None:
        """Crash story: rows that have left the store are in the target, with the bookmark, unless somebody took the target back."""
        if row is None:
            raise ConfigError(
                f"table {self._name!r} of the target knows nothing of this copy, of which rows have arrived before: the target "
                f"was made anew, or taken back. {LOST}"
            )
        was, number = str(row[0]), int(row[1])
        if was != self._begun_for:
            raise ConfigError(f"the copy of this store {CHANGED.format(was=was, now=self._begun_for)}")
        if number < (self._least or 0):
            raise ConfigError(
                f"table {self._name!r} of the target has rows up to number {number:,}, and the store those from {self._least:,} "
                f"on only: the target was taken back. {LOST}"
            )
