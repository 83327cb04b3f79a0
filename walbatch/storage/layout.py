"""Names and the identity of a store: which files it has, and the one that says which store it is.

The idea needed to read it: the identity is written last when a store is made, so a directory without one is
either not a store yet, or a store that lost it; `core.recovery` tells which.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Final

from walbatch import limits
from walbatch.core.checksum import crc32c
from walbatch.core.frame import FORMAT_VERSION
from walbatch.core.recovery import IdentityState
from walbatch.errors import StorageError
from walbatch.ports import File, FileSystem

IDENTITY_MAGIC: Final = b"WBSTORE\n"
_IDENTITY: Final = struct.Struct("<8sII16sQ20x")
_CRC: Final = struct.Struct("<I")
IDENTITY_BYTES: Final = _IDENTITY.size + _CRC.size

_SEGMENT_NAME: Final = re.compile(r"(\d{19})\.seg")
TEMPORARY_SUFFIX: Final = ".tmp"


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths of a store. `root` is absolute and has its symbolic links resolved by the caller."""

    root: str

    @property
    def identity(self) -> str:
        """The identity file."""
        return f"{self.root}/identity"

    @property
    def lock(self) -> str:
        """The lock file. Never unlinked."""
        return f"{self.root}/lock"

    @property
    def wal(self) -> str:
        """The directory of segments."""
        return f"{self.root}/wal"

    @property
    def dropped(self) -> str:
        """What compactions took for settled."""
        return f"{self.wal}/dropped"

    @property
    def state(self) -> str:
        """The LMDB environment of checkpoints."""
        return f"{self.root}/state"

    @property
    def quarantine(self) -> str:
        """Where suspect bytes go."""
        return f"{self.root}/quarantine"

    def segment(self, number: int) -> str:
        """The file of a segment."""
        return f"{self.wal}/{number:019d}.seg"


def segment_number(name: str) -> int | None:
    """The number in a segment's file name; None for any other name."""
    match = _SEGMENT_NAME.fullmatch(name)
    return int(match[1]) if match and name.isascii() else None


def encode_identity(store: bytes, wall_ns: int) -> bytes:
    """64 bytes: magic, version, flags, UUID, time of making, CRC-32C."""
    body = _IDENTITY.pack(IDENTITY_MAGIC, FORMAT_VERSION, 0, store, wall_ns)
    return body + _CRC.pack(crc32c(body, 0))


def decode_identity(data: bytes) -> tuple[IdentityState, bytes | None]:
    """The state of an identity file and the store's UUID."""
    if len(data) != IDENTITY_BYTES or not data.startswith(IDENTITY_MAGIC):
        return IdentityState.DAMAGED, None
    body = data[: _IDENTITY.size]
    if crc32c(body, 0) != _CRC.unpack_from(data, _IDENTITY.size)[0]:
        return IdentityState.DAMAGED, None
    _, version, flags, store, _ = _IDENTITY.unpack(body)
    if version != FORMAT_VERSION or flags:
        return IdentityState.NEWER, None
    return IdentityState.VALID, store


def read_identity(fs: FileSystem, layout: Layout) -> tuple[IdentityState, bytes | None]:
    """Read and check the identity file."""
    if not fs.exists(layout.identity):
        return IdentityState.MISSING, None
    file = fs.open_read(layout.identity)
    try:
        return decode_identity(file.read(IDENTITY_BYTES + 1, 0))
    finally:
        file.close()


def keep_copy(fs: FileSystem, source_path: str, name: str, offset: int, size: int) -> str:
    """Copy bytes of a file to `name`.N, durably, in chunks; returns that path. Other copies are never overwritten.

    A copy that is there already is found again, so that repeating a recovery does not pile them up.
    """
    source = fs.open_read(source_path)
    try:
        copy = 0
        while fs.exists(f"{name}.{copy}"):
            if _same_bytes(fs, source, offset, size, f"{name}.{copy}"):
                return f"{name}.{copy}"
            copy += 1
        path = f"{name}.{copy}"
        temporary = path + TEMPORARY_SUFFIX
        if fs.exists(temporary):
            fs.unlink(temporary)
        target = fs.create(temporary)
        try:
            for at in range(0, size, limits.SCAN_CHUNK_BYTES):
                target.write([source.read(min(limits.SCAN_CHUNK_BYTES, size - at), offset + at)], at)
            sync_file(target, temporary)
        finally:
            target.close()
    finally:
        source.close()
    fs.rename(temporary, path)
    sync_directory(fs, path.rpartition("/")[0])
    return path


def _same_bytes(fs: FileSystem, source: File, offset: int, size: int, path: str) -> bool:
    """Whether a file holds exactly these bytes of `source`."""
    copy = fs.open_read(path)
    try:
        return copy.size() == size and all(
            copy.read(chunk := min(limits.SCAN_CHUNK_BYTES, size - at), at) == source.read(chunk, offset + at)
            for at in range(0, size, limits.SCAN_CHUNK_BYTES)
        )
    finally:
        copy.close()


def sync_file(file: File, path: str) -> None:
    """datasync, whose failure is never an OSError: nobody may take it for a full disk and try again."""
    try:
        file.datasync()
    except OSError as error:
        raise sync_failed(path, error) from error


def sync_directory(fs: FileSystem, path: str) -> None:
    """Sync a directory; a failure is a StorageError, as in `sync_file`."""
    try:
        fs.sync_directory(path)
    except OSError as error:
        raise sync_failed(path, error) from error


def sync_failed(path: str, error: OSError) -> StorageError:
    """The error for a failed sync."""
    return StorageError(
        f"a sync of {path} failed ({error.strerror or error}): what was written there may be lost. Repair the disk and reopen",
        path=path, errno=error.errno,
    )  # fmt: skip


def write_durably(fs: FileSystem, path: str, data: bytes) -> None:
    """Create or replace a small file as a whole.

    Crash story: the bytes are synced under a temporary name before the rename, so the final name never shows
    a part of them; until the directory sync the old name (or none) may come back, and the caller repeats.
    """
    temporary = path + TEMPORARY_SUFFIX
    if fs.exists(temporary):
        fs.unlink(temporary)
    file = fs.create(temporary)
    try:
        file.write([data], 0)
        sync_file(file, temporary)
    finally:
        file.close()
    fs.rename(temporary, path)
    sync_directory(fs, path.rpartition("/")[0])
