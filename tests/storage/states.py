"""What tests of state/ share: values to keep there, and damage done behind the back of `LmdbState`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lmdb

from walbatch.storage.checkpoint import LmdbState
from walbatch.storage.envelope import seal
from walbatch.types import Checkpoint, DeadLetter, DeathReason, KeyUse, Options

STORE = b"store-uuid-16-by"
OTHER = b"another-stores-u"

Change = Callable[[bytes], bytes | None]


def checkpoint(generation: int) -> Checkpoint:
    return Checkpoint(
        generation=generation, epoch=1, watermark=generation, durable_lsn=9, segment=1, settled_count=0
    )


def letter(lsn: int, **fields: Any) -> DeadLetter:
    values: dict[str, Any] = {
        "lsn": lsn,
        "lane": "put",
        "key": b"key-%d" % lsn,
        "payload": b"payload of %d" % lsn,
        "priority": 5,
        "options": Options(not_before_ns=1, deadline_ns=2, origin=3, idempotency_key=b"idem"),
        "reason": DeathReason.ATTEMPTS,
        "error": "ValueError: no",
        "attempts": 3,
        "died_wall_ns": 1_700_000_000_000_000_000,
    }
    return DeadLetter(**values | fields)


def use(lsn: int, *, at: int | None = None, key: bytes | None = None, lane: str = "put") -> KeyUse:
    return KeyUse(
        key=b"key-%d" % lsn if key is None else key,
        lane=lane,
        lsn=lsn,
        used_wall_ns=lsn if at is None else at,
    )


def opened(path: Path, **options: Any) -> LmdbState:
    """The state at `path`, open for writing; suspect bytes go to a folder beside it."""
    path.parent.mkdir(exist_ok=True)
    return LmdbState.open(str(path), STORE, **{"quarantine": str(path.parent / "quarantine")} | options)


def read_only(path: Path) -> LmdbState:
    return LmdbState.open(str(path), STORE, readonly=True)


def tamper(path: Path, table: str, key: bytes, change: Change) -> None:
    """Replace a stored value by what `change` makes of it (None: remove it)."""
    with lmdb.open(str(path), max_dbs=8, map_size=2**26) as env:
        handle = env.open_db(table.encode())
        with env.begin(db=handle, write=True) as txn:
            value = change(txn.get(key, b""))
            if value is None:
                txn.delete(key)
            else:
                txn.put(key, value)


def plant(path: Path, table: str, key: bytes, body: bytes) -> None:
    """Put a sound value there, whatever its body is."""
    tamper(path, table, key, lambda _: seal(key, body, STORE))


def keys_of(path: Path, table: str) -> Sequence[bytes]:
    """The keys that stand in a table."""
    with lmdb.open(str(path), max_dbs=8, readonly=True) as env:
        handle = env.open_db(table.encode())
        with env.begin(db=handle) as txn, txn.cursor() as cursor:
            return [bytes(key) for key in cursor.iternext(values=False)]


def flip(value: bytes) -> bytes:
    """One bit is wrong, in the last byte of the body."""
    return value[:-5] + bytes([value[-5] ^ 4]) + value[-4:]


def copies(path: Path) -> dict[bytes, str]:
    """What was copied to the quarantine: values, and their notes."""
    folder = path.parent / "quarantine"
    return {
        copy.read_bytes(): copy.with_suffix(".note").read_text()
        for copy in folder.glob("state-value-*.bytes")
    }
