"""Numbers as keys of state/: 8 bytes, big-endian, so that they stand in their order."""

from __future__ import annotations

import struct
from typing import Final

from walbatch.limits import LSN_MAX

_KEY: Final = struct.Struct(">Q")


def key_of(number: int) -> bytes:
    """The key of an LSN, or of another number that counts from 1. Raises ValueError for one out of bounds."""
    if not 1 <= number <= LSN_MAX:
        raise ValueError(f"the number {number} is outside 1 to {LSN_MAX}")
    return _KEY.pack(number)


def lsn_of(key: bytes) -> int | None:
    """The number of a key; None for what `key_of` has not made."""
    if len(key) != _KEY.size:
        return None
    (number,) = _KEY.unpack(key)
    return number if 1 <= number <= LSN_MAX else None
