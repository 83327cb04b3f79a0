"""The breaker of a shard: when it opens, for how long, and what closes it again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walbatch.core.breaker import DEATHS_SHARE_MAX, RECENT_COUNT, SETTLED_COUNT, Breaker, BreakerState

S = 1_000_000_000


def breaker_of(failures_max: int = 5) -> Breaker:
    return Breaker(failures_max=failures_max, open_ns=S, open_ns_max=60 * S)


def record(breaker: Breaker, answers: str, *, now_ns: int = 0, chance: float = 0.0) -> None:
    """A batch for each letter: "+" it was applied, "-" it failed."""
    for answer in answers:
        breaker.record(now_ns, ok=answer == "+", chance=chance)


def opened(now_ns: int = 0) -> Breaker:
    breaker = breaker_of()
    record(breaker, "-----", now_ns=now_ns)
    return breaker


HISTORIES = {
    "nothing": ("", BreakerState.CLOSED),
    "four in a row": ("----", BreakerState.CLOSED),
    "five in a row": ("-----", BreakerState.OPEN),
    "four in a row, twice": ("----+----+", BreakerState.CLOSED),
    "five in a row after successes": ("+" * 50 + "-----", BreakerState.OPEN),
    "nine of the last twenty": ("--+" * 4 + "-" + "+" * 8, BreakerState.CLOSED),
    "ten of the last twenty": ("--+" * 5, BreakerState.OPEN),
    "ten failures, spread wider than twenty": ("-++" * 10, BreakerState.CLOSED),
}


@pytest.mark.parametrize(("answers", "state"), HISTORIES.values(), ids=HISTORIES.keys())
def test_it_opens_after(answers: str, state: BreakerState) -> None:
    breaker = breaker_of()
    record(breaker, answers)
    assert breaker.state is state
    assert breaker.allows(0) == ("normal" if state is BreakerState.CLOSED else None)


def test_it_lets_nothing_through_until_its_time_has_passed() -> None:
    breaker = opened(now_ns=7)
    assert breaker.reopens_at_ns == 7 + S
    assert breaker.allows(6 + S) is None
    assert repr(breaker) == "<Breaker open, 5 failures in a row>"
    assert breaker.allows(7 + S) == "probe"
    assert repr(breaker) == "<Breaker half open, 5 failures in a row>"
    assert not breaker.reopens_at_ns


def test_one_probe_goes_at_a_time() -> None:
    breaker = opened()
    assert [breaker.allows(S), breaker.allows(S)] == ["probe", "probe"], "asking takes nothing"
    breaker.probe_cut()
    assert breaker.allows(S) is None
    breaker.record(S, ok=True, chance=0)
    assert breaker.allows(S) == "probe"


def test_a_batch_that_does_not_tell_changes_nothing_but_lets_another_probe_go() -> None:
    breaker = breaker_of()
    record(breaker, "--")
    breaker.record(0, ok=None, chance=0)
    record(breaker, "--")
    assert breaker.allows(0) == "normal"
    record(breaker, "-")
    assert breaker.allows(S) == "probe"
    breaker.probe_cut()
    breaker.record(S, ok=None, chance=0)
    assert breaker.allows(S) == "probe"


def test_two_probes_that_were_applied_close_it_and_its_past_is_forgotten() -> None:
    breaker = opened()
    breaker.allows(S)
    record(breaker, "++", now_ns=S)
    assert (breaker.state, breaker.allows(S)) == (BreakerState.CLOSED, "normal")
    record(breaker, "----")
    assert breaker.state is BreakerState.CLOSED
    record(breaker, "-")
    assert breaker.reopens_at_ns == S, "the first opening after a good time is short again"


def test_a_probe_that_fails_opens_it_for_twice_as_long_up_to_its_longest_time() -> None:
    breaker = opened()
    times, now_ns = [], 0
    for _ in range(8):
        assert breaker.reopens_at_ns is not None
        times.append((breaker.reopens_at_ns - now_ns) // S)
        now_ns = breaker.reopens_at_ns
        assert breaker.allows(now_ns) == "probe"
        breaker.record(now_ns, ok=False, chance=0)
    assert times == [1, 2, 4, 8, 16, 32, 60, 60]


def test_a_success_between_two_failed_probes_does_not_close_it() -> None:
    breaker = opened()
    breaker.allows(S)
    record(breaker, "+-", now_ns=S)
    assert breaker.allows(2 * S) is None
    assert breaker.allows(10 * S) == "probe"
    record(breaker, "+", now_ns=10 * S)
    assert breaker.allows(10 * S) == "probe"


def test_what_was_cut_before_it_opened_changes_nothing() -> None:
    breaker = opened()
    record(breaker, "+-+")
    assert (breaker.state, breaker.reopens_at_ns) == (BreakerState.OPEN, S)


@given(chance=st.floats(0, 1, exclude_max=True))
def test_jitter_takes_up_to_half_of_its_time(chance: float) -> None:
    breaker = breaker_of(failures_max=1)
    record(breaker, "-", chance=chance)
    assert breaker.reopens_at_ns is not None
    assert S // 2 <= breaker.reopens_at_ns <= S


@given(answers=st.text("+-", max_size=60))
def test_it_is_open_if_and_only_if_failures_say_so(answers: str) -> None:
    breaker = breaker_of()
    expected = any(
        answers[:end].endswith("-----")
        or answers[max(0, end - RECENT_COUNT) : end].count("-") >= RECENT_COUNT // 2
        for end in range(1, len(answers) + 1)
    )
    record(breaker, answers)
    assert (breaker.state is BreakerState.OPEN) == expected


# --- deaths -------------------------------------------------------------------------------------------------

DEATHS = {
    "the first one of a quiet shard": (0, 0, 1, False),
    "nineteen that are all there is": (0, 18, 1, False),
    "twenty that are all there is": (0, 19, 1, True),
    "a fifth of a hundred": (80, 19, 1, False),
    "more than a fifth of a hundred": (80, 20, 1, True),
    "many at once among many": (1_000, 0, 21, True),
    "a few among many": (1_000, 0, 20, False),
    "deaths that are long past": (1_000, 0, 1, False),
    "more than a window holds": (100, 0, 1_000, True),
}


@pytest.mark.parametrize(("applied", "dead", "dying", "too_many"), DEATHS.values(), ids=DEATHS.keys())
def test_too_many_deaths(applied: int, dead: int, dying: int, *, too_many: bool) -> None:
    breaker = breaker_of()
    breaker.settled(applied=0, dead=dead)
    breaker.settled(applied=applied, dead=0)
    if applied == 80:
        breaker = breaker_of()
        breaker.settled(applied=applied, dead=dead)
    assert breaker.too_many_deaths(dying) == too_many


def test_what_is_applied_with_them_counts_for_those_who_die() -> None:
    breaker = breaker_of()
    assert breaker.too_many_deaths(20)
    assert not breaker.too_many_deaths(20, applied=80)
    assert breaker.too_many_deaths(20, applied=79)


def test_what_is_only_guessed_to_be_poison_dies_by_fours_at_most() -> None:
    breaker = breaker_of()
    for _ in range(4):
        assert not breaker.too_many_deaths(1, guessed=True)
        breaker.settled(applied=0, dead=1)
    assert breaker.too_many_deaths(1, guessed=True)
    assert not breaker.too_many_deaths(1)
    breaker.settled(applied=21, dead=0)
    assert not breaker.too_many_deaths(1, guessed=True)


def test_asking_buries_nobody() -> None:
    breaker = breaker_of()
    for _ in range(100):
        assert not breaker.too_many_deaths(10)


@given(batches=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), max_size=40))
def test_a_shard_that_asks_first_never_buries_more_than_a_fifth(batches: list[tuple[int, int]]) -> None:
    breaker = breaker_of()
    settled: list[bool] = []
    for applied, dying in batches:
        dead = 0 if breaker.too_many_deaths(dying, applied=applied) else dying
        breaker.settled(applied=applied, dead=dead)
        settled += [False] * applied + [True] * dead
        window = settled[-SETTLED_COUNT:]
        if dead and len(window) >= 20:
            assert window.count(True) <= DEATHS_SHARE_MAX * len(window)


@pytest.mark.parametrize(("share", "dying"), [(0.01, 1), (0.2, 20), (0.5, 50), (0.99, 99)])
def test_the_share_that_may_die_can_be_set(share: float, dying: int) -> None:
    breaker = Breaker(failures_max=5, open_ns=S, open_ns_max=S, deaths_share_max=share)
    assert not breaker.too_many_deaths(dying, applied=100 - dying)
    assert breaker.too_many_deaths(dying + 1, applied=99 - dying)


def test_where_all_may_die_there_are_never_too_many() -> None:
    breaker = Breaker(failures_max=5, open_ns=S, open_ns_max=S, deaths_share_max=1)
    breaker.settled(applied=0, dead=1_000)
    assert not breaker.too_many_deaths(1_000)
    assert not breaker.too_many_deaths(1_000, guessed=True)


def test_other_limits_change_nothing_of_what_it_has_seen() -> None:
    breaker = breaker_of(failures_max=5)
    record(breaker, "----")
    breaker.adjust(failures_max=5, open_ns=7 * S, open_ns_max=7 * S, deaths_share_max=0.5)
    assert breaker.state is BreakerState.CLOSED
    record(breaker, "-")
    assert (breaker.state, breaker.reopens_at_ns) == (BreakerState.OPEN, 7 * S)
    breaker.adjust(failures_max=100, open_ns=1, open_ns_max=1, deaths_share_max=1)
    assert (breaker.state, breaker.reopens_at_ns) == (BreakerState.OPEN, 7 * S)


def test_it_can_be_opened_by_hand() -> None:
    breaker = breaker_of()
    breaker.open(5, chance=0)
    assert (breaker.state, breaker.reopens_at_ns) == (BreakerState.OPEN, 5 + S)


def test_it_knows_since_when_it_has_been_open_also_while_it_is_tried() -> None:
    breaker = opened(now_ns=7)
    assert breaker.opened_at_ns == 7
    assert breaker.allows(7 + S) == "probe"
    record(breaker, "-", now_ns=8 + S)
    assert breaker.opened_at_ns == 7, "it opened again, and was never closed"
    assert breaker.allows(8 + 3 * S) == "probe"
    record(breaker, "++", now_ns=9 + 3 * S)
    assert breaker.opened_at_ns is None
    record(breaker, "-----", now_ns=99 * S)
    assert breaker.opened_at_ns == 99 * S


def test_it_counts_what_failed_in_a_row_whoever_is_to_blame() -> None:
    breaker = breaker_of()
    for ok, count in ((False, 1), (None, 2), (None, 3), (True, 0), (None, 1), (False, 2)):
        breaker.record(0, ok=ok, chance=0.0)
        assert breaker.fruitless == count
