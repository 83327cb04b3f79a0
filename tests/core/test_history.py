"""What is remembered of kinds, against what was observed; and its bytes, good and hostile."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walbatch.core.history import (
    BATCHES_MIN,
    FOLLOWED_MAX,
    FOLLOWERS_MAX,
    HISTORY_BYTES_MAX,
    HOUR_NS,
    HOURS,
    NS_PER_S,
    Expectation,
    History,
)  # fmt: skip
from walbatch.limits import KIND_BYTES_MAX, KINDS_MAX

DAY_NS = 24 * HOUR_NS
TODAY = 20_000 * DAY_NS
STEP = 2 ** (1 / 8)
"""The precision of what is kept as a byte."""


def flow(
    history: History, kind: str, start_ns: int, *, seconds: int = 600, every_s: int = 1, count: int = 50, bytes: int = 5_000,
    took_s: float = 0.02,
) -> None:  # fmt: skip
    """A steady flow of equal batches."""
    for second in range(0, seconds + 1, every_s):
        history.observe(kind, start_ns + second * NS_PER_S, count, bytes, took_s)


def close(expectation: Expectation | None, *, factor: float, **expected: float) -> bool:
    return expectation is not None and all(
        1 / factor <= getattr(expectation, name) / value <= factor for name, value in expected.items()
    )


def test_what_was_steady_is_expected_again() -> None:
    history = History()
    flow(history, "put", TODAY)
    expected = history.expect("put", TODAY + 30 * 60 * NS_PER_S)
    assert close(expected, factor=1.01, rate=50, count=50, bytes=100, seconds=0.02)


def test_each_hour_has_its_own_expectation_and_an_unknown_hour_the_days() -> None:
    history = History()
    flow(history, "put", TODAY + 9 * HOUR_NS, count=1_000)
    flow(history, "put", TODAY + 22 * HOUR_NS, count=10)
    assert close(history.expect("put", TODAY + DAY_NS + 9 * HOUR_NS), factor=1.01, count=1_000)
    assert close(history.expect("put", TODAY + DAY_NS + 22 * HOUR_NS), factor=1.01, count=10)
    assert close(history.expect("put", TODAY + DAY_NS + 15 * HOUR_NS), factor=1.01, count=505)


def test_yesterday_counts_for_half_of_today() -> None:
    history = History()
    flow(history, "put", TODAY, count=10)
    flow(history, "put", TODAY + DAY_NS, count=100)
    assert close(history.expect("put", TODAY), factor=1.01, count=(10 + 2 * 100) / 3)


def test_idle_hours_count_as_watched() -> None:
    history = History()
    flow(history, "put", TODAY, seconds=600)
    history.observe("get", TODAY + HOUR_NS - NS_PER_S, 1, 1, 0.001)
    assert close(history.expect("put", TODAY), factor=1.01, rate=50 / 6)


def test_several_hours_without_an_operation_are_watched_too() -> None:
    history = History()
    history.watch(TODAY + HOUR_NS // 2)
    history.watch(TODAY + 3 * HOUR_NS + HOUR_NS // 4)
    assert history._watched_s[:5] == [1_800, 3_600, 3_600, 900, 0]


@pytest.mark.parametrize("days", [1, 2, 400, 400_000])
def test_a_clock_set_forward_watches_a_day_at_most(days: int) -> None:
    history = History()
    history.watch(TODAY)
    history.watch(TODAY + days * DAY_NS + HOUR_NS // 2)
    assert 22.5 * 3_600 <= sum(history._watched_s) <= 24.5 * 3_600


def test_a_clock_set_back_watches_nothing() -> None:
    history = History()
    history.watch(TODAY + DAY_NS)
    history.watch(TODAY)
    assert sum(history._watched_s) == 0
    history.watch(TODAY + 60 * NS_PER_S)
    assert sum(history._watched_s) == 60


@given(st.lists(st.integers(0, 3 * DAY_NS), min_size=1, max_size=60))
def test_nothing_is_watched_twice(times_ns: list[int]) -> None:
    history = History()
    forward_ns, last_ns = 0, times_ns[0]
    for time_ns in times_ns:
        history.watch(TODAY + time_ns)
        forward_ns += max(0, time_ns - last_ns)
        last_ns = time_ns
    assert 0 <= sum(history._watched_s) <= forward_ns / NS_PER_S + 1e-3
    assert all(0 <= seconds <= 2 * 3_600 * len(times_ns) for seconds in history._watched_s)


def test_what_is_not_known_is_none() -> None:
    history = History()
    assert history.expect("put", TODAY) is None
    assert history.followers("put") == ()
    history.observe("put", TODAY, 10, 1_000, 0.5)
    expected = history.expect("put", TODAY)
    assert expected == Expectation(rate=0.0, count=10, bytes=100, seconds=0.5)
    assert repr(history) == "<History of 1 kinds, 0 s watched>"
    assert history.kinds == ("put",)


def test_batches_of_nothing_are_no_expectation() -> None:
    history = History()
    history.observe("put", TODAY, 0, 0, 0.0)
    assert history.expect("put", TODAY) is None


def test_followers_are_ranked_by_how_often_they_follow() -> None:
    history = History()
    for kind in ["put", "index", "put", "index", "put", "notify", "put", "put"]:
        history.observe(kind, TODAY, 1, 1, 0.1)
    assert history.followers("put") == (("index", 0.5), ("notify", 0.25), ("put", 0.25))
    assert history.followers("index") == (("put", 1.0),)


def test_successions_of_long_ago_fade() -> None:
    history = History()
    for _ in range(FOLLOWED_MAX):
        history.observe("a", TODAY, 1, 1, 0.1)
    for _ in range(3 * FOLLOWED_MAX):
        history.observe("b", TODAY, 1, 1, 0.1)
        history.observe("a", TODAY, 1, 1, 0.1)
    followers = dict(history.followers("a"))
    assert followers["b"] > 0.9
    assert sum(history._kinds["a"].followers.values()) <= FOLLOWED_MAX


def test_a_kind_too_many_takes_the_place_of_the_one_seen_least() -> None:
    history = History()
    for number in range(KINDS_MAX):
        for _ in range(3 if number != 7 else 2):
            history.observe(f"kind-{number}", TODAY, 1, 1, 0.1)
    assert dict(history.followers("kind-6"))["kind-7"] == pytest.approx(1 / 3)
    history.observe("new", TODAY, 1, 1, 0.1)
    assert len(history.kinds) == KINDS_MAX
    assert "kind-7" not in history.kinds
    assert "new" in history.kinds
    assert "kind-7" not in dict(history.followers("kind-6"))


def test_the_kind_before_may_be_the_one_that_went() -> None:
    history = History()
    for number in range(KINDS_MAX):
        for _ in range(2):
            history.observe(f"kind-{number}", TODAY, 1, 1, 0.1)
    history.observe("one", TODAY, 1, 1, 0.1)
    history.observe("two", TODAY, 1, 1, 0.1)
    history.observe("three", TODAY, 1, 1, 0.1)
    assert "one" not in history.kinds
    assert "two" not in history.kinds
    assert history.followers("three") == ()


# --- as bytes -----------------------------------------------------------------------------------------------------

KIND_NAMES = st.text(min_size=1, max_size=KIND_BYTES_MAX).filter(
    lambda name: len(name.encode("utf-8", "replace")) <= KIND_BYTES_MAX and name.isprintable()
)
OBSERVATIONS = st.tuples(
    st.integers(0, 4), st.integers(0, 2 * DAY_NS), st.integers(1, 65_536), st.integers(0, 2**28), st.floats(0, 1_000)
)  # fmt: skip


@given(
    st.lists(KIND_NAMES, min_size=5, max_size=5, unique=True), st.lists(OBSERVATIONS, min_size=1, max_size=60)
)
def test_what_was_written_is_read_within_the_precision_of_a_byte(
    names: list[str], observations: list[tuple[int, int, int, int, float]]
) -> None:
    history = History()
    for number, time_ns, count, size, seconds in observations:
        history.observe(names[number], TODAY + time_ns, count, size, seconds)
    again = History.decode(history.encode())
    assert again.kinds == history.kinds
    for name in history.kinds:
        for hour in range(HOURS):
            now, then = (one.expect(name, TODAY + hour * HOUR_NS) for one in (history, again))
            if then is None or now is None or _is_rare(history, name):
                continue
            factor = STEP**2
            assert close(then, factor=factor, count=now.count)
            if now.rate:
                assert close(then, factor=factor**2, rate=now.rate)
        ranked = dict(history.followers(name)[:FOLLOWERS_MAX])
        assert dict(again.followers(name)).keys() == ranked.keys()


def _is_rare(history: History, name: str) -> bool:
    """Cells that have faded below one batch are left out of the bytes, and whole-day figures with them."""
    return any(0 < cell.batches < 1 for cell in history._kinds[name].hours)


def test_a_warm_history_warms_again_after_a_restart() -> None:
    history = History()
    flow(history, "get", TODAY - HOUR_NS, count=5, bytes=0, took_s=0.0)
    flow(history, "put", TODAY)
    again = History.decode(history.encode())
    assert close(again.expect("put", TODAY), factor=STEP, rate=50, count=50, bytes=100, seconds=0.02)
    get = again.expect("get", TODAY)
    assert get is not None
    assert (get.bytes, get.seconds) == (0, 0)
    flow(again, "put", TODAY + DAY_NS)
    assert close(again.expect("put", TODAY), factor=STEP, rate=50)


def test_faded_hours_are_left_out() -> None:
    history = History()
    history.observe("put", TODAY, 10, 100, 1.0)
    history.watch(TODAY + 5 * DAY_NS)
    again = History.decode(history.encode())
    assert again.kinds == ("put",)
    assert again.expect("put", TODAY) is None


def test_the_fullest_history_fits() -> None:
    history = History()
    for day in range(3):
        for hour in range(HOURS):
            for number in range(KINDS_MAX):
                kind = f"{number:>{KIND_BYTES_MAX}}"
                for _ in range(BATCHES_MIN):
                    time_ns = TODAY + day * DAY_NS + hour * HOUR_NS
                    history.observe(kind, time_ns, 65_536, 2**28, 1e4)
    for number in range(KINDS_MAX):
        for other in range(KINDS_MAX):
            history.observe(f"{number:>{KIND_BYTES_MAX}}", TODAY + 4 * DAY_NS, 1, 1, 0.1)
            history.observe(f"{other:>{KIND_BYTES_MAX}}", TODAY + 4 * DAY_NS, 1, 1, 0.1)
    encoded = history.encode()
    assert len(encoded) <= HISTORY_BYTES_MAX
    assert len(History.decode(encoded).kinds) == KINDS_MAX


def _known() -> bytes:
    history = History()
    flow(history, "put", TODAY)
    flow(history, "get", TODAY + HOUR_NS)
    return history.encode()


KNOWN = _known()
NAMES_AT = 6 + 4 * HOURS
CELLS_AT = NAMES_AT + 1 + 3
FOLLOWERS_AT = CELLS_AT + 4 * HOURS


def _with(offset: int, raw: bytes) -> bytes:
    return KNOWN[:offset] + raw + KNOWN[offset + len(raw) :]


HOSTILE = {
    "nothing": b"",
    "another magic": _with(0, b"WBca"),
    "another version": _with(4, b"\x02"),
    "too many kinds": _with(5, bytes([KINDS_MAX + 1])),
    "more kinds than there are": _with(5, b"\x03"),
    "fewer kinds than there are": _with(5, b"\x01"),
    "watched for minus a second": _with(6, b"\x00\x00\x80\xbf"),
    "watched for no number": _with(6, b"\x00\x00\xc0\x7f"),
    "watched for ever": _with(6, b"\x00\x00\x80\x7f"),
    "an empty name": _with(NAMES_AT, b"\x00"),
    "a long name": _with(NAMES_AT, bytes([KIND_BYTES_MAX + 1])),
    "a name that is no text": _with(NAMES_AT + 1, b"\xff\xff\xff"),
    "a name twice": KNOWN.replace(b"put", b"get"),
    "an hour without batches": _with(CELLS_AT, b"\x00"),
    "batches without operations": _with(CELLS_AT, b"\x08\x00\x00\x00"),
    "too many followers": _with(FOLLOWERS_AT, bytes([FOLLOWERS_MAX + 1])),
    "a follower that is not there": _with(FOLLOWERS_AT + 1, b"\x02"),
    "a follower that never follows": _with(FOLLOWERS_AT + 2, b"\x00"),
    "a follower twice": _with(FOLLOWERS_AT + 1, KNOWN[FOLLOWERS_AT + 3 : FOLLOWERS_AT + 4]),
    "bytes behind the end": KNOWN + b"\x00",
    "too many bytes": KNOWN + bytes(HISTORY_BYTES_MAX),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_damaged_bytes_are_a_value_error(data: bytes) -> None:
    assert data != KNOWN
    with pytest.raises(ValueError):
        History.decode(data)


@pytest.mark.parametrize("size", range(0, len(KNOWN), 7))
def test_bytes_that_were_cut_short_are_a_value_error(size: int) -> None:
    with pytest.raises(ValueError):
        History.decode(KNOWN[:size])


@given(st.integers(0, len(KNOWN) - 1), st.binary(min_size=1, max_size=4))
def test_any_bytes_are_a_history_that_works_or_a_value_error(offset: int, raw: bytes) -> None:
    try:
        history = History.decode(_with(offset, raw))
    except ValueError:
        return
    history.observe("put", TODAY, 1, 1, 0.1)
    for kind in history.kinds:
        history.expect(kind, TODAY)
        assert sum(share for _, share in history.followers(kind)) == pytest.approx(
            1 if history.followers(kind) else 0
        )
    History.decode(history.encode())


@given(st.binary(max_size=200))
def test_random_bytes_are_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):
        History.decode(data)
