"""Which shard an operation belongs to: CRC-32C of its key, modulo the lane's shards.

Stable for ever (part of the format).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from operator import mod

from walbatch.core.checksum import crc32c


def shard_of(key: bytes, shards: int) -> int:
    """The shard of `key`, 0 to shards - 1."""
    return crc32c(key, 0) % shards


def shards_of(keys: Sequence[bytes], shards: int) -> list[int]:
    """The shards of many keys."""
    if shards == 1:
        return [0] * len(keys)
    return list(map(mod, map(crc32c, keys, repeat(0)), repeat(shards)))
