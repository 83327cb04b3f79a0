"""A commit group: columns that stay parallel, whatever interrupts the one who fills them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walbatch import limits
from walbatch.core.columns import Columns, encode_body, options_bytes
from walbatch.core.commit_group import CommitGroup, fits_frame
from walbatch.types import NO_OPTIONS, PRIORITY_URGENT, Options


class Signal(BaseException):
    """What a signal handler raises."""


def add(
    group: CommitGroup, *pairs: tuple[bytes, bytes], lane: int = 0, priority: int = 5, sync: bool = True
) -> int:
    keys, payloads = [key for key, _ in pairs], [payload for _, payload in pairs]
    size = sum(map(len, keys)) + sum(map(len, payloads))
    return group.add(lane, [0] * len(keys), keys, payloads, priority, size, needs_sync=sync)


def check_parallel(group: CommitGroup) -> None:
    columns = (group.lanes, group.shards, group.keys, group.payloads, group.priorities)
    assert {len(column) for column in columns} == {len(group)}


def test_operations_get_consecutive_lsns() -> None:
    group = CommitGroup(10)
    assert (len(group), group.last_lsn) == (0, 9)
    assert add(group, (b"a", b"1"), (b"b", b"2")) == 10
    assert add(group, (b"c", b"3")) == 12
    assert (len(group), group.last_lsn, group.bytes) == (3, 12, 6)
    assert repr(group) == "<CommitGroup lsn 10..12, 6 bytes>"
    check_parallel(group)


def test_one_operation_that_must_be_synced_makes_the_group_sync() -> None:
    group = CommitGroup(1)
    add(group, (b"a", b""), sync=False)
    assert not group.needs_sync
    add(group, (b"a", b""), sync=True)
    add(group, (b"a", b""), sync=False)
    assert group.needs_sync


def test_an_empty_group_accepts_whatever_fits_in_a_frame() -> None:
    group = CommitGroup(1)
    assert group.accepts(1, limits.GROUP_BYTES_MAX + 1)
    assert group.accepts(limits.FRAME_COUNT_MAX, 0)
    assert not group.accepts(limits.FRAME_COUNT_MAX + 1, 0)
    assert not group.accepts(1, limits.FRAME_RAW_BYTES_MAX)


def test_a_group_takes_more_company_up_to_its_limits() -> None:
    group = CommitGroup(1)
    add(group, (b"a", b""))
    assert group.accepts(1, limits.GROUP_BYTES_MAX - 1)
    assert not group.accepts(1, limits.GROUP_BYTES_MAX)
    assert group.accepts(limits.FRAME_COUNT_MAX - 1, 0)
    assert not group.accepts(limits.FRAME_COUNT_MAX, 0)


def test_the_largest_operation_fits_in_a_frame() -> None:
    assert fits_frame(1, limits.KEY_BYTES_MAX + limits.PAYLOAD_BYTES_MAX)
    assert fits_frame(limits.FRAME_COUNT_MAX, limits.GROUP_BYTES_MAX)


def test_what_a_group_accepts_can_be_encoded_at_its_limit() -> None:
    group = CommitGroup(1)
    payload = bytes(limits.GROUP_BYTES_MAX - 1)
    add(group, (b"k", payload))
    kinds, kind_indexes = group.kind_columns(["put"])
    body = encode_body(
        Columns(
            kinds=tuple(kinds),
            kind_indexes=kind_indexes,
            priorities=group.priorities,
            keys=group.keys,
            payloads=group.payloads,
        )
    )
    assert limits.GROUP_BYTES_MAX < body.raw_bytes <= limits.FRAME_RAW_BYTES_MAX


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(4, 5), st.integers(1, 3), st.booleans()),
        min_size=1, max_size=8,
    )
)  # fmt: skip
def test_what_all_operations_have_in_common_is_said_once_and_the_columns_are_the_same(
    rows: list[tuple[int, int, int, int, bool]],
) -> None:
    group = CommitGroup(1)
    lanes, shards, priorities = list[int](), list[int](), list[int]()
    keys: list[bytes] = []
    for lane, shard, priority, count, as_column in rows:
        added = [b"%d" % (len(keys) + number) for number in range(count)]
        group.add(
            lane, [shard] * count if as_column else shard, added, added, priority, 2 * sum(map(len, added)), needs_sync=True
        )  # fmt: skip
        lanes += [lane] * count
        shards += [shard] * count
        priorities += [priority] * count
        keys += added
    assert (group.lanes, group.shards, group.priorities) == (lanes, shards, priorities)
    assert (group.keys, group.payloads) == (keys, keys)
    for sole, column in (
        (group.sole_lane, lanes), (group.sole_priority, priorities), (group.sole_shard, shards),
    ):  # fmt: skip
        assert sole is None or set(column) == {sole}
    assert (group.sole_lane is None) == (len(set(lanes)) > 1)
    assert (group.sole_priority is None) == (len(set(priorities)) > 1)
    if not any(as_column for *_, as_column in rows):
        assert (group.sole_shard is None) == (len(set(shards)) > 1)
    check_parallel(group)


def test_an_interrupted_first_add_leaves_nothing_that_the_next_one_would_take_for_its_own() -> None:
    group = CommitGroup(1)
    with pytest.raises(Signal):
        INTERRUPTIONS["payloads"](group)
    assert add(group, (b"a", b"1"), lane=3, priority=6) == 1
    assert (group.sole_lane, group.sole_priority) == (3, 6)
    assert (group.lanes, group.shards, group.payloads, group.priorities) == ([3], [0], [b"1"], [6])


@pytest.mark.parametrize("count", [0, 2])
def test_what_an_interrupted_add_left_does_not_count_in_the_bytes(count: int) -> None:
    group = CommitGroup(1)
    for _ in range(count):
        add(group, (b"a", b"1"))
    group.payloads.append(b"left")  # the signal came before the keys
    group.bytes += 100
    group.trim_columns()
    assert (group.bytes, len(group.payloads)) == (2 * count, count)


def test_as_many_payloads_as_keys_or_nothing() -> None:
    group = CommitGroup(1)
    with pytest.raises(ValueError, match="2 keys and 1 payloads"):
        group.add(0, 0, [b"a", b"b"], [b"1"], 5, 3, needs_sync=True)
    assert (len(group), group.payloads, group.bytes) == (0, [], 0)


# --- options ---------------------------------------------------------------------------------------------------------

LATE = Options(not_before_ns=7, idempotency_key=b"once")


def add_with(group: CommitGroup, *options: Options) -> int:
    keys = [b"k"] * len(options)
    return group.add(0, [0] * len(keys), keys, keys, 5, 2 * len(keys), needs_sync=True, options=options)


def test_options_are_a_column_from_the_first_operation_that_has_any() -> None:
    group = CommitGroup(1)
    add(group, (b"a", b"1"), (b"b", b"2"))
    assert group.options == []
    size = group.bytes
    add_with(group, LATE, NO_OPTIONS)
    assert group.bytes == size + 4 + options_bytes([LATE, NO_OPTIONS])
    add(group, (b"c", b"3"))
    assert group.options == [NO_OPTIONS, NO_OPTIONS, LATE, NO_OPTIONS, NO_OPTIONS]
    check_parallel(group)


def test_options_count_for_what_a_group_takes() -> None:
    group = CommitGroup(1)
    assert group.accepts(1, limits.FRAME_RAW_BYTES_MAX - 6_000)
    assert not group.accepts(1, limits.FRAME_RAW_BYTES_MAX - 6_000, [Options(idempotency_key=bytes(2_000))])
    assert fits_frame(2, 10, [LATE, LATE])
    add(group, (b"k", b"p"))
    room = limits.GROUP_BYTES_MAX - group.bytes - options_bytes([LATE])
    assert group.accepts(1, room, [LATE])
    assert not group.accepts(1, room + 1, [LATE])


def test_options_that_an_interrupted_add_left_are_cut_too() -> None:
    group = CommitGroup(1)
    add_with(group, LATE)
    with pytest.raises(Signal):
        group.add(7, [7], Interrupted(b"x"), [b"x"], 7, 2, needs_sync=False, options=[LATE])
    group.keys = [b"k"]  # the signal came before the keys
    group.trim_columns()
    assert group.options == [LATE]
    add(group, (b"b", b"2"))
    assert group.options == [LATE, NO_OPTIONS]
    check_parallel(group)


def test_one_urgent_operation_makes_the_group_urgent() -> None:
    group = CommitGroup(1)
    add(group, (b"a", b""), priority=PRIORITY_URGENT - 1)
    assert not group.is_urgent
    add(group, (b"a", b""), priority=PRIORITY_URGENT)
    add(group, (b"a", b""), priority=0)
    assert group.is_urgent


@given(lanes=st.lists(st.integers(0, 3), min_size=1))
def test_kinds_name_the_lanes_that_occur(lanes: list[int]) -> None:
    names = ["a", "b", "c", "d"]
    group = CommitGroup(1)
    for lane in lanes:
        add(group, (b"k", b"p"), lane=lane)
    kinds, indexes = group.kind_columns(names)
    assert [kinds[index] for index in indexes] == [names[lane] for lane in lanes]
    assert len(set(kinds)) == len(kinds) == len(set(lanes))


class Interrupted(Sequence[Any]):
    """A column of one value, in the copying of which a signal arrives."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: Any) -> Any:
        return self.value

    def __iter__(self) -> Iterator[Any]:
        yield self.value
        raise Signal


INTERRUPTIONS: dict[str, Callable[[CommitGroup], int]] = {
    "shards": lambda group: group.add(7, Interrupted(7), [b"x"], [b"x"], 7, 2, needs_sync=False),
    "payloads": lambda group: group.add(7, [7], [b"x"], Interrupted(b"x"), 7, 2, needs_sync=False),
}


@pytest.mark.parametrize("interrupted", INTERRUPTIONS.values(), ids=INTERRUPTIONS.keys())
def test_an_interrupted_add_leaves_no_trace_in_the_next(interrupted: Callable[[CommitGroup], int]) -> None:
    group = CommitGroup(1)
    add(group, (b"a", b"1"))
    with pytest.raises(Signal):
        interrupted(group)
    assert (len(group), group.last_lsn) == (1, 1)
    assert add(group, (b"b", b"2"), lane=1, priority=9) == 2
    check_parallel(group)
    assert (group.lanes, group.shards, group.keys) == ([0, 1], [0, 0], [b"a", b"b"])
    assert (group.payloads, group.priorities) == ([b"1", b"2"], [5, 9])
    assert group.bytes >= 4


def test_an_interrupted_add_can_be_trimmed_without_another() -> None:
    group = CommitGroup(1)
    add(group, (b"a", b"1"))
    with pytest.raises(Signal):
        INTERRUPTIONS["payloads"](group)
    group.trim_columns()
    check_parallel(group)


def test_trimming_a_whole_group_changes_nothing() -> None:
    group = CommitGroup(1)
    add(group, (b"a", b"1"), (b"b", b"2"))
    group.trim_columns()
    assert group.keys == [b"a", b"b"]
    check_parallel(group)
