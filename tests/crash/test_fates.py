"""What an operation may come to, under crashes: applied, dead or cancelled, and nothing twice; each mistake that was found once."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import pytest

from tools.modes.workloads import WORKLOADS, backlog_of, rejecting
from walbatch.errors import OperationCancelled, OperationDead, StorageError
from walbatch.limits import MIB
from walbatch.testing.shipped import open_engine
from walbatch.testing.simulation import (
    Explorer,
    Fault,
    FaultPlan,
    LanePlan,
    Machine,
    Plan,
    Process,
    Session,
    Workload,
)
from walbatch.testing.simulation.explore import quiet
from walbatch.testing.simulation.history import AppliedTo, Buried, Event, Given
from walbatch.testing.simulation.workload import QUICK
from walbatch.types import PRIORITY_CRITICAL, DeathReason, OperationStatus

SMALL_MEMORY: Final = replace(QUICK, memory_bytes_max=MIB)


def lived(run: Callable[[Session], None], workload: Workload | None = None, seed: int = 1) -> list[Event]:
    """The history of a life that nothing cuts off; the oracle has found nothing wrong with it."""
    workload = replace(workload or Workload(name="fates", run=run), run=run)
    history: list[Event] = []
    process = Process(
        Machine(), history, seed=seed, manners=workload.manners, faults=FaultPlan(tuple(workload.faults))
    )
    with quiet():
        process.run(lambda: Session(process, open_engine, workload, "0").run(run))
    assert workload.oracle().judge(history) == []
    return history


def applied(history: list[Event]) -> list[bytes]:
    return [event.payload for event in history if isinstance(event, AppliedTo)]


# --- that the workloads reach what they are about ---


def history_of(name: str) -> list[Event]:
    return lived(WORKLOADS[name].run, WORKLOADS[name])


@pytest.mark.parametrize("name", ["poison", "poison_in_a_shard"])
def test_a_poison_is_found_by_splitting_and_only_it_dies(name: str) -> None:
    history = history_of(name)
    letters = [letter for event in history if isinstance(event, Buried) for letter in event.letters]
    assert [(letter.payload, letter.reason) for letter in letters] == [(b"poison", DeathReason.ATTEMPTS)]
    sizes = [len(event.operations) for event in history if isinstance(event, Given)]
    assert sizes[0] == 6
    assert 1 in sizes


def test_what_is_requeued_is_applied_and_what_is_still_bad_stays_dead() -> None:
    history = history_of("requeue")
    assert b"bad/0" in applied(history)
    assert b"bad/1" not in applied(history)
    assert sum(isinstance(event, Buried) for event in history) >= 3


def test_deadlines_kill_and_delays_delay() -> None:
    reasons = [
        letter.reason
        for event in history_of("deadlines") if isinstance(event, Buried) for letter in event.letters
    ]  # fmt: skip
    assert reasons == [DeathReason.DEADLINE] * 2
    late = [event for event in history_of("delayed") if isinstance(event, AppliedTo) and event.key == b"late"]
    assert len(late) == 2


def test_an_urgent_operation_goes_before_a_backlog_that_nobody_has_read_yet() -> None:
    keys = [event.key for event in history_of("urgent") if isinstance(event, AppliedTo)]
    assert keys.count(b"vip") == 3
    assert keys.index(b"vip") < len(keys) - 15


@pytest.mark.parametrize("name", ["repeat", "calls_given_up", "part_answers", "transactional_part_answers"])
def test_each_operation_is_settled_once(name: str) -> None:
    payloads = applied(history_of(name))
    assert len(set(payloads)) == len(payloads)


# --- mistakes that were found once ---


def test_a_ticket_of_what_is_cancelled_in_the_log_says_so_at_once() -> None:
    seen: list[object] = []

    def run(session: Session) -> None:
        session.open()
        session.submit(b"a", "kept")
        ticket = session.submit(b"b", "kept")  # nobody reads it: the lane has no backend
        assert session.cancel(ticket.lsn)
        try:
            ticket.result(timeout=0)
        except OperationCancelled as error:
            seen.append(error.lsn)
        seen.append(session.engine.status(ticket.lsn))
        session.close()

    lanes = {"put": LanePlan(), "kept": LanePlan(held=True)}
    lived(run, Workload(name="held", run=run, lanes=lanes))
    assert seen == [2, OperationStatus.CANCELLED]


def test_an_urgent_operation_in_the_backlog_is_not_delivered_after_its_deadline() -> None:
    seen: list[str] = []

    def run(session: Session) -> None:
        session.open()
        backlog_of(session, 3)
        ticket = session.submit(b"vip", priority=PRIORITY_CRITICAL, deadline_s=0.03)
        session.pause(0.05)
        session.engine.resume("put")
        session.engine.flush(timeout=100)
        try:
            ticket.result(timeout=1)
        except OperationDead as error:
            seen.append(error.reason)
        session.close()

    lived(run, Workload(name="urgent", run=run, settings=SMALL_MEMORY))
    assert seen == [DeathReason.DEADLINE]


def test_a_requeue_that_was_cut_off_long_ago_submits_nothing_twice() -> None:
    """The letter could not be dropped; the next opening does it, when the key of the operation has left the window already."""

    def run(session: Session) -> None:
        session.open()
        session.submit(b"a", payload=b"bad/0")
        session.engine.flush(timeout=60)
        with contextlib.suppress(StorageError):
            session.requeue(letter.lsn for letter in session.look_at_letters())
        session.close()
        session.process.clock.jump_wall(3 * 3_600 * 10**9)
        session.open()
        assert session.requeue(letter.lsn for letter in session.look_at_letters()) == 0
        session.close()

    cut_off = Workload(
        name="cut off", run=run, manners=rejecting, faults=[Fault(call="unbury", error=errno.ENOSPC)]
    )
    assert applied(lived(run, cut_off)) == [b"bad/0"]


@pytest.mark.parametrize("seed", range(4))
def test_of_several_who_cancel_one_operation_one_is_told_so(seed: int) -> None:
    answers: list[bool] = []

    def run(session: Session) -> None:
        session.open()
        session.submit(b"a", "kept")
        lsn = session.submit(b"b", "kept").lsn
        session.together(*[lambda: answers.append(session.cancel(lsn))] * 3)
        session.close()

    lanes = {"put": LanePlan(), "kept": LanePlan(held=True)}
    lived(run, Workload(name="held", run=run, lanes=lanes), seed)
    assert sorted(answers) == [False, False, True]


def test_an_operation_whose_letter_was_dropped_does_not_count_as_applied() -> None:
    seen: list[OperationStatus] = []

    def run(session: Session) -> None:
        session.open()
        ticket = session.submit(b"a", payload=b"bad/0")
        session.engine.flush(timeout=60)
        seen.append(session.ask(ticket.lsn))
        session.drop([ticket.lsn])
        seen.append(session.ask(ticket.lsn))
        session.close()

    settings = replace(QUICK, checkpoint_ms=3_600_000)
    lived(run, Workload(name="dropped", run=run, manners=rejecting, settings=settings))
    assert seen == [OperationStatus.DEAD, OperationStatus.CANCELLED]


@pytest.mark.parametrize("seed", [6, 10])
def test_nothing_overtakes_an_elder_whose_burial_is_under_way(seed: int) -> None:
    """Power fails in between, and the wall clock of the next life is earlier: the deadline has not passed yet."""

    def run(session: Session) -> None:
        session.open()
        session.engine.pause("put")
        session.submit(b"a", deadline_s=0.02)
        session.submit(b"a")
        session.pause(0.05)
        session.engine.resume("put")
        session.engine.flush(timeout=10)
        session.close()

    plan = Plan(seed=seed, bound=2, samples=0, from_first_submit=True, seconds=20)
    report = Explorer(open_engine, Workload(name="deadline", run=run), plan).run()
    assert not report.failures, report.failures[0]


@pytest.mark.parametrize("seed", range(8))
def test_what_is_cancelled_before_it_is_durable_is_not_delivered(seed: int) -> None:
    """A lane that syncs later: its operation is in the log, and its shard has not seen it yet."""
    cancelled: list[bool] = []

    def run(session: Session) -> None:
        session.open()
        lsns = [session.submit(key).lsn for key in (b"a", b"b", b"a")]
        cancelled.extend(session.cancel(lsn) for lsn in lsns[:2])
        session.pause(0.05)
        session.close()

    lived(run, Workload(name="later", run=run, lanes={"put": LanePlan(durability="interval")}), seed)
    assert len(cancelled) == 2


def test_a_letter_whose_burial_failed_is_not_shown() -> None:
    """It may be in the state, or not; the operation is pending, as its status says."""
    shown: list[object] = []

    def run(session: Session) -> None:
        session.open()
        session.submit(b"a", payload=b"bad/0")
        session.pause(0.05)
        shown.extend(session.look_at_letters())
        session.close()

    fault = Fault(call="bury", error=errno.EIO)
    lived(run, Workload(name="unburied", run=run, manners=rejecting, faults=[fault]))
    assert shown == []


@pytest.mark.parametrize("seed", range(8))
def test_what_is_durable_and_not_yet_taken_over_for_delivery_is_pending(seed: int) -> None:
    def run(session: Session) -> None:
        session.open()
        for _ in range(60):
            session.submit_nowait(b"a")
            for _ in range(10):
                session.ask(session.submitted_lsns[-1])
        session.close()

    lived(run, seed=seed)


def test_nothing_overtakes_an_elder_whose_burial_has_to_wait_for_room() -> None:
    """Else it would be delivered behind the younger one, if power failed and the wall clock came back earlier."""

    def run(session: Session) -> None:
        session.open()
        session.engine.pause("put")
        session.submit(b"a", deadline_s=0.02)
        session.submit(b"a")
        session.pause(0.05)
        session.engine.resume("put")
        session.engine.flush(timeout=10)
        session.close()

    fault = Fault(call="bury", error=errno.ENOSPC)
    history = lived(run, Workload(name="no room", run=run, faults=[fault]))
    kinds = [type(event) for event in history if isinstance(event, (Buried, Given))]
    assert kinds == [Buried, Given]


def test_a_letter_whose_removal_failed_is_not_shown_and_its_status_agrees() -> None:
    """It may be in the state, or not; the engine has stopped by then."""
    seen: list[object] = []

    def run(session: Session) -> None:
        session.open()
        lsn = session.submit(b"a", payload=b"bad/0").lsn
        session.engine.flush(timeout=60)
        with contextlib.suppress(StorageError):
            session.drop([lsn])
        seen.extend([session.look_at_letters(), session.ask(lsn)])
        session.close()

    fault = Fault(call="unbury", error=errno.EIO)
    lived(run, Workload(name="removal", run=run, manners=rejecting, faults=[fault]))
    assert seen[0] == []
    assert seen[1] is not OperationStatus.DEAD
