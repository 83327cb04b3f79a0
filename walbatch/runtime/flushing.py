"""Waiting until everything is settled: flushes of single lanes, and the drain at the end; and what is in the way of that.

What is not here: cutting what is flushed (`core.trigger` looks at the shard's `flush_lsn` and at `draining`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from walbatch.config import NS_PER_S
from walbatch.core.breaker import BreakerState
from walbatch.errors import BackendError, ConfigError, EngineClosed, ResultTimeout
from walbatch.ports import Clock, Condition
from walbatch.runtime.flow import Flow
from walbatch.runtime.lane import Lane, Shard


class Flushing:
    """Whoever waits for lanes to be flushed. Safe from any thread but those that deliver."""

    def __init__(
        self, *, cond: Condition, flow: Flow, clock: Clock, lanes: Mapping[str, Lane], is_taking_over: Callable[[], bool],
        wake: Callable[[], None],
    ) -> None:  # fmt: skip
        """With the lock held, `is_taking_over` says whether something durable is on its way to the shards, and `wake` wakes all."""
        # The dispatcher's: it guards the flow and the shards.
        self._cond = cond
        self._flow = flow
        self._clock = clock
        self._by_name = lanes
        self._is_taking_over = is_taking_over
        self._wake = wake

    def __repr__(self) -> str:
        return f"<Flushing of {len(self._by_name)} lanes{', draining' * self._flow.draining}>"

    def flush(self, names: Sequence[str], lsn: int, timeout_ns: int | None) -> None:
        """Wait until every operation of these lanes up to `lsn` is settled, but for delayed ones. They are cut at once.

        Where delayed ones fill a shard's memory, it does not wait for what is behind them in the log either.

        Raises ResultTimeout, ConfigError for a lane without backend, or a paused one, that has work, BackendError where all that
        is left to wait for is in shards whose backend is broken, or why the engine stopped.
        """
        deadline = None if timeout_ns is None else self._clock.monotonic_ns() + timeout_ns
        with self._cond:
            lanes = [self._by_name[name] for name in names]
            targets = {lane.index: lsn if lane.logged else lane.sequence for lane in lanes}
            while True:
                waiting = [
                    shard for lane in lanes for shard in lane.shards
                    if self._flushed_lsn(shard) < targets[lane.index] and not shard.is_clogged
                    and (lane.logged or self._flow.unlogged_inbox or len(shard.ledger))
                ]  # fmt: skip
                if not waiting:
                    return
                if self._flow.failure is not None:
                    raise self._flow.failure
                if self._flow.stopping:
                    raise EngineClosed("the engine was closed; what is not settled stays in the log")
                _check_goes_on(waiting)
                raised = [shard for shard in waiting if shard.flush_lsn < targets[shard.lane.index]]
                for shard in raised:
                    shard.flush_lsn = targets[shard.lane.index]
                if raised:  # and not whenever it is woken: two flushes would wake one another for ever
                    self._wake()
                now = self._clock.monotonic_ns()
                if deadline is not None and now >= deadline:
                    raise ResultTimeout(
                        f"not everything is settled after {(timeout_ns or 0) / NS_PER_S:g} s; it goes on in the background"
                        + self._because(waiting, now)
                    )
                self._cond.wait(None if deadline is None else deadline - now)
                while self._keeps_waiting(waiting[0], targets) and (
                    deadline is None or self._clock.monotonic_ns() < deadline
                ):
                    self._cond.wait(None if deadline is None else deadline - self._clock.monotonic_ns())

    def _keeps_waiting(self, shard: Shard, targets: Mapping[int, int]) -> bool:
        """Whether this shard alone is reason enough to go on waiting, so that nobody need look at the others.

        A flush is woken by every batch that lands: with a look at all shards each time, they would be most of what it costs.
        """
        flow = self._flow
        if flow.failure is not None or flow.stopping or shard.broken or shard.is_clogged:
            return False
        if any(lane.paused or lane.held for lane in self._by_name.values() if lane.index in targets):
            return False
        return shard.lane.logged and self._flushed_lsn(shard) < targets[shard.lane.index]

    def _flushed_lsn(self, shard: Shard) -> int:
        """Every operation up to this LSN is settled or delayed. Called with the lock held."""
        if shard.cursor is None and shard.lane.logged:
            shard.ledger.advance(self._flow.end_lsn)
        return shard.ledger.watermark(without=shard.queue.delayed_lsns)

    def obstacle(self, name: str) -> str:
        """What is in the way of a lane's operations, as the end of a sentence; empty if nothing is known to be.

        It takes no lock, since it is asked by whoever keeps a ticket, in a forked child, too: it may be a moment old.
        """
        return self._because(self._by_name[name].shards, self._clock.monotonic_ns())

    def _because(self, shards: Sequence[Shard], now_ns: int) -> str:
        found = next((text for shard in shards if (text := _obstacle(shard, now_ns))), "")
        return f". In the way: {found}" if found else ""

    def drain(self, timeout_ns: int | None) -> bool:
        """Flush everything that has a backend which works, lingers and retry waits cut short, and nothing that is delayed.

        Returns whether nothing else is left.
        """
        deadline = None if timeout_ns is None else self._clock.monotonic_ns() + timeout_ns
        with self._cond:
            self._flow.draining = True
            for lane in self._by_name.values():
                for shard in lane.shards:
                    shard.queue.hurry(self._clock.monotonic_ns())
            self._wake()
            while True:
                now = self._clock.monotonic_ns()
                lanes = self._by_name.values()
                left = any(shard.can_drain(now) for lane in lanes for shard in lane.shards)
                left = left or self._is_taking_over()
                if not left or self._flow.failure is not None or self._flow.stopping or self._flow.hurried:
                    return not left
                if deadline is not None and now >= deadline:
                    return False
                self._cond.wait(None if deadline is None else deadline - now)

    def hurry(self) -> None:
        """End a drain that is under way."""
        with self._cond:
            self._flow.hurried = True
            self._wake()


def stalled_count(shard: Shard) -> int:
    """Operations of a shard which are neither delayed nor in flight: what it does not deliver if it stands still."""
    in_flight = sum(map(len, shard.queue.flights.values()))
    return max(0, len(shard.ledger) - in_flight - len(shard.queue.delayed_lsns))


def _check_goes_on(waiting: Sequence[Shard]) -> None:
    """Raise if what is waited for will not happen before somebody acts. With the lock held."""
    for shard in waiting:
        name = shard.lane.setup.name
        if shard.lane.held and len(shard.ledger):
            raise ConfigError(f"lane {name!r} has no backend, so it cannot be flushed: open it with one")
        if shard.lane.paused and stalled_count(shard):
            raise ConfigError(f"lane {name!r} is paused: resume it first")
    if all(shard.broken and not shard.queue.flights for shard in waiting):
        raise BackendError(f"not everything can be settled: {_obstacle(waiting[0], 0)}")


def _obstacle(shard: Shard, now_ns: int) -> str:
    """Why a shard does not deliver, as far as one look tells."""
    lane, breaker = shard.lane, shard.breaker
    name = lane.setup.name
    where = f"shard {shard.index} of lane {name!r}"
    cause = f" ({lane.last_error})" if lane.last_error else ""
    if lane.held:
        return f"lane {name!r} has no backend here: open it with one"
    if lane.paused:
        return f"lane {name!r} is paused: resume it"
    if shard.broken:
        return f"{where} stands still, its work kept: the backend says {shard.broken!r}. Repair that, then resume the lane"
    match breaker.state:
        case BreakerState.OPEN:
            left_s = max(0, (breaker.reopens_at_ns or now_ns) - now_ns) / NS_PER_S
            return (
                f"the breaker of {where} is open for another {left_s:.3g} s, because the backend fails{cause}"
            )
        case BreakerState.HALF_OPEN:
            return f"the breaker of {where} is half open: the backend is being tried{cause}"
        case BreakerState.CLOSED if breaker.fruitless:
            return f"the last {breaker.fruitless:,} batches of {where} failed, and are tried again{cause}"
        case BreakerState.CLOSED:
            return ""
