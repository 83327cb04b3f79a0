"""The mark's codec against hostile bytes, and what a transactional backend asks of it."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walbatch.core import mark as mark_module
from walbatch.core.checksum import crc32c, crc32c_audit
from walbatch.core.mark import (
    check_epoch,
    decode_mark,
    encode_mark,
    fresh_indexes,
    leave_out,
    pack_ranges,
    unpack_ranges,
)
from walbatch.errors import Fenced
from walbatch.limits import LSN_MAX, MARK_BYTES_MAX, RANGES_MAX
from walbatch.types import Batch, CutReason, Mark, Range, merge_ranges

NUMBERS = st.one_of(st.integers(0, 100), st.integers(0, LSN_MAX))


@st.composite
def marks(draw: st.DrawFn) -> Mark:
    edges = draw(st.lists(NUMBERS, unique=True, max_size=40).map(sorted))
    watermark = edges.pop(0) if edges else draw(NUMBERS)
    ranges: list[Range] = [(edges[index], edges[index + 1]) for index in range(0, len(edges) - 1, 2)]
    return Mark(epoch=draw(NUMBERS), watermark=watermark, ranges=tuple(ranges))


def batch(*lsns: int, mark: Mark | None = None) -> Batch:
    return Batch(
        lane="put",
        shard=3,
        store=bytes(16),
        lsns=lsns,
        keys=[b"k"] * len(lsns),
        payloads=[b""] * len(lsns),
        priorities=[5] * len(lsns),
        attempt=1,
        reason=CutReason.COUNT,
        mark=mark,
    )


def sealed(body: bytes) -> bytes:
    """`body` with the checksum that makes it believable."""
    return body + struct.pack("<I", crc32c(body, 0))


def header(
    *, magic: bytes = b"WBmk", version: int = 1, epoch: int = 0, watermark: int = 0, count: int = 0
) -> bytes:
    return struct.pack("<4sIQQI", magic, version, epoch, watermark, count)


# --- the codec ----------------------------------------------------------------------------------------------------


@given(marks())
def test_a_mark_comes_back_as_it_was(mark: Mark) -> None:
    data = encode_mark(mark)
    assert decode_mark(data) == mark
    assert len(data) == 32 + 16 * len(mark.ranges)


def test_the_bytes_are_those_of_the_table_in_the_docstring() -> None:
    body = bytes.fromhex(
        "57426d6b 01000000 0700000000000000 0a00000000000000 02000000"
        "0c00000000000000 0e00000000000000 1400000000000000 1400000000000000"
    )
    expected = body + crc32c_audit(body, 0).to_bytes(4, "little")
    assert encode_mark(Mark(epoch=7, watermark=10, ranges=((12, 14), (20, 20)))) == expected


@given(marks(), st.data())
def test_no_flipped_bit_is_accepted(mark: Mark, data: st.DataObject) -> None:
    damaged = bytearray(encode_mark(mark))
    bit = data.draw(st.integers(0, 8 * len(damaged) - 1))
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ValueError, match=r"."):
        decode_mark(bytes(damaged))


def test_no_bit_of_a_small_mark_can_flip_unseen() -> None:
    good = encode_mark(Mark(epoch=2, watermark=10, ranges=((12, 14),)))
    for bit in range(8 * len(good)):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match=r"."):
            decode_mark(bytes(damaged))


@given(marks(), st.integers(0, 10_000))
def test_no_part_of_a_mark_is_accepted(mark: Mark, size: int) -> None:
    data = encode_mark(mark)
    with pytest.raises(ValueError, match=r"."):
        decode_mark(data[: size % len(data)])


@given(st.binary(max_size=200))
def test_other_bytes_end_in_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode_mark(data)


@given(st.binary(max_size=100))
def test_other_bytes_with_a_good_checksum_give_a_sound_mark_or_a_value_error(body: bytes) -> None:
    try:
        mark = decode_mark(sealed(header(count=len(body) // 16) + body))
    except ValueError:
        return
    assert merge_ranges(mark.ranges, mark.watermark)[0][0] > mark.watermark if mark.ranges else True


FORGED = {
    "too short for a mark": (b"WBmk", "has 32 to"),
    "longer than any mark": (bytes(MARK_BYTES_MAX + 1), "has 32 to"),
    "another magic": (sealed(header(magic=b"WBxx")), "not a mark"),
    "a newer version": (sealed(header(version=2)), "version 2.*upgrade"),
    "more ranges claimed than there are": (sealed(header(count=1)), "claims 1 ranges"),
    "an absurd count": (sealed(header(count=2**32 - 1)), "claims 4,294,967,295 ranges"),
    "fewer ranges claimed than there are": (sealed(header() + bytes(16)), "claims 0 ranges"),
    "half a range": (sealed(header(count=1) + bytes(8)), "claims 1 ranges"),
    "an epoch beyond 63 bits": (sealed(header(epoch=2**63)), "epoch"),
    "a watermark beyond 63 bits": (sealed(header(watermark=2**63)), "watermark"),
    "a range upside down": (sealed(header(count=1) + struct.pack("<QQ", 9, 8)), "ascend"),
    "overlapping ranges": (sealed(header(count=2) + struct.pack("<4Q", 2, 5, 5, 6)), "overlap"),
    "descending ranges": (sealed(header(count=2) + struct.pack("<4Q", 8, 9, 2, 3)), "ascend"),
    "a range at the watermark": (
        sealed(header(watermark=4, count=1) + struct.pack("<QQ", 4, 5)),
        "watermark 4",
    ),
    "a range beyond the last LSN": (sealed(header(count=1) + struct.pack("<QQ", 1, 2**63)), "exceeds"),
}


@pytest.mark.parametrize(("data", "reason"), FORGED.values(), ids=FORGED.keys())
def test_a_forged_mark_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode_mark(data)


UNFIT = {
    "a negative watermark": Mark(watermark=-1),
    "an epoch beyond 63 bits": Mark(epoch=2**63),
    "a negative LSN": Mark(ranges=((-3, 4),)),
    "an LSN that is no number": Mark(ranges=(("1", 2),)),  # type: ignore[arg-type]
    "half a range": Mark(ranges=((1,),)),  # type: ignore[arg-type]
    "ranges that overlap": Mark(ranges=((1, 5), (3, 8))),
    "a range below the watermark": Mark(watermark=9, ranges=((3, 4),)),
}


@pytest.mark.parametrize("mark", UNFIT.values(), ids=UNFIT.keys())
def test_what_could_not_be_read_back_is_not_written(mark: Mark) -> None:
    with pytest.raises(ValueError, match=r"."):
        encode_mark(mark)


def test_as_many_ranges_as_a_mark_may_hold_fit_and_one_more_does_not() -> None:
    ranges = tuple((2 * lsn, 2 * lsn) for lsn in range(1, RANGES_MAX + 2))
    data = encode_mark(Mark(ranges=ranges[:-1]))
    assert len(data) <= MARK_BYTES_MAX
    assert decode_mark(data).ranges == ranges[:-1]
    with pytest.raises(ValueError, match="100,001 ranges"):
        encode_mark(Mark(ranges=ranges))


def test_packed_ranges_are_checked_when_they_are_unpacked() -> None:
    packed = pack_ranges([(3, 4), (6, 9)], 2)
    assert unpack_ranges(memoryview(packed), 2) == ((3, 4), (6, 9))
    with pytest.raises(ValueError, match="watermark 3"):
        unpack_ranges(packed, 3)
    with pytest.raises(ValueError, match="whole number"):
        unpack_ranges(packed[:-1], 2)
    assert unpack_ranges(b"", 0) == ()


def test_the_largest_mark_fits_in_its_limit() -> None:
    assert mark_module._HEADER.size + 16 * RANGES_MAX + 4 <= MARK_BYTES_MAX


# --- what a backend asks ------------------------------------------------------------------------------------------


@given(marks(), st.lists(NUMBERS.filter(bool), max_size=30))
def test_exactly_the_operations_that_the_held_mark_does_not_cover_are_fresh(
    held: Mark, lsns: list[int]
) -> None:
    fresh = fresh_indexes(batch(*lsns), held)
    expected = [index for index, lsn in enumerate(lsns) if not held.covers(lsn)]
    assert (list(range(len(lsns))) if fresh is None else fresh) == expected


HELD = Mark(watermark=10, ranges=((13, 14), (20, 29)))
FRESH: dict[str, tuple[tuple[int, ...], list[int] | None]] = {
    "above everything": ((30, 31), None),
    "above everything, not in LSN order": ((33, 31), None),
    "in a hole": ((11, 12, 15), None),
    "on both sides of the watermark": ((9, 10, 11), [2]),
    "in and beside the ranges": ((12, 13, 14, 15, 29, 30), [0, 3, 5]),
    "all covered": ((1, 10, 20), []),
    "an unlogged lane, which has no LSNs": ((), None),
}


@pytest.mark.parametrize(("lsns", "expected"), FRESH.values(), ids=FRESH.keys())
def test_fresh_operations(lsns: tuple[int, ...], expected: list[int] | None) -> None:
    assert fresh_indexes(batch(*lsns), HELD) == expected


def test_everything_is_fresh_where_nothing_is_held() -> None:
    assert fresh_indexes(batch(1, 2, 3), Mark()) is None


def test_an_engine_that_a_newer_one_replaced_is_fenced() -> None:
    with pytest.raises(Fenced, match=r"'put', shard 3.*epoch 5.*epoch 4.*close"):
        check_epoch(batch(1, mark=Mark(epoch=4)), Mark(epoch=5))


@pytest.mark.parametrize(
    "mark", [Mark(epoch=5), Mark(epoch=6), None], ids=["the same", "a newer", "unlogged"]
)
def test_an_engine_of_the_same_epoch_or_a_newer_one_may_write(mark: Mark | None) -> None:
    check_epoch(batch(1, mark=mark), Mark(epoch=5))


# --- a mark that leaves something out -----------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 60), unique=True).map(sorted),
    st.integers(0, 40),
    st.lists(st.integers(1, 70), max_size=12),
)
def test_what_is_left_out_is_not_covered_and_all_else_is_as_before(
    covered: list[int], watermark: int, gone: list[int]
) -> None:
    mark = Mark(epoch=7, watermark=watermark, ranges=merge_ranges([(lsn, lsn) for lsn in covered], watermark))
    left = leave_out(mark, gone)
    assert left.epoch == 7
    wanted = {lsn for lsn in range(1, 80) if mark.covers(lsn)} - set(gone)
    assert {lsn for lsn in range(1, 80) if left.covers(lsn)} == wanted
    assert decode_mark(encode_mark(left)) == left


def test_a_mark_of_which_nothing_is_left_out_stays_itself() -> None:
    mark = Mark(epoch=1, watermark=5, ranges=((8, 9),))
    assert leave_out(mark, []) is mark
    assert leave_out(mark, [7, 20]) is mark


def test_the_watermark_ends_before_the_first_that_is_left_out() -> None:
    assert leave_out(Mark(watermark=5, ranges=((8, 9),)), [3, 8]) == Mark(
        watermark=2, ranges=((4, 5), (9, 9))
    )
