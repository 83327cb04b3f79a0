"""One operation by its LSN: where it is, and taking it back.

What is not here: operations that are not durable yet, and dead letters (the engine knows those).

The idea needed to read it: an operation that is not settled is in the queue of its shard, or it is still in the log only, ahead of
the shard's cursor; then it is looked up there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from walbatch.core.batcher import Entry
from walbatch.core.routing import shard_of
from walbatch.errors import WalbatchError
from walbatch.ports import Condition, Log, StateStore, Threads
from walbatch.runtime.delivery import Delivery
from walbatch.runtime.flow import Flow
from walbatch.runtime.lane import Lane, Shard
from walbatch.runtime.readback import ReadBack
from walbatch.runtime.ticket import Promise
from walbatch.types import OperationStatus

ABSORB_WAIT_NS = 1_000_000
"""How long to wait, again and again, until the timer has taken over what was committed last."""


class Finder:
    """Finds operations. Safe from any thread; not from a backend for `cancel`, which writes."""

    def __init__(
        self, *, cond: Condition, lanes: Sequence[Lane], read_back: ReadBack, delivery: Delivery, log: Log, reading: Condition,
        state: StateStore, flow: Flow, threads: Threads, aside: Callable[[Callable[[], None]], None], wake: Callable[[], None],
        is_absorbed: Callable[[int], bool], settled_lsn: Callable[[], int],
    ) -> None:  # fmt: skip
        """`aside` has a thread of the engine's do something; `wake`, with the lock held, wakes all who wait.

        `is_absorbed(lsn)`: whether the shards have everything that is durable up to there, or nothing more will come.
        """
        # The dispatcher's: it guards the shards.
        self._cond = cond
        self._by_name = {lane.setup.name: lane for lane in lanes}
        self._shards = [shard for lane in lanes if lane.logged for shard in lane.shards]
        self._read_back = read_back
        self._delivery = delivery
        self._log = log
        # Held while the log is read.
        self._reading = reading
        self._state = state
        self._flow = flow
        self._threads = threads
        self._aside = aside
        self._wake = wake
        self._is_absorbed = is_absorbed
        self._settled_lsn = settled_lsn

    def __repr__(self) -> str:
        return f"<Finder over {len(self._shards)} shards>"

    def cancel(self, lsn: int) -> bool:
        """Take back an operation that is not in flight; durable when it returns. Returns whether it was.

        Crash story: the operation is out of its queue before its cancellation is written, so nobody delivers it meanwhile; nothing
        is settled before that is durable. One that is still in the log only, perhaps not even synced, is not read past while it is
        being written; if power takes it and leaves its cancellation, that names an LSN which is never used again.
        """
        answer = Promise(self._threads)

        def answered() -> None:
            try:
                answer.resolve(self._cancel(lsn))
            except WalbatchError as error:
                answer.resolve(error=error)
            except BaseException as error:
                answer.resolve(
                    error=WalbatchError(f"a thread of the engine died ({error!r}): nothing is cancelled")
                )
                raise

        self._aside(answered)
        answer.wait(None)
        return bool(answer.take())

    def _cancel(self, lsn: int) -> bool:
        """`cancel`, in a thread that nobody interrupts."""
        while True:
            with self._cond:
                self._await_absorbed(lsn)
                shard, entry = self._take_out(lsn)
                if shard is not None and entry is None:
                    return False
                if shard is None and lsn in self._read_back.given_up:
                    return False
            if shard is not None and entry is not None:
                return self._cancel_queued(shard, entry)
            if lsn <= self._settled_lsn():
                return False
            found = self._find_in_log(lsn)
            if found is None:
                return False
            with self._cond:
                if found.ledger.is_pending(lsn):
                    continue  # it was read meanwhile: take it out of its queue
                if lsn <= self._flow.end_lsn and (not found.misses(lsn) or found.ledger.initial.covers(lsn)):
                    return False
                if self._read_back.is_taken_back(lsn):
                    return False  # by somebody else, meanwhile
                self._read_back.cancelling.add(lsn)
            return self._cancel_unread(lsn)

    def _await_absorbed(self, lsn: int) -> None:
        """A thread of the user's may not absorb: it waits for the timer to do so. With the lock held."""
        while not self._is_absorbed(lsn):
            self._wake()
            self._cond.wait(ABSORB_WAIT_NS)

    def _take_out(self, lsn: int) -> tuple[Shard | None, Entry | None]:
        """The shard that has an operation pending, and the operation, unless it is in flight. With the lock held."""
        for shard in self._shards:
            if shard.ledger.is_pending(lsn):
                may_apply = self._delivery.calls.may_apply(lsn)
                return shard, None if may_apply else shard.queue.cancel(lsn)
        return None, None

    def _cancel_queued(self, shard: Shard, entry: Entry) -> bool:
        try:
            self._state.cancel([entry[0]])
        except BaseException:
            with self._cond:
                shard.queue.restore(entry)
                self._wake()
            raise
        with self._cond:
            self._read_back.given_up.add(entry[0])
        self._delivery.cancelled(shard, entry[0])
        return True

    def _cancel_unread(self, lsn: int) -> bool:
        try:
            self._state.cancel([lsn])
            with self._cond:
                self._read_back.given_up.add(lsn)
        finally:
            with self._cond:
                self._read_back.cancelling.discard(lsn)
                self._wake()
        self._delivery.burial.tell_cancelled(lsn)
        return True

    def status(self, lsn: int) -> OperationStatus:
        """Where an operation is that is durable and has no dead letter. May read the log."""
        with self._cond:
            self._await_absorbed(lsn)
            known = self._status_in_memory(lsn)
            if known is None and lsn > self._flow.end_lsn:
                return OperationStatus.PENDING  # it has just become durable
        if known is not None:
            return known
        if lsn <= self._settled_lsn():
            return OperationStatus.APPLIED
        found = self._find_in_log(lsn)
        with self._cond:
            known = self._status_in_memory(lsn)  # it may have been read meanwhile
            if known is not None:
                return known
            if found is not None and found.misses(lsn) and not found.ledger.initial.covers(lsn):
                return OperationStatus.PENDING
        return OperationStatus.APPLIED

    def is_cancelled(self, lsn: int) -> bool:
        """Whether an operation that is not durable yet was taken back."""
        with self._cond:
            return lsn in self._read_back.given_up

    def _status_in_memory(self, lsn: int) -> OperationStatus | None:
        """Where an operation is, if that can be told without the log. With the lock held."""
        for shard in self._shards:
            if shard.ledger.is_pending(lsn):
                flying = any(lsn in flight.lsns for flight in shard.queue.flights.values())
                return OperationStatus.IN_FLIGHT if flying else OperationStatus.PENDING
        return OperationStatus.CANCELLED if lsn in self._read_back.given_up else None

    def _find_in_log(self, lsn: int) -> Shard | None:
        """The shard of an operation that the log holds; None where it holds none of this LSN. Reads up to a segment."""
        position, next_lsn = self._log.position_of(lsn), 0
        while True:
            with self._reading:
                frame = self._log.read_frame(position, next_lsn=next_lsn)
            if frame is None or (len(frame.lsns) and frame.lsns[0] > lsn):
                return None
            if lsn <= frame.last_lsn:
                break
            position, next_lsn = frame.next_position, frame.last_lsn + 1
        if lsn not in frame.lsns:
            return None
        row = frame.lsns.index(lsn)
        lane = self._by_name.get(frame.kinds[frame.kind_indexes[row]])
        return None if lane is None else lane.shards[shard_of(frame.keys[row], lane.setup.shards)]
