"""Promises: one outcome, and nobody who waits misses it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest

import walbatch as wb
from tests.runtime.fakes import Caller
from tests.support import wait_until
from walbatch.errors import WalbatchError
from walbatch.runtime.clock import RealEvent, RealThreads
from walbatch.runtime.ticket import Fate, Issuer, Promise, Ticket
from walbatch.types import Durability

ROUNDS = 1500


@pytest.fixture
def hasty_switches() -> Iterator[None]:
    """Threads change places as often as the interpreter lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def promise() -> Promise:
    return Promise(RealThreads())


def test_the_first_outcome_stays() -> None:
    kept = promise()
    assert not kept.done
    kept.resolve(7)
    kept.resolve(8)
    kept.resolve(error=wb.EngineClosed("late"))
    assert kept.take() == 7
    assert kept.kept


def test_an_error_is_raised_to_everybody_who_asks() -> None:
    broken = promise()
    broken.resolve(error=wb.EngineClosed("closed"))
    for _ in range(2):
        with pytest.raises(wb.EngineClosed):
            broken.take()
    assert broken.done
    assert not broken.kept


def test_a_wait_ends_at_its_timeout_or_when_it_happened() -> None:
    waited = promise()
    assert not waited.wait(0)
    assert not waited.wait(1_000_000)
    caller = Caller(lambda: waited.wait(None))
    waited.resolve()
    assert caller.wait().result is True
    assert waited.wait(0)


def test_a_listener_is_called_before_and_after_it_happened_but_not_once_it_is_ignored() -> None:
    heard = promise()
    calls: list[str] = []
    early, gone = (lambda: calls.append("early")), (lambda: calls.append("gone"))
    heard.listen(early)
    heard.listen(gone)
    heard.ignore(gone)
    heard.resolve()
    heard.listen(lambda: calls.append("late"))
    assert calls == ["early", "late"]


def test_a_resolve_that_an_exception_has_cut_short_can_be_made_again() -> None:
    class Interrupting(RealEvent):
        interrupts = 1

        def set(self) -> None:
            if Interrupting.interrupts:
                Interrupting.interrupts -= 1
                raise KeyboardInterrupt
            super().set()

    class Threads(RealThreads):
        def event(self) -> RealEvent:
            return Interrupting()

    cut = Promise(Threads())
    calls: list[int] = []
    cut.listen(lambda: calls.append(1))
    waiting = Caller(lambda: cut.wait(30 * 10**9))
    while cut._event is None:
        pass
    with pytest.raises(KeyboardInterrupt):
        cut.resolve(1)
    cut.resolve(2)
    assert waiting.wait().result is True
    assert cut.take() == 1
    assert calls


@pytest.mark.usefixtures("hasty_switches")
def test_two_threads_that_resolve_at_once_agree_on_one_outcome() -> None:
    for number in range(ROUNDS):
        shared = promise()
        seen: list[object] = []
        error = WalbatchError("no")
        barrier = threading.Barrier(3)

        def look() -> None:
            barrier.wait()  # noqa: B023 - joined before the next round
            while not shared.done:  # noqa: B023
                pass
            seen.append(shared._outcome)  # noqa: B023

        def resolve(value: object, error: WalbatchError | None) -> None:
            barrier.wait()  # noqa: B023
            shared.resolve(value, error)  # noqa: B023

        threads = [
            threading.Thread(target=look),
            threading.Thread(target=resolve, args=(number, None)),
            threading.Thread(target=resolve, args=(None, error)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == [shared._outcome], "an outcome that somebody saw has changed"


@pytest.mark.usefixtures("hasty_switches")
def test_no_listener_and_no_waiter_is_lost_when_all_come_at_once() -> None:
    for _ in range(ROUNDS):
        shared = promise()
        heard = [threading.Event() for _ in range(3)]
        waited: list[bool] = []
        barrier = threading.Barrier(5)

        def listen(event: threading.Event) -> None:
            barrier.wait()  # noqa: B023 - joined before the next round
            shared.listen(event.set)  # noqa: B023

        def wait() -> None:
            barrier.wait()  # noqa: B023
            waited.append(shared.wait(20 * 10**9))  # noqa: B023

        def resolve() -> None:
            barrier.wait()  # noqa: B023
            shared.resolve()  # noqa: B023

        threads = [threading.Thread(target=listen, args=(event,)) for event in heard]
        threads += [threading.Thread(target=wait), threading.Thread(target=resolve)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert waited == [True]
        assert all(event.is_set() for event in heard)


def fate_with(durable: Promise | None) -> Fate:
    return Fate(RealThreads(), 3, 3, durable)


SYNCED, UNLOGGED = Issuer("put", Durability.SYNC), Issuer("read", Durability.NONE)


def test_a_ticket_says_where_its_operation_is() -> None:
    durable = promise()
    fate = fate_with(durable)
    ticket = Ticket(SYNCED, 3, fate, 3)
    assert "pending" in repr(ticket)
    with pytest.raises(wb.ResultTimeout, match="not durable"):
        ticket.wait_durable(timeout=0)
    with pytest.raises(wb.ResultTimeout, match="goes on"):
        ticket.result(timeout=0)
    durable.resolve()
    ticket.wait_durable(timeout=0)
    assert ticket.durable
    assert "durable" in repr(ticket)
    fate.settle(3, ("yes", None))
    assert ticket.result(timeout=0) == "yes"
    assert ticket.done
    assert "settled" in repr(ticket)


def test_a_ticket_of_an_unlogged_lane_is_never_durable() -> None:
    ticket = Ticket(UNLOGGED, None, fate_with(None), 3)
    assert not ticket.durable
    with pytest.raises(wb.DurabilityUnknown, match="never logged"):
        ticket.wait_durable()


def test_a_ticket_whose_write_failed_is_not_durable() -> None:
    durable = promise()
    ticket = Ticket(SYNCED, 3, fate_with(durable), 3)
    durable.resolve(error=wb.DurabilityUnknown("no"))
    assert not ticket.durable
    with pytest.raises(wb.DurabilityUnknown):
        ticket.wait_durable(timeout=0)


@pytest.mark.usefixtures("hasty_switches")
def test_no_waiter_of_an_operation_is_missed_when_it_is_settled_as_they_come() -> None:
    for number in range(ROUNDS):
        fate = Fate(RealThreads(), number, number, None)
        taken: list[object] = []
        barrier = threading.Barrier(4)

        def wait() -> None:
            barrier.wait()  # noqa: B023 - joined before the next round
            taken.append(Ticket(UNLOGGED, None, fate, number).result(timeout=20))  # noqa: B023

        def settle() -> None:
            barrier.wait()  # noqa: B023
            fate.settle(number, (number, None))  # noqa: B023

        threads = [threading.Thread(target=wait) for _ in range(3)] + [threading.Thread(target=settle)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert taken == [number] * 3


@pytest.mark.usefixtures("hasty_switches")
def test_all_who_ask_for_an_operation_are_told_the_same_when_it_is_settled_as_the_engine_ends() -> None:
    for _ in range(ROUNDS):
        fate = Fate(RealThreads(), 1, 1, None)
        early = fate.settled(1)
        barrier = threading.Barrier(2)

        def settle() -> None:
            barrier.wait()  # noqa: B023 - joined before the next round
            fate.settle(1, ("applied", None))  # noqa: B023

        thread = threading.Thread(target=settle)
        thread.start()
        barrier.wait()
        fate.end(WalbatchError("closed"))
        thread.join(30)
        outcomes = [promise._outcome for promise in (early, fate.settled(1))]
        assert outcomes[0] == outcomes[1]
        assert outcomes[0] is not None


# --- what threads wait on --------------------------------------------------------------------------------------------


def test_an_event_wakes_all_who_wait_and_whoever_comes_later_does_not() -> None:
    event = RealEvent()
    assert not event.is_set()
    assert not event.wait(0)
    assert not event.wait(1_000_000)
    assert not event._waiters, "who has stopped waiting leaves nothing behind"
    callers = [Caller(lambda: event.wait(30 * 10**9)) for _ in range(3)] + [Caller(lambda: event.wait(None))]
    wait_until(lambda: len(event._waiters) == 4, what="all wait")
    event.set()
    assert all(caller.wait().result is True for caller in callers)
    event.set()
    assert event.wait(None)
    assert event.is_set()


@pytest.mark.usefixtures("hasty_switches")
def test_no_waiter_for_an_event_misses_it() -> None:
    for _ in range(ROUNDS):
        event = RealEvent()
        barrier = threading.Barrier(4)
        seen: list[bool] = []

        def wait() -> None:
            barrier.wait()  # noqa: B023 - joined before the next round
            seen.append(event.wait(20 * 10**9))  # noqa: B023

        threads = [threading.Thread(target=wait) for _ in range(3)]
        for thread in threads:
            thread.start()
        barrier.wait()
        event.set()
        for thread in threads:
            thread.join(30)
        assert seen == [True] * 3
