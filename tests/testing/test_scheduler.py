"""One thread at a time, chosen by the seed; virtual time; deadlocks and deaths."""

from __future__ import annotations

import pytest

from walbatch.testing.simulation.clock import ManualClock, SeededEntropy
from walbatch.testing.simulation.scheduler import Deadlock, Livelock, ProcessKilled, Scheduler

SECOND = 1_000_000_000


def race(seed: int) -> tuple[list[int], str]:
    """The order in which three threads get a lock, and the trace."""
    scheduler = Scheduler(seed)
    order: list[int] = []

    def main() -> None:
        lock = scheduler.condition()

        def work(number: int) -> None:
            for _ in range(3):
                with lock:
                    order.append(number)

        threads = [
            scheduler.spawn(f"t{number}", lambda number=number: work(number))  # type: ignore[misc]
            for number in range(3)
        ]
        for thread in threads:
            assert thread.join()

    scheduler.run(main)
    return order, scheduler.trace


def test_the_same_seed_gives_the_same_trace_and_other_seeds_other_orders() -> None:
    assert race(7) == race(7)
    assert len({race(seed)[1] for seed in range(20)}) > 10
    assert len({tuple(race(seed)[0]) for seed in range(20)}) > 5


def test_time_jumps_when_all_threads_wait() -> None:
    scheduler = Scheduler()

    def main() -> int:
        before = scheduler.clock.now_ns
        assert not scheduler.event().wait(3600 * SECOND)
        return scheduler.clock.now_ns - before

    assert scheduler.run(main) == pytest.approx(3600 * SECOND, rel=1e-6)


def test_a_notification_comes_before_the_deadline() -> None:
    scheduler = Scheduler()

    def main() -> tuple[bool, bool]:
        condition = scheduler.condition()
        ready: list[int] = []

        def tell() -> None:
            scheduler.event().wait(SECOND)
            with condition:
                ready.append(1)
                condition.notify_all()

        scheduler.spawn("teller", tell)
        with condition:
            told = condition.wait(10 * SECOND)
            late = condition.wait(SECOND)
        return told, late

    assert scheduler.run(main) == (True, False)


def test_a_deadlock_names_every_thread_and_what_it_waits_for() -> None:
    scheduler = Scheduler()

    def main() -> None:
        event = scheduler.event()
        scheduler.spawn("helper", event.wait)
        scheduler.event().wait()

    with pytest.raises(Deadlock, match=r"main: an event at test_scheduler.py:\d+; helper: an event"):
        scheduler.run(main)


def test_a_thread_that_is_left_waiting_for_ever_is_a_deadlock_too() -> None:
    scheduler = Scheduler()
    with pytest.raises(Deadlock, match="helper"):
        scheduler.run(lambda: scheduler.spawn("helper", lambda: scheduler.event().wait()))


def test_threads_that_spin_are_stopped() -> None:
    scheduler = Scheduler(steps_max=1000)

    def main() -> None:
        while True:
            scheduler.step("spin")

    with pytest.raises(Livelock, match="after 1,001 steps"):
        scheduler.run(main)


def test_a_killed_process_never_makes_another_call() -> None:
    calls: list[str] = []
    scheduler = Scheduler(3, on_step=lambda call, detail: calls.append(call), crash_at=30)
    survived: list[str] = []

    def stubborn() -> None:
        lock = scheduler.condition()
        try:
            while True:
                with lock:
                    lock.wait(SECOND)
        finally:
            with lock:
                survived.append("took a lock after death")

    def main() -> None:
        for number in range(3):
            scheduler.spawn(f"t{number}", stubborn)
        stubborn()

    with pytest.raises(ProcessKilled):
        scheduler.run(main)
    assert len(calls) == 30
    assert not survived
    with pytest.raises(RuntimeError, match="ended"):
        scheduler.step("from outside")


def test_what_a_thread_dies_of_is_raised() -> None:
    scheduler = Scheduler()

    def fail() -> None:
        raise ValueError("in a thread")

    with pytest.raises(ValueError, match="in a thread"):
        scheduler.run(lambda: scheduler.spawn("t", fail).join())


def test_what_the_first_thread_dies_of_ends_the_process() -> None:
    scheduler = Scheduler()

    def spin() -> None:
        while True:
            scheduler.step("spin")

    def main() -> None:
        scheduler.spawn("for ever", spin)
        raise ValueError("in main")

    with pytest.raises(ValueError, match="in main"):
        scheduler.run(main)
    assert scheduler.steps < 1_000


def test_a_lock_that_is_taken_twice_is_an_error_and_no_wait_for_ever() -> None:
    scheduler = Scheduler()

    def main() -> None:
        lock = scheduler.condition()
        with lock, lock:
            pass

    with pytest.raises(AssertionError, match="not re-entrant"):
        scheduler.run(main)


def test_the_wall_clock_jumps_and_monotonic_time_does_not() -> None:
    clock = ManualClock()
    before, wall = clock.monotonic_ns(), clock.wall_ns()
    clock.jump_wall(-7200 * SECOND)
    assert clock.wall_ns() < wall - 7000 * SECOND
    assert clock.monotonic_ns() > before


def test_chance_repeats() -> None:
    assert SeededEntropy(1).random_bytes(16) == SeededEntropy(1).random_bytes(16)
    assert SeededEntropy(1).random_bytes(16) != SeededEntropy(2).random_bytes(16)
    assert 0 <= SeededEntropy(1).uniform() < 1
