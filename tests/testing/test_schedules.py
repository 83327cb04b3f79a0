"""Schedules find the bugs of threads that they are made for, and repeat."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from walbatch.testing.simulation.scheduler import Deadlock, Scheduler
from walbatch.testing.simulation.schedules import BoundedSchedule, PrioritySchedule, RandomSchedule, Schedule


def count_without_lock(schedule: Schedule, threads: int = 2) -> int:
    """Each thread adds one to a number that it has read before: the classic lost update. Returns the number."""
    scheduler = Scheduler(schedule=schedule)
    number = 0

    def add() -> None:
        nonlocal number
        scheduler.step("read")
        read = number
        scheduler.step("write")
        number = read + 1

    def main() -> None:
        for thread in [scheduler.spawn(f"user-{index}", add) for index in range(threads)]:
            assert thread.join()

    scheduler.run(main)
    return number


def lock_in_two_orders(schedule: Schedule) -> None:
    scheduler = Scheduler(schedule=schedule)

    def main() -> None:
        first, second = scheduler.condition(), scheduler.condition()

        def one() -> None:
            with first, second:
                pass

        def other() -> None:
            with second, first:
                pass

        for thread in [scheduler.spawn("user-0", one), scheduler.spawn("user-1", other)]:
            thread.join()

    scheduler.run(main)


def searched(preemptions_max: int, branching: str = "user") -> Iterator[BoundedSchedule]:
    schedule: BoundedSchedule | None = BoundedSchedule(preemptions_max=preemptions_max, branching=branching)
    while schedule is not None:
        yield schedule
        schedule = schedule.following()


def test_a_search_without_preemptions_finds_no_lost_update_and_ends() -> None:
    found = [count_without_lock(schedule) for schedule in searched(0)]
    assert set(found) == {2}
    assert len(found) == 2  # either thread first


@pytest.mark.parametrize("branching", ["user", ""])
def test_a_search_with_one_preemption_finds_the_lost_update(branching: str) -> None:
    assert {count_without_lock(schedule) for schedule in searched(1, branching)} == {1, 2}


def test_a_search_visits_each_schedule_once() -> None:
    choices = []
    for schedule in searched(2):
        count_without_lock(schedule)
        choices.append(schedule.choices)
    assert len(choices) == len(set(choices)) > 5


def test_a_search_finds_locks_that_are_taken_in_two_orders() -> None:
    deadlocks = 0
    for schedule in searched(1):
        try:
            lock_in_two_orders(schedule)
        except Deadlock:
            deadlocks += 1
    assert deadlocks >= 1


@pytest.mark.parametrize("kind", [RandomSchedule, PrioritySchedule])
def test_chance_finds_both_bugs_and_repeats(kind: type[RandomSchedule | PrioritySchedule]) -> None:
    found = [count_without_lock(kind(seed)) for seed in range(200)]
    assert set(found) == {1, 2}
    assert found == [count_without_lock(kind(seed)) for seed in range(200)]

    def try_all() -> None:
        for seed in range(500):
            lock_in_two_orders(kind(seed))

    with pytest.raises(Deadlock):
        try_all()


def test_a_late_thread_is_found_by_priorities() -> None:
    """One thread has to be late by a hundred steps of another one: hopeless for a coin at each step."""

    def is_late(schedule: Schedule) -> bool:
        scheduler = Scheduler(schedule=schedule)
        steps: list[int] = []
        late: list[bool] = []

        def slow() -> None:
            scheduler.step("begin")
            late.append(len(steps) == 100)

        def main() -> None:
            thread = scheduler.spawn("slow", slow)
            for number in range(100):
                scheduler.step("work")
                steps.append(number)
            thread.join()

        scheduler.run(main)
        return late[0]

    assert any(is_late(PrioritySchedule(seed)) for seed in range(20))
    assert not any(is_late(RandomSchedule(seed)) for seed in range(20))
