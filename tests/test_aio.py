"""The engine for asyncio: the same promises, kept for tasks that are many, impatient and cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

import walbatch as wb
from tests.memory import MemoryFileSystem, environment
from tests.support import FAST, QUICK_RETRY, Recorder, wait_until
from walbatch import aio

NEVER = wb.Trigger(linger_ms=3_600_000)
SETTINGS = wb.Settings(segment_bytes=2**16, timer_ms=1, checkpoint_ms=5)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine, with a deadline."""

    async def bounded() -> None:
        async with asyncio.timeout(60):
            await coroutine

    asyncio.run(bounded())


async def open_engine(fs: MemoryFileSystem, backend: Any, **lane: Any) -> wb.AsyncEngine:
    lane = {"trigger": FAST, "retry": QUICK_RETRY, **lane}
    return await wb.AsyncEngine.open(
        "/q", lanes={"put": wb.Lane(backend, **lane)}, settings=SETTINGS, environment=environment(fs)
    )


class Held:
    """Holds the syncs of segments until it is told to let go."""

    def __init__(self, fs: MemoryFileSystem) -> None:
        self.go = threading.Event()
        self.reached = threading.Event()
        fs.fail = self._hold

    def _hold(self, call: str, path: str) -> None:
        if call == "datasync" and ".seg" in path:
            self.reached.set()
            assert self.go.wait(30)


async def until(condition: Any) -> None:
    """Wait for something that other threads bring about; the test's deadline bounds it."""
    while not condition():  # noqa: ASYNC110 - other threads set no asyncio event
        await asyncio.sleep(0.001)


# --- submitting and awaiting -----------------------------------------------------------------------------------------


def test_submit_is_durable_when_it_returns_and_the_result_is_the_backends(tmp_path: Path) -> None:
    async def main() -> None:
        def upper(batch: wb.Batch) -> list[wb.Applied]:
            return [wb.Applied(payload.upper()) for payload in batch.payloads]

        lanes = {"put": wb.Lane(upper, trigger=FAST)}
        async with await wb.AsyncEngine.open(tmp_path / "q", lanes=lanes) as engine:
            ticket = await engine.submit("put", key=b"k", payload=b"hello")
            assert ticket.durable
            assert (ticket.lsn, ticket.lane, ticket.durability) == (1, "put", "sync")
            assert await ticket.result(timeout=30) == b"HELLO"
            assert ticket.done
            assert "settled" in repr(ticket)
            assert repr(engine).startswith("<AsyncEngine")
            await ticket.wait_durable(timeout=0)
            assert list(await engine.submit_many("put", [(b"a", b"1"), (b"b", b"2")])) == [2, 3]
            later = engine.submit_nowait("put", key=b"k")
            await later.wait_durable(timeout=30)
            await engine.flush("put", timeout=30)
            assert engine.stats().lanes["put"].applied == 4

    run(main())


def test_a_thousand_tasks_share_commits() -> None:
    async def main() -> None:
        fs = MemoryFileSystem()
        recorder = Recorder()
        async with await open_engine(fs, recorder) as engine:
            held = Held(fs)
            tasks = [
                asyncio.create_task(engine.submit("put", key=b"%d" % (n % 9), payload=b"%d" % n))
                for n in range(1000)
            ]
            await until(held.reached.is_set)
            held.go.set()
            tickets = await asyncio.gather(*tasks)
            assert sorted(ticket.lsn or 0 for ticket in tickets) == list(range(1, 1001))
            assert engine.stats().commits < 50
            await asyncio.gather(*(ticket.result(timeout=30) for ticket in tickets))
        assert sorted(int(payload) for _, _, payload in recorder.applied) == list(range(1000))

    run(main())


def test_cancelling_tasks_that_wait_loses_nothing() -> None:
    async def main() -> None:
        fs = MemoryFileSystem()
        recorder = Recorder()
        async with await open_engine(fs, recorder) as engine:
            held = Held(fs)
            tasks = [
                asyncio.create_task(engine.submit("put", key=b"k", payload=b"%d" % n)) for n in range(100)
            ]
            await until(held.reached.is_set)
            await until(lambda: engine.stats().submitted_lsn == 100)
            for task in tasks[::2]:
                task.cancel()
            outcomes = asyncio.gather(*tasks, return_exceptions=True)
            held.go.set()
            for number, outcome in enumerate(await outcomes):
                assert isinstance(outcome, asyncio.CancelledError if number % 2 == 0 else wb.AsyncTicket)
            await engine.flush(timeout=30)
        assert [int(payload) for _, _, payload in recorder.applied] == list(range(100))

    run(main())


def test_a_wait_that_times_out_can_be_made_again_and_leaves_nothing_behind() -> None:
    async def main() -> None:
        engine = await open_engine(MemoryFileSystem(), Recorder(), trigger=NEVER)
        ticket = await engine.submit("put", key=b"k")
        for _ in range(50):
            with pytest.raises(wb.ResultTimeout):
                await ticket.result(timeout=0)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(ticket.result(), timeout=0)
        assert not ticket._ticket._settled._listeners
        await engine.flush(timeout=30)
        assert await ticket.result() is None
        await engine.close()

    run(main())


def test_a_task_waits_for_room_without_blocking_the_loop_and_is_refused_at_its_timeout() -> None:
    async def main() -> None:
        settings = wb.Settings(segment_bytes=4096, disk_bytes_max=16384, timer_ms=1, checkpoint_ms=1)
        recorder = Recorder()
        engine = await wb.AsyncEngine.open(
            "/q", lanes={"put": wb.Lane(recorder, trigger=FAST)}, settings=settings, environment=environment(MemoryFileSystem()),
        )  # fmt: skip
        engine.pause("put")
        payload = bytes(range(256)) * 12
        room = True
        while room:
            try:
                await engine.submit("put", key=b"k", payload=payload, timeout=0)
            except wb.Overloaded as error:
                assert error.limit == "disk_bytes_max"  # noqa: PT017 - it comes after some that were accepted
                room = False
        waiting = asyncio.create_task(engine.submit("put", key=b"k", payload=payload, timeout=None))
        await asyncio.sleep(0)
        assert not waiting.done()
        engine.resume("put")
        assert (await waiting).durable
        await engine.close()

    run(main())


def test_a_wrong_argument_is_refused_as_by_the_engine() -> None:
    async def main() -> None:
        async with await open_engine(MemoryFileSystem(), Recorder()) as engine:
            with pytest.raises(wb.ConfigError, match="unknown kind"):
                await engine.submit("get", key=b"k")
            with pytest.raises(wb.OperationTooLarge):
                await engine.submit("put", key=b"k" * 5000)

    run(main())


def test_an_unlogged_lane_is_acknowledged_at_once() -> None:
    async def main() -> None:
        async with await open_engine(MemoryFileSystem(), Recorder(), durability="none") as engine:
            ticket = await engine.submit("put", key=b"k")
            assert ticket.lsn is None
            with pytest.raises(wb.DurabilityUnknown):
                await ticket.wait_durable()
            assert await ticket.result(timeout=30) is None

    run(main())


# --- backends --------------------------------------------------------------------------------------------------------


def test_an_async_backend_runs_beside_the_loop_that_awaits_it() -> None:
    async def main() -> None:
        seen: list[bytes] = []

        async def apply(batch: wb.Batch) -> list[wb.Applied]:
            await asyncio.sleep(0)
            seen.extend(batch.keys)
            return [wb.Applied(len(key)) for key in batch.keys]

        async with await open_engine(MemoryFileSystem(), apply) as engine:
            tickets = await asyncio.gather(*(engine.submit("put", key=b"x" * n) for n in range(1, 20)))
            assert await asyncio.gather(*(ticket.result() for ticket in tickets)) == [
                ticket.lsn for ticket in tickets
            ]
        assert len(seen) == 19

    run(main())


def test_an_async_backend_that_fails_is_tried_again() -> None:
    async def main() -> None:
        failures = iter([OSError("down"), TimeoutError()])

        async def apply(batch: wb.Batch) -> None:
            await asyncio.sleep(0)
            if error := next(failures, None):
                raise error

        async with await open_engine(MemoryFileSystem(), apply) as engine:
            ticket = await engine.submit("put", key=b"k")
            assert await ticket.result(timeout=30) is None
            assert engine.stats().lanes["put"].failed_batches == 2

    run(main())


# --- loops -----------------------------------------------------------------------------------------------------------


def test_several_loops_use_one_engine_at_once() -> None:
    fs = MemoryFileSystem()
    recorder = Recorder()
    engine = asyncio.run(open_engine(fs, recorder))
    failures: list[BaseException] = []

    async def work(loop: int) -> None:
        tickets = await asyncio.gather(
            *(engine.submit("put", key=b"%d" % loop, payload=b"%d.%d" % (loop, n)) for n in range(100))
        )
        await asyncio.gather(*(ticket.result(timeout=30) for ticket in tickets))

    def in_a_loop(loop: int) -> None:
        try:
            run(work(loop))
        except BaseException as error:  # noqa: BLE001 - reported below
            failures.append(error)

    threads = [threading.Thread(target=in_a_loop, args=(loop,)) for loop in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert asyncio.run(engine.close()).reason == "drained"
    assert len(set(recorder.lsns)) == 600


def test_one_ticket_is_awaited_by_several_loops() -> None:
    fs = MemoryFileSystem()
    engine = asyncio.run(open_engine(fs, Recorder(), trigger=NEVER))
    ticket = engine.submit_nowait("put", key=b"k")
    threads = [threading.Thread(target=lambda: run(wait_for_both())) for _ in range(6)]
    ended: list[bool] = []

    async def wait_for_both() -> None:
        await ticket.wait_durable(timeout=30)
        await ticket.result(timeout=30)
        ended.append(True)

    for thread in threads:
        thread.start()
    engine.engine.flush(timeout=30)
    for thread in threads:
        thread.join(60)
    assert ended == [True] * 6
    engine.engine.close()


def test_a_loop_that_was_closed_with_a_task_waiting_holds_nobody_up() -> None:
    fs = MemoryFileSystem()
    recorder = Recorder()
    engine = asyncio.run(open_engine(fs, recorder))
    engine.pause("put")

    async def leave_waiting() -> None:
        ticket = await engine.submit("put", key=b"k", payload=b"left")
        waiting = asyncio.ensure_future(ticket.result())
        await asyncio.sleep(0)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting

    loop = asyncio.new_event_loop()
    abandoned = loop.create_task(leave_waiting())
    loop.run_until_complete(abandoned)
    forgotten = loop.create_task(engine.submit_nowait("put", key=b"k", payload=b"forgotten").result())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    engine.resume("put")
    wait_until(lambda: len(recorder.applied) == 2, what="both are applied although their loop is closed")

    async def go_on() -> None:
        ticket = await engine.submit("put", key=b"k", payload=b"new")
        assert await ticket.result(timeout=30) is None

    run(go_on())
    forgotten._log_destroy_pending = False  # type: ignore[attr-defined]  # its loop was closed on purpose
    del forgotten
    gc.collect()
    engine.engine.close()


# --- opening and closing ---------------------------------------------------------------------------------------------


def test_leaving_the_block_drains_unless_an_exception_is_on_its_way() -> None:
    async def main() -> None:
        fs = MemoryFileSystem()
        recorder = Recorder()
        with contextlib.suppress(ZeroDivisionError):
            async with await open_engine(fs, recorder, trigger=NEVER) as engine:
                await engine.submit("put", key=b"k")
                raise ZeroDivisionError
        assert recorder.applied == []
        async with await open_engine(fs, recorder, trigger=NEVER):
            pass
        assert recorder.lsns == [1]

    run(main())


def test_after_close_everything_is_refused_and_waiting_tasks_are_told() -> None:
    async def main() -> None:
        engine = await open_engine(MemoryFileSystem(), Recorder(), trigger=NEVER)
        ticket = await engine.submit("put", key=b"k")
        waiting = asyncio.create_task(ticket.result())
        flushing = asyncio.create_task(engine.flush())
        engine.pause("put")
        await asyncio.sleep(0)
        report = await engine.close(drain=False)
        assert report.remaining in {0, 1}
        for task in (waiting, flushing):
            with contextlib.suppress(
                wb.EngineClosed, wb.ConfigError
            ):  # a flush may find the lane paused first
                await task
        with pytest.raises(wb.EngineClosed):
            await engine.submit("put", key=b"k")
        with pytest.raises(wb.EngineClosed):
            await engine.submit_many("put", [(b"k", b"")])
        assert await engine.close() == report

    run(main())


def test_cancelling_a_close_does_not_stop_it() -> None:
    async def main() -> None:
        fs = MemoryFileSystem()
        gate = threading.Event()
        recorder = Recorder(lambda _: gate.wait(30) and None)
        engine = await open_engine(fs, recorder)
        await engine.submit("put", key=b"k")
        await until(lambda: engine.stats().lanes["put"].in_flight == 1)
        closing = asyncio.create_task(engine.close())
        await until(lambda: engine.stats().state == "closing")
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        gate.set()
        assert (await engine.close()).reason == "drained"
        assert not fs.locks

    run(main())


def test_flushes_that_nobody_ends_do_not_keep_the_engine_from_closing() -> None:
    async def main() -> None:
        def down(batch: wb.Batch) -> None:
            raise OSError("down")

        engine = await open_engine(MemoryFileSystem(), down)
        await engine.submit("put", key=b"k")
        flushing = [asyncio.create_task(engine.flush()) for _ in range(100)]
        await asyncio.sleep(0.01)
        for task in flushing[::2]:
            task.cancel()
        assert await asyncio.to_thread(lambda: "the application's own") == "the application's own"
        report = await engine.close(timeout=0.05)
        assert report.remaining == 1
        outcomes = await asyncio.gather(*flushing, return_exceptions=True)
        assert all(isinstance(outcome, (wb.EngineClosed, asyncio.CancelledError)) for outcome in outcomes)

    run(main())


def test_flushes_under_way_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aio, "FLUSHES_MAX", 3)

    async def main() -> None:
        gate = threading.Event()
        engine = await open_engine(MemoryFileSystem(), Recorder(lambda _: gate.wait(30) and None))
        await engine.submit("put", key=b"k")
        flushing = [asyncio.create_task(engine.flush()) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(wb.Overloaded, match="FLUSHES_MAX"):
            await engine.flush()
        gate.set()
        await asyncio.gather(*flushing)
        await engine.flush(timeout=30)
        await engine.close()

    run(main())


@pytest.mark.parametrize("early", [True, False])
def test_an_open_that_is_cancelled_does_not_leave_the_store_locked(early: bool) -> None:
    async def main() -> None:
        fs = MemoryFileSystem()
        await (await open_engine(fs, Recorder())).close()
        go, reached = threading.Event(), threading.Event()

        def hold(call: str, path: str) -> None:
            if call == "preallocate":
                reached.set()
                assert go.wait(30)

        fs.fail = hold
        opening = asyncio.create_task(open_engine(fs, Recorder()))
        await until(reached.is_set)
        if not early:
            go.set()
            wait_until(
                lambda: ("save_checkpoint", "state") in fs.calls[-200:],
                what="the engine runs, unseen by the loop",
            )
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        go.set()
        await until(lambda: not fs.locks)
        async with await open_engine(fs, Recorder()) as engine:
            assert (await engine.submit("put", key=b"k")).durable

    run(main())


def test_a_failed_sync_is_told_to_every_task_that_waits() -> None:
    async def main() -> None:
        fs = MemoryFileSystem()
        engine = await open_engine(fs, Recorder())

        def broken(call: str, path: str) -> None:
            if call == "datasync":
                raise OSError(5, "broken")

        fs.fail = broken
        outcomes = await asyncio.gather(
            *(engine.submit("put", key=b"k") for _ in range(100)), return_exceptions=True
        )
        assert all(isinstance(outcome, wb.StorageError) for outcome in outcomes)
        fs.fail = None
        assert (await engine.close()).reason.startswith("failed")

    run(main())
