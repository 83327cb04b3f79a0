"""Backends that answer for each operation, raise for a whole batch, or come back too late."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from walbatch.errors import BackendBroken, BatchRejected, BatchTooLarge, RetryBatch, Throttled
from walbatch.testing.simulation.backend import (
    HANG_NS,
    BackendDisk,
    Manner,
    ModelBackend,
    Poison,
    Reaction,
    TransactionalModelBackend,
)
from walbatch.testing.simulation.scheduler import Scheduler
from walbatch.types import Applied, Batch, CutReason, Mark, Outcome, Rejected, Retry

STORE = b"s" * 16


def batch(*lsns: int, watermark: int | None = None) -> Batch:
    return Batch(
        lane="put", shard=0, store=STORE, lsns=lsns, keys=[b"k%d" % lsn for lsn in lsns],
        payloads=[b"p%d" % lsn for lsn in lsns], priorities=[5] * len(lsns), attempt=1, reason=CutReason.COUNT,
        mark=None if watermark is None else Mark(epoch=1, watermark=watermark),
    )  # fmt: skip


class Watched:
    """A backend whose reactions are given, and what it told."""

    def __init__(self, *reactions: Reaction, kind: type[ModelBackend] = ModelBackend) -> None:
        self.given: list[Sequence[int]] = []
        self.blamed: list[bytes] = []
        self.applied: list[int | None] = []
        self.scheduler = Scheduler()
        self.backend = kind(
            BackendDisk(), clock=self.scheduler.clock, threads=self.scheduler, on_call=lambda call, path: None,
            on_given=lambda batch: self.given.append(batch.lsns),
            on_applied=lambda batch, operation: self.applied.append(operation.lsn),
            on_blamed=lambda operation, _applied: self.blamed.append(operation.payload),
            manners=lambda batch, call: reactions[call - 1],
        )  # fmt: skip
        if isinstance(self.backend, TransactionalModelBackend):
            self.backend.open("put", 1, STORE)

    def apply(self, tried: Batch) -> Any:
        return self.backend.apply(tried)


OUTCOMES: list[Outcome] = [Applied(), Rejected("no"), Retry(error="later"), Applied()]


def test_outcomes_are_applied_as_they_say_and_the_others_are_blamed() -> None:
    tried = Watched(OUTCOMES)
    assert tried.apply(batch(1, 2, 3, 4)) == OUTCOMES
    assert tried.given == [(1, 2, 3, 4)]
    assert tried.applied == [1, 4]
    assert tried.blamed == [b"p2", b"p3"]


def test_a_transactional_backend_leaves_out_of_its_mark_what_it_did_not_apply() -> None:
    tried = Watched(OUTCOMES, OUTCOMES, kind=TransactionalModelBackend)
    tried.apply(batch(1, 2, 3, 4, watermark=4))
    assert isinstance(tried.backend, TransactionalModelBackend)
    assert tried.backend.applied_mark(0) == Mark(epoch=1, watermark=1, ranges=((4, 4),))
    assert tried.apply(batch(4, 3, 2, 1, watermark=4)) == [
        Applied(),
        Rejected("no"),
        Retry(error="later"),
        Applied(),
    ]
    assert tried.applied == [1, 4], "what its mark covers is applied already"


def test_what_is_covered_cannot_be_refused_any_more() -> None:
    tried = Watched(Manner.TIMEOUT, OUTCOMES, kind=TransactionalModelBackend)
    with pytest.raises(TimeoutError):
        tried.apply(batch(1, 2, 3, 4, watermark=4))
    assert tried.apply(batch(1, 2, 3, 4, watermark=4)) == [Applied()] * 4
    assert not tried.blamed


@pytest.mark.parametrize(
    ("error", "blamed"),
    [
        (Poison([b"p2"]), [b"p2"]), (ValueError("odd"), [b"p1", b"p2"]), (BatchRejected(), [b"p1", b"p2"]),
        (BatchTooLarge(), [b"p1", b"p2"]), (ConnectionRefusedError(), []), (RetryBatch(), []), (Throttled(), []),
        (BackendBroken(), []),
    ],
)  # fmt: skip
def test_what_is_raised_applies_nothing_and_blames_whom_it_may_mean(
    error: Exception, blamed: list[bytes]
) -> None:
    tried = Watched(error)
    with pytest.raises(type(error)):
        tried.apply(batch(1, 2))
    assert tried.blamed == blamed
    assert not tried.applied


def test_a_call_that_hangs_comes_back_and_has_applied() -> None:
    tried = Watched(Manner.HANG)
    before = tried.scheduler.clock.now_ns
    tried.scheduler.run(lambda: tried.apply(batch(1)))
    assert tried.scheduler.clock.now_ns - before >= HANG_NS
    assert tried.applied == [1]
