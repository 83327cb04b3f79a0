"""Dead letters that are submitted again, each once, whatever happens in between.

What is not here: keeping dead letters (`runtime.letters`), and submitting (`submission`).

The idea needed to read it: an operation that is submitted again has an idempotency key made of its letter's LSN. As long as the
letter is there, however long that is, the key tells whether the operation is, too. And whoever submits a letter claims it first.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import replace

from walbatch.config import Lane
from walbatch.core.idempotency import requeue_key
from walbatch.engine.submission import Submission
from walbatch.errors import StorageError
from walbatch.ports import StateStore
from walbatch.runtime.identities import KeyIndex
from walbatch.runtime.letters import DeadLetters
from walbatch.types import DeadLetter, Durability


def can_requeue(letter: DeadLetter, lanes: Mapping[str, Lane]) -> bool:
    """Whether the letter's lane is open, and logged."""
    lane = lanes.get(letter.lane)
    return lane is not None and lane.durability is not Durability.NONE


def requeue(letter: DeadLetter, *, submission: Submission, letters: DeadLetters) -> None:
    """Submit one letter that the caller has claimed, then drop it.

    Crash story: in between, both are there; the next opening, or requeueing again, finds the operation by its idempotency key,
    and drops the letter. The operation is synced before that, whatever its lane: the letter was durable.
    """
    options = replace(
        letter.options, origin=letter.options.origin or letter.lsn, deadline_ns=0, not_before_ns=0,
        idempotency_key=requeue_key(letter.lsn),
    )  # fmt: skip
    submission.submit(
        letter.lane, letter.key, letter.payload, letter.priority, -1.0, options, wait=True, synced=True
    )
    letters.remove_claimed(letter.lsn)


def without_requeued(state: StateStore, letters: Sequence[DeadLetter], keys: KeyIndex) -> list[DeadLetter]:
    """Drop the letters whose operations were submitted again by a process that was cut off before it dropped them.

    Returns the other letters; without room on the disk, all: then their keys go on telling of their operations.
    """
    requeued = {letter.lsn for letter in letters if keys.is_own(letter.lane, requeue_key(letter.lsn))}
    if requeued:
        try:
            state.unbury(requeued)
        except StorageError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
            return list(letters)
    return [letter for letter in letters if letter.lsn not in requeued]
