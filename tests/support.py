"""What several tests share: a recording backend, a file system that can be told to fail, small settings."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import walbatch as wb
from walbatch.storage.filesystem import RealFile, RealFileSystem, RealLock

SMALL = wb.Settings(segment_bytes=64 * 1024, disk_bytes_max=2**30, timer_ms=5, checkpoint_ms=10)
FAST = wb.Trigger(linger_ms=1)
QUICK_RETRY = wb.RetryPolicy(base_s=0.001, ceiling_s=0.01)
DEADLINE_S = 30.0


class Recorder:
    """A backend that keeps what it was given, in order; `before` may raise or answer in its stead."""

    def __init__(self, before: Callable[[wb.Batch], Any] | None = None) -> None:
        self.before = before
        self.applied: list[tuple[int | None, bytes, bytes]] = []
        self.batches: list[wb.Batch] = []
        self._lock = threading.Lock()

    def apply(self, batch: wb.Batch) -> Any:
        answer = self.before(batch) if self.before else None
        with self._lock:
            self.batches.append(batch)
            for index, operation in enumerate(batch):
                if isinstance(answer, list) and isinstance(answer[index], wb.Retry):
                    continue
                self.applied.append((operation.lsn, operation.key, operation.payload))
        return answer

    @property
    def lsns(self) -> list[int]:
        return [lsn for lsn, _, _ in self.applied if lsn is not None]


def wait_until(condition: Callable[[], bool], *, what: str, seconds: float = DEADLINE_S) -> None:
    """Wait for something that other threads bring about; fails after a deadline."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"waited too long until {what}"
        pause.wait(0.002)


class FailingFileSystem(RealFileSystem):
    """The real file system, which fails where `fail` says so: it is called with (call, path) and may raise."""

    def __init__(self) -> None:
        self.fail: Callable[[str, str], None] = lambda call, path: None
        self.calls: list[tuple[str, str]] = []

    def _call(self, call: str, path: str) -> None:
        self.calls.append((call, path))
        self.fail(call, path)

    def create(self, path: str) -> RealFile:
        self._call("create", path)
        return FailingFile(super().create(path), path, self)

    def open_read(self, path: str) -> RealFile:
        self._call("open_read", path)
        return FailingFile(super().open_read(path), path, self)

    def rename(self, source: str, target: str) -> None:
        self._call("rename", target)
        super().rename(source, target)

    def unlink(self, path: str) -> None:
        self._call("unlink", path)
        super().unlink(path)

    def sync_directory(self, path: str) -> None:
        self._call("sync_directory", path)
        super().sync_directory(path)

    def lock(self, path: str, note: bytes) -> RealLock | bytes:
        self._call("lock", path)
        return super().lock(path, note)


class FailingFile(RealFile):
    """A file of a `FailingFileSystem`."""

    def __init__(self, file: RealFile, path: str, fs: FailingFileSystem) -> None:
        super().__init__(file._fd, path)
        file._fd = -1
        self._fs = fs

    def write(self, buffers: Sequence[bytes], offset: int) -> None:
        self._fs._call("write", self._path)
        super().write(buffers, offset)

    def datasync(self) -> None:
        self._fs._call("datasync", self._path)
        super().datasync()

    def preallocate(self, size: int) -> None:
        self._fs._call("preallocate", self._path)
        super().preallocate(size)


def failing_when(wanted: str, number: int, code: int = errno.EIO) -> Callable[[str, str], None]:
    """Fail call `wanted` once at or after the given count, and go on failing."""
    seen = 0

    def fail(call: str, path: str) -> None:
        nonlocal seen
        if call == wanted:
            seen += 1
            if seen >= number:
                raise OSError(code, "injected", path)

    return fail
