"""Taking operations in: their checks, their way into a commit group, and their tickets.

What is not here: the commit group itself (`runtime.committer`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from functools import partial
from typing import Final

from walbatch import limits
from walbatch.config import NS_PER_S, Lane
from walbatch.core.commit_group import fits_frame
from walbatch.core.routing import shard_of, shards_of
from walbatch.engine.assembly import Assembly
from walbatch.errors import ConfigError, OperationCancelled, OperationDead, OperationTooLarge
from walbatch.lanes import OperationLimits, check_priority, make_options
from walbatch.runtime.promises import LOGGED
from walbatch.runtime.ticket import Promise, Ticket, kept_promise, timeout_to_ns
from walbatch.types import NO_OPTIONS, Durability, OperationStatus, Options, When

Payload = bytes | bytearray | memoryview

FROM_SETTINGS: Final = -1.0
"""As a timeout of a submit: `Settings.submit_timeout_s`."""
TIMEOUT_S_MAX: Final = 10**9


class Submission:
    """Submits to the lanes of one engine. Safe from any thread. `lanes` may change their settings meanwhile."""

    def __init__(
        self, assembly: Assembly, lanes: MutableMapping[str, Lane], status: Callable[[int], OperationStatus]
    ) -> None:
        """`status` tells where an operation is."""
        self._assembly = assembly
        self._committer = assembly.committer
        self._dispatcher = assembly.dispatcher
        self._keys = assembly.keys
        self._threads = assembly.environment.threads
        self._clock = assembly.environment.clock
        self._lanes = lanes
        self._status = status
        self._obstacle = assembly.dispatcher.flushing.obstacle
        self._index = {setup.name: index for index, setup in enumerate(assembly.setups)}
        self._ranges = {setup.name: OperationLimits.of(setup) for setup in assembly.setups}

    def __repr__(self) -> str:
        return f"<Submission to {len(self._lanes)} lanes>"

    def lane(self, kind: str) -> tuple[OperationLimits, int, Lane, int]:
        """What is needed to submit to a lane: limits, its number, its settings, its shards. Raises ConfigError, EngineClosed."""
        self._assembly.check_owner()
        lane = self._lanes.get(kind) if isinstance(kind, str) else None
        if lane is None:
            held = (
                f"; the store also holds operations of lane {kind!r}: open it with that lane"
                if isinstance(kind, str) and kind in self._index
                else ""
            )
            raise ConfigError(
                f"unknown kind {kind!r}: the lanes are {', '.join(sorted(map(repr, self._lanes)))}{held}"
            )
        return self._ranges[kind], self._index[kind], lane, lane.shards

    def options(self, kind: str, idempotency_key: Payload, not_before: When, deadline: When) -> Options:
        """What few operations have, checked."""
        if not idempotency_key and not_before is None and deadline is None:
            return NO_OPTIONS
        return make_options(
            kind, idempotency_key=idempotency_key, not_before=not_before, deadline=deadline, wall_ns=self._clock.wall_ns()
        )  # fmt: skip

    def submit(
        self, kind: str, key: Payload, payload: Payload, priority: int, timeout: float | None, options: Options, *, wait: bool,
        synced: bool = False,
    ) -> Ticket:  # fmt: skip
        """Submit one operation. `synced`: it is synced when this returns, also on a lane that syncs later."""
        limit, index, lane, shards = self.lane(kind)
        check_priority(priority)
        key = limit.key(kind, key)
        payload = limit.payload(kind, payload)
        shard = shard_of(key, shards) if shards > 1 else 0
        settled = Promise(self._threads)
        dispatcher = self._dispatcher
        timeout_ns = self._timeout(timeout)
        if lane.durability is Durability.NONE:
            if options.idempotency_key:
                raise ConfigError(f"lane {kind!r} logs nothing, so it remembers no idempotency keys")
            dispatcher.submit_unlogged(
                index, [shard], [key], [payload], priority, timeout_ns=timeout_ns, options=options,
                register=lambda sequence: dispatcher.register(index, sequence, settled),
            )  # fmt: skip
            return self._ticket(kind, None, lane.durability, None, settled, options.not_before_ns)

        def submit(register: Callable[[int, Promise], None]) -> tuple[int, Promise]:
            return self._committer.submit(
                index, (shard,), (key,), (payload,), priority, len(key) + len(payload), options=options,
                needs_sync=synced or lane.durability is Durability.SYNC, timeout_ns=timeout_ns, wait=wait, register=register,
            )  # fmt: skip

        def register(lsn: int, _: Promise) -> None:
            dispatcher.register(index, lsn, settled)

        durability = Durability(lane.durability)
        if options.idempotency_key:
            return self._submit_once(
                kind, durability, options.idempotency_key, submit, register, settled, wait=wait,
                timeout_ns=timeout_ns if wait else 0,
            )  # fmt: skip
        lsn, durable = submit(register)
        return self._ticket(kind, lsn, durability, durable, settled, options.not_before_ns)

    def submit_many(
        self, kind: str, operations: Iterable[tuple[Payload, Payload]], priority: int, timeout: float | None
    ) -> range:
        """Submit pairs as one commit group."""
        limit, index, lane, shards_count = self.lane(kind)
        check_priority(priority)
        keys: list[bytes] = []
        payloads: list[bytes] = []
        for pair in operations:
            if not isinstance(pair, tuple) or len(pair) != 2:  # noqa: PLR2004 - a pair
                what = f"a tuple of {len(pair)}" if isinstance(pair, tuple) else type(pair).__name__
                raise ConfigError(f"submit_many takes (key, payload) tuples, not {what}")
            keys.append(limit.key(kind, pair[0]))
            payloads.append(limit.payload(kind, pair[1]))
        if not keys:
            return range(0)
        size = sum(map(len, keys)) + sum(map(len, payloads))
        if not fits_frame(len(keys), size):
            raise OperationTooLarge(
                f"{len(keys):,} operations of {size:,} bytes do not fit in one commit group "
                f"({limits.FRAME_COUNT_MAX:,} operations, {limits.FRAME_RAW_BYTES_MAX:,} bytes): submit them in smaller parts"
            )
        shards = shards_of(keys, shards_count)
        timeout_ns = self._timeout(timeout)
        if lane.durability is Durability.NONE:
            self._dispatcher.submit_unlogged(
                index, shards, keys, payloads, priority, timeout_ns=timeout_ns, register=None
            )
            return range(0)
        lsn, _ = self._committer.submit(
            index, shards, keys, payloads, priority, size, needs_sync=lane.durability is Durability.SYNC, timeout_ns=timeout_ns,
            wait=True,
        )  # fmt: skip
        return range(lsn, lsn + len(keys))

    def _submit_once(
        self, kind: str, durability: Durability, key: bytes,
        submit: Callable[[Callable[[int, Promise], None]], tuple[int, Promise]],
        register: Callable[[int, Promise], None], settled: Promise, *, wait: bool, timeout_ns: int | None,
    ) -> Ticket:  # fmt: skip
        """Submit unless the idempotency key was used: then a ticket of the operation that used it."""
        clock = self._clock
        used = self._keys.reserve(kind, key, clock.wall_ns(), timeout_ns=timeout_ns)
        if used is None:

            def register_both(lsn: int, durable: Promise) -> None:
                register(lsn, durable)
                self._keys.use(kind, key, lsn, clock.wall_ns(), durable=durable, settled=settled)

            try:
                lsn, durable = submit(register_both)
            finally:
                self._keys.release(kind, key)
            return self._ticket(kind, lsn, durability, durable, settled)
        if wait and used.durable is not None:
            used.durable.wait(None)
            used.durable.take()
        first = used.settled or self._settled_promise(used.lsn)
        durable = used.durable or kept_promise(self._threads)
        return self._ticket(kind, used.lsn, durability, durable, first)

    def _settled_promise(self, lsn: int) -> Promise:
        """A promise for an operation that was submitted before, by somebody else or an earlier process."""
        mine = Promise(self._threads)
        promise = self._dispatcher.promises.register_or_get(LOGGED, lsn, mine)
        if promise is not mine:
            return promise
        # Registered first, and asked then: whoever settles it in between resolves it.
        match self._status(lsn):
            case OperationStatus.APPLIED:
                promise.resolve(None)
            case OperationStatus.DEAD:
                promise.resolve(error=OperationDead(lsn, "earlier", "see its dead letter"))
            case OperationStatus.CANCELLED:
                promise.resolve(error=OperationCancelled(lsn))
            case _:
                pass
        return promise

    def _ticket(
        self, kind: str, lsn: int | None, durability: Durability, durable: Promise | None, settled: Promise,
        not_before_ns: int = 0,
    ) -> Ticket:  # fmt: skip
        obstacle = self._obstacle if not not_before_ns else partial(self._why_waiting, not_before_ns)
        return Ticket(lane=kind, lsn=lsn, durability=durability, durable=durable, settled=settled, obstacle=obstacle)  # fmt: skip

    def _why_waiting(self, not_before_ns: int, kind: str) -> str:
        """What is in the way of a delayed operation."""
        left_ns = not_before_ns - self._clock.wall_ns()
        if left_ns > 0:
            return f". In the way: it is delayed for another {left_ns / NS_PER_S:.3g} s (not_before)"
        return self._obstacle(kind)

    def _timeout(self, timeout: float | None) -> int | None:
        """A timeout in ns; FROM_SETTINGS: the one of the settings. Raises ConfigError."""
        if timeout == FROM_SETTINGS:
            return timeout_to_ns(self._assembly.settings.submit_timeout_s)
        number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
        if timeout is not None and not (number and 0 <= timeout <= TIMEOUT_S_MAX):
            raise ConfigError(
                f"timeout is {timeout!r}, but must be seconds from 0 to {TIMEOUT_S_MAX:,}, or None: for ever"
            )
        return timeout_to_ns(timeout)
