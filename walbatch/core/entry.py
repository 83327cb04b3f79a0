"""One queued operation, as the queues of the core pass it on: a tuple, because there are millions of them."""

from __future__ import annotations

from walbatch import limits
from walbatch.types import Options

Entry = tuple[int, bytes, bytes, int, int, Options]
"""(LSN or sequence number, key, payload, priority, arrival in monotonic ns, options)."""


def entry_bytes(entry: Entry) -> int:
    """What an entry costs in memory."""
    return len(entry[1]) + len(entry[2]) + limits.OPERATION_OVERHEAD_BYTES


def lsn_of(entry: Entry) -> int:
    """What entries are ordered by."""
    return entry[0]
