"""Dead letters that are submitted again while somebody else looks at them, and those that make room for others."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import walbatch as wb
from tests.memory import MemoryFileSystem, environment
from tests.runtime.fakes import Caller
from tests.support import FAST, QUICK_RETRY, wait_until
from walbatch.runtime.clock import RealClock

ROOT = "/q"
SETTINGS = wb.Settings(segment_bytes=2**16, memory_bytes_max=2**20, timer_ms=1, checkpoint_ms=1)
DAY_NS = 86_400 * 10**9


class Mood:
    """A backend that rejects everything until it is well, and counts what it has applied, by identity."""

    def __init__(self) -> None:
        self.is_well = False
        self.applied: list[int | None] = []

    def apply(self, batch: wb.Batch) -> Any:
        if not self.is_well:
            return [wb.Rejected("not now")] * len(batch)
        self.applied.extend(operation.identity for operation in batch)
        return None


@pytest.fixture
def fs() -> MemoryFileSystem:
    return MemoryFileSystem()


def open_engine(
    lanes: dict[str, Any],
    fs: MemoryFileSystem,
    *,
    settings: wb.Settings = SETTINGS,
    clock: RealClock | None = None,
) -> wb.Engine:
    ports = replace(environment(fs), clock=clock or RealClock())
    return wb.Engine.open(
        ROOT, settings=settings, environment=ports,
        lanes={name: wb.Lane(backend, trigger=FAST, retry=QUICK_RETRY) for name, backend in lanes.items()},
    )  # fmt: skip


def with_letters(fs: MemoryFileSystem, mood: Mood, *, count: int = 1, **settings: Any) -> wb.Engine:
    """An engine with so many dead letters, whose backend is well again."""
    engine = open_engine({"put": mood}, fs, settings=replace(SETTINGS, **settings))
    engine.submit_many("put", [(b"%d" % n, b"") for n in range(count)])
    engine.flush(timeout=30)
    mood.is_well = True
    return engine


class Pause:
    """Holds the first sync of the log."""

    def __init__(self, fs: MemoryFileSystem) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        fs.fail = self._hold

    def _hold(self, call: str, path: str) -> None:
        if call == "datasync" and not self.reached.is_set():
            self.reached.set()
            assert self.go.wait(30)


def test_what_somebody_is_submitting_again_nobody_else_submits_or_drops(fs: MemoryFileSystem) -> None:
    mood = Mood()
    engine = with_letters(fs, mood, idempotency_window_s=0)
    pause = Pause(fs)
    first = Caller(engine.requeue)
    assert pause.reached.wait(30)
    assert engine.requeue() == 0
    assert engine.drop([1]) == 0
    pause.go.set()
    assert first.wait().result == 1
    engine.flush(timeout=30)
    assert mood.applied == [1]
    assert not engine.dead_letters()
    engine.close()


def test_a_letter_that_is_dropped_before_its_turn_is_not_submitted(fs: MemoryFileSystem) -> None:
    mood = Mood()
    engine = with_letters(fs, mood, count=3)
    pause = Pause(fs)
    requeueing = Caller(lambda: engine.requeue(per_second=1e6))
    assert pause.reached.wait(30)
    assert engine.drop([3]) == 1
    pause.go.set()
    assert requeueing.wait().result == 2
    engine.flush(timeout=30)
    assert sorted(mood.applied, key=str) == [1, 2]
    engine.close()


def failing(*calls: str) -> Callable[[str, str], None]:
    def fail(call: str, path: str) -> None:
        if call in calls:
            raise OSError(errno.ENOSPC, "no room")

    return fail


@pytest.mark.parametrize("reopened", [False, True])
@pytest.mark.parametrize("window_s", [0, 3_600])
def test_a_letter_that_could_not_be_dropped_is_not_submitted_again_however_long_that_lasts(
    fs: MemoryFileSystem, window_s: float, reopened: bool
) -> None:
    mood = Mood()
    engine = with_letters(fs, mood, idempotency_window_s=window_s)
    fs.fail = failing("unbury")
    with pytest.raises(wb.StorageError):
        engine.requeue()
    engine.flush(timeout=30)
    # More keys are used and saved: those of the window go, and the log is trimmed.
    for n in range(3):
        engine.submit("put", key=b"other", idempotency_key=b"%d" % n).result(timeout=30)
        lsn = engine.stats().durable_lsn
        wait_until(lambda lsn=lsn: engine.stats().checkpointed_lsn >= lsn, what="it is saved")  # type: ignore[misc]
    if reopened:
        engine.close()
        engine = open_engine({"put": mood}, fs, settings=replace(SETTINGS, idempotency_window_s=window_s))
        assert [letter.lsn for letter in engine.dead_letters()] == [1], "there is still no room"
    fs.fail = None
    assert engine.requeue() == 1
    engine.flush(timeout=30)
    assert not engine.dead_letters()
    assert mood.applied.count(1) == 1
    engine.close()


def test_the_key_of_a_letter_that_is_gone_is_forgotten_like_any_other(fs: MemoryFileSystem) -> None:
    engine = with_letters(fs, Mood(), idempotency_window_s=0)
    assert engine.requeue() == 1
    engine.submit("put", key=b"k", idempotency_key=b"one").result(timeout=30)
    wait_until(
        lambda: not engine._assembly.keys.is_own("put", b"\0requeue 1"), what="it is not wanted any more"
    )
    engine.submit("put", key=b"k", idempotency_key=b"two").result(timeout=30)
    engine.close()
    assert not any(use.key.startswith(b"\0") for use in fs.key_uses)


def test_letters_of_lanes_that_are_not_open_stay_and_the_others_are_submitted(fs: MemoryFileSystem) -> None:
    moods = {name: Mood() for name in ("a", "b", "c")}
    with open_engine(moods, fs) as engine:
        for name in ("a", "a", "b", "c"):
            engine.submit(name, key=b"k")
        engine.flush(timeout=30)
    moods["b"].is_well = True
    with open_engine({"b": moods["b"]}, fs) as engine:
        with pytest.raises(wb.ConfigError) as caught:
            engine.requeue()
        engine.flush("b", timeout=30)
        assert [letter.lsn for letter in engine.dead_letters()] == [1, 2, 4]
    assert moods["b"].applied == [3]
    assert caught.value.problems == (
        "2 dead letters of lane 'a' stay: the lane is not open here: open the store with it",
        "the dead letter of lane 'c' stays: the lane is not open here: open the store with it",
    )


def test_a_letter_that_cannot_be_submitted_does_not_keep_the_others_from_it(fs: MemoryFileSystem) -> None:
    mood = Mood()
    engine = with_letters(fs, mood, count=2)
    engine.close()

    class Narrow(Mood):
        key_bytes_min = 0
        payload_bytes_max = 3

    letter = fs.letters[1]
    fs.letters[1] = replace(letter, payload=b"long")
    narrow = Narrow()
    narrow.is_well = True
    with open_engine({"put": narrow}, fs) as engine:
        with pytest.raises(
            wb.ConfigError, match="the dead letter 1 stays: lane 'put': the payload has 4 bytes"
        ):
            engine.requeue()
        engine.flush(timeout=30)
        assert [letter.lsn for letter in engine.dead_letters()] == [1]
    assert narrow.applied == [2]


# --- room for dead letters -------------------------------------------------------------------------------------------------


class Jumping(RealClock):
    """A wall clock that can be set."""

    ahead_ns = 0

    def wall_ns(self) -> int:
        return super().wall_ns() + self.ahead_ns


def test_old_letters_stay_as_long_as_there_is_room_for_others(fs: MemoryFileSystem) -> None:
    clock = Jumping()
    engine = open_engine({"put": Mood()}, fs, settings=replace(SETTINGS, dead_letter_age_s=1), clock=clock)
    engine.submit_many("put", [(b"%d" % n, b"") for n in range(3)])
    engine.flush(timeout=30)
    clock.ahead_ns = 400 * DAY_NS
    engine.submit("put", key=b"k")
    engine.flush(timeout=30)
    assert [letter.lsn for letter in engine.dead_letters()] == [1, 2, 3, 4]
    engine.close()


@pytest.mark.parametrize("bound", [{"dead_letters_max": 3}, {"dead_letter_bytes_max": 1_000}])
def test_without_room_the_oldest_letters_beyond_their_age_go_and_no_more_than_needed(
    fs: MemoryFileSystem, bound: dict[str, int]
) -> None:
    clock = Jumping()
    settings = replace(SETTINGS, dead_letter_age_s=86_400, **bound)
    engine = open_engine({"put": Mood()}, fs, settings=settings, clock=clock)
    size = 300 - 2 - 7  # a letter counts for its key, its payload, its error, and what every operation costs
    size -= wb.limits.OPERATION_OVERHEAD_BYTES if "dead_letter_bytes_max" in bound else 0
    for n in range(3):
        clock.ahead_ns = n * DAY_NS // 4
        engine.submit("put", key=b"k%d" % n, payload=b"x" * size)
        engine.flush(timeout=30)
    clock.ahead_ns = DAY_NS + DAY_NS // 3  # the first two are a day old
    engine.submit("put", key=b"k3", payload=b"x" * size)
    engine.flush(timeout=30)
    assert [letter.lsn for letter in engine.dead_letters()] == [2, 3, 4]
    engine.submit("put", key=b"k4", payload=b"x" * size)
    engine.flush(timeout=30)
    engine.submit("put", key=b"k5", payload=b"x" * size)
    shard = engine._dispatcher.lanes[0].shards[0]
    wait_until(lambda: shard.refused_until_ns > 0, what="the third letter is not old enough to make room")
    assert [letter.lsn for letter in engine.dead_letters()] == [3, 4, 5]
    engine.close(drain=False)
