"""Rows as bytes: every value comes back as it was, and bytes from elsewhere end in a RowError."""

import contextlib
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walbatch.copying.rows import (
    Decoder,
    Encoder,
    RowError,
    key_of,
    latest,
    number_of,
    refusal_of,
    refused_payload,
    row_payload,
)

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(exclude_categories=["Cs"])), st.binary(),
)  # fmt: skip
ROWS = st.lists(VALUES, max_size=8).map(tuple)


def same(one: Any, other: Any) -> bool:
    """Equal, of the same type, and the same sign of zero."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return (math.isnan(one) and math.isnan(other)) or (
            one == other and math.copysign(1, one) == math.copysign(1, other)
        )
    return bool(one == other)


@given(st.lists(ROWS, max_size=5))
def test_a_row_comes_back_as_it_was_whatever_came_before_it(rows: list[tuple[Any, ...]]) -> None:
    for row in rows:
        encoder, decoder = Encoder("s" * len(row)), Decoder(len(row))
        for _ in range(2):
            back = decoder.decode(encoder.encode(row))
            assert len(back) == len(row)
            assert all(map(same, back, row)), (back, row)


@given(st.integers(0, 4).flatmap(lambda count: st.lists(st.tuples(*[VALUES] * count), max_size=40)))
def test_rows_that_are_packed_together_are_what_each_is_alone(rows: list[tuple[Any, ...]]) -> None:
    rows = rows * 5  # so that there are enough of one shape
    encoder = Encoder("s" * len(rows[0]) if rows else "")
    assert encoder.encode_all(rows) == [encoder.encode(row) for row in rows]


def test_a_row_that_cannot_be_packed_is_told_among_those_that_can() -> None:
    rows: list[tuple[Any, ...]] = [("a",)] * 10 + [("\ud800",), (object(),)] + [(1 << 90,)] * 10
    packed = Encoder("s").encode_all(rows)
    assert [type(data) for data in packed] == [bytes] * 10 + [RowError] * 2 + [bytes] * 10


@pytest.mark.parametrize("note", list("NDTSZUJO"))
def test_a_text_that_is_something_else_says_what(note: str) -> None:
    data = Encoder(f"s{note}").encode(("a", "b"))
    assert data[2:4] == f"s{note}".encode()
    assert Decoder(2).decode(data) == ("a", "b")


@given(st.binary(max_size=60), st.integers(0, 4))
def test_foreign_bytes_are_refused_or_read_and_never_anything_else(data: bytes, count: int) -> None:
    with_head = count.to_bytes(2, "little") + data
    for given_bytes in (data, with_head):
        with contextlib.suppress(RowError):
            assert len(Decoder(count).decode(given_bytes)) == count
        assert refusal_of(given_bytes) is None or isinstance(refusal_of(given_bytes), str)
        assert number_of(given_bytes) >= 0
        assert isinstance(key_of(b"k", given_bytes), bytes)


@given(ROWS, st.data())
def test_a_row_that_was_cut_off_or_goes_on_is_refused(row: tuple[Any, ...], data: st.DataObject) -> None:
    packed = Encoder("s" * len(row)).encode(row)
    cut = data.draw(st.integers(0, len(packed) - 1))
    for broken in (packed[:cut], packed + b"x"):
        with pytest.raises(RowError):
            Decoder(len(row)).decode(broken)


@pytest.mark.parametrize(
    "row", [(object(),), ("\ud800",), (1 << 20_000,), ([],)], ids=["object", "surrogate", "digits", "list"]
)
def test_what_no_row_can_have_is_refused(row: tuple[Any, ...]) -> None:
    with pytest.raises(RowError):
        Encoder("s").encode(row)


def test_a_stored_integer_with_too_many_digits_is_refused_before_it_is_read() -> None:
    data = b"\x01\x00I" + (100_000).to_bytes(4, "little") + b"9" * 100_000
    with pytest.raises(RowError, match="too many"):
        Decoder(1).decode(data)


def test_the_latest_payload_is_the_one_with_the_highest_number_wherever_it_stands() -> None:
    payloads = [row_payload(number, b"") for number in (7, 300, 299)] + [refused_payload(12, b"k", "why")]
    assert latest(payloads) == 1
    assert number_of(payloads[1]) == 300


def test_a_refused_row_keeps_its_number_its_whole_key_and_the_reason() -> None:
    payload = refused_payload(9, b"whole key", "too large")
    assert (number_of(payload), key_of(b"whole", payload), refusal_of(payload)) == (
        9,
        b"whole key",
        "too large",
    )
    assert refusal_of(row_payload(9, b"")) is None
