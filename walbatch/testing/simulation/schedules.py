"""Schedules: who runs next, by chance, by priority with few changes, or by trying everything.

What is not here: the threads (`scheduler`). A schedule sees which threads can run, and names one.

The idea needed to read it: most bugs of threads need few switches at the right places. Random switching finds the easy ones;
a random order of priorities with few changes finds those that need a thread to be late for long; trying every switch
up to a bound proves that there is none among few threads.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final, Protocol, TypeVar

SWITCH_CHANCE: Final = 0.2
"""How often a thread that could go on hands the baton over."""

CHANGES: Final = 3
"""Changes of priority in a run: a bug of depth d is found with d - 1 of them."""

STEPS_GUESS: Final = 400
"""Steps among which the changes of priority are spread."""

PREEMPTIONS_MAX: Final = 2
"""Switches away from a thread that could have gone on, in an exhaustive search: two find nearly all known bugs."""


class Runnable(Protocol):
    """What a schedule sees of a thread."""

    name: str
    number: int
    waits_for: str
    """Empty while it can run."""


R = TypeVar("R", bound=Runnable)


class Schedule(Protocol):
    """Decides. The same schedule, asked the same, answers the same."""

    def at_step(self, me: R, live: Sequence[R]) -> R:
        """Who runs after this step of `me`, which could go on."""

    def of_ready(self, ready: Sequence[R]) -> R:
        """Who runs when the last one cannot go on. `ready` is not empty."""

    def choose(self, waiting: Sequence[R]) -> R:
        """Which of several is notified. `waiting` is not empty."""


def _ready(live: Sequence[R]) -> list[R]:
    return [thread for thread in live if not thread.waits_for]


class RandomSchedule:
    """Switches with a fixed chance at each step."""

    def __init__(self, seed: object, switch_chance: float = SWITCH_CHANCE) -> None:
        self._chance = random.Random(f"schedule {seed}")
        self._random = self._chance.random
        self._switch_chance = switch_chance

    def at_step(self, me: R, live: Sequence[R]) -> R:
        """Now and then another one."""
        return self.of_ready(_ready(live)) if self._random() < self._switch_chance else me

    def of_ready(self, ready: Sequence[R]) -> R:
        """Any."""
        return ready[int(self._random() * len(ready))]

    def choose(self, waiting: Sequence[R]) -> R:
        """Any."""
        return self.of_ready(waiting)


class PrioritySchedule:
    """Always the thread of the highest priority, in a random order that changes at few random steps.

    Source: Burckhardt, Kothari, Musuvathi, Nagarakatte: A Randomized Scheduler with Probabilistic Guarantees of
    Finding Bugs, ASPLOS 2010.
    """

    def __init__(self, seed: object, changes: int = CHANGES, steps: int = STEPS_GUESS) -> None:
        self._chance = random.Random(f"priorities {seed}")
        self._changes = sorted(self._chance.randrange(1, steps) for _ in range(changes))
        self._steps = 0
        self._priorities: dict[int, float] = {}
        self._lowest = 0.0

    def at_step(self, me: R, live: Sequence[R]) -> R:
        """The same one, but where its priority drops."""
        self._steps += 1
        if self._changes and self._steps >= self._changes[0]:
            del self._changes[0]
            self._lowest -= 1.0
            self._priorities[me.number] = self._lowest
        return self.of_ready(_ready(live))

    def of_ready(self, ready: Sequence[R]) -> R:
        """The highest."""
        return max(ready, key=self._priority)

    def choose(self, waiting: Sequence[R]) -> R:
        """The highest."""
        return self.of_ready(waiting)

    def _priority(self, thread: Runnable) -> float:
        return self._priorities.setdefault(thread.number, self._chance.random())


class BoundedSchedule:
    """One schedule of an exhaustive search over a few threads; `following` is the next one, None after the last.

    Threads whose name begins with `branching` are switched in every order with at most `preemptions_max` preemptions; all
    others run as soon as they can, in the order in which they were started (Musuvathi, Qadeer: Iterative Context
    Bounding for Systematic Testing of Multithreaded Programs, PLDI 2007). With `branching=""` all threads are switched, and
    each choice of another than the first one counts as a preemption, also where the last one waits (Emmi, Qadeer,
    Rakamaric: Delay-Bounded Scheduling, POPL 2011).
    """

    def __init__(
        self, choices: Sequence[int] = (), *, branching: str = "user", preemptions_max: int = PREEMPTIONS_MAX
    ) -> None:
        self.choices = tuple(choices)
        self._branching = branching
        self._preemptions_max = preemptions_max
        self._preemptions = 0
        self._taken: list[tuple[int, int]] = []

    def __str__(self) -> str:
        """As it stands in a line that replays."""
        choices = ".".join(map(str, self.choices))
        return f"branching={self._branching} preemptions={self._preemptions_max} choices={choices}"

    def following(self) -> BoundedSchedule | None:
        """The next schedule in depth-first order, once this one has run."""
        taken = self._taken[:]
        while taken:
            chosen, options = taken.pop()
            if chosen + 1 < options:
                choices = [*(choice for choice, _ in taken), chosen + 1]
                return BoundedSchedule(
                    choices, branching=self._branching, preemptions_max=self._preemptions_max
                )
        return None

    def at_step(self, me: R, live: Sequence[R]) -> R:
        """The same one, or, at a preemption, another of the branching threads."""
        if self._preemptions >= self._preemptions_max or not me.name.startswith(self._branching):
            return me
        others = [thread for thread in self._of_branching(_ready(live)) if thread is not me]
        chosen = self._decide(len(others) + 1)
        if chosen == 0:
            return me
        self._preemptions += 1
        return others[chosen - 1]

    def of_ready(self, ready: Sequence[R]) -> R:
        """The first of the others; else any of the branching threads."""
        if not self._branching:
            chosen = self._decide(len(ready)) if self._preemptions < self._preemptions_max else 0
            self._preemptions += chosen > 0
            return ready[chosen]
        branching = self._of_branching(ready)
        if len(branching) < len(ready):
            return next(thread for thread in ready if thread not in branching)
        return branching[self._decide(len(branching))]

    def choose(self, waiting: Sequence[R]) -> R:
        """Any, in turn."""
        return waiting[self._decide(len(waiting))]

    def _of_branching(self, threads: Sequence[R]) -> list[R]:
        return [thread for thread in threads if thread.name.startswith(self._branching)]

    def _decide(self, options: int) -> int:
        """The choice that this schedule makes here; beyond its list the first one."""
        if options == 1:
            return 0
        at = len(self._taken)
        chosen = self.choices[at] if at < len(self.choices) else 0
        self._taken.append((chosen, options))
        return chosen
