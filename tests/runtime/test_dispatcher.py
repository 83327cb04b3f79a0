"""Delivery: how many batches are in flight, what is read back, what a flush and a drain wait for."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pytest

import walbatch as wb
from tests.memory import MemoryFileSystem, environment
from tests.runtime.fakes import Caller
from tests.support import FAST, QUICK_RETRY, Recorder, wait_until
from walbatch import limits
from walbatch.runtime import delivery
from walbatch.runtime.dispatcher import DUE_FLOOR_NS, TICK_FLOOR_NS, Dispatcher
from walbatch.runtime.reader import Reader

ROOT = "/q"
SETTINGS = wb.Settings(segment_bytes=2**16, memory_bytes_max=2**20, timer_ms=1, checkpoint_ms=1)
NEVER = wb.Trigger(linger_ms=3_600_000)


def open_engine(
    lanes: dict[str, wb.Lane], *, fs: MemoryFileSystem | None = None, settings: wb.Settings = SETTINGS
) -> wb.Engine:
    return wb.Engine.open(
        ROOT, lanes=lanes, settings=settings, environment=environment(fs or MemoryFileSystem())
    )


def one_lane(backend: Any, **lane: Any) -> dict[str, wb.Lane]:
    return {"put": wb.Lane(backend, **{"trigger": FAST, "retry": QUICK_RETRY, **lane})}


class Blocking:
    """A backend whose batches wait until they are let go."""

    def __init__(self) -> None:
        self.recorder = Recorder()
        self.go = threading.Event()
        self.inside = self.peak = 0
        self.by_shard: dict[int, int] = defaultdict(int)
        self._guard = threading.Lock()

    def apply(self, batch: wb.Batch) -> None:
        with self._guard:
            self.inside += 1
            self.by_shard[batch.shard] += 1
            assert self.by_shard[batch.shard] == 1, "one batch of a shard at a time"
            self.peak = max(self.peak, self.inside)
        assert self.go.wait(30)
        with self._guard:
            self.inside -= 1
            self.by_shard[batch.shard] -= 1
        self.recorder.apply(batch)


# --- batches in flight -----------------------------------------------------------------------------------------------


def test_no_more_batches_are_in_flight_than_allowed() -> None:
    backend = Blocking()
    settings = wb.Settings(segment_bytes=2**16, in_flight_max=3, timer_ms=1)
    with open_engine(one_lane(backend, shards=16), settings=settings) as engine:
        engine.submit_many("put", [(b"%d" % n, b"") for n in range(200)])
        wait_until(lambda: backend.inside == 3, what="the slots are taken")
        assert engine.stats().lanes["put"].in_flight > 0
        wait_until(lambda: len(engine._dispatcher._workers) == 3, what="all that were started are listed")
        backend.go.set()
        engine.flush(timeout=30)
    assert backend.peak == 3
    assert sorted(backend.recorder.lsns) == list(range(1, 201))


def test_a_lane_whose_batches_hang_takes_only_its_own_shards() -> None:
    backend, other = Blocking(), Recorder()
    lanes = {"put": wb.Lane(backend, trigger=FAST), "other": wb.Lane(other, trigger=FAST)}
    with open_engine(lanes) as engine:
        engine.submit("put", key=b"k")
        wait_until(lambda: backend.inside == 1, what="the batch hangs")
        assert engine.submit("other", key=b"k").result(timeout=30) is None
        backend.go.set()


def test_the_timer_does_not_spin_while_a_batch_is_in_flight() -> None:
    backend = Blocking()
    with open_engine(one_lane(backend, trigger=wb.Trigger(linger_ms=0))) as engine:
        engine.submit("put", key=b"k")
        wait_until(lambda: backend.inside == 1, what="the batch is in flight")
        dispatcher = engine._dispatcher
        assert (dispatcher._next_wake(0) or 0) >= TICK_FLOOR_NS >= DUE_FLOOR_NS
        backend.go.set()


def handed_out(engine: wb.Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many batches the timer gives to workers, each time."""
    counts: list[int] = []
    workers = engine._dispatcher._workers
    hand_out = workers.hand_out

    def counted(jobs: Sequence[Callable[[], None]]) -> None:
        counts.append(len(jobs))
        hand_out(jobs)

    monkeypatch.setattr(workers, "hand_out", counted)
    return counts


def test_a_worker_goes_on_with_the_next_batch_of_its_shard_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    with open_engine(one_lane(recorder, trigger=wb.Trigger(count=1), shards=2)) as engine:
        engine.pause("put")
        engine.submit_many("put", [(b"%d" % number, b"") for number in range(200)])
        counts = handed_out(engine, monkeypatch)
        engine.resume("put")
        engine.flush(timeout=30)
        assert engine.stats().lanes["put"].batches == 200
        assert sum(counts) < 20
    assert sorted(recorder.lsns) == list(range(1, 201))


@pytest.mark.parametrize(
    ("lane", "in_flight_max"), [({"strategy": "serial"}, 8), ({}, 1), ({}, 2), ({"order": "none"}, 1)],
    ids=["one batch at a time", "one slot", "two slots", "one slot without order"],
)  # fmt: skip
def test_shards_that_wait_for_a_slot_are_not_kept_waiting_by_one_that_has_it(
    lane: dict[str, Any], in_flight_max: int
) -> None:
    shards: list[int] = []
    settings = wb.Settings(segment_bytes=2**16, in_flight_max=in_flight_max, timer_ms=60_000)
    lanes = one_lane(lambda batch: shards.append(batch.shard), trigger=wb.Trigger(count=1), shards=3, **lane)
    with open_engine(lanes, settings=settings) as engine:
        engine.pause("put")
        engine.submit_many("put", [(b"%d" % number, b"") for number in range(90)])
        engine.resume("put")
        engine.flush(timeout=30)
    assert len(shards) == 90
    assert set(shards[:12]) == {0, 1, 2}


def test_groups_for_a_lane_that_is_paused_do_not_wake_the_timer_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = wb.Settings(segment_bytes=2**16, timer_ms=60_000)
    with open_engine(one_lane(Recorder(), trigger=wb.Trigger(count=1)), settings=settings) as engine:
        engine.pause("put")
        dispatcher, absorbed = engine._dispatcher, []
        absorb = dispatcher._absorb

        def counted() -> None:
            absorbed.append(len(dispatcher._inbox))
            absorb()

        monkeypatch.setattr(dispatcher, "_absorb", counted)
        for number in range(200):
            engine.submit("put", key=b"%d" % number)
        assert len(absorbed) <= 3
        assert engine.stats().lanes["put"].submitted == 200, "who asks does not have to wait for the timer"
        engine.resume("put")
        engine.flush(timeout=30)


def test_without_a_linger_a_lonely_operation_is_applied_at_once() -> None:
    recorder = Recorder()
    settings = wb.Settings(segment_bytes=2**16, timer_ms=60_000)
    with open_engine(one_lane(recorder, trigger=wb.Trigger(linger_ms=0)), settings=settings) as engine:
        for number in range(20):
            assert engine.submit("put", key=b"k").result(timeout=30) is None
            assert len(recorder.applied) == number + 1


@pytest.mark.parametrize(
    "trigger",
    [wb.Trigger(), wb.Trigger(count=1), wb.Trigger(linger_ms=5)],
    ids=["adaptive", "count", "linger"],
)
def test_one_operation_after_the_other_does_not_wait_for_the_timer(trigger: wb.Trigger) -> None:
    """What came back last has left nothing in flight, and the timer asleep."""
    settings = wb.Settings(segment_bytes=2**16, timer_ms=60_000)
    engines: list[wb.Engine] = []

    def sleeps() -> bool:
        bell: Any = engines[0]._dispatcher._bells.timer
        return bool(bell._cond._condition._waiters)

    def apply(_: wb.Batch) -> None:
        wait_until(sleeps, what="the timer sleeps")

    with open_engine(one_lane(apply, trigger=trigger), settings=settings) as engine:
        engines.append(engine)
        for _ in range(5):
            assert engine.submit("put", key=b"k").result(timeout=30) is None


@pytest.mark.parametrize("after", [float("inf"), 1e300, float("nan"), -5.0])
def test_a_backend_that_asks_for_a_strange_pause_does_not_stop_the_engine(after: float) -> None:
    asked = threading.Event()

    def apply(batch: wb.Batch) -> Any:
        if not asked.is_set():
            asked.set()
            return [wb.Retry(after=after), *[wb.Applied()] * (len(batch) - 1)]
        return None

    engine = open_engine(one_lane(apply, order="none"))
    engine.submit_many("put", [(b"a", b""), (b"b", b"")])
    wait_until(lambda: engine.stats().lanes["put"].applied >= 1, what="the other one is applied")
    engine.submit("put", key=b"c").result(timeout=30)
    assert engine.close(drain=False).reason == "not drained"


def test_a_worker_that_dies_is_reported_and_everybody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    engine = open_engine(one_lane(recorder))

    def broken(*_: object) -> None:
        raise MemoryError("of anything")

    monkeypatch.setattr(engine._dispatcher._delivery, "_applied", broken)
    ticket = engine.submit("put", key=b"k")
    with pytest.raises(wb.WalbatchError, match="thread of the engine died"):
        ticket.result(timeout=30)
    with pytest.raises(wb.WalbatchError, match="thread of the engine died"):
        engine.flush(timeout=30)
    with pytest.raises(wb.StorageError, match="stopped"):
        engine.submit("put", key=b"k")
    assert engine.close().reason.startswith("failed")


@pytest.mark.parametrize(("part", "method"), [(Dispatcher, "_due"), (Reader, "_refill")])
def test_a_timer_or_reader_that_dies_is_reported(
    monkeypatch: pytest.MonkeyPatch, part: type, method: str
) -> None:
    def broken(*_: object) -> None:
        raise MemoryError("of anything")

    monkeypatch.setattr(part, method, broken)
    engine = open_engine(one_lane(Recorder()))
    with contextlib.suppress(wb.StorageError):
        engine.submit_nowait("put", key=b"k")
    wait_until(lambda: engine.stats().state == "failed", what="the thread has died")
    with pytest.raises(wb.StorageError, match="thread of the engine died"):
        engine.submit("put", key=b"k")
    assert engine.close().reason.startswith("failed")


# --- reading back ----------------------------------------------------------------------------------------------------


def test_a_backlog_is_read_back_with_commits_coming_in_all_the_while() -> None:
    fs = MemoryFileSystem()
    recorder = Recorder()
    lanes = {
        "put": wb.Lane(recorder, trigger=wb.Trigger(count=300, linger_ms=1), shards=3),
        "other": wb.Lane(Recorder(), trigger=FAST),
    }
    submitted: dict[int, tuple[bytes, bytes]] = {}
    guard = threading.Lock()
    with open_engine(lanes, fs=fs) as engine:

        def produce(thread: int) -> None:
            for number in range(120):
                pairs = [
                    (b"%d.%d" % (thread, n % 7), b"%d.%d.%d" % (thread, number, n) + bytes(400))
                    for n in range(20)
                ]
                lsns = engine.submit_many("put" if number % 6 else "other", pairs)
                if number % 6:
                    with guard:
                        submitted.update(zip(lsns, pairs, strict=True))

        def toggle() -> None:
            for _ in range(6):
                engine.pause("put")
                wait_until(
                    lambda: engine.stats().lanes["put"].reading_back > 0 or all(c.done for c in producers),
                    what="its memory is full",
                )
                engine.resume("put")
                before = engine.stats().submitted_lsn
                wait_until(
                    lambda: engine.stats().submitted_lsn > before + 50 or all(c.done for c in producers),  # noqa: B023
                    what="more is submitted",
                )

        producers = [Caller(lambda n=n: produce(n)) for n in range(4)]  # type: ignore[misc]
        toggling = Caller(toggle)
        read_back = 0
        while not toggling.done:
            lane = engine.stats().lanes["put"]
            read_back += lane.reading_back > 0
            assert lane.in_memory_bytes <= 2**20 + 1000
        assert all(caller.wait().error is None for caller in [*producers, toggling])
        engine.flush(timeout=60)
        assert read_back, "the test is about shards that read back"
    applied = {lsn: (key, payload) for lsn, key, payload in recorder.applied}
    assert len(recorder.applied) == len(applied), "nothing is delivered twice"
    assert applied == submitted
    last: dict[bytes, int] = defaultdict(int)
    for lsn, key, _ in recorder.applied:
        assert lsn is not None
        assert lsn > last[key], "the operations of a key are applied in order"
        last[key] = lsn


def test_lanes_that_stand_at_different_places_of_the_log_are_all_read_back() -> None:
    fs = MemoryFileSystem()
    names = [f"lane {n}" for n in range(5)]
    with open_engine({name: wb.Lane(None, shards=2) for name in names}, fs=fs) as engine:
        for number in range(400):
            name = names[number % 5 if number % 50 else 0]
            engine.submit_many(name, [(b"%d" % n, b"%d" % number + os.urandom(200)) for n in range(10)])
    recorders = {name: Recorder() for name in names}
    lanes = {name: wb.Lane(recorder, trigger=FAST, shards=2) for name, recorder in recorders.items()}
    with open_engine(lanes, fs=fs) as engine:
        engine.pause(names[1])
        for name in names:
            if name != names[1]:
                engine.flush(name, timeout=60)
        engine.resume(names[1])
        engine.flush(timeout=60)
    assert sorted(lsn for recorder in recorders.values() for lsn in recorder.lsns) == list(range(1, 4001))


def test_an_operation_larger_than_a_shards_memory_is_delivered() -> None:
    recorder = Recorder()
    with open_engine(one_lane(recorder, shards=8)) as engine:
        payloads = [bytes([n]) * (2 * limits.MIB) for n in range(5)]
        for payload in payloads:
            engine.submit("put", key=b"k", payload=payload)
        engine.flush(timeout=60)
    assert [payload for _, _, payload in recorder.applied] == payloads


def test_a_segment_that_is_trimmed_while_it_is_read_stops_nobody() -> None:
    """All of the last segment is settled, so it may go as soon as the engine runs, while the reader still reads it."""
    fs = MemoryFileSystem()
    with open_engine(one_lane(Recorder()), fs=fs) as engine:
        for _ in range(20):
            engine.submit("put", key=b"k", payload=b"v")
    (segment,) = [path for path in fs.files if path.endswith(".seg")]
    held: list[str] = []

    def hold(call: str, path: str) -> None:
        if (
            call == "read"
            and path == segment
            and threading.current_thread().name == "walbatch-reader"
            and not held
        ):
            held.append(path)
            wait_until(lambda: ("unlink", segment) in fs.calls, what="the segment is trimmed")

    fs.fail = hold
    recorder = Recorder()
    with open_engine(one_lane(recorder), fs=fs) as engine:
        wait_until(lambda: engine.stats().lanes["put"].reading_back == 0, what="it has caught up")
        assert engine.submit("put", key=b"k").result(timeout=30) is None
    assert held
    assert recorder.lsns == [21]
    assert fs.open_files == 0


# --- pausing, flushing, draining -------------------------------------------------------------------------------------


def test_a_paused_lane_delivers_nothing_until_it_is_resumed() -> None:
    recorder = Recorder()
    with open_engine(one_lane(recorder)) as engine:
        engine.pause("put")
        ticket = engine.submit("put", key=b"k")
        with pytest.raises(wb.ConfigError, match="resume it first"):
            engine.flush("put", timeout=30)
        assert recorder.applied == []
        assert engine.stats().lanes["put"].paused
        engine.resume("put")
        assert ticket.result(timeout=30) is None


def test_a_flush_of_one_lane_does_not_wait_for_another() -> None:
    lanes = {"put": wb.Lane(Recorder(), trigger=NEVER), "stuck": wb.Lane(Recorder(), trigger=NEVER)}
    with open_engine(lanes) as engine:
        engine.pause("stuck")
        engine.submit("stuck", key=b"k")
        engine.submit("put", key=b"k")
        engine.flush("put", timeout=30)
        assert engine.stats().lanes["put"].applied == 1
        engine.resume("stuck")


def test_a_flush_sees_lsns_of_other_lanes_become_durable() -> None:
    """The lane itself is settled; the LSN up to which it is flushed belongs to another one and is not durable yet."""
    fs = MemoryFileSystem()
    lanes = {
        "put": wb.Lane(Recorder(), trigger=FAST),
        "paused": wb.Lane(Recorder(), trigger=FAST),
        "slow": wb.Lane(Recorder(), trigger=NEVER),
    }
    with open_engine(lanes, fs=fs) as engine:
        engine.pause("paused")
        engine.submit("slow", key=b"k")  # keeps the timer from going idle
        for _ in range(20):
            hold = threading.Event()
            reached = threading.Event()

            def wait(
                call: str, path: str, hold: threading.Event = hold, reached: threading.Event = reached
            ) -> None:
                if call == "datasync" and ".seg" in path:
                    reached.set()
                    assert hold.wait(30)

            fs.fail = wait
            ticket = engine.submit_nowait("paused", key=b"k")
            assert reached.wait(30)
            flushing = Caller(lambda: engine.flush("put", timeout=30))
            fs.fail = None
            hold.set()
            ticket.wait_durable(timeout=30)
            assert flushing.wait().error is None
        engine.resume("paused")


def test_a_flush_covers_what_was_submitted_before_it_and_does_not_chase_what_comes_later() -> None:
    recorder = Recorder()
    stop = threading.Event()
    with open_engine(one_lane(recorder)) as engine:

        def produce() -> None:
            while not stop.is_set():
                engine.submit("put", key=b"k")

        producer = Caller(produce)
        wait_until(lambda: engine.stats().submitted_lsn > 10, what="something is submitted")
        lsn = engine.stats().submitted_lsn
        engine.flush("put", timeout=30)
        assert max(recorder.lsns) >= lsn
        stop.set()
        assert producer.wait().error is None


def test_a_flush_of_an_unlogged_lane_waits_for_its_operations() -> None:
    backend = Blocking()
    with open_engine(one_lane(backend, durability="none", trigger=NEVER, shards=4)) as engine:
        engine.submit_many("put", [(b"%d" % n, b"") for n in range(30)])
        with pytest.raises(wb.ResultTimeout):
            engine.flush("put", timeout=0.02)
        backend.go.set()
        engine.flush("put", timeout=30)
        assert len(backend.recorder.applied) == 30


def test_a_flush_ends_when_the_engine_is_closed() -> None:
    engine = open_engine(one_lane(down))
    engine.submit("put", key=b"k")
    flushing = Caller(lambda: engine.flush("put"))
    wait_until(lambda: engine._dispatcher._shards[0].flush_lsn == 1, what="the flush waits")
    engine.close(drain=False)
    assert isinstance(flushing.wait().error, wb.EngineClosed)


def down(batch: wb.Batch) -> None:
    raise OSError("down")


@pytest.mark.parametrize("backend", [down, None], ids=["down", "held"])
def test_a_drain_ends_at_its_timeout_and_keeps_the_rest(backend: Callable[[wb.Batch], None] | None) -> None:
    fs = MemoryFileSystem()
    engine = open_engine({**one_lane(backend), "other": wb.Lane(Recorder(), trigger=NEVER)}, fs=fs)
    engine.submit("put", key=b"k")
    engine.submit("other", key=b"k")
    report = engine.close(timeout=0.05)
    assert report.remaining == 1
    assert report.reason != "drained"
    recorder = Recorder()
    with open_engine({**one_lane(recorder), "other": wb.Lane(Recorder())}, fs=fs):
        pass
    assert recorder.lsns == [1]


def test_a_drain_of_a_paused_lane_keeps_its_operations() -> None:
    fs = MemoryFileSystem()
    engine = open_engine(one_lane(Recorder()), fs=fs)
    engine.pause("put")
    engine.submit("put", key=b"k")
    assert engine.close(timeout=30).remaining == 1
    recorder = Recorder()
    open_engine(one_lane(recorder), fs=fs).close()
    assert recorder.lsns == [1]


def test_an_unlogged_submit_waits_for_room_and_is_refused_while_closing() -> None:
    backend = Blocking()
    engine = open_engine(one_lane(backend, durability="none"))
    engine.submit("put", key=b"k", payload=bytes(2**20))
    waiting = Caller(lambda: engine.submit("put", key=b"k", payload=b"x", timeout=None))
    wait_until(lambda: backend.inside == 1, what="the first is in flight")
    backend.go.set()
    assert waiting.wait().error is None
    backend.go.clear()
    engine.submit("put", key=b"k", payload=bytes(2**20))
    wait_until(lambda: backend.inside == 1, what="the backend is busy again")
    waiting = Caller(lambda: engine.submit("put", key=b"k", payload=b"x", timeout=None))
    closing = Caller(lambda: engine.close(timeout=30))
    assert isinstance(waiting.wait().error, wb.EngineClosed)
    backend.go.set()
    assert closing.wait().result.reason == "drained"


def test_a_dispatcher_says_what_it_does() -> None:
    with open_engine(one_lane(Recorder())) as engine:
        assert repr(engine._dispatcher).startswith("<Dispatcher 1 lanes, 0 in flight")
        assert "put/0" in repr(engine._dispatcher._shards[0])


def test_a_worker_that_has_gone_on_for_long_enough_leaves_the_next_batch_to_the_timer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(delivery, "RUN_ON_NS_MAX", 0)
    applied: list[bytes] = []
    settings = wb.Settings(segment_bytes=2**16, timer_ms=60_000)
    lanes = one_lane(lambda batch: applied.extend(batch.keys), trigger=wb.Trigger(count=1))
    with open_engine(lanes, settings=settings) as engine:
        keys = [b"%d" % number for number in range(100)]
        engine.submit_many("put", [(key, b"") for key in keys])
        engine.flush("put", timeout=30)
        assert applied == keys
