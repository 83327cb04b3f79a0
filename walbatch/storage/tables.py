"""The tables of state/: values read and checked one by one, and saved together.

What is not here: what the values mean (the modules of the tables), and the file that holds them (`statefile`).

The idea needed to read it: nothing that was read is believed, and what is wrong becomes a *finding*, one sentence, never an
error. A save that failed for any reason but a full disk is the last one: nobody can tell any more what is on disk.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Final, TypeVar

from walbatch.errors import EngineClosed, StorageError
from walbatch.storage.envelope import ForeignValueError, seal, unseal
from walbatch.storage.statefile import SPARE_BYTES, Change, Entry, StateFile, Table
from walbatch.storage.statefolder import DamagedFileError

COSTS: Final = "operations that were delivered before may be delivered again, and dead letters that it held are in the copy only"
"""What losing state/ costs."""

FINDINGS_MAX: Final = 100
"""So many are told of one table, and then how many more there are: all suspect bytes are in quarantine/."""

Damaged = tuple[bytes, bytes, str]
"""Key and value of what cannot be used, and why."""

_T = TypeVar("_T")


class Tables:
    """The tables of one store. `mode` is writable, readonly or borrowed, and closed after `close`.

    Safe from any thread of the process that opened the file.
    """

    def __init__(self, file: StateFile | None, path: str, store_uuid: bytes, *, mode: str) -> None:
        self.file = file
        self.path = path
        self.mode = mode
        self._store_uuid = store_uuid
        self._failure: StorageError | None = None

    def __repr__(self) -> str:
        return f"{self.path} {self.mode}, {'no file' if self.file is None else repr(self.file)}"

    def entries(self, table: Table, problems: list[str]) -> Iterator[Entry]:
        """Every entry of a table, by key; what cannot be read becomes a finding in `problems`. Raises StorageError."""
        try:
            yield from self.raw_entries(table, problems)
        except DamagedFileError as error:
            problems.append(f"state is damaged: {error}; {COSTS}")

    def raw_entries(self, table: Table, problems: list[str] | None = None) -> Iterator[Entry]:
        """The same, where the file can be read. Raises DamagedFileError, StorageError."""
        if self.mode == "closed":
            raise EngineClosed(f"{self.path} is closed")
        file = self.file
        if file is not None:
            yield from file.entries(table, [] if problems is None else problems)

    def get(self, table: Table, keys: Collection[bytes]) -> dict[bytes, bytes]:
        """The values that there are under `keys`, unchecked. Raises StorageError."""
        file = self.file
        if file is None:
            return {}
        try:
            return file.get(table, keys)
        except DamagedFileError as error:
            raise self._fail(error) from error

    def seal(self, key: bytes, body: bytes) -> bytes:
        """The value for `body` under `key`."""
        return seal(key, body, self._store_uuid)

    def decode(self, key: bytes, value: bytes, decode: Callable[[bytes, bytes], _T]) -> tuple[_T | None, str]:
        """What `decode` makes of key and body, or None and what is wrong. Raises UnsupportedFormat."""
        try:
            return decode(key, unseal(key, value, self._store_uuid)), ""
        except ForeignValueError as error:
            return None, str(error)
        except ValueError as error:
            return None, f"it is damaged, {error}"

    def damaged(self, table: Table, decode: Callable[[bytes, bytes], object]) -> Iterator[Damaged]:
        """Every value of a table that would be a finding. Raises UnsupportedFormat, DamagedFileError, StorageError."""
        for key, value in self.raw_entries(table):
            decoded, problem = self.decode(key, value, decode)
            if decoded is None:
                yield key, value, problem

    def save(self, changes: Sequence[Change], *, spare_bytes: int = SPARE_BYTES) -> None:
        """Commit changes, durable when it returns. Raises StorageError: any but a full disk once and for all."""
        if self._failure is not None:
            raise self._failure
        file = self.file
        if file is None or self.mode != "writable":
            raise EngineClosed(f"{self.path} is {self.mode}: nothing can be saved")
        try:
            file.put(changes, spare_bytes=spare_bytes)
        except DamagedFileError as error:
            raise self._fail(error) from error
        except StorageError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                self._failure = error
            raise

    def _fail(self, error: DamagedFileError) -> StorageError:
        self._failure = StorageError(
            f"{self.path} could not be saved: LMDB finds it damaged ({error}); close the engine and open the store "
            f"again, which moves it aside; {COSTS}",
            path=self.path,
        )
        return self._failure

    def refuse(self, what: str, error: ValueError) -> StorageError:
        """The error for a value that no reader would accept. Later saves may succeed."""
        return StorageError(f"{self.path}: {what} cannot be stored: {error}", path=self.path)

    def full(self, what: str) -> StorageError:
        """The error for a table that holds as much as it may: like a full disk, it may pass."""
        return StorageError(
            f"{self.path} could not be saved (it holds as many {what} as it may): requeue or drop dead letters",
            path=self.path, errno=errno.ENOSPC,
        )  # fmt: skip

    def close(self) -> None:
        """Release the file. Idempotent."""
        file, self.file = self.file, None
        if file is not None and self.mode != "borrowed":
            file.close()
        self.mode = "closed"


def in_short(findings: Sequence[str]) -> list[str]:
    """The first findings of a table, and how many more there are."""
    more = len(findings) - FINDINGS_MAX
    return list(findings) if more <= 0 else [*findings[:FINDINGS_MAX], f"and {more:,} more values like these"]
