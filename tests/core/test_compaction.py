"""Which segments are compacted: what is freed, what it costs, and what is left at the end; and what of them is settled."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.segments import columns_of
from walbatch.core.columns import Columns
from walbatch.core.compaction import (
    EXAMINED_MAX,
    OVERHEAD_BYTES,
    ROW_BYTES,
    RUN_COUNT_MAX,
    Held,
    Run,
    SegmentUse,
    Unsettled,
    by_kind,
    by_shard,
    choose_run,
    is_superfluous,
    measured_bytes,
    scaled,
    summed,
    uncovered,
    unsettled_bytes,
    unsettled_rows,
)
from walbatch.core.routing import shard_of
from walbatch.limits import COMPACTED_FACTOR
from walbatch.types import Checkpoint, LaneMark, Mark, merge_ranges

SEGMENT_BYTES = 2**20


def covering(watermark: int = 0, **lanes: Mark | Sequence[Mark]) -> Checkpoint:
    return Checkpoint(
        generation=1, epoch=1, watermark=watermark, durable_lsn=2**40, segment=1, settled_count=0,
        lanes={
            name: LaneMark(shards=(marks,) if isinstance(marks, Mark) else tuple(marks)) for name, marks in lanes.items()
        },
    )  # fmt: skip


def use(
    file_bytes: int = SEGMENT_BYTES, *, lsns: tuple[int, int] = (1, 100), unsettled: Unsettled | None = None,
    size: int | None = None, since: Checkpoint | None = None, damaged: bool = False,
) -> SegmentUse:  # fmt: skip
    return SegmentUse(
        file_bytes=file_bytes, first_lsn=lsns[0], last_lsn=lsns[1], unsettled=unsettled,
        content_bytes=file_bytes if size is None else size, since=since, damaged=damaged,
    )  # fmt: skip


ALL = covering(put=Mark(watermark=1000))
NOTHING = covering(put=Mark())
PUT: Unsettled = {("put", 0): Held(100, SEGMENT_BYTES)}


# --- what a mark leaves uncovered ------------------------------------------------------------------------------------


lsns = st.integers(1, 40)
marks = st.builds(
    lambda watermark, ranges: Mark(watermark=watermark, ranges=merge_ranges(ranges, watermark)),
    st.integers(0, 40),
    st.lists(st.tuples(lsns, st.integers(0, 5)).map(lambda pair: (pair[0], pair[0] + pair[1])), max_size=6),
)


@given(mark=marks, first=lsns, last=lsns)
def test_what_is_not_covered_is_counted_exactly(mark: Mark, first: int, last: int) -> None:
    assert uncovered(mark, first, last) == sum(not mark.covers(lsn) for lsn in range(first, last + 1))


def counted(unsettled: Unsettled) -> Unsettled:
    """As if each operation had one byte."""
    return {place: Held(held.count, held.count) for place, held in unsettled.items()}


@given(
    mark=marks, watermark=st.integers(0, 40), keys=st.lists(st.binary(max_size=2), min_size=1, max_size=30)
)
def test_no_more_is_left_than_the_bound_says(mark: Mark, watermark: int, keys: list[bytes]) -> None:
    covered = covering(watermark, put=[mark, Mark(watermark=mark.watermark)])
    columns = columns_of([b""] * len(keys), keys=keys)
    left = unsettled_rows(columns, 1, len(keys), covered)
    footer = use(len(keys), lsns=(1, len(keys)), unsettled=by_kind({"put": len(keys), "none": 0}))
    assert unsettled_bytes(footer, covered) <= len(left), "optimistic: to find out costs one reading"
    assert not left or not is_superfluous(footer, covered)
    everything = counted(by_shard(columns, range(len(keys)), covered, 1))
    read = use(lsns=(1, len(keys)), unsettled=everything)
    assert len(left) <= unsettled_bytes(read, covered) <= len(keys)
    assert not left or not is_superfluous(read, covered)
    exact = use(lsns=(1, len(keys)), unsettled=counted(by_shard(columns, left, covered, 1)))
    assert unsettled_bytes(exact, covered) == len(left)


def test_of_a_lane_that_the_checkpoint_does_not_know_nothing_is_settled_above_its_watermark() -> None:
    segment = use(unsettled={("other", None): Held(60, 600), ("put", 0): Held(40, 80)})
    assert unsettled_bytes(segment, ALL) == 600
    assert unsettled_bytes(segment, replace(ALL, watermark=70)) == 300
    assert unsettled_bytes(segment, replace(ALL, watermark=100)) == 0
    assert not is_superfluous(segment, replace(ALL, watermark=99))
    assert is_superfluous(segment, replace(ALL, watermark=100))
    assert unsettled_bytes(use(unsettled=None), ALL) == 0
    assert not is_superfluous(use(unsettled=None), replace(ALL, watermark=99))
    assert is_superfluous(use(unsettled=None), replace(ALL, watermark=100))
    assert is_superfluous(use(unsettled={}), NOTHING)
    assert unsettled_bytes(use(unsettled={}), NOTHING) == 0


def test_bytes_of_a_shard_are_shared_out_by_operations_and_never_nothing_for_one() -> None:
    segment = use(unsettled={("put", 0): Held(100, 1000)})
    left = [unsettled_bytes(segment, covering(put=Mark(watermark=100 - count))) for count in (0, 1, 50, 100)]
    assert left == [0, 10, 500, 1000]
    assert unsettled_bytes(use(unsettled={("put", 0): Held(3, 1)}), covering(put=Mark(watermark=99))) == 1


def test_what_was_measured_counts_by_its_bytes_for_each_kind_and_shard() -> None:
    columns = Columns(
        kinds=("put", "slow"), kind_indexes=[0, 1, 1], priorities=[5] * 3, keys=[b"k", b"a", b"b"],
        payloads=[bytes(9000), b"x", b""],
    )  # fmt: skip
    covered = covering(put=Mark())
    total = 3 * ROW_BYTES + 9004
    found = by_shard(columns, range(3), covered, total)
    assert found == {("put", 0): Held(1, ROW_BYTES + 9001), ("slow", None): Held(2, 2 * ROW_BYTES + 3)}
    assert measured_bytes(found) == total
    assert by_shard(columns, [2], covered, 2 * total) == {("slow", None): Held(1, 2 * (ROW_BYTES + 1))}
    assert by_shard(columns, [], covered, total) == {}
    twice = summed([found, {}, {("slow", None): Held(1, 7)}])
    assert twice == {("put", 0): found["put", 0], ("slow", None): Held(3, 2 * ROW_BYTES + 10)}
    assert measured_bytes(scaled(found, 3 * total, total)) == 3 * total
    assert scaled({("put", 0): Held(1, 0)}, 100, 0) == {("put", 0): Held(1, 0)}


def test_a_paused_lane_of_small_operations_does_not_keep_the_large_ones_of_others() -> None:
    footer = use(unsettled={("blob", None): Held(10), ("note", None): Held(90)})
    passed = covering(blob=Mark(watermark=1000), note=Mark())
    assert unsettled_bytes(footer, passed) == 0, "the ninety may be next to nothing"
    assert choose_run([footer], passed, segment_bytes=SEGMENT_BYTES) is not None
    measured = use(unsettled={("note", 0): Held(90, SEGMENT_BYTES * 6 // 10)})
    assert choose_run([measured], passed, segment_bytes=SEGMENT_BYTES) is None, "once is enough"
    on_its_way = covering(blob=Mark(watermark=50), note=Mark())
    assert unsettled_bytes(footer, on_its_way) == SEGMENT_BYTES, "nothing is read for nothing"


def test_of_a_lane_of_which_one_shard_is_sick_it_is_found_out_how_much_that_is() -> None:
    footer = use(unsettled={("put", None): Held(100)})
    sick = covering(put=[Mark(watermark=200), Mark()])
    assert unsettled_bytes(footer, sick) == 0
    assert not is_superfluous(footer, sick)
    assert choose_run([footer], sick, segment_bytes=SEGMENT_BYTES) is not None
    read = use(unsettled={("put", 1): Held(80, SEGMENT_BYTES * 8 // 10)})
    assert unsettled_bytes(read, sick) == SEGMENT_BYTES * 8 // 10
    assert choose_run([read], sick, segment_bytes=SEGMENT_BYTES) is None, "once is enough"
    held = covering(put=[Mark(), Mark()])
    assert unsettled_bytes(footer, held) == SEGMENT_BYTES
    assert choose_run([footer], held, segment_bytes=SEGMENT_BYTES) is None, "nothing is read for nothing"


def test_what_was_compacted_before_this_opening_is_needed_whole_until_something_of_it_is_settled() -> None:
    then = covering(put=[Mark(watermark=200), Mark()], slow=Mark(ranges=((1, 9),)))
    footer = use(unsettled={("put", None): Held(50), ("slow", None): Held(1)}, since=then)
    assert unsettled_bytes(footer, then) == SEGMENT_BYTES
    later = covering(
        put=[Mark(watermark=900), Mark(ranges=((101, 900),))], slow=Mark(ranges=((1, 9), (101, 900)))
    )
    assert unsettled_bytes(footer, later) == SEGMENT_BYTES, "what was settled lies elsewhere"
    moved = covering(put=[Mark(watermark=200), Mark(ranges=((7, 7),))], slow=Mark(ranges=((1, 9),)))
    assert unsettled_bytes(footer, moved) == 0
    assert unsettled_bytes(footer, replace(then, watermark=1)) == 0
    assert unsettled_bytes(footer, covering(put=[Mark(watermark=200)], slow=Mark(ranges=((1, 9),)))) == 0, (
        "with other shards"
    )


# --- what of a frame is left -----------------------------------------------------------------------------------------


@st.composite
def frames(draw: st.DrawFn) -> tuple[Columns, int, int]:
    count = draw(st.integers(1, 20))
    first = draw(st.integers(1, 30))
    sparse = draw(st.booleans())
    offsets = sorted(draw(st.sets(st.integers(0, 60), min_size=count, max_size=count))) if sparse else []
    kinds = draw(st.sampled_from([("put",), ("put", "slow"), ("slow", "new", "put")]))
    columns = Columns(
        kinds=kinds,
        kind_indexes=draw(st.lists(st.integers(0, len(kinds) - 1), min_size=count, max_size=count)),
        priorities=[5] * count,
        keys=draw(st.lists(st.binary(max_size=2), min_size=count, max_size=count)),
        payloads=[b""] * count,
        lsn_offsets=offsets,
    )
    return columns, first, first + (offsets[-1] if sparse else count - 1)


@given(frame=frames(), put=st.lists(marks, min_size=1, max_size=3), slow=marks, watermark=st.integers(0, 40))
def test_exactly_what_no_mark_of_its_shard_covers_is_left(
    frame: tuple[Columns, int, int], put: list[Mark], slow: Mark, watermark: int
) -> None:
    columns, first, last = frame
    covered = covering(watermark, put=put, slow=slow)

    def is_settled(row: int, lsn: int) -> bool:
        lane = covered.lanes.get(columns.kinds[columns.kind_indexes[row]])
        if lsn <= watermark:
            return True
        return lane is not None and lane.shards[shard_of(columns.keys[row], len(lane.shards))].covers(lsn)

    expected = [row for row, lsn in enumerate(columns.lsns(first)) if not is_settled(row, lsn)]
    assert list(unsettled_rows(columns, first, last, covered)) == expected


# --- which run -------------------------------------------------------------------------------------------------------


def test_a_segment_is_rewritten_once_that_frees_half_of_it() -> None:
    whole = use(unsettled=PUT)
    assert choose_run([whole], NOTHING, segment_bytes=SEGMENT_BYTES) is None
    half = covering(put=Mark(watermark=49))
    assert choose_run([whole], half, segment_bytes=SEGMENT_BYTES) is None
    more = covering(put=Mark(watermark=52))
    assert choose_run([whole], more, segment_bytes=SEGMENT_BYTES) == Run(0, 1, SEGMENT_BYTES // 2)


def test_the_run_that_frees_most_goes_first() -> None:
    uses = [
        use(unsettled=PUT, lsns=(1, 100)),
        use(unsettled=PUT, lsns=(101, 200)),
        use(unsettled=PUT, lsns=(201, 300)),
    ]
    covered = covering(put=Mark(watermark=60, ranges=((101, 195),)))
    assert choose_run(uses, covered, segment_bytes=SEGMENT_BYTES) == Run(1, 2, SEGMENT_BYTES // 2)


def test_what_nobody_has_looked_into_is_looked_into() -> None:
    assert choose_run([use()], NOTHING, segment_bytes=SEGMENT_BYTES) == Run(0, 1, SEGMENT_BYTES // 2)
    looked = use(unsettled=PUT)
    assert choose_run([looked], NOTHING, segment_bytes=SEGMENT_BYTES) is None


def test_settled_segments_vanish_together_without_being_read() -> None:
    uses = [use(unsettled=PUT, lsns=(100 * n + 1, 100 * n + 100)) for n in range(RUN_COUNT_MAX + 5)]
    covered = covering(put=Mark(watermark=0, ranges=((1, 10**6),)))
    assert choose_run(uses, covered, segment_bytes=SEGMENT_BYTES) == Run(
        0, RUN_COUNT_MAX, RUN_COUNT_MAX * SEGMENT_BYTES // 2
    )


def test_a_step_reads_no_more_than_a_segment_holds() -> None:
    uses = [use(unsettled=PUT, lsns=(100 * n + 1, 100 * n + 100)) for n in range(4)]
    covered = covering(put=Mark(ranges=tuple((100 * n + 1, 100 * n + 99) for n in range(4))))
    run = choose_run(uses, covered, segment_bytes=SEGMENT_BYTES)
    assert run is not None
    assert run.end - run.start == 1


def test_small_neighbours_are_merged_unless_one_of_them_is_most_of_it() -> None:
    def sized(*sizes: int) -> list[SegmentUse]:
        return [
            use(size, unsettled={("put", 0): Held(100, size)}, lsns=(100 * n + 1, 100 * n + 100))
            for n, size in enumerate(sizes)
        ]

    assert choose_run(sized(4096, 4096), NOTHING, segment_bytes=SEGMENT_BYTES) == Run(0, 2, 8192)
    assert choose_run(sized(40960, 4096), NOTHING, segment_bytes=SEGMENT_BYTES) is None
    assert choose_run(sized(8192, 4096, 4096, 4096), NOTHING, segment_bytes=SEGMENT_BYTES) == Run(0, 4, 20480)
    large = SEGMENT_BYTES // 2 + 512
    assert choose_run(sized(large, large), NOTHING, segment_bytes=SEGMENT_BYTES) is None, (
        "no larger than a segment"
    )
    assert choose_run(sized(large, SEGMENT_BYTES), NOTHING, segment_bytes=SEGMENT_BYTES) is None


def test_what_would_not_become_smaller_by_merging_is_not_merged() -> None:
    grown: Unsettled = {("put", 0): Held(100, 4097)}
    uses = [use(4096, unsettled=grown), use(4096, unsettled=grown)]
    assert choose_run(uses, NOTHING, segment_bytes=SEGMENT_BYTES) is None


def test_what_cannot_be_read_is_left_alone_and_parts_its_neighbours() -> None:
    small: Unsettled = {("put", 0): Held(100, 4096)}
    uses = [use(4096, unsettled=small), use(4096, unsettled=small, damaged=True), use(4096, unsettled=small)]
    assert choose_run(uses[::2], NOTHING, segment_bytes=SEGMENT_BYTES) == Run(0, 2, 8192)
    assert choose_run(uses, NOTHING, segment_bytes=SEGMENT_BYTES) is None
    assert choose_run(uses[1:2], ALL, segment_bytes=SEGMENT_BYTES) is None


def test_one_step_examines_a_bounded_number_and_the_next_one_goes_on_there() -> None:
    uses = [use(unsettled=PUT, lsns=(100 * n + 1, 100 * n + 100)) for n in range(EXAMINED_MAX + 2)]
    last = covering(put=Mark(ranges=((100 * (EXAMINED_MAX + 1) + 1, 10**9),)))
    assert choose_run(uses, last, segment_bytes=SEGMENT_BYTES) is None
    run = choose_run(uses, last, segment_bytes=SEGMENT_BYTES, start=EXAMINED_MAX)
    assert run == Run(EXAMINED_MAX + 1, EXAMINED_MAX + 2, SEGMENT_BYTES // 2)


# --- over a life of the log -------------------------------------------------------------------------------------------


@dataclass
class LogModel:
    """Segments of operations that settle at random, compacted until nothing more is worth it."""

    segments: list[list[int]]
    """The LSNs that each holds."""
    bounds: list[tuple[int, int]]
    settled: set[int]
    written: int = 0

    mark: Mark = field(default_factory=Mark)

    def settle(self, lsns: Iterable[int]) -> None:
        self.settled.update(lsns)
        self.mark = Mark(ranges=merge_ranges(((lsn, lsn) for lsn in self.settled), 0))

    def uses(self) -> list[SegmentUse]:
        return [
            use(
                size_of(held), lsns=bound,
                unsettled={("put", 0): Held(len(held), size_of(held) - OVERHEAD_BYTES)} if held else {},
            )
            for held, bound in zip(self.segments, self.bounds, strict=True)
        ]  # fmt: skip

    def compact(self) -> bool:
        run = choose_run(self.uses(), covering(put=self.mark), segment_bytes=SEGMENT_BYTES)
        if run is None:
            return False
        held = [lsn for part in self.segments[run.start : run.end] for lsn in part if lsn not in self.settled]
        assert size_of(held) <= run.bytes_max
        self.written += size_of(held)
        self.segments[run.start : run.end] = [held]
        self.bounds[run.start : run.end] = [(self.bounds[run.start][0], self.bounds[run.end - 1][1])]
        return True


FULL = 31
OPERATION_BYTES = SEGMENT_BYTES // (FULL + 1)


def size_of(held: Sequence[int]) -> int:
    return OVERHEAD_BYTES + OPERATION_BYTES * len(held)


def full_log(count: int) -> LogModel:
    """Segments that are as full as they can be."""
    bounds = [(FULL * n + 1, FULL * n + FULL) for n in range(count)]
    return LogModel([list(range(first, last + 1)) for first, last in bounds], bounds, set())


@given(chance=st.randoms(use_true_random=False), steps=st.lists(st.integers(1, 80), min_size=1))
def test_whatever_settles_disk_and_files_stay_bounded_and_work_is_amortised(
    chance: random.Random, steps: list[int]
) -> None:
    model = full_log(12)
    order = list(range(1, 12 * FULL + 1))
    chance.shuffle(order)
    at = 0
    for step in steps:
        model.settle(order[at : at + step])
        at += step
        while model.compact():
            pass
        left = sum(lsn not in model.settled for held in model.segments for lsn in held)
        total = sum(map(size_of, model.segments))
        assert total <= COMPACTED_FACTOR * left * OPERATION_BYTES + 4 * SEGMENT_BYTES
        assert len(model.segments) <= 4 * left * OPERATION_BYTES // SEGMENT_BYTES + 14
    assert model.written <= 4 * 12 * SEGMENT_BYTES


@pytest.mark.parametrize("stragglers", [1, 3, 40])
def test_a_few_stragglers_do_not_keep_their_segments(stragglers: int) -> None:
    model = full_log(40)
    pinned = {FULL * (40 // stragglers) * n + 5 for n in range(stragglers)}
    model.settle(lsn for part in model.segments for lsn in part if lsn not in pinned)
    while model.compact():
        pass
    assert len(model.segments) <= 2
    assert sorted(lsn for part in model.segments for lsn in part) == sorted(pinned)
