"""Functions and async backends, as the engine's threads call them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from walbatch.backends.function import FunctionBackend, as_backend
from walbatch.errors import ConfigError, EngineClosed
from walbatch.ports import Backend, TransactionalBackend
from walbatch.types import Answer, Applied, Batch, CutReason, Failures, Mark, Retry

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 30

BATCH = Batch(
    lane="notify",
    shard=0,
    store=bytes(16),
    lsns=[1, 2],
    keys=[b"a", b"b"],
    payloads=[b"", b""],
    priorities=[5, 5],
    attempt=1,
    reason=CutReason.COUNT,
    mark=None,
)
ANSWERS: list[Answer] = [None, [Applied("x"), Retry(after=1)], Failures({1: Retry()})]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("walbatch-async")]


# --- functions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ANSWERS, ids=["None", "a list", "failures"])
def test_a_function_gets_the_batch_and_its_answer_passes_through(answer: Answer) -> None:
    seen: list[Batch] = []
    backend = FunctionBackend(lambda batch: seen.append(batch) or answer)  # type: ignore[func-returns-value]
    assert backend.apply(BATCH) is answer
    assert seen == [BATCH]
    assert threads() == [], "a sync function needs no event loop"


def test_what_a_function_raises_passes_through() -> None:
    def fail(batch: Batch) -> None:
        raise ZeroDivisionError(len(batch))

    with pytest.raises(ZeroDivisionError, match="2"):
        FunctionBackend(fail).apply(BATCH)


async def answer_later(batch: Batch) -> Answer:
    await asyncio.sleep(0)
    return [Applied(key) for key in batch.keys]


class AsyncCallable:
    """An object whose call is a coroutine."""

    async def __call__(self, batch: Batch) -> Answer:
        return await answer_later(batch)


class Eventually:
    """Awaitable, but no coroutine."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __await__(self) -> Any:
        return answer_later(self.batch).__await__()


ASYNC: dict[str, Callable[[Batch], Awaitable[Answer]]] = {
    "a coroutine function": answer_later,
    "a partial of one": functools.partial(answer_later),
    "an object with an async call": AsyncCallable(),
    "a function that gives a coroutine": lambda batch: answer_later(batch),  # noqa: PLW0108 - a plain function
    "a function that gives another awaitable": Eventually,
}


@pytest.mark.parametrize("function", [*ASYNC.values()][:4], ids=[*ASYNC][:4])
def test_an_async_function_is_waited_for(function: Callable[[Batch], Awaitable[Answer]]) -> None:
    backend = FunctionBackend(function)
    assert backend.apply(BATCH) == [Applied(b"a"), Applied(b"b")]
    backend.close()


def test_any_awaitable_is_waited_for() -> None:
    backend = FunctionBackend(lambda batch: Eventually(batch))  # noqa: PLW0108 - a class would be refused
    assert backend.apply(BATCH) == [Applied(b"a"), Applied(b"b")]
    backend.close()


def test_what_a_coroutine_raises_passes_through() -> None:
    async def fail(_: Batch) -> None:
        raise ZeroDivisionError

    backend = FunctionBackend(fail)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            backend.apply(BATCH)
    backend.close()


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_a_coroutine_that_would_end_the_interpreter_does_not_end_the_loop(error: type[BaseException]) -> None:
    """It is raised where the call is waited for, as from a function that is not async."""

    async def leave(_: Batch) -> None:
        raise error

    backend = FunctionBackend(leave)
    loops = set()
    for _ in range(2):
        with pytest.raises(error):
            backend.apply(BATCH)
        loops.update(threads())
    assert len(loops) == 1
    backend.close()


def run_on(backend: FunctionBackend, awaitable: Awaitable[object]) -> object:
    """Wait for something on the backend's loop."""
    return backend._finish(awaitable)


async def set_it(event: asyncio.Event) -> None:
    event.set()


TASKS: list[asyncio.Task[None]] = []
"""What nobody waits for; asyncio itself would forget it."""


def exit_in_a_task() -> None:
    async def leave() -> None:
        sys.exit(3)

    TASKS.append(asyncio.get_running_loop().create_task(leave()))


def stop_the_loop() -> None:
    asyncio.get_running_loop().stop()


@pytest.mark.parametrize("disturb", [exit_in_a_task, stop_the_loop])
def test_whatever_ends_the_loop_it_goes_on_with_all_calls_and_their_sessions(
    disturb: Callable[[], None],
) -> None:
    loops: list[asyncio.AbstractEventLoop] = []
    rounds = 5
    entered, go = threading.Event(), asyncio.Event()

    async def apply(batch: Batch) -> Answer:
        loops.append(asyncio.get_running_loop())
        if batch is not BATCH:
            entered.set()
            await go.wait()
        else:
            disturb()
            await asyncio.sleep(0.001)
        return None

    backend = FunctionBackend(apply)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(backend.apply, replace(BATCH))
        assert entered.wait(DEADLINE_S)
        for _ in range(rounds):
            assert backend.apply(BATCH) is None
        run_on(backend, set_it(go))
        assert other.result(DEADLINE_S) is None
    assert len(loops) == rounds + 1
    assert len(set(loops)) == 1
    backend.close()
    assert threads() == []


def test_a_loop_that_fails_is_a_matter_of_connection_and_the_next_call_gets_another_one() -> None:
    calls: list[asyncio.AbstractEventLoop] = []

    def fail() -> None:
        raise OSError(errno.EBADF, "the selector is closed")

    async def apply(_: Batch) -> None:
        loop: Any = asyncio.get_running_loop()
        calls.append(loop)
        if len(calls) == 1:
            loop._run_once = fail
            await asyncio.Event().wait()

    backend = FunctionBackend(apply)
    with pytest.raises(ConnectionError, match=r"event loop of the backend .*apply is gone"):
        backend.apply(BATCH)
    assert backend.apply(BATCH) is None
    assert len(set(calls)) == 2
    backend.close()
    assert threads() == []


def test_all_calls_share_one_loop_and_run_at_the_same_time() -> None:
    loops: set[asyncio.AbstractEventLoop] = set()
    together = asyncio.Barrier(3)

    async def meet(_: Batch) -> None:
        loops.add(asyncio.get_running_loop())
        await together.wait()

    backend = FunctionBackend(meet)
    with ThreadPoolExecutor(3) as pool:
        assert [*pool.map(backend.apply, [BATCH] * 3, timeout=DEADLINE_S)] == [None] * 3
    assert len(loops) == 1
    assert len(threads()) == 1
    backend.close()


def test_the_loop_thread_starts_with_the_first_awaitable_and_ends_with_close() -> None:
    backend = FunctionBackend(answer_later)
    assert threads() == []
    backend.apply(BATCH)
    assert threads() == ["walbatch-async-answer_later"]
    assert repr(backend) == "<FunctionBackend answer_later with its event loop>"
    backend.close()
    backend.close()
    assert threads() == []
    assert repr(backend) == "<FunctionBackend answer_later closed>"


def test_a_closed_backend_refuses_until_it_is_opened_again() -> None:
    backend = FunctionBackend(answer_later)
    backend.close()
    with pytest.raises(EngineClosed, match="answer_later is closed"):
        backend.apply(BATCH)
    backend.open("notify", 1, bytes(16))
    assert backend.apply(BATCH) == [Applied(b"a"), Applied(b"b")]
    backend.close()


def test_close_cancels_what_is_in_flight_and_its_caller_is_told() -> None:
    entered, cleaned = threading.Event(), threading.Event()

    async def wait_for_ever(_: Batch) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.set()

    backend = FunctionBackend(wait_for_ever)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(backend.apply, BATCH)
        assert entered.wait(DEADLINE_S)
        backend.close()
        with pytest.raises(EngineClosed, match="closed while it applied"):
            call.result(DEADLINE_S)
    assert cleaned.is_set()
    assert threads() == []


def test_a_coroutine_that_ends_itself_by_cancellation_is_not_mistaken_for_close() -> None:
    async def give_up(_: Batch) -> None:
        raise asyncio.CancelledError

    backend = FunctionBackend(give_up)
    with pytest.raises(Exception, match=r"^$") as caught:
        backend.apply(BATCH)
    assert not isinstance(caught.value, EngineClosed)
    backend.close()


def test_a_coroutine_that_blocks_the_loop_does_not_block_close_and_its_caller_waits_for_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("walbatch.backends.eventloop.CLOSE_WAIT_S", 0.05)
    entered, release = threading.Event(), threading.Event()

    async def block(_: Batch) -> None:
        entered.set()
        release.wait(DEADLINE_S)
        await asyncio.Event().wait()

    backend = FunctionBackend(block)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(backend.apply, BATCH)
        assert entered.wait(DEADLINE_S)
        backend.close()
        assert not backend.has_ended()
        assert repr(backend).endswith("closed, with tasks that have not ended>")
        assert not call.done()
        release.set()
        assert backend.has_ended(DEADLINE_S)
        with pytest.raises(EngineClosed):
            call.result(DEADLINE_S)
    assert threads() == []


# --- interrupting -------------------------------------------------------------------------------------------------


def test_an_interrupted_call_ends_when_its_coroutine_does_which_is_cancelled_once() -> None:
    entered, cancelled, go = threading.Event(), threading.Event(), threading.Event()
    cancellations: list[int] = []

    async def roll_back(_: Batch) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            while not go.is_set():
                try:
                    await asyncio.sleep(0.001)
                except asyncio.CancelledError:
                    cancellations.append(1)
            raise

    backend = FunctionBackend(roll_back)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(backend.apply, BATCH)
        assert entered.wait(DEADLINE_S)
        backend.interrupt(BATCH)
        assert cancelled.wait(DEADLINE_S)
        backend.interrupt(BATCH)
        run_on(backend, asyncio.sleep(0))  # the second one has arrived
        assert not call.done()
        go.set()
        with pytest.raises(CancelledError):
            call.result(DEADLINE_S)
    assert cancellations == []
    backend.interrupt(BATCH)  # nothing of it runs: nothing happens
    backend.close()


def test_what_an_interrupted_coroutine_answers_all_the_same_counts() -> None:
    entered = threading.Event()

    async def finish(_: Batch) -> Answer:
        entered.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return [Applied("x"), Applied("y")]
        return None

    backend = FunctionBackend(finish)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(backend.apply, BATCH)
        assert entered.wait(DEADLINE_S)
        backend.interrupt(BATCH)
        assert call.result(DEADLINE_S) == [Applied("x"), Applied("y")]
    backend.close()


# --- what outlives a call -----------------------------------------------------------------------------------------


async def ignore_cancellation(go: threading.Event) -> None:
    while not go.is_set():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0.001)


async def wait_in_a_thread(go: threading.Event) -> None:
    await asyncio.to_thread(go.wait, DEADLINE_S)


@pytest.mark.parametrize("left_behind", [ignore_cancellation, wait_in_a_thread])
def test_what_a_call_left_behind_has_not_ended_until_it_has(
    left_behind: Callable[[threading.Event], Coroutine[Any, Any, None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("walbatch.backends.eventloop.CLOSE_WAIT_S", 0.05)
    go = threading.Event()

    async def apply(_: Batch) -> None:
        TASKS.append(asyncio.get_running_loop().create_task(left_behind(go)))
        await asyncio.sleep(0)

    backend = FunctionBackend(apply)
    backend.apply(BATCH)
    backend.close()
    assert not backend.has_ended()
    go.set()
    assert backend.has_ended(None)
    assert threads() == []


def test_a_task_that_exits_when_it_is_cancelled_does_not_keep_others_from_ending() -> None:
    ended = []

    async def leave() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            sys.exit(3)

    async def end() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.001)
            ended.append(1)

    async def apply(_: Batch) -> None:
        loop = asyncio.get_running_loop()
        TASKS.extend([loop.create_task(leave()), loop.create_task(end())])
        await asyncio.sleep(0)

    backend = FunctionBackend(apply)
    backend.apply(BATCH)
    backend.close()
    assert backend.has_ended()
    assert ended == [1]


def test_a_backend_knows_its_own_thread() -> None:
    told: list[bool] = []

    async def apply(_: Batch) -> None:
        told.append(backend.is_own_thread())

    backend = FunctionBackend(apply)
    assert not backend.is_own_thread()
    backend.apply(BATCH)
    assert told == [True]
    assert not backend.is_own_thread()
    backend.close()


SCRIPTS = {
    "an unclosed backend does not keep the process alive": """
from tests.backends.test_function import BATCH, FunctionBackend, answer_later
print(len(FunctionBackend(answer_later).apply(BATCH)))
""",
    "a forked child is refused": """
import os
from tests.backends.test_function import BATCH, EngineClosed, FunctionBackend, answer_later
backend = FunctionBackend(answer_later)
backend.apply(BATCH)
child = os.fork()
if child == 0:
    try:
        backend.apply(BATCH)
    except EngineClosed:
        backend.close()
        os._exit(2)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
backend.close()
""",
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS.keys())
def test_the_loop_thread_and_its_process(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")


# --- as_backend ---------------------------------------------------------------------------------------------------


class Plain:
    """A backend with every optional part."""

    url = "lmdb:///data"
    key_bytes_max = 99

    def __init__(self) -> None:
        self.calls: list[str] = []

    def open(self, lane: str, shards: int, store: bytes) -> None:
        self.calls.append(f"open {lane} {shards}")

    def apply(self, batch: Batch) -> Answer:
        self.calls.append(f"apply {len(batch)}")
        return None

    def close(self) -> None:
        self.calls.append("close")


class Async:
    """The same, as coroutines."""

    url = "lmdb:///data"
    key_bytes_max = 99

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def open(self, lane: str, shards: int, store: bytes) -> None:
        self.calls.append(f"open {lane} {shards}")

    async def apply(self, batch: Batch) -> Answer:
        self.calls.append(f"apply {len(batch)}")
        return None

    async def close(self) -> None:
        self.calls.append("close")


class AsyncTransactional(Async):
    """One that holds marks."""

    async def applied_mark(self, shard: int) -> Mark:
        return Mark(watermark=shard)


class OnlyApply:
    """The least that an async backend can be."""

    async def apply(self, batch: Batch) -> Answer:
        return [Applied(lsn) for lsn in batch.lsns]


def test_a_synchronous_backend_is_used_as_it_is() -> None:
    target = Plain()
    assert as_backend(target) is target


@pytest.mark.parametrize("target", [Async(), AsyncTransactional()], ids=["plain", "transactional"])
def test_an_async_backend_is_wrapped_with_all_its_parts(target: Async) -> None:
    assert isinstance(as_backend(target), Backend)
    backend: Any = as_backend(target)
    assert (backend.url, backend.key_bytes_max) == (target.url, 99)
    backend.open("notify", 2, bytes(16))
    assert backend.apply(BATCH) is None
    backend.close()
    assert target.calls == ["open notify 2", "apply 2", "close"]
    assert repr(backend) == repr(target)
    assert threads() == []
    with pytest.raises(AttributeError):
        backend.payload_bytes_max  # noqa: B018 - the access is the test


def test_an_async_backend_is_closed_once_for_each_time_that_it_was_opened() -> None:
    target = Async()
    backend: Any = as_backend(target)
    for _ in range(2):
        backend.open("notify", 1, bytes(16))
        backend.close()
        backend.close()
    assert target.calls == ["open notify 1", "close"] * 2


def test_only_a_transactional_backend_is_taken_for_one() -> None:
    assert not isinstance(as_backend(Async()), TransactionalBackend)
    backend = as_backend(AsyncTransactional())
    assert isinstance(backend, TransactionalBackend)
    assert backend.applied_mark(7) == Mark(watermark=7)


def test_an_async_backend_needs_no_more_than_apply() -> None:
    backend: Any = as_backend(OnlyApply())
    backend.open("notify", 1, bytes(16))
    assert backend.apply(BATCH) == [Applied(1), Applied(2)]
    backend.close()


def test_a_function_becomes_a_backend() -> None:
    backend: Any = as_backend(answer_later)
    assert backend.apply(BATCH) == [Applied(b"a"), Applied(b"b")]
    assert backend.url is None
    backend.close()


NO_BACKENDS = {"a class": Plain, "a number": 7, "nothing": None, "a class of functions": AsyncCallable}


@pytest.mark.parametrize("target", NO_BACKENDS.values(), ids=NO_BACKENDS.keys())
def test_what_is_no_backend_is_refused(target: object) -> None:
    with pytest.raises(ConfigError, match="backend must be"):
        as_backend(target)
