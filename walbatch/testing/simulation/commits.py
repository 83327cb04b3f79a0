"""What is committed to the simulated state, and what a list of commits adds up to.

What is not here: which commits survive a crash, and how a save fails (`state`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from walbatch.types import Checkpoint, DeadLetter, KeyUse, LaneMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class Buried:
    """Dead letters that were kept."""

    letters: tuple[DeadLetter, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unburied:
    """Dead letters that were removed, by LSN."""

    lsns: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    """Operations that were given up without a letter, by LSN."""

    lsns: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgotten:
    """What was given up to `lsn` is not remembered any more."""

    lsn: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KeysSaved:
    """Idempotency keys that were used, and those before `oldest_wall_ns` removed."""

    uses: tuple[KeyUse, ...]
    up_to_lsn: int
    oldest_wall_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllersSaved:
    """Snapshots of size controllers, by lane and shard."""

    snapshots: Mapping[tuple[str, int], bytes]


Commit = (
    Checkpoint
    | Mapping[str, LaneMemory]
    | Buried
    | Unburied
    | Cancelled
    | Forgotten
    | KeysSaved
    | ControllersSaved
)


def newest_checkpoint(commits: Sequence[Commit]) -> Checkpoint | None:
    """The last checkpoint among commits."""
    return next((commit for commit in reversed(commits) if isinstance(commit, Checkpoint)), None)


def generations_in(commits: Iterable[Commit]) -> list[Checkpoint]:
    """The two generations that are held, newest first."""
    slots: dict[int, Checkpoint] = {}
    for commit in commits:
        if isinstance(commit, Checkpoint):
            slots[commit.generation % 2] = commit
    return sorted(slots.values(), key=lambda checkpoint: -checkpoint.generation)


def lanes_in(commits: Iterable[Commit]) -> dict[str, LaneMemory]:
    """What is remembered of lanes."""
    lanes: dict[str, LaneMemory] = {}
    for commit in commits:
        if isinstance(commit, Mapping):
            lanes |= commit
    return lanes


def letters_in(commits: Iterable[Commit]) -> dict[int, DeadLetter]:
    """The dead letters, by LSN, ascending."""
    letters: dict[int, DeadLetter] = {}
    for commit in commits:
        if isinstance(commit, Buried):
            letters |= {letter.lsn: letter for letter in commit.letters}
        elif isinstance(commit, Unburied):
            for lsn in commit.lsns:
                letters.pop(lsn, None)
    return dict(sorted(letters.items()))


def given_up_in(commits: Iterable[Commit]) -> set[int]:
    """What was buried or cancelled, and not forgotten."""
    given_up: set[int] = set()
    for commit in commits:
        if isinstance(commit, Buried):
            given_up |= {letter.lsn for letter in commit.letters}
        elif isinstance(commit, Cancelled):
            given_up |= set(commit.lsns)
        elif isinstance(commit, Forgotten):
            given_up = {lsn for lsn in given_up if lsn > commit.lsn}
    return given_up


def keys_in(commits: Iterable[Commit]) -> tuple[list[KeyUse], int]:
    """The uses that are held, in their order, and the LSN up to which the log's keys are among them."""
    uses: list[KeyUse] = []
    up_to_lsn = 0
    for commit in commits:
        if isinstance(commit, KeysSaved):
            uses += commit.uses
            up_to_lsn = commit.up_to_lsn
            old = [index for index, use in enumerate(uses) if use.used_wall_ns < commit.oldest_wall_ns]
            # What was used before something old is old as well, whatever a clock that was set back has said.
            del uses[: old[-1] + 1 if old else 0]
    return uses, up_to_lsn


def controllers_in(commits: Iterable[Commit]) -> dict[tuple[str, int], bytes]:
    """Snapshots of controllers."""
    snapshots: dict[tuple[str, int], bytes] = {}
    for commit in commits:
        if isinstance(commit, ControllersSaved):
            snapshots |= commit.snapshots
    return snapshots
