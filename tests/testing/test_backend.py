"""The model backend and the stand-in for the state: what they keep, and how badly they can behave."""

from __future__ import annotations

import errno

import pytest

from walbatch.errors import Fenced, StorageError
from walbatch.testing.simulation.backend import BackendDisk, Manner, ModelBackend, TransactionalModelBackend
from walbatch.testing.simulation.clock import ManualClock
from walbatch.testing.simulation.faults import Fault, FaultPlan
from walbatch.testing.simulation.scheduler import Scheduler
from walbatch.testing.simulation.state import SimulatedState, StateDisk
from walbatch.types import Applied, Batch, Checkpoint, CutReason, LaneMemory, Mark, Retry

STORE = b"s" * 16


def batch(*lsns: int, mark: Mark | None = None) -> Batch:
    return Batch(
        lane="put", shard=0, store=STORE, lsns=lsns, keys=[b"k%d" % lsn for lsn in lsns],
        payloads=[b"p%d" % lsn for lsn in lsns], priorities=[5] * len(lsns), attempt=1, reason=CutReason.COUNT, mark=mark,
    )  # fmt: skip


def backend(
    manner: Manner = Manner.APPLY, kind: type[ModelBackend] = ModelBackend, disk: BackendDisk | None = None
) -> ModelBackend:
    scheduler = Scheduler()
    made = kind(
        disk or BackendDisk(), clock=ManualClock(), threads=scheduler, on_call=lambda call, path: None,
        on_applied=lambda batch, operation: None, manners=lambda batch, call: manner,
    )  # fmt: skip
    if isinstance(made, TransactionalModelBackend):
        made.open("put", 1, STORE)
    return made


@pytest.mark.parametrize(
    ("manner", "applied", "error"),
    [
        (Manner.APPLY, 4, None),
        (Manner.FAIL, 0, ConnectionError),
        (Manner.PART, 2, ConnectionError),
        (Manner.TIMEOUT, 4, TimeoutError),
        (Manner.LIE, 0, None),
    ],
    ids=str,
)
def test_a_plain_backend_behaves_as_it_is_told(
    manner: Manner, applied: int, error: type[Exception] | None
) -> None:
    tried = backend(manner)
    if error is None:
        assert tried.apply(batch(1, 2, 3, 4)) is None
    else:
        with pytest.raises(error):
            tried.apply(batch(1, 2, 3, 4))
    assert tried.disk.effects == applied


def test_a_partial_answer_names_what_is_left() -> None:
    assert backend(Manner.ANSWER_PART).apply(batch(1, 2)) == [Applied(), Retry(error="later")]
    careful = backend(Manner.ANSWER_PART, TransactionalModelBackend)
    assert careful.apply(batch(1, 2)) == [Retry(error="later")] * 2
    assert careful.disk.effects == 0


def test_a_slow_backend_takes_virtual_time() -> None:
    scheduler = Scheduler()
    slow = ModelBackend(
        BackendDisk(), clock=scheduler.clock, threads=scheduler, on_call=scheduler.step,
        on_applied=lambda batch, operation: None, manners=lambda batch, call: Manner.SLOW,
    )  # fmt: skip
    before = scheduler.clock.now_ns
    scheduler.run(lambda: slow.apply(batch(1)))
    assert scheduler.clock.now_ns - before >= 50_000_000
    assert slow.disk.counts[STORE, 1] == 1


def test_a_plain_backend_applies_again_what_comes_again_and_a_transactional_one_does_not() -> None:
    plain = backend()
    exact = backend(kind=TransactionalModelBackend)
    for tried in (plain, exact):
        for _ in range(2):
            tried.apply(batch(1, 2, mark=Mark(epoch=1, watermark=2)))
    assert plain.disk.counts[STORE, 1] == 2
    assert exact.disk.counts[STORE, 1] == 1
    assert isinstance(exact, TransactionalModelBackend)
    assert exact.applied_mark(0) == Mark(epoch=1, watermark=2)


def test_a_transactional_backend_refuses_an_engine_that_was_replaced() -> None:
    tried = backend(kind=TransactionalModelBackend)
    tried.apply(batch(1, mark=Mark(epoch=2, watermark=1)))
    with pytest.raises(Fenced):
        tried.apply(batch(2, mark=Mark(epoch=1, watermark=2)))


# --- state ---


def checkpoint(generation: int) -> Checkpoint:
    return Checkpoint(
        generation=generation, epoch=1, watermark=generation, durable_lsn=9, segment=1, settled_count=0
    )


def opened(disk: StateDisk, *faults: Fault) -> SimulatedState:
    return SimulatedState(
        disk, "/state", faults=FaultPlan(faults), on_call=lambda call, path: None, on_save=lambda checkpoint: None
    )  # fmt: skip


def test_every_save_is_durable_when_it_returns() -> None:
    disk = StateDisk()
    state = opened(disk)
    state.save_lanes({"put": LaneMemory(name="put", shards=2)})
    state.save_checkpoint(checkpoint(1))
    (image,) = disk.images()
    again = opened(image)
    assert again.load_checkpoint() == (checkpoint(1), [])
    assert again.load_lanes() == ({"put": LaneMemory(name="put", shards=2)}, [])


def test_a_save_that_failed_may_have_been_kept_and_a_full_disk_keeps_nothing() -> None:
    disk = StateDisk()
    state = opened(
        disk,
        Fault(call="save checkpoint", number=2, error=errno.ENOSPC),
        Fault(call="save checkpoint", number=3),
    )
    state.save_checkpoint(checkpoint(1))
    with pytest.raises(StorageError):
        state.save_checkpoint(checkpoint(2))
    assert len(list(disk.images())) == 1
    for _ in range(2):
        with pytest.raises(StorageError):
            state.save_checkpoint(checkpoint(3))
    assert [opened(image).load_checkpoint()[0] for image in disk.images()] == [checkpoint(3), checkpoint(1)]


def test_a_damaged_generation_is_found_until_a_save_replaces_it() -> None:
    disk = StateDisk()
    state = opened(disk)
    for generation in (1, 2):
        state.save_checkpoint(checkpoint(generation))
    disk.garbled = frozenset({2})
    again = opened(disk)
    assert again.load_checkpoint() == (checkpoint(1), ["generation 2 of the checkpoint is damaged"])
    disk.garbled = frozenset({1, 2})
    assert opened(disk).load_checkpoint()[0] is None
    assert len(opened(disk).load_checkpoint()[1]) == 2
    again.save_checkpoint(checkpoint(2))
    assert again.load_checkpoint() == (checkpoint(2), ["generation 1 of the checkpoint is damaged"])


def test_states_that_differ_have_fingerprints_that_differ() -> None:
    disk = StateDisk()
    state = opened(disk)
    seen = {disk.fingerprint()}
    state.save_checkpoint(checkpoint(1))
    seen.add(disk.fingerprint())
    state.save_checkpoint(checkpoint(2))
    seen.add(disk.fingerprint())
    assert disk.clone().fingerprint() == disk.fingerprint()
    disk.forget(1)
    state.save_checkpoint(checkpoint(4))
    seen.add(disk.fingerprint())
    disk.garbled = frozenset({4})
    seen.add(disk.fingerprint())
    assert len(seen) == 5


def test_loading_fails_as_it_is_told() -> None:
    faults = [Fault(call="load checkpoint"), Fault(call="load lanes", error=errno.EROFS)]
    state = opened(StateDisk(), *faults)
    for load in (state.load_checkpoint, state.load_lanes):
        with pytest.raises(StorageError):
            load()
        load()


def test_a_transactional_backend_never_asks_again_for_what_its_mark_covers() -> None:
    tried = backend(Manner.ANSWER_PART, TransactionalModelBackend)
    tried.disk.marks[STORE, "put", 0] = Mark(epoch=1, watermark=1)
    assert tried.apply(batch(1, 2)) == [Applied(), Retry(error="later")]


def test_a_state_can_be_stale_or_tell_of_damage() -> None:
    disk = StateDisk()
    state = opened(disk)
    state.save_checkpoint(checkpoint(1))
    state.save_checkpoint(checkpoint(2))
    disk.stale_commits, disk.findings = 1, ("the other generation is damaged",)
    assert opened(disk).load_checkpoint() == (checkpoint(1), ["the other generation is damaged"])
