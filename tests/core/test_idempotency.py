"""The window of idempotency keys, against a model that keeps every use and every look at the clock in a list."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from walbatch.core.idempotency import OWN_PREFIX, STEPS, KeyWindow, requeue_key, requeued_lsn
from walbatch.types import KeyUse

HOUR = 3_600 * 10**9
NOON = 1_700_000_000 * 10**9


def window(age_ns: int = HOUR, count_max: int = 100) -> KeyWindow:
    return KeyWindow(age_ns, count_max)


def test_a_key_answers_for_the_operation_that_used_it_until_the_window_is_over() -> None:
    keys = window()
    keys.add("put", b"k", 7, NOON)
    late = HOUR + HOUR // STEPS
    assert keys.find(("put", b"k"), NOON) == 7
    assert keys.find(("put", b"k"), NOON + HOUR - 1) == 7
    assert keys.find(("put", b"k"), NOON + late) is None
    assert len(keys) == 0


def test_a_key_is_known_in_its_lane_only() -> None:
    keys = window()
    keys.add("put", b"k", 7, NOON)
    assert keys.find(("get", b"k"), NOON) is None
    keys.add("get", b"k", 8, NOON)
    assert [keys.find((lane, b"k"), NOON) for lane in ("put", "get")] == [7, 8]


def test_a_window_of_no_time_remembers_nothing() -> None:
    keys = window(0)
    keys.add("put", b"k", 1, NOON)
    assert keys.find(("put", b"k"), NOON) is None


def test_a_key_that_is_told_twice_is_one_use() -> None:
    keys = window()
    for _ in range(2):
        keys.add("put", b"k", 7, NOON)
    assert len(keys.unsaved()) == 1
    assert keys.prune(NOON + 2 * HOUR) == 1


def test_the_later_of_two_uses_counts_and_the_earlier_one_forgets_nothing() -> None:
    keys = window()
    keys.add("put", b"k", 7, NOON)
    keys.add("put", b"k", 900, NOON + HOUR // 2)
    keys.add("put", b"k", 8, NOON + HOUR // 2)
    assert keys.prune(NOON + HOUR + HOUR // 4) == 0
    assert keys.find(("put", b"k"), NOON + HOUR + HOUR // 4) == 900
    assert keys.prune(NOON + 2 * HOUR) == 1


def test_at_its_bound_the_oldest_is_forgotten_before_its_time() -> None:
    keys = window(count_max=3)
    for lsn in range(1, 6):
        keys.add("put", b"%d" % lsn, lsn, NOON)
    assert [keys.find(("put", b"%d" % lsn), NOON) for lsn in range(1, 6)] == [None, None, 3, 4, 5]
    assert (len(keys), keys.evicted) == (3, 2)


# --- a clock that was set ------------------------------------------------------------------------------------------

# Situation: how the clock reads in real minutes; a key is used at 0, and must be known, or not, at the end.
CLOCKS: dict[str, tuple[list[tuple[str, int]], bool]] = {
    "set back by an hour, half an hour goes by": ([("look", -60), ("look", -30)], True),
    "set back by an hour, a use, 59 minutes go by": ([("use", -60), ("look", -1)], True),
    "set back by an hour, a use, 61 minutes go by": ([("use", -60), ("look", 1)], False),
    "set back by an hour, a look, 61 minutes go by": ([("look", -60), ("look", 1)], False),
    "set back by ten years, 59 minutes go by": ([("look", -5_256_000), ("look", -5_255_941)], True),
    "set back by ten years, 61 minutes go by": ([("look", -5_256_000), ("look", -5_255_939)], False),
    "set back twice, each time after half an hour": ([("use", 30), ("use", -60), ("look", -31)], True),
    "set back twice, then an hour goes by": ([("use", 30), ("use", -60), ("look", 1)], False),
    "set forward by a day": ([("look", 1_440)], False),
}


@pytest.mark.parametrize(("readings", "known"), CLOCKS.values(), ids=CLOCKS.keys())
def test_a_clock_that_is_set_makes_a_key_forgotten_neither_early_nor_never(
    readings: list[tuple[str, int]], known: bool
) -> None:
    keys = window()
    minute = HOUR // 60
    keys.add("put", b"k", 1, NOON)
    now = NOON
    for lsn, (what, minutes) in enumerate(readings, 2):
        now = NOON + minutes * minute
        if what == "use":
            keys.add("put", b"other %d" % lsn, lsn, now)
        else:
            keys.prune(now)
    assert (keys.find(("put", b"k"), now) == 1) == known


def test_a_use_from_the_future_that_was_saved_is_forgotten_an_hour_after_the_restart() -> None:
    keys = window()
    keys.add("put", b"k", 1, NOON + 1_000 * HOUR, is_saved=True)
    assert keys.find(("put", b"k"), NOON) == 1
    assert keys.find(("put", b"k"), NOON + HOUR + HOUR // STEPS) is None


def test_times_take_bounded_memory_even_where_the_clock_trembles() -> None:
    keys = window(count_max=100_000)
    for lsn in range(1, 50_000):
        keys.add("put", b"%d" % lsn, lsn, NOON + lsn * HOUR // 50_000 + (-1) ** lsn * HOUR // 500)
    assert len(keys) == 49_999
    assert len(keys._runs) <= STEPS + 2


# --- saving --------------------------------------------------------------------------------------------------------


def use(lsn: int, key: bytes = b"") -> KeyUse:
    return KeyUse(key=key or b"%d" % lsn, lane="put", lsn=lsn, used_wall_ns=NOON + lsn)


def add(keys: KeyWindow, *uses: KeyUse, is_saved: bool = False) -> None:
    for one in uses:
        keys.add(one.lane, one.key, one.lsn, one.used_wall_ns, is_saved=is_saved)


def test_what_is_new_is_saved_once_and_only_as_far_as_it_is_durable() -> None:
    keys = window()
    add(keys, use(1), use(2), is_saved=True)
    add(keys, use(4), use(3), use(5))
    assert keys.unsaved(3) == [use(3)]
    assert keys.unsaved() == [use(4), use(3), use(5)]
    keys.saved(3)
    assert keys.unsaved(4) == [use(4)]
    keys.saved(5)
    assert keys.unsaved() == []
    assert repr(keys) == "<KeyWindow 5 of 100 keys, 0 unsaved>"


def test_what_is_forgotten_is_not_saved() -> None:
    keys = window(count_max=2)
    add(keys, use(1), use(2), use(3))
    assert keys.unsaved() == [use(2), use(3)]
    keys.saved(0)
    assert keys.unsaved() == [use(2), use(3)]


# --- against the model ---------------------------------------------------------------------------------------------


@dataclass
class Use:
    """A use in the model, with the lowest time that the clock has shown from it on."""

    key: tuple[str, bytes]
    lsn: int
    lowest: int
    sure: bool = True
    """It must be known: at no look was it older than the window."""
    possible: bool = True
    """It may be known: at no look was it older than the window and a step."""


class WindowMachine(RuleBasedStateMachine):
    """A clock that goes forth and back, by little and by much."""

    AGE = 10_000

    def __init__(self) -> None:
        super().__init__()
        self.keys = KeyWindow(self.AGE, 1_000)
        self.uses: list[Use] = []
        self.now = 10**6
        self.lsn = 0
        self.saved: set[int] = set()

    def look(self) -> None:
        for one in self.uses:
            one.lowest = min(one.lowest, self.now)
            one.sure &= self.now - one.lowest < self.AGE
            one.possible &= self.now - one.lowest < self.AGE + self.AGE // STEPS
        self.uses = [one for one in self.uses if one.possible]

    @rule(by=st.integers(-3_000, 4_000) | st.integers(-(10**5), 10**5))
    def clock_moves(self, by: int) -> None:
        self.now = max(0, self.now + by)

    @rule(lane=st.sampled_from(["put", "get"]), key=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def use(self, lane: str, key: bytes) -> None:
        """As the engine does it: a key that is known is not used again."""
        if self.keys.find((lane, key), self.now) is not None:
            return
        self.look()
        self.uses = [one for one in self.uses if one.key != (lane, key)]
        self.lsn += 1
        self.uses.append(Use((lane, key), self.lsn, self.now))
        self.keys.add(lane, key, self.lsn, self.now)

    @rule(back=st.integers(0, 3))
    def save(self, back: int) -> None:
        up_to = max(0, self.lsn - back)
        lsns = [one.lsn for one in self.keys.unsaved(up_to)]
        assert not self.saved & set(lsns), "nothing is saved twice"
        self.saved |= set(lsns)
        self.keys.saved(up_to)

    @invariant()
    def nothing_is_forgotten_early_or_kept_for_long(self) -> None:
        self.look()
        self.keys.prune(self.now)
        held = {one.lsn for one in self.uses if self.keys.find(one.key, self.now) == one.lsn}
        assert {one.lsn for one in self.uses if one.sure} <= held
        assert len(self.keys) == len(held)


TestWindow = WindowMachine.TestCase


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1_000)), max_size=60), st.integers(1, 8))
def test_it_never_holds_more_than_it_may(uses: list[tuple[int, int]], count_max: int) -> None:
    keys = KeyWindow(100, count_max)
    for lsn, (key, time) in enumerate(uses, 1):
        keys.add("put", b"%d" % key, lsn, time)
        assert len(keys) <= len(keys._order) <= count_max
        assert sum(count for _, count in keys._runs) == len(keys._order)
        assert [run[0] for run in keys._runs] == sorted(run[0] for run in keys._runs)


@given(st.integers(1, 2**63 - 1))
def test_the_key_of_a_dead_letter_that_is_submitted_again_tells_which_one_it_was(lsn: int) -> None:
    assert requeue_key(lsn).startswith(OWN_PREFIX)
    assert requeued_lsn(requeue_key(lsn)) == lsn


@pytest.mark.parametrize("key", [b"", b"7", b"order-7", b"\0requeue ", b"\0requeue x", b"\0something else 7"])
def test_no_other_key_is_taken_for_one_of_a_dead_letter(key: bytes) -> None:
    assert requeued_lsn(key) == 0
