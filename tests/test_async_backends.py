"""Async backends as a user of an engine sees them: what ends a call, what overlaps with nothing, and who may close."""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest

import walbatch as wb
from tests.memory import MemoryFileSystem, environment
from tests.support import DEADLINE_S, FAST, QUICK_RETRY, wait_until
from walbatch import limits

SETTINGS = wb.Settings(segment_bytes=2**16, memory_bytes_max=2**20, timer_ms=1, checkpoint_ms=5)
STEADY = wb.RetryPolicy(base_s=0.001, ceiling_s=0.001, breaker_failures=10**6, breaker_s=0.001, breaker_s_max=0.001)  # fmt: skip
"""Tries again at once, whatever happens."""


def open_engine(fs: MemoryFileSystem, backend: Any, **lane: Any) -> wb.Engine:
    settings = {"trigger": FAST, "retry": QUICK_RETRY, **lane}
    return wb.Engine.open(
        "/q", lanes={"put": wb.Lane(backend, **settings)}, settings=SETTINGS, environment=environment(fs)
    )


@pytest.fixture
def fs() -> MemoryFileSystem:
    return MemoryFileSystem()


class Stubborn:
    """A backend whose first calls go on until they are let go, whatever they are told, and write then."""

    def __init__(self, *, stubborn: int = 1) -> None:
        self.go = threading.Event()
        self.stubborn = stubborn
        self.begun = 0
        self.alive = 0
        self.alive_max = 0
        self.cancelled = 0
        self.written: list[bytes] = []

    async def apply(self, batch: wb.Batch) -> None:
        self.begun += 1
        self.alive += 1
        self.alive_max = max(self.alive, self.alive_max)
        try:
            if self.begun <= self.stubborn:
                await self._hold_on()
            self.written += map(bytes, batch.payloads)
        finally:
            self.alive -= 1

    async def _hold_on(self) -> None:
        while not self.go.is_set():
            try:
                await asyncio.sleep(0.001)
            except asyncio.CancelledError:
                self.cancelled += 1


# --- what ends a call -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["key", "shard"])
@pytest.mark.parametrize("overdue", ["wait", None], ids=["asked to wait", "by default"])
def test_an_ordered_shard_waits_for_a_coroutine_that_does_not_end(
    fs: MemoryFileSystem, order: str, overdue: str | None
) -> None:
    backend = Stubborn()
    with open_engine(
        fs, backend, order=order, overdue=overdue, timeout_s=0.02, trigger=wb.Trigger(count=1)
    ) as engine:
        engine.submit("put", key=b"k", payload=b"old")
        younger = engine.submit("put", key=b"k", payload=b"new")
        wait_until(lambda: backend.cancelled == 1, what="it is told to end")
        wait_until(lambda: waits(engine), what="the shard waits")
        assert "stuck" in names_of(engine)
        assert (backend.begun, backend.cancelled) == (1, 1)
        assert not younger.done
        backend.go.set()
        younger.result(DEADLINE_S)
    assert backend.alive_max == 1
    assert backend.written == [b"old", b"new"], "what it answers all the same counts"


def waits(engine: wb.Engine) -> bool:
    """Whether a shard waits for a call, after it was told to end and had time to."""
    return "the shard waits for it" in str(engine.stats().lanes["put"].last_error)


def names_of(engine: wb.Engine) -> set[str]:
    return {str(reason.name) for reason in engine.health().reasons}


def test_what_a_cancelled_coroutine_does_in_order_to_end_overlaps_with_nothing(fs: MemoryFileSystem) -> None:
    rolling_back, rolled_back = threading.Event(), threading.Event()
    alive: list[int] = []
    overlaps: list[int] = []
    tries: list[int] = []

    async def apply(batch: wb.Batch) -> None:
        overlaps.extend(alive)
        alive.append(len(batch))
        tries.append(len(batch))
        try:
            if len(tries) == 1:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            rolling_back.set()
            await asyncio.to_thread(rolled_back.wait, DEADLINE_S)
            raise
        finally:
            alive.pop()

    with open_engine(fs, apply, timeout_s=0.05) as engine:
        ticket = engine.submit("put", key=b"k")
        assert rolling_back.wait(DEADLINE_S)
        engine.submit("put", key=b"k")
        assert not ticket.done
        rolled_back.set()
        ticket.result(DEADLINE_S)
        assert not engine.dead_letters()
    assert overlaps == []


def test_calls_that_are_given_up_are_counted_and_bounded(fs: MemoryFileSystem) -> None:
    backend = Stubborn(stubborn=10**6)
    with open_engine(fs, backend, overdue="retry", timeout_s=0.002, retry=STEADY) as engine:
        ticket = engine.submit("put", key=b"k")
        wait_until(
            lambda: "waits for it" in str(engine.stats().lanes["put"].last_error),
            what="no more may be given up",
        )
        assert "abandoned" in names_of(engine)
        assert backend.alive == limits.ABANDONED_MAX + 1
        backend.go.set()
        ticket.result(DEADLINE_S)
    assert backend.alive_max == limits.ABANDONED_MAX + 1


@pytest.mark.parametrize(
    ("lane", "overtakes"),
    [({"order": "key"}, False), ({"order": "shard"}, False), ({"order": "none"}, True)],
    ids=["by key", "by shard", "free"],
)
def test_by_default_a_call_is_given_up_only_where_nothing_can_be_overtaken(
    fs: MemoryFileSystem, lane: dict[str, str], *, overtakes: bool
) -> None:
    backend = Stubborn()
    with open_engine(fs, backend, timeout_s=0.02, **lane) as engine:
        ticket = engine.submit("put", key=b"k", payload=b"v")
        if overtakes:
            ticket.result(DEADLINE_S)
            assert backend.alive == 1
        else:
            wait_until(lambda: waits(engine), what="the shard waits")
        assert (backend.alive, backend.begun) == (1, 1 + overtakes)
        backend.go.set()
        ticket.result(DEADLINE_S)


# --- closing ----------------------------------------------------------------------------------------------------------


def test_the_store_stays_locked_until_a_coroutine_has_ended(
    fs: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_graces(monkeypatch)
    backend = Stubborn()
    engine = open_engine(fs, backend, timeout_s=0.02, retry=STEADY)
    engine.submit("put", key=b"k", payload=b"old")
    wait_until(lambda: backend.cancelled == 1, what="it is told to end")
    report = engine.close(drain=False, timeout=0.01)
    assert report.reason == "timeout: a backend has not returned; the store stays locked until it does"
    assert backend.alive == 1
    with pytest.raises(wb.StoreLocked):
        open_engine(fs, Stubborn(stubborn=0))
    backend.go.set()
    again = Stubborn(stubborn=0)
    open_when_free(fs, again).close()
    assert backend.alive == 0
    assert set(backend.written + again.written) == {b"old"}


def test_close_cancels_a_coroutine_that_would_not_return(
    fs: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_graces(monkeypatch)
    entered, ended = threading.Event(), threading.Event()

    async def apply(batch: wb.Batch) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    engine = open_engine(fs, apply, timeout_s=None)
    engine.submit("put", key=b"k", payload=b"v")
    assert entered.wait(DEADLINE_S)
    assert engine.close(drain=False, timeout=0.01).remaining == 1
    assert ended.is_set()
    again = Stubborn(stubborn=0)
    with open_engine(fs, again) as engine:
        engine.flush(timeout=DEADLINE_S)
    assert again.written == [b"v"]


async def hold_a_task(go: threading.Event) -> None:
    while not go.is_set():
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0.001)


async def hold_a_thread(go: threading.Event) -> None:
    await asyncio.to_thread(go.wait, DEADLINE_S)


@pytest.mark.parametrize("hold", [hold_a_task, hold_a_thread])
def test_the_store_stays_locked_while_anything_runs_that_a_call_has_left_behind(
    fs: MemoryFileSystem,
    hold: Callable[[threading.Event], Coroutine[Any, Any, None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shorten_graces(monkeypatch)
    monkeypatch.setattr("walbatch.backends.eventloop.CLOSE_WAIT_S", 0.01)
    go = threading.Event()
    tasks: list[asyncio.Task[None]] = []

    async def apply(batch: wb.Batch) -> None:
        tasks.append(asyncio.get_running_loop().create_task(hold(go)))
        await asyncio.sleep(0)

    engine = open_engine(fs, apply)
    engine.submit("put", key=b"k")
    report = engine.close(timeout=DEADLINE_S)
    assert (
        report.reason == "timeout: a backend's close has not returned; the store stays locked until it does"
    )
    with pytest.raises(wb.StoreLocked):
        open_engine(fs, apply)
    go.set()
    open_when_free(fs, Stubborn(stubborn=0)).close()


def shorten_graces(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `close` waits for in vain takes no time."""
    for name in ("STOP_GRACE_NS", "INTERRUPT_GRACE_NS"):
        monkeypatch.setattr(f"walbatch.engine.closing.{name}", 100_000_000)


def open_when_free(fs: MemoryFileSystem, backend: Any) -> wb.Engine:
    """Open the store as soon as the engine before has given it back."""
    opened: list[wb.Engine] = []

    def is_open() -> bool:
        with suppress(wb.StoreLocked):
            opened.append(open_engine(fs, backend))
        return bool(opened)

    wait_until(is_open, what="the store is free")
    opened[0].flush(timeout=DEADLINE_S)
    return opened[0]


async def close_here(engine: wb.Engine) -> wb.CloseReport:
    return engine.close(timeout=None)


async def close_in_a_thread(engine: wb.Engine) -> wb.CloseReport:
    return await asyncio.to_thread(engine.close, timeout=None)


async def close_in_a_task(engine: wb.Engine) -> wb.CloseReport:
    return await asyncio.get_running_loop().create_task(close_here(engine))


async def close_as_async_engine(engine: wb.Engine) -> wb.CloseReport:
    return await wb.AsyncEngine(engine).close(timeout=None)


@pytest.mark.parametrize("close", [close_here, close_in_a_thread, close_in_a_task, close_as_async_engine])
def test_an_async_backend_may_close_the_engine(
    fs: MemoryFileSystem, close: Callable[[wb.Engine], Coroutine[Any, Any, wb.CloseReport]]
) -> None:
    reports: list[wb.CloseReport] = []

    async def apply(batch: wb.Batch) -> None:
        reports.append(await close(engine))

    engine = open_engine(fs, apply)
    ticket = engine.submit("put", key=b"k")
    ticket.result(DEADLINE_S)
    assert [report.reason for report in reports] == [
        "closing: called from a backend, which must return first"
    ]
    assert engine.close(timeout=DEADLINE_S).remaining == 0
    open_when_free(fs, apply).close(drain=False)


def test_a_task_that_outlives_its_call_does_not_wait_for_close(fs: MemoryFileSystem) -> None:
    """It holds up the event loop, which closing waits for."""
    applied = asyncio.Event()
    reports: list[wb.CloseReport] = []
    tasks: list[asyncio.Task[None]] = []

    async def close_later() -> None:
        await applied.wait()
        reports.append(engine.close(timeout=None))

    async def apply(batch: wb.Batch) -> None:
        if not tasks:
            tasks.append(asyncio.get_running_loop().create_task(close_later()))
            await asyncio.sleep(0)
        else:
            applied.set()

    engine = open_engine(fs, apply)
    for _ in range(2):
        engine.submit("put", key=b"k").result(DEADLINE_S)
    wait_until(lambda: bool(reports), what="close has returned")
    assert reports[0].reason.startswith("closing")
    assert engine.close(timeout=DEADLINE_S).remaining == 0


def test_what_a_call_has_started_and_outlives_it_may_wait_for_close(fs: MemoryFileSystem) -> None:
    """The call has returned, so closing does not wait for it."""
    applied = threading.Event()
    reports: list[wb.CloseReport] = []

    def close_later() -> None:
        assert applied.wait(DEADLINE_S)
        reports.append(engine.close(timeout=DEADLINE_S))

    async def apply(batch: wb.Batch) -> None:
        threading.Thread(target=contextvars.copy_context().run, args=(close_later,), daemon=True).start()
        await asyncio.sleep(0)

    engine = open_engine(fs, apply)
    engine.submit("put", key=b"k").result(DEADLINE_S)
    applied.set()
    wait_until(lambda: bool(reports), what="close has returned")
    assert reports[0].remaining == 0
    assert not reports[0].reason.startswith("closing")


# --- what a backend raises --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), BaseException("odd")])
def test_whatever_a_coroutine_raises_the_batch_is_tried_again(
    fs: MemoryFileSystem, error: BaseException
) -> None:
    failures = iter([error, error])

    async def apply(batch: wb.Batch) -> None:
        failure = next(failures, None)
        if failure is not None:
            raise failure

    with open_engine(fs, apply) as engine:
        engine.submit("put", key=b"k").result(DEADLINE_S)
        assert engine.stats().state == "open"


def test_a_task_that_exits_costs_no_operation_anything(fs: MemoryFileSystem) -> None:
    tasks: list[asyncio.Task[None]] = []

    async def leave() -> None:
        sys.exit(3)

    async def apply(batch: wb.Batch) -> None:
        task = asyncio.get_running_loop().create_task(leave())
        await asyncio.wait([task])
        tasks.append(task)

    retry = wb.RetryPolicy(base_s=0.001, ceiling_s=0.002, attempts=1, batch_retries=0)
    with open_engine(fs, apply, retry=retry, trigger=wb.Trigger(count=2)) as engine:
        for number in range(20):
            engine.submit("put", key=b"%d" % number)
        engine.flush(timeout=DEADLINE_S)
        stats = engine.stats()
        assert (stats.applied, stats.dead, stats.lanes["put"].retried) == (20, 0, 0)
    assert {repr(task.exception()) for task in tasks} == {"SystemExit(3)"}


class Mute(Exception):
    """It cannot say what it is."""

    def __str__(self) -> str:
        return str(self.missing)  # type: ignore[attr-defined]  # that is its mistake


class Unfinished(wb.Throttled):
    """Its `__init__` does not call that of its base."""

    def __init__(self, text: str) -> None:
        self.text = text


class Hostile(wb.RetryBatch):
    """It cannot even be asked how long to wait."""

    @property
    def after(self) -> float:
        raise ZeroDivisionError

    @after.setter
    def after(self, value: float) -> None:
        pass


class UnfinishedRetry(wb.Retry):
    """An outcome without a wait."""

    def __init__(self) -> None:
        pass


BROKEN: dict[str, Callable[[], Any]] = {
    "an exception that cannot say what it is": Mute,
    "one whose init does not call that of its base": lambda: Unfinished("slow down"),
    "one that cannot be asked": Hostile,
    "an outcome whose init does not call that of its base": UnfinishedRetry,
}


@pytest.mark.parametrize("make", BROKEN.values(), ids=BROKEN.keys())
def test_a_class_of_the_backends_own_that_is_broken_stops_nothing(
    fs: MemoryFileSystem, make: Callable[[], Any]
) -> None:
    answers = iter([make(), make()])

    def apply(batch: wb.Batch) -> Any:
        answer = next(answers, None)
        if isinstance(answer, BaseException):
            raise answer
        return None if answer is None else [answer] * len(batch)

    with open_engine(fs, apply) as engine:
        engine.submit("put", key=b"k").result(DEADLINE_S)
        assert engine.stats().state == "open"
        assert not engine.dead_letters()
