"""Closing from where it is awkward: in the middle of another call, from a signal handler, over backends that do not end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

import walbatch as wb
from tests.memory import MemoryFileSystem, environment
from tests.runtime.fakes import Caller
from tests.support import FAST, QUICK_RETRY, Recorder, wait_until
from walbatch.engine import closing
from walbatch.metrics import HealthCheck
from walbatch.runtime.clock import RealCondition, RealThreads

ROOT = "/q"
SETTINGS = wb.Settings(segment_bytes=2**16, memory_bytes_max=2**20, timer_ms=1, checkpoint_ms=1)
NEVER = wb.Trigger(count=10_000, linger_ms=3_600_000)
DEADLINE_NS = 30 * 10**9


def open_engine(
    lanes: dict[str, wb.Lane], fs: MemoryFileSystem, *, settings: wb.Settings = SETTINGS, threads: Any = None
) -> wb.Engine:
    ports = environment(fs) if threads is None else replace(environment(fs), threads=threads)
    return wb.Engine.open(ROOT, lanes=lanes, settings=settings, environment=ports)


@pytest.fixture
def fs() -> MemoryFileSystem:
    return MemoryFileSystem()


def put(backend: Any, **settings: Any) -> dict[str, wb.Lane]:
    return {"put": wb.Lane(backend, **{"trigger": FAST, "retry": QUICK_RETRY, **settings})}


# --- in the middle of another call ---------------------------------------------------------------------------------------


class Moments(RealThreads):
    """Does something at one moment of a thread: with a lock just taken or given back, or inside a call of the disk."""

    def __init__(self, fs: MemoryFileSystem) -> None:
        fs.fail = lambda call, path: self.pass_by()
        self.seen = 0
        self._at = -1
        self._ident = 0
        self._act: Callable[[], object] = list

    def condition(self) -> RealCondition:
        moments = self

        class Watched(RealCondition):
            def __enter__(self) -> Any:
                taken = super().__enter__()
                moments.pass_by()
                return taken

            def __exit__(self, *exc: object) -> None:
                super().__exit__(*exc)
                moments.pass_by()

        return Watched()

    def pass_by(self) -> None:
        if threading.get_ident() != self._ident:
            return
        self.seen += 1
        if self.seen == self._at:
            self._act()

    def during(self, call: Callable[[], object], *, at: int, act: Callable[[], object]) -> object:
        """Make the call, and `act` at the moment of that number. Whatever error of the engine it ends with."""
        self.seen, self._at, self._act, self._ident = 0, at, act, threading.get_ident()
        try:
            return call()
        except wb.WalbatchError as error:
            return error
        finally:
            self._ident = 0


CALLS: dict[str, Callable[[wb.Engine], object]] = {
    "submit": lambda engine: engine.submit("put", key=b"k"),
    "submit with a key": lambda engine: engine.submit("put", key=b"k", idempotency_key=b"once"),
    "submit_nowait": lambda engine: engine.submit_nowait("put", key=b"k").wait_durable(30),
    "submit_many": lambda engine: engine.submit_many("put", [(b"k", b"v")] * 3),
    "stats": lambda engine: engine.stats(),
    "health": lambda engine: engine.health(),
    "status": lambda engine: engine.status(1),
    "pause": lambda engine: engine.pause("put"),
    "configure": lambda engine: engine.configure("put", timeout_s=7),
    "requeue": lambda engine: engine.requeue(),
    "drop": lambda engine: engine.drop([2]),
    "close": lambda engine: engine.close(timeout=30),
}


@pytest.mark.parametrize("name", CALLS)
def test_closing_in_the_middle_of_a_call_waits_for_nothing_that_the_call_holds(name: str) -> None:
    at = 0
    while True:
        at += 1
        fs = MemoryFileSystem()
        moments = Moments(fs)
        rejecting = lambda batch: [wb.Rejected("no") if p == b"bad" else wb.Applied() for p in batch.payloads]  # noqa: E731
        engine = open_engine(put(rejecting), fs, threads=moments)
        engine.submit_many("put", [(b"a", b"good"), (b"b", b"bad")])
        engine.flush(timeout=30)
        reports: list[wb.CloseReport] = []

        def close(engine: wb.Engine = engine, reports: list[wb.CloseReport] = reports) -> None:
            reports.append(engine.close(drain=False, timeout=1))

        call = Caller(lambda: moments.during(lambda: CALLS[name](engine), at=at, act=close))  # noqa: B023 - waited for
        assert call.wait().error is None
        last = engine.close(timeout=30)
        assert not last.reason.startswith(("closing", "failed")), last
        if not reports:
            assert moments.seen < at
            break
        open_engine(put(Recorder()), fs).close()
    assert at > 2


def test_a_call_that_was_cut_into_by_close_goes_on_and_its_operation_is_in_the_log(
    fs: MemoryFileSystem,
) -> None:
    moments = Moments(fs)
    engine = open_engine(put(None), fs, threads=moments)
    reports = []

    def submit() -> object:
        return moments.during(
            lambda: engine.submit("put", key=b"k", payload=b"v"),
            at=8,
            act=lambda: reports.append(engine.close()),
        )

    ticket = Caller(submit).wait().result
    assert reports[0].reason.startswith("closing: called in the middle of another call")
    assert isinstance(ticket, wb.Ticket)
    assert ticket.durable
    engine.close()
    recorder = Recorder()
    with open_engine(put(recorder), fs) as engine:
        engine.flush(timeout=30)
    assert recorder.applied == [(1, b"k", b"v")]


def test_another_engine_is_closed_in_the_middle_of_a_call_and_waited_for(fs: MemoryFileSystem) -> None:
    moments = Moments(fs)
    engine = open_engine(put(Recorder()), fs, threads=moments)
    other = open_engine(put(Recorder()), MemoryFileSystem())
    reports = []
    Caller(lambda: moments.during(engine.stats, at=1, act=lambda: reports.append(other.close()))).wait()
    assert [report.reason for report in reports] == ["drained"]
    engine.close()


@pytest.fixture
def on_signal() -> Iterator[Callable[[Callable[[], object]], None]]:
    before = signal.getsignal(signal.SIGUSR1)

    def call(act: Callable[[], object]) -> None:
        signal.signal(signal.SIGUSR1, lambda number, frame: act())

    yield call
    signal.signal(signal.SIGUSR1, before)


def test_a_signal_handler_that_closes_while_the_program_waits_for_a_result_drains_and_returns_a_report(
    fs: MemoryFileSystem, on_signal: Callable[[Callable[[], object]], None]
) -> None:
    engine = open_engine(put(Recorder(), trigger=NEVER), fs)
    reports = []
    on_signal(lambda: reports.append(engine.close(timeout=30)))
    ticket = engine.submit("put", key=b"k")
    main = threading.get_ident()

    def signal_once_it_waits() -> None:
        _, settled = ticket.promises

        def waits() -> bool:
            event: Any = settled._event
            return event is not None and bool(event._waiters)

        wait_until(waits, what="the main thread waits")
        signal.pthread_kill(main, signal.SIGUSR1)

    sender = Caller(signal_once_it_waits)
    assert ticket.result(timeout=30) is None
    sender.wait()
    assert [report.reason for report in reports] == ["drained"]


# --- backends that do not end ---------------------------------------------------------------------------------------------


class Ending(Recorder):
    """A backend whose `close` does something."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__()
        self.act = act
        self.closed = threading.Event()

    def close(self) -> None:
        self.closed.set()
        self.act()


def test_a_backend_whose_close_does_not_return_keeps_the_store_locked_and_nobody_waiting(
    fs: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closing, "STOP_GRACE_NS", 20_000_000)
    go = threading.Event()
    engine = open_engine(put(Ending(lambda: go.wait(30))), fs)
    report = Caller(lambda: engine.close(timeout=0.01)).wait().result
    assert (
        report.reason == "timeout: a backend's close has not returned; the store stays locked until it does"
    )
    with pytest.raises(wb.StoreLocked):
        open_engine(put(Recorder()), fs)
    go.set()
    wait_until(lambda: not fs.locks, what="the store is given back")
    open_engine(put(Recorder()), fs).close()


@pytest.mark.parametrize("error", [RuntimeError("no"), SystemExit(1), KeyboardInterrupt()])
def test_whatever_a_backend_raises_when_it_is_closed_the_others_are_closed_and_the_store_given_back(
    fs: MemoryFileSystem, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise error

    bad, good = Ending(fail), Ending(list)
    engine = open_engine({"a": wb.Lane(bad), "b": wb.Lane(good)}, fs)
    assert engine.close(timeout=30).reason == "drained"
    assert good.closed.is_set()
    assert "failed; it counts as closed" in caplog.text
    open_engine({"a": wb.Lane(None), "b": wb.Lane(None)}, fs).close()


def test_a_backend_may_close_its_engine_while_it_is_closed(fs: MemoryFileSystem) -> None:
    reports = []
    engine = open_engine(put(Ending(lambda: reports.append(engine.close()))), fs)
    assert Caller(lambda: engine.close(timeout=30)).wait().result.reason == "drained"
    assert [report.reason for report in reports] == [
        "closing: called from a backend, which must return first"
    ]


def test_closing_at_once_ends_a_drain_that_is_under_way(fs: MemoryFileSystem) -> None:
    inside, go = threading.Event(), threading.Event()

    def apply(batch: wb.Batch) -> None:
        inside.set()
        assert go.wait(30)

    engine = open_engine(put(apply, trigger=wb.Trigger(count=1), order="shard"), fs)
    engine.submit_many("put", [(b"k", b"v")] * 3)
    assert inside.wait(30)
    draining = Caller(lambda: engine.close(timeout=None))
    wait_until(lambda: engine.stats().state == "closing", what="the drain has begun")
    hurrying = Caller(lambda: engine.close(drain=False))
    wait_until(lambda: engine._dispatcher._flow.stopping, what="the drain has ended")
    go.set()
    assert draining.wait().result == hurrying.wait().result
    assert draining.result.remaining == 2


# --- what a drain leaves out ----------------------------------------------------------------------------------------------


def test_a_drain_does_not_wait_for_room_among_the_dead_letters(fs: MemoryFileSystem) -> None:
    settings = replace(SETTINGS, dead_letters_max=1)
    applied: list[bytes] = []

    def apply(batch: wb.Batch) -> list[Any]:
        applied.extend(payload for payload in batch.payloads if payload != b"bad")
        return [wb.Rejected("no") if payload == b"bad" else wb.Applied() for payload in batch.payloads]

    patient = wb.RetryPolicy(base_s=0.001, ceiling_s=3_600)
    engine = open_engine(put(apply, retry=patient, trigger=wb.Trigger(count=1)), fs, settings=settings)
    engine.submit("put", key=b"a", payload=b"bad")
    engine.flush(timeout=30)
    engine.submit_many("put", [(b"b", b"bad"), (b"b", b"behind it"), (b"c", b"good")])
    report = Caller(lambda: engine.close(timeout=None)).wait().result
    assert report.reason == "drained, except for what is delayed, paused, or has no backend that works"
    assert report.remaining == 2
    assert applied == [b"good"]


def test_a_drain_does_not_wait_for_room_for_what_has_missed_its_deadline(fs: MemoryFileSystem) -> None:
    settings = replace(SETTINGS, dead_letters_max=1)
    recorder = Recorder(lambda batch: [wb.Rejected("no")] if batch.payloads == (b"bad",) else None)
    engine = open_engine(put(recorder, trigger=wb.Trigger(count=1)), fs, settings=settings)
    engine.submit("put", key=b"a", payload=b"bad")
    engine.flush(timeout=30)
    engine.pause("put")
    deadline = time.time() + 0.05
    engine.submit("put", key=b"k", payload=b"late", deadline=deadline)
    engine.submit("put", key=b"k", payload=b"behind it")
    shard = engine._dispatcher.lanes[0].shards[0]
    wait_until(lambda: time.time() > deadline, what="its deadline has passed")
    engine.resume("put")
    wait_until(lambda: bool(shard.unburied), what="there was no room for it")
    assert Caller(lambda: engine.close(timeout=None)).wait().result.remaining == 2


def test_delayed_operations_that_fill_a_shards_memory_are_told_and_waited_for_by_nobody(
    fs: MemoryFileSystem,
) -> None:
    recorder = Recorder()
    engine = open_engine(put(recorder), fs)
    tomorrow = time.time() + 86_400
    for n in range(900):
        engine.submit_nowait("put", key=b"d%d" % n, payload=b"x" * 1_000, not_before=tomorrow)
    engine.submit_many("put", [(b"o%d" % n, b"") for n in range(100)])
    shard = engine._dispatcher.lanes[0].shards[0]
    wait_until(lambda: shard.is_clogged, what="they fill the memory")
    engine.flush(timeout=30)
    assert [reason.name for reason in engine.health().reasons] == [HealthCheck.DELAYED]
    report = Caller(lambda: engine.close(timeout=None)).wait().result
    assert report.remaining == 1_000
    with open_engine(put(recorder), fs, settings=replace(SETTINGS, memory_bytes_max=2**23)) as engine:
        engine.flush(timeout=30)
        assert not engine.health().reasons
    assert recorder.lsns == list(range(901, 1_001)), "with room for all of them the others go on"
