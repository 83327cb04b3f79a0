"""The shipped engine on the ports of a simulated process.

What is not here: the ports (`simulation`), and what is done with the engine.

The idea needed to read it: the simulation knows no engine; this is the one place that puts the two together.
"""

from __future__ import annotations

from collections.abc import Mapping

from walbatch.config import Lane, Settings
from walbatch.engine import Engine, Environment
from walbatch.testing.simulation.machine import Process
from walbatch.testing.simulation.workload import STORE


def environment_of(process: Process) -> Environment:
    """The ports of a simulated process, for `Engine.open(..., environment=...)`."""
    return Environment(
        fs=process.fs, clock=process.clock, threads=process.threads, entropy=process.entropy, open_state=process.open_state
    )  # fmt: skip


def open_engine(process: Process, lanes: Mapping[str, Lane], settings: Settings) -> Engine:
    """The shipped engine on simulated ports, with its store at `/store`: what an `Explorer` opens."""
    return Engine.open(STORE, lanes, settings=settings, environment=environment_of(process))
