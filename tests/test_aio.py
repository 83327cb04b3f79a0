"""The engine for asyncio: the same promises, kept for tasks that are many, impatient and cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

import walbatch as wb
from tests.memory import MemoryFileSystem, environment
from tests.support import FAST, QUICK_RETRY, Recorder, wait_until
from walbatch import aio
from walbatch.runtime import gathering
from walbatch.runtime.gathering import COUNT_MAX

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
        assert not ticket._fate.settled(ticket._number)._listeners
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


# --- what the tasks of a loop submit at once --------------------------------------------------------------------------


def gathered(engine: wb.AsyncEngine, count: int, **options: Any) -> list[asyncio.Task[wb.AsyncTicket]]:
    """Tasks that submit one operation each, payloads b"0", b"1" and so on."""
    return [
        asyncio.create_task(engine.submit("put", key=b"%d" % n, payload=b"%d" % n, **options))
        for n in range(count)
    ]


def counted_calls(engine: wb.AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many operations each call of the committer brings, from now on."""
    committer, calls = engine.engine._committer, list[int]()
    submit = committer.submit

    def count(lane: int, shards: Any, keys: Any, *arguments: Any, **options: Any) -> Any:
        answer = submit(lane, shards, keys, *arguments, **options)
        calls.append(len(keys))
        return answer

    monkeypatch.setattr(committer, "submit", count)
    return calls


def test_what_tasks_submit_in_one_iteration_is_handed_over_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        recorder = Recorder()
        async with await open_engine(MemoryFileSystem(), recorder) as engine:
            calls = counted_calls(engine, monkeypatch)
            tickets = await asyncio.gather(*gathered(engine, 300))
            assert calls == [300]
            assert [ticket.lsn for ticket in tickets] == list(range(1, 301))
            assert all(ticket.durable for ticket in tickets)
            await asyncio.gather(*gathered(engine, COUNT_MAX + 2))
            assert calls == [300, COUNT_MAX, 2]
            assert "Gathering of 0 in 0 sheaves" in repr(engine._gathering)
        assert len(set(recorder.lsns)) == COUNT_MAX + 302

    run(main())


def test_each_operation_keeps_its_own_lane_priority_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        seen: dict[bytes, tuple[str, int, bytes]] = {}

        def apply(batch: wb.Batch) -> None:
            for one in batch:
                seen[one.key] = batch.lane, one.priority, one.payload

        lanes = {
            name: wb.Lane(apply, trigger=FAST, shards=shards) for name, shards in (("put", 1), ("get", 5))
        }
        async with await wb.AsyncEngine.open(
            "/q", lanes=lanes, settings=SETTINGS, environment=environment(MemoryFileSystem())
        ) as engine:
            calls = counted_calls(engine, monkeypatch)
            wanted: dict[bytes, tuple[str, int, bytes]] = {}
            tasks = []
            for number in range(60):
                key, payload = b"%d" % number, bytes([number]) * (number * 200)
                lane, priority = ("put", "get")[number // 7 % 2], 3 + number // 20
                wanted[key] = lane, priority, payload
                given = bytearray(payload) if number % 5 == 0 else payload
                tasks.append(
                    asyncio.create_task(engine.submit(lane, key=key, payload=given, priority=priority))
                )
            await asyncio.gather(*tasks)
            assert len(calls) < 20
            await engine.flush(timeout=30)
        assert seen == wanted

    run(main())


def test_bytes_that_change_after_they_were_submitted_are_stored_as_they_were() -> None:
    async def main() -> None:
        recorder = Recorder()
        async with await open_engine(MemoryFileSystem(), recorder) as engine:
            payload = bytearray(b"before")
            task = asyncio.create_task(engine.submit("put", key=b"k", payload=payload))
            await asyncio.sleep(0)
            payload[:] = b"behind"
            await task
        assert [content for _, _, content in recorder.applied] == [b"before"]

    run(main())


def test_what_is_submitted_in_another_way_comes_behind_what_was_gathered() -> None:
    async def main() -> None:
        async with await open_engine(MemoryFileSystem(), Recorder()) as engine:
            first = gathered(engine, 10)
            await asyncio.sleep(0)
            assert engine.submit_nowait("put", key=b"k").lsn == 11
            second = gathered(engine, 10)
            await asyncio.sleep(0)
            assert list(await engine.submit_many("put", [(b"k", b"")])) == [22]
            third = gathered(engine, 10)
            await asyncio.sleep(0)
            assert (await engine.submit("put", key=b"k", idempotency_key=b"once")).lsn == 33
            tickets = await asyncio.gather(*first, *second, *third)
            assert [ticket.lsn for ticket in tickets] == [*range(1, 11), *range(12, 22), *range(23, 33)]

    run(main())


def test_cancelling_a_task_does_not_take_back_what_was_gathered() -> None:
    async def main() -> None:
        recorder = Recorder()
        async with await open_engine(MemoryFileSystem(), recorder) as engine:
            tasks = gathered(engine, 10)
            await asyncio.sleep(0)
            assert engine.stats().submitted_lsn == 0, "nothing is handed over yet"
            for task in tasks[::2]:
                task.cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            for number, outcome in enumerate(outcomes):
                assert isinstance(outcome, asyncio.CancelledError if number % 2 == 0 else wb.AsyncTicket)
        assert sorted(int(payload) for _, _, payload in recorder.applied) == list(range(10))

    run(main())


def test_a_close_answers_everybody_whose_operation_was_gathered() -> None:
    async def main() -> None:
        recorder = Recorder()
        engine = await open_engine(MemoryFileSystem(), recorder)
        tasks = gathered(engine, 10)
        await asyncio.sleep(0)
        assert (await engine.close()).reason == "drained"
        assert all(ticket.durable for ticket in await asyncio.gather(*tasks))
        assert len(recorder.applied) == 10

        engine = await open_engine(MemoryFileSystem(), recorder)
        tasks = gathered(engine, 10)
        await asyncio.sleep(0)
        engine.engine.close()  # of which this loop hears nothing
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(outcome, wb.EngineClosed) for outcome in outcomes)

    run(main())


async def full_engine(recorder: Recorder, **settings: Any) -> wb.AsyncEngine:
    """An engine that does not flush, whose log has room for some operations."""
    settings = {"segment_bytes": 4096, "disk_bytes_max": 16384, "timer_ms": 1, "checkpoint_ms": 1, **settings}
    engine = await wb.AsyncEngine.open(
        "/q", lanes={"put": wb.Lane(recorder, trigger=FAST)}, settings=wb.Settings(**settings),
        environment=environment(MemoryFileSystem()),
    )  # fmt: skip
    engine.pause("put")
    await engine.submit("put", key=b"first")  # a log that holds nothing unsettled is never full
    return engine


incompressible = random.Random(1).randbytes


def test_where_there_is_not_room_for_all_some_are_taken_and_the_others_refused_at_their_timeout() -> None:
    async def main() -> None:
        recorder = Recorder()
        engine = await full_engine(recorder)
        outcomes = await asyncio.gather(
            *(
                engine.submit("put", key=b"%d" % n, payload=incompressible(500), timeout=0)
                for n in range(100)
            ),
            return_exceptions=True,
        )
        taken = [outcome for outcome in outcomes if isinstance(outcome, wb.AsyncTicket)]
        refused = [outcome for outcome in outcomes if isinstance(outcome, wb.Overloaded)]
        assert len(taken) + len(refused) == 100
        assert taken
        assert {outcome.limit for outcome in refused} == {"disk_bytes_max"}
        assert [ticket.lsn for ticket in taken] == list(range(2, len(taken) + 2))
        engine.resume("put")
        results = asyncio.gather(*(ticket.result(timeout=30) for ticket in taken))
        assert await results == [None] * len(taken)
        await engine.close()
        assert len(recorder.applied) == len(taken) + 1

    run(main())


def test_all_who_wait_for_room_get_it_in_their_order() -> None:
    async def main() -> None:
        recorder = Recorder()
        engine = await full_engine(recorder)
        tasks = [
            asyncio.create_task(engine.submit("put", key=b"k", payload=incompressible(700), timeout=None))
            for _ in range(60)
        ]
        await until(lambda: engine._gathering is not None and engine._gathering._refusal is not None)
        assert not all(task.done() for task in tasks)
        engine.resume("put")
        tickets = await asyncio.gather(*tasks)
        assert [ticket.lsn for ticket in tickets] == list(range(2, 62))
        assert await asyncio.gather(*(ticket.result(timeout=30) for ticket in tickets)) == [None] * 60
        await engine.close()

    run(main())


def test_the_timeout_of_a_submit_is_that_of_the_settings_unless_the_call_says_otherwise() -> None:
    async def main() -> None:
        engine = await full_engine(Recorder(), submit_timeout_s=0.01)
        tasks = [
            asyncio.create_task(engine.submit("put", key=b"k", payload=incompressible(900)))
            for _ in range(40)
        ]
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert any(isinstance(outcome, wb.Overloaded) for outcome in outcomes)
        with pytest.raises(wb.Overloaded):
            await engine.submit_many("put", [(b"k", incompressible(9000))])
        with pytest.raises(wb.ConfigError, match="timeout"):
            await engine.submit("put", key=b"k", timeout=-2)
        await engine.close(drain=False)

    run(main())


def test_what_is_gathered_without_room_for_it_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "BYTES_MAX", 100_000)

    async def main() -> None:
        recorder = Recorder()
        engine = await full_engine(recorder)
        payload = incompressible(9000)
        tasks = [
            asyncio.create_task(engine.submit("put", key=b"k", payload=payload, timeout=None))
            for _ in range(5)
        ]
        await until(lambda: engine._gathering is not None and engine._gathering._refusal is not None)
        for _ in range(20):
            tasks += [
                asyncio.create_task(engine.submit("put", key=b"k", payload=payload, timeout=None))
                for _ in range(5)
            ]
            await asyncio.sleep(0.001)
        assert engine._gathering is not None
        assert engine._gathering._bytes <= 100_000 + 6 * len(payload)
        with pytest.raises(wb.Overloaded, match="disk_bytes_max"):
            await engine.submit("put", key=b"k", payload=payload, timeout=0)
        engine.resume("put")
        assert len({(await task).lsn for task in tasks}) == 105
        await engine.close()

    run(main())


def test_large_operations_are_handed_over_as_soon_as_they_are_as_much_as_may_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gathering, "BYTES_MAX", 100_000)

    async def main() -> None:
        async with await open_engine(MemoryFileSystem(), Recorder()) as engine:
            calls = counted_calls(engine, monkeypatch)
            payload = incompressible(20_000)
            tickets = await asyncio.gather(
                *(engine.submit("put", key=b"k", payload=payload) for _ in range(17))
            )
            assert calls == [5, 5, 5, 2]
            assert [ticket.lsn for ticket in tickets] == list(range(1, 18))

    run(main())


def test_a_hand_over_that_is_interrupted_says_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with await open_engine(MemoryFileSystem(), Recorder()) as engine:
            tasks = gathered(engine, 3)
            await asyncio.sleep(0)

            def interrupt(*_: object, **__: object) -> None:
                raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(engine.engine._committer, "submit", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    engine._hand_over()
            for task in tasks:
                with pytest.raises(wb.DurabilityUnknown):
                    await task
            assert (await engine.submit("put", key=b"k")).durable

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
