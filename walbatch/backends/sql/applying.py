"""A batch in one transaction of a database: what is fresh of it, without the rows that the database refuses, and the mark.

What is not here: connections, statements, and what a database's errors mean: a `Transaction` of each database knows that.

The idea needed to read it: everything is tried at once, behind a savepoint. Where the database refuses a row, the savepoint is
gone back to, and the halves are tried, until what is refused stands alone. It is left out of the mark, too: until the engine has
kept it as a dead letter, it must come again after a crash.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from walbatch.backends.sql.table import Apart, Changes, Columns, Row, Table, read
from walbatch.core.mark import check_epoch, decode_mark, encode_mark, fresh_indexes, leave_out
from walbatch.errors import BackendBroken, BatchTooLarge, CorruptionError
from walbatch.types import Answer, Applied, Batch, Failures, Mark, Operation, Outcome, Rejected

Write = Callable[[Any, Operation], Any]
"""What a user does for an operation, with a cursor of the database's own kind."""

REFUSED_MAX: Final = 64
"""Refused rows of one call that are searched for. Each costs a few statements: beyond that, the time limit is at risk."""

REFUSED_COUNT_MAX: Final = 128
"""Operations of a batch in which any number may be refused. A larger one with more than REFUSED_MAX is cut to this size."""

MARKS_TABLE: Final = "walbatch_marks"

ENDED: Final = "has ended the transaction: it must not commit or roll back"
"""Harm that a `write` function can do in any database."""


class Transaction(Protocol):
    """One that is under way. Every method may raise the database's own errors."""

    cursor: Any
    """What a `write` function is given."""

    def save(self) -> None:
        """Make a savepoint."""

    def keep(self) -> None:
        """Release the newest savepoint."""

    @property
    def apart(self) -> Apart | None:
        """What the table's key columns keep apart; None where a delete must not go before a put of another key."""

    @property
    def harm(self) -> str | None:
        """What a `write` function has done to it that it must not do; None where it is as it was."""

    def undo(self) -> None:
        """Go back to the newest savepoint, and release it."""

    def delete(self, keys: Sequence[Row]) -> None:
        """Delete the rows with these keys; of plain tables there are none."""

    def put(self, columns: Columns) -> None:
        """Insert rows, or update those with their keys, in their order. Each key stands there once, as far as Python can tell."""

    def refusal(self, error: BaseException) -> str | None:
        """What the database says of a row that it refuses; None where an error is about something else."""

    def stored_mark(self, shard: int) -> tuple[int, bytes] | None:
        """Epoch and mark of a shard of this lane and store, locked until the end: nobody else changes them meanwhile."""

    def store_mark(self, shard: int, epoch: int, mark: bytes) -> None:
        """Replace them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What was done inside a transaction, and is true once it is committed."""

    answer: Answer
    lsns: Sequence[int]
    """Operations that take effect with the commit. They tell whether it took place, where its answer was lost."""
    mark: Mark | None
    """What the database holds after it; None where it was not looked at, for a batch without a mark."""


def apply_batch(tx: Transaction, batch: Batch, table: Table | None, write: Write | None) -> Work:
    """Do what is fresh of a batch, and store the union of both marks. One of `table` and `write` says how.

    Raises Fenced, CorruptionError for a damaged mark, BatchTooLarge where too much is refused, and what the database or `write`
    raises: the transaction is to be rolled back then.
    """
    held = read_mark(tx, batch.shard) if batch.mark is not None else Mark()
    check_epoch(batch, held)
    fresh = fresh_indexes(batch, held) if batch.mark is not None else None
    wanted = range(len(batch)) if fresh is None else fresh
    results: dict[int, Any] = {}
    if table is not None:
        changes, refused = read(table, batch.keys, batch.payloads, fresh)
        if len(changes):
            _Search(tx, changes, refused, len(batch)).run()
    else:
        assert write is not None
        results, refused = _call(tx, batch, wanted, write)
    applied = [batch.lsns[index] for index in wanted if index not in refused] if batch.lsns else []
    union = _union(batch, held, refused)
    if union is not None and union != held:
        tx.store_mark(batch.shard, union.epoch, encode_mark(union))
    return Work(answer=_answer(batch, results, refused, is_full=write is not None), lsns=applied, mark=union)


@dataclass(frozen=True, slots=True, kw_only=True)
class Puts:
    """A batch that comes to rows to put, and nothing else, and what is true once they are committed with `work.mark`."""

    columns: Columns
    work: Work


def only_puts(batch: Batch, held: Mark, table: Table) -> Puts | None:
    """What a batch comes to if `held` is what the database holds; None where that is more than rows to put, or less."""
    if batch.mark is None or held.epoch > batch.mark.epoch or (table.empty_deletes and b"" in batch.payloads):
        return None
    fresh = fresh_indexes(batch, held)
    changes, refused = read(table, batch.keys, batch.payloads, fresh)
    if not len(changes) or changes.has_deletes:
        return None
    columns = changes.puts(0, len(changes))
    applied = [batch.lsns[index] for index in changes.indexes]
    work = Work(
        answer=_answer(batch, {}, refused, is_full=False), lsns=applied, mark=_union(batch, held, refused)
    )
    return Puts(columns=columns, work=work)


def _union(batch: Batch, held: Mark, refused: Collection[int]) -> Mark | None:
    """The mark to store: without what is refused."""
    if batch.mark is None:
        return None
    return held.union(leave_out(batch.mark, [batch.lsns[index] for index in refused]))


def read_mark(tx: Transaction, shard: int) -> Mark:
    """The mark that the database holds; `Mark()` where there is none.

    Raises CorruptionError for a damaged one: taking it for empty would apply everything again.
    """
    stored = tx.stored_mark(shard)
    if stored is None:
        return Mark()
    epoch, data = stored
    try:
        mark = decode_mark(data)
        if mark.epoch != epoch:
            raise ValueError(f"the row says epoch {epoch}, the mark {mark.epoch}")
    except ValueError as error:
        raise CorruptionError(
            f"the mark of shard {shard} in {MARKS_TABLE} is damaged ({error}); which operations took effect cannot be told any "
            "more: restore the database from a backup",
            path=MARKS_TABLE, expected="a mark",
        ) from error  # fmt: skip
    return mark


def _answer(batch: Batch, results: dict[int, Any], refused: dict[int, str], *, is_full: bool) -> Answer:
    if not is_full:
        return Failures({index: Rejected(text) for index, text in refused.items()}) if refused else None
    outcomes: list[Outcome] = [Applied(results.get(index)) for index in range(len(batch))]
    for index, text in refused.items():
        outcomes[index] = Rejected(text)
    return outcomes


class _Search:
    """All changes at once, and by halves where a row is refused. `refused` grows."""

    def __init__(self, tx: Transaction, changes: Changes, refused: dict[int, str], batch_count: int) -> None:
        self._tx = tx
        self._changes = changes
        self._refused = refused
        self._batch_count = batch_count

    def run(self) -> None:
        self._try(0, len(self._changes))

    def _try(self, start: int, end: int) -> None:
        """From the front, so that changes take effect in their order also where they are tried in parts."""
        tx = self._tx
        steps = self._changes.fold(start, end, tx.apart)
        tx.save()
        try:
            for deletes, columns in steps:
                if deletes:
                    tx.delete(deletes)
                if columns:
                    tx.put(columns)
        except Exception as error:
            text = tx.refusal(error)
            if text is None:
                raise
            tx.undo()
        else:
            tx.keep()
            return
        if end - start == 1:
            self._refused[self._changes.indexes[start]] = text
            if len(self._refused) > REFUSED_MAX and self._batch_count > REFUSED_COUNT_MAX:
                raise BatchTooLarge(
                    f"more than {REFUSED_MAX} operations of the batch are refused, at last: {text}", count=REFUSED_COUNT_MAX
                )  # fmt: skip
            return
        middle = (start + end) // 2
        self._try(start, middle)
        self._try(middle, end)


def _call(
    tx: Transaction, batch: Batch, wanted: Sequence[int], write: Write
) -> tuple[dict[int, Any], dict[int, str]]:
    """Call `write` for each operation that is wanted, in order.

    Once without savepoints between them. If one is refused, again, with a savepoint for each, and without that one.
    """
    operations = list(batch)
    results: dict[int, Any] = {}
    refused: dict[int, str] = {}
    at = -1
    tx.save()
    try:
        for index in wanted:
            at = index
            results[index] = _written(tx, operations[index], write)
    except Exception as error:
        text = tx.refusal(error)
        if text is None:
            raise
        tx.undo()
        refused[at] = text
    else:
        tx.keep()
        return results, refused
    results.clear()
    for index in wanted:
        if index in refused:
            continue
        tx.save()
        try:
            results[index] = _written(tx, operations[index], write)
        except Exception as error:
            text = tx.refusal(error)
            if text is None:
                raise
            tx.undo()
            refused[index] = text
        else:
            tx.keep()
    return results, refused


def _written(tx: Transaction, operation: Operation, write: Write) -> Any:
    result = write(tx.cursor, operation)
    harm = tx.harm
    if harm is not None:
        raise BackendBroken(f"the write function {harm}")
    return result
