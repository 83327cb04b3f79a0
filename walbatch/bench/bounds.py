"""What the interpreter can do at most: a group commit in the fewest lines, without anything that makes it a queue.

What is not here: keys, lanes, checksums, limits, errors. Both write into room that was written before, padded to a sector, and wake
whoever waits. What walbatch lacks to them is what its guarantees cost; what they lack to the disk is what CPython costs.
"""

from __future__ import annotations

import asyncio
import os
import threading
from typing import Any, ClassVar, Final

from walbatch.bench.raw import ROOM_BYTES, RawOver
from walbatch.bench.subject import Role

SECTOR_BYTES: Final = 512


class _Bound(RawOver):
    """Payloads, written padded, over and over the same room."""

    role: ClassVar[Role] = Role.HINT

    def _write(self, payloads: list[bytes]) -> None:
        """One write and one sync. One caller at a time."""
        joined = b"".join(payloads)
        joined = joined.ljust(-(-len(joined) // SECTOR_BYTES) * SECTOR_BYTES, b"\0")
        if self._end + len(joined) > ROOM_BYTES:
            self._end = 0
        os.pwrite(self._file, joined, self._end)
        self._end += len(joined)
        os.fdatasync(self._file)


class ThreadsBound(_Bound):
    """Threads that take turns: who finds nobody writing writes for everyone who came meanwhile."""

    name: ClassVar[str] = "threads-bound"
    title: ClassVar[str] = "hand-over bound (threads)"
    note: ClassVar[str] = (
        "32 threads through a minimal leader-style group commit: what CPython's threads can do"
    )
    workloads: ClassVar[frozenset[str]] = frozenset({"w2"})

    def __init__(self) -> None:
        super().__init__()
        # Guards _waiting and _is_busy.
        self._turn = threading.Lock()
        self._waiting: list[tuple[bytes, threading.Lock]] = []
        self._is_busy = False
        self._leader: threading.Lock | None = None
        self._own = threading.local()

    def put(self, item: Any) -> None:
        """Wait for a leader, or be it."""
        try:
            wake: threading.Lock = self._own.wake
        except AttributeError:
            wake = self._own.wake = threading.Lock()
            wake.acquire()
        with self._turn:
            self._waiting.append((item, wake))
            is_leader, self._is_busy = not self._is_busy, True
        if not is_leader:
            wake.acquire()  # released by the leader that wrote it, or to make this one the leader
            if self._leader is not wake:
                return
        with self._turn:
            group, self._waiting = self._waiting, []
        self._write([payload for payload, _ in group])
        with self._turn:
            self._leader = self._waiting[0][1] if self._waiting else None
            self._is_busy = self._leader is not None
        if self._leader is not None:
            self._leader.release()
        for _, other in group:
            if other is not wake:
                other.release()


class TasksBound(_Bound):
    """Tasks that await one write in a thread, made for all who came meanwhile."""

    name: ClassVar[str] = "tasks-bound"
    title: ClassVar[str] = "group-commit bound (asyncio)"
    note: ClassVar[str] = "1,000 tasks through a minimal group commit: what asyncio can do"
    workloads: ClassVar[frozenset[str]] = frozenset({"w6"})

    def __init__(self) -> None:
        super().__init__()
        self._payloads: list[bytes] = []
        self._futures: list[asyncio.Future[None]] = []
        self._is_busy = False

    async def put_in_loop(self, item: Any) -> None:
        """Join the group that is written next."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._payloads.append(item)
        self._futures.append(future)
        if not self._is_busy:
            self._is_busy = True
            loop.call_soon(self._start, loop)
        await future

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        payloads, futures = self._payloads, self._futures
        self._payloads, self._futures = [], []
        writing = loop.run_in_executor(None, self._write, payloads)
        writing.add_done_callback(lambda done: self._finish(loop, futures, done.exception()))

    def _finish(
        self,
        loop: asyncio.AbstractEventLoop,
        futures: list[asyncio.Future[None]],
        error: BaseException | None,
    ) -> None:
        for future in futures:
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)
        if self._futures:
            loop.call_soon(self._start, loop)
        else:
            self._is_busy = False
