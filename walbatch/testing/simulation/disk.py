"""One file on a simulated disk: what a reader sees, what is on the platter, and what a power cut may leave of the rest.

What is not here: names (`filesystem`), and which combinations of outcomes are tried (`images`).

The idea needed to read it: a file is a set of pieces of 512 bytes. Each piece that was written and not synced has
several possible futures, independent of all others; so has the size.
"""

from __future__ import annotations

import enum
import functools
import random
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Final

PIECE_BYTES: Final = 512
"""The smallest unit that a disk writes."""

PAGE_BYTES: Final = 4096
"""The unit in which a write enters the cache: a kill may fall between two pages."""

VERSIONS_MAX: Final = 4
"""Older contents that are remembered of a piece which is written again and again between two syncs."""

SIZES_MAX: Final = 8
"""Sizes that are remembered of a file between two syncs: a long write passes through one at each page. Of more than that, the
oldest half is kept and the newest."""

TORN_BYTES: Final = 64
"""Where a torn piece is cut in the exhaustive enumeration: behind a frame's header, the nastiest place. Samples vary it."""

ZEROS: Final = bytes(PIECE_BYTES)


class FailedSync(enum.StrEnum):
    """What a failed datasync does to the dirty pieces. All of these have been observed."""

    DROP = "drop"
    """They are clean and stay readable; the next sync succeeds without writing them (ext4, XFS)."""
    REVERT = "revert"
    """Readers see the old content again (file systems that throw the pages away)."""
    LATE = "late"
    """The failing sync reports success; the next one fails."""


class Outcome(enum.StrEnum):
    """What may become of a piece that was not synced."""

    OLD = "old"
    NEW = "new"
    BETWEEN = "between"
    """A version that was written and overwritten since the last sync."""
    PREFIX = "prefix"
    GARBAGE = "garbage"


class Inode:
    """A file's content. `view` is what readers see; `durable` what a power cut leaves for certain."""

    __slots__ = (
        "_whole", "doubtful", "durable", "durable_size", "error_is_late", "number", "pending", "size", "sizes", "view",
    )  # fmt: skip

    def __init__(self, number: int) -> None:
        self.number = number
        self.view: dict[int, bytes] = {}
        self.size = 0
        self.durable: dict[int, bytes] = {}
        self.durable_size = 0
        # Contents since the last sync, newest last: the next sync makes the newest one durable.
        self.pending: dict[int, tuple[bytes, ...]] = {}
        # The same for pieces that a failed sync dropped: no sync makes them durable, and some may be on the platter.
        self.doubtful: dict[int, tuple[bytes, ...]] = {}
        self.sizes: tuple[int, ...] = ()
        self.error_is_late = False
        # The view in one piece, as long as nothing changes it.
        self._whole: bytes | None = None

    def __repr__(self) -> str:
        return f"<Inode {self.number}: {self.size} bytes, {len(self.pending)} pieces pending, {len(self.doubtful)} doubtful>"

    @property
    def is_dirty(self) -> bool:
        """Whether a power cut may change anything of it."""
        return bool(self.pending or self.doubtful or self.sizes)

    def clone(self) -> Inode:
        """A copy that shares no state. O(pieces)."""
        twin = Inode(self.number)
        twin.view, twin.size = self.view.copy(), self.size
        twin.durable, twin.durable_size = self.durable.copy(), self.durable_size
        twin.pending, twin.doubtful = self.pending.copy(), self.doubtful.copy()
        twin.sizes, twin.error_is_late = self.sizes, self.error_is_late
        return twin

    # --- reading and writing ---

    def read(self, size: int, offset: int) -> bytes:
        """Up to `size` bytes; fewer only at the end."""
        whole = self._whole
        if whole is None:
            get = self.view.get
            pieces = range(-(-self.size // PIECE_BYTES))
            whole = self._whole = b"".join([get(index, ZEROS) for index in pieces])[: self.size]
        return whole[offset : offset + size]

    def write(self, data: bytes, offset: int) -> None:
        """Change the view; every touched piece is pending."""
        end = offset + len(data)
        at = offset
        while at < end:
            index, inside = divmod(at, PIECE_BYTES)
            part = data[at - offset : at - offset + PIECE_BYTES - inside]
            old = self.view.get(index, ZEROS)
            self.put(index, old[:inside] + part + old[inside + len(part) :])
            at += len(part)
        if end > self.size:
            self._resize(end)

    def put(self, index: int, content: bytes) -> None:
        """Replace one piece in the view; it is pending."""
        self.view[index] = content
        self._whole = None
        self.pending[index] = (*self.pending.get(index, ()), content)[-VERSIONS_MAX:]

    def truncate(self, size: int) -> None:
        """Cut or grow. What is cut off reads as zeros if the file grows again."""
        if size < self.size:
            keep, inside = divmod(size, PIECE_BYTES)
            if inside and keep in self.view:
                self.put(keep, self.view[keep][:inside] + ZEROS[inside:])
                keep += 1
            for index in [index for index in self.view if index >= keep]:
                self.put(index, ZEROS)
        if size != self.size:
            self._resize(size)

    def _resize(self, size: int) -> None:
        self.size = size
        self._whole = None
        sizes = (*self.sizes, size)
        if len(sizes) > SIZES_MAX:
            sizes = (*sizes[: SIZES_MAX // 2], *sizes[SIZES_MAX // 2 + 1 :])
        self.sizes = sizes

    # --- syncing ---

    def sync(self) -> None:
        """Content and size are durable now, except what an earlier failed sync dropped."""
        for index, versions in self.pending.items():
            self.durable[index] = versions[-1]
            self.doubtful.pop(index, None)
        self.pending = {}
        self.durable_size, self.sizes = self.size, ()
        for index in [index for index in self.durable if index * PIECE_BYTES >= self.size]:
            del self.durable[index]

    def fail_sync(self, how: FailedSync) -> None:
        """A sync failed: nobody will write the dirty pieces any more."""
        for index, versions in self.pending.items():
            self.doubtful[index] = (*self.doubtful.get(index, ()), *versions)[-VERSIONS_MAX:]
            if how is FailedSync.REVERT:
                self.view[index] = self.durable.get(index, ZEROS)
        self.pending = {}
        self._whole = None
        self.error_is_late = how is FailedSync.LATE

    # --- what a power cut leaves ---

    def unsure_pieces(self) -> Iterator[int]:
        """The pieces that have more than one future, ascending."""
        yield from sorted({*self.pending, *self.doubtful})

    def futures(
        self, index: int, gap: bytes, garbage: bytes, torn_bytes: int = TORN_BYTES
    ) -> list[tuple[Outcome, bytes]]:
        """Every content that a piece may have after a power cut, without repeats. `gap`: what was there before it."""
        versions = (*self.doubtful.get(index, ()), *self.pending.get(index, ()))
        old, new = self.durable.get(index, gap), versions[-1]
        futures = [(Outcome.NEW, new), (Outcome.OLD, old)]
        futures += [(Outcome.BETWEEN, version) for version in versions[:-1]]
        if new != old:
            futures += [(Outcome.PREFIX, new[:torn_bytes] + old[torn_bytes:]), (Outcome.GARBAGE, garbage)]
        distinct: dict[bytes, Outcome] = {}
        for outcome, content in futures:
            distinct.setdefault(content, outcome)
        return [(outcome, content) for content, outcome in distinct.items()]

    def possible_sizes(self) -> list[int]:
        """The sizes that the file may have after a power cut, newest first; of more than SIZES_MAX the ends."""
        return list(dict.fromkeys([*reversed(self.sizes), self.durable_size]))

    def may_have(self, size: int) -> bool:
        """Whether a power cut may leave this size: one that is remembered, or lies where sizes were forgotten."""
        sizes = self.sizes
        if len(sizes) == SIZES_MAX:
            older, newer = sizes[SIZES_MAX // 2 - 1], sizes[SIZES_MAX // 2]
            if min(older, newer) <= size <= max(older, newer):
                return True
        return size in {*sizes, self.durable_size}

    def gap_pieces(self, size: int) -> range:
        """The pieces below `size` that lie behind the durable end: what was never written there reads as anything."""
        first = -(-self.durable_size // PIECE_BYTES)
        return range(first, -(-size // PIECE_BYTES))

    def left(self, size: int, pieces: Iterable[tuple[int, bytes]], gap: Sequence[bytes]) -> Inode:
        """The file after a power cut: `size`, these contents for the unsure pieces, and `gap` in turn where nothing was."""
        twin = Inode(self.number)
        content = self.durable.copy()
        if gap:
            content |= {
                index: gap[index % len(gap)] for index in self.gap_pieces(size) if index not in content
            }
        content |= dict(pieces)
        limit = -(-size // PIECE_BYTES)
        twin.view = {index: piece for index, piece in content.items() if index < limit}
        inside = size % PIECE_BYTES
        if inside and limit - 1 in twin.view:
            twin.view[limit - 1] = twin.view[limit - 1][:inside] + ZEROS[inside:]
        twin.durable = twin.view.copy()
        twin.size = twin.durable_size = size
        return twin

    def fingerprint(self) -> object:
        """A value that is equal for files whose content and futures are equal."""
        return (
            self.size, self.durable_size, self.sizes, frozenset(self.view.items()), frozenset(self.durable.items()),
            frozenset(self.pending.items()), frozenset(self.doubtful.items()), self.error_is_late,
        )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def garbage_piece(seed: Hashable) -> bytes:
    """A piece of noise, the same for the same seed. Never mistaken for anything that was written."""
    return random.Random(f"garbage {seed}").randbytes(PIECE_BYTES)
