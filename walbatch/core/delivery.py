"""What a backend's answer means for each operation of a batch, and how long a failed one waits.

The idea needed to read it: an operation is settled only by an explicit or implied "applied"; everything else,
nonsense included, is tried again. What comes after a failed operation of the same key in the same batch
counts as failed too, so that the key's final state is that of its last operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from walbatch import limits
from walbatch.types import Answer, Applied, Batch, Failures, Order, Outcome, Retry


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What becomes of a batch. `applied` maps an index to the operation's result, `retry` to its wait in seconds."""

    applied: dict[int, Any]
    retry: dict[int, float]
    error: str | None


def judge(batch: Batch, answer: Answer, order: Order) -> Verdict:
    """Turn an answer into a verdict.

    Raises ValueError for an answer that is none (the whole batch is then tried again).
    """
    count = len(batch)
    if answer is None:
        return Verdict(applied=dict.fromkeys(range(count)), retry={}, error=None)
    outcomes = _outcomes(answer, count)
    applied: dict[int, Any] = {}
    retry: dict[int, float] = {}
    failed_keys: set[bytes] = set()
    errors: list[str] = []
    for index, (key, outcome) in enumerate(zip(batch.keys, outcomes, strict=True)):
        if isinstance(outcome, Retry):
            retry[index] = min(max(0.0, float(outcome.after)), limits.RETRY_DELAY_NS_MAX / 1e9)
            failed_keys.add(key)
            if outcome.error:
                errors.append(outcome.error)
        elif (order is Order.KEY and key in failed_keys) or (order is Order.SHARD and failed_keys):
            retry[index] = 0.0
        else:
            applied[index] = outcome.result
    error = (errors[0] if errors else "the backend asked for a retry") if retry else None
    return Verdict(applied=applied, retry=retry, error=error)


def _outcomes(answer: Sequence[Outcome] | Failures, count: int) -> Sequence[Outcome]:
    """One outcome for each operation."""
    if isinstance(answer, Failures):
        if any(not isinstance(index, int) or not 0 <= index < count for index in answer.outcomes):
            raise ValueError(f"Failures names an index outside the batch of {count}")
        outcomes: list[Outcome] = [answer.outcomes.get(index, Applied()) for index in range(count)]
    elif isinstance(answer, (list, tuple)):
        outcomes = list(answer)
    else:
        raise ValueError(
            f"apply returned {type(answer).__name__}: expected None, one outcome for each operation, or Failures"
        )
    if len(outcomes) != count:
        raise ValueError(f"apply returned {len(outcomes)} outcomes for {count} operations")
    for outcome in outcomes:
        if not isinstance(outcome, (Applied, Retry)):
            raise ValueError(
                f"apply returned {type(outcome).__name__} as an outcome: expected Applied or Retry"
            )
    return outcomes


def backoff_ns(failures: int, *, base_s: float, ceiling_s: float, chance: float) -> int:
    """Full jitter: chance x min(ceiling, base x 2^failures), in nanoseconds. `chance` is uniform in [0, 1).

    Source: M. Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015.
    """
    exponent = min(failures, 60)
    return int(chance * min(ceiling_s, base_s * 2**exponent) * 1_000_000_000)
