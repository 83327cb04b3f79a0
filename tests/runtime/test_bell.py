"""A bell wakes its sleeper, whenever it was rung."""

from __future__ import annotations

from tests.runtime.fakes import Caller
from tests.support import wait_until
from walbatch.runtime.bell import Bell, Bells
from walbatch.runtime.clock import RealThreads


def test_a_bell_that_was_rung_before_lets_nobody_sleep() -> None:
    bell = Bell(RealThreads())
    for _ in range(3):
        bell.ring()
    assert repr(bell) == "<Bell rung>"
    bell.sleep(None)
    assert repr(bell) == "<Bell silent>"
    bell.sleep(1)  # rung three times, it was heard once


def test_a_bell_wakes_its_sleeper_again_and_again() -> None:
    bell, heard = Bell(RealThreads()), []

    def hear() -> None:
        for number in range(50):
            bell.sleep(None)
            heard.append(number)

    sleeper = Caller(hear)
    for number in range(50):
        bell.ring()
        wait_until(lambda number=number: len(heard) > number, what="it was heard")  # type: ignore[misc]  # bound here
    sleeper.wait()


def test_everybody_is_woken() -> None:
    threads = RealThreads()
    cond = threads.condition()
    bells = Bells(threads, cond)

    def wait() -> None:
        with cond:
            cond.wait(30 * 10**9)

    sleepers = [
        Caller(lambda: bells.timer.sleep(None)),
        Caller(lambda: bells.reader.sleep(None)),
        Caller(wait),
    ]

    def wake() -> bool:
        with cond:
            bells.everybody()
        return all(sleeper.done for sleeper in sleepers)

    wait_until(wake, what="all are awake")
    assert repr(bells).startswith("<Bells timer <Bell ")
