"""Peers that are queues for Python: persist-queue, diskcache, litequeue.

They are made for convenience, and it shows; they are what a Python program would use.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from walbatch.bench.subject import DRAIN_COUNT, Subject, Take, load


class _Values(Subject):
    """Queues of values without keys."""

    def item(self, key: bytes, payload: bytes) -> Any:
        """The payload."""
        return payload

    def group(self, keys: Sequence[bytes], payloads: Sequence[bytes]) -> Any:
        """The payloads."""
        return payloads


class PersistQueue(_Values):
    """persist-queue's acknowledged queue, which is SQLite in WAL mode with its default, synchronous=FULL."""

    name: ClassVar[str] = "persist-queue"
    title: ClassVar[str] = "persist-queue SQLiteAckQueue"
    note: ClassVar[str] = "has no call for several operations: a commit each"
    modules: ClassVar[tuple[str, ...]] = ("persistqueue",)
    package: ClassVar[str] = "persist-queue"

    def __init__(self) -> None:
        super().__init__()
        self._queue: Any = None

    def open(self, folder: Path) -> None:
        """Make the queue."""
        make = load("persistqueue").SQLiteAckQueue
        self._queue = make(str(folder / "queue"), multithreading=True, auto_commit=True)

    def put(self, item: Any) -> None:
        """A commit."""
        self._queue.put(item)

    def put_group(self, group: Any) -> None:
        """A commit each."""
        for item in group:
            self._queue.put(item)

    def drain(self, count: int, take: Take) -> int:
        """Get and acknowledge, one by one."""
        for _ in range(count):
            value = self._queue.get(block=False)
            take((value,))
            self._queue.ack(value)
        return count

    def close(self) -> None:
        """Close its connections."""
        if self._queue is not None:
            self._queue.close()
            self._queue = None


class PersistFileQueue(PersistQueue):
    """persist-queue's queue of files."""

    name: ClassVar[str] = "persist-file"
    title: ClassVar[str] = "persist-queue Queue (file)"
    syncs: ClassVar[bool] = False
    note: ClassVar[str] = "does not wait for the disk: it syncs at the end of a file of 100 only"

    def open(self, folder: Path) -> None:
        """Make the queue."""
        (folder / "temporary").mkdir()
        make = load("persistqueue").Queue
        self._queue = make(str(folder / "queue"), autosave=True, tempdir=str(folder / "temporary"))

    def drain(self, count: int, take: Take) -> int:
        """Get, one by one; each is gone with that."""
        for _ in range(count):
            take((self._queue.get(block=False),))
            self._queue.task_done()
        return count

    def close(self) -> None:
        """Close its files."""
        if self._queue is not None:
            for file in (self._queue.headf, self._queue.tailf):
                file.close()
            self._queue = None


class DiskcacheDeque(_Values):
    """diskcache's deque over SQLite, its sync set to FULL."""

    name: ClassVar[str] = "diskcache"
    title: ClassVar[str] = "diskcache Deque (sync=FULL)"
    modules: ClassVar[tuple[str, ...]] = ("diskcache",)
    package: ClassVar[str] = "diskcache"

    def __init__(self) -> None:
        super().__init__()
        self._cache: Any = None
        self._deque: Any = None

    def open(self, folder: Path) -> None:
        """Make the deque."""
        library = load("diskcache")
        self._cache = library.Cache(str(folder / "cache"), sqlite_synchronous=2, eviction_policy="none")
        self._deque = library.Deque.fromcache(self._cache)

    def put(self, item: Any) -> None:
        """A transaction."""
        self._deque.append(item)

    def put_group(self, group: Any) -> None:
        """One transaction."""
        with self._cache.transact():
            for item in group:
                self._deque.append(item)

    def drain(self, count: int, take: Take) -> int:
        """Pop a thousand in a transaction."""
        for first in range(0, count, DRAIN_COUNT):
            with self._cache.transact():
                take([self._deque.popleft() for _ in range(first, min(count, first + DRAIN_COUNT))])
        return count

    def close(self) -> None:
        """Close its connections."""
        if self._cache is not None:
            self._cache.close()
            self._cache = self._deque = None


class Litequeue(Subject):
    """litequeue over SQLite, its sync set to FULL. It keeps text, so payloads are written in base64."""

    name: ClassVar[str] = "litequeue"
    title: ClassVar[str] = "litequeue (sync=FULL)"
    note: ClassVar[str] = "keeps text only: payloads in base64, encoded before the clock starts"
    modules: ClassVar[tuple[str, ...]] = ("litequeue",)
    package: ClassVar[str] = "litequeue"

    def __init__(self) -> None:
        super().__init__()
        self._queue: Any = None
        # Guards the queue, which has one connection.
        self._lock = threading.Lock()

    def open(self, folder: Path) -> None:
        """Make the queue."""
        self._queue = load("litequeue").LiteQueue(str(folder / "queue.db"))
        self._queue.conn.execute("pragma synchronous=full")

    def item(self, key: bytes, payload: bytes) -> str:
        """The payload as text."""
        return base64.b64encode(payload).decode()

    def group(self, keys: Sequence[bytes], payloads: Sequence[bytes]) -> list[str]:
        """The payloads as text."""
        return [self.item(b"", payload) for payload in payloads]

    def put(self, item: Any) -> None:
        """A commit."""
        with self._lock:
            self._queue.put(item)

    def put_group(self, group: Any) -> None:
        """One transaction."""
        with self._lock, self._queue.transaction():
            for item in group:
                self._queue.put(item)

    def drain(self, count: int, take: Take) -> int:
        """Pop and mark as done, one by one."""
        drained = 0
        while (message := self._queue.pop()) is not None:
            take((base64.b64decode(message.data),))
            self._queue.done(message.message_id)
            drained += 1
        return drained

    def close(self) -> None:
        """Close the connection."""
        if self._queue is not None:
            self._queue.conn.close()
            self._queue = None
