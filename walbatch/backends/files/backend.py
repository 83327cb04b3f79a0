"""A folder as a backend: each batch becomes one file, exactly once. What is in a file is its format's business.

What is not here: why a file shows once (`stream`), and formats (`jsonlines`, `parquet`).

```
folder/
  put-5f0c2a1e-000-000000000042.jsonl          lane, stream, shard, number: yours to read, move, delete
  .put-5f0c2a1e-000-000000000043.….tmp         the next one, hidden until it is whole and committed
  .walbatch/(store's UUID)-put/                marks: must stay where files of this store are still to come
    layout.json                                shards, suffix and the stream's name
    lock
    000.00000007.mark                          of each shard, by opening: the highest counts
```

The stream's name is drawn when `.walbatch` is made: after it was deleted, numbers begin anew and names do not come again.

The idea needed to read it: the folder belongs to its readers, `.walbatch` to the backend.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Final
from urllib.parse import quote

from walbatch.backends.files.stream import Place, Stream
from walbatch.core.checksum import crc32c
from walbatch.core.mark import check_epoch, fresh_indexes, leave_out
from walbatch.errors import (
    BackendBroken,
    ConfigError,
    CorruptionError,
    EngineClosed,
    RetryBatch,
    StorageError,
    UnsupportedFormat,
)
from walbatch.limits import KIB, SHARDS_MAX
from walbatch.ports import FileLock, FileSystem
from walbatch.storage.filesystem import RealFileSystem
from walbatch.types import Answer, Batch, Failures, Mark, Rejected

STATE_NAME: Final = ".walbatch"
LAYOUT_NAME: Final = "layout.json"
LAYOUT_FORMAT: Final = "walbatch-files"
LAYOUT_VERSION: Final = 1
LAYOUT_BYTES_MAX: Final = 4 * KIB
STREAM_BYTES: Final = 4
NAME_BYTES_MAX: Final = 255

WAIT_PART: Final = 0.5
"""The part of a call's time limit that it waits for a call that was given up and still writes."""

CLOSE_WAIT_S: Final = 5.0
"""How long closing waits for such calls, all together."""

CALL_S: Final = 30.0
"""How long a call may take where nobody said: what a lane's `timeout_s` is by default."""

_BROKEN: Final = frozenset({
    errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ESTALE,
})  # fmt: skip
"""What does not pass by itself: the folder is gone, or may not be written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A file's content. `rejected` says of operations, by their index in the batch, why they cannot stand in one."""

    content: Sequence[bytes]
    count: int
    """Operations that are in it; with none of them there is no file."""
    rejected: Mapping[int, str] = field(default_factory=dict)


class FilesBackend(abc.ABC):
    """A transactional backend in the folder `path`: a subclass says what is in a file. Safe from any thread.

    The folder is made if it is missing. One lane writes there for each object; several lanes and stores may share a folder.
    """

    key_bytes_min: int = 0

    def __init__(self, path: str | os.PathLike[str], suffix: str, fs: FileSystem | None) -> None:
        self.path: Final = Path(os.path.abspath(os.fspath(path)))  # noqa: PTH100 - resolve() would follow links
        self.suffix: Final = suffix
        self._fs: FileSystem = fs if fs is not None else RealFileSystem()
        self._limit_s: float | None = CALL_S
        # Guards all below: opening and closing.
        self._lock = Lock()
        self._lane: str | None = None
        self._streams: tuple[Stream, ...] = ()
        self._held: FileLock | None = None
        self._pid = os.getpid()

    def __repr__(self) -> str:
        use = f"lane {self._lane!r}, {len(self._streams)} shards" if self._lane is not None else "closed"
        return f"<{type(self).__name__} {self.path} {use}>"

    @abc.abstractmethod
    def encode(self, batch: Batch, wanted: Sequence[int]) -> Encoded:
        """The file of these operations of a batch, in their order."""

    @property
    @abc.abstractmethod
    def url(self) -> str | None:
        """The URL from which the command line makes it again; None with a function, which no URL can name."""

    def _url(self, scheme: str, fields: Mapping[str, str]) -> str:
        query = "&".join(f"{name}={quote(value, safe=',:')}" for name, value in fields.items())
        return f"{scheme}://{quote(os.fsencode(self.path))}{'?' if query else ''}{query}"

    # --- opening and closing --------------------------------------------------------------------------------------

    def limit_time(self, timeout_s: float | None) -> None:
        """How long a call may take, from now on: what the lane allows. None: for ever."""
        self._limit_s = timeout_s

    def open(self, lane: str, shards: int, store: bytes) -> None:
        """Make the folder or take it over: show what was committed, throw away what was not. What is visible is durable then.

        Raises ConfigError for a second lane, another number of shards or another format than before; StorageError where
        another process has it open; CorruptionError, UnsupportedFormat, StorageError name the file and say what to do.
        """
        with self._lock:
            if self._lane is not None:
                raise ConfigError(
                    f"{self!r} cannot be the backend of lane {lane!r} too: give each lane one of its own"
                )
            self._pid = os.getpid()
            try:
                with _at_opening(str(self.path)):
                    self._open(lane, shards, store)
            except BaseException:
                self._release()
                raise
            self._lane = lane

    def _open(self, lane: str, shards: int, store: bytes) -> None:
        fs, state = self._fs, f"{self.path}/{STATE_NAME}/{store.hex()}-{quote(lane, safe='')}"
        _make_directories(fs, state)
        note = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
        held = fs.lock(f"{state}/lock", note)
        if isinstance(held, bytes):
            raise StorageError(
                f"{self.path} is written by another process ({held.decode(errors='replace')}): close that one",
                path=str(self.path),
            )
        self._held = held
        layout = _read_layout(fs, state)
        if layout is None:
            layout = _Layout(stream=os.urandom(STREAM_BYTES).hex(), shards=shards, suffix=self.suffix)
            places = self._places(lane, layout, state)
            self._make(places, layout, state)
        if layout.shards != shards:
            raise ConfigError(
                f"{self.path} has {layout.shards} shards of lane {lane!r}, but the lane has {shards}: use "
                f"shards={layout.shards}, or another folder"
            )
        if layout.suffix != self.suffix:
            raise ConfigError(
                f"{self.path} has files of lane {lane!r} named *{layout.suffix}, but now they would be *{self.suffix}: use another "
                "folder"
            )
        for place in self._places(lane, layout, state):
            stream = Stream(fs, place)
            self._streams += (stream,)
            stream.open()

    def _places(self, lane: str, layout: _Layout, state: str) -> list[Place]:
        name = quote(lane, safe="")
        prefix = f"%2E{name[1:]}" if name.startswith(".") else name  # files are not hidden
        places = [
            Place(
                folder=str(self.path), prefix=f"{prefix}-{layout.stream}-{shard:03d}", suffix=self.suffix,
                state=state, shard=shard,
            )
            for shard in range(layout.shards)
        ]  # fmt: skip
        assert len(os.path.basename(places[0].taken(0, 0))) <= NAME_BYTES_MAX  # noqa: PTH119 - no file's path
        return places

    def _make(self, places: Sequence[Place], layout: _Layout, state: str) -> None:
        """Write the marks of new shards, then the layout.

        Crash story: the layout is written last, when every mark file and its name are durable; a crash before leaves what the
        next opening makes anew. After it a mark file that is not there was lost.
        """
        for place in places:
            if any(place.openings(self._fs)[0]):
                raise CorruptionError(
                    f"{state}/{LAYOUT_NAME} is gone, but there are marks beside it: restore it from a backup",
                    path=f"{state}/{LAYOUT_NAME}",
                    expected="the number of shards",
                )
        for place in places:
            Stream.create(self._fs, place)
        self._fs.sync_directory(state)
        _write_layout(self._fs, state, layout)

    def close(self) -> None:
        """Release the files. Idempotent. What a call that was given up still uses is released when that ends."""
        with self._lock:
            self._lane = None
            self._release()

    def _release(self) -> None:
        streams, self._streams = self._streams, ()
        if self._pid != os.getpid():
            return  # of a forked child: they are the parent's
        for stream in streams:
            stream.is_wanted = False
        deadline = time.monotonic() + CLOSE_WAIT_S
        for stream in streams:
            if stream.lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
                stream.close()
                stream.lock.release()
        held, self._held = self._held, None
        if held is not None:
            held.release()

    # --- writing --------------------------------------------------------------------------------------------------

    def apply(self, batch: Batch) -> Answer:
        """Write what the held mark does not cover of the batch as one file, and commit it with the union of both marks.

        Crash story: see `stream`. An engine that was killed before it heard of the commit offers the batch again, in other cuts
        perhaps, and the mark leaves out what is in files.

        Returns None, or Failures with what cannot stand in a file. Raises Fenced for the batch of an engine that a newer one
        replaced, and a BatchFailure that says what to do.
        """
        stream = self._stream(batch.shard)
        if not stream.lock.acquire(timeout=self._wait_s()):
            raise RetryBatch(f"{self.path}: an earlier call has written for {self._wait_s():g} s")
        try:
            if not stream.is_wanted:
                raise EngineClosed(f"{self!r} is closed")
            try:
                return self._apply_to(stream, batch)
            except OSError as error:
                raise _ours(error) from error
            except CorruptionError as error:
                raise BackendBroken(str(error)) from error
        finally:
            if not stream.is_wanted:
                stream.close()
            stream.lock.release()

    def _apply_to(self, stream: Stream, batch: Batch) -> Answer:
        stream.settle()
        held = stream.mark
        check_epoch(batch, held)
        fresh = fresh_indexes(batch, held) if batch.mark is not None else None
        encoded = self.encode(batch, range(len(batch)) if fresh is None else fresh)
        mark = held
        if batch.mark is not None:
            # What is rejected must come again after a crash, until the engine has kept it as a dead letter.
            mark = held.union(leave_out(batch.mark, [batch.lsns[index] for index in encoded.rejected]))
        if encoded.count:
            stream.add(encoded.content, mark)
        else:
            stream.advance(mark)
        return (
            Failures({index: Rejected(text) for index, text in encoded.rejected.items()})
            if encoded.rejected
            else None
        )

    def applied_mark(self, shard: int) -> Mark:
        """The mark of this lane and store; `Mark()` where there is none. Durable. Raises StorageError while a call still writes."""
        stream = self._stream(shard)
        wait_s = CALL_S if self._limit_s is None else self._limit_s
        if not stream.lock.acquire(timeout=wait_s):
            raise StorageError(
                f"{self.path}: a call has written to shard {shard} for {wait_s:g} s. Look at the disk, and open again",
                path=str(self.path),
            )
        try:
            return stream.mark
        finally:
            stream.lock.release()

    def _stream(self, shard: int) -> Stream:
        streams = self._streams
        if self._lane is None or self._pid != os.getpid():
            raise EngineClosed(f"{self!r} is not open in this process: open it with an engine")
        return streams[shard]

    def _wait_s(self) -> float:
        return -1 if self._limit_s is None else WAIT_PART * self._limit_s


def _ours(error: OSError) -> Exception:
    """What the engine is to do about an error of the file system. A full or failing disk passes; nobody loses an attempt."""
    text = f"{error.filename or 'a file'}: {error.strerror}"
    if error.errno in _BROKEN:
        return BackendBroken(f"{text}: the folder must be there, and writable for this user")
    return RetryBatch(text)


@contextlib.contextmanager
def _at_opening(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{error.filename or path}: {error.strerror}: the folder must be writable, and its files there. Repair what "
            "failed, and open again",
            path=str(error.filename or path),
            errno=error.errno,
        ) from error
    except BackendBroken as error:
        raise StorageError(f"{error}; then open again", path=path) from error


# --- the layout ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    stream: str
    shards: int
    suffix: str

    @property
    def checksum(self) -> int:
        return crc32c(
            f"{LAYOUT_FORMAT} {LAYOUT_VERSION} {self.stream} {self.shards} {self.suffix}".encode(), 0
        )


def _make_directories(fs: FileSystem, path: str) -> None:
    """Make a directory and its parents, and make their names durable: whoever made them may have been killed before its sync."""
    parts = path.split("/")
    for end in range(2, len(parts) + 1):
        directory = "/".join(parts[:end])
        if not fs.is_directory(directory):
            fs.make_directory(directory)
    for end in range(len(parts), 0, -1):
        # A directory that may not be read was not made by us.
        with contextlib.suppress(PermissionError):
            fs.sync_directory("/".join(parts[:end]) or "/")


def _write_layout(fs: FileSystem, state: str, layout: _Layout) -> None:
    """Write it whole or not at all, durable.

    Crash story: the bytes are synced under a temporary name before the rename; until the directory is synced the name may be
    missing again, and the next opening makes everything once more.
    """
    fields: dict[str, Any] = {
        "format": LAYOUT_FORMAT, "version": LAYOUT_VERSION, "stream": layout.stream, "shards": layout.shards,
        "suffix": layout.suffix, "checksum": layout.checksum,
    }  # fmt: skip
    temporary = f"{state}/{LAYOUT_NAME}.tmp"
    if fs.exists(temporary):
        fs.unlink(temporary)
    file = fs.create(temporary)
    try:
        file.write([json.dumps(fields).encode() + b"\n"], 0)
        file.datasync()
    finally:
        file.close()
    fs.rename(temporary, f"{state}/{LAYOUT_NAME}")
    fs.sync_directory(state)


def _read_layout(fs: FileSystem, state: str) -> _Layout | None:
    """The layout; None where there is none. Raises CorruptionError, UnsupportedFormat, OSError."""
    path = f"{state}/{LAYOUT_NAME}"
    try:
        file = fs.open_read(path)
    except FileNotFoundError:
        return None
    try:
        data = file.read(LAYOUT_BYTES_MAX + 1, 0)
    finally:
        file.close()
    damaged = CorruptionError(
        f"{path} is damaged: restore it from a backup", path=path, expected="a layout with its checksum"
    )
    try:
        fields: object = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise damaged from error
    if not isinstance(fields, dict) or fields.get("format") != LAYOUT_FORMAT or len(data) > LAYOUT_BYTES_MAX:
        raise damaged
    version, stream, shards, suffix = (fields.get(name) for name in ("version", "stream", "shards", "suffix"))
    if type(version) is int and version > LAYOUT_VERSION:
        raise UnsupportedFormat(f"{path} has version {version}: upgrade walbatch")
    if (
        not isinstance(stream, str)
        or not isinstance(suffix, str)
        or type(shards) is not int
        or not 1 <= shards <= SHARDS_MAX
    ):
        raise damaged
    layout = _Layout(stream=stream, shards=shards, suffix=suffix)
    if fields.get("checksum") != layout.checksum or "/" in stream + suffix:
        raise damaged
    return layout
