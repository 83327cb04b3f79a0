"""What a backend's answer means for each operation of a batch, what follows from an exception, and how long a failed try waits.

What is not here: carrying it out (the queue in `batcher`, and the dispatcher).

The idea needed to read it: an operation is settled only by an explicit or implied "applied", or by an explicit "rejected";
everything else, nonsense included, is tried again. What comes after a failed operation of the same key in the same batch counts
as failed too, so that the key's final state is that of its last operation. And an operation loses an attempt only where
a failure is attributable to it: never by an outage, a throttled or overdue call, or a split.
"""

from __future__ import annotations

import enum
import errno
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import is_
from typing import Any, Final, assert_never

from walbatch import limits
from walbatch.errors import BackendBroken, BatchFailure, BatchRejected, BatchTooLarge, RetryBatch, Throttled
from walbatch.types import Answer, Applied, Batch, Failures, Order, Outcome, Rejected, Retry

# --- an answer ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What becomes of a batch, by index: exactly one of `applied`, `retry` and `rejected` has each operation.

    `applied` maps it to its result, `retry` to its shortest wait in seconds, `rejected` to why. `errors` says why an operation in
    `retry` is there by its own fault; the others only come after one. `error` sums up; None where all were applied.
    """

    applied: dict[int, Any]
    retry: dict[int, float]
    rejected: dict[int, str]
    errors: dict[int, str]
    error: str | None


ASKED_FOR_RETRY: Final = "the backend asked for a retry"
SAID_REJECTED: Final = "the backend rejected the operation"


def judge(batch: Batch, answer: Answer, order: Order) -> Verdict:
    """Turn an answer into a verdict.

    Raises ValueError for an answer that is none (the whole batch is then tried again).
    """
    count = len(batch)
    applied: dict[int, Any] = {}
    retry: dict[int, float] = {}
    rejected: dict[int, str] = {}
    errors: dict[int, str] = {}
    if answer is None:
        applied = dict.fromkeys(range(count))
        return Verdict(applied=applied, retry=retry, rejected=rejected, errors=errors, error=None)
    failed_keys: set[bytes] = set()
    for index, (key, outcome) in enumerate(zip(batch.keys, _checked(answer, count), strict=True)):
        held = (order is Order.KEY and key in failed_keys) or (order is Order.SHARD and bool(retry))
        match outcome:
            case Retry():
                retry[index] = _wait_s(outcome.after)
                failed_keys.add(key)
                if not held:
                    errors[index] = outcome.error or ASKED_FOR_RETRY
            case _ if held:
                retry[index] = 0.0
            case Rejected():
                rejected[index] = outcome.error or SAID_REJECTED
            case _:
                applied[index] = outcome.result
    texts = [*errors.values(), *rejected.values()]
    error = next((text for text in texts if text not in {ASKED_FOR_RETRY, SAID_REJECTED}), None)
    if error is None and texts:
        error = texts[0]
    return Verdict(applied=applied, retry=retry, rejected=rejected, errors=errors, error=error)


def overtaken(
    refused: Collection[int], applied: Collection[int], keys: Sequence[bytes], order: Order
) -> frozenset[int]:
    """Those of the refused operations (by index) behind which the batch has applied one that must not overtake them.

    They are given up whatever comes: tried again, they would undo what younger ones have done.
    """
    match order:
        case Order.NONE:
            return frozenset()
        case Order.SHARD:
            last = max(applied, default=-1)
            return frozenset(index for index in refused if index < last)
        case Order.KEY:
            names = {keys[index] for index in refused}
            latest = {keys[index]: index for index in sorted(applied) if keys[index] in names}
            return frozenset(index for index in refused if index < latest.get(keys[index], -1))
        case _:
            assert_never(order)


def results_of(answer: object, count: int) -> list[Any] | None:
    """The results of an answer that has `Applied` for each of `count` operations, and nothing else; None for any other answer.

    So much is told without a look at each outcome in turn. What is not exactly that is for `judge`.
    """
    if not (type(answer) is list or type(answer) is tuple) or len(answer) != count:
        return None
    if not all(map(is_, map(type, answer), repeat(Applied))):
        return None
    try:
        return [outcome.result for outcome in answer]
    except AttributeError:  # one that was made without
        return None


def _checked(answer: Sequence[Outcome] | Failures, count: int) -> Sequence[Outcome]:
    """One outcome for each operation, in which there is no nonsense. Raises ValueError, whatever a class of the backend's does."""
    try:
        outcomes = _outcomes(answer, count)
        for outcome in outcomes:
            _check(outcome)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"the answer of apply cannot be read: {text_of(error)}") from error
    return outcomes


def _outcomes(answer: Sequence[Outcome] | Failures, count: int) -> Sequence[Outcome]:
    """One outcome for each operation."""
    if isinstance(answer, Failures):
        named: object = answer.outcomes
        if not isinstance(named, Mapping):
            raise ValueError(
                f"Failures has a {type(named).__name__} of outcomes: expected a mapping by index"
            )
        for index in answer.outcomes:
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
                raise ValueError(f"Failures names {index!r}, which is no index of the batch of {count}")
        outcomes: list[Outcome] = [answer.outcomes.get(index, Applied()) for index in range(count)]
    elif isinstance(answer, (list, tuple)):
        outcomes = list(answer)
    else:
        raise ValueError(
            f"apply returned {type(answer).__name__}: expected None, one outcome for each operation, or Failures"
        )
    if len(outcomes) != count:
        raise ValueError(f"apply returned {len(outcomes)} outcomes for {count} operations")
    return outcomes


def _check(outcome: object) -> None:
    """Raise ValueError for what is no outcome, or one with nonsense in it."""
    if not isinstance(outcome, (Applied, Retry, Rejected)):
        raise ValueError(
            f"apply returned {type(outcome).__name__} as an outcome: expected Applied, Retry or Rejected"
        )
    if isinstance(outcome, Applied):
        outcome.result  # noqa: B018 - a class of the backend's may have none
        return
    text: object = outcome.error
    if not isinstance(text, str):
        raise ValueError(f"the error of a {type(outcome).__name__} is a {type(text).__name__}: expected text")
    if isinstance(outcome, Retry) and not _is_wait(outcome.after):
        raise ValueError(
            f"Retry.after is {outcome.after!r}: expected seconds, a finite number that is not negative"
        )


def _is_wait(after: object) -> bool:
    """Whether it is a number of seconds to wait."""
    return isinstance(after, (int, float)) and not isinstance(after, bool) and 0 <= after < math.inf


def _wait_s(after: float) -> float:
    """A wait, cut to what makes sense. An integer may be larger than any float."""
    return float(min(after, limits.RETRY_DELAY_NS_MAX / 1e9))


# --- an exception -------------------------------------------------------------------------------------------


class FailureKind(enum.StrEnum):
    """What an exception says of the whole batch."""

    RETRY = "retry"
    THROTTLED = "throttled"
    TOO_LARGE = "too large"
    REJECTED = "rejected"
    BROKEN = "broken"
    CONNECTION = "connection"
    """The backend cannot be reached, or lacks what it needs to work at all."""
    TIMED_OUT = "timed out"
    """The call took longer than it may: what it did is unknown."""
    UNKNOWN = "unknown"
    """Anything else: some operation of the batch may be the cause."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a batch was not applied. `after_s`: the shortest wait; `count`, `bytes`: what the backend takes at once, if it said."""

    kind: FailureKind
    after_s: float = 0.0
    count: int | None = None
    bytes: int | None = None
    text: str


class Overran(Exception):
    """A call of `apply` that was given up at its time limit. Raised by the engine, never by a backend."""


_BATCH_FAILURES: Final[Mapping[type[BatchFailure], FailureKind]] = {
    RetryBatch: FailureKind.RETRY,
    Throttled: FailureKind.THROTTLED,
    BatchTooLarge: FailureKind.TOO_LARGE,
    BatchRejected: FailureKind.REJECTED,
    BackendBroken: FailureKind.BROKEN,
}

BAD_REQUEST: Final = frozenset({
    errno.EACCES, errno.EBADF, errno.EEXIST, errno.EFBIG, errno.EILSEQ, errno.EINVAL, errno.EISDIR, errno.ELOOP,
    errno.EMLINK, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY, errno.EPERM, errno.ESPIPE, errno.EXDEV,
})  # fmt: skip
"""Error numbers that speak of what was asked for (a name made of a key, say), and not of who was asked."""

CAUSES_MAX: Final = 16
"""Links of a chain of causes that are looked at: it may be a ring."""


def classify(error: BaseException) -> Failure:
    """What an exception of a backend means.

    An `OSError` is a matter of connection (so are a full disk and too many open files: they pass, and no operation is to blame)
    unless its number speaks of the request; so is what was raised `from` one.
    """
    text = text_of(error)
    if isinstance(error, Overran):
        return Failure(kind=FailureKind.TIMED_OUT, text=text)
    for cls, kind in _BATCH_FAILURES.items():
        if isinstance(error, cls):
            return _stated(error, kind, text)
    cause: BaseException | None = error
    for _ in range(CAUSES_MAX):
        if isinstance(cause, OSError) and cause.errno not in BAD_REQUEST:
            return Failure(kind=FailureKind.CONNECTION, text=text)
        if cause is None:
            break
        cause = cause.__cause__
    return Failure(kind=FailureKind.UNKNOWN, text=text)


def text_of(error: BaseException) -> str:
    """An exception's class and what it says; the class alone where it cannot say anything."""
    name = type(error).__name__
    try:
        return f"{name}: {error}"
    except BaseException:  # noqa: BLE001 - a backend's own class: whatever it raises must not hide the first error
        return name


def _stated(error: BatchFailure, kind: FailureKind, text: str) -> Failure:
    """A failure that a backend put in our words. What makes no sense in it is left out."""
    after = _wait_s(error.after) if _is_wait(error.after) else 0.0
    count = size = None
    if isinstance(error, BatchTooLarge):
        count, size = _bound(error.count), _bound(error.bytes)
    return Failure(kind=kind, after_s=after, count=count, bytes=size, text=text)


def _bound(value: object) -> int | None:
    """A number of things that a backend takes; None where it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


# --- what to do about it ------------------------------------------------------------------------------------


class Step(enum.StrEnum):
    """What to do with a batch that failed as a whole."""

    REPEAT = "repeat"
    """Nobody's own fault: try it again, whole, and whole again where it was being searched."""
    SPLIT = "split"
    """Search for the operation that makes it fail."""
    BLAME = "blame"
    """The only operation is the cause: it loses an attempt."""
    BURY = "bury"
    """The only operation is the cause, for ever: it becomes a dead letter."""
    SHRINK = "shrink"
    """Try it again in smaller batches."""
    STOP = "stop"
    """The shard stops and keeps its work until somebody repairs the backend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recourse:
    """The step, by which row of the table; the shortest wait before the next try; `count` of a SHRINK.

    `outage`: it speaks against the backend; `ok` is what its breaker is told.
    """

    step: Step
    case: str
    after_s: float = 0.0
    count: int = 0
    outage: bool = False
    ok: bool | None = None
    """False: the backend does not work. True: it works, and refused what it was given. None: nobody knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of the table. None: does not matter."""

    case: str
    kinds: frozenset[FailureKind]
    single: bool | None = None
    searching: bool | None = None
    retried: bool | None = None
    """Whether it was tried whole as often as the policy says."""
    step: Step
    ok: bool | None


_OUTAGE: Final = frozenset({
    FailureKind.RETRY, FailureKind.THROTTLED, FailureKind.CONNECTION, FailureKind.TIMED_OUT,
})  # fmt: skip
_BROKEN: Final = frozenset({FailureKind.BROKEN})
_TOO_LARGE: Final = frozenset({FailureKind.TOO_LARGE})
_REJECTED: Final = frozenset({FailureKind.REJECTED})
_UNKNOWN: Final = frozenset({FailureKind.UNKNOWN})

TABLE: Final = (
    Row(case="F1 broken", kinds=_BROKEN, step=Step.STOP, ok=False),
    Row(case="F2 outage", kinds=_OUTAGE, step=Step.REPEAT, ok=False),
    Row(case="F3 too large", kinds=_TOO_LARGE, single=False, step=Step.SHRINK, ok=True),
    Row(case="F4 too large alone", kinds=_TOO_LARGE, single=True, step=Step.BURY, ok=True),
    Row(case="F5 rejected", kinds=_REJECTED, single=False, step=Step.SPLIT, ok=True),
    Row(case="F6 rejected alone", kinds=_REJECTED, single=True, step=Step.BURY, ok=True),
    Row(case="F7 part of a search", kinds=_UNKNOWN, single=False, searching=True, step=Step.SPLIT, ok=None),
    Row(case="F8 isolated", kinds=_UNKNOWN, single=True, searching=True, step=Step.BLAME, ok=None),
    Row(case="F9 again", kinds=_UNKNOWN, searching=False, retried=False, step=Step.REPEAT, ok=False),
    Row(case="F10 often enough", kinds=_UNKNOWN, single=False, searching=False, retried=True, step=Step.SPLIT, ok=None),
    Row(case="F11 alone", kinds=_UNKNOWN, single=True, searching=False, retried=True, step=Step.BLAME, ok=None),
)  # fmt: skip
"""Which step follows. Exactly one row holds for each situation."""


def recourse(
    failure: Failure, *, tries: int, count: int, searching: bool, batch_retries: int, bytes: int = 0
) -> Recourse:
    """What to do with a batch of `count` operations (and `bytes`, where known) that failed.

    `tries`: how often it failed as a whole before; `searching`: whether it is a part of a search, or was isolated by one.
    """
    situation = (count == 1, searching, tries >= batch_retries)
    row = next(row for row in TABLE if failure.kind in row.kinds and _holds(row, situation))
    smaller = _smaller(failure, count, bytes) if row.step is Step.SHRINK else 0
    return Recourse(
        step=row.step,
        case=row.case,
        after_s=failure.after_s,
        count=smaller,
        outage=row.ok is False,
        ok=row.ok,
    )


def _holds(row: Row, situation: tuple[bool, bool, bool]) -> bool:
    """Whether a row speaks of a situation (single, searching, retried)."""
    wanted = (row.single, row.searching, row.retried)
    return all(want is None or want is fact for want, fact in zip(wanted, situation, strict=True))


def _smaller(failure: Failure, count: int, size: int) -> int:
    """How many operations to try next: what the backend said, if that is fewer, else half."""
    smaller = count // 2
    if failure.bytes is not None and failure.bytes < size:
        smaller = count * failure.bytes // size
    if failure.count is not None and failure.count < count:
        smaller = failure.count if failure.bytes is None else min(smaller, failure.count)
    return max(1, smaller)


def backoff_ns(failures: int, *, base_s: float, ceiling_s: float, chance: float) -> int:
    """Full jitter: chance x min(ceiling, base x 2^failures), in nanoseconds. `chance` is uniform in [0, 1).

    Source: M. Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015.
    """
    exponent = min(failures, 60)
    return int(chance * min(ceiling_s, base_s * 2**exponent) * 1_000_000_000)
