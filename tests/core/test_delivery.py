"""What a backend's answer or exception means: nothing is settled without being told so, nobody is blamed for an outage."""

from __future__ import annotations

import errno
import itertools
import math
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.segments import STORE
from walbatch import limits
from walbatch.core.delivery import (
    ASKED_FOR_RETRY,
    BAD_REQUEST,
    SAID_REJECTED,
    TABLE,
    Failure,
    FailureKind,
    Overran,
    Recourse,
    Step,
    Verdict,
    backoff_ns,
    classify,
    judge,
    overtaken,
    recourse,
    results_of,
)
from walbatch.errors import (
    BackendBroken,
    BatchRejected,
    BatchTooLarge,
    ResultTimeout,
    RetryBatch,
    Throttled,
)
from walbatch.types import Applied, Batch, CutReason, Failures, Order, Outcome, Rejected, Retry

KEYS = [b"a", b"b", b"c"]


def batch_of(*keys: bytes) -> Batch:
    return Batch(
        lane="put",
        shard=0,
        store=STORE,
        lsns=range(1, len(keys) + 1),
        keys=keys,
        payloads=[b""] * len(keys),
        priorities=[5] * len(keys),
        attempt=1,
        reason=CutReason.COUNT,
        mark=None,
    )


def verdict_of(
    applied: dict[int, Any] | None = None, retry: dict[int, float] | None = None, rejected: dict[int, str] | None = None,
    errors: dict[int, str] | None = None, error: str | None = None,
) -> Verdict:  # fmt: skip
    return Verdict(
        applied=applied or {}, retry=retry or {}, rejected=rejected or {}, errors=errors or {}, error=error
    )


# --- answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", Order, ids=lambda order: order.value)
def test_none_says_that_all_were_applied(order: Order) -> None:
    assert judge(batch_of(b"a", b"b"), None, order) == verdict_of({0: None, 1: None})


def test_results_are_handed_through() -> None:
    assert judge(batch_of(b"a", b"b"), [Applied("x"), Applied()], Order.KEY) == verdict_of({0: "x", 1: None})


def test_the_results_of_an_answer_that_says_applied_throughout_are_what_judge_finds() -> None:
    batch = batch_of(b"a", b"b")
    for answer in ([Applied(1), Applied(None)], (Applied(1), Applied(None))):
        found = results_of(answer, 2)
        assert found == [1, None]
        assert dict(enumerate(found)) == judge(batch, answer, Order.KEY).applied


class Lookalike(Applied):
    """Says that it is applied, in its own way."""


@pytest.mark.parametrize(
    "answer",
    [
        None, [], [Applied()], [Applied()] * 3, [Applied(), Retry()], [Rejected(), Applied()], [Applied(), None], {0: Applied()},
        Failures({}), [Applied(), Lookalike()], [Applied(), object.__new__(Applied)], "ab", 2,
    ],
)  # fmt: skip
def test_any_other_answer_is_left_to_judge(answer: Any) -> None:
    assert results_of(answer, 2) is None


def test_a_tuple_is_as_good_as_a_list() -> None:
    assert judge(batch_of(b"a"), (Applied(1),), Order.NONE).applied == {0: 1}


def test_failures_name_the_exceptions_and_say_that_the_rest_was_applied() -> None:
    answer = Failures({1: Retry(after=2.0, error="busy"), 2: Rejected("too old")})
    assert judge(batch_of(b"a", b"b", b"c"), answer, Order.KEY) == verdict_of(
        {0: None}, {1: 2.0}, {2: "too old"}, {1: "busy"}, "busy"
    )


ORDERS = {
    "by key": (Order.KEY, {0: None, 2: None}, {1: 1.0, 3: 0.0}),
    "by shard": (Order.SHARD, {0: None}, {1: 1.0, 2: 0.0, 3: 0.0}),
    "free": (Order.NONE, {0: None, 2: None, 3: None}, {1: 1.0}),
}


@pytest.mark.parametrize(("order", "applied", "retry"), ORDERS.values(), ids=ORDERS.keys())
def test_what_comes_after_a_failed_operation_is_tried_again_and_not_blamed(
    order: Order, applied: dict[int, Any], retry: dict[int, float]
) -> None:
    verdict = judge(batch_of(b"a", b"b", b"a", b"b"), Failures({1: Retry(after=1.0)}), order)
    assert verdict == verdict_of(applied, retry, errors={1: ASKED_FOR_RETRY}, error=ASKED_FOR_RETRY)


@pytest.mark.parametrize("later", [Applied(1), Rejected("no such row"), Retry(3.0, "no such row")], ids=repr)
def test_what_the_backend_says_of_an_operation_after_a_failed_one_of_its_key_does_not_count(
    later: Outcome,
) -> None:
    """It may be so only because the first one is missing."""
    verdict = judge(batch_of(b"a", b"a"), [Retry(), later], Order.KEY)
    wait = later.after if isinstance(later, Retry) else 0.0
    assert verdict == verdict_of(retry={0: 0.0, 1: wait}, errors={0: ASKED_FOR_RETRY}, error=ASKED_FOR_RETRY)


@pytest.mark.parametrize("order", Order, ids=lambda order: order.value)
def test_what_comes_after_a_rejected_operation_goes_on(order: Order) -> None:
    verdict = judge(batch_of(b"a", b"a"), Failures({0: Rejected()}), order)
    assert verdict == verdict_of({1: None}, rejected={0: SAID_REJECTED}, error=SAID_REJECTED)


@pytest.mark.parametrize(("order", "expected"), [
    (Order.NONE, set()),
    (Order.KEY, {0}),
    (Order.SHARD, {0, 1}),
])  # fmt: skip
def test_what_was_refused_is_overtaken_where_a_younger_one_that_must_not_was_applied(
    order: Order, expected: set[int]
) -> None:
    keys = [b"a", b"b", b"a", b"b"]
    assert overtaken([0, 1, 3], [2], keys, order) == expected
    assert overtaken([0, 1, 2, 3], [], keys, order) == set()
    assert overtaken([3], [0, 1, 2], keys, order) == set()


def test_the_first_error_that_says_something_is_reported() -> None:
    assert judge(batch_of(b"a", b"b"), [Retry(), Retry(error="full")], Order.NONE).error == "full"
    assert judge(batch_of(b"a", b"b"), [Retry(), Rejected("bad")], Order.NONE).error == "bad"


outcomes = st.one_of(
    st.builds(Applied, st.integers()),
    st.builds(Retry, after=st.floats(0, allow_infinity=False), error=st.sampled_from(["", "e"])),
    st.builds(Rejected, st.sampled_from(["", "r"])),
)


@given(
    rows=st.lists(st.tuples(st.sampled_from(KEYS), outcomes), max_size=12),
    order=st.sampled_from(Order),
    sparse=st.booleans(),
)
def test_every_operation_is_applied_rejected_or_tried_again(
    rows: list[tuple[bytes, Outcome]], order: Order, *, sparse: bool
) -> None:
    answers = [outcome for _, outcome in rows]
    keys = [key for key, _ in rows]
    retries = [index for index, answer in enumerate(answers) if isinstance(answer, Retry)]
    named = {index: answer for index, answer in enumerate(answers) if not isinstance(answer, Applied)}
    verdict = judge(batch_of(*keys), Failures(named) if sparse else answers, order)

    def blocked(index: int) -> bool:
        if order is Order.NONE:
            return False
        return any(
            failed < index and (order is Order.SHARD or keys[failed] == keys[index]) for failed in retries
        )

    for index, answer in enumerate(answers):
        match answer:
            case _ if blocked(index) or isinstance(answer, Retry):
                assert index in verdict.retry
                assert (index in verdict.errors) == (not blocked(index))
            case Applied():
                assert verdict.applied[index] == (None if sparse else answer.result)
            case _:
                assert verdict.rejected[index]
    assert sorted([*verdict.applied, *verdict.retry, *verdict.rejected]) == list(range(len(rows)))
    assert (verdict.error is None) == (not verdict.retry and not verdict.rejected)
    for wait in verdict.retry.values():
        assert 0 <= wait <= limits.RETRY_DELAY_NS_MAX / 1e9


@pytest.mark.parametrize("after", [1e300, 10**400], ids=["a float", "an integer above any float"])
def test_a_wait_is_cut_to_what_makes_sense(after: float) -> None:
    assert judge(batch_of(b"a"), [Retry(after=after)], Order.KEY).retry == {
        0: limits.RETRY_DELAY_NS_MAX / 1e9
    }
    assert classify(RetryBatch(after=after)).after_s == limits.RETRY_DELAY_NS_MAX / 1e9


def test_a_wait_that_makes_sense_is_kept() -> None:
    assert judge(batch_of(b"a"), [Retry(after=3)], Order.KEY).retry == {0: 3.0}


class Unfinished:
    """An `__init__` that does not call that of the class it is put in front of: its attributes are missing."""

    def __init__(self, *_: object) -> None:
        pass


class UnfinishedApplied(Unfinished, Applied):
    """A backend's own class."""


class UnfinishedRetry(Unfinished, Retry):
    """Another one."""


class UnfinishedRejected(Unfinished, Rejected):
    """A third one."""


class Unsaid(float):
    """A wait that cannot say what it is."""

    def __repr__(self) -> str:
        raise ZeroDivisionError


NONSENSE: Mapping[str, Any] = {
    "a number": 3,
    "true": True,
    "text": "ok",
    "bytes": b"ok",
    "a generator": (outcome for outcome in [Applied()]),
    "a dictionary": {0: Retry()},
    "too few outcomes": [Applied()],
    "too many outcomes": [Applied()] * 3,
    "no outcomes": [],
    "an outcome that is none": [Applied(), None],
    "the class instead of an outcome": [Applied(), Applied],
    "an exception as an outcome": [Applied(), ValueError("x")],
    "failures with an index too high": Failures({2: Retry()}),
    "failures with a negative index": Failures({-1: Retry()}),
    "failures with an index that is none": Failures({"0": Retry()}),  # type: ignore[dict-item]
    "failures with true for an index": Failures({True: Retry()}),
    "failures with an outcome that is none": Failures({0: "busy"}),  # type: ignore[dict-item]
    "failures with a list": Failures([Retry()]),  # type: ignore[arg-type]
    "a wait that is none": [Applied(), Retry(after="soon")],  # type: ignore[arg-type]
    "a wait of true": [Applied(), Retry(after=True)],
    "a negative wait": [Applied(), Retry(after=-1.0)],
    "a wait that is not a number": [Applied(), Retry(after=math.nan)],
    "a wait for ever": [Applied(), Retry(after=math.inf)],
    "an error that is no text": [Applied(), Retry(error=3)],  # type: ignore[arg-type]
    "a rejection with an exception": [Applied(), Rejected(ValueError("x"))],  # type: ignore[arg-type]
    "an applied without a result": [Applied(), UnfinishedApplied()],
    "a retry without a wait": [Applied(), UnfinishedRetry()],
    "a rejection without an error": Failures({0: UnfinishedRejected()}),
    "a wait that cannot be shown": [Applied(), Retry(after=Unsaid(-1))],
}


@pytest.mark.parametrize("answer", NONSENSE.values(), ids=NONSENSE.keys())
def test_nonsense_settles_nothing(answer: Any) -> None:
    with pytest.raises(ValueError):
        judge(batch_of(b"a", b"b"), answer, Order.KEY)


# --- exceptions ---------------------------------------------------------------------------------------------


def raised_from(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


class Flaky(RetryBatch):
    """A backend's own class."""


K = FailureKind
KINDS: Mapping[str, tuple[BaseException, FailureKind]] = {
    "try again": (RetryBatch("busy"), K.RETRY),
    "a class made of it": (Flaky(), K.RETRY),
    "throttled": (Throttled(), K.THROTTLED),
    "too large": (BatchTooLarge(), K.TOO_LARGE),
    "rejected": (BatchRejected(), K.REJECTED),
    "broken": (BackendBroken("wrong password"), K.BROKEN),
    "our own time limit": (Overran("30 s"), K.TIMED_OUT),
    "connection refused": (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), K.CONNECTION),
    "connection reset, said without a number": (ConnectionResetError(), K.CONNECTION),
    "a time-out of the backend's own": (TimeoutError(), K.CONNECTION),
    "a time-out of another engine's": (ResultTimeout("late"), K.CONNECTION),
    "no such host": (socket.gaierror(-2, "Name or service not known"), K.CONNECTION),
    "host unreachable": (OSError(errno.EHOSTUNREACH, "no route"), K.CONNECTION),
    "a full disk": (OSError(errno.ENOSPC, "full"), K.CONNECTION),
    "too many open files": (OSError(errno.EMFILE, "files"), K.CONNECTION),
    "a library's error that is an OSError": (OSError("something with the network"), K.CONNECTION),
    "a file that is not there": (FileNotFoundError(errno.ENOENT, "x"), K.UNKNOWN),
    "a name that is too long": (OSError(errno.ENAMETOOLONG, "x"), K.UNKNOWN),
    "no permission": (PermissionError(errno.EACCES, "x"), K.UNKNOWN),
    "a library's error because of the connection": (
        raised_from(RuntimeError("db"), raised_from(ValueError("x"), BrokenPipeError(errno.EPIPE, "pipe"))), K.CONNECTION,
    ),
    "anything else": (ValueError("x"), K.UNKNOWN),
    "an exit": (SystemExit(1), K.UNKNOWN),
    "an interrupt": (KeyboardInterrupt(), K.UNKNOWN),
}  # fmt: skip


@pytest.mark.parametrize(("error", "kind"), KINDS.values(), ids=KINDS.keys())
def test_an_exception_is_of_a_kind(error: BaseException, kind: FailureKind) -> None:
    failure = classify(error)
    assert failure.kind is kind
    assert failure.text == f"{type(error).__name__}: {error}"


def test_every_number_of_a_bad_request_may_be_a_matter_of_the_operation() -> None:
    assert {classify(OSError(number, "x")).kind for number in BAD_REQUEST} == {K.UNKNOWN}


def test_what_a_backend_says_of_the_batch_is_kept() -> None:
    assert classify(Throttled(after=2)) == Failure(kind=K.THROTTLED, after_s=2.0, text="Throttled: Throttled")
    failure = classify(BatchTooLarge("413", count=100, bytes=1_000, after=1.5))
    assert (failure.after_s, failure.count, failure.bytes) == (1.5, 100, 1_000)


class Mute(Exception):
    """An exception that cannot say what it is."""

    def __str__(self) -> str:
        return str(self.missing)  # type: ignore[attr-defined]  # that is its mistake


class UnfinishedThrottled(Unfinished, Throttled):
    """A backend's own class, whose `__init__` does not call ours."""


class UnfinishedTooLarge(Unfinished, BatchTooLarge):
    """The same, of one with more to say."""


def test_an_exception_that_cannot_say_what_it_is_is_told_by_its_class() -> None:
    assert classify(Mute()) == Failure(kind=K.UNKNOWN, text="Mute")


@pytest.mark.parametrize(
    ("error", "kind"),
    [(UnfinishedThrottled("x"), K.THROTTLED), (UnfinishedTooLarge("x"), K.TOO_LARGE)],
    ids=repr,
)
def test_an_exception_whose_init_does_not_call_ours_says_its_kind_and_no_more(
    error: BaseException, kind: FailureKind
) -> None:
    assert classify(error) == Failure(kind=kind, text=f"{type(error).__name__}: x")


@pytest.mark.parametrize("nonsense", [-1, math.nan, math.inf, "soon", None, True], ids=repr)
def test_nonsense_in_an_exception_is_left_out(nonsense: Any) -> None:
    failure = classify(BatchTooLarge(count=nonsense, bytes=nonsense, after=nonsense))
    assert (failure.after_s, failure.count, failure.bytes) == (0.0, None, None)


def test_a_ring_of_causes_ends() -> None:
    error, other = ValueError("x"), ValueError("y")
    error.__cause__, other.__cause__ = other, error
    assert classify(error).kind is K.UNKNOWN


# --- recourses ----------------------------------------------------------------------------------------------


def facts(kind: FailureKind, *, tries: int = 0, count: int = 8, searching: bool = False) -> Recourse:
    return recourse(
        Failure(kind=kind, text="x"), tries=tries, count=count, searching=searching, batch_retries=3
    )


RECOURSES = {
    "F1 broken": (facts(K.BROKEN), Step.STOP),
    "F2 outage": (facts(K.CONNECTION, tries=99, searching=True), Step.REPEAT),
    "F3 too large": (facts(K.TOO_LARGE), Step.SHRINK),
    "F4 too large alone": (facts(K.TOO_LARGE, count=1), Step.BURY),
    "F5 rejected": (facts(K.REJECTED), Step.SPLIT),
    "F6 rejected alone": (facts(K.REJECTED, count=1), Step.BURY),
    "F7 part of a search": (facts(K.UNKNOWN, searching=True), Step.SPLIT),
    "F8 isolated": (facts(K.UNKNOWN, searching=True, count=1), Step.BLAME),
    "F9 again": (facts(K.UNKNOWN, tries=2), Step.REPEAT),
    "F10 often enough": (facts(K.UNKNOWN, tries=3), Step.SPLIT),
    "F11 alone": (facts(K.UNKNOWN, tries=3, count=1), Step.BLAME),
}


@pytest.mark.parametrize("case", RECOURSES)
def test_each_row_of_the_table(case: str) -> None:
    found, step = RECOURSES[case]
    assert (found.case, found.step) == (case, step)


def test_there_is_a_test_for_each_row() -> None:
    assert list(RECOURSES) == [row.case for row in TABLE]


SITUATIONS = list(itertools.product(FailureKind, (1, 2, 100), (0, 1, 2, 3, 4), (False, True), (0, 1, 3)))


def test_exactly_one_row_holds_in_each_situation() -> None:
    for kind, count, tries, searching, batch_retries in SITUATIONS:
        fits = [
            row.case for row in TABLE
            if kind in row.kinds and row.single in {None, count == 1} and row.searching in {None, searching}
            and row.retried in {None, tries >= batch_retries}
        ]  # fmt: skip
        failure = Failure(kind=kind, text="x")
        found = recourse(failure, tries=tries, count=count, searching=searching, batch_retries=batch_retries)
        assert fits == [found.case]


def test_an_outage_costs_nobody_an_attempt_and_splits_nothing() -> None:
    for kind, count, tries, searching, batch_retries in SITUATIONS:
        if kind in {K.CONNECTION, K.RETRY, K.THROTTLED, K.TIMED_OUT}:
            failure = Failure(kind=kind, after_s=2.0, text="x")
            found = recourse(
                failure, tries=tries, count=count, searching=searching, batch_retries=batch_retries
            )
            assert found == Recourse(step=Step.REPEAT, case="F2 outage", after_s=2.0, outage=True, ok=False)


def test_what_speaks_against_the_operations_does_not_speak_against_the_backend() -> None:
    said = {ok: [row.case.split()[0] for row in TABLE if row.ok is ok] for ok in (False, True, None)}
    assert said == {
        False: ["F1", "F2", "F9"],
        True: ["F3", "F4", "F5", "F6"],
        None: ["F7", "F8", "F10", "F11"],
    }
    assert [found.outage for found, _ in RECOURSES.values()] == [row.ok is False for row in TABLE]


def test_the_page_has_the_same_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "delivery.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| F")]
    words = {False: "no", True: "yes", None: "it does not tell"}
    assert [(row[0], row[-1]) for row in rows] == [(row.case, words[row.ok]) for row in TABLE]


SIZES = {
    "half, if nothing is known": (8, 800, None, None, 4),
    "what the backend takes": (8, 800, 5, None, 5),
    "what its bytes leave room for": (8, 800, None, 300, 3),
    "the smaller of both": (8, 800, 2, 300, 2),
    "the smaller of both, by bytes": (8, 800, 7, 300, 3),
    "half, where what it says explains nothing": (8, 800, 8, 800, 4),
    "one at least": (2, 800, None, 1, 1),
    "bytes that nobody counted": (8, 0, None, 300, 4),
}


@pytest.mark.parametrize(("count", "size", "most", "room", "expected"), SIZES.values(), ids=SIZES.keys())
def test_a_batch_that_is_too_large_shrinks_to(
    count: int, size: int, most: int | None, room: int | None, expected: int
) -> None:
    failure = Failure(kind=K.TOO_LARGE, count=most, bytes=room, text="x")
    found = recourse(failure, tries=0, count=count, searching=False, batch_retries=3, bytes=size)
    assert found.count == expected


@given(
    count=st.integers(2, 10_000), size=st.integers(0, 10**6), most=st.none() | st.integers(1, 20_000),
    room=st.none() | st.integers(1, 10**6),
)  # fmt: skip
def test_it_always_shrinks(count: int, size: int, most: int | None, room: int | None) -> None:
    failure = Failure(kind=K.TOO_LARGE, count=most, bytes=room, text="x")
    found = recourse(failure, tries=0, count=count, searching=False, batch_retries=3, bytes=size)
    assert 1 <= found.count < count


# --- waits --------------------------------------------------------------------------------------------------


@given(
    failures=st.integers(0, 10_000),
    base_s=st.floats(0, 10),
    ceiling_s=st.floats(0, limits.RETRY_DELAY_NS_MAX / 1e9),
    chance=st.floats(0, 1, exclude_max=True),
)
def test_a_backoff_stays_below_its_ceiling_and_its_doubling(
    failures: int, base_s: float, ceiling_s: float, chance: float
) -> None:
    delay = backoff_ns(failures, base_s=base_s, ceiling_s=ceiling_s, chance=chance)
    assert 0 <= delay <= ceiling_s * 1e9
    assert failures > 60 or delay <= base_s * 2**failures * 1e9


def test_a_backoff_doubles_with_each_failure_up_to_its_ceiling() -> None:
    delays = [backoff_ns(failures, base_s=1, ceiling_s=5, chance=0.5) for failures in range(5)]
    assert delays == [500_000_000, 1_000_000_000, 2_000_000_000, 2_500_000_000, 2_500_000_000]
