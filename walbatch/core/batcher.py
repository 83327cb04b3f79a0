"""The queue of one shard: what is cut from it, what becomes of that, and what is taken out.

What is not here: threads, backends, and how the queue is filled (live, or read back from the log). Where operations stand that
could be cut, or will be, is `places`; when to cut `trigger`.

The idea needed to read it: an operation is in one place at a time. It is in its `Places`; or in *flight*; or *out*: dead or
cancelled, until that is durable. At most WINDOW_COUNT_MAX operations are in any of these; the others stay *beyond*, in LSN order,
so that what is settled out of turn can never cost the shard's mark more ranges than that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import Final

from walbatch import limits
from walbatch.core.deadlines import Deadlines
from walbatch.core.entry import Entry, entry_bytes, lsn_of
from walbatch.core.fairness import Line
from walbatch.core.flight import Flight
from walbatch.core.places import Places
from walbatch.core.run import Run
from walbatch.core.trigger import PROBE_COUNT, CutPolicy, Cutter, Situation
from walbatch.types import CutReason, FailureOrder, Order

_COUNT: Final = CutReason.COUNT
_PROBE: Final = CutReason.PROBE

__all__ = ["CutPolicy", "Entry", "Flight", "ShardQueue", "Situation", "entry_bytes"]


class ShardQueue:
    """Pure state of one shard's queue. Not thread-safe: its owner locks.

    `flights` are in flight by number: several only with order "none". `memory_bytes` counts everything that is not settled.
    `failures`: tries that settled nothing, in a row. `policy` may be replaced at any time.
    """

    def __init__(
        self, *, order: Order, on_failure: FailureOrder, policy: CutPolicy, attempts_max: int | None, flights_max: int = 1
    ) -> None:  # fmt: skip
        self.order = order
        self.on_failure = on_failure
        self.attempts_max = attempts_max
        self.flights_max = flights_max if order is Order.NONE else 1
        self.flights: dict[int, Flight] = {}
        self.failures = 0
        self.memory_bytes = 0
        self._cutter = Cutter(policy)
        self._places = Places(order, on_failure)
        self._number = 0
        self._inside = 0  # what is not settled, without what is beyond
        self._beyond = Line()
        self._deadlines = Deadlines()
        self._attempts: dict[int, int] = {}
        self._out: dict[int, Entry] = {}
        # Nothing waits, nothing has failed, nothing has a time: all that is not ready is in flight.
        self._calm = True

    def __repr__(self) -> str:
        flying, ready = sum(map(len, self.flights.values())), self.ready
        return f"<ShardQueue {ready} ready, {len(self) - ready - flying} waiting, {flying} in flight>"

    def __len__(self) -> int:
        return self._inside + len(self._beyond)

    @property
    def ready(self) -> int:
        """Operations that could go at once."""
        return self._places.ready

    @property
    def oldest_arrival_ns(self) -> int | None:
        """When the oldest operation arrived that is not settled; None if there is none."""
        times = self._places.arrivals_ns()
        times += [time for flight in self.flights.values() for time, _ in flight.arrivals_ns]
        times += [entry[4] for entry in (*self._out.values(), *islice(self._beyond, 1))]
        return min(times, default=None)

    @property
    def policy(self) -> CutPolicy:
        """When batches are cut."""
        return self._cutter.policy

    @policy.setter
    def policy(self, policy: CutPolicy) -> None:
        self._cutter.policy = policy

    @property
    def delayed_lsns(self) -> frozenset[int]:
        """Operations that wait for the time before which they must not be delivered, and those that wait behind one. O(held)."""
        return self._places.holds.delayed(self._places.retried)

    def observe_duration(self, seconds: float) -> None:
        """A batch of this shard took that long: the adaptive linger follows."""
        self._cutter.linger.observe(seconds)

    def attempts(self, lsn: int) -> int:
        """How often the operation failed by its own fault."""
        return self._attempts.get(lsn, 0)

    def most_attempts(self, lsns: Iterable[int]) -> int:
        """How often any of these operations failed by its own fault."""
        return max((self._attempts.get(lsn, 0) for lsn in lsns), default=0) if self._attempts else 0

    # --- coming in ---

    def push(self, entry: Entry, not_before_ns: int = 0, deadline_ns: int = 0) -> None:
        """A new operation, in LSN order. Times are monotonic; 0: none."""
        places = self._places
        if (
            entry[3] not in places.plain
            or not_before_ns
            or deadline_ns
            or self._inside >= limits.WINDOW_COUNT_MAX
        ):
            self._push(entry, not_before_ns, deadline_ns)
            return
        line: Line = places.line  # type: ignore[assignment]  # as long as anything is plain
        line.add(entry)
        self.memory_bytes += entry_bytes(entry)
        self._inside += 1

    def push_run(self, run: Run) -> None:
        """New operations without times, in LSN order."""
        count, room = len(run), limits.WINDOW_COUNT_MAX - self._inside
        self.memory_bytes += run.bytes + limits.OPERATION_OVERHEAD_BYTES * count
        inside = min(count, max(0, room))
        if inside:
            self._admit_run(run if inside == count else run.part(0, inside), are_timeless=True)
        if inside < count:
            self._beyond.extend(run.part(inside, count) if inside else run)

    def _admit_run(self, run: Run, *, are_timeless: bool) -> None:
        """Operations that there is room for come to their places."""
        places = self._places
        if are_timeless and places.admit_run(run):
            self._inside += len(run)
            return
        for entry in run:
            self._admit(entry)
        places.tune(run.priority)

    def _push(self, entry: Entry, not_before_ns: int, deadline_ns: int) -> None:
        """`push` for all cases."""
        self._calm = self._calm and not (not_before_ns or deadline_ns)
        self._note(entry, not_before_ns, deadline_ns)
        if self._inside >= limits.WINDOW_COUNT_MAX:
            self._beyond.add(entry)
        else:
            self._admit(entry)
            self._places.tune(entry[3])

    def _note(self, entry: Entry, not_before_ns: int, deadline_ns: int) -> None:
        """What has to be known of an operation, wherever it comes to stand."""
        self.memory_bytes += entry_bytes(entry)
        if deadline_ns:
            self._deadlines.set(entry[0], deadline_ns)
        if not_before_ns:
            self._places.holds.wait(entry[0], not_before_ns)

    def _admit(self, entry: Entry) -> None:
        """An operation, the youngest of its key, comes to its place."""
        self._inside += 1
        self._deadlines.look_again(entry[0])
        self._places.admit(entry)

    def push_ahead(self, rows: Iterable[tuple[Entry, int, int]]) -> None:
        """Urgent operations from further back in the log, with the elder ones of their keys, in LSN order.

        Each comes with the time before which it must not go, and its deadline, as `push` takes them. They are younger than all
        that is queued, and go before it, except before what has their key, and except where that is beyond. Not for order "shard".
        """
        assert self.order is not Order.SHARD
        self._calm = False
        behind = {entry[1] for entry in self._beyond} if self.order is Order.KEY else set()
        for entry, not_before_ns, deadline_ns in rows:
            self._note(entry, not_before_ns, deadline_ns)
            if entry[1] in behind:
                self._beyond.add(entry)
            else:
                self._inside += 1
                self._places.admit_ahead(entry)

    # --- time ---

    def release(self, now_ns: int) -> None:
        """Let go of what has waited long enough."""
        if not self._calm:
            self._places.release(now_ns)

    def hurry(self, now_ns: int) -> None:
        """Cut short the waits for retries; what must not go before its own time still waits for that."""
        if not self._calm:
            self._places.hurry(now_ns)

    @property
    def next_expiry_ns(self) -> int | None:
        """When the next deadline passes that can be looked at then; None without one."""
        return self._deadlines.first()

    def expire(self, now_ns: int) -> list[Entry]:
        """Take out the operations whose deadline has passed, except in flight and beyond. They count until `drop`.

        Until then nothing goes that must not overtake them. Else, if power failed before their burial is durable and the wall
        clock came back earlier, they would be delivered behind what is younger.
        """
        due = self._deadlines.due(now_ns)
        if not due:
            return []
        entries = sorted(self._places.withdraw(set(due)), key=lsn_of)
        self._deadlines.missed(set(due).difference(map(lsn_of, entries)))
        self._take_out(entries)
        return entries

    def next_due_ns(self, situation: Situation | None = None) -> int | None:
        """When time alone will make something due or expire; None if it will not. May be in the past."""
        times = [self._deadlines.first()]
        if len(self.flights) < self.flights_max and not self._is_shut:
            places = self._places
            going = [places.parcels.first_ns(), places.holds.first()]
            if len(places.line):
                target = limits.BATCH_COUNT_MAX if situation is None else situation.target
                eager = bool(places.eager) or (situation is not None and situation.probing)
                going.append(
                    self._cutter.due_at_ns(target, places.line, eager=eager, in_flight=bool(self.flights))
                )
            times += [max(places.parcels.blocked_until_ns, time) for time in going if time is not None]
        return min((time for time in times if time is not None), default=None)

    @property
    def _is_shut(self) -> bool:
        """Whether the whole shard waits for what is out."""
        return bool(self._out) and self.order is Order.SHARD

    # --- cutting ---

    def due(self, situation: Situation) -> CutReason | None:
        """Whether a batch should be cut now, and why. Call `release` first."""
        flights, places = self.flights, self._places
        if flights and len(flights) >= self.flights_max:
            return None
        line = places.line
        if not self._calm:
            if situation.now_ns < places.parcels.blocked_until_ns or self._is_shut:
                return None
            parcel = places.parcels.next(urgent=line.urgent > 0)
            if parcel is not None:
                return CutReason.PROBE if situation.probing else parcel.reason
        count, policy = len(line), self._cutter.policy
        if not count:
            return None
        is_full = count >= policy.ceiling or count >= situation.target
        if is_full and policy.is_sized and not situation.probing:
            return _COUNT  # as the cutter would say, at length
        return self._cutter.reason(situation, line, eager=bool(places.eager), in_flight=bool(flights))

    def cut(self, situation: Situation, reason: CutReason) -> Flight:
        """Take the next batch, for the reason that `due` gave: its operations stand in the order in which to apply them."""
        assert not self.flights or len(self.flights) < self.flights_max
        policy, places = self._cutter.policy, self._places
        count = situation.target
        if not 0 < count <= policy.ceiling:
            count = policy.ceiling if count > 0 else 1
        if reason is _PROBE:
            count = min(count, PROBE_COUNT)
        self._number = number = self._number + 1
        line = places.line
        if self._calm and isinstance(line, Line):
            runs, size = line.take(count, policy.bytes)
            flight = Flight(number, reason, runs=runs, bytes=size)
        else:
            parcel = places.parcels.next(urgent=line.urgent > 0)
            entries, size = places.take(parcel, count, policy.bytes)
            tries = 0 if parcel is None else parcel.tries
            flight = Flight(number, reason, entries=entries, bytes=size, tries=tries, parcel=parcel)
        flight.bytes += flight.count * limits.OPERATION_OVERHEAD_BYTES
        self.flights[number] = flight
        return flight

    # --- what became of a batch ---

    def finish(self, number: int) -> Flight:
        """All of the batch is settled."""
        flight = self.flights.pop(number)
        self.memory_bytes -= flight.bytes
        self._inside -= flight.count
        self.failures = 0
        if not self._calm:
            if flight.parcel is not None:
                flight.parcel.answered(flight.count)
                self._places.unblock(flight.entries)
            self._forget(flight.entries)
            self._refill()
            self._calm_down()
        elif self._beyond:
            self._refill()
        return flight

    def _calm_down(self) -> None:
        """Whether all is as if nothing had ever failed."""
        busy = any(flight.parcel is not None for flight in self.flights.values())
        busy = bool(busy or self._deadlines or self._out or self._attempts or self._beyond)
        self._calm = self._places.is_calm and not busy
        if self._calm:
            self._places.gather()

    def fail(self, number: int, *, retry_at_ns: int) -> None:
        """The batch failed as a whole, by nobody's own fault: it comes back as it was, with what is left of a search."""
        self._places.come_back_as_it_was(self._land(number), retry_at_ns)

    def unsplit(self, number: int, retry_at_ns: int) -> None:
        """An outage during a search: what is left of it comes back as one, to be searched anew should it fail again."""
        self._places.come_back(self._land(number), retry_at_ns).search = None

    def shrink(self, number: int, count: int, *, retry_at_ns: int) -> None:
        """The batch was too large: it comes back, and the next batches of its operations have at most `count`."""
        parcel = self._places.come_back(self._land(number), retry_at_ns)
        parcel.count_max = max(1, min(count, parcel.count_max))

    def split(self, number: int) -> bool:
        """Search for what makes the batch fail: its parts are the next batches. False where it is a single operation."""
        if self.flights[number].count == 1:
            return False
        self._places.search(self._land(number))
        return True

    def is_search(self, number: int) -> bool:
        """Whether the batch is a part of a search, or an operation that one has isolated."""
        flight = self.flights[number]
        return flight.is_part or self._places.goes_alone(flight)

    def blame(self, number: int, indexes: Iterable[int]) -> list[int]:
        """These operations of the batch failed by their own fault: returns those that may not be tried again."""
        flight = self.flights[number]
        used_up: list[int] = []
        for index in indexes:
            lsn = flight.entries[index][0]
            self._attempts[lsn] = self._attempts.get(lsn, 0) + 1
            if self.attempts_max is not None and self._attempts[lsn] >= self.attempts_max:
                used_up.append(index)
            if flight.count == 1 and (flight.tries or self.is_search(number)):
                self._places.alone.add(lsn)
        return used_up

    def partly(
        self,
        number: int,
        *,
        settled: Iterable[int],
        retry_at_ns: Mapping[int, int],
        out: Collection[int] = (),
    ) -> None:
        """These operations of the batch are settled (by index), those that are `out` will be; the others wait until their times.

        What is out is nowhere any more, counts until `drop`, and nothing goes that must not overtake it.
        """
        gone = set(settled)
        entries = self.flights[number].entries
        assert gone.isdisjoint(retry_at_ns)
        assert gone.isdisjoint(out)
        assert len(gone) + len(out) + len(retry_at_ns) == len(entries)
        flight = self._land(number)
        self.failures = 0 if gone else self.failures
        done = [entries[index] for index in sorted(gone)]
        left = [entries[index] for index in sorted(retry_at_ns)]
        self.memory_bytes -= sum(map(entry_bytes, done))
        self._inside -= len(done)
        parcel, places = flight.parcel, self._places
        if parcel is not None:
            parcel.answered(len(entries), isolated=places.goes_alone(flight))
        self._forget(done)
        places.hold(left, {entries[index][0]: time for index, time in retry_at_ns.items()}, parcel)
        withheld = [entries[index] for index in sorted(out)]
        if parcel is not None:
            places.unblock([*done, *withheld])
        if withheld:
            self._take_out(withheld)
        self._refill()

    def _land(self, number: int) -> Flight:
        """A flight that failed ends."""
        self._calm = False
        flight = self.flights.pop(number)
        self.failures += 1
        for entry in flight.entries if self._deadlines else ():
            self._deadlines.look_again(entry[0])
        return flight

    def _forget(self, entries: Sequence[Entry]) -> None:
        """Operations are settled."""
        lsns = list(map(lsn_of, entries))
        for lsn in lsns if self._attempts else ():
            self._attempts.pop(lsn, None)
        if self._deadlines:
            self._deadlines.forget(lsns)
        self._places.forget(lsns)

    def _refill(self) -> None:
        """Operations from beyond take the places of what is settled."""
        room = limits.WINDOW_COUNT_MAX - self._inside
        if not self._beyond or room <= 0:
            return
        for run in self._beyond.take(room, self.memory_bytes)[0]:
            self._admit_run(run, are_timeless=self._calm)

    # --- taking out ---

    def cancel(self, lsn: int) -> Entry | None:
        """Take out an operation; None where it is in flight, beyond or unknown. It counts until `drop`.

        Until then nothing behind it goes that must not overtake it, in case that `restore` puts it back.
        """
        found = self._places.withdraw({lsn})
        if not found:
            return None
        self._calm = False
        self._take_out(found)
        return found[0]

    def _take_out(self, entries: Sequence[Entry]) -> None:
        """Operations that were withdrawn are out, and hold up what must not overtake them."""
        self._out.update((entry[0], entry) for entry in entries)
        self._places.bar(entries)

    def restore(self, entry: Entry) -> None:
        """The cancellation could not be made durable: the operation is back where it was."""
        del self._out[entry[0]]
        self._deadlines.look_again(entry[0])
        self._places.put_back(entry)

    def drop(self, lsns: Iterable[int]) -> None:
        """Operations that were taken out are settled: dead or cancelled."""
        for lsn in lsns:
            entry = self._out.pop(lsn)
            self.memory_bytes -= entry_bytes(entry)
            self._inside -= 1
            self._forget([entry])
            self._places.unbar(entry)
        self._refill()
        self._calm_down()
