"""A commit group in the making: columns of operations that will share one frame, one write and one sync."""

from __future__ import annotations

from collections.abc import Sequence

from walbatch import limits
from walbatch.core.columns import encoded_bytes_max, options_bytes
from walbatch.types import NO_OPTIONS, PRIORITY_URGENT, Options


class CommitGroup:
    """Operations with consecutive LSNs from `first_lsn`. Not thread-safe: its owner locks until it is closed.

    `options` stays empty until an operation has some; from then on it is as long as the other columns.
    """

    __slots__ = (
        "bytes", "first_lsn", "is_urgent", "keys", "lanes", "needs_sync", "options", "payloads", "priorities", "shards",
    )  # fmt: skip

    def __init__(self, first_lsn: int) -> None:
        self.first_lsn = first_lsn
        self.lanes: list[int] = []
        self.shards: list[int] = []
        self.keys: list[bytes] = []
        self.payloads: list[bytes] = []
        self.priorities: list[int] = []
        self.options: list[Options] = []
        self.bytes = 0
        self.needs_sync = False
        self.is_urgent = False

    def __repr__(self) -> str:
        return f"<CommitGroup lsn {self.first_lsn}..{self.last_lsn}, {self.bytes} bytes>"

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def last_lsn(self) -> int:
        """LSN of the last operation; first_lsn - 1 while it is empty."""
        return self.first_lsn + len(self.keys) - 1

    def accepts(self, count: int, size: int, options: Sequence[Options] = ()) -> bool:
        """Whether `count` more operations with `size` bytes of keys and payloads in all may join.

        An empty group accepts what fits in a frame.
        """
        if not self.keys:
            return fits_frame(count, size, options)
        return (
            len(self.keys) + count <= limits.FRAME_COUNT_MAX
            and self.bytes + size + options_bytes(options) <= limits.GROUP_BYTES_MAX
        )

    def add(
        self, lane: int, shards: Sequence[int], keys: Sequence[bytes], payloads: Sequence[bytes], priority: int, size: int,
        *, needs_sync: bool, options: Sequence[Options] = (),
    ) -> int:  # fmt: skip
        """Add operations of one lane; returns the LSN of the first. `options` has one for each of them, or none at all.

        The keys go last: an exception of a signal handler in between leaves columns that the next call cuts
        to their length.
        """
        count = len(keys)
        lsn = self.first_lsn + len(self.keys)
        self.trim_columns()
        self.lanes += [lane] * count
        self.shards += shards
        self.payloads += payloads
        self.priorities += [priority] * count
        if options or self.options:
            if not self.options:
                self.options = [NO_OPTIONS] * len(self.keys)
            self.options += options or [NO_OPTIONS] * count
            size += options_bytes(options)
        self.bytes += size
        self.needs_sync = self.needs_sync or needs_sync
        self.is_urgent = self.is_urgent or priority >= PRIORITY_URGENT
        self.keys += keys
        return lsn

    def trim_columns(self) -> None:
        """Cut what an interrupted `add` left in the other columns."""
        present = len(self.keys)
        if len(self.lanes) != present or len(self.priorities) != present or len(self.payloads) != present:
            for column in (self.lanes, self.shards, self.payloads, self.priorities, self.options):
                del column[present:]

    def kind_columns(self, names: Sequence[str]) -> tuple[list[str], list[int]]:
        """The kinds of the group, and for each operation the index of its kind."""
        first = self.lanes[0]
        if self.lanes.count(first) == len(self.lanes):
            return [names[first]], [0] * len(self.lanes)
        used = sorted(set(self.lanes))
        index = {lane: position for position, lane in enumerate(used)}
        return [names[lane] for lane in used], [index[lane] for lane in self.lanes]


def fits_frame(count: int, size: int, options: Sequence[Options] = ()) -> bool:
    """Whether operations with `size` bytes of keys and payloads, and these options, fit in one frame."""
    return (
        count <= limits.FRAME_COUNT_MAX
        and encoded_bytes_max(size, count, options) <= limits.FRAME_RAW_BYTES_MAX
    )
