"""LMDB as a backend: every key and its payload in one LMDB environment for each shard, exactly once.

What is not here: what the payloads mean, and when to batch. A key that is submitted again replaces its payload; a
`write` function of your own can do anything else inside the same transaction.

The idea needed to read it: a batch and the mark that covers it are committed in one transaction, so after any crash the
mark tells exactly which operations took effect. An operation that the mark covers is left out when it comes again.

```
path/
  layout.json       how many shards: a key must be looked up where it was put
  shard-000/        an LMDB environment; database `data` (key -> payload) and `marks`
  shard-001/        (store UUID, lane -> mark as in `core.mark`)
```

LMDB must not be used across a fork: in a child every method raises EngineClosed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from walbatch.backends.shard import KEY_BYTES_MAX, Shard, Transaction, set_aside_unfinished, shard_errors
from walbatch.core.checksum import crc32c
from walbatch.core.mark import check_epoch, fresh_indexes
from walbatch.core.routing import shard_of
from walbatch.errors import ConfigError, CorruptionError, EngineClosed, UnsupportedFormat
from walbatch.limits import GIB, KIB, MIB, SHARDS_MAX
from walbatch.types import Answer, Applied, Batch, Mark, Operation

MAP_BYTES: Final = 64 * MIB
"""A shard's map to begin with. It is address space, not memory or disk; but 256 shards share that, and containers limit
it, so it grows by doubling, with the data."""

MAP_BYTES_MAX: Final = 1024 * GIB
"""The default ceiling of one shard's file: beyond any store of small objects, and a runaway still ends in an error."""

LAYOUT_BYTES_MAX: Final = 4 * KIB
LAYOUT_NAME: Final = "layout.json"
LAYOUT_FORMAT: Final = "walbatch-lmdb"
LAYOUT_VERSION: Final = 1

Write = Callable[[Transaction, Operation], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class LmdbStats:
    """A snapshot. Bytes are those of all shards' files and maps."""

    shards: int
    count: int
    disk_bytes: int
    map_bytes: int


class LmdbBackend:
    """A transactional backend in the directory `path`, one LMDB environment for each shard of its lane.

    `map_bytes_max` bounds each shard's file. `write(txn, operation)`, if given, replaces the default write (put the
    payload under the key in the database `data`, which is the transaction's default): it runs once in effect for each
    operation, in order; what it returns is the ticket's result; what it raises undoes the whole batch. It must let
    `lmdb.Error` pass, and leave `txn` open.

    One lane uses it. Shards are written in parallel, each by one thread at a time. Reading (`get`, `count`, `items`) is
    safe from any thread, sees whole batches only, and works while the engine writes. Without an engine, the first
    reading opens what is there, read-only; another process may be writing it.
    """

    key_bytes_min: Final = 1
    key_bytes_max: Final = KEY_BYTES_MAX

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        map_bytes_max: int = MAP_BYTES_MAX,
        map_bytes: int = MAP_BYTES,
        write: Write | None = None,
    ) -> None:
        if not 0 < map_bytes <= map_bytes_max:
            raise ConfigError(
                f"map_bytes is {map_bytes:,}, but must be from 1 to map_bytes_max ({map_bytes_max:,})"
            )
        if write is not None and not callable(write):
            raise ConfigError(
                f"write must be a function of a transaction and an operation, not {type(write).__name__}"
            )
        self.path = Path(os.path.abspath(os.fspath(path)))  # noqa: PTH100 - resolve() would follow links
        self._map_bytes = map_bytes
        self._map_bytes_max = map_bytes_max
        self._write = write
        # Guards the fields below: opening and closing.
        self._lock = threading.Lock()
        self._shards: tuple[Shard, ...] = ()
        self._lane: str | None = None
        self._store = b""
        self._pid = os.getpid()

    def __repr__(self) -> str:
        use = f"lane {self._lane!r}" if self._lane is not None else "reading" if self._shards else "closed"
        return f"<LmdbBackend {self.path} {use}, {len(self._shards)} shards>"

    @property
    def url(self) -> str | None:
        """`lmdb:///path`, from which the command line makes it again; None with a `write` function, which no URL can name."""
        if self._write is not None:
            return None
        return f"lmdb://{quote(os.fsencode(self.path))}"

    # --- opening and closing --------------------------------------------------------------------------------------

    def open(self, lane: str, shards: int, store: bytes) -> None:
        """Make or open the shards for writing. What can be read afterwards is durable.

        Raises ConfigError for a second lane or another number of shards than before; StorageError and CorruptionError
        name the file and say what to do; UnsupportedFormat for a newer layout.
        """
        with self._lock:
            if self._lane is not None:
                raise ConfigError(
                    f"{self.path} is already the backend of lane {self._lane!r} and cannot be that of {lane!r} too: "
                    "give each lane an LmdbBackend and a directory of its own"
                )
            self._close_shards()
            with shard_errors(self.path):
                _make_directories(self.path)
                known = _read_layout(self.path)
            if known is not None and known != shards:
                raise ConfigError(
                    f"{self.path} has {known} shards, but the lane {lane!r} has {shards}: keys would be looked up in the "
                    f"wrong shard; use shards={known}, or another directory"
                )
            self._open_shards(shards, readonly=False, is_new=known is None)
            self._lane, self._store = lane, store

    def close(self) -> None:
        """Release the files. Idempotent. Reading afterwards opens them again, read-only."""
        with self._lock:
            self._close_shards()
            self._lane = None

    def _open_shards(self, count: int, *, readonly: bool, is_new: bool) -> None:
        """Open all, or none.

        Crash story: the layout is written last, when every shard and its name are durable. A crash before it leaves
        empty or unfinished shards, which the next open takes over; after it a shard that is not there was lost.
        """
        with contextlib.ExitStack() as stack:
            shards = []
            for number in range(count):
                path = self.path / f"shard-{number:03d}"
                with shard_errors(path):
                    if is_new:
                        path.mkdir(mode=0o700, exist_ok=True)
                        set_aside_unfinished(path)
                    elif not _is_directory(path):
                        raise CorruptionError(
                            f"{path} is gone, but {LAYOUT_NAME} says that there are {count} shards: restore it from a backup",
                            path=str(path),
                            expected="a directory",
                        )
                shard = Shard.open(
                    path, readonly=readonly, map_bytes=self._map_bytes, map_bytes_max=self._map_bytes_max
                )
                stack.callback(shard.close)
                shards.append(shard)
            if not readonly:
                with shard_errors(self.path):
                    self._prove_names(shards, is_new=is_new)
            stack.pop_all()
        self._shards = tuple(shards)
        self._pid = os.getpid()

    def _prove_names(self, shards: Sequence[Shard], *, is_new: bool) -> None:
        """Make every name that leads to the data durable: whoever made it may have been killed before its sync."""
        if not is_new:
            _sync_directory(self.path)
            return
        if any(shard.has_history() for shard in shards):
            raise CorruptionError(
                f"{self.path / LAYOUT_NAME} is gone, but there is data in the shards: restore it from a backup",
                path=str(self.path / LAYOUT_NAME),
                expected="the number of shards",
            )
        for number in range(len(shards)):
            _sync_directory(self.path / f"shard-{number:03d}")
        # A directory that may not be read was not made by us.
        with contextlib.suppress(PermissionError):
            for directory in (self.path, *self.path.parents):
                _sync_directory(directory)
        _write_layout(self.path, len(shards))

    def _close_shards(self) -> None:
        shards, self._shards = self._shards, ()
        if self._pid == os.getpid():
            for shard in shards:
                shard.close()

    # --- writing --------------------------------------------------------------------------------------------------

    def apply(self, batch: Batch) -> Answer:
        """Commit what the held mark does not cover of the batch, and the union of both marks, in one synced transaction.

        Crash story: before the commit nothing of the batch is there, after it all of it with its mark; LMDB has no
        state between. An engine that was killed before it heard of the commit offers the batch again, in other cuts
        perhaps, and the mark leaves out what took effect.

        Returns None, or with `write` an outcome for each operation (those that were covered give no result). Raises
        Fenced for the batch of an engine that a newer one replaced, CorruptionError for a damaged mark, StorageError;
        nothing of the batch took effect then.
        """
        shards = self._writable()
        shard = shards[batch.shard]
        key = self._mark_key(batch.lane, batch.store)
        return shard.update(lambda txn: self._apply_in(txn, shard, key, batch))

    def _apply_in(self, txn: Transaction, shard: Shard, key: bytes, batch: Batch) -> Answer:
        held = shard.mark(txn, key)
        check_epoch(batch, held)
        fresh = fresh_indexes(batch, held) if batch.mark is not None else None
        results = None
        if self._write is None:
            _put(txn, batch, fresh)
        else:
            results = _call(txn, batch, fresh, self._write)
        if batch.mark is not None:
            union = held.union(batch.mark)
            if union != held:
                shard.put_mark(txn, key, union)
        return results

    def applied_mark(self, shard: int) -> Mark:
        """The mark of this lane and store; `Mark()` where there is none. Durable. Raises CorruptionError, StorageError."""
        found = self._writable()[shard]
        assert self._lane is not None
        key = self._mark_key(self._lane, self._store)
        return found.view(lambda txn: found.mark(txn, key))

    def _writable(self) -> tuple[Shard, ...]:
        shards = self._shards
        if self._lane is None or self._pid != os.getpid():
            raise EngineClosed(f"{self.path} is not open for writing in this process: open it with an engine")
        return shards

    @staticmethod
    def _mark_key(lane: str, store: bytes) -> bytes:
        return store + lane.encode()

    # --- reading --------------------------------------------------------------------------------------------------

    def get(self, key: bytes) -> bytes | None:
        """The payload under `key`, or None. Raises StorageError, CorruptionError, ConfigError if there is no such data."""
        if not self.key_bytes_min <= len(key) <= self.key_bytes_max:
            return None
        shards = self._readable()
        shard = shards[shard_of(key, len(shards))]
        return shard.view(lambda txn: shard.get(txn, key))

    def count(self) -> int:
        """The number of keys. Each shard is counted at its own moment."""
        return sum(shard.view(shard.count) for shard in self._readable())

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """All (key, payload) pairs, by shard, then by key.

        Batches committed meanwhile may show or not; a key that is there all the time shows once. Memory: about a
        mebibyte, or one larger payload.
        """
        for shard in self._readable():
            pairs, last = shard.view(functools.partial(shard.chunk, after=None))
            yield from pairs
            while last is not None:
                pairs, last = shard.view(functools.partial(shard.chunk, after=last))
                yield from pairs

    def stats(self) -> LmdbStats:
        """A snapshot of sizes and counts."""
        shards = self._readable()
        return LmdbStats(
            shards=len(shards),
            count=self.count(),
            disk_bytes=sum(shard.disk_bytes() for shard in shards),
            map_bytes=sum(shard.map_bytes() for shard in shards),
        )

    def _readable(self) -> tuple[Shard, ...]:
        if self._shards and self._pid != os.getpid():
            raise EngineClosed(
                f"{self.path} was opened by the process that this one was forked from: make a new backend"
            )
        shards = self._shards
        if shards:
            return shards
        with self._lock:
            if not self._shards:
                with shard_errors(self.path):
                    count = _read_layout(self.path)
                if count is None:
                    raise ConfigError(
                        f"{self.path} holds no data of an LmdbBackend: nothing was ever applied there"
                    )
                self._open_shards(count, readonly=True, is_new=False)
            return self._shards


def _put(txn: Transaction, batch: Batch, fresh: Sequence[int] | None) -> None:
    """Put the last payload of each key: the earlier ones would be overwritten in the same transaction."""
    if fresh is None:
        last = dict(zip(batch.keys, batch.payloads, strict=True))
    else:
        last = {batch.keys[index]: batch.payloads[index] for index in fresh}
    with txn.cursor() as cursor:
        cursor.putmulti(last.items())


def _call(txn: Transaction, batch: Batch, fresh: Sequence[int] | None, write: Write) -> list[Applied]:
    """Call `write` for each fresh operation, in order."""
    wanted = None if fresh is None else set(fresh)
    return [
        Applied(write(txn, operation)) if wanted is None or index in wanted else Applied(None)
        for index, operation in enumerate(batch)
    ]


# --- the directory ------------------------------------------------------------------------------------------------


def _make_directories(path: Path) -> None:
    """Make a directory and its parents, mode 0700. Raises OSError."""
    missing = []
    while not _is_directory(path):
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        directory.mkdir(mode=0o700)


def _is_directory(path: Path) -> bool:
    """Whether it is one, following links. What cannot be looked at is not called missing. Raises OSError."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _sync_directory(path: Path) -> None:
    """Make the names in a directory durable. Raises OSError."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _write_layout(path: Path, shards: int) -> None:
    """Write layout.json, whole or not at all, durable. Raises OSError.

    Crash story: the bytes are synced under a temporary name before the rename; until the directory is synced the name
    may be missing again, and the next open writes it once more.
    """
    temporary = path / f"{LAYOUT_NAME}.tmp"
    layout = {
        "format": LAYOUT_FORMAT,
        "version": LAYOUT_VERSION,
        "shards": shards,
        "checksum": _layout_checksum(shards),
    }
    temporary.unlink(missing_ok=True)
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(file, "wb") as stream:
        stream.write(json.dumps(layout).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
    _sync_directory(path)
    temporary.rename(path / LAYOUT_NAME)
    _sync_directory(path)


def _read_layout(path: Path) -> int | None:
    """The number of shards; None where there is no layout. Raises CorruptionError, UnsupportedFormat, OSError."""
    file = path / LAYOUT_NAME
    try:
        with file.open("rb") as stream:
            data = stream.read(LAYOUT_BYTES_MAX + 1)
    except FileNotFoundError:
        return None
    damaged = CorruptionError(
        f"{file} is damaged: restore it from a backup", path=str(file), expected="a layout with its checksum"
    )
    try:
        fields: object = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise damaged from error
    if not isinstance(fields, dict) or fields.get("format") != LAYOUT_FORMAT or len(data) > LAYOUT_BYTES_MAX:
        raise damaged
    version, shards = fields.get("version"), fields.get("shards")
    if type(version) is int and version > LAYOUT_VERSION:
        raise UnsupportedFormat(f"{file} has version {version}: upgrade walbatch")
    if (
        type(shards) is not int
        or not 1 <= shards <= SHARDS_MAX
        or fields.get("checksum") != _layout_checksum(shards)
    ):
        raise damaged
    return shards


def _layout_checksum(shards: int) -> int:
    return crc32c(f"{LAYOUT_FORMAT} {LAYOUT_VERSION} {shards}".encode(), 0)
