"""A stand-in for the state of a store: the checkpoint and the lanes' memory, as a list of commits.

Implements `ports.StateStore`. What is not here: LMDB, and its bytes.

The idea needed to read it: every save is one commit, durable when it returns. A save that fails may or may not have kept its
commit, so a crash has two images. Knobs make the state what a damaged LMDB file may be: stale, or gone.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from walbatch.errors import EngineClosed, StorageError
from walbatch.testing.simulation.faults import FaultPlan
from walbatch.types import Checkpoint, LaneMemory

Commit = Checkpoint | Mapping[str, LaneMemory]

OnSave = Callable[[Checkpoint], None]


@dataclass(slots=True)
class StateDisk:
    """What survives the process. The first `synced` commits are there after any crash; each later one may be."""

    commits: list[Commit] = field(default_factory=list)
    synced: int = 0
    stale_commits: int = 0
    """Knob: that many of the newest commits are silently not seen by the next opening, and are gone with it."""
    findings: tuple[str, ...] = ()
    """Knob: what the next loading of the checkpoint says was found wrong."""

    def clone(self) -> StateDisk:
        """A copy."""
        return StateDisk(list(self.commits), self.synced, self.stale_commits, self.findings)

    def images(self) -> Iterator[StateDisk]:
        """Every state that a crash may leave, the newest first."""
        for count in range(len(self.commits), self.synced - 1, -1):
            yield replace(self, commits=self.commits[:count], synced=count)

    def fingerprint(self) -> object:
        """Equal for equal states."""
        return tuple(map(repr, self.commits)), self.synced, self.stale_commits, self.findings


class SimulatedState:
    """The state, open. `on_call(call, path)` before each call; `on_save(checkpoint)` when one is durable."""

    def __init__(
        self, disk: StateDisk, path: str, *, faults: FaultPlan, on_call: Callable[[str, str], None], on_save: OnSave
    ) -> None:  # fmt: skip
        self._disk = disk
        self._path = path
        self._faults = faults
        self._on_call = on_call
        self._on_save = on_save
        self._failure: StorageError | None = None
        self._open = True
        if disk.stale_commits:
            del disk.commits[-disk.stale_commits :]
            disk.stale_commits = 0
        # Opening proves what is there durable, as the real one does.
        disk.synced = len(disk.commits)

    def __repr__(self) -> str:
        return f"<SimulatedState {self._path}, {len(self._disk.commits)} commits>"

    def load_checkpoint(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest one, and the findings that were asked for."""
        self._on_call("load checkpoint", self._path)
        found = [commit for commit in self._disk.commits if isinstance(commit, Checkpoint)]
        return max(found, key=lambda checkpoint: checkpoint.generation, default=None), list(
            self._disk.findings
        )

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """One commit."""
        self._commit("save checkpoint", checkpoint)
        self._on_save(checkpoint)

    def load_lanes(self) -> tuple[dict[str, LaneMemory], list[str]]:
        """What all commits together remember."""
        self._on_call("load lanes", self._path)
        lanes: dict[str, LaneMemory] = {}
        for commit in self._disk.commits:
            if not isinstance(commit, Checkpoint):
                lanes |= commit
        return lanes, []

    def save_lanes(self, lanes: Mapping[str, LaneMemory]) -> None:
        """One commit."""
        if lanes:
            self._commit("save lanes", dict(lanes))

    def close(self) -> None:
        """Release it."""
        self._open = False

    def _commit(self, call: str, commit: Commit) -> None:
        self._on_call(call, self._path)
        if self._failure is not None:
            raise self._failure
        if not self._open:
            raise EngineClosed(f"{self._path} is closed")
        fault = self._faults.due(call, self._path)
        if fault is None:
            self._disk.commits.append(commit)
            self._disk.synced = len(self._disk.commits)
            return
        error = StorageError(f"{self._path}: {os.strerror(fault.error)}", path=self._path, errno=fault.error)
        if fault.error not in {errno.ENOSPC, errno.EDQUOT}:
            self._disk.commits.append(commit)  # its sync failed: it may be there
            self._failure = error
        raise error


def newest_checkpoint(commits: Sequence[Commit]) -> Checkpoint | None:
    """The last checkpoint among commits."""
    return next((commit for commit in reversed(commits) if isinstance(commit, Checkpoint)), None)
