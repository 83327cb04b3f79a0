"""What few operations have: options, and LSNs with holes. What has neither is written as if there were no such thing."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.segments import columns_of
from tests.core.test_frame import (
    HEADER_BYTES,
    KEY,
    PAYLOAD,
    SEED,
    body_bytes,
    decode,
    frame_of,
    hostile_frame,
    operations,
    plain,
)
from walbatch import limits
from walbatch.core.columns import (
    ONE_BYTES_MAX,
    Column,
    Columns,
    decode_body,
    encode_body,
    encode_one,
    encoded_bytes_max,
    options_bytes,
)
from walbatch.core.frame import (
    Codec,
    FrameError,
    FrameType,
    NewerFrameError,
    decode_frame_header,
    encode_frame_header,
)
from walbatch.types import NO_OPTIONS, PRIORITY_MAX, Options

numbers = st.one_of(st.just(0), st.integers(0, limits.LSN_MAX))
options = st.builds(
    Options,
    not_before_ns=numbers,
    deadline_ns=numbers,
    origin=numbers,
    idempotency_key=st.binary(max_size=20),
)


@st.composite
def operations_with_options(draw: st.DrawFn) -> Columns:
    columns = draw(operations())
    count = len(columns.keys)
    chosen = draw(st.lists(st.one_of(st.just(NO_OPTIONS), options), min_size=count, max_size=count))
    return replace(columns, options=chosen)


# --- one operation --------------------------------------------------------------------------------------------------


@given(
    key=st.binary(max_size=40),
    payload=st.binary(max_size=700),
    priority=st.integers(0, PRIORITY_MAX),
    kind=st.sampled_from(["put", "k" * limits.KIND_BYTES_MAX]),
)
def test_one_operation_is_written_as_any_other_group(
    key: bytes, payload: bytes, priority: int, kind: str
) -> None:
    columns = Columns(kinds=(kind,), kind_indexes=[0], priorities=[priority], keys=[key], payloads=[payload])
    body = encode_one((kind,), priority, key, payload)
    assert body == encode_body(columns)
    assert body.raw_bytes <= len(key) + len(payload) + ONE_BYTES_MAX


# --- options --------------------------------------------------------------------------------------------------------


@given(columns=operations_with_options(), compress=st.sampled_from([None, 0]))
def test_options_that_were_encoded_are_those_that_are_decoded(columns: Columns, compress: int | None) -> None:
    found = decode(frame_of(encode_body(columns, compress_bytes_min=compress)))
    assert plain(found) == plain(columns)
    has_any = any(option != NO_OPTIONS for option in columns.options)
    assert list(found.options) == (list(columns.options) if has_any else [])


@given(columns=operations())
def test_options_that_are_none_leave_no_trace(columns: Columns) -> None:
    none = replace(columns, options=[NO_OPTIONS] * len(columns.keys))
    assert encode_body(none) == encode_body(columns)
    assert decode(frame_of(encode_body(columns))).options == ()


@given(columns=operations_with_options())
def test_the_bound_that_is_checked_before_encoding_counts_options(columns: Columns) -> None:
    size = sum(map(len, columns.keys)) + sum(map(len, columns.payloads))
    assert encode_body(columns).raw_bytes <= encoded_bytes_max(size, len(columns.keys), columns.options)


def test_options_at_their_limits_come_back() -> None:
    largest = Options(
        not_before_ns=limits.LSN_MAX, deadline_ns=limits.LSN_MAX, origin=limits.LSN_MAX,
        idempotency_key=bytes(limits.IDEMPOTENCY_KEY_BYTES_MAX),
    )  # fmt: skip
    columns = replace(columns_of([b"a", b"b"]), options=[largest, NO_OPTIONS])
    found = decode(frame_of(encode_body(columns)))
    assert list(found.options) == [largest, NO_OPTIONS]
    assert found.options[1] is NO_OPTIONS
    assert options_bytes(()) == 0
    assert options_bytes([largest]) == limits.IDEMPOTENCY_KEY_BYTES_MAX + 26


@pytest.mark.parametrize(
    "raw",
    [
        body_bytes(KEY, PAYLOAD, (Column.NOT_BEFORE, 0, 0, limits.LSN_MAX + 1)),
        body_bytes(KEY, PAYLOAD, (Column.DEADLINE, 0, 0, 2**64 - 1)),
        body_bytes(KEY, PAYLOAD, (Column.ORIGIN, 8, 0, 0), tail=b"\xff" * 8),
        body_bytes(KEY, PAYLOAD, (Column.IDEMPOTENCY_BYTES, 0, 0, 257), tail=bytes(257)),
        body_bytes(KEY, PAYLOAD, (Column.IDEMPOTENCY_BYTES, 0, 0, 2), tail=b"x"),
        body_bytes(KEY, PAYLOAD, (Column.IDEMPOTENCY_BYTES, 0, 0, 2), tail=b"xxx"),
        body_bytes(KEY, PAYLOAD, (Column.IDEMPOTENCY_BYTES, 1, 0, 0), tail=b""),
    ],
    ids=["time over its limit", "deadline over its limit", "origin over its limit", "key over its limit", "a byte too few",
         "a byte too many", "array cut short"],
)  # fmt: skip
@pytest.mark.parametrize("codec", Codec, ids=lambda codec: codec.name)
def test_options_that_lie_are_rejected_although_the_crcs_are_right(raw: bytes, codec: Codec) -> None:
    zstandard = pytest.importorskip("zstandard")
    stored = raw if codec is Codec.RAW else zstandard.ZstdCompressor().compress(raw)
    with pytest.raises(FrameError) as caught:
        decode_body(*hostile_frame(stored, codec=codec, raw_bytes=len(raw)))
    assert not isinstance(caught.value, NewerFrameError)


def test_a_column_of_a_later_version_is_told_from_damage() -> None:
    raw = body_bytes(KEY, PAYLOAD, (max(Column) + 1, 0, 0, 0))
    with pytest.raises(NewerFrameError, match="column 10"):
        decode_body(*hostile_frame(raw))


# --- LSNs with holes ------------------------------------------------------------------------------------------------


def sparse(columns: Columns, offsets: list[int], *, span: int, first_lsn: int = 1) -> bytes:
    body = encode_body(replace(columns, lsn_offsets=offsets))
    head = encode_frame_header(
        body, type=FrameType.OPERATIONS, first_lsn=first_lsn, span=span, synced_lsn=0, wall_ns=1, seed=SEED
    )
    return head + body.padded


@given(
    offsets=st.lists(st.integers(0, 2**40), min_size=1, max_size=20, unique=True).map(sorted),
    behind=st.integers(1, 2**40),
    first_lsn=st.integers(1, 2**40),
)
def test_operations_keep_their_lsns_over_any_holes(offsets: list[int], behind: int, first_lsn: int) -> None:
    columns = columns_of([b"%d" % offset for offset in offsets])
    data = sparse(columns, offsets, span=offsets[-1] + 1 + behind, first_lsn=first_lsn)
    found = decode(data)
    assert plain(found) == plain(columns)
    assert list(found.lsns(first_lsn)) == [first_lsn + offset for offset in offsets]


def test_without_holes_the_lsns_follow_one_another() -> None:
    found = decode(frame_of(encode_body(columns_of([b"a", b"b", b"c"]))))
    assert found.lsn_offsets == ()
    assert found.lsns(7) == range(7, 10)


@pytest.mark.parametrize(
    ("offsets", "span"),
    [([], 3), ([0, 1], 2), ([1, 0], 3), ([1, 1], 3), ([0, 3], 3), ([0, 2**60], 3)],
    ids=["holes that nothing names", "names without holes", "descending", "twice", "behind its end", "far behind its end"],
)  # fmt: skip
def test_lsns_that_do_not_fit_their_frame_are_rejected(offsets: list[int], span: int) -> None:
    data = sparse(columns_of([b"a", b"b"]), offsets, span=span)
    header = decode_frame_header(data, seed=SEED)
    with pytest.raises(FrameError, match="LSNs"):
        decode_body(header, data[HEADER_BYTES:])


def test_a_constant_column_of_lsns_holds_for_a_single_operation_only() -> None:
    assert list(decode(sparse(columns_of([b"a"]), [5], span=9)).lsns(1)) == [6]
    raw = body_bytes(KEY, PAYLOAD, (Column.LSN, 0, 0, 1))
    header, padded = hostile_frame(raw, count=2)
    with pytest.raises(FrameError, match="ascend"):
        decode_body(replace(header, span=3), padded)


def test_what_has_no_options_is_written_byte_for_byte_as_before() -> None:
    """The bytes of the first release, written out."""
    raw = encode_body(columns_of([b"one", b""], keys=[b"alpha", b"beta"])).padded
    assert raw.startswith(
        struct.pack("<HHI", 1, 2, 4)
        + struct.pack("<BBHQ", 3, 1, 0, 0)
        + struct.pack("<BBHQ", 4, 1, 0, 0)
        + b"\x03put\x05\x04\x03\x00alphabetaone"
    )
