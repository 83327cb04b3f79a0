"""The mark of one shard as bytes, and what a transactional backend does with it.

A backend that commits batches in transactions stores the mark beside its data, in the same transaction: that is what
makes the effect of every operation exactly once. This module is all such a backend needs: the codec, which operations
of a batch are fresh, the check that an old engine does not write any more, and a mark that leaves something out. It stores
nothing itself.

The bytes are little-endian, the same everywhere and for ever; a change is a new version:

| offset       | size | field                                                     |
|--------------|------|-----------------------------------------------------------|
| 0            | 4    | magic `WBmk`                                              |
| 4            | 4    | version, 1                                                |
| 8            | 8    | epoch                                                     |
| 16           | 8    | watermark                                                 |
| 24           | 4    | count of ranges                                           |
| 28           | 16 n | ranges: first and last LSN, both included, 8 bytes each   |
| 28 + 16 n    | 4    | CRC-32C of all bytes before it                            |

Ranges ascend, are disjoint, and lie above the watermark. No number exceeds LSN_MAX.
"""

from __future__ import annotations

import struct
import sys
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from itertools import chain
from operator import ge, gt
from typing import Final

from walbatch.core.checksum import crc32c
from walbatch.errors import Fenced
from walbatch.limits import LSN_MAX, MARK_BYTES_MAX, RANGES_MAX
from walbatch.types import Batch, Mark, Range

MAGIC: Final = b"WBmk"
VERSION: Final = 1

_HEADER: Final = struct.Struct("<4sIQQI")
_CRC: Final = struct.Struct("<I")
_RANGE_BYTES: Final = 16

assert array("Q").itemsize == _RANGE_BYTES // 2
assert _HEADER.size + RANGES_MAX * _RANGE_BYTES + _CRC.size <= MARK_BYTES_MAX


def encode_mark(mark: Mark) -> bytes:
    """The bytes of `mark`: 32, and 16 for each range.

    Raises ValueError for a mark that `decode_mark` would refuse.
    """
    ranges = pack_ranges(mark.ranges, mark.watermark)
    count = len(ranges) // _RANGE_BYTES
    _check_numbers(mark.epoch, mark.watermark)
    body = _HEADER.pack(MAGIC, VERSION, mark.epoch, mark.watermark, count) + ranges
    return body + _CRC.pack(crc32c(body, 0))


def decode_mark(data: bytes) -> Mark:
    """The mark in `data`, which is trusted in nothing.

    Raises ValueError, saying what is wrong, for anything that `encode_mark` did not write.
    """
    size = len(data)
    if not _HEADER.size + _CRC.size <= size <= MARK_BYTES_MAX:
        raise ValueError(f"a mark has {_HEADER.size + _CRC.size} to {MARK_BYTES_MAX:,} bytes, not {size:,}")
    magic, version, epoch, watermark, count = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise ValueError(f"not a mark: it starts with {magic!r}, not {MAGIC!r}")
    # The sum before the version: a damaged mark is damaged, whatever version its bytes now claim.
    body = data[: size - _CRC.size]
    (stored,) = _CRC.unpack_from(data, len(body))
    if stored != crc32c(body, 0):
        raise ValueError(f"the mark's checksum is {crc32c(body, 0):#010x}, but {stored:#010x} is stored")
    if version != VERSION:
        raise ValueError(f"the mark has version {version}, this walbatch reads version {VERSION}: upgrade it")
    if len(body) != _HEADER.size + count * _RANGE_BYTES:
        raise ValueError(f"the mark claims {count:,} ranges, but has {size:,} bytes")
    _check_numbers(epoch, watermark)
    return Mark(epoch=epoch, watermark=watermark, ranges=unpack_ranges(body[_HEADER.size :], watermark))


def pack_ranges(ranges: Iterable[Range], watermark: int) -> bytes:
    """Ranges as pairs of little-endian 64-bit numbers. Raises ValueError where `unpack_ranges` would."""
    try:
        flat = array("Q", chain.from_iterable(ranges))
    except (OverflowError, TypeError) as error:
        raise ValueError(f"a range is no pair of LSNs: {error}") from error
    _check_ranges(flat, watermark)
    if sys.byteorder == "big":  # pragma: no cover - the format is little-endian
        flat.byteswap()
    return flat.tobytes()


def unpack_ranges(data: bytes | memoryview, watermark: int) -> tuple[Range, ...]:
    """The ranges that `pack_ranges` wrote. Raises ValueError unless they ascend, are disjoint and above `watermark`."""
    if len(data) % _RANGE_BYTES:
        raise ValueError(f"{len(data):,} bytes are no whole number of ranges of {_RANGE_BYTES}")
    flat = array("Q")
    flat.frombytes(data)
    if sys.byteorder == "big":  # pragma: no cover - the format is little-endian
        flat.byteswap()
    _check_ranges(flat, watermark)
    return tuple(zip(flat[0::2], flat[1::2], strict=True))


def check_epoch(batch: Batch, held: Mark) -> None:
    """Refuse a batch of an engine that a newer one has replaced. Nothing to check where the batch has no mark.

    Raises `Fenced` if `held`, the mark in the backend, has a later epoch than the batch's mark.
    """
    if batch.mark is not None and held.epoch > batch.mark.epoch:
        raise Fenced(
            f"lane {batch.lane!r}, shard {batch.shard}: the backend has been written by epoch {held.epoch} of the "
            f"store, this engine is epoch {batch.mark.epoch}: a newer engine has taken over; close this one"
        )


def fresh_indexes(batch: Batch, held: Mark) -> list[int] | None:
    """Which operations of `batch` the mark in the backend does not cover, as ascending indexes; None: all of them.

    None costs one pass over the LSNs: the usual case, in which the whole batch lies above the mark.
    """
    if not batch.lsns:
        return None
    settled_max = held.ranges[-1][1] if held.ranges else held.watermark
    if min(batch.lsns) > settled_max:
        return None
    fresh = [index for index, lsn in enumerate(batch.lsns) if not held.covers(lsn)]
    return None if len(fresh) == len(batch.lsns) else fresh


def leave_out(mark: Mark, lsns: Iterable[int]) -> Mark:
    """The mark that covers what `mark` does, but for `lsns`: what a backend stores that has rejected some of a batch.

    Until the engine has kept such an operation as a dead letter, it must come again after a crash, and not count as applied.
    """
    gone = sorted({lsn for lsn in lsns if mark.covers(lsn)})
    if not gone:
        return mark
    watermark = min(mark.watermark, gone[0] - 1)
    kept: list[Range] = []
    for begin, last in ((watermark + 1, mark.watermark), *mark.ranges):
        first = begin
        for lsn in gone[bisect_left(gone, first) : bisect_right(gone, last)]:
            if first < lsn:
                kept.append((first, lsn - 1))
            first = lsn + 1
        if first <= last:
            kept.append((first, last))
    return Mark(epoch=mark.epoch, watermark=watermark, ranges=tuple(kept))


def _check_numbers(epoch: int, watermark: int) -> None:
    for name, value in (("epoch", epoch), ("watermark", watermark)):
        if not 0 <= value <= LSN_MAX:
            raise ValueError(f"the mark's {name} is {value}, but must be from 0 to {LSN_MAX}")


def _check_ranges(flat: array[int], watermark: int) -> None:
    """Raise ValueError unless `flat` (first, last, first, last, ...) is what a mark above `watermark` may hold."""
    if not flat:
        return
    if len(flat) % 2:
        raise ValueError("a range is no pair of LSNs: one of them is missing")
    firsts, lasts = flat[0::2], flat[1::2]
    if len(firsts) > RANGES_MAX:
        raise ValueError(f"{len(firsts):,} ranges, but a mark holds {RANGES_MAX:,} at most")
    if any(map(gt, firsts, lasts)) or any(map(ge, lasts, firsts[1:])):
        raise ValueError("the ranges do not ascend, or they overlap")
    if firsts[0] <= watermark:
        raise ValueError(f"the ranges start at {firsts[0]}, not above the watermark {watermark}")
    if lasts[-1] > LSN_MAX:
        raise ValueError(f"the ranges end at {lasts[-1]}, but no LSN exceeds {LSN_MAX}")
