"""The queue of one shard: what is ready, what waits and for what, what is in flight, and what became of it.

What is not here: threads, backends, and how the queue is filled (live, or read back from the log). When to cut is `trigger`,
fair shares `fairness`, what waits `holds`, what failed together `parcel`, the search for a culprit `splitting`.

The idea needed to read it: an operation is in one place at a time. It is *ready*; or in a *hold*, behind a time or behind an
operation of its key (or shard) that waits; or in a *parcel*, with what failed together with it; or in *flight*; or *out*: dead
or cancelled, until that is durable. At most RANGES_MAX operations are in any of these; the others stay *beyond*, in LSN order, so
that what is settled out of turn can never cost the shard's mark more ranges than that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from walbatch import limits
from walbatch.core.entry import Entry, entry_bytes, lsn_of
from walbatch.core.fairness import LOW_SHARE, Line, Lines
from walbatch.core.holds import Holds, Name
from walbatch.core.parcel import Parcel
from walbatch.core.splitting import Search
from walbatch.core.timetable import Timetable
from walbatch.core.trigger import PROBE_COUNT, CutPolicy, Cutter, Situation
from walbatch.types import PRIORITY_URGENT, CutReason, FailureOrder, Order

__all__ = ["CutPolicy", "Entry", "Flight", "ShardQueue", "Situation", "entry_bytes"]

_ORDINARY: Final = frozenset(range(PRIORITY_URGENT))
_ALONE: Final = {priority: frozenset({priority}) for priority in range(PRIORITY_URGENT)}
_NONE: Final[frozenset[int]] = frozenset()


class Flight(NamedTuple):
    """A batch on its way. `tries`: how often the same operations failed as a whole before, in a row. `bytes`: its memory."""

    number: int
    entries: list[Entry]
    reason: CutReason
    tries: int
    bytes: int


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
        self._keyed = order is Order.KEY
        # Whether a failure holds up the shard: then parcels go strictly before all that is ready.
        self._blocking = order is Order.SHARD or on_failure is FailureOrder.BLOCK
        # Whether a parcel holds up its keys: then what is ready has none of them.
        self._key_holding = self._keyed and not self._blocking
        self._blocked_until = 0
        self._cutter = Cutter(policy)
        self._number = 0
        # What is not settled, without what is beyond.
        self._inside = 0
        self._line: Line | Lines = Line()
        # The priorities that a push may append to the line without a further look.
        self._plain = _NONE
        # What was cut before, or fetched ahead, and of it what is ready: it does not linger.
        self._retried: set[int] = set()
        self._eager: set[int] = set()
        self._beyond: deque[Entry] = deque()
        self._holds = Holds()
        self._front: deque[Parcel] = deque()
        self._waiting: Timetable[Parcel] = Timetable()
        # Batches with urgent operations that went before a parcel, in a row.
        self._overtaken = 0
        self._origins: dict[int, Parcel] = {}
        self._out: dict[int, Entry] = {}
        self._cancelled: set[int] = set()
        self._deadlines: Timetable[int] = Timetable()
        # Whose deadline passed in flight, beyond, or on the way out.
        self._overdue: set[int] = set()
        self._attempts: dict[int, int] = {}
        # Failed alone in a search, or after failing as a whole: they go alone until they are settled.
        self._suspects: set[int] = set()
        # Nothing waits, nothing has failed, nothing has a time: all that is not ready is in flight.
        self._calm = True

    def __repr__(self) -> str:
        flying = sum(len(flight.entries) for flight in self.flights.values())
        return (
            f"<ShardQueue {self.ready} ready, {len(self) - self.ready - flying} waiting, {flying} in flight>"
        )

    def __len__(self) -> int:
        return self._inside + len(self._beyond)

    @property
    def ready(self) -> int:
        """Operations that could go at once."""
        return len(self._line) + sum(map(len, self._front))

    @property
    def oldest_arrival_ns(self) -> int | None:
        """When the oldest operation arrived that is not settled; None if there is none."""
        times = [entry[4] for entry in self._holds]
        times += [entry[4] for parcel in self._parcels() for entry in parcel.entries]
        times += [entry[4] for flight in self.flights.values() for entry in flight.entries]
        times += [entry[4] for entry in self._out.values()]
        times += [self._beyond[0][4]] if self._beyond else []
        times += [self._line.oldest_ns()] if len(self._line) else []
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
        return self._holds.delayed(self._retried)

    def observe_duration(self, seconds: float) -> None:
        """A batch of this shard took that long: the adaptive linger follows."""
        self._cutter.linger.observe(seconds)

    def attempts(self, lsn: int) -> int:
        """How often the operation failed by its own fault."""
        return self._attempts.get(lsn, 0)

    # --- coming in ---

    def push(self, entry: Entry, *, not_before_ns: int = 0, deadline_ns: int = 0) -> None:
        """A new operation, in LSN order. Times are monotonic; 0: none."""
        if entry[3] not in self._plain or not_before_ns or deadline_ns or self._inside >= limits.RANGES_MAX:
            self._push(entry, not_before_ns, deadline_ns)
            return
        line = self._line
        assert isinstance(line, Line)
        size = len(entry[1]) + len(entry[2])
        line.entries.append(entry)
        line.bytes += size
        self.memory_bytes += size + limits.OPERATION_OVERHEAD_BYTES
        self._inside += 1

    def _push(self, entry: Entry, not_before_ns: int, deadline_ns: int) -> None:
        """`push` for all cases."""
        self._calm = self._calm and not (not_before_ns or deadline_ns or self._inside >= limits.RANGES_MAX)
        self.memory_bytes += entry_bytes(entry)
        if deadline_ns:
            self._deadlines.set(entry[0], deadline_ns)
        if not_before_ns:
            self._holds.wait(entry[0], not_before_ns)
        if self._beyond or self._inside >= limits.RANGES_MAX:
            self._beyond.append(entry)
        else:
            self._admit(entry)
        self._tune(entry[3])

    def _tune(self, priority: int) -> None:
        """Whether the next pushes need no further look: `priority` is what the last one had."""
        if (
            self._beyond
            or isinstance(self._line, Lines)
            or (len(self._holds) and self.order is not Order.NONE)
        ):
            self._plain = _NONE
        elif self.order is Order.SHARD:
            self._plain = _ORDINARY
        else:
            line = self._line.entries
            self._plain = _ALONE.get(line[0][3] if line else priority, _NONE)

    def _admit(self, entry: Entry) -> None:
        """An operation, the youngest of its key, comes to its place."""
        self._inside += 1
        if entry[0] in self._overdue:
            self._due_again(entry[0])
        name = self._name_of(entry)
        if name in self._holds or self._holds.waits(entry[0]):
            self._holds.put(name, entry)
            return
        self._suit(entry[3])
        self._line.append(entry)

    def _name_of(self, entry: Entry) -> Name:
        """What waits together with it."""
        if self._keyed:
            return entry[1]
        return None if self.order is Order.SHARD else entry[0]

    def _suit(self, priority: int) -> None:
        """Before an operation becomes ready: one line for one priority, several for several."""
        line = self._line
        if self.order is Order.SHARD:
            return
        if isinstance(line, Lines):
            if not len(line) and not len(self._holds):
                self._line = Line()
        elif len(line) and line.entries[0][3] != priority:
            self._spread()

    def _spread(self) -> None:
        """From one line to several."""
        if isinstance(self._line, Line):
            self._line = Lines(self._line, keyed=self._keyed)
        self._plain = _NONE

    def push_ahead(self, entries: Iterable[Entry]) -> None:
        """Urgent operations from further back in the log, with the elder ones of their keys, in LSN order.

        They are younger than all that is queued, and go before it, except before what has their key, and except where that is
        beyond. Not for order "shard".
        """
        assert self.order is not Order.SHARD
        self._calm = False
        self._spread()
        behind = {entry[1] for entry in self._beyond} if self._keyed else set()
        for entry in entries:
            self.memory_bytes += entry_bytes(entry)
            if entry[1] in behind:
                self._beyond.append(entry)
                continue
            self._retried.add(entry[0])
            if self._name_of(entry) not in self._holds:
                self._eager.add(entry[0])
            self._admit(entry)
            self._spread()

    # --- time ---

    def release(self, now_ns: int) -> None:
        """Let go of what has waited long enough."""
        if self._calm:
            return
        if now_ns >= self._blocked_until:
            self._blocked_until = 0
        self._front.extend(self._waiting.due(now_ns))
        self._make_ready(self._holds.release(now_ns))

    def _make_ready(self, entries: list[Entry]) -> None:
        """Operations that nothing holds any more, those of a key in LSN order, come back in LSN order."""
        for entry in entries:
            lsn = entry[0]
            name = self._name_of(entry)
            if self._holds.stops(name, lsn):
                self._holds.put(name, entry)
            elif lsn in self._suspects:
                self._front.append(Parcel([entry], tries=0))
                if self._key_holding:
                    self._holds.block(name)
            else:
                self._enter(entry)

    def _enter(self, entry: Entry) -> None:
        """An operation is ready again, where its LSN belongs."""
        if entry[0] in self._retried:
            self._eager.add(entry[0])
        self._plain = _NONE
        self._suit(entry[3])
        self._line.insert(entry)

    def expire(self, now_ns: int) -> list[Entry]:
        """Take out the operations whose deadline has passed, except in flight and beyond. They count until `drop`."""
        due = self._deadlines.due(now_ns)
        if not due:
            return []
        entries = sorted(self._withdraw(set(due)), key=lsn_of)
        self._overdue.update(set(due).difference(map(lsn_of, entries)))
        self._out.update((entry[0], entry) for entry in entries)
        return entries

    def _due_again(self, lsn: int) -> None:
        """A deadline that has passed can be looked at now."""
        self._overdue.remove(lsn)
        self._deadlines.set(lsn, 0)

    def next_due_ns(self, situation: Situation | None = None) -> int | None:
        """When time alone will make something due or expire; None if it will not. May be in the past."""
        times = [self._deadlines.first()]
        if len(self.flights) < self.flights_max and not (self.order is Order.SHARD and self._cancelled):
            going = [self._waiting.first(), self._holds.first()]
            if any(not parcel.busy for parcel in self._front) or (
                situation and situation.probing and len(self._line)
            ):
                going.append(0)
            elif len(self._line):
                target = limits.BATCH_COUNT_MAX if situation is None else situation.target
                going.append(
                    self._cutter.due_at_ns(
                        target, self._line, eager=bool(self._eager), in_flight=bool(self.flights)
                    )
                )
            times += [max(self._blocked_until, time) for time in going if time is not None]
        return min((time for time in times if time is not None), default=None)

    # --- cutting ---

    def due(self, situation: Situation) -> CutReason | None:
        """Whether a batch should be cut now, and why. Call `release` first."""
        flights = self.flights
        if flights and len(flights) >= self.flights_max:
            return None
        if not self._calm:
            if situation.now_ns < self._blocked_until or (self._cancelled and self.order is Order.SHARD):
                return None
            parcel = self._next_parcel()
            if parcel is not None:
                return CutReason.PROBE if situation.probing else parcel.reason
        line = self._line
        if not line:
            return None
        return self._cutter.reason(situation, line, eager=bool(self._eager), in_flight=bool(flights))

    def _next_parcel(self) -> Parcel | None:
        """The parcel that the next batch is taken from; None: it is taken from what is ready."""
        for parcel in self._front:
            if not parcel.busy:
                urgent = self._line.urgent and not self._blocking and self._overtaken < LOW_SHARE - 1
                return None if urgent else parcel
        return None

    def cut(self, situation: Situation, reason: CutReason) -> Flight:
        """Take the next batch, for the reason that `due` gave: its operations stand in the order in which to apply them."""
        assert len(self.flights) < self.flights_max
        policy = self._cutter.policy
        count = policy.limit(situation.target)
        if reason is CutReason.PROBE:
            count = min(count, PROBE_COUNT)
        parcel = None if self._calm else self._next_parcel()
        if parcel is None:
            entries, size = self._line.take(count, policy.bytes)
            if not self._calm:
                self._leave_ready(entries)
        else:
            entries, size = parcel.take(count, policy.bytes)
            self._overtaken = 0
            self._origins[self._number + 1] = parcel
            if not parcel.entries:
                self._front.remove(parcel)
        assert entries, "nothing was due"
        self._number = number = self._number + 1
        size += len(entries) * limits.OPERATION_OVERHEAD_BYTES
        tries = 0 if parcel is None else parcel.tries
        flight = self.flights[number] = Flight(
            number=number, entries=entries, reason=reason, tries=tries, bytes=size
        )
        return flight

    def _leave_ready(self, entries: list[Entry]) -> None:
        """Operations that were ready are in flight."""
        self._overtaken = self._overtaken + 1 if self._front else 0
        if self._eager:
            lsns = [entry[0] for entry in entries]
            self._eager.difference_update(lsns)
            self._retried.difference_update(lsns)

    # --- what became of a batch ---

    def finish(self, number: int) -> list[Entry]:
        """All of the batch is settled."""
        flight = self.flights.pop(number)
        entries = flight.entries
        self.memory_bytes -= flight.bytes
        self._inside -= len(entries)
        self.failures = 0
        if not self._calm:
            parcel = self._origins.pop(number, None)
            if parcel is not None:
                self._answered(parcel, len(entries))
                self._unblock(entries)
            self._forget(entries)
            self._refill()
            self._calm_down()
        return entries

    def _calm_down(self) -> None:
        """Whether all is as if nothing had ever failed."""
        self._calm = not (
            self._front or self._waiting or self._holds or self._retried or self._deadlines or self._out or self._origins
            or self._attempts or self._beyond or self._overdue or self._blocked_until
        )  # fmt: skip
        if self._calm and isinstance(self._line, Lines) and self._line.is_uniform:
            self._line = Line(sorted(self._line, key=lsn_of))

    def fail(self, number: int, *, retry_at_ns: int) -> None:
        """The batch failed as a whole, by nobody's own fault: it comes back as it was, with what is left of a search."""
        flight, parcel = self._land(number)
        if parcel is not None and parcel.search is not None:
            self._come_back(flight, parcel, retry_at_ns)
            return
        count_max = None if parcel is None else parcel.count_max
        again = Parcel(list(flight.entries), tries=flight.tries + 1, count_max=count_max)
        if parcel is None:
            self._seize(again.entries)
        else:
            self._yield_keys(parcel, again.entries)
        self._wait(again, retry_at_ns)

    def unsplit(self, number: int, retry_at_ns: int) -> None:
        """An outage during a search: what is left of it comes back as one, to be searched anew should it fail again."""
        flight, parcel = self._land(number)
        if parcel is None:
            parcel = Parcel([], tries=flight.tries)
            self._seize(flight.entries)
        self._come_back(flight, parcel, retry_at_ns)

    def _come_back(self, flight: Flight, parcel: Parcel, retry_at_ns: int) -> None:
        parcel.search = None
        parcel.put_back(list(flight.entries))
        self._wait(parcel, retry_at_ns)

    def shrink(self, number: int, count: int, *, retry_at_ns: int) -> None:
        """The batch was too large: it comes back, and the next batches of its operations have at most `count`."""
        flight, parcel = self._land(number)
        if parcel is None:
            parcel = Parcel([], tries=flight.tries)
            self._seize(flight.entries)
        parcel.count_max = max(1, min(count, parcel.count_max))
        parcel.put_back(list(flight.entries))
        self._wait(parcel, retry_at_ns)

    def split(self, number: int) -> bool:
        """Search for what makes the batch fail: its parts are the next batches. False where it is a single operation."""
        if len(self.flights[number].entries) == 1:
            return False
        flight, parcel = self._land(number)
        if parcel is not None and parcel.search is not None:
            parcel.search.failed(len(flight.entries))
            parcel.put_back(list(flight.entries))
            if parcel not in self._front:
                self._front.appendleft(parcel)
            return True
        search = Search(len(flight.entries))
        count_max = None if parcel is None else parcel.count_max
        searched = Parcel(list(flight.entries), tries=flight.tries, search=search, count_max=count_max)
        if parcel is None:
            self._seize(searched.entries)
        else:
            self._yield_keys(parcel, searched.entries)
        self._front.appendleft(searched)
        return True

    def is_search(self, number: int) -> bool:
        """Whether the batch is a part of a search, or an operation that one has isolated."""
        parcel = self._origins.get(number)
        if parcel is not None and parcel.search is not None:
            return True
        entries = self.flights[number].entries
        return len(entries) == 1 and entries[0][0] in self._suspects

    def blame(self, number: int, indexes: Iterable[int]) -> list[int]:
        """These operations of the batch failed by their own fault: returns those that may not be tried again."""
        flight = self.flights[number]
        used_up: list[int] = []
        for index in indexes:
            lsn = flight.entries[index][0]
            self._attempts[lsn] = self._attempts.get(lsn, 0) + 1
            if self.attempts_max is not None and self._attempts[lsn] >= self.attempts_max:
                used_up.append(index)
            if len(flight.entries) == 1 and (flight.tries or self.is_search(number)):
                self._suspects.add(lsn)
        return used_up

    def partly(self, number: int, *, settled: Iterable[int], retry_at_ns: Mapping[int, int]) -> None:
        """These operations of the batch are settled (by index); the others wait until their times."""
        gone = set(settled)
        flight = self.flights[number]
        assert gone.isdisjoint(retry_at_ns)
        assert len(gone) + len(retry_at_ns) == len(flight.entries)
        failures = self.failures
        flight, parcel = self._land(number)
        self.failures = 0 if gone else failures + 1
        done = [flight.entries[index] for index in sorted(gone)]
        left = [flight.entries[index] for index in sorted(retry_at_ns)]
        self.memory_bytes -= sum(map(entry_bytes, done))
        self._inside -= len(done)
        if parcel is not None:
            isolated = len(flight.entries) == 1 and flight.entries[0][0] in self._suspects
            self._answered(parcel, len(flight.entries), isolated=isolated)
        self._forget(done)
        if self._blocking:
            if left:
                self._wait(Parcel(left, tries=0), max(retry_at_ns.values()))
        else:
            self._hold(left, {flight.entries[index][0]: time for index, time in retry_at_ns.items()}, parcel)
        if parcel is not None:
            self._unblock(done)
        self._refill()

    def _land(self, number: int) -> tuple[Flight, Parcel | None]:
        """A flight that failed ends."""
        self._calm = False
        flight = self.flights.pop(number)
        self.failures += 1
        for entry in flight.entries if self._overdue else ():
            if entry[0] in self._overdue:
                self._due_again(entry[0])
        return flight, self._origins.pop(number, None)

    def _answered(self, parcel: Parcel, count: int, *, isolated: bool = False) -> None:
        """A batch of a parcel has its answer."""
        parcel.busy = False
        if parcel.search is None:
            return
        if isolated:
            parcel.search.isolated()
        else:
            parcel.search.passed(count)

    def _wait(self, parcel: Parcel, retry_at_ns: int) -> None:
        """A parcel waits: with it the shard, or its keys (which it holds), or nothing."""
        if self._blocking:
            if parcel not in self._front:
                self._front.appendleft(parcel)
            self._blocked_until = max(self._blocked_until, retry_at_ns)
            return
        if parcel in self._front:
            self._front.remove(parcel)
        self._waiting.set(parcel, retry_at_ns)

    def _seize(self, entries: Iterable[Entry]) -> None:
        """Operations that were ready become a parcel's: what is ready of their keys has to wait behind them."""
        if not self._key_holding:
            return
        self._plain = _NONE
        for entry in entries:
            self._holds.block(entry[1])
        self._stand_back({entry[1]: entry[0] for entry in reversed(list(entries))})

    def _yield_keys(self, parcel: Parcel, entries: Sequence[Entry]) -> None:
        """A part of a parcel will wait: what is left of the parcel waits behind it, as far as keys say so."""
        if self._key_holding:
            keys = {entry[1]: entry[0] for entry in reversed(entries)}
            self._give_up(parcel, keys)

    def _hold(self, left: list[Entry], times: Mapping[int, int], parcel: Parcel | None) -> None:
        """Operations of a batch wait, each until its time, and what comes behind them waits with them."""
        self._plain = _NONE
        keys = {entry[1]: entry[0] for entry in reversed(left)}
        for entry in left:
            self._holds.wait(entry[0], times[entry[0]])
            self._holds.put(self._name_of(entry), entry)
            self._retried.add(entry[0])
        if self._key_holding:
            if parcel is not None:
                self._give_up(parcel, keys)
                self._unblock(left)
            else:
                self._stand_back(keys)

    def _stand_back(self, keys: Mapping[bytes, int]) -> None:
        """What is ready and younger than the LSN given for its key goes into the key's hold."""
        self._plain = _NONE
        if not len(self._line):
            return
        self._spread()
        assert isinstance(self._line, Lines)
        for key, lsn in keys.items():
            for entry in self._line.withdraw_key(key, lsn):
                self._eager.discard(entry[0])
                self._holds.put(key, entry)

    def _give_up(self, parcel: Parcel, keys: dict[bytes, int]) -> None:
        """What a parcel has that is younger than the LSN given for its key goes into the key's hold."""
        given = parcel.withdraw_keys(keys)
        self._keep_waiting(parcel, given)
        for entry in given:
            self._retried.add(entry[0])
            self._holds.put(entry[1], entry)
        self._look(parcel)
        self._unblock(given)

    def _keep_waiting(self, parcel: Parcel, entries: Iterable[Entry]) -> None:
        """Operations that leave a parcel may not go before it would have."""
        until_ns = self._waiting.get(parcel)
        if until_ns is not None:
            for entry in entries:
                self._holds.wait(entry[0], until_ns)

    def _look(self, parcel: Parcel) -> None:
        """A parcel without operations is none."""
        if not parcel.entries and parcel in self._front:
            self._front.remove(parcel)
        if not parcel.entries:
            self._waiting.discard(parcel)

    def _unblock(self, entries: Iterable[Entry]) -> None:
        """Operations are no longer in a parcel."""
        if self._key_holding:
            for entry in entries:
                self._make_ready(self._holds.unblock(entry[1]))

    def _forget(self, entries: Iterable[Entry]) -> None:
        """Operations are settled."""
        for entry in entries:
            lsn = entry[0]
            self._attempts.pop(lsn, None)
            self._suspects.discard(lsn)
            self._deadlines.discard(lsn)
            self._overdue.discard(lsn)
            self._holds.forget(lsn)
            self._retried.discard(lsn)

    def _refill(self) -> None:
        """Operations from beyond take the places of what is settled."""
        while self._beyond and self._inside < limits.RANGES_MAX:
            self._admit(self._beyond.popleft())

    # --- taking out ---

    def cancel(self, lsn: int) -> Entry | None:
        """Take out an operation; None where it is in flight, beyond or unknown. It counts until `drop`.

        Until then nothing behind it goes that must not overtake it, in case that `restore` puts it back.
        """
        found = self._withdraw({lsn})
        if not found:
            return None
        entry = found[0]
        self._calm = False
        self._out[lsn] = entry
        self._cancelled.add(lsn)
        if self.order is not Order.NONE:
            self._plain = _NONE
            self._holds.block(self._name_of(entry))
        if self._keyed:
            for parcel in self._parcels():
                self._give_up(parcel, {entry[1]: lsn})
            self._stand_back({entry[1]: lsn})
        return entry

    def restore(self, entry: Entry) -> None:
        """The cancellation could not be made durable: the operation is back where it was."""
        lsn, name = entry[0], self._name_of(entry)
        del self._out[lsn]
        self._cancelled.remove(lsn)
        if lsn in self._overdue:
            self._due_again(lsn)
        if self._keyed or self._holds.waits(lsn) or 0 < self._holds.eldest(name) < lsn:
            self._holds.put(name, entry)
        else:
            self._restore_in_order(entry)
        if self.order is not Order.NONE:
            self._make_ready(self._holds.unblock(name))

    def _restore_in_order(self, entry: Entry) -> None:
        """An operation without key order is back in a parcel that goes before what is younger, or ready."""
        for parcel in self._front if self.order is Order.SHARD else ():
            if parcel.entries and entry[0] < parcel.entries[-1][0]:
                parcel.insert(entry)
                return
        self._enter(entry)

    def drop(self, lsns: Iterable[int]) -> None:
        """Operations that were taken out are settled: dead or cancelled."""
        for lsn in lsns:
            entry = self._out.pop(lsn)
            self.memory_bytes -= entry_bytes(entry)
            self._inside -= 1
            self._forget([entry])
            if lsn in self._cancelled:
                self._cancelled.remove(lsn)
                if self.order is not Order.NONE:
                    self._make_ready(self._holds.unblock(self._name_of(entry)))
        self._refill()
        self._calm_down()

    def _parcels(self) -> list[Parcel]:
        return [*self._front, *self._waiting]

    def _withdraw(self, lsns: set[int]) -> list[Entry]:
        """Take out those of `lsns` that are not in flight, nor beyond."""
        found = self._line.withdraw(lsns)
        self._eager.difference_update(lsns)
        if len(found) < len(lsns):
            found += self._holds.withdraw(lsns)
            for parcel in self._parcels():
                out = parcel.withdraw(lsns)
                found += out
                self._keep_waiting(parcel, out)  # should they be restored
                self._look(parcel)
                self._unblock(out)
        return found
