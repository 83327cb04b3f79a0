"""Features that no other test names, each with a small engine in memory (docs/features.md lists all)."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

import walbatch as wb
from tests.memory import MemoryFileSystem, MemoryState
from tests.support import FAST, QUICK_RETRY, Recorder, wait_until
from walbatch.core.history import HISTORY
from walbatch.runtime import overview

SETTINGS = wb.Settings(segment_bytes=2**16, memory_bytes_max=2**20, timer_ms=1, checkpoint_ms=1)
HOUR_MS = 3_600_000


class Measured:
    """The memory of a machine that says what it is told to say."""

    def __init__(self) -> None:
        self.used = 0

    def look(self) -> tuple[int, int]:
        return self.used, 100


def open_engine(
    fs: MemoryFileSystem, lanes: dict[str, wb.Lane], *, settings: wb.Settings = SETTINGS, memory: Measured | None = None
) -> wb.Engine:  # fmt: skip
    environment = wb.Environment(
        fs=fs, open_state=lambda path, store, quarantine: MemoryState(fs), memory=memory or Measured()
    )
    return wb.Engine.open("/q", lanes=lanes, settings=settings, environment=environment)


@pytest.fixture
def fs() -> MemoryFileSystem:
    return MemoryFileSystem()


def put(backend: Any, **settings: Any) -> dict[str, wb.Lane]:
    return {"put": wb.Lane(backend, **{"trigger": FAST, "retry": QUICK_RETRY, **settings})}


def many(count: int, size: int = 4) -> list[tuple[bytes, bytes]]:
    return [(b"%d" % number, b"x" * size) for number in range(count)]


# --- triggers ----------------------------------------------------------------------------------------------------------

CUTS: dict[str, tuple[wb.Trigger, int, list[int]]] = {
    # the trigger, operations submitted, the batches that must come without a flush
    "count": (wb.Trigger(count=5, linger_ms=HOUR_MS), 13, [5, 5]),
    "bytes": (wb.Trigger(bytes=50, linger_ms=HOUR_MS), 12, [10]),
    "linger": (wb.Trigger(count=100, linger_ms=1), 7, [7]),
}


@pytest.mark.parametrize("reason", CUTS)
def test_each_trigger_cuts_and_the_statistics_are_split_by_its_name(
    fs: MemoryFileSystem, reason: str
) -> None:
    trigger, count, sizes = CUTS[reason]
    recorder = Recorder()
    with open_engine(fs, put(recorder, trigger=trigger)) as engine:
        operations = [(b"%d" % (number % 10), b"x" * 4) for number in range(count)]
        engine.submit_many("put", operations)
        wait_until(lambda: engine.stats().applied == sum(sizes), what="the trigger has cut")
        cuts = engine.stats().lanes["put"].batch_stats.cuts
        assert (cuts[reason].batches, cuts[reason].operations) == (len(sizes), sum(sizes))
        assert cuts[reason].applied == sum(sizes)
        engine.flush(timeout=30)
        cuts = engine.stats().lanes["put"].batch_stats.cuts
        assert cuts["flush"].operations if sum(sizes) < count else "flush" not in cuts
    assert [len(batch) for batch in recorder.batches][: len(sizes)] == sizes


@pytest.mark.parametrize(
    ("mode", "sizes"), [("size", []), ("timeout", [10, 4]), ("any", [10, 4]), ("all", [10])]
)
def test_a_mode_says_whether_size_or_time_or_both_have_to_be_reached(
    fs: MemoryFileSystem, mode: str, sizes: list[int]
) -> None:
    recorder = Recorder()
    linger = HOUR_MS if mode == "size" else 1
    with open_engine(fs, put(recorder, trigger=wb.Trigger(count=10, linger_ms=linger, mode=mode))) as engine:
        engine.submit_many("put", many(14))
        wait_until(lambda: sum(map(len, recorder.batches)) >= sum(sizes), what="what is due was cut")
        if mode == "size":
            wait_until(lambda: len(recorder.batches) == 1, what="the size was reached once")
            assert [len(batch) for batch in recorder.batches] == [10]
        else:
            assert [len(batch) for batch in recorder.batches][: len(sizes)] == sizes


def test_a_preset_cuts_at_its_kinds_share_of_the_largest_batch(fs: MemoryFileSystem) -> None:
    recorder = Recorder()
    lanes = {
        kind: wb.Lane(recorder, trigger=wb.Trigger.preset(kind, batch_max=40, linger_ms=HOUR_MS))
        for kind in ("add", "get", "pin", "pubsub")
    }
    with open_engine(fs, lanes) as engine:
        for kind, count in (("add", 10), ("get", 20), ("pin", 13), ("pubsub", 1)):
            engine.submit_many(kind, many(count))
        wait_until(lambda: engine.stats().pending == 0, what="each has its share, and is cut")
    assert {(batch.lane, len(batch), batch.reason) for batch in recorder.batches} == {
        (kind, count, wb.CutReason.COUNT) for kind, count in (("add", 10), ("get", 20), ("pin", 13), ("pubsub", 1))
    }  # fmt: skip


# --- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("controller", "name"),
    [(wb.Fixed(7), "fixed"), (wb.Aimd(count_min=7, count_max=7), "aimd"), (wb.Adaptive(count_min=7, count_max=7), "surface")],
    ids=["fixed", "aimd", "adaptive"],
)  # fmt: skip
def test_the_controller_of_a_lane_chooses_the_size_and_says_why(
    fs: MemoryFileSystem, controller: Any, name: str
) -> None:
    recorder = Recorder()
    trigger = wb.Trigger(linger_ms=HOUR_MS)
    with open_engine(fs, put(recorder, trigger=trigger, controller=controller)) as engine:
        engine.submit_many("put", many(21))
        wait_until(lambda: len(recorder.lsns) == 21, what="three batches of seven")
        state = engine.stats().lanes["put"].controller
        assert state is not None
        assert (state.lead_count, engine.stats().lanes["put"].batch_stats.target_count) == (7, 7)
        assert state.reason
    assert [len(batch) for batch in recorder.batches] == [7, 7, 7]


def test_what_a_controller_has_learnt_is_there_after_a_restart(
    fs: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overview, "SNAPSHOT_NS", 0)
    lanes = put(Recorder(), trigger=wb.Trigger(linger_ms=1), controller=wb.Aimd(count_min=1, count_max=500))
    with open_engine(fs, lanes) as engine:
        engine.submit_many("put", many(5_000))
        engine.flush(timeout=30)
        learnt = engine.stats().lanes["put"].controller
        assert learnt is not None
        wait_until(lambda: ("put", 0) in fs.controllers, what="it is saved with the checkpoint")
    with open_engine(fs, lanes) as engine:
        restored = engine.stats().lanes["put"].controller
        assert restored is not None
        assert restored.samples > 0
        assert restored.lead_count > 64, "more than a new one starts with"


def test_a_batch_costs_no_more_than_its_budget(fs: MemoryFileSystem) -> None:
    recorder = Recorder()
    lanes = put(
        recorder,
        cost=wb.Cost(memory_bytes=100, seconds=0.001),
        batch_cost=wb.Cost(memory_bytes=1_000, seconds=1),
    )
    with open_engine(fs, lanes) as engine:
        engine.submit_many("put", many(35))
        engine.flush(timeout=30)
    assert max(len(batch) for batch in recorder.batches) == 10


# --- strategies --------------------------------------------------------------------------------------------------------


def test_a_parallel_lane_flushes_its_shards_at_the_same_time(fs: MemoryFileSystem) -> None:
    inside: set[int] = set()
    together = threading.Event()

    def apply(batch: wb.Batch) -> None:
        inside.add(batch.shard)
        if len(inside) == 2:
            together.set()
        assert together.wait(30)

    with open_engine(fs, put(apply, shards=2, strategy="parallel")) as engine:
        engine.submit_many("put", many(64))
        engine.flush(timeout=60)
        assert engine.stats().applied == 64


# --- statistics --------------------------------------------------------------------------------------------------------


def test_the_statistics_of_batches_add_up_to_what_the_backend_was_given(fs: MemoryFileSystem) -> None:
    failed = False

    def before(batch: wb.Batch) -> None:
        nonlocal failed
        if len(batch) == 1 and not failed:
            failed = True
            raise ConnectionError("away")

    recorder = Recorder(before)
    with open_engine(fs, put(recorder, trigger=wb.Trigger(count=10, linger_ms=1))) as engine:
        engine.submit_many("put", many(40, size=10))
        engine.flush(timeout=30)
        engine.submit("put", key=b"k", payload=b"alone").result(timeout=30)
        stats = engine.stats()
        figures = stats.lanes["put"].batch_stats
    assert (figures.batched, figures.individual, figures.operations) == (40, 2, 42)
    assert (figures.applied, figures.retried, figures.dead) == (41, 1, 0)
    assert (figures.batches, figures.failed_batches) == (6, 1)
    assert figures.count_average == pytest.approx(42 / 6)
    assert figures.bytes == sum(len(b"%d" % number) + 10 for number in range(40)) + 2 * len(b"kalone")
    assert figures.error_rate == pytest.approx(1 / 42)
    assert figures.saved_calls == 40 - 4
    for spread, count in ((figures.seconds, 6), (figures.queue_seconds, 42)):
        assert spread.count == count
        assert 0 <= spread.p50 <= spread.p95 <= spread.p99 <= spread.maximum * 1.05
    assert 0 < figures.efficiency <= 1
    assert 0 < figures.load <= 1
    assert figures.throughput > 0
    assert stats.peak_memory_bytes > 0
    assert stats.memory_bytes == 0
    assert sum(figures.results.values()) == 6
    assert stats.unaccounted == 0


def test_the_history_of_this_hour_is_shown_after_a_restart(
    fs: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overview, "SNAPSHOT_NS", 0)
    lanes = put(Recorder(), trigger=wb.Trigger(linger_ms=1), controller=wb.Aimd())
    with open_engine(fs, lanes) as engine:
        engine.submit_many("put", many(1_000))
        engine.flush(timeout=30)
        wait_until(lambda: HISTORY in fs.controllers, what="it is saved with the checkpoint")
    with open_engine(fs, lanes) as engine:
        usual = engine.stats().lanes["put"]
    assert usual.batches == 0
    assert usual.usual_count > 0
    assert usual.usual_seconds > 0


# --- memory and health -------------------------------------------------------------------------------------------------


def test_where_memory_is_short_nothing_is_taken_in_beside_what_is_being_written(fs: MemoryFileSystem) -> None:
    memory = Measured()
    memory.used = 95
    entered, go = threading.Event(), threading.Event()

    def hold_sync(call: str, path: str) -> None:
        if call == "datasync":
            entered.set()
            assert go.wait(30)

    with open_engine(fs, put(Recorder()), memory=memory) as engine:
        wait_until(
            lambda: any(reason.name == "memory" for reason in engine.health().reasons), what="health says so"
        )
        fs.fail = hold_sync
        first = threading.Thread(target=lambda: engine.submit("put", key=b"first"))
        first.start()
        assert entered.wait(30)
        with pytest.raises(wb.Overloaded) as refused:
            engine.submit_nowait("put", key=b"second")
        assert refused.value.limit == "memory"
        go.set()
        first.join(30)
        engine.flush(timeout=30)
        memory.used = 10  # from here on the engine has nothing to do
        wait_until(lambda: engine.health().verdict == "ok", what="health says that memory has fallen")


def test_where_memory_stays_short_a_backlog_is_worked_off_all_the_same(fs: MemoryFileSystem) -> None:
    memory = Measured()
    memory.used = 85
    recorder = Recorder()
    with open_engine(fs, put(recorder), memory=memory) as engine:
        engine.pause("put")
        for _ in range(40):
            engine.submit_many("put", [(b"%d" % number, bytes(1000)) for number in range(100)])
        assert engine.stats().lanes["put"].reading_back == 1
        engine.resume("put")
        wait_until(lambda: len(recorder.applied) == 4000, what="it is read and applied")
        assert any(reason.name == "memory" for reason in engine.health().reasons)


def test_health_says_what_is_wrong_and_what_to_do(fs: MemoryFileSystem) -> None:
    down = True

    def apply(batch: wb.Batch) -> None:
        if down:
            raise ConnectionRefusedError("nobody listens")

    with open_engine(fs, put(apply)) as engine:
        assert engine.health().reasons == ()
        engine.submit("put", key=b"k")
        wait_until(lambda: engine.health().verdict != "ok", what="the breaker is open")
        (reason,) = [reason for reason in engine.health().reasons if reason.name == "breaker"]
        assert (reason.lane, reason.shard) == ("put", 0)
        assert "nobody listens" in reason.text
        down = False
        for key in (b"k", b"l"):  # two successes close it
            engine.submit("put", key=key)
            engine.flush(timeout=30)
        wait_until(lambda: engine.health().verdict == "ok", what="all is well again")


# --- the log -----------------------------------------------------------------------------------------------------------


def test_payloads_that_compress_take_less_of_the_disk(fs: MemoryFileSystem) -> None:
    def used(settings: wb.Settings) -> int:
        own = MemoryFileSystem()
        with open_engine(own, {"put": wb.Lane(None)}, settings=settings) as engine:
            engine.submit_many("put", many(500, size=1_000))
            engine.close(drain=False)
        return sum(len(content.data) for path, content in own.files.items() if path.endswith(".seg"))

    plain = wb.Settings(segment_bytes=2**20, compress_bytes_min=None)
    assert used(wb.Settings(segment_bytes=2**20)) * 5 < used(plain)


def test_a_lane_that_stands_still_does_not_keep_what_the_others_have_settled(fs: MemoryFileSystem) -> None:
    settings = wb.Settings(segment_bytes=2**14, timer_ms=1, checkpoint_ms=1, compress_bytes_min=None)
    lanes = {"sick": wb.Lane(None), "well": wb.Lane(Recorder(), trigger=FAST)}
    with open_engine(fs, lanes, settings=settings) as engine:
        for _ in range(60):
            engine.submit("sick", key=b"k", payload=b"x" * 100)
            engine.submit_many("well", many(20, size=400))
        engine.flush("well", timeout=60)
        unsettled = 60 * 1024  # a sector for the frame of each, and its share of the header
        wait_until(
            lambda: engine.stats().disk_bytes <= 2 * unsettled + 4 * 2**14, what="segments are compacted"
        )
        assert engine.stats().pending == 60
        engine.close(drain=False)
    recorder = Recorder()
    with open_engine(
        fs, {"sick": wb.Lane(recorder, trigger=FAST), "well": wb.Lane(None)}, settings=settings
    ) as engine:
        engine.flush("sick", timeout=30)
    assert len(recorder.lsns) == 60


def test_a_delayed_operation_does_not_keep_what_came_after_it(fs: MemoryFileSystem) -> None:
    settings = wb.Settings(segment_bytes=2**14, timer_ms=1, checkpoint_ms=1, compress_bytes_min=None)
    with open_engine(fs, put(Recorder()), settings=settings) as engine:
        engine.submit("put", key=b"later", payload=b"x" * 100, not_before=time.time() + 3_600)
        for _ in range(60):
            engine.submit_many("put", many(20, size=400))
        wait_until(lambda: engine.stats().pending == 1, what="all but the delayed one are applied")
        submitted = 60 * 20 * 400
        wait_until(lambda: engine.stats().disk_bytes <= 5 * 2**14, what="segments are trimmed or compacted")
        assert engine.stats().disk_bytes < submitted / 5
        assert engine.stats().lanes["put"].delayed == 1
        engine.close(drain=False)
    with open_engine(fs, put(None), settings=settings) as engine:
        assert engine.stats().pending == 1
        assert engine.status(1) is wb.OperationStatus.PENDING


# --- priorities --------------------------------------------------------------------------------------------------------


def test_priorities_have_names_and_go_from_0_to_10(fs: MemoryFileSystem) -> None:
    named = (wb.PRIORITY_LOW, wb.PRIORITY_NORMAL, wb.PRIORITY_HIGH, wb.PRIORITY_CRITICAL)
    assert named == (2, 5, 7, 9)
    highest = 10
    seen: list[int] = []
    with open_engine(fs, put(lambda batch: seen.extend(batch.priorities))) as engine:
        for priority in range(highest + 1):
            engine.submit("put", key=b"%d" % priority, priority=priority)
        engine.submit("put", key=b"unnamed")
        for priority in (-1, highest + 1):
            with pytest.raises(wb.ConfigError, match="priority"):
                engine.submit("put", key=b"k", priority=priority)
        engine.flush(timeout=30)
    assert sorted(seen) == sorted([*range(highest + 1), wb.PRIORITY_NORMAL])


# --- what a backend asks for -------------------------------------------------------------------------------------------


HOUR_S = 3_600.0
WAITS: dict[str, wb.Retry | wb.BatchFailure] = {
    "an operation": wb.Retry(after=HOUR_S),
    "a batch": wb.RetryBatch(after=HOUR_S),
    "throttled": wb.Throttled(after=HOUR_S),
}


@pytest.mark.parametrize("asked", WAITS)
def test_nothing_is_tried_again_before_the_backend_wants_it(fs: MemoryFileSystem, asked: str) -> None:
    attempts: list[int] = []

    def apply(batch: wb.Batch) -> list[wb.Retry]:
        attempts.append(batch.attempt)
        answer = WAITS[asked]
        if isinstance(answer, wb.Retry):
            return [answer] * len(batch)
        raise answer

    with open_engine(fs, put(apply, retry=wb.RetryPolicy(base_s=0.001, ceiling_s=0.002))) as engine:
        engine.submit("put", key=b"k")
        with pytest.raises(wb.ResultTimeout):
            engine.flush(timeout=0.2)  # a hundred times what the policy alone would wait
        assert attempts == [1]
        assert engine.stats().pending == 1
        engine.close(drain=False)


# --- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: wb.Trigger(count=10, linger_ms=0, mode="all"),
        lambda: wb.Trigger(mode="sometimes"),
        lambda: wb.Lane(trigger=wb.Trigger(count=10), controller=wb.Fixed(20)),
        lambda: wb.Lane(order="key", on_failure="continue"),
        lambda: wb.Lane(batch_cost=wb.Cost(seconds=1)),
        lambda: wb.Adaptive(count_min=10, count_max=5),
        lambda: wb.RetryPolicy(breaker_s=10, breaker_s_max=1),
        lambda: wb.Trigger.preset("frobnicate"),
    ],
    ids=["never fires", "no mode", "two sizes", "breaks the order", "cost of nothing", "no size", "breaker", "no preset"],
)  # fmt: skip
def test_settings_that_contradict_one_another_are_refused(make: Any) -> None:
    with pytest.raises(wb.ConfigError):
        make()
