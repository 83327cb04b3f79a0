"""LSNs in state/ that were given up, cancelled or dead: they must not be delivered, although the log may still hold them.

What is not here: the letters of those that died (`letters`).

The idea needed to read it: they stand in blocks of consecutive LSNs, so that one more costs a block of a few bytes, and a
million cost a few hundred entries. They are forgotten by whole blocks, with the next save, once both generations of the
checkpoint cover a block: what is remembered for too long does no harm, since no LSN is used twice.

The key of a value is the number of its block (LSN >> 14) plus 1, 8 bytes, big-endian. Its body is one or more offsets into the
block, ascending, 2 bytes each, little-endian.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator, Mapping
from itertools import pairwise
from typing import Final

from walbatch.limits import CANCELLED_MAX, DEAD_LETTERS_MAX
from walbatch.storage.envelope import ENVELOPE_BYTES, check_numbers, pack_column, unpack_column
from walbatch.storage.lsnkeys import key_of, lsn_of
from walbatch.storage.statefile import Change, Table
from walbatch.storage.tables import Damaged, Tables, in_short

BLOCK_BITS: Final = 14
BLOCK_LSNS: Final = 1 << BLOCK_BITS

COUNT_MAX: Final = 2 * (CANCELLED_MAX + DEAD_LETTERS_MAX)
"""LSNs of all blocks: twice what an engine gives up at most, since blocks are forgotten late."""

FORGOTTEN_AT_ONCE: Final = 64
"""Blocks removed with one save: the next one goes on."""

TABLE: Final = Table(name=b"given_up", value_bytes_max=ENVELOPE_BYTES + 2 * BLOCK_LSNS, entries_max=2**17)


class GivenUp:
    """What one store has given up. Its caller serialises whatever changes it."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._counts: dict[int, int] = {}
        """LSNs of each block; 0 for one that is damaged."""
        self._count = 0
        self._forgettable = 0
        """Blocks below this one may be forgotten."""
        self._first = 0
        """No block lies below this one."""

    def load(self) -> tuple[set[int], list[str]]:
        """All of them, and a finding for each block that cannot be read."""
        lsns: set[int] = set()
        findings: list[str] = []
        problems: list[str] = []
        for key, value in self._tables.entries(TABLE, problems):
            block, problem = self._tables.decode(key, value, decode_block)
            if block is None:
                findings.append(f"{_described(key)} may be delivered: {problem}")
            elif len(lsns) + len(block) > COUNT_MAX:
                problems.append(
                    f"more than {COUNT_MAX:,} operations were given up: the rest may be delivered"
                )
                break
            else:
                lsns.update(block)
        return lsns, problems + in_short(findings)

    def examine(self) -> Iterator[Damaged]:
        """Look at all blocks, and tell which are damaged. Raises as `Tables.damaged`."""
        self._counts, self._count = {}, 0
        for key, value in self._tables.raw_entries(TABLE):
            block, problem = self._tables.decode(key, value, decode_block)
            number = lsn_of(key)
            if number is not None:
                self._counts[number - 1] = len(block or ())
                self._count += len(block or ())
            if block is None:
                yield key, value, f"{_described(key)}: {problem}"
        self._first = min(self._counts, default=0)

    def allow_forgetting(self, lsn: int) -> None:
        """The blocks that end at or below `lsn` may go."""
        self._forgettable = max(self._forgettable, (lsn + 1) >> BLOCK_BITS)

    def changes(self, lsns: Collection[int]) -> list[Change]:
        """What gives up `lsns` too, and forgets some of what may be. Raises StorageError, with ENOSPC where there are too many."""
        blocks: dict[int, set[int]] = {}
        try:
            check_numbers(lsns)
        except ValueError as error:
            raise self._tables.refuse("what is given up", error) from error
        for lsn in lsns:
            blocks.setdefault(lsn >> BLOCK_BITS, set()).add(lsn)
        held = self._tables.get(TABLE, [key_of(number + 1) for number in blocks if number in self._counts])
        for key, value in held.items():
            # What is damaged has been copied when the store was opened, and is replaced.
            block, _ = self._tables.decode(key, value, decode_block)
            number = lsn_of(key)
            assert number is not None
            blocks[number - 1].update(block or ())
        added = sum(len(block) - self._counts.get(number, 0) for number, block in blocks.items())
        new = len(blocks.keys() - self._counts.keys())
        if added > 0 and (self._count + added > COUNT_MAX or len(self._counts) + new > TABLE.entries_max):
            raise self._tables.full("cancelled or dead operations that the checkpoint does not cover")
        return [*self._forgetting(blocks), *(self._change(number, block) for number, block in blocks.items())]

    def changed(self, changes: Collection[Change]) -> None:
        """`changes`, among which are those of `changes`, have been saved."""
        for name, key, value in changes:
            number = lsn_of(key)
            if name != TABLE.name or number is None:
                continue
            self._count -= self._counts.pop(number - 1, 0)
            if value is not None:
                count = (len(value) - ENVELOPE_BYTES) // 2
                self._counts[number - 1] = count
                self._count += count
                self._first = min(self._first, number - 1)

    def _change(self, number: int, block: set[int]) -> Change:
        key = key_of(number + 1)
        offsets = array("H", (lsn - (number << BLOCK_BITS) for lsn in sorted(block)))
        return TABLE.name, key, self._tables.seal(key, pack_column(offsets))

    def _forgetting(self, needed: Mapping[int, object]) -> Iterator[Change]:
        """Removals of blocks, the lowest first, without those that are `needed`."""
        if self._first >= self._forgettable:
            return
        below = sorted(number for number in self._counts if number < self._forgettable)
        if not below:
            self._first = self._forgettable
        going = [number for number in below if number not in needed]
        yield from ((TABLE.name, key_of(number + 1), None) for number in going[:FORGOTTEN_AT_ONCE])


def decode_block(key: bytes, body: bytes) -> list[int]:
    """The LSNs of a block. Nothing in it is trusted; raises ValueError for what was not written by us."""
    number = lsn_of(key)
    if number is None:
        raise ValueError("its key is no block")
    offsets = unpack_column("H", body)
    if not offsets or offsets[-1] >= BLOCK_LSNS or any(low >= high for low, high in pairwise(offsets)):
        raise ValueError("its offsets do not ascend, or leave the block")
    first = (number - 1) << BLOCK_BITS
    lsns = [first + offset for offset in offsets]
    check_numbers(lsns[-1:])
    return lsns


def _described(key: bytes) -> str:
    number = lsn_of(key)
    if number is None:
        return f"what was given up under {key!r}"
    first = (number - 1) << BLOCK_BITS
    return f"what was given up from LSN {max(first, 1):,} to {first + BLOCK_LSNS - 1:,}"
