"""A commit group in the making: columns of operations that will share one frame, one write and one sync."""

from __future__ import annotations

from collections.abc import Sequence

from walbatch import limits
from walbatch.core.columns import encoded_bytes_max, options_bytes
from walbatch.types import NO_OPTIONS, PRIORITY_URGENT, Options


class CommitGroup:
    """Operations with consecutive LSNs from `first_lsn`. Not thread-safe: its owner locks until it is closed.

    `options` stays empty until an operation has some; from then on it is as long as the other columns. What all operations have
    in common stands in `sole_lane`, `sole_shard` and `sole_priority`; each is None where they differ, and then the column of it
    is kept.
    """

    __slots__ = (
        "_lanes", "_priorities", "_shards", "bytes", "first_lsn", "is_urgent", "keys", "needs_sync", "options", "payloads",
        "sole_lane", "sole_priority", "sole_shard",
    )  # fmt: skip

    def __init__(self, first_lsn: int) -> None:
        self.first_lsn = first_lsn
        self.sole_lane: int | None = None
        self.sole_shard: int | None = None
        self.sole_priority: int | None = None
        self._lanes: list[int] = []
        self._shards: list[int] = []
        self._priorities: list[int] = []
        self.keys: list[bytes] = []
        self.payloads: list[bytes] = []
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

    @property
    def is_uniform(self) -> bool:
        """Whether all operations are of the same lane, shard and priority."""
        return self.sole_lane is not None and self.sole_shard is not None and self.sole_priority is not None

    @property
    def lanes(self) -> list[int]:
        """The lane of each operation."""
        return self._lanes if self.sole_lane is None else [self.sole_lane] * len(self.keys)

    @property
    def shards(self) -> list[int]:
        """The shard of each operation."""
        return self._shards if self.sole_shard is None else [self.sole_shard] * len(self.keys)

    @property
    def priorities(self) -> list[int]:
        """The priority of each operation."""
        return self._priorities if self.sole_priority is None else [self.sole_priority] * len(self.keys)

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
        self, lane: int, shards: int | Sequence[int], keys: Sequence[bytes], payloads: Sequence[bytes], priority: int, size: int,
        *, needs_sync: bool, options: Sequence[Options] = (),
    ) -> int:  # fmt: skip
        """Add operations of one lane; returns the LSN of the first. `options` has one for each of them, or none at all.

        `shards`: one number where it is the same for all. The keys go last: an exception of a signal handler in between leaves
        columns that the next call cuts to their length, and attributes that it sets anew or that say less than they could.
        """
        count = len(keys)
        if len(payloads) != count:  # nobody could read the frame
            raise ValueError(f"{count} keys and {len(payloads)} payloads")
        present = len(self.keys)
        if not present:
            self._begin(lane, shards, priority)
        else:
            self.trim_columns()
            self._tell_apart(lane, shards, priority)
        if self.sole_lane is None:
            self._lanes += [lane] * count
        if self.sole_shard is None:
            self._shards += [shards] * count if isinstance(shards, int) else shards
        if self.sole_priority is None:
            self._priorities += [priority] * count
        self.payloads += payloads
        if options or self.options:
            if not self.options:
                self.options = [NO_OPTIONS] * present
            self.options += options or [NO_OPTIONS] * count
            size += options_bytes(options)
        self.bytes += size
        self.needs_sync = self.needs_sync or needs_sync
        self.is_urgent = self.is_urgent or priority >= PRIORITY_URGENT
        self.keys += keys
        return self.first_lsn + present

    def _begin(self, lane: int, shards: int | Sequence[int], priority: int) -> None:
        """The first operations are coming: forget what an interrupted `add` has left."""
        self.sole_lane, self.sole_priority = lane, priority
        self.sole_shard = shards if isinstance(shards, int) else None
        self._shards.clear()
        self.payloads.clear()
        self.options.clear()

    def _tell_apart(self, lane: int, shards: int | Sequence[int], priority: int) -> None:
        """Begin the columns of what is not the same for all any more."""
        if self.sole_lane is not None and self.sole_lane != lane:
            self._lanes = self.lanes
            self.sole_lane = None
        if self.sole_shard is not None and self.sole_shard != shards:
            self._shards = self.shards
            self.sole_shard = None
        if self.sole_priority is not None and self.sole_priority != priority:
            self._priorities = self.priorities
            self.sole_priority = None

    def trim_columns(self) -> None:
        """Cut what an interrupted `add` left in the other columns."""
        present = len(self.keys)
        if len(self.payloads) == present and not self.options and self.is_uniform:
            return
        were_added = len(self.payloads) > present
        for column in (self._lanes, self._shards, self._priorities, self.payloads, self.options):
            if len(column) > present:
                del column[present:]
        if were_added:
            self.bytes = sum(map(len, self.keys)) + sum(map(len, self.payloads)) + options_bytes(self.options)

    def kind_columns(self, names: Sequence[str]) -> tuple[list[str], list[int]]:
        """The kinds of the group, and for each operation the index of its kind."""
        if self.sole_lane is not None:
            return [names[self.sole_lane]], [0] * len(self.keys)
        used = sorted(set(self._lanes))
        index = {lane: position for position, lane in enumerate(used)}
        return [names[lane] for lane in used], [index[lane] for lane in self._lanes]


def fits_frame(count: int, size: int, options: Sequence[Options] = ()) -> bool:
    """Whether operations with `size` bytes of keys and payloads, and these options, fit in one frame."""
    return (
        count <= limits.FRAME_COUNT_MAX
        and encoded_bytes_max(size, count, options) <= limits.FRAME_RAW_BYTES_MAX
    )
