"""Engines for the explorer: the shipped one, and a toy whose mistakes are chosen.

The toy is a log of one record for each piece in one file, delivered again as a whole at each opening. It is right when it has no
mistakes, which makes each mistake the only cause of what the explorer finds.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import walbatch as wb
from walbatch.testing.simulation.disk import PIECE_BYTES
from walbatch.testing.simulation.looks import STORE
from walbatch.testing.simulation.machine import Process
from walbatch.types import Batch, CutReason


class Mistake(enum.StrEnum):
    NO_SYNC = "no sync"
    NO_DIRECTORY_SYNC = "no directory sync"
    ACKNOWLEDGES_FIRST = "acknowledges before the sync"
    RETRIES_SYNC = "tries a failed sync again"
    APPENDS_BEHIND_TEAR = "appends behind a torn tail"
    NO_CHECKSUM = "believes any bytes"
    REUSES_LSN = "counts LSNs from 1 at each opening"
    DELIVERS_UNSYNCED = "delivers before the sync, and forgets what it delivered"


@dataclass
class ToyTicket:
    lsn: int
    done: bool = True

    def result(self, timeout: float | None = None) -> None:
        """Applied."""


@dataclass
class ToyReport:
    reason: str = "drained"


_RECORD = struct.Struct("<IQHH")


class ToyEngine:
    """One log file `log`, written piece by piece."""

    def __init__(
        self, process: Process, lanes: Mapping[str, wb.Lane], mistakes: Collection[Mistake] = ()
    ) -> None:
        self._fs = process.fs
        self._lanes = lanes
        self._mistakes = mistakes
        self._undelivered: list[tuple[int, bytes, bytes]] = []
        if not self._fs.is_directory(STORE):
            self._fs.make_directory(STORE)
        self._sync_directory("/")
        self._next_lsn = 1
        records = []
        found = [name for name in self._fs.list_directory(STORE) if name.endswith(".log")]
        for name in found:
            records += self._read(f"{STORE}/{name}")
        records.sort()
        # What was read may not be on the disk yet: it is copied to a new file, and synced, before anything is delivered.
        number = max((int(name[:4]) for name in found), default=0) + 1
        self._file = self._fs.create(f"{STORE}/{number:04d}.log")
        self._end = 0
        for lsn, key, payload in records:
            self._append(lsn, key, payload)
        self._sync()
        self._sync_directory(STORE)
        for name in found:
            self._fs.unlink(f"{STORE}/{name}")
        self._sync_directory(STORE)
        if Mistake.APPENDS_BEHIND_TEAR in mistakes and found:
            # What it would have had to cut off.
            self._end += PIECE_BYTES
        for record in records:
            self._deliver(*record)
        if Mistake.REUSES_LSN not in mistakes:
            self._next_lsn = max((lsn for lsn, _, _ in records), default=0) + 1_000

    def _read(self, path: str) -> list[tuple[int, bytes, bytes]]:
        file = self._fs.open_read(path)
        records = []
        for offset in range(0, file.size(), PIECE_BYTES):
            piece = file.read(PIECE_BYTES, offset)
            crc, lsn, key_bytes, payload_bytes = _RECORD.unpack_from(piece)
            believed = crc == zlib.crc32(piece[4:]) or (Mistake.NO_CHECKSUM in self._mistakes and lsn)
            if not believed or not lsn:
                break
            at = _RECORD.size
            records.append((
                lsn, piece[at : at + key_bytes], piece[at + key_bytes : at + key_bytes + payload_bytes],
            ))  # fmt: skip
        file.close()
        return records

    def _append(self, lsn: int, key: bytes, payload: bytes) -> None:
        piece = _RECORD.pack(0, lsn, len(key), len(payload)) + key + payload
        piece = piece.ljust(PIECE_BYTES, b"\0")
        self._file.write([zlib.crc32(piece[4:]).to_bytes(4, "little"), piece[4:]], self._end)
        self._end += PIECE_BYTES

    def _sync(self) -> None:
        if Mistake.NO_SYNC in self._mistakes:
            return
        try:
            self._file.datasync()
        except OSError as error:
            if Mistake.RETRIES_SYNC not in self._mistakes:
                raise wb.StorageError("the sync failed") from error
            self._file.datasync()

    def _sync_directory(self, path: str) -> None:
        if Mistake.NO_DIRECTORY_SYNC not in self._mistakes:
            self._fs.sync_directory(path)

    def _deliver(self, lsn: int, key: bytes, payload: bytes) -> None:
        batch = Batch(
            lane="put", shard=0, store=b"toy", lsns=[lsn], keys=[key], payloads=[payload], priorities=[5], attempt=1,
            reason=CutReason.COUNT, mark=None,
        )  # fmt: skip
        self._lanes["put"].backend.apply(batch)

    def submit(self, lane: str, *, key: bytes, payload: bytes) -> Any:
        lsn, self._next_lsn = self._next_lsn, self._next_lsn + 1
        if Mistake.DELIVERS_UNSYNCED in self._mistakes:
            self._deliver(lsn, key, payload)
        self._append(lsn, key, payload)
        if Mistake.ACKNOWLEDGES_FIRST not in self._mistakes:
            self._sync()
        if Mistake.DELIVERS_UNSYNCED not in self._mistakes:
            self._undelivered.append((lsn, key, payload))
        return ToyTicket(lsn)

    def close(self, *, drain: bool, timeout: float) -> ToyReport:
        for record in self._undelivered:
            self._deliver(*record)
        self._file.close()
        return ToyReport()
