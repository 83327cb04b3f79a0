"""One queued operation, as the queues of the core pass it on: a tuple, because there are millions of them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from operator import itemgetter
from typing import Final

from walbatch import limits
from walbatch.types import Options

Entry = tuple[int, bytes, bytes, int, int, Options]
"""(LSN or sequence number, key, payload, priority, arrival in monotonic ns, options)."""

lsn_of: Final[Callable[[Entry], int]] = itemgetter(0)
"""What entries are ordered by."""
_key_of: Final[Callable[[Entry], bytes]] = itemgetter(1)
_payload_of: Final[Callable[[Entry], bytes]] = itemgetter(2)
priority_of: Final[Callable[[Entry], int]] = itemgetter(3)
options_of: Final[Callable[[Entry], Options]] = itemgetter(5)


def entry_bytes(entry: Entry) -> int:
    """What an entry costs in memory."""
    return len(entry[1]) + len(entry[2]) + limits.OPERATION_OVERHEAD_BYTES


def size_of(entry: Entry) -> int:
    """What an entry adds to the bytes of a batch."""
    return len(entry[1]) + len(entry[2])


def sizes_of(entries: Collection[Entry]) -> int:
    """What entries add to the bytes of a batch, all together."""
    return sum(map(len, map(_key_of, entries))) + sum(map(len, map(_payload_of, entries)))
