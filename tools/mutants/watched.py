"""Engines that are watched, or used in a way that nobody else uses them: openers for the explorer.

What is not here: the workloads that use them, and who asks for which (`probes`).

The idea needed to read it: what the oracle cannot see in a history is asserted where it happens, by whatever stands between the
workload and the shipped engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import walbatch as wb
from tools.mutants import rot
from walbatch.engine import Engine
from walbatch.testing.shipped import environment_of, open_engine
from walbatch.testing.simulation import BackendDisk, Cut, Machine, Process, crash_images
from walbatch.testing.simulation.looks import STORE
from walbatch.types import Checkpoint

DEEP: Final = "/srv/queues/store"


def open_deep(process: Process, lanes: Mapping[str, wb.Lane], settings: wb.Settings) -> Engine:
    """A store whose parents do not exist yet."""
    return Engine.open(DEEP, lanes, settings=settings, environment=environment_of(process))


def open_stale(process: Process, lanes: Mapping[str, wb.Lane], settings: wb.Settings) -> Engine:
    """The newest generation of the checkpoint is not usable, and the one before it counts."""
    state = process.machine.states.get(f"{STORE}/state")
    if state is not None:
        saved = [commit for commit in state.commits if isinstance(commit, Checkpoint)]
        if len(saved) > 1:
            newest = max(saved, key=lambda checkpoint: checkpoint.generation)
            state.commits[:] = [commit for commit in state.commits if commit is not newest]
            state.synced = len(state.commits)
    return open_engine(process, lanes, settings)


def open_and_look(process: Process, lanes: Mapping[str, wb.Lane], settings: wb.Settings) -> Engine:
    """Whatever a torn tail held is in quarantine, on the disk, once the store is open."""
    machine = process.machine
    before = (
        {path: rot.content(machine, path) for path in rot.segments(machine)}
        if machine.fs.is_directory(rot.WAL)
        else {}
    )
    engine = open_engine(process, lanes, settings)
    for case in engine.recovery:
        if case.label != "W9" or case.segment is None:
            continue
        path = next(path for path in before if path.endswith(f"{case.segment:019d}.seg"))
        torn = before[path][case.offset :].rstrip(b"\0")
        for image in crash_images(machine.fs, Cut.POWER, bound=8, samples=4):
            kept = Machine(fs=image.fs)
            folder = f"{STORE}/quarantine"
            names = image.fs.list_directory(folder) if image.fs.is_directory(folder) else []
            if all(rot.content(kept, f"{folder}/{name}").rstrip(b"\0") != torn for name in names):
                engine.close(drain=False)
                raise AssertionError(f"the torn tail of {path} is not in quarantine after {image.label}")
    return engine


class _Proxy:
    """An engine with one method looked at."""

    def __init__(self, engine: Engine, process: Process) -> None:
        self._engine = engine
        self._process = process

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


class _Strict(_Proxy):
    """Whoever closes it and drains, and has paused nothing, finds everything delivered."""

    _paused = False

    def pause(self, kind: str) -> None:
        self._paused = True
        self._engine.pause(kind)

    def close(self, *, drain: bool = True, timeout: float | None = 30.0) -> Any:
        report = self._engine.close(drain=drain, timeout=timeout)
        if drain and not self._paused and report.reason.startswith("drained, except"):
            raise AssertionError(f"{report} although nothing is paused or held")
        return report


def open_strictly(process: Process, lanes: Mapping[str, wb.Lane], settings: wb.Settings) -> Any:
    engine = open_engine(process, lanes, settings)
    return engine if any(lane.backend is None for lane in lanes.values()) else _Strict(engine, process)


class _TickingClock:
    """Reading it is a step, at which threads may be switched."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def monotonic_ns(self) -> int:
        self._process.threads.step("monotonic", "")
        return self._process.clock.monotonic_ns()

    def wall_ns(self) -> int:
        return self._process.clock.wall_ns()


def open_ticking(process: Process, lanes: Mapping[str, wb.Lane], settings: wb.Settings) -> Any:
    environment = replace(environment_of(process), clock=_TickingClock(process))
    return Engine.open(STORE, lanes, settings=settings, environment=environment)


class _Naming(_Proxy):
    """Notes which operation each LSN names, from the moment that a ticket shows it."""

    def submit_nowait(self, lane: str, *, key: bytes, payload: bytes) -> wb.Ticket:
        return self._name(self._engine.submit_nowait(lane, key=key, payload=payload), payload)

    def submit(self, lane: str, *, key: bytes, payload: bytes) -> wb.Ticket:
        return self._name(self._engine.submit(lane, key=key, payload=payload), payload)

    def _name(self, ticket: wb.Ticket, payload: bytes) -> wb.Ticket:
        # A backend that nobody else has survives a crash, as a person's memory does.
        memory = self._process.machine.backends.setdefault("memory", BackendDisk())
        name = b"%d" % (ticket.lsn or 0)
        other = memory.content.setdefault(name, payload)
        memory.effects += 1
        if other != payload:
            self._engine.close(drain=False)
            raise AssertionError(f"LSN {ticket.lsn} was shown for {other!r} and for {payload!r}")
        return ticket


def open_naming(process: Process, lanes: Mapping[str, wb.Lane], settings: wb.Settings) -> Any:
    return _Naming(open_engine(process, lanes, settings), process)


class _Changing(_Proxy):
    """A caller who uses one bytearray again and again."""

    def submit(self, lane: str, *, key: bytes, payload: bytes) -> wb.Ticket:
        buffer = bytearray(payload)
        ticket = self._engine.submit(lane, key=key, payload=buffer)
        buffer[:] = bytes(len(buffer))
        return ticket


def open_changing(process: Process, lanes: Mapping[str, wb.Lane], settings: wb.Settings) -> Any:
    return _Changing(open_engine(process, lanes, settings), process)
