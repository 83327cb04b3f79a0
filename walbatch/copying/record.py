"""What a store is the copy of: a file in its folder, compared before anything of the store is used.

What is not here: how far the copy is. That stands in the target (`landing`).

The idea needed to read it: what the store holds is of use only to the target that has the rest. So both are named before the first
row is submitted, and a store that names others is refused. A store without a record has never been given a row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from walbatch import limits
from walbatch.copying.rows import number_of
from walbatch.errors import ConfigError, CorruptionError, UnsupportedFormat
from walbatch.inspection import dead_letters, look, operations
from walbatch.storage.statefolder import os_errors, sync_directory

NAME: Final = "copy.json"
FORMAT: Final = 1

BEGIN_ANEW: Final = "remove the store to begin anew, which copies all rows again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A copy. Databases are named without passwords, and files by their whole path."""

    source: str
    target: str
    tables: Mapping[str, str]
    """Names in the source, with those in the target."""
    store: str = ""
    """The store's identity, in hexadecimal digits."""

    def is_same_copy(self, other: Record) -> bool:
        """Whether both are between the same tables."""
        return (self.source, self.target, self.tables) == (other.source, other.target, other.tables)

    def __str__(self) -> str:
        tables = ", ".join(name if name == to else f"{name} to {to}" for name, to in self.tables.items())
        return f"tables {tables} from {self.source} to {self.target}"


def write(folder: Path, record: Record) -> None:
    """Keep a record, durably. Crash story: it is there as a whole, or not at all, and then no row was submitted yet."""
    temporary = folder / f"{NAME}.tmp"
    data = json.dumps({"format": FORMAT, **asdict(record)}).encode()
    with os_errors(str(folder), "written"):
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(folder / NAME)
        sync_directory(str(folder))


def read(folder: Path) -> Record | None:
    """The record of a store; None where it has none. Raises CorruptionError, UnsupportedFormat, StorageError."""
    path = folder / NAME
    if not path.exists():
        return None
    try:
        with os_errors(str(path), "read"), path.open("rb") as file:
            found: Any = json.loads(file.read(limits.MIB))
    except ValueError:
        found = None
    if isinstance(found, dict) and isinstance(found.get("format"), int) and found["format"] > FORMAT:
        raise UnsupportedFormat(
            f"{path} was written by a newer walbatch (format {found['format']}): use that one"
        )
    record: Record | None
    try:
        record = Record(**{name: value for name, value in found.items() if name != "format"})
        bytes.fromhex(record.store)
        is_sound = all(type(text) is str for text in (record.source, record.target, *record.tables.values()))
    except (AttributeError, TypeError, ValueError):
        record, is_sound = None, False
    if record is None or not is_sound:
        raise CorruptionError(
            f"{path} is damaged, so nothing tells what is in the store: {BEGIN_ANEW}", path=str(path), expected="JSON"
        )  # fmt: skip
    return record


def check(store: Path, wanted: Record) -> Record | None:
    """The record of a store that may go on with `wanted`; None where it has no row yet. Raises ConfigError for another one."""
    found = read(store)
    if found is None:
        if (store / "identity").exists():
            report = look(store).store
            if report.pending or report.settled_count or dead_letters(store)[0]:
                raise ConfigError(f"{store} is the store of something else than a copy: name another one")
        return None
    if not found.is_same_copy(wanted):
        raise ConfigError(
            f"the copy of the store {store} was begun for something else: {found}. Now it is: {wanted}. Go on with what it was "
            f"begun for, name another store (--store), or {BEGIN_ANEW}"
        )
    return found


def least_numbers(store: Path) -> dict[str, int]:
    """For each lane with pending rows how far its target must be: all rows before the first that is pending are there, or dead."""
    first: dict[str, int] = {}
    for operation in operations(store, pending_only=True):
        first.setdefault(operation.kind, number_of(operation.payload))
    if not first:
        return {}
    dead = {(letter.lane, number_of(letter.payload)) for letter in dead_letters(store)[0]}
    least = {}
    for lane, number in first.items():
        number -= 1  # noqa: PLW2901 - counted down
        while number > 0 and (lane, number) in dead:
            number -= 1  # noqa: PLW2901
        least[lane] = max(0, number)
    return least
