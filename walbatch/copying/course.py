"""The course of a copy: what is checked before the first row, reading table by table, and the end.

What is not here: databases (`databases`), rows as bytes (`rows`), and applying them (`landing`).

The idea needed to read it: a page is read, made operations of, and submitted as one commit group, which is durable as a whole
before the next page is read. All behind that is the engine's: batches, retries, exactly once, dead letters. Where to go on stands
in the target, once the log has run dry.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from walbatch import limits
from walbatch.config import Adaptive, Lane, RetryPolicy, Settings, Trigger
from walbatch.copying.databases import Bookmark, Database, Landing
from walbatch.copying.itinerary import Itinerary, make_itinerary, target_names
from walbatch.copying.opening import open_database
from walbatch.copying.reading import GROUP_BYTES_MAX, PAGE_ROWS_MAX, Reader
from walbatch.copying.record import NAME as RECORD_NAME
from walbatch.copying.record import Record, check, least_numbers, read, write
from walbatch.copying.report import CopyReport, Memory, ProgressFunction, Tally, Verification
from walbatch.copying.rows import key_of, number_of
from walbatch.copying.shapes import Route
from walbatch.copying.verifying import verify as verify_route
from walbatch.engine import Engine
from walbatch.errors import BackendError, ConfigError, CorruptionError, ResultTimeout, StorageError
from walbatch.inspection import find_store, look
from walbatch.storage.statefolder import os_errors, sync_directory

_logger = logging.getLogger("walbatch")
_T = TypeVar("_T")

MEMORY_BYTES: Final = 512 * limits.MIB
MEMORY_BYTES_MIN: Final = 64 * limits.MIB
PAUSE_PART: Final = 0.8
"""The part of the memory ceiling from which on nothing more is read until the target has taken what was."""

BATCH_S: Final = 5.0
LATENCY_PART: Final = 0.2
"""The part of a batch's time limit that the size controller aims at."""

STALL_S: Final = 60.0
FAILED_MAX: Final = 10_000
"""Rows that may fail before a copy gives up: something else is wrong then."""

PENDING_BATCHES: Final = 4
"""Batches' worth of rows that may wait in the log: enough that the target never waits for the source."""

QUEUE_BYTES_MIN: Final = 24 * limits.MIB
"""Enough for the largest row."""

LARGE_COPIES: Final = 4
"""How often a row that is larger than a group is in memory on its way: as its values, packed, in a frame, in the target's call."""

WAIT_S: Final = 0.05
RECONNECT_S: Final = 0.2

BATCH_ROWS_MIN: Final = (20, 500)
BATCH_ROWS_MAX: Final = (500, 20_000)
"""Bounds of the smallest and the largest batch: a hundredth, and a tenth, of the table lies within them."""

DONE_SUFFIX: Final = ".done"


def copy_tables(
    source: str, target: str, tables: Sequence[str] | Mapping[str, str], *, store: str | os.PathLike[str], create: bool = False,
    verify: bool = False, memory_bytes: int | None = None, batch_s: float = BATCH_S, stall_s: float = STALL_S,
    progress: ProgressFunction | None = None,
) -> CopyReport:  # fmt: skip
    """Copy tables from one database to another, each row exactly once, whatever is killed in between.

    `source` and `target` are URLs: `sqlite:///path` or `postgresql://...`. `tables` are names, or a mapping of names in the source
    to names in the target. `store` is a directory: it holds what was read and is not in the target yet. Calling this again with the
    same one goes on where the last call ended. It is removed when everything is in the target, and kept while rows failed. `create`
    makes tables that the target has not. `verify` compares both tables afterwards. `memory_bytes` is what this process may have in
    memory (None: 512 MiB more than it has): at 80 % nothing more is read. A batch has `batch_s` seconds. After `stall_s` without
    progress it gives up, and says so in the report. `progress` is called after each page and each batch, in the engine's threads,
    too.

    Rows that the target refuses are dead letters of the store. Raises ConfigError with everything that does not fit, before the
    first row; StorageError where a database cannot be reached or the store fails, StoreLocked, CorruptionError, UnsupportedFormat.
    """
    names = dict(tables) if isinstance(tables, Mapping) else dict.fromkeys(tables, "")
    here, there = open_database(source, role="source"), open_database(target, role="target")
    place = Path(store)
    try:
        wanted = Record(source=here.shown, target=there.shown, tables=target_names(there, names))
        done = _removed(place, wanted)
        begun = check(place, wanted) if names and done is None else None
        memory = _memory(memory_bytes)
        plan = make_itinerary(here, there, names, create=create)
        if done is not None and _is_emptied(here, there, plan):
            _remove_done(place)
            done = None
        course = _Course(
            here, there, plan, memory, place, begun or wanted, batch_s=batch_s, stall_s=stall_s, progress=progress
        )  # fmt: skip
        return course.run(verify=verify) if done is None else course.end(done, verify=verify)
    finally:
        here.close()
        there.close()


# --- before the first row -----------------------------------------------------------------------------------------


def _memory(ceiling_bytes: int | None) -> Memory:
    if ceiling_bytes is None:
        ceiling_bytes = MEMORY_BYTES + int(Memory(0).look() / PAUSE_PART)
    memory = Memory(ceiling_bytes)
    used = memory.look()
    if ceiling_bytes < MEMORY_BYTES_MIN or used > PAUSE_PART * ceiling_bytes:
        wanted = max(MEMORY_BYTES_MIN, 2 * used) // limits.MIB + 1
        raise ConfigError(
            f"{ceiling_bytes:,} bytes of memory are too few: this process has {used:,} before the first row; allow {wanted:,} MiB"
        )
    return memory


# --- reading and submitting ---------------------------------------------------------------------------------------


@dataclass
class _Table:
    """A table that is being copied."""

    way: Route
    landing: Landing
    tally: Tally
    batch_rows_max: int
    bookmark: Bookmark

    @property
    def name(self) -> str:
        """Of the target, and of its lane."""
        return self.way.target.name


class _Stop(Exception):
    """The copy ends before it is complete."""


class _Course:
    """One run of a copy."""

    def __init__(
        self, here: Database, there: Database, plan: Itinerary, memory: Memory, store: Path, record: Record, *,
        batch_s: float, stall_s: float, progress: ProgressFunction | None,
    ) -> None:  # fmt: skip
        self._here, self._there = here, there
        self._memory = memory
        self._store = store
        self._record = record
        self._batch_s, self._stall_s = batch_s, stall_s
        self._started = time.monotonic()
        # Notified when a batch has ended.
        self._news = threading.Condition()
        self._progress = progress
        self._tables = [self._table(way, is_created=way.target.name in plan.created) for way in plan.routes]
        self._engine: Engine | None = None

    def _table(self, way: Route, *, is_created: bool) -> _Table:
        size = self._here.size(way.source.name)
        tally = Tally(
            table=way.source.name, target=way.target.name, size=size, memory=self._memory, news=self._news,
            progress=self._progress, is_created=is_created,
        )  # fmt: skip
        landing = self._there.landing(way, source=self._here.shown, observe=tally.observe)
        low, high = BATCH_ROWS_MAX
        rows_max = max(low, min(high, size // 10))
        return _Table(
            way=way, landing=landing, tally=tally, batch_rows_max=rows_max, bookmark=Bookmark(0, b"")
        )

    def run(self, *, verify: bool) -> CopyReport:
        """Copy all tables, and look at what came of it."""
        error: str | None = None
        with self._open() as engine:
            try:
                self._copy(engine)
            except _Stop as stop:
                error = str(stop)
            except BackendError as broken:
                error = str(broken)
            failed = self._failed(engine)
            remaining = engine.close(drain=False).remaining
        verifications: dict[str, Verification] = {}
        if error is None and verify:
            verifications, error = self._verify()
        is_kept = error is not None or bool(remaining) or any(failed.values())
        if not is_kept:
            self._remove_store()
        return self._report(failed, verifications, is_kept=is_kept, remaining=remaining, error=error)

    def end(self, record: Record, *, verify: bool) -> CopyReport:
        """What `run` was cut off at: the copy was complete, and its store is being removed."""
        for table in self._tables:
            table.tally.is_complete = True
            table.tally.ended = table.tally.started
        self._forget(record)
        _remove_done(self._store)
        verifications, error = self._verify() if verify else ({}, None)
        return self._report({}, verifications, is_kept=False, remaining=0, error=error)

    def _report(
        self, failed: Mapping[str, int], verifications: Mapping[str, Verification], *, is_kept: bool, remaining: int,
        error: str | None,
    ) -> CopyReport:  # fmt: skip
        return CopyReport(
            tables=tuple(
                table.tally.report(failed=failed.get(table.name, 0), verification=verifications.get(table.name))
                for table in self._tables
            ),
            store=str(self._store), is_store_kept=is_kept, seconds=time.monotonic() - self._started,
            peak_memory_bytes=self._memory.peak_bytes, remaining=remaining, error=error,
        )  # fmt: skip

    def _open(self) -> contextlib.AbstractContextManager[Engine]:
        share = self._memory.ceiling_bytes // 16
        settings = Settings(
            memory_bytes_max=max(limits.MIB, share), queue_bytes_max=max(QUEUE_BYTES_MIN, share), dead_letters_max=FAILED_MAX,
            segment_bytes=16 * limits.MIB,
        )  # fmt: skip
        self._store.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        is_begun = bool(self._record.store)
        least = least_numbers(self._store) if is_begun else {}
        for table in self._tables:
            table.landing.expect(least.get(table.name, 0) if is_begun else None)
        engine = Engine.open(
            self._store, {table.name: self._lane(table) for table in self._tables}, settings=settings
        )
        try:
            if not is_begun:
                # From here on the target has the bookmarks, and the first row may be submitted.
                uuid = look(find_store(self._store).root).store.uuid or ""
                self._record = dataclasses.replace(self._record, store=uuid)
                write(self._store, self._record)
        except BaseException:
            engine.close(drain=False)
            raise

        @contextlib.contextmanager
        def closing() -> Any:
            try:
                yield engine
            finally:
                engine.close(drain=False)

        return closing()

    def _lane(self, table: _Table) -> Lane:
        """One shard: rows arrive in the order of their key, which is where B-trees grow best."""
        low, high = BATCH_ROWS_MIN
        least = max(low, min(high, table.tally.size // 100))
        latency_ms = 1_000 * LATENCY_PART * self._batch_s
        return Lane(
            table.landing, order="shard", trigger=Trigger(bytes=GROUP_BYTES_MAX), timeout_s=self._batch_s,
            controller=Adaptive(latency_ms=latency_ms, count_min=least, count_max=table.batch_rows_max),
            retry=RetryPolicy(ceiling_s=2.0, deaths_share_max=1, breaker_s=0.2, breaker_s_max=2.0),
        )  # fmt: skip

    def _copy(self, engine: Engine) -> None:
        self._flush(engine, [table.name for table in self._tables])
        for table in self._tables:
            self._find_bookmark(engine, table)
        for table in self._tables:
            table.tally.started = table.tally.progressed = time.monotonic()
            self._read(engine, table)
            self._flush(engine, [table.name])
            self._try_again(engine, table)
            table.tally.is_complete = True
            table.tally.ended = time.monotonic()
            table.tally.tell()
        if len(self._tables) > 1:
            self._try_again(engine, *self._tables)

    def _find_bookmark(self, engine: Engine, table: _Table) -> None:
        """Where to go on. With the log dry, every row that was read is there, or a dead letter: behind the last of those.

        They have no gap, unless the target was taken back, or letters were dropped: then the rows in it are read again.
        """
        bookmark = self._reaching(
            self._there, f"the bookmark of table {table.name!r}", table.landing.bookmark
        )
        dead = {
            number_of(letter.payload): key_of(letter.key, letter.payload)
            for letter in engine.dead_letters(table.name)
        }
        while (key := dead.get(bookmark.number + 1)) is not None:
            bookmark = Bookmark(bookmark.number + 1, key)
        table.bookmark = bookmark
        table.tally.read_before = table.bookmark.number

    def _read(self, engine: Engine, table: _Table) -> None:
        """Read all rows behind the bookmark, and submit them."""
        tally = table.tally
        reader = Reader(self._here, table.way, table.bookmark)
        while True:
            self._wait_for_room(engine, table, LARGE_COPIES * max(0, reader.size - GROUP_BYTES_MAX))
            group = self._reaching(
                self._here,
                f"table {table.way.source.name!r}",
                lambda: reader.read(is_short=self._is_short(), is_full=self._is_short),
            )
            if group.operations:
                engine.submit_many(table.name, group.operations, timeout=self._stall_s)
                tally.read += len(group.operations)
                tally.progressed = time.monotonic()
                tally.tell()
            if group.is_last:
                return

    def _is_short(self) -> bool:
        return self._memory.is_short(PAUSE_PART)

    def _reaching(self, database: Database, what: str, ask: Callable[[], _T]) -> _T:
        """What `ask` returns, tried again and again while its database cannot be reached."""
        deadline = time.monotonic() + self._stall_s
        while True:
            try:
                return ask()
            except CorruptionError:
                raise
            except StorageError as error:
                database.close()
                if time.monotonic() > deadline:
                    raise _Stop(f"{what} cannot be read: {error}") from error
            with self._news:
                self._news.wait(RECONNECT_S)

    def _wait_for_room(self, engine: Engine, table: _Table, extra_bytes: int) -> None:
        """Wait until the target has taken enough of what was read, and there is memory for more, and for `extra_bytes`."""
        tally = table.tally
        rows_max = max(PENDING_BATCHES * table.batch_rows_max, 2 * PAGE_ROWS_MAX)
        bytes_max = self._memory.ceiling_bytes // 8
        while True:
            stats = engine.stats()
            lane = stats.lanes[table.name]
            is_short = self._memory.is_short(PAUSE_PART, extra_bytes)
            is_full = stats.pending > rows_max or lane.in_memory_bytes > bytes_max
            if is_short and not stats.pending:
                self._memory.release()  # nothing of ours is left to wait for: on with the smallest pages
                is_short = False
            if not is_short and not is_full:
                tally.is_paused = False
                return
            tally.is_paused = True
            self._check_goes_on(engine, table)
            with self._news:
                self._news.wait(WAIT_S)

    def _check_goes_on(self, engine: Engine, table: _Table) -> None:
        """Raise _Stop where nothing has arrived for too long."""
        if (
            time.monotonic() - max(self._started, *(one.tally.progressed for one in self._tables))
            <= self._stall_s
        ):
            return
        lane = engine.stats().lanes[table.name]
        reasons = "; ".join(reason.text for reason in engine.health().reasons) or "the target takes nothing"
        raise _Stop(
            f"nothing has arrived in table {table.name!r} for {self._stall_s:g} s: {reasons}"
            + (f"; its last error: {lane.last_error}" if lane.last_error else "")
        )

    def _flush(self, engine: Engine, names: Sequence[str]) -> None:
        """Wait until all that was submitted has arrived, or failed."""
        by_name = {table.name: table for table in self._tables}
        for name in names:
            while True:
                try:
                    engine.flush(name, timeout=1.0)
                    break
                except ResultTimeout:
                    self._check_goes_on(engine, by_name[name])

    def _try_again(self, engine: Engine, *tables: _Table) -> None:
        """Try rows that failed again once all others are there, as long as that helps: they may refer to those."""
        failed = sum(len(engine.dead_letters(table.name)) for table in tables)
        while failed:
            for table in tables:
                if letters := engine.dead_letters(table.name):
                    engine.requeue([letter.lsn for letter in letters], per_second=1e6)
                    self._flush(engine, [table.name])
                    table.tally.failed = len(engine.dead_letters(table.name))
            left = sum(table.tally.failed for table in tables)
            if left >= failed:
                return
            failed = left

    def _failed(self, engine: Engine) -> dict[str, int]:
        return {table.name: len(engine.dead_letters(table.name)) for table in self._tables}

    # --- the end --------------------------------------------------------------------------------------------------

    def _verify(self) -> tuple[dict[str, Verification], str | None]:
        """What comparing found, and why not all was compared."""
        self._there.close()  # it was not used for long, and may be dead
        found: dict[str, Verification] = {}
        try:
            for table in self._tables:
                found[table.name] = verify_route(
                    self._here, self._there, table.way, tell=lambda _: None, reach=self._reaching
                )
        except _Stop as stop:
            return found, str(stop)
        return found, None

    def _remove_store(self) -> None:
        """Remove the store, and what the target has kept for it.

        Crash story: the store is renamed first, durably, so that no half of it is taken for a store; by that name the next call
        sees that the copy was complete, and removes what is left. The target's rows for it go after that: as long as there is a
        store, it must find them. The record goes last.
        """
        done = _done_path(self._store)
        with os_errors(str(self._store), "removed"):
            if done.exists():
                shutil.rmtree(done)
            self._store.rename(done)
            sync_directory(str(done.parent))
        self._forget(self._record)
        _remove_done(self._store)

    def _forget(self, record: Record) -> None:
        self._there.close()
        try:
            self._reaching(
                self._there, "what the target keeps of the copy", lambda: self._there.forget(bytes.fromhex(record.store))
            )  # fmt: skip
        except (_Stop, ConfigError, StorageError) as error:  # they are in nobody's way
            _logger.warning("rows of a copy that is complete are left in the target: %s", error)


def _done_path(store: Path) -> Path:
    return store.with_name(store.name + DONE_SUFFIX)


def _removed(store: Path, wanted: Record) -> Record | None:
    """The record of a copy that was complete, and was cut off while it removed its store. What is left of another is removed."""
    done = _done_path(store)
    if store.exists() or not done.is_dir():
        return None
    try:
        found = read(done)
    except StorageError:
        found = None
    if found is not None and found.is_same_copy(wanted):
        return found
    _remove_done(store)
    return None


def _is_emptied(here: Database, there: Database, plan: Itinerary) -> bool:
    """Whether the target cannot be what a complete copy left."""
    return bool(plan.created) or any(
        here.size(way.source.name) and not there.size(way.target.name) for way in plan.routes
    )


def _remove_done(store: Path) -> None:
    """Remove a store that was renamed, its record last."""
    done = _done_path(store)
    with os_errors(str(done), "removed"):
        for entry in done.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != RECORD_NAME:
                entry.unlink(missing_ok=True)
        shutil.rmtree(done)
        sync_directory(str(done.parent))
