"""A stand-in for the state of a store: the checkpoint and the lanes' memory, as a list of commits.

Implements `ports.StateStore`. What is not here: LMDB, and its bytes.

The idea needed to read it: every save is one commit, durable when it returns. A save that fails may or may not have kept its
commit, so a crash has two images. The checkpoint has two generations, of which a save replaces the older one. Knobs make the
state what a damaged LMDB file may be: silently stale, or unreadable in one generation or both, which is found.
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
    garbled: frozenset[int] = frozenset()
    """Knob: generations of the checkpoint whose bytes are damaged: each is a finding until a save replaces it."""
    _texts: tuple[str, ...] = field(default=(), repr=False, compare=False)
    """The commits in words, as far as somebody has asked: a fingerprint is taken of each of millions of images."""

    def clone(self) -> StateDisk:
        """A copy."""
        return StateDisk(
            list(self.commits), self.synced, self.stale_commits, self.findings, self.garbled, self._texts
        )

    def keep(self, commit: Commit) -> None:
        """One more, durable or not."""
        self.commits.append(commit)
        if isinstance(commit, Checkpoint):
            self.garbled -= {commit.generation}

    def forget(self, count: int) -> None:
        """The newest commits are gone."""
        del self.commits[len(self.commits) - count :]
        self._texts = self._texts[: len(self.commits)]

    def generations(self) -> list[Checkpoint]:
        """The two generations that are held, newest first."""
        slots: dict[int, Checkpoint] = {}
        for commit in self.commits:
            if isinstance(commit, Checkpoint):
                slots[commit.generation % 2] = commit
        return sorted(slots.values(), key=lambda checkpoint: -checkpoint.generation)

    def images(self) -> Iterator[StateDisk]:
        """Every state that a crash may leave, the newest first."""
        for count in range(len(self.commits), self.synced - 1, -1):
            yield replace(self, commits=self.commits[:count], synced=count, _texts=self._texts[:count])

    def fingerprint(self) -> object:
        """Equal for equal states."""
        self._texts += tuple(map(repr, self.commits[len(self._texts) :]))
        return self._texts, self.synced, self.stale_commits, self.findings, self.garbled


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
        disk.forget(min(disk.stale_commits, len(disk.commits)))
        disk.stale_commits = 0
        # Opening proves what is there durable, as the real one does.
        disk.synced = len(disk.commits)

    def __repr__(self) -> str:
        return f"<SimulatedState {self._path}, {len(self._disk.commits)} commits>"

    def load_checkpoint(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest one that can be read, and what was found wrong."""
        self._load("load checkpoint")
        disk = self._disk
        held = disk.generations()
        findings = [
            *disk.findings,
            *(
                f"generation {checkpoint.generation} of the checkpoint is damaged"
                for checkpoint in held
                if checkpoint.generation in disk.garbled
            ),
        ]
        return next((one for one in held if one.generation not in disk.garbled), None), findings

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """One commit."""
        self._commit("save checkpoint", checkpoint)
        self._on_save(checkpoint)

    def load_lanes(self) -> tuple[dict[str, LaneMemory], list[str]]:
        """What all commits together remember."""
        self._load("load lanes")
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

    def _load(self, call: str) -> None:
        self._on_call(call, self._path)
        fault = self._faults.due(call, self._path)
        if fault is not None:
            raise self._error(fault.error)

    def _error(self, error: int) -> StorageError:
        return StorageError(f"{self._path}: {os.strerror(error)}", path=self._path, errno=error)

    def _commit(self, call: str, commit: Commit) -> None:
        self._on_call(call, self._path)
        if self._failure is not None:
            raise self._failure
        if not self._open:
            raise EngineClosed(f"{self._path} is closed")
        fault = self._faults.due(call, self._path)
        if fault is None:
            self._disk.keep(commit)
            self._disk.synced = len(self._disk.commits)
            return
        error = self._error(fault.error)
        if fault.error not in {errno.ENOSPC, errno.EDQUOT}:
            self._disk.keep(commit)  # its sync failed: it may be there
            self._failure = error
        raise error


def newest_checkpoint(commits: Sequence[Commit]) -> Checkpoint | None:
    """The last checkpoint among commits."""
    return next((commit for commit in reversed(commits) if isinstance(commit, Checkpoint)), None)
