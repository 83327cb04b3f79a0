"""How many retries of batches a lane may afford, so that they cannot become a storm of their own.

The idea needed to read it: each batch that succeeds earns a part of a retry, up to a ceiling. In good times single failures are
retried at once; when most batches fail, the budget is soon empty, and a retry waits for the longest delay of its policy.
"""

from __future__ import annotations

from typing import Final

BUDGET_MAX: Final = 10
"""Retries that can be saved up: enough for a hiccup of all shards of a lane."""
_PARTS: Final = 1_000_000


class RetryBudget:
    """Starts full. `ratio`: retries earned by a batch that succeeds. Not thread-safe: its owner locks."""

    __slots__ = ("_earned", "_left")

    def __init__(self, ratio: float) -> None:
        # In millionths, so that five times 0.2 is one.
        self._earned = round(ratio * _PARTS)
        self._left = BUDGET_MAX * _PARTS

    def __repr__(self) -> str:
        return f"<RetryBudget {self.left:g} of {BUDGET_MAX}>"

    @property
    def left(self) -> float:
        """Retries that could be taken."""
        return self._left / _PARTS

    def succeeded(self) -> None:
        """A batch succeeded."""
        self._left = min(self._left + self._earned, BUDGET_MAX * _PARTS)

    def take(self) -> bool:
        """Take one retry, if there is one. Without, the caller waits for the ceiling of its retry policy."""
        if self._left < _PARTS:
            return False
        self._left -= _PARTS
        return True
