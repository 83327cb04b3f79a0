"""Where the operations of a shard stand that could be cut, or will be: what is ready, what waits, and what waits behind it.

What is not here: what is in flight, out, or beyond the limit (`batcher`), and when a batch is cut (`trigger`).

The idea needed to read it: an operation is *ready* (`fairness`); or in a *hold*, behind a time or behind an operation of its key
(or shard) that waits (`holds`); or in a *parcel*, with what failed together with it (`parcel`). All that an operation must not
overtake stands in the same hold before it, or blocks that hold: a parcel blocks the holds of its keys, and so does what is out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import Final

from walbatch import limits
from walbatch.core.entry import Entry, lsn_of
from walbatch.core.fairness import Line, Lines
from walbatch.core.flight import Flight
from walbatch.core.holds import Holds, Name
from walbatch.core.parcel import Parcel, Parcels
from walbatch.core.run import Run
from walbatch.core.splitting import Search
from walbatch.types import PRIORITY_URGENT, FailureOrder, Order

_ORDINARY: Final = frozenset(range(PRIORITY_URGENT))
_ALONE: Final = {priority: frozenset({priority}) for priority in range(PRIORITY_URGENT)}
_NONE: Final[frozenset[int]] = frozenset()


class Places:
    """The places of one shard, and the rules by which operations go from one to another. Not thread-safe: its owner locks."""

    __slots__ = (
        "_key_holding", "_keyed", "_order", "alone", "eager", "holds", "line", "parcels", "plain", "retried",
    )  # fmt: skip

    def __init__(self, order: Order, on_failure: FailureOrder) -> None:
        self._order = order
        self._keyed = order is Order.KEY
        # Whether a failure holds up the shard: then parcels go strictly before all that is ready.
        blocking = order is Order.SHARD or on_failure is FailureOrder.BLOCK
        # Whether a parcel holds up its keys: then what is ready has none of them.
        self._key_holding = self._keyed and not blocking
        self.line: Line | Lines = Line()
        self.holds = Holds()
        self.parcels = Parcels(blocking=blocking)
        self.plain = _NONE
        """The priorities that may be appended to the line without a further look."""
        self.retried: set[int] = set()
        """What was cut before, or fetched ahead; `eager`, what of it is ready: that does not linger."""
        self.eager: set[int] = set()
        self.alone: set[int] = set()
        """What goes alone until it is settled: it failed alone in a search, or after failing as a whole."""

    def __repr__(self) -> str:
        return f"<Places {self.line!r}, {self.holds!r}, {self.parcels!r}>"

    @property
    def ready(self) -> int:
        """Operations that could go at once."""
        return len(self.line) + sum(map(len, self.parcels.front))

    @property
    def is_calm(self) -> bool:
        """Whether nothing waits, and nothing that is here has failed."""
        return not (self.parcels or self.holds or self.retried or self.parcels.blocked_until_ns)

    def arrivals_ns(self) -> list[int]:
        """When operations arrived, the oldest that is here among them. O(waiting)."""
        times = [entry[4] for entry in self.holds]
        times += [entry[4] for parcel in self.parcels for entry in parcel.entries]
        return [*times, self.line.oldest_ns()] if len(self.line) else times

    def hurry(self, now_ns: int) -> None:
        """Nothing waits for a retry beyond `now_ns`."""
        self.parcels.hurry(now_ns)
        self.holds.hurry(self.retried, now_ns)

    # --- what is ready ---

    def goes_alone(self, flight: Flight) -> bool:
        """Whether a batch is one operation that goes alone."""
        return flight.count == 1 and flight.entries[0][0] in self.alone

    def admit(self, entry: Entry) -> None:
        """An operation, the youngest of its key, comes to its place."""
        name = self._name_of(entry)
        if name in self.holds or self.holds.waits(entry[0]):
            self.holds.put(name, entry)
            return
        self._suit(entry[3], entry[0])
        self.line.add(entry)

    def admit_run(self, run: Run) -> bool:
        """Operations without times become ready, the youngest of their keys. False, and nothing is done, where some may wait."""
        if len(self.holds) and self._order is not Order.NONE:
            return False
        self._suit(run.priority, run.lsns[0])
        self.line.extend(run)
        self.tune(run.priority)
        return True

    def admit_ahead(self, entry: Entry) -> None:
        """An operation that goes before all that is older, but for what has its key."""
        self._spread()
        if not self.holds.waits(entry[0]):
            self.retried.add(entry[0])
            if self._name_of(entry) not in self.holds:
                self.eager.add(entry[0])
        self.admit(entry)
        self._spread()

    def tune(self, priority: int) -> None:
        """Whether the next operations need no further look: `priority` is what the last one had."""
        if isinstance(self.line, Lines) or (len(self.holds) and self._order is not Order.NONE):
            self.plain = _NONE
        elif self._order is Order.SHARD:
            self.plain = _ORDINARY
        else:
            first = self.line.priority
            self.plain = _ALONE.get(priority if first is None else first, _NONE)

    def _name_of(self, entry: Entry) -> Name:
        """What waits together with it."""
        if self._keyed:
            return entry[1]
        return None if self._order is Order.SHARD else entry[0]

    def _suit(self, priority: int, lsn: int) -> None:
        """Before an operation becomes ready: one line for one priority, several for several, and where it comes out of turn."""
        line = self.line
        if self._order is Order.SHARD:
            return
        if isinstance(line, Lines):
            if not len(line) and not len(self.holds):
                self.line = Line()
        elif line.priority not in {None, priority} or lsn < line.highest_lsn:
            self._spread()

    def _spread(self) -> None:
        """From one line to several."""
        if isinstance(self.line, Line):
            self.line = Lines(self.line, keyed=self._keyed)
        self.plain = _NONE

    def gather(self) -> None:
        """From several lines to one, if one will do, once nothing waits any more."""
        if isinstance(self.line, Lines) and self.line.is_uniform:
            self.line = Line(sorted(self.line, key=lsn_of))

    def take(self, parcel: Parcel | None, count: int, bytes_max: int) -> tuple[list[Entry], int]:
        """The next batch, from a parcel or from what is ready, within `count` and `bytes_max`, and its bytes."""
        if parcel is not None:
            taken, size = parcel.take(count, bytes_max)
        else:
            line = self.line
            if isinstance(line, Line):
                runs, size = line.take(count, bytes_max)
                taken = list(chain.from_iterable(runs))
            else:
                taken, size = line.take(count, bytes_max)
            if self.eager:
                lsns = list(map(lsn_of, taken))
                self.eager.difference_update(lsns)
                self.retried.difference_update(lsns)
        self.parcels.took(parcel)
        return taken, size

    # --- what waits ---

    def release(self, now_ns: int) -> None:
        """Let go of what has waited long enough."""
        self.parcels.release(now_ns)
        self._make_ready(self.holds.release(now_ns))

    def _make_ready(self, entries: list[Entry]) -> None:
        """Operations that nothing holds any more, those of a key in LSN order, come back in LSN order."""
        for entry in entries:
            lsn = entry[0]
            name = self._name_of(entry)
            if self.holds.stops(name, lsn):
                self.holds.put(name, entry)
            elif lsn in self.alone:
                self.parcels.front.append(Parcel([entry], tries=0))
                if self._key_holding:
                    self.holds.block(name)
            else:
                self._enter(entry)

    def _enter(self, entry: Entry) -> None:
        """An operation is ready again, where its LSN belongs."""
        if entry[0] in self.retried:
            self.eager.add(entry[0])
        self.plain = _NONE
        self._suit(entry[3], limits.LSN_MAX)
        self.line.add_back(entry)

    def hold(self, entries: Sequence[Entry], times: Mapping[int, int], origin: Parcel | None) -> None:
        """Operations of a batch wait, each until its time, and what comes behind them waits with them."""
        if self.parcels.blocking:
            if entries:
                self.parcels.wait(Parcel(list(entries), tries=0), max(times.values()))
            return
        self.plain = _NONE
        for entry in entries:
            self.holds.wait(entry[0], times[entry[0]])
            self.holds.put(self._name_of(entry), entry)
            self.retried.add(entry[0])
        if not self._key_holding:
            return
        if origin is not None:
            self._give_up(origin, _eldest(entries))
            self.unblock(entries)
        else:
            self._stand_back(_eldest(entries))

    def _stand_back(self, keys: Mapping[bytes, int]) -> None:
        """What is ready and younger than the LSN given for its key goes into the key's hold."""
        self.plain = _NONE
        line = self.line
        if isinstance(line, Lines):
            found = [entry for key, lsn in keys.items() for entry in line.withdraw_key(key, lsn)]
        else:
            found = line.withdraw_keys(keys)
        for entry in found:
            self.eager.discard(entry[0])
            self.holds.put(entry[1], entry)

    def _give_up(self, parcel: Parcel, keys: dict[bytes, int]) -> None:
        """What a parcel has that is younger than the LSN given for its key goes into the key's hold."""
        given = parcel.withdraw_keys(keys)
        self._keep_waiting(parcel, given)
        for entry in given:
            self.retried.add(entry[0])
            self.holds.put(entry[1], entry)
        self.parcels.look(parcel)
        self.unblock(given)

    def _keep_waiting(self, parcel: Parcel, entries: Iterable[Entry]) -> None:
        """Operations that leave a parcel may not go before it would have."""
        until_ns = self.parcels.until_ns(parcel)
        if until_ns is not None:
            for entry in entries:
                self.holds.wait(entry[0], until_ns)

    def unblock(self, entries: Iterable[Entry]) -> None:
        """Operations are no longer in a parcel."""
        if self._key_holding:
            for entry in entries:
                self._make_ready(self.holds.unblock(entry[1]))

    # --- what comes back together ---

    def come_back_as_it_was(self, flight: Flight, retry_at_ns: int) -> None:
        """A batch that failed goes again, in the same form; where it was a part of a search, with all that is left of that."""
        if flight.is_part:
            self.come_back(flight, retry_at_ns).search = None
            return
        count_max = None if flight.parcel is None else flight.parcel.count_max
        again = Parcel(list(flight.entries), tries=flight.tries + 1, count_max=count_max)
        self._form(again, flight.parcel)
        self.parcels.wait(again, retry_at_ns)

    def come_back(self, flight: Flight, retry_at_ns: int) -> Parcel:
        """A batch goes again, in front of what is left of the parcel that it was taken from."""
        parcel = flight.parcel
        if parcel is None:
            parcel = Parcel([], tries=flight.tries)
            self._seize(flight.entries)
        parcel.put_back(list(flight.entries))
        self.parcels.wait(parcel, retry_at_ns)
        return parcel

    def search(self, flight: Flight) -> None:
        """A batch of several operations is searched for what makes it fail: its parts go next."""
        entries, origin = list(flight.entries), flight.parcel
        if origin is not None and origin.search is not None:
            origin.search.failed(len(entries))
            origin.put_back(entries)
            self.parcels.put_in_front(origin)
            return
        count_max = None if origin is None else origin.count_max
        searched = Parcel(entries, tries=flight.tries, search=Search(len(entries)), count_max=count_max)
        self._form(searched, origin)
        self.parcels.put_in_front(searched)

    def _form(self, parcel: Parcel, origin: Parcel | None) -> None:
        """A batch becomes a parcel: what is ready of its keys, or left of the parcel it came from, has to wait behind it."""
        if origin is None:
            self._seize(parcel.entries)
        elif self._key_holding:
            self._give_up(origin, _eldest(parcel.entries))

    def _seize(self, entries: Sequence[Entry]) -> None:
        """Operations that were ready become a parcel's: what is ready of their keys has to wait behind them."""
        if not self._key_holding:
            return
        for entry in entries:
            self.holds.block(entry[1])
        self._stand_back(_eldest(entries))

    # --- what is taken out ---

    def withdraw(self, lsns: Collection[int]) -> list[Entry]:
        """Take out those of `lsns` that are here."""
        found = self.line.withdraw(lsns)
        self.eager.difference_update(lsns)
        if len(found) < len(lsns):
            found += self.holds.withdraw(lsns)
            for parcel in self.parcels:
                out = parcel.withdraw(lsns)
                found += out
                self._keep_waiting(parcel, out)  # should they be restored
                self.parcels.look(parcel)
                self.unblock(out)
        return found

    def bar(self, entries: Sequence[Entry]) -> None:
        """Until these, which were withdrawn, are let through or put back, nothing goes that must not overtake them."""
        if self._order is Order.NONE:
            return
        self.plain = _NONE
        for entry in entries:
            self.holds.block(self._name_of(entry))
        if self._keyed:
            keys = _eldest(entries)
            for parcel in self.parcels:
                self._give_up(parcel, keys)
            self._stand_back(keys)

    def unbar(self, entry: Entry) -> None:
        """This one is in nobody's way any more."""
        if self._order is not Order.NONE:
            self._make_ready(self.holds.unblock(self._name_of(entry)))

    def put_back(self, entry: Entry) -> None:
        """An operation that was withdrawn is back where it was."""
        lsn, name = entry[0], self._name_of(entry)
        if self._keyed or self.holds.waits(lsn) or 0 < self.holds.eldest(name) < lsn:
            self.holds.put(name, entry)
        else:
            self._put_back_in_order(entry)
        self.unbar(entry)

    def _put_back_in_order(self, entry: Entry) -> None:
        """An operation without key order is back in a parcel that goes before what is younger, or ready."""
        for parcel in self.parcels.front if self._order is Order.SHARD else ():
            if parcel.entries and entry[0] < parcel.entries[-1][0]:
                parcel.insert(entry)
                return
        self._enter(entry)

    def forget(self, lsns: Iterable[int]) -> None:
        """Operations are settled."""
        for lsn in lsns:
            self.holds.forget(lsn)
            self.retried.discard(lsn)
            self.alone.discard(lsn)


def _eldest(entries: Sequence[Entry]) -> dict[bytes, int]:
    """The first LSN of each key, of entries in LSN order within a key."""
    return {entry[1]: entry[0] for entry in reversed(entries)}
