"""One life of a store on a simulated machine, and what may be left of the machine after it: what several modes are made of.

What is not here: which lives are worth living (`faults`, `seeded`), and every crash point of one (`walbatch.testing.simulation`).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

from walbatch.testing.shipped import open_engine
from walbatch.testing.simulation import Cut, FaultPlan, Machine, Process, ProcessKilled, Session, Workload
from walbatch.testing.simulation.backend import Manners
from walbatch.testing.simulation.history import Ended, Event
from walbatch.testing.simulation.machine import OnStep
from walbatch.testing.simulation.verify import verify_by_use

IMAGES_MAX = 12
"""Images among which one crash chooses."""


@dataclass(slots=True, kw_only=True)
class Life:
    """What a process did and how it ended."""

    process: Process
    faults: FaultPlan
    error: str = ""
    killed: bool = False


def live(
    machine: Machine, history: list[Event], workload: Workload, *, seed: int, name: str,
    use: Callable[[Session], None] = verify_by_use, faults: FaultPlan | None = None, manners: Manners | None = None,
    crash_at: int | None = None, on_step: OnStep | None = None,
) -> Life:  # fmt: skip
    """Run one process on `machine` to its end, or until step `crash_at`. Whatever it raises that it must not is its `error`."""
    plan = faults or FaultPlan()
    process = Process(
        machine,
        history,
        seed=seed,
        life=name,
        crash_at=crash_at,
        faults=plan,
        manners=manners,
        on_step=on_step,
    )
    session = Session(process, open_engine, workload, name)
    life = Life(process=process, faults=plan)
    try:
        process.run(lambda: session.run(use))
    except ProcessKilled:
        life.killed = True
    except Exception as error:  # noqa: BLE001 - whatever it is, a legal crash or fault has led to it
        life.error = f"{type(error).__name__}: {error}"
    return life


def images_of(machine: Machine, cut: Cut, *, seed: int, strict: bool = False) -> list[tuple[str, Machine]]:
    """Some machines that a crash may leave."""
    found = machine.images(cut, bound=IMAGES_MAX, samples=IMAGES_MAX // 2, seed=seed, strict=strict)
    return list(itertools.islice(found, 2 * IMAGES_MAX))


def crash(
    life: Life, history: list[Event], cut: Cut, chance: random.Random, *, strict: bool = False
) -> tuple[str, Machine]:
    """End the process and its machine: one of the images, by chance. Writes the end down."""
    history.append(Ended(cut=cut, at_ns=life.process.clock.now_ns))
    found = images_of(life.process.machine, cut, seed=chance.randrange(2**32), strict=strict)
    return chance.choice(found)
