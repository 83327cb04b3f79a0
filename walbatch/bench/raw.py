"""The disk itself: the same payloads, one write and one sync for each durable call, and nothing else.

What is not here: keys, checksums, a way to find anything again, several callers that share a sync.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from walbatch.bench.subject import Role, Subject

ROOM_BYTES: Final = 32 * 2**20
CHUNK_BYTES: Final = 2**20


class Raw(Subject):
    """Appends to a new file."""

    name: ClassVar[str] = "raw"
    title: ClassVar[str] = "raw pwrite + fdatasync"
    role: ClassVar[Role] = Role.LIMIT
    note: ClassVar[str] = (
        "appends payloads to a new file, no keys, one sync a call; in w6, groups of 1,000 as in w3"
    )
    workloads: ClassVar[frozenset[str]] = frozenset({"w1", "w2", "w3", "w4", "w4c", "w6", "w9"})

    def __init__(self) -> None:
        super().__init__()
        self._file = -1
        self._end = 0
        # Guards _end.
        self._lock = threading.Lock()

    def open(self, folder: Path) -> None:
        """Make the file."""
        self._file = os.open(folder / "raw", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def item(self, key: bytes, payload: bytes) -> bytes:
        """The payload."""
        return payload

    def group(self, keys: Sequence[bytes], payloads: Sequence[bytes]) -> Sequence[bytes]:
        """The payloads."""
        return payloads

    def put(self, item: Any) -> None:
        """Write and sync; from several threads, each its own."""
        with self._lock:
            at = self._end
            self._end += len(item)
        os.pwrite(self._file, item, at)
        os.fdatasync(self._file)

    def put_group(self, group: Any) -> None:
        """Write once and sync once."""
        self.put(b"".join(group))

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class RawOver(Raw):
    """Overwrites room that was written and synced before, so that a sync has no metadata to write."""

    name: ClassVar[str] = "raw-over"
    title: ClassVar[str] = "raw, over written room"
    role: ClassVar[Role] = Role.HINT
    note: ClassVar[str] = "the same into 32 MiB that were written and synced before the clock started"
    workloads: ClassVar[frozenset[str]] = frozenset({"w1", "w3", "w4"})

    def open(self, folder: Path) -> None:
        """Make the file and its room."""
        super().open(folder)
        zeros = bytes(CHUNK_BYTES)
        for at in range(0, ROOM_BYTES, CHUNK_BYTES):
            os.pwrite(self._file, zeros, at)
        os.fsync(self._file)

    def put(self, item: Any) -> None:
        """Write over what is there, from the beginning again at the end."""
        if self._end + len(item) > ROOM_BYTES:
            self._end = 0
        super().put(item)
