"""Delivery as a user sees it: what is given up, cancelled, delayed, repeated, and what an engine says of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import walbatch as wb
from tests.memory import MemoryFileSystem, environment
from tests.support import FAST, QUICK_RETRY, Recorder, wait_until

ROOT = "/q"
SETTINGS = wb.Settings(segment_bytes=2**16, memory_bytes_max=2**20, timer_ms=1, checkpoint_ms=1)
NEVER = wb.Trigger(count=10_000, linger_ms=3_600_000)


def open_engine(
    lanes: dict[str, wb.Lane], fs: MemoryFileSystem, *, settings: wb.Settings = SETTINGS
) -> wb.Engine:
    return wb.Engine.open(ROOT, lanes=lanes, settings=settings, environment=environment(fs))


@pytest.fixture
def fs() -> MemoryFileSystem:
    return MemoryFileSystem()


def put(backend: Any, **settings: Any) -> dict[str, wb.Lane]:
    return {"put": wb.Lane(backend, **{"trigger": FAST, "retry": QUICK_RETRY, **settings})}


def check_identity(engine: wb.Engine) -> None:
    stats = engine.stats()
    assert stats.unaccounted == 0, stats


class Answering:
    """A backend that answers for each operation by its payload, and counts what it was given."""

    def __init__(self, answers: dict[bytes, Callable[[], Any]]) -> None:
        self.answers = answers
        self.given: Counter[bytes] = Counter()
        self.applied: list[bytes] = []
        self.batches: list[wb.Batch] = []

    def apply(self, batch: wb.Batch) -> Any:
        self.batches.append(batch)
        outcomes = []
        for operation in batch:
            self.given[operation.payload] += 1
            answer = self.answers.get(operation.payload, wb.Applied)()
            outcomes.append(answer)
            if isinstance(answer, wb.Applied):
                self.applied.append(operation.payload)
        return outcomes


# --- dead letters ------------------------------------------------------------------------------------------------------


def test_a_rejected_operation_becomes_a_dead_letter_and_the_others_are_applied(fs: MemoryFileSystem) -> None:
    backend = Answering({b"bad": lambda: wb.Rejected("no such table")})
    with open_engine(put(backend), fs) as engine:
        engine.submit_many("put", [(b"a", b"1"), (b"b", b"bad"), (b"c", b"2")])
        engine.flush(timeout=30)
        (letter,) = engine.dead_letters()
        assert (letter.lsn, letter.lane, letter.key, letter.payload) == (2, "put", b"b", b"bad")
        assert letter.reason is wb.DeathReason.REJECTED
        assert letter.error == "no such table"
        assert engine.status(2) is wb.OperationStatus.DEAD
        assert engine.status(1) is wb.OperationStatus.APPLIED
        stats = engine.stats()
        assert (stats.applied, stats.dead, stats.pending) == (2, 1, 0)
        check_identity(engine)
    assert backend.given[b"bad"] == 1


def test_closing_tells_how_many_operations_were_given_up_meanwhile(fs: MemoryFileSystem) -> None:
    engine = open_engine(put(Answering({b"bad": lambda: wb.Rejected("never")}), trigger=NEVER), fs)
    engine.submit_many("put", [(b"a", b"bad"), (b"b", b"good"), (b"c", b"bad")])
    report = engine.close(timeout=30)
    assert (report.settled, report.dead, report.remaining, report.reason) == (3, 2, 0, "drained")


def test_its_ticket_says_that_an_operation_is_dead(fs: MemoryFileSystem) -> None:
    with open_engine(put(Answering({b"bad": lambda: wb.Rejected("never")})), fs) as engine:
        ticket = engine.submit("put", key=b"k", payload=b"bad")
        with pytest.raises(wb.OperationDead, match="never"):
            ticket.result(timeout=30)


def test_a_dead_operation_is_not_delivered_after_a_crash_and_its_letter_is_there(
    fs: MemoryFileSystem,
) -> None:
    settings = wb.Settings(segment_bytes=2**16, timer_ms=1, checkpoint_ms=3_600_000)
    engine = open_engine(put(Answering({b"bad": lambda: wb.Rejected("no")})), fs, settings=settings)
    engine.submit("put", key=b"k", payload=b"bad")
    wait_until(lambda: engine.stats().dead == 1, what="it is given up")
    crashed = fs.after_power_cut()
    engine.close(drain=False)
    again = Answering({})
    with open_engine(put(again), crashed) as engine:
        engine.flush(timeout=30)
        assert [letter.lsn for letter in engine.dead_letters()] == [1]
        assert engine.status(1) is wb.OperationStatus.DEAD
        check_identity(engine)
    assert not again.given


def test_an_operation_that_fails_by_itself_dies_after_its_last_attempt(fs: MemoryFileSystem) -> None:
    backend = Answering({b"bad": lambda: wb.Retry(error="constraint")})
    retry = wb.RetryPolicy(base_s=0.001, ceiling_s=0.002, attempts=4)
    with open_engine(put(backend, retry=retry), fs) as engine:
        engine.submit_many("put", [(b"%d" % n, b"fine") for n in range(50)] + [(b"b", b"bad")])
        engine.flush(timeout=30)
        (letter,) = engine.dead_letters()
        assert (letter.attempts, letter.reason, letter.error) == (4, wb.DeathReason.ATTEMPTS, "constraint")
    assert backend.given[b"bad"] == 4
    assert backend.given[b"fine"] == 50


def test_a_poisonous_operation_is_found_by_splitting_and_nothing_else_dies(fs: MemoryFileSystem) -> None:
    applied: list[bytes] = []

    def apply(batch: wb.Batch) -> None:
        if b"poison" in batch.payloads:
            raise ValueError("cannot encode")
        applied.extend(batch.payloads)

    retry = wb.RetryPolicy(base_s=0.0001, ceiling_s=0.0002, attempts=2, batch_retries=1)
    with open_engine(put(apply, retry=retry, trigger=wb.Trigger(count=64, linger_ms=1)), fs) as engine:
        engine.submit_many("put", [(b"%d" % n, b"poison" if n == 37 else b"%d" % n) for n in range(64)])
        engine.flush(timeout=30)
        (letter,) = engine.dead_letters()
        assert (letter.key, letter.error) == (b"37", "ValueError: cannot encode")
        check_identity(engine)
    assert sorted(applied) == sorted(b"%d" % n for n in range(64) if n != 37)


def test_an_outage_costs_no_operation_an_attempt(fs: MemoryFileSystem) -> None:
    down = True
    calls = 0
    applied: list[bytes] = []

    def apply(batch: wb.Batch) -> None:
        nonlocal calls
        calls += 1
        if down:
            raise ConnectionRefusedError("nobody listens")
        applied.extend(batch.payloads)

    retry = wb.RetryPolicy(base_s=0.001, ceiling_s=0.002, attempts=1, breaker_s=0.001, breaker_s_max=0.002)
    with open_engine(put(apply, retry=retry), fs) as engine:
        engine.submit_many("put", [(b"k", b"%d" % n) for n in range(20)])
        wait_until(lambda: calls >= 30, what="it was tried often")
        assert engine.stats().lanes["put"].breaker != "closed"
        assert any(reason.name == "breaker" for reason in engine.health().reasons)
        down = False
        engine.flush(timeout=30)
        assert not engine.dead_letters()
    assert applied == [b"%d" % n for n in range(20)]


def test_an_outage_that_raises_anything_opens_the_breaker_before_a_fifth_of_twenty_has_died(
    fs: MemoryFileSystem,
) -> None:
    def down(_batch: wb.Batch) -> None:
        raise RuntimeError("the driver says nothing better")

    retry = wb.RetryPolicy(base_s=0.001, ceiling_s=0.002, attempts=1, breaker_s=3600, breaker_s_max=3600)
    trigger = wb.Trigger(count=30, linger_ms=1)  # one batch: all that follows is the search in it
    with open_engine(put(down, retry=retry, trigger=trigger), fs) as engine:
        engine.submit_many("put", [(b"%d" % number, b"") for number in range(30)])
        wait_until(lambda: engine.stats().lanes["put"].breaker == "open", what="the breaker opens")
        assert engine.stats().dead <= 4
        engine.close(drain=False)


def test_what_a_search_finds_out_does_not_speak_for_the_backend(fs: MemoryFileSystem) -> None:
    """A batch that failed whole, and whose halves failed, is no sign that the backend works."""
    calls: list[int] = []

    def down(batch: wb.Batch) -> None:
        calls.append(len(batch))
        raise RuntimeError("the driver says nothing better")

    retry = wb.RetryPolicy(
        base_s=0.001, ceiling_s=0.002, batch_retries=1, breaker_failures=2, breaker_s=3600, breaker_s_max=3600
    )
    lane = put(down, retry=retry, trigger=wb.Trigger(count=2, linger_ms=1), order="shard")
    with open_engine(lane, fs) as engine:
        engine.submit_many("put", [(b"%d" % number, b"") for number in range(4)])
        wait_until(lambda: engine.stats().lanes["put"].breaker == "open", what="the breaker opens")
        assert calls.count(2) == 3
        engine.close(drain=False)


def test_a_dead_letter_can_be_requeued_and_keeps_its_identity(fs: MemoryFileSystem) -> None:
    broken = True
    seen: list[tuple[int | None, int | None]] = []

    def apply(batch: wb.Batch) -> Any:
        seen.extend((operation.lsn, operation.identity) for operation in batch)
        return [wb.Rejected("later") if broken else wb.Applied() for _ in batch]

    with open_engine(put(apply), fs) as engine:
        engine.submit("put", key=b"k", payload=b"v", priority=7)
        engine.flush(timeout=30)
        broken = False
        assert engine.requeue() == 1
        engine.flush(timeout=30)
        assert not engine.dead_letters()
        assert engine.requeue() == 0
        check_identity(engine)
    assert seen == [(1, 1), (2, 1)]


def test_a_requeue_that_was_cut_off_submits_nothing_twice(fs: MemoryFileSystem) -> None:
    broken = True
    given: list[int | None] = []

    def apply(batch: wb.Batch) -> Any:
        given.extend(operation.identity for operation in batch)
        return [wb.Rejected("later") if broken else wb.Applied() for _ in batch]

    with open_engine(put(apply), fs) as engine:
        engine.submit("put", key=b"k", payload=b"v")
        engine.flush(timeout=30)
        broken = False

        def fail(call: str, path: str) -> None:
            if call == "unbury":
                raise OSError(28, "no room")

        fs.fail = fail
        with pytest.raises(wb.StorageError):
            engine.requeue()
        fs.fail = None
        engine.flush(timeout=30)
        assert engine.requeue() == 1
        engine.flush(timeout=30)
        assert not engine.dead_letters()
    assert given == [1, 1], "the first try, and one requeue"


def test_dead_letters_can_be_dropped(fs: MemoryFileSystem) -> None:
    with open_engine(put(Answering({b"bad": lambda: wb.Rejected("no")})), fs) as engine:
        engine.submit_many("put", [(b"a", b"bad"), (b"b", b"bad")])
        engine.flush(timeout=30)
        assert engine.drop([1, 99]) == 1
        assert [letter.lsn for letter in engine.dead_letters("put")] == [2]
        assert engine.dead_letters("other") == []


def test_without_room_for_dead_letters_operations_wait_and_health_says_so(fs: MemoryFileSystem) -> None:
    settings = wb.Settings(segment_bytes=2**16, timer_ms=1, checkpoint_ms=1, dead_letters_max=1)
    retry = wb.RetryPolicy(base_s=0.001, ceiling_s=0.002)
    lanes = put(Answering({b"bad": lambda: wb.Rejected("no")}), retry=retry, order="none")
    with open_engine(lanes, fs, settings=settings) as engine:
        engine.submit("put", key=b"a", payload=b"bad")
        engine.flush(timeout=30)
        ticket = engine.submit("put", key=b"b", payload=b"bad")
        engine.submit("put", key=b"c", payload=b"fine").result(timeout=30)
        assert not ticket.done
        assert any(reason.name == "dead letters" for reason in engine.health().reasons)
        engine.drop([1])
        with pytest.raises(wb.OperationDead):
            ticket.result(timeout=30)
        assert engine.stats().dead == 2


class RefusesFirsts:
    """Keeps the last payload of each key, and refuses those that begin with "first", as long as it is told to."""

    def __init__(self) -> None:
        self.refuses = True
        self.rows: dict[bytes, bytes] = {}

    def apply(self, batch: wb.Batch) -> Any:
        outcomes: list[Any] = []
        for operation in batch:
            if self.refuses and operation.payload.startswith(b"first"):
                outcomes.append(wb.Rejected("not now"))
            else:
                self.rows[operation.key] = operation.payload
                outcomes.append(wb.Applied())
        return outcomes


@pytest.mark.parametrize("order", ["key", "shard"])
def test_what_was_refused_and_overtaken_never_comes_back_although_too_much_is_refused(
    fs: MemoryFileSystem, order: str
) -> None:
    backend = RefusesFirsts()
    retry = wb.RetryPolicy(base_s=0.001, ceiling_s=0.002, breaker_s=3600, breaker_s_max=3600)
    with open_engine(put(backend, trigger=wb.Trigger(count=50), retry=retry, order=order), fs) as engine:
        keys = [b"%d" % number for number in range(25)]
        lsns = engine.submit_many(
            "put", [*((key, b"first") for key in keys), *((key, b"second") for key in keys)]
        )
        wait_until(lambda: engine.stats().lanes["put"].breaker == "open", what="too much is refused")
        wait_until(lambda: engine.stats().dead == 25, what="what was overtaken is given up all the same")
        assert {engine.status(lsn) for lsn in lsns[:25]} == {wb.OperationStatus.DEAD}
        assert {engine.status(lsn) for lsn in lsns[25:]} == {wb.OperationStatus.APPLIED}
        check_identity(engine)
    assert set(backend.rows.values()) == {b"second"}


def test_what_was_refused_and_overtaken_waits_for_room_among_the_dead_letters_and_holds_up_its_key(
    fs: MemoryFileSystem,
) -> None:
    backend = RefusesFirsts()
    settings = wb.Settings(segment_bytes=2**16, timer_ms=1, checkpoint_ms=1, dead_letters_max=1)
    with open_engine(put(backend, trigger=wb.Trigger(count=1)), fs, settings=settings) as engine:
        engine.submit("put", key=b"z", payload=b"first")
        engine.flush(timeout=30)
        engine.configure("put", trigger=wb.Trigger(count=3))
        lsns = engine.submit_many("put", [(b"k", b"first"), (b"k", b"second"), (b"l", b"1")])
        shard = engine._dispatcher.lanes[0].shards[0]
        wait_until(lambda: bool(shard.unburied), what="there was no room for it")
        backend.refuses = False
        third = engine.submit("put", key=b"k", payload=b"third")
        assert backend.rows == {b"k": b"second", b"l": b"1"}
        assert engine.status(lsns[0]) is not wb.OperationStatus.APPLIED
        engine.drop([1])
        engine.flush(timeout=30)
        assert third.done
        assert backend.rows[b"k"] == b"third"
        assert engine.status(lsns[0]) is wb.OperationStatus.DEAD
        check_identity(engine)


# --- deadlines and delays --------------------------------------------------------------------------------------------


def test_an_operation_that_misses_its_deadline_becomes_a_dead_letter(fs: MemoryFileSystem) -> None:
    recorder = Recorder()
    with open_engine(put(recorder), fs) as engine:
        engine.pause("put")
        late = engine.submit("put", key=b"a", payload=b"late", deadline=time.time() + 0.05)
        kept = engine.submit("put", key=b"b", payload=b"kept", deadline=time.time() + 3600)
        due = time.time() + 0.06
        wait_until(lambda: time.time() > due, what="the deadline has passed")
        engine.resume("put")
        with pytest.raises(wb.OperationDead, match="deadline"):
            late.result(timeout=30)
        kept.result(timeout=30)
        (letter,) = engine.dead_letters()
        assert letter.reason is wb.DeathReason.DEADLINE
    assert [payload for _, _, payload in recorder.applied] == [b"kept"]


@pytest.mark.parametrize(
    "options",
    [
        {"deadline": 1.0},
        {"deadline": time.time() + 100, "not_before": time.time() + 200},
        {"not_before": float("nan")},
        {"not_before": -1.0},
        {"deadline": "tomorrow"},
        {"idempotency_key": b"\0x"},
        {"idempotency_key": b"x" * 300},
        {"priority": 11},
        {"priority": -1},
    ],
)
def test_options_that_cannot_be_meant_are_refused(fs: MemoryFileSystem, options: dict[str, Any]) -> None:
    with open_engine(put(Recorder()), fs) as engine:
        with pytest.raises(wb.ConfigError):
            engine.submit("put", key=b"k", **options)
        assert engine.stats().submitted == 0


def test_a_delayed_operation_waits_for_its_time_and_others_do_not_wait_for_it(fs: MemoryFileSystem) -> None:
    recorder = Recorder()
    with open_engine(put(recorder), fs) as engine:
        due = time.time() + 0.2
        delayed = engine.submit("put", key=b"a", payload=b"delayed", not_before=due)
        engine.submit("put", key=b"b", payload=b"now").result(timeout=30)
        engine.flush(timeout=30)
        assert engine.stats().lanes["put"].delayed == 1
        assert not delayed.done
        delayed.result(timeout=30)
        assert time.time() >= due
    assert [payload for _, _, payload in recorder.applied] == [b"now", b"delayed"]


def test_a_drain_leaves_delayed_operations_in_the_log(fs: MemoryFileSystem) -> None:
    engine = open_engine(put(Recorder()), fs)
    engine.submit("put", key=b"a", payload=b"delayed", not_before=time.time() + 3600)
    engine.submit("put", key=b"b", payload=b"now")
    assert engine.close(timeout=30).remaining == 1
    with open_engine(put(Recorder()), fs) as engine:
        wait_until(lambda: engine.stats().lanes["put"].delayed == 1, what="it is read back, and still waits")
        assert engine.cancel(1)


# --- cancelling --------------------------------------------------------------------------------------------------------


def test_a_cancelled_operation_is_never_delivered_also_after_a_crash(fs: MemoryFileSystem) -> None:
    recorder = Recorder()
    settings = wb.Settings(
        segment_bytes=2**16, timer_ms=1, checkpoint_ms=3_600_000
    )  # or it would be forgotten
    engine = open_engine(put(recorder, trigger=NEVER), fs, settings=settings)
    tickets = [engine.submit("put", key=b"%d" % n, payload=b"%d" % n) for n in range(3)]
    assert engine.cancel(2)
    assert not engine.cancel(2), "once"
    with pytest.raises(wb.OperationCancelled):
        tickets[1].result(timeout=30)
    assert engine.status(2) is wb.OperationStatus.CANCELLED
    check_identity(engine)
    crashed = fs.after_power_cut()
    engine.close(drain=False)
    again = Recorder()
    with open_engine(put(again), crashed, settings=settings) as engine:
        engine.flush(timeout=30)
        assert engine.status(2) is wb.OperationStatus.CANCELLED
        stats = engine.stats()
        assert (stats.applied, stats.cancelled, stats.pending) == (2, 1, 0)
        check_identity(engine)
    assert again.lsns == [1, 3]


def test_what_is_in_flight_or_settled_cannot_be_cancelled(fs: MemoryFileSystem) -> None:
    inside, go = threading.Event(), threading.Event()

    def apply(batch: wb.Batch) -> None:
        inside.set()
        assert go.wait(30)

    with open_engine(put(apply), fs) as engine:
        ticket = engine.submit("put", key=b"k")
        assert inside.wait(30)
        assert engine.status(1) is wb.OperationStatus.IN_FLIGHT
        assert not engine.cancel(1)
        go.set()
        ticket.result(timeout=30)
        assert not engine.cancel(1)
        with pytest.raises(wb.ConfigError):
            engine.cancel(2)


def test_an_operation_that_is_still_on_disk_can_be_cancelled(fs: MemoryFileSystem) -> None:
    recorder = Recorder()
    lanes = put(recorder)
    with open_engine(lanes, fs) as engine:
        engine.pause("put")
        for part in range(40):
            engine.submit_many("put", [(b"%d" % (part * 1000 + n), bytes(100)) for n in range(1000)])
        assert engine.stats().lanes["put"].reading_back == 1
        assert engine.status(39_000) is wb.OperationStatus.PENDING
        assert engine.cancel(39_000)
        assert engine.status(39_000) is wb.OperationStatus.CANCELLED
        engine.resume("put")
        engine.flush(timeout=60)
        stats = engine.stats()
        assert (stats.applied, stats.cancelled, stats.pending) == (39_999, 1, 0)
        check_identity(engine)
    assert recorder.lsns == [lsn for lsn in range(1, 40_001) if lsn != 39_000]


@pytest.mark.parametrize("crash", [False, True])
@pytest.mark.parametrize("wait", [False, True])
def test_an_operation_that_is_not_synced_yet_can_be_cancelled(
    fs: MemoryFileSystem, *, crash: bool, wait: bool
) -> None:
    recorder = Recorder()
    lanes = put(recorder, durability="interval", interval_ms=10_000)
    engine = open_engine(lanes, fs)
    submit = engine.submit if wait else engine.submit_nowait
    tickets = [submit("put", key=b"%d" % n, payload=b"%d" % n) for n in range(3)]
    assert engine.stats().durable_lsn == 0
    assert engine.cancel(2)
    assert not engine.cancel(2), "once"
    assert engine.status(2) is wb.OperationStatus.CANCELLED
    with pytest.raises(wb.OperationCancelled):
        tickets[1].result(timeout=30)
    if crash:
        crashed = fs.after_power_cut()
        engine.close(drain=False)
        with open_engine(put(recorder), crashed) as engine:
            assert engine.submit("put", key=b"new").lsn not in (1, 2, 3)
            engine.flush(timeout=30)
            check_identity(engine)
        assert 2 not in recorder.lsns
        return
    engine.close(timeout=30)
    assert recorder.lsns == [1, 3]
    stats = engine.stats()
    assert (stats.applied, stats.cancelled, stats.pending) == (2, 1, 0)
    check_identity(engine)


def test_a_cancellation_that_cannot_be_made_durable_did_not_happen(fs: MemoryFileSystem) -> None:
    recorder = Recorder()
    with open_engine(put(recorder, trigger=NEVER), fs) as engine:
        engine.submit_many("put", [(b"k", b"%d" % n) for n in range(3)])

        def fail(call: str, path: str) -> None:
            if call == "cancel":
                raise OSError(28, "no room")

        fs.fail = fail
        with pytest.raises(wb.StorageError):
            engine.cancel(2)
        fs.fail = None
        assert engine.status(2) is wb.OperationStatus.PENDING
        engine.flush(timeout=30)
    assert recorder.lsns == [1, 2, 3]


# --- idempotency keys --------------------------------------------------------------------------------------------------


def test_a_repeated_submission_is_the_first_one(fs: MemoryFileSystem) -> None:
    recorder = Recorder(lambda batch: [wb.Applied(operation.payload) for operation in batch])
    with open_engine(put(recorder), fs) as engine:
        first = engine.submit("put", key=b"k", payload=b"1", idempotency_key=b"order-7")
        second = engine.submit("put", key=b"k", payload=b"2", idempotency_key=b"order-7")
        other = engine.submit("put", key=b"k", payload=b"3", idempotency_key=b"order-8")
        assert (first.lsn, second.lsn, other.lsn) == (1, 1, 2)
        assert first.result(timeout=30) == b"1"
        assert second.durable
        second.result(timeout=30)
        assert engine.status(kind="put", idempotency_key=b"order-8") is not None
        with pytest.raises(wb.ConfigError, match="does not remember"):
            engine.status(kind="put", idempotency_key=b"order-9")
        engine.flush(timeout=30)
    assert [payload for _, _, payload in recorder.applied] == [b"1", b"3"]


@pytest.mark.parametrize("checkpoint_ms", [1, 3_600_000])
def test_a_repeat_after_a_crash_is_recognised_from_the_log_or_from_state(
    fs: MemoryFileSystem, checkpoint_ms: float
) -> None:
    settings = wb.Settings(segment_bytes=2**16, timer_ms=1, checkpoint_ms=checkpoint_ms)
    engine = open_engine(put(Recorder()), fs, settings=settings)
    engine.submit("put", key=b"k", payload=b"1", idempotency_key=b"order-7").result(timeout=30)
    if checkpoint_ms == 1:
        wait_until(lambda: bool(fs.key_uses), what="the key is in state/")
    crashed = fs.after_power_cut()
    engine.close(drain=False)
    recorder = Recorder()
    with open_engine(put(recorder), crashed, settings=settings) as engine:
        repeated = engine.submit("put", key=b"k", payload=b"1", idempotency_key=b"order-7")
        assert repeated.lsn == 1
        repeated.result(timeout=30)
        assert engine.status(kind="put", idempotency_key=b"order-7") is wb.OperationStatus.APPLIED
    assert all(lsn == 1 for lsn in recorder.lsns)


def test_many_threads_with_one_idempotency_key_submit_one_operation(fs: MemoryFileSystem) -> None:
    recorder = Recorder()
    lsns: list[int | None] = []
    with open_engine(put(recorder), fs) as engine:
        threads = [
            threading.Thread(
                target=lambda: lsns.append(engine.submit("put", key=b"k", idempotency_key=b"once").lsn)
            )
            for _ in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        engine.flush(timeout=30)
    assert lsns == [1] * 16
    assert recorder.lsns == [1]


def test_a_key_whose_submission_waits_for_room_is_not_waited_for_beyond_the_timeout(
    fs: MemoryFileSystem,
) -> None:
    syncing, go = threading.Event(), threading.Event()

    def fail(call: str, path: str) -> None:
        if call == "datasync":
            syncing.set()
            assert go.wait(30)

    settings = wb.Settings(segment_bytes=2**16, timer_ms=1, checkpoint_ms=1, queue_bytes_max=2**20)
    with open_engine(put(Recorder()), fs, settings=settings) as engine:
        fs.fail = fail
        big = bytes(2**20)
        filling = threading.Thread(target=lambda: engine.submit("put", key=b"a", payload=big))
        filling.start()
        assert syncing.wait(30)
        first: list[int | None] = []
        waiting = threading.Thread(
            target=lambda: first.append(
                engine.submit("put", key=b"b", payload=big, idempotency_key=b"once").lsn
            )
        )
        waiting.start()
        wait_until(lambda: engine._assembly.keys._reserved != set(), what="the key is being used")
        for attempt in (engine.submit_nowait, lambda *a, **k: engine.submit(*a, **k, timeout=0.01)):
            with pytest.raises(wb.Overloaded, match="idempotency key"):
                attempt("put", key=b"b", payload=big, idempotency_key=b"once")
        go.set()
        filling.join(30)
        waiting.join(30)
        assert engine.submit("put", key=b"b", payload=big, idempotency_key=b"once").lsn == first[0] == 2


def test_after_the_window_a_key_may_be_used_again(fs: MemoryFileSystem) -> None:
    settings = wb.Settings(segment_bytes=2**16, timer_ms=1, checkpoint_ms=1, idempotency_window_s=0.0)
    with open_engine(put(Recorder()), fs, settings=settings) as engine:
        assert engine.submit("put", key=b"k", idempotency_key=b"x").lsn == 1
        threading.Event().wait(0.002)
        assert engine.submit("put", key=b"k", idempotency_key=b"x").lsn == 2


# --- priorities ------------------------------------------------------------------------------------------------------


def test_an_urgent_operation_does_not_wait_and_pulls_its_elders_forward(fs: MemoryFileSystem) -> None:
    recorder = Recorder()
    with open_engine(put(recorder, trigger=NEVER), fs) as engine:
        engine.submit_many("put", [(b"slow", b"%d" % n) for n in range(100)])
        engine.submit("put", key=b"k", payload=b"elder")
        engine.submit("put", key=b"k", payload=b"urgent", priority=wb.PRIORITY_CRITICAL).result(timeout=30)
        assert recorder.batches[0].reason is wb.CutReason.URGENT
        payloads = [payload for _, _, payload in recorder.applied]
        assert payloads.index(b"elder") < payloads.index(b"urgent")


@pytest.mark.parametrize("order", ["key", "none"])
def test_urgent_operations_of_a_backlog_on_disk_are_served_before_the_rest(
    fs: MemoryFileSystem, order: str
) -> None:
    engine = open_engine(put(Recorder(), order=order), fs)
    engine.pause("put")
    engine.submit("put", key=b"vip", payload=b"elder")
    for part in range(60):
        engine.submit_many("put", [(b"%d" % (part * 1000 + n), bytes(100)) for n in range(1000)])
    engine.submit("put", key=b"vip", payload=b"urgent", priority=9)
    engine.submit("put", key=b"vip", payload=b"younger")
    engine.close(drain=False)
    recorder = Recorder(lambda batch: time.sleep(0.002))
    with open_engine(put(recorder, order=order), fs) as engine:
        engine.flush(timeout=120)
        check_identity(engine)
    payloads = [payload for _, _, payload in recorder.applied]
    assert sorted(recorder.lsns) == list(range(1, 60_004))
    assert payloads.index(b"urgent") < 45_000
    if order == "key":
        vip = [payload for payload in payloads if payload in {b"elder", b"urgent", b"younger"}]
        assert vip == [b"elder", b"urgent", b"younger"]


# --- time limits -------------------------------------------------------------------------------------------------------


def test_a_call_that_takes_too_long_is_given_up_where_nothing_can_be_overtaken(fs: MemoryFileSystem) -> None:
    go, calls = threading.Event(), []

    def apply(batch: wb.Batch) -> None:
        calls.append(list(batch.payloads))
        if len(calls) == 1:
            assert go.wait(30)

    lanes = put(apply, order="none", timeout_s=0.05)
    with open_engine(lanes, fs) as engine:
        ticket = engine.submit("put", key=b"k", payload=b"v")
        ticket.result(timeout=30)
        assert calls == [[b"v"], [b"v"]]
        assert not engine.dead_letters()
        go.set()
        check_identity(engine)


def test_an_ordered_lane_waits_for_a_late_call_and_health_says_that_it_is_stuck(fs: MemoryFileSystem) -> None:
    go = threading.Event()

    def apply(batch: wb.Batch) -> None:
        assert go.wait(30)

    with open_engine(put(apply, timeout_s=0.02), fs) as engine:
        ticket = engine.submit("put", key=b"k")
        wait_until(
            lambda: any(reason.name == "stuck" for reason in engine.health().reasons), what="health says so"
        )
        assert not ticket.done
        go.set()
        ticket.result(timeout=30)
        assert engine.stats().applied == 1


def test_an_async_call_that_takes_too_long_is_cancelled_and_tried_again(fs: MemoryFileSystem) -> None:
    calls = []

    async def apply(batch: wb.Batch) -> None:
        calls.append(len(batch))
        if len(calls) == 1:
            await asyncio.sleep(3600)

    with open_engine(put(apply, timeout_s=0.05), fs) as engine:
        engine.submit("put", key=b"k").result(timeout=30)
    assert calls == [1, 1]


# --- backends that misbehave -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nonsense", [[], [None], "applied", 7, {}, [wb.Applied()] * 3])
def test_nonsense_is_tried_again_and_nothing_dies_of_it(fs: MemoryFileSystem, nonsense: Any) -> None:
    answers: Iterator[Any] = iter([nonsense] * 5)
    with open_engine(put(lambda batch: next(answers, None)), fs) as engine:
        engine.submit("put", key=b"k").result(timeout=30)
        assert not engine.dead_letters()


def test_a_broken_backend_stops_its_shard_until_somebody_resumes_the_lane(fs: MemoryFileSystem) -> None:
    broken = True

    def apply(batch: wb.Batch) -> None:
        if broken:
            raise wb.BackendBroken("wrong password")

    with open_engine(put(apply), fs) as engine:
        ticket = engine.submit("put", key=b"k")
        wait_until(
            lambda: any(reason.name == "backend broken" for reason in engine.health().reasons),
            what="health says so",
        )
        assert not ticket.done
        broken = False
        engine.resume("put")
        ticket.result(timeout=30)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), BaseException("odd")])
def test_whatever_a_backend_raises_the_batch_is_tried_again(
    fs: MemoryFileSystem, error: BaseException
) -> None:
    failures = iter([error, error])

    def apply(batch: wb.Batch) -> None:
        failure = next(failures, None)
        if failure is not None:
            raise failure

    with open_engine(put(apply), fs) as engine:
        engine.submit("put", key=b"k").result(timeout=30)


def test_a_batch_that_is_too_large_is_cut_smaller(fs: MemoryFileSystem) -> None:
    sizes: list[int] = []

    def apply(batch: wb.Batch) -> None:
        if len(batch) > 10:
            raise wb.BatchTooLarge(count=10)
        sizes.append(len(batch))

    with open_engine(put(apply, trigger=wb.Trigger(count=64, linger_ms=1)), fs) as engine:
        engine.submit_many("put", [(b"%d" % n, b"") for n in range(64)])
        engine.flush(timeout=30)
        assert not engine.dead_letters()
    assert sum(sizes) == 64


# --- configuring -------------------------------------------------------------------------------------------------------


def test_settings_change_at_run_time_from_the_next_batch_on(fs: MemoryFileSystem) -> None:
    recorder = Recorder()
    with open_engine(put(recorder, trigger=wb.Trigger(count=10, linger_ms=3_600_000)), fs) as engine:
        engine.submit_many("put", [(b"%d" % n, b"") for n in range(25)])
        wait_until(lambda: len(recorder.lsns) == 20, what="two batches of ten")
        engine.configure("put", trigger=wb.Trigger(count=5, linger_ms=3_600_000))
        wait_until(lambda: len(recorder.lsns) == 25, what="one of five")
        with pytest.raises(wb.ConfigError, match="order"):
            engine.configure("put", order="none")
        with pytest.raises(wb.ConfigError):
            engine.configure("put", trigger="often")
        with pytest.raises(wb.ConfigError, match="unknown kind"):
            engine.configure("get", trigger=FAST)
    assert [len(batch) for batch in recorder.batches] == [10, 10, 5]


def test_a_serial_lane_has_one_batch_in_flight_over_all_shards(fs: MemoryFileSystem) -> None:
    inside = peak = 0
    guard = threading.Lock()

    def apply(batch: wb.Batch) -> None:
        nonlocal inside, peak
        with guard:
            inside += 1
            peak = max(peak, inside)
        threading.Event().wait(0.001)
        with guard:
            inside -= 1

    with open_engine(put(apply, shards=8, strategy="serial"), fs) as engine:
        engine.submit_many("put", [(b"%d" % n, b"") for n in range(200)])
        engine.flush(timeout=30)
    assert peak == 1


def test_a_time_limit_that_is_taken_away_while_a_call_is_under_way_stops_nothing(
    fs: MemoryFileSystem,
) -> None:
    inside, go = threading.Event(), threading.Event()

    def apply(_: wb.Batch) -> None:
        inside.set()
        assert go.wait(30)

    with open_engine(put(apply, timeout_s=0.1), fs) as engine:
        ticket = engine.submit("put", key=b"k")
        assert inside.wait(30)
        engine.configure("put", timeout_s=None)
        wait_until(
            lambda: (
                any(reason.name == "stuck" for reason in engine.health().reasons)
                or engine.stats().lanes["put"].last_error is not None
            ),
            what="the limit of the call has passed",
        )
        go.set()
        ticket.result(timeout=30)
        assert engine.stats().state == "open"


def test_a_call_that_is_waited_for_is_given_up_once_the_lane_allows_it(fs: MemoryFileSystem) -> None:
    go, calls = threading.Event(), []

    def apply(batch: wb.Batch) -> None:
        calls.append(batch.lsns)
        if len(calls) == 1:
            assert go.wait(30)

    with open_engine(put(apply, timeout_s=0.05, overdue="wait"), fs) as engine:
        ticket = engine.submit("put", key=b"k")
        wait_until(lambda: engine.stats().lanes["put"].last_error is not None, what="it is overdue")
        assert len(calls) == 1
        engine.configure("put", overdue="retry")
        ticket.result(timeout=30)
        assert calls == [(1,), (1,)]
        go.set()


def test_a_lane_whose_backend_hangs_leaves_the_others_a_slot(fs: MemoryFileSystem) -> None:
    go = threading.Event()

    def hang(_: wb.Batch) -> None:
        assert go.wait(30)

    settings = wb.Settings(segment_bytes=2**16, timer_ms=1, checkpoint_ms=1, in_flight_max=2)
    lanes = {
        "hangs": wb.Lane(hang, trigger=FAST, shards=8),
        "well": wb.Lane(Recorder(), trigger=FAST),
    }
    with open_engine(lanes, fs, settings=settings) as engine:
        for number in range(40):
            engine.submit("hangs", key=b"%d" % number)
        wait_until(lambda: engine.stats().lanes["hangs"].in_flight_batches == 2, what="all slots are taken")
        engine.submit("well", key=b"k").result(timeout=30)
        go.set()


def test_configuring_a_lane_does_not_close_its_breaker(fs: MemoryFileSystem) -> None:
    def down(_: wb.Batch) -> None:
        raise ConnectionError("away")

    retry = wb.RetryPolicy(base_s=0.001, ceiling_s=0.002, breaker_s=3600, breaker_s_max=3600)
    with open_engine(put(down, retry=retry), fs) as engine:
        engine.submit("put", key=b"k")
        wait_until(lambda: engine.stats().lanes["put"].breaker == "open", what="the breaker opens")
        engine.configure("put", timeout_s=5.0, trigger=wb.Trigger(count=7))
        assert engine.stats().lanes["put"].breaker == "open"
        engine.close(drain=False)


def test_what_a_given_up_call_may_still_apply_cannot_be_cancelled(fs: MemoryFileSystem) -> None:
    go, calls = threading.Event(), []

    def apply(batch: wb.Batch) -> None:
        calls.append(batch.lsns)
        if len(calls) == 1:
            assert go.wait(30)
        else:
            raise ConnectionError("away")

    retry = wb.RetryPolicy(base_s=3600, ceiling_s=3600)
    with open_engine(put(apply, timeout_s=0.05, overdue="retry", retry=retry), fs) as engine:
        engine.submit("put", key=b"k")
        wait_until(lambda: engine.stats().lanes["put"].retried >= 1, what="the call is given up")
        assert not engine.cancel(1)
        go.set()
        wait_until(lambda: engine.cancel(1), what="the call has returned")


def test_a_deadline_passes_in_a_paused_lane_too(fs: MemoryFileSystem) -> None:
    with open_engine(put(Recorder()), fs) as engine:
        engine.pause("put")
        engine.submit("put", key=b"k", deadline=time.time() + 0.05)
        wait_until(lambda: engine.stats().dead == 1, what="it is given up")
        engine.resume("put")
        check_identity(engine)


def test_a_drain_does_not_wait_for_retries(fs: MemoryFileSystem) -> None:
    calls: list[wb.Batch] = []

    def away_once(batch: wb.Batch) -> None:
        calls.append(batch)
        if len(calls) == 1:
            raise ConnectionError("away")

    retry = wb.RetryPolicy(base_s=3600, ceiling_s=3600)
    engine = open_engine(put(away_once, retry=retry), fs)
    engine.submit("put", key=b"k")
    engine.submit("put", key=b"later", not_before=time.time() + 3600)
    wait_until(lambda: engine.stats().lanes["put"].retried == 1, what="it waits for its retry")
    report = engine.close(timeout=30)
    assert (report.settled, report.remaining) == (1, 1)


def test_a_lane_that_logs_nothing_is_flushed_and_bounded(fs: MemoryFileSystem) -> None:
    recorder = Recorder()
    settings = wb.Settings(segment_bytes=2**16, timer_ms=1, checkpoint_ms=1, memory_bytes_max=2**20)
    with open_engine(put(recorder, durability="none"), fs, settings=settings) as engine:
        for number in range(100):
            engine.submit("put", key=b"%d" % number)
            engine.flush(timeout=30)
            assert len(recorder.applied) == number + 1
        engine.pause("put")

        def fill() -> None:
            for _ in range(1000):
                engine.submit_nowait("put", key=b"k", payload=bytes(10_000))

        with pytest.raises(wb.Overloaded):
            fill()
        engine.resume("put")
        engine.flush(timeout=30)
