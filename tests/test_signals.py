"""A signal handler that raises, at chance moments of the main thread's calls, while other threads submit."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import walbatch as wb
from tests.runtime.fakes import Caller
from tests.support import FAST

SUBMITS = 400


class Signalled(BaseException):
    """What the handler raises."""


class Alarm:
    """Raises in the main thread some time after it was set, unless it is quiet by then."""

    def __init__(self) -> None:
        self.armed = False

    def ring(self, *_: object) -> None:
        if self.armed:
            self.armed = False
            raise Signalled

    def call(self, function: Callable[[], object], seconds: float) -> bool:
        """Call it. Returns whether it came to its end."""
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            self.armed = True
            function()
            self.armed = False
        except Signalled:
            return False
        return True


@pytest.fixture
def alarm() -> Iterator[Alarm]:
    one = Alarm()
    before = signal.signal(signal.SIGALRM, one.ring)
    yield one
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_whatever_call_is_cut_off_nothing_is_lost_and_nobody_waits_for_ever(
    tmp_path: Path, alarm: Alarm
) -> None:
    applied: set[bytes] = set()

    def apply(batch: wb.Batch) -> None:
        applied.update(batch.payloads)

    lanes = {
        "put": wb.Lane(apply, trigger=FAST, shards=2),
        "soon": wb.Lane(apply, trigger=FAST, durability="interval", interval_ms=5),
    }
    engine = wb.Engine.open(tmp_path / "q", lanes=lanes)
    acknowledged: list[bytes] = []
    ended = threading.Event()

    def submit_on(thread: int) -> None:
        number = 0
        while not ended.is_set():
            payload = b"%d.%d" % (thread, number)
            ticket = engine.submit(("put", "soon")[thread % 2], key=payload, payload=payload)
            acknowledged.append(payload)
            if number % 5 == 0:
                ticket.result(timeout=30)
            number += 1

    others = [Caller(lambda thread=thread: submit_on(thread)) for thread in range(3)]  # type: ignore[misc]
    chance = random.Random(1)
    cut_off = 0
    for number in range(SUBMITS):
        payload = b"main.%d" % number
        ways: list[Callable[[Any], object]] = [
            lambda p: engine.submit_many("put", [(p, p)]),
            lambda p: engine.submit("put", key=p, payload=p).result(timeout=30),
            lambda p: engine.submit_nowait("put", key=p, payload=p).wait_durable(timeout=30),
            lambda p: engine.submit("soon", key=p, payload=p),
        ]
        way = chance.choice(ways)
        if alarm.call(lambda p=payload, way=way: way(p), chance.uniform(1e-5, 2e-3)):  # type: ignore[misc]
            acknowledged.append(payload)
        else:
            cut_off += 1
    ended.set()
    for caller in others:
        assert caller.wait().error is None
    assert engine.stats().state == "open"
    assert engine.close(timeout=30).reason == "drained"
    assert cut_off
    assert set(acknowledged) <= applied
