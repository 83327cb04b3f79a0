"""What is given up becomes a dead letter: durable before it counts as settled, and told to whoever waits for it.

What is not here: deciding what is given up (`delivery`), and where letters are kept (`letters`).
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Mapping

from walbatch import limits
from walbatch.core.batcher import Entry
from walbatch.errors import OperationCancelled, OperationDead, StorageError, WalbatchError
from walbatch.ports import Clock
from walbatch.runtime.lane import Shard
from walbatch.runtime.letters import DeadLetters
from walbatch.runtime.promises import LOGGED, Promises
from walbatch.types import DeadLetter, DeathReason

_logger = logging.getLogger("walbatch")


class Burial:
    """Buries operations. Never called with a lock held: it writes."""

    def __init__(
        self, *, clock: Clock, promises: Promises, letters: DeadLetters, on_failure: Callable[[WalbatchError], None]
    ) -> None:  # fmt: skip
        self._clock = clock
        self._promises = promises
        self._letters = letters
        self._on_failure = on_failure

    def __repr__(self) -> str:
        return f"<Burial to {self._letters!r}>"

    def bury(
        self, shard: Shard, entries: Mapping[int, Entry], deaths: Mapping[int, tuple[DeathReason, str]]
    ) -> bool:
        """Make dead letters. Returns whether they are durable; if not, their operations must wait."""
        lane = shard.lane
        if not lane.logged:
            for entry in entries.values():
                _logger.error(
                    "lane %r, which logs nothing: operation %r is given up", lane.setup.name, entry[1]
                )
            return True
        wall_ns = self._clock.wall_ns()
        letters = [
            DeadLetter(
                lsn=entry[0], lane=lane.setup.name, key=entry[1], payload=entry[2], priority=entry[3], options=entry[5],
                reason=deaths[index][0], error=deaths[index][1][: limits.ERROR_CHARS_MAX], attempts=shard.queue.attempts(entry[0]),
                died_wall_ns=wall_ns,
            )
            for index, entry in sorted(entries.items())
        ]  # fmt: skip
        full: StorageError | None = None
        kept = False
        try:
            kept = self._letters.bury(letters)
        except StorageError as error:
            full = error
        if full is not None:
            if full.errno not in {errno.ENOSPC, errno.EDQUOT}:
                self._on_failure(full)
            _logger.error(
                "lane %r: dead letters could not be kept, their operations wait: %s", lane.setup.name, full
            )
            return False
        if kept:
            for letter in letters:
                _logger.error(
                    "lane %r: operation %d is given up (%s): %s",
                    letter.lane,
                    letter.lsn,
                    letter.reason,
                    letter.error,
                )
        else:
            _logger.error(
                "lane %r: no room for %d more dead letters, so their operations wait: requeue or drop some", lane.setup.name,
                len(letters),
            )  # fmt: skip
        return kept

    def tell_dead(self, shard: Shard, deaths: Mapping[int, tuple[DeathReason, str]]) -> None:
        """Whoever waits for these learns why they were not applied."""
        scope = LOGGED if shard.lane.logged else shard.lane.index
        for number, (reason, text) in deaths.items():
            lsn = number if shard.lane.logged else None
            self._promises.resolve(scope, number, error=OperationDead(lsn, reason, text))

    def tell_cancelled(self, lsn: int) -> None:
        """Whoever waits for a logged operation learns that it was taken back."""
        self._promises.resolve(LOGGED, lsn, error=OperationCancelled(lsn))
