"""A mark file: what the newest committed file of a shard is, and which operations are in it or in an earlier one.

What is not here: the files themselves, and when to write (`stream`).

The idea needed to read it: two slots, written in turn. A write that was cut off damages the slot it went to, and the other one
still says what was there before. The numbers are little-endian, the same everywhere and for ever; a change is a new version:

| offset in a slot | size | field                                                               |
|------------------|------|---------------------------------------------------------------------|
| 0                | 4    | magic `WBfm`                                                        |
| 4                | 4    | version, 1                                                          |
| 8                | 8    | generation: of two valid slots, the higher one counts               |
| 16               | 8    | sequence: the number of the newest committed file; 0 for none       |
| 24               | 8    | opening: the number of the opening that writes here                 |
| 32               | 4    | bytes of the mark                                                   |
| 36               | n    | the mark, as in `core.mark`                                         |
| 36 + n           | 4    | CRC-32C of all bytes before it                                      |

Slots begin at 0 and at SLOT_BYTES. Room in between is never written.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from walbatch.core.checksum import crc32c
from walbatch.core.mark import decode_mark, encode_mark
from walbatch.errors import CorruptionError, UnsupportedFormat
from walbatch.limits import KIB, MARK_BYTES_MAX, MIB
from walbatch.ports import File, FileSystem
from walbatch.types import Mark

MAGIC: Final = b"WBfm"
VERSION: Final = 1

_HEADER: Final = struct.Struct("<4sIQQQI")
_CRC: Final = struct.Struct("<I")

SLOT_BYTES: Final = 2 * MIB
"""Where the second slot begins. A hole, as far as marks are short."""

SLOT_BYTES_WRITTEN: Final = 4 * KIB
"""What is written of each slot to begin with: later ones of that size need no room on the disk."""

assert _HEADER.size + MARK_BYTES_MAX + _CRC.size <= SLOT_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a slot says."""

    generation: int
    sequence: int
    opening: int
    mark: Mark


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The newer of the valid slots, and whether the other one is damaged: by a write that was cut off, or otherwise."""

    record: Record
    is_damaged: bool


class MarkFile:
    """An open mark file. One thread at a time uses it."""

    def __init__(self, file: File, record: Record) -> None:
        self._file = file
        self._record = record

    @classmethod
    def begin(cls, file: File, *, sequence: int, opening: int, mark: Mark) -> MarkFile:
        """Write both slots of a new file. Durable when it returns; its name is the caller's business."""
        record = Record(generation=1, sequence=sequence, opening=opening, mark=mark)
        for slot in (0, 1):
            file.write([_encode(record).ljust(SLOT_BYTES_WRITTEN, b"\0")], slot * SLOT_BYTES)
        file.datasync()
        return cls(file, record)

    def store(self, sequence: int, mark: Mark) -> None:
        """Write the older slot. Durable when it returns; after an error either one may be what counts."""
        record = Record(
            generation=self._record.generation + 1, sequence=sequence, opening=self._record.opening, mark=mark
        )
        self._file.write([_encode(record)], record.generation % 2 * SLOT_BYTES)
        self._file.datasync()
        self._record = record

    def close(self) -> None:
        """Release it. Idempotent."""
        self._file.close()


def read_marks(fs: FileSystem, path: str) -> Found:
    """What the file at `path` says. Raises CorruptionError, UnsupportedFormat, OSError."""
    file = fs.open_read(path)
    try:
        records = [_read_slot(file, path, slot) for slot in (0, 1)]
    finally:
        file.close()
    valid = [record for record in records if record is not None]
    if not valid:
        raise CorruptionError(
            f"{path} is damaged: which operations are in files cannot be told any more. Restore it from a backup",
            path=path,
            expected="a mark",
        )
    return Found(
        record=max(valid, key=lambda record: record.generation), is_damaged=len(valid) < len(records)
    )


def _read_slot(file: File, path: str, slot: int) -> Record | None:
    """What a slot says; None for a damaged one."""
    head = file.read(_HEADER.size, slot * SLOT_BYTES)
    if len(head) < _HEADER.size:
        return None
    magic, version, generation, sequence, opening, size = _HEADER.unpack(head)
    if magic != MAGIC or size > MARK_BYTES_MAX:
        return None
    rest = file.read(size + _CRC.size, slot * SLOT_BYTES + _HEADER.size)
    if len(rest) != size + _CRC.size:
        return None
    data, (stored,) = rest[:size], _CRC.unpack_from(rest, size)
    if stored != crc32c(head + data, 0):
        return None
    if version != VERSION:
        raise UnsupportedFormat(
            f"{path} has version {version}, this walbatch reads version {VERSION}: upgrade it"
        )
    try:
        mark = decode_mark(data)
    except ValueError:
        return None
    return Record(generation=generation, sequence=sequence, opening=opening, mark=mark)


def _encode(record: Record) -> bytes:
    data = encode_mark(record.mark)
    body = _HEADER.pack(MAGIC, VERSION, record.generation, record.sequence, record.opening, len(data)) + data
    return body + _CRC.pack(crc32c(body, 0))
