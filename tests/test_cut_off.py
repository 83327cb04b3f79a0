"""Submissions that a signal handler's exception cuts off, and threads that meet in one step: nothing is told too early or twice."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import weakref
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import walbatch as wb
from tests.support import FAST
from walbatch.core.commit_group import CommitGroup
from walbatch.runtime import promises
from walbatch.runtime.clock import RealThreads
from walbatch.runtime.gathering import Sheaf
from walbatch.runtime.promises import LOGGED, Promises
from walbatch.runtime.ticket import APPLIED, Fate

SOON_S = 5.0


class Signalled(Exception):
    """What the handler raises."""


def once(function: Callable[..., Any], action: Callable[[], None]) -> Callable[..., Any]:
    """The function; its first call does something else before."""
    left = [action]

    def called(*arguments: Any, **named: Any) -> Any:
        if left:
            left.pop()()
        return function(*arguments, **named)

    return called


def cut() -> None:
    """A signal arrives."""
    raise Signalled


def test_who_joins_a_group_whose_leader_was_cut_off_is_told_only_once_it_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with wb.Engine.open(tmp_path / "q", {"put": wb.Lane(lambda _: None, trigger=FAST)}) as engine:
        for _ in range(20):
            with monkeypatch.context() as patch:
                patch.setattr(CommitGroup, "add", once(CommitGroup.add, cut))
                with pytest.raises(Signalled):
                    engine.submit("put", key=b"k", payload=b"cut off")
            ticket = engine.submit("put", key=b"k", payload=b"joined")
            assert ticket.lsn is not None
            assert ticket.lsn <= engine._committer.durable_lsn


def submitted(
    path: Path, patch: Callable[[wb.AsyncEngine], None]
) -> tuple[list[tuple[bytes, bytes]], list[bytes]]:
    """What a backend got, and what was acknowledged, of three tasks and one more later."""
    applied: list[tuple[bytes, bytes]] = []
    acknowledged: list[bytes] = []

    async def submit(engine: wb.AsyncEngine, name: bytes) -> None:
        with contextlib.suppress(Signalled, TimeoutError, wb.WalbatchError):
            async with asyncio.timeout(SOON_S):
                await engine.submit("put", key=name, payload=name)
            acknowledged.append(name)

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        lane = wb.Lane(
            lambda batch: applied.extend(zip(batch.keys, batch.payloads, strict=True)), trigger=FAST
        )
        async with await wb.AsyncEngine.open(path, {"put": lane}) as engine:
            patch(engine)
            await asyncio.gather(*(submit(engine, name) for name in (b"1", b"2", b"3")))
            await submit(engine, b"4")

    asyncio.run(main())
    return applied, acknowledged


def test_a_cut_off_hand_over_submits_nothing_twice_and_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sheaf, "went", once(Sheaf.went, cut))
    applied, acknowledged = submitted(tmp_path / "q", lambda _: None)
    assert b"4" in acknowledged
    assert len(applied) == len(set(applied))


def test_a_task_that_is_cut_off_while_it_gathers_mixes_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Row(list[Any]):
        __iadd__ = once(list.__iadd__, cut)

    made = Sheaf.__init__

    def make(sheaf: Sheaf, *arguments: Any) -> None:
        made(sheaf, *arguments)
        sheaf.row = Row()

    monkeypatch.setattr(Sheaf, "__init__", make)
    applied, acknowledged = submitted(tmp_path / "q", lambda _: None)
    assert all(key == payload for key, payload in applied)
    assert {key for key, _ in applied} >= set(acknowledged)


def test_nothing_passes_an_operation_of_the_same_key_that_waits_for_room(tmp_path: Path) -> None:
    applied: list[bytes] = []

    async def main() -> None:
        lane = wb.Lane(lambda batch: applied.extend(batch.payloads), trigger=FAST)
        async with await wb.AsyncEngine.open(tmp_path / "q", {"put": lane}) as engine:
            committer = engine.engine._committer
            refusal = committer._refusal
            full = wb.Overloaded("disk_bytes_max", value=1, maximum=1, hint="")
            committer._refusal = lambda count, size: full if size > 1000 else refusal(count, size)  # type: ignore[method-assign]
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await engine.submit("put", key=b"k", payload=bytes(2000))
            with contextlib.suppress(wb.Overloaded):
                engine.submit_nowait("put", key=b"k", payload=b"newer")
            committer._refusal = refusal  # type: ignore[method-assign]
            await engine.submit("put", key=b"other")

    asyncio.run(main())
    assert b"newer" not in applied or applied.index(b"newer") > applied.index(bytes(2000))


def test_a_loop_that_ended_while_its_operations_were_committed_is_not_kept(tmp_path: Path) -> None:
    with wb.Engine.open(tmp_path / "q", {"put": wb.Lane(lambda _: None, trigger=FAST)}) as engine:
        shared = wb.AsyncEngine(engine)
        log = engine._committer._log
        sync, ended = log.sync, threading.Event()

        def slow() -> None:
            ended.wait(SOON_S)
            sync()

        log.sync = slow  # type: ignore[method-assign]
        loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []

        async def leave() -> None:
            loops.append(weakref.ref(asyncio.get_running_loop()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.01):
                    await shared.submit("put", key=b"k")

        asyncio.run(leave())
        ended.set()
        engine.flush(timeout=SOON_S)
        asyncio.run(leave())  # the one that was used last may be kept
        engine.flush(timeout=SOON_S)
        gc.collect()
        assert loops[0]() is None


def beside(action: Callable[[], object]) -> Callable[[], None]:
    """Another thread does it now, if nothing holds it up."""

    def run() -> None:
        thread = threading.Thread(target=action)
        thread.start()
        thread.join(0.2)

    return run


def test_an_operation_is_settled_while_another_thread_asks_for_an_earlier_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = RealThreads()
    place = Promises()
    fates = [Fate(threads, first, first + 9, None) for first in (100, 200)]
    for fate in fates:
        place.add(LOGGED, fate)
    earlier = Fate(threads, 5, 5, None)

    def ask() -> None:
        place.find_or_add(LOGGED, earlier)

    search = bisect_right

    def found(*arguments: Any) -> int:
        at = search(*arguments)
        monkeypatch.setattr(promises, "bisect_right", search)
        beside(ask)()
        return at

    monkeypatch.setattr(promises, "bisect_right", found)
    place.resolve(LOGGED, 203)
    assert fates[1].outcome(203) == APPLIED


def test_forgetting_a_fate_does_not_forget_a_later_one_of_the_same_operation() -> None:
    threads = RealThreads()
    place = Promises()
    fate = Fate(threads, 7, 7, None)
    later = Fate(threads, 7, 7, None)
    place.add(LOGGED, fate)
    scope = place._scopes[LOGGED]

    asks = [threading.Thread(target=lambda: place.find_or_add(LOGGED, later))]
    left = asks.copy()

    class Meeting(dict[int, Any]):
        def get(self, *arguments: Any) -> Any:
            found = super().get(*arguments)
            if left:
                thread = left.pop()
                thread.start()
                thread.join(0.2)
            return found

    scope.fates = Meeting(scope.fates)
    del fate
    asks[0].join(SOON_S)
    place.resolve(LOGGED, 7)
    assert later.outcome(7) == APPLIED


def test_a_wait_that_was_cut_off_leaves_no_promise_that_nobody_keeps() -> None:
    fate = Fate(RealThreads(), 1, 1, None)

    class Meeting(dict[int, Any]):
        def setdefault(self, *arguments: Any) -> Any:
            fate.settle(1, APPLIED)  # by another thread
            super().setdefault(*arguments)
            raise Signalled

    fate._promises = Meeting()
    with pytest.raises(Signalled):
        fate.settled(1)
    fate._promises = dict(fate._promises)
    assert fate.settled(1).wait(0)
