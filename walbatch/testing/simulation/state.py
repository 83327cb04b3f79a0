"""A stand-in for the state of a store, as a list of commits.

Implements `ports.StateStore`. What is not here: LMDB, and its bytes; and what the commits add up to (`commits`).

The idea needed to read it: every save is one commit, durable when it returns. A save that fails may or may not have kept its
commit, so a crash has two images. The checkpoint has two generations, of which a save replaces the older one. What may be
forgotten is forgotten with the next commit, and not before. Knobs make the state what a damaged LMDB file may be: silently
stale, or unreadable in one generation or both, in a dead letter or in the idempotency keys, which is found.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from walbatch.errors import EngineClosed, StorageError
from walbatch.testing.simulation.commits import (
    Buried,
    Cancelled,
    Commit,
    ControllersSaved,
    Forgotten,
    KeysSaved,
    Unburied,
    controllers_in,
    generations_in,
    given_up_in,
    keys_in,
    lanes_in,
    letters_in,
)
from walbatch.testing.simulation.faults import FaultPlan
from walbatch.types import Checkpoint, DeadLetter, KeyUse, LaneMemory

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
    garbled_letters: frozenset[int] = frozenset()
    """Knob: LSNs of dead letters whose bytes are damaged: each is a finding as long as it is held."""
    garbled_keys: int = 0
    """Knob: the idempotency keys in so many of the first commits are damaged: a finding until keys are saved again."""
    _texts: tuple[str, ...] = field(default=(), repr=False, compare=False)
    """The commits in words, as far as somebody has asked: a fingerprint is taken of each of millions of images."""

    def clone(self) -> StateDisk:
        """A copy."""
        return replace(self, commits=list(self.commits))

    def keep(self, commit: Commit) -> None:
        """One more, durable or not."""
        self.commits.append(commit)
        match commit:
            case Checkpoint():
                self.garbled -= {commit.generation}
            case Buried():
                self.garbled_letters -= {letter.lsn for letter in commit.letters}
            case Unburied():
                self.garbled_letters -= frozenset(commit.lsns)
            case _:
                pass

    def forget(self, count: int) -> None:
        """The newest commits are gone."""
        del self.commits[len(self.commits) - count :]
        self._texts = self._texts[: len(self.commits)]

    def generations(self) -> list[Checkpoint]:
        """The two generations that are held, newest first."""
        return generations_in(self.commits)

    def images(self) -> Iterator[StateDisk]:
        """Every state that a crash may leave, the newest first."""
        for count in range(len(self.commits), self.synced - 1, -1):
            yield replace(self, commits=self.commits[:count], synced=count, _texts=self._texts[:count])

    def fingerprint(self) -> object:
        """Equal for equal states."""
        self._texts += tuple(map(repr, self.commits[len(self._texts) :]))
        knobs = (self.stale_commits, self.findings, self.garbled, self.garbled_letters, self.garbled_keys)
        return self._texts, self.synced, knobs


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
        self._forgettable = 0
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
        return lanes_in(self._disk.commits), []

    def save_lanes(self, lanes: Mapping[str, LaneMemory]) -> None:
        """One commit."""
        if lanes:
            self._commit("save lanes", dict(lanes))

    def load_letters(self) -> tuple[list[DeadLetter], list[str]]:
        """Those that can be read, and a finding for each other one."""
        self._load("load letters")
        letters, garbled = letters_in(self._disk.commits), self._disk.garbled_letters
        findings = [
            f"the dead letter {lsn} of lane {letter.lane!r} is damaged"
            for lsn, letter in letters.items()
            if lsn in garbled
        ]
        return [letter for lsn, letter in letters.items() if lsn not in garbled], findings

    def bury(self, letters: Sequence[DeadLetter]) -> None:
        """One commit."""
        if letters:
            self._commit("bury", Buried(letters=tuple(letters)))

    def unbury(self, lsns: Collection[int]) -> None:
        """One commit."""
        if lsns:
            self._commit("unbury", Unburied(lsns=tuple(sorted(lsns))))

    def load_given_up(self) -> tuple[frozenset[int], list[str]]:
        """What was given up and not forgotten, and what has a letter; nothing whose letter is damaged."""
        self._load("load given up")
        commits = self._disk.commits
        return frozenset((given_up_in(commits) | {*letters_in(commits)}) - self._disk.garbled_letters), []

    def cancel(self, lsns: Collection[int]) -> None:
        """One commit."""
        if lsns:
            self._commit("cancel", Cancelled(lsns=tuple(sorted(lsns))))

    def forget_given_up(self, lsn: int) -> None:
        """Part of the next commit."""
        self._forgettable = max(self._forgettable, lsn)

    def load_keys(self) -> tuple[list[KeyUse], int, list[str]]:
        """What all commits together hold, without what is damaged."""
        self._load("load keys")
        disk = self._disk
        lost, sound = disk.commits[: disk.garbled_keys], disk.commits[disk.garbled_keys :]
        uses, up_to_lsn = keys_in(sound)
        findings = ["idempotency keys are damaged"] if keys_in(lost)[1] and not up_to_lsn else []
        return uses, up_to_lsn, findings

    def save_keys(self, uses: Sequence[KeyUse], *, up_to_lsn: int, oldest_wall_ns: int) -> None:
        """One commit."""
        commit = KeysSaved(uses=tuple(uses), up_to_lsn=up_to_lsn, oldest_wall_ns=oldest_wall_ns)
        self._commit("save keys", commit)

    def load_controllers(self) -> tuple[dict[tuple[str, int], bytes], list[str]]:
        """What all commits together remember."""
        self._load("load controllers")
        return controllers_in(self._disk.commits), []

    def save_controllers(self, snapshots: Mapping[tuple[str, int], bytes]) -> None:
        """One commit."""
        if snapshots:
            self._commit("save controllers", ControllersSaved(snapshots=dict(snapshots)))

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
            self._keep(commit)
            self._disk.synced = len(self._disk.commits)
            return
        error = self._error(fault.error)
        if fault.error not in {errno.ENOSPC, errno.EDQUOT}:
            self._keep(commit)  # its sync failed: it may be there
            self._failure = error
        raise error

    def _keep(self, commit: Commit) -> None:
        if self._forgettable:
            self._disk.keep(Forgotten(lsn=self._forgettable))
            self._forgettable = 0
        self._disk.keep(commit)
