"""A simulated machine and the processes on it: the disk, the states, the backends; and the ports of one process.

What is not here: the engine. It gets the ports of a `Process` in the place of the real ones.

The idea needed to read it: a machine is what survives; a process is what ends. A crash makes machines of a machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from walbatch.errors import StorageError
from walbatch.testing.simulation.backend import (
    BackendDisk,
    Manners,
    ModelBackend,
    TransactionalModelBackend,
)
from walbatch.testing.simulation.clock import ManualClock, SeededEntropy
from walbatch.testing.simulation.commits import letters_in
from walbatch.testing.simulation.faults import FaultPlan
from walbatch.testing.simulation.filesystem import SimulatedFileSystem
from walbatch.testing.simulation.history import (
    AppliedTo,
    Blamed,
    Buried,
    Checkpointed,
    Event,
    Given,
    SyncFailed,
    Unburied,
)
from walbatch.testing.simulation.images import BOUND, SAMPLES, Cut, crash_images
from walbatch.testing.simulation.scheduler import Scheduler
from walbatch.testing.simulation.schedules import Schedule
from walbatch.testing.simulation.state import SimulatedState, StateDisk
from walbatch.types import Batch, Checkpoint, DeadLetter, Operation

OnStep = Callable[["Process", str], None]
"""on_step(process, call), before each step."""

_T = TypeVar("_T")


@dataclass(slots=True)
class Machine:
    """What survives a process."""

    fs: SimulatedFileSystem = field(default_factory=SimulatedFileSystem)
    states: dict[str, StateDisk] = field(default_factory=dict)
    backends: dict[str, BackendDisk] = field(default_factory=dict)

    def clone(self) -> Machine:
        """A copy that shares nothing."""
        return Machine(
            self.fs.clone(),
            {path: state.clone() for path, state in self.states.items()},
            {lane: backend.clone() for lane, backend in self.backends.items()},
        )

    def version(self) -> object:
        """Changes whenever anything durable or pending changes."""
        return (
            self.fs.version,
            sum(len(state.commits) for state in self.states.values()),
            sum(backend.effects + len(backend.marks) for backend in self.backends.values()),
        )

    def fingerprint(self) -> object:
        """Equal for machines on which the same recovery takes the same course."""
        return (
            self.fs.fingerprint(),
            tuple((path, state.fingerprint()) for path, state in sorted(self.states.items())),
            tuple((lane, backend.fingerprint()) for lane, backend in sorted(self.backends.items())),
        )

    def images(
        self, cut: Cut, *, bound: int = BOUND, samples: int = SAMPLES, seed: int = 0, strict: bool = False
    ) -> Iterator[tuple[str, Machine]]:
        """Every machine that a crash may leave, with its label. Backends lose nothing; states their unsynced commits.

        They share what the crash did not touch: clone one before a process works on it.
        """
        paths = sorted(self.states)
        kept = list(itertools.product(*(list(self.states[path].images()) for path in paths)))
        for image in crash_images(self.fs, cut, bound=bound, samples=samples, seed=seed, strict=strict):
            for number, choice in enumerate(kept):
                label = image.label if number == 0 else f"{image.label}+state{number}"
                yield label, Machine(image.fs, dict(zip(paths, choice, strict=True)), self.backends)


class Process:
    """One life on a machine: its threads, its clock, its chance, and what it writes down for the oracle.

    `fs`, `clock`, `threads`, `entropy` and `open_state` are the ports for the engine. `life` tells processes of the same
    seed apart. `on_step` sees every port call.
    """

    def __init__(
        self, machine: Machine, history: list[Event], *, seed: int = 0, life: str = "0", crash_at: int | None = None,
        faults: FaultPlan | None = None, manners: Manners | None = None, on_step: OnStep | None = None,
        wrap_fs: Callable[[SimulatedFileSystem], SimulatedFileSystem] | None = None, schedule: Schedule | None = None,
    ) -> None:  # fmt: skip
        self.machine = machine
        self.history = history
        self.clock = ManualClock()
        self._on_step = on_step
        self.threads = Scheduler(
            (seed, life),
            clock=self.clock,
            schedule=schedule,
            crash_at=crash_at,
            on_step=self._step if on_step else None,
        )
        self.entropy = SeededEntropy((seed, life))
        self.faults = faults or FaultPlan()
        self._manners = manners
        machine.fs.on_call = self.threads.step
        machine.fs.faults = _NotingFaults(self.faults, history)
        self.fs = wrap_fs(machine.fs) if wrap_fs else machine.fs

    def __repr__(self) -> str:
        return f"<Process {self.threads!r}>"

    def run(self, main: Callable[[], _T]) -> _T:
        """Run `main` in the process's first thread until all threads have ended. Call it once."""
        try:
            return self.threads.run(main)
        finally:
            self.machine.fs.locks.clear()

    def open_state(self, path: str, store: bytes, quarantine: str) -> SimulatedState:
        """The state of the store: a file of the same name marks it, so that a directory that is lost takes it along.

        As the real one, it proves the name durable as long as nothing was committed: an opening may have failed before it did.
        """
        marker = f"{path}/data.mdb"
        is_new = not self.machine.fs.holds(marker)
        if is_new:
            self.machine.states.pop(path, None)
        disk = self.machine.states.setdefault(path, StateDisk())
        if is_new or not disk.commits:
            try:
                if is_new:
                    self.machine.fs.create(marker).close()
                self.machine.fs.sync_directory(path)
            except OSError as error:
                raise StorageError(f"{path}: {error.strerror}", path=path, errno=error.errno) from error
        state = _NotingState(disk, path, process=self)
        held = tuple(
            letter for lsn, letter in letters_in(disk.commits).items() if lsn not in disk.garbled_letters
        )
        if held:
            self.history.append(Buried(letters=held))
        return state

    def backend(self, lane: str, *, transactional: bool = False) -> ModelBackend:
        """A backend on the disk that this machine has for `lane`."""
        disk = self.machine.backends.setdefault(lane, BackendDisk())
        kind = TransactionalModelBackend if transactional else ModelBackend
        return kind(
            disk, clock=self.clock, threads=self.threads, on_call=self.threads.step, on_given=self._given,
            on_applied=self._applied, on_blamed=self._blamed, manners=self._manners,
        )  # fmt: skip

    @property
    def misbehaves(self) -> bool:
        """Whether its backends have manners of their own."""
        return self._manners is not None

    def _given(self, batch: Batch) -> None:
        earliest, latest = self.clock.wall_span_ns
        lsns: Sequence[int | None] = batch.lsns or [None] * len(batch)
        self.history.append(Given(
            lane=batch.lane, operations=tuple(zip(lsns, batch.payloads, strict=True)), earliest_wall_ns=earliest,
            latest_wall_ns=latest,
        ))  # fmt: skip

    def _applied(self, batch: Batch, operation: Operation) -> None:
        self.history.append(AppliedTo(
            lane=batch.lane, store=batch.store, lsn=operation.lsn, key=operation.key, payload=operation.payload,
            identity=operation.identity,
        ))  # fmt: skip

    def _blamed(self, operation: Operation, applied: Sequence[int]) -> None:
        self.history.append(Blamed(payload=operation.payload, applied=tuple(applied)))

    def _step(self, call: str, detail: str) -> None:
        assert self._on_step is not None
        self._on_step(self, call)


class _NotingState(SimulatedState):
    """The state of the store, which writes down what became durable."""

    def __init__(self, disk: StateDisk, path: str, *, process: Process) -> None:
        self._history = process.history
        super().__init__(disk, path, faults=process.faults, on_call=process.threads.step, on_save=self._saved)

    def _saved(self, checkpoint: Checkpoint) -> None:
        self._history.append(Checkpointed(checkpoint))

    def bury(self, letters: Sequence[DeadLetter]) -> None:
        super().bury(letters)
        self._history.append(Buried(letters=tuple(letters)))

    def unbury(self, lsns: Collection[int]) -> None:
        super().unbury(lsns)
        self._history.append(Unburied(lsns=tuple(sorted(lsns))))


class _NotingFaults(FaultPlan):
    """The plan of the process, which writes failed syncs down."""

    def __init__(self, plan: FaultPlan, history: list[Event]) -> None:
        self._plan = plan
        self._history = history

    def due(self, call: str, path: str) -> object:  # type: ignore[override]
        fault = self._plan.due(call, path)
        if fault is not None and call in {"datasync", "sync_directory"}:
            self._history.append(SyncFailed(path))
        return fault
