"""`wal/dropped`: what an opening passes over besides what its checkpoint calls settled."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from walbatch.storage.dropped import joined, noted_lanes, with_dropped
from walbatch.types import Checkpoint, LaneMark, LaneMemory, Mark


def covered(watermark: int, **lanes: tuple[Mark, ...]) -> Checkpoint:
    marks = {name: LaneMark(shards=shards) for name, shards in lanes.items()}
    return Checkpoint(
        generation=3, epoch=1, watermark=watermark, durable_lsn=50, segment=2, settled_count=9, lanes=marks
    )


def up_to(lsn: int, *ranges: tuple[int, int]) -> Mark:
    return Mark(watermark=lsn, ranges=ranges)


# Situation: what the checkpoint says; under which marks operations were dropped; what is passed over, lane by lane.
CASES: dict[str, tuple[Checkpoint | None, Checkpoint | None, Mapping[str, tuple[Mark, ...]]]] = {
    "neither": (None, None, {}),
    "nothing was dropped": (covered(5, put=(up_to(7),)), None, {"put": (up_to(7),)}),
    "no checkpoint": (None, covered(5, put=(up_to(7),)), {"put": (up_to(7),)}),
    "the checkpoint knows more": (covered(5, put=(up_to(9),)), covered(5, put=(up_to(7),)), {"put": (up_to(9),)}),
    "an older checkpoint": (covered(2, put=(up_to(2),)), covered(5, put=(up_to(7),)), {"put": (up_to(7),)}),
    "each shard by itself": (
        covered(2, put=(up_to(2), up_to(9))), covered(5, put=(up_to(7, (9, 10)), up_to(5))),
        {"put": (up_to(7, (9, 10)), up_to(9))},
    ),
    "a lane that the checkpoint does not know": (
        covered(5, put=(up_to(5),)), covered(3, log=(up_to(3, (7, 8)),)), {"put": (up_to(5),), "log": (up_to(5, (7, 8)),)},
    ),
    "another number of shards": (
        covered(5, put=(up_to(5),)), covered(5, put=(up_to(7), up_to(8))), {"put": (up_to(5),)},
    ),
    "one shard that became two": (
        covered(5, put=(up_to(5), up_to(9))), covered(5, put=(up_to(7),)), {"put": (up_to(7), up_to(9))},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_passed_over_is_what_either_covers(case: str) -> None:
    checkpoint, dropped, expected = CASES[case]
    found = with_dropped(checkpoint, dropped)
    assert {name: lane.shards for name, lane in (found.lanes if found else {}).items()} == expected


def test_what_was_dropped_of_an_only_shard_stays_dropped_when_it_became_two() -> None:
    union = joined(covered(5, put=(up_to(7),)), covered(6, put=(up_to(6), up_to(9))))
    assert union.lanes["put"].shards == (up_to(7), up_to(9))


def test_the_number_of_shards_that_is_known_from_it_is_more_than_one() -> None:
    """One is also what a lane has that is held while nobody knows its number."""
    noted = noted_lanes(covered(5, put=(up_to(7),), log=(up_to(5), up_to(5))))
    assert noted == {"log": LaneMemory(name="log", shards=2)}
    assert noted_lanes(None) == {}


def test_what_was_dropped_says_nothing_of_other_lanes() -> None:
    found = with_dropped(None, covered(5, put=(up_to(7),)))
    assert found is not None
    assert found.watermark == 0
