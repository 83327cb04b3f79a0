"""What a newcomer does wrong, and what they are told: each with a small engine in memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

import walbatch as wb
from tests.memory import MemoryFileSystem, MemoryState
from tests.support import FAST, QUICK_RETRY, Recorder, wait_until
from walbatch.backends.vectorized import vectorized

SETTINGS = wb.Settings(segment_bytes=2**16, memory_bytes_max=2**20, timer_ms=1, checkpoint_ms=1)
HOUR_MS = 3_600_000


def open_engine(fs: MemoryFileSystem, lanes: Any, *, settings: Any = SETTINGS) -> wb.Engine:
    environment = wb.Environment(fs=fs, open_state=lambda path, store, quarantine: MemoryState(fs))
    return wb.Engine.open("/q", lanes=lanes, settings=settings, environment=environment)


@pytest.fixture
def fs() -> MemoryFileSystem:
    return MemoryFileSystem()


def put(backend: Any, **settings: Any) -> dict[str, wb.Lane]:
    return {"put": wb.Lane(backend, **{"trigger": FAST, "retry": QUICK_RETRY, **settings})}


def reasons(engine: wb.Engine, name: str) -> list[wb.HealthReason]:
    return [reason for reason in engine.health().reasons if reason.name == name]


def refuse(_: wb.Batch) -> None:
    raise ConnectionRefusedError("nobody listens")


# --- a backend that does not work -----------------------------------------------------------------------------------


def test_health_says_how_long_ago_the_breaker_opened(fs: MemoryFileSystem) -> None:
    retry = wb.RetryPolicy(base_s=0.001, ceiling_s=0.002, breaker_s=3_600, breaker_s_max=3_600)
    with open_engine(fs, put(refuse, retry=retry)) as engine:
        engine.submit("put", key=b"k")
        wait_until(lambda: bool(reasons(engine, "breaker")), what="the breaker is open")
        (first,) = reasons(engine, "breaker")
        wait_until(lambda: reasons(engine, "breaker")[0].value > first.value + 0.01, what="time goes by")
        assert "is open, because" in first.text
        engine.close(drain=False)


def test_a_backend_with_a_plain_mistake_is_named_by_health(fs: MemoryFileSystem) -> None:
    def mistaken(batch: wb.Batch) -> None:
        raise TypeError("unsupported operand")

    with open_engine(fs, put(mistaken)) as engine:
        ticket = engine.submit("put", key=b"k")
        with pytest.raises(wb.OperationDead, match=r"walbatch dlq.* requeue it when the cause is gone"):
            ticket.result(timeout=30)
        (reason,) = reasons(engine, "failures")
        assert (reason.lane, reason.shard) == ("put", 0)
        assert "TypeError: unsupported operand" in reason.text


# --- waiting for what does not move -----------------------------------------------------------------------------------


def test_a_paused_lane_with_work_is_named_by_health_and_cannot_be_flushed(fs: MemoryFileSystem) -> None:
    with open_engine(fs, put(Recorder())) as engine:
        engine.pause("put")
        engine.flush("put", timeout=30)  # there is nothing to wait for
        assert engine.health().reasons == ()
        ticket = engine.submit("put", key=b"k")
        for name in ("put", None):
            with pytest.raises(wb.ConfigError, match="lane 'put' is paused: resume it first"):
                engine.flush(name)
        (reason,) = reasons(engine, "paused")
        assert reason.lane == "put"
        assert "engine.resume('put')" in reason.text
        with pytest.raises(wb.ResultTimeout, match="lane 'put' is paused: resume it"):
            ticket.result(timeout=0)
        engine.resume("put")
        engine.flush("put", timeout=30)
        assert engine.health().reasons == ()


def test_a_flush_of_a_paused_lane_waits_for_what_is_in_flight(fs: MemoryFileSystem) -> None:
    entered, go = threading.Event(), threading.Event()

    def hold(_: wb.Batch) -> None:
        entered.set()
        assert go.wait(30)

    with open_engine(fs, put(hold)) as engine:
        engine.submit("put", key=b"k")
        assert entered.wait(30)
        engine.pause("put")
        assert reasons(engine, "paused") == []
        with pytest.raises(wb.ResultTimeout, match=r"settled after 0\.01 s"):
            engine.flush("put", timeout=0.01)
        go.set()
        engine.flush("put", timeout=30)


def test_a_flush_of_a_broken_shard_says_what_the_backend_said(fs: MemoryFileSystem) -> None:
    def broken(_: wb.Batch) -> None:
        raise wb.BackendBroken("wrong password")

    recorder = Recorder()
    with open_engine(fs, {**put(broken), "other": wb.Lane(recorder, trigger=FAST)}) as engine:
        ticket = engine.submit("put", key=b"k")
        engine.submit("other", key=b"k")
        with pytest.raises(wb.BackendError, match=r"wrong password.* resume the lane"):
            engine.flush()
        assert recorder.lsns == [2], "all else was flushed first"
        with pytest.raises(wb.ResultTimeout, match="wrong password"):
            ticket.result(timeout=0)
        engine.close(drain=False)


def test_a_flush_waits_for_an_open_breaker_and_says_so_at_its_timeout(fs: MemoryFileSystem) -> None:
    retry = wb.RetryPolicy(base_s=0.001, ceiling_s=0.002, breaker_s=3_600, breaker_s_max=3_600)
    with open_engine(fs, put(refuse, retry=retry)) as engine:
        ticket = engine.submit("put", key=b"k")
        wait_until(lambda: bool(reasons(engine, "breaker")), what="the breaker is open")
        for wait in (lambda: engine.flush(timeout=0.01), lambda: ticket.result(timeout=0.01)):
            with pytest.raises(
                wb.ResultTimeout, match=r"0\.01 s.*breaker of shard 0 of lane 'put' is open for another"
            ):
                wait()
        engine.close(drain=False)


def test_whoever_waits_for_a_batch_that_fails_is_told_its_error(fs: MemoryFileSystem) -> None:
    retry = wb.RetryPolicy(base_s=3_600, ceiling_s=3_600)
    with open_engine(fs, put(refuse, retry=retry)) as engine:
        engine.submit("put", key=b"k")
        wait_until(lambda: engine.stats().lanes["put"].failed_batches == 1, what="it failed")
        with pytest.raises(wb.ResultTimeout, match=r"last 1 batches .* nobody listens"):
            engine.flush(timeout=0)
        engine.close(drain=False)


def test_whoever_waits_for_a_delayed_operation_is_told_so(fs: MemoryFileSystem) -> None:
    with open_engine(fs, put(Recorder())) as engine:
        ticket = engine.submit("put", key=b"k", not_before=time.time() + 3_600)
        with pytest.raises(wb.ResultTimeout, match=r"delayed for another 3.6e.03 s"):
            ticket.result(timeout=0)
        engine.close(drain=False)


# --- a lane that is not there -----------------------------------------------------------------------------------------


def test_a_lane_that_was_left_out_is_named_by_health_and_by_submit(fs: MemoryFileSystem) -> None:
    engine = open_engine(fs, {"a": wb.Lane(Recorder()), "b": wb.Lane(None)})
    engine.submit_many("b", [(b"%d" % number, b"") for number in range(5)])
    wait_until(lambda: [reason.value for reason in reasons(engine, "held")] == [5], what="they are known")
    engine.close(drain=False)
    with open_engine(fs, {"a": wb.Lane(Recorder())}) as engine:
        wait_until(lambda: bool(reasons(engine, "held")), what="the log was read")
        (reason,) = reasons(engine, "held")
        assert reason.lane == "b"
        with pytest.raises(
            wb.ConfigError, match="the lanes are 'a'; the store also holds operations of lane 'b'"
        ):
            engine.submit("b", key=b"k")
        with pytest.raises(wb.ConfigError, match=r"the lanes are 'a'$"):
            engine.submit("c", key=b"k")


# --- a closed engine --------------------------------------------------------------------------------------------------


def test_a_closed_engine_is_not_well_and_says_that_it_is_closed(fs: MemoryFileSystem) -> None:
    engine = open_engine(fs, put(Recorder()))
    assert engine.health().verdict == "ok"
    engine.close()
    assert engine.health().verdict == "failing"
    (reason,) = engine.health().reasons
    assert reason.name == "closed"
    with pytest.raises(wb.EngineClosed, match="of /q is closed: open it again"):
        engine.submit("put", key=b"k")


# --- settings ---------------------------------------------------------------------------------------------------------

CONTRADICTIONS: dict[str, tuple[Callable[[], object], str]] = {
    "a ceiling below the base": (lambda: wb.RetryPolicy(base_s=10, ceiling_s=1), "base_s is 10 s, more than ceiling_s"),
    "overdue without a limit": (lambda: wb.Lane(refuse, timeout_s=None, overdue="retry"), "no call is ever overdue"),
    "costs of different things": (
        lambda: wb.Lane(cost=wb.Cost(cpu_s=2), batch_cost=wb.Cost(io_bytes=1)), "have nothing in common"
    ),
    "an interval of a lane that syncs": (lambda: wb.Lane(interval_ms=5), "interval_ms is 5 ms"),
    "a target beyond the limit": (
        lambda: wb.Lane(timeout_s=0.01, controller=wb.Adaptive(latency_ms=1_000)), "aims at batches of 1000 ms"
    ),
    "a target of another controller beyond the limit": (
        lambda: wb.Lane(timeout_s=0.01, controller=wb.Aimd(latency_ms=1_000)), "aims at batches of 1000 ms"
    ),
    "no multiple below the count": (
        lambda: wb.Lane(trigger=wb.Trigger(count=5), controller=wb.Adaptive(multiple_of=10)), "a multiple of 10"
    ),
    "padding to no multiple": (lambda: vectorized(len, pad_to=3, multiple_of=8), "pad_to is 3"),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.mark.parametrize(("make", "says"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_settings_that_contradict_one_another_say_which(make: Callable[[], object], says: str) -> None:
    with pytest.raises(wb.ConfigError, match=says):
        make()


def test_all_contradictions_are_told_at_once() -> None:
    with pytest.raises(wb.ConfigError) as lane:
        wb.Lane(interval_ms=5, timeout_s=None, overdue="retry", batch_cost=wb.Cost(seconds=1))
    assert len(lane.value.problems) == 3
    with pytest.raises(wb.ConfigError) as retry:
        wb.RetryPolicy(base_s=10, ceiling_s=1, breaker_s=10, breaker_s_max=1)
    assert len(retry.value.problems) == 2


WELL: dict[str, Callable[[], object]] = {
    "an interval where it counts": lambda: wb.Lane(durability="interval", interval_ms=5),
    "a target at the limit": lambda: wb.Lane(timeout_s=1, controller=wb.Adaptive(latency_ms=1_000)),
    "a multiple below the count": lambda: wb.Lane(
        trigger=wb.Trigger(count=15), controller=wb.Adaptive(multiple_of=10)
    ),
    "one cost in common": lambda: wb.Lane(
        cost=wb.Cost(cpu_s=2, seconds=1), batch_cost=wb.Cost(io_bytes=1, seconds=9)
    ),
}


@pytest.mark.parametrize("make", WELL.values(), ids=WELL)
def test_settings_that_go_together_are_taken(make: Callable[[], object]) -> None:
    assert make() is not None


OPENINGS: dict[str, tuple[Any, Any, str]] = {
    "settings that are none": (put(refuse), {"timer_ms": 5}, "settings must be a Settings, not dict"),
    "empty settings that are none": (put(refuse), {}, "settings must be a Settings, not dict"),
    "lanes that are no mapping": ([wb.Lane(refuse)], SETTINGS, "lanes must be a mapping of kind to Lane, not list"),
    "a lane that is none": ({"put": refuse}, SETTINGS, "lane 'put' must be a Lane, not function"),
    "batches larger than memory": (
        put(refuse, trigger=wb.Trigger(bytes=2**20 + 1)), SETTINGS, "Trigger.bytes is 1,048,577, more than"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("lanes", "settings", "says"), OPENINGS.values(), ids=OPENINGS)
def test_an_engine_is_not_opened_with(fs: MemoryFileSystem, lanes: Any, settings: Any, says: str) -> None:
    with pytest.raises(wb.ConfigError, match=says):
        open_engine(fs, lanes, settings=settings)
    assert fs.files == {}


# --- arguments --------------------------------------------------------------------------------------------------------

NOW = time.time()
ARGUMENTS: dict[str, tuple[Callable[[wb.Engine], object], str]] = {
    "a negative timeout": (lambda e: e.submit("put", key=b"k", timeout=-5), "timeout is -5"),
    "a timeout that is none": (lambda e: e.submit_many("put", [(b"k", b"")], timeout="5"), "timeout is '5'"),  # type: ignore[arg-type]
    "a timeout without end": (lambda e: e.submit("put", key=b"k", timeout=float("inf")), "timeout is inf"),
    "a delay from now on": (lambda e: e.submit("put", key=b"k", not_before=5), r"Seconds since 1970: time.time\(\) \+ 5"),
    "a deadline from now on": (lambda e: e.submit("put", key=b"k", deadline=5), r"deadline must be .*time.time\(\) \+ 5"),
    "milliseconds": (lambda e: e.submit("put", key=b"k", not_before=NOW * 1_000), "not_before must .* in milliseconds"),
    "a date long ago": (
        lambda e: e.submit("put", key=b"k", not_before=datetime(1999, 1, 1, tzinfo=UTC)), "not_before must be"
    ),
    "a deadline before its delay": (
        lambda e: e.submit("put", key=b"k", deadline=NOW + 3_600, not_before=NOW + 7_200), "not_before is"
    ),
    "three in a tuple": (lambda e: e.submit_many("put", [(b"k", b"v", 3)]), "not a tuple of 3"),  # type: ignore[list-item]
    "a list for a pair": (lambda e: e.submit_many("put", [[b"k", b"v"]]), "not list"),  # type: ignore[list-item]
    "a text for LSNs to drop": (lambda e: e.drop("x"), "named by LSNs.* not by 'x'"),  # type: ignore[arg-type]
    "a number to drop": (lambda e: e.drop(3), "named by LSNs"),  # type: ignore[arg-type]
    "a text for LSNs to requeue": (lambda e: e.requeue("x"), "named by LSNs"),  # type: ignore[arg-type]
    "texts to requeue": (lambda e: e.requeue(["x"]), "named by LSNs"),  # type: ignore[list-item]
}  # fmt: skip


@pytest.mark.parametrize(("call", "says"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_a_wrong_argument_is_named(
    fs: MemoryFileSystem, call: Callable[[wb.Engine], object], says: str
) -> None:
    with open_engine(fs, put(Recorder())) as engine:
        with pytest.raises(wb.ConfigError, match=says):
            call(engine)
        assert engine.stats().submitted == 0


def test_a_repeated_idempotency_key_counts_whatever_the_payload(fs: MemoryFileSystem) -> None:
    recorder = Recorder()
    with open_engine(fs, put(recorder)) as engine:
        first = engine.submit("put", key=b"k", payload=b"one", idempotency_key=b"once")
        again = engine.submit("put", key=b"k", payload=b"two", idempotency_key=b"once")
        assert again.lsn == first.lsn
        engine.flush(timeout=30)
    assert [payload for _, _, payload in recorder.applied] == [b"one"]
