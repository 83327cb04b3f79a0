"""Taking operations in: their checks, their way into a commit group, and their tickets.

What is not here: the commit group itself (`runtime.committer`).

The idea needed to read it: many operations are checked by column, in a few passes that run no Python code for each of them. Only
where a pass finds something are they looked at one by one, for the same words as a single one would get.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Any, Final

from walbatch import limits
from walbatch.config import NS_PER_S, Lane
from walbatch.core.commit_group import fits_frame
from walbatch.core.routing import shard_of, shards_of
from walbatch.engine.assembly import Assembly
from walbatch.errors import ConfigError, OperationCancelled, OperationDead, OperationTooLarge
from walbatch.lanes import OperationLimits, check_priority, make_options
from walbatch.runtime.promises import LOGGED
from walbatch.runtime.ticket import APPLIED, Fate, Issuer, Ticket, kept_promise, timeout_to_ns
from walbatch.types import NO_OPTIONS, Durability, OperationStatus, Options, When

Payload = bytes | bytearray | memoryview

FROM_SETTINGS: Final = -1.0
"""As a timeout of a submit: `Settings.submit_timeout_s`."""
TIMEOUT_S_MAX: Final = 10**9
_SECOND: Final = itemgetter(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Intake:
    """What is needed to submit to a lane. None of it changes while the store is open."""

    name: str
    index: int
    limits: OperationLimits
    shards: int
    durability: Durability
    issuer: Issuer

    @property
    def needs_sync(self) -> bool:
        """Whether an operation is synced before it counts as durable."""
        return self.durability is Durability.SYNC


class Submission:
    """Submits to the lanes of one engine. Safe from any thread. `lanes` may change their settings meanwhile."""

    def __init__(
        self, assembly: Assembly, lanes: MutableMapping[str, Lane], status: Callable[[int], OperationStatus]
    ) -> None:
        """`status` tells where an operation is."""
        self._assembly = assembly
        self._lock = assembly.store.lock
        self.committer = assembly.committer
        self._dispatcher = assembly.dispatcher
        self._keys = assembly.keys
        self._threads = assembly.environment.threads
        self._clock = assembly.environment.clock
        self._lanes = lanes
        self._status = status
        self._obstacle = obstacle = assembly.dispatcher.flushing.obstacle
        self._timeout_ns = timeout_to_ns(assembly.settings.submit_timeout_s)
        self._index = {setup.name: index for index, setup in enumerate(assembly.setups)}
        self.intakes = {
            setup.name: Intake(
                name=setup.name, index=index, limits=OperationLimits.of(setup), shards=lanes[setup.name].shards,
                durability=(durability := Durability(lanes[setup.name].durability)),
                issuer=Issuer(setup.name, durability, obstacle),
            )
            for index, setup in enumerate(assembly.setups) if setup.name in lanes
        }  # fmt: skip

    def __repr__(self) -> str:
        return f"<Submission to {len(self._lanes)} lanes>"

    def lane(self, kind: str) -> Intake:
        """What is needed to submit to a lane. Raises ConfigError, EngineClosed."""
        if not self._lock.held:
            self._assembly.check_owner()
        intake = self.intakes.get(kind) if isinstance(kind, str) else None
        if intake is None:
            held = (
                f"; the store also holds operations of lane {kind!r}: open it with that lane"
                if isinstance(kind, str) and kind in self._index
                else ""
            )
            raise ConfigError(
                f"unknown kind {kind!r}: the lanes are {', '.join(sorted(map(repr, self._lanes)))}{held}"
            )
        return intake

    def checked(self, kind: str, key: Payload, payload: Payload, priority: int) -> tuple[bytes, bytes]:
        """Key and payload as bytes of their own. Raises what is wrong with an operation."""
        limit = self.lane(kind).limits
        check_priority(priority)
        return limit.key(kind, key), limit.payload(kind, payload)

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
        intake = self.lane(kind)
        check_priority(priority)
        limit, shards = intake.limits, intake.shards
        key = limit.key(kind, key)
        payload = limit.payload(kind, payload)
        shard = shard_of(key, shards) if shards > 1 else 0
        timeout_ns = self.timeout_ns(timeout)
        if intake.durability is Durability.NONE:
            return self._submit_unlogged(intake, shard, key, payload, priority, timeout_ns, options)

        needs_sync = synced or intake.durability is Durability.SYNC
        if options.idempotency_key:
            submit = partial(
                self.committer.submit, intake.index, shard, (key,), (payload,), priority, len(key) + len(payload), options=options,
                needs_sync=needs_sync, timeout_ns=timeout_ns, wait=wait,
            )  # fmt: skip
            waits_ns = timeout_ns if wait else 0
            return self._submit_once(intake, options.idempotency_key, submit, wait=wait, timeout_ns=waits_ns)
        lsn, fate = self.committer.submit(
            intake.index, shard, (key,), (payload,), priority, len(key) + len(payload), options=options,
            needs_sync=needs_sync, timeout_ns=timeout_ns, wait=wait,
        )  # fmt: skip
        return Ticket(self._issuer(intake, options), lsn, fate, lsn)

    def _submit_unlogged(
        self, intake: Intake, shard: int, key: bytes, payload: bytes, priority: int, timeout_ns: int | None, options: Options
    ) -> Ticket:  # fmt: skip
        """Submit one operation to a lane that logs nothing."""
        if options.idempotency_key:
            raise ConfigError(f"lane {intake.name!r} logs nothing, so it remembers no idempotency keys")
        fates: list[Fate] = []

        def register(sequence: int) -> None:
            fates.append(Fate(self._threads, sequence, sequence, None))
            self._dispatcher.promises.add(intake.index, fates[0])

        self._dispatcher.submit_unlogged(
            intake.index, [shard], [key], [payload], priority, timeout_ns=timeout_ns, options=options, register=register
        )  # fmt: skip
        return Ticket(self._issuer(intake, options), None, fates[0], fates[0].first)

    def submit_many(
        self, kind: str, operations: Iterable[tuple[Payload, Payload]], priority: int, timeout: float | None
    ) -> range:
        """Submit pairs as one commit group."""
        intake = self.lane(kind)
        check_priority(priority)
        pairs = list(operations)  # ours: what others do to theirs meanwhile mixes no two of them
        keys, payloads, size = _columns(intake, pairs)
        count = len(keys)
        if not count:
            return range(0)
        if not fits_frame(count, size):
            raise OperationTooLarge(
                f"{count:,} operations of {size:,} bytes do not fit in one commit group "
                f"({limits.FRAME_COUNT_MAX:,} operations, {limits.FRAME_RAW_BYTES_MAX:,} bytes): submit them in smaller parts"
            )
        timeout_ns = self.timeout_ns(timeout)
        if intake.durability is Durability.NONE:
            self._dispatcher.submit_unlogged(
                intake.index, shards_of(keys, intake.shards), keys, payloads, priority, timeout_ns=timeout_ns, register=None
            )  # fmt: skip
            return range(0)
        lsn, _ = self.committer.submit(
            intake.index, shards_of(keys, intake.shards) if intake.shards > 1 else 0, keys, payloads, priority, size,
            needs_sync=intake.durability is Durability.SYNC, timeout_ns=timeout_ns, wait=True,
        )  # fmt: skip
        return range(lsn, lsn + count)

    def _submit_once(
        self, intake: Intake, key: bytes, submit: Callable[..., tuple[int, Fate]], *, wait: bool, timeout_ns: int | None
    ) -> Ticket:  # fmt: skip
        """Submit unless the idempotency key was used: then a ticket of the operation that used it."""
        clock, kind = self._clock, intake.name
        used = self._keys.reserve(kind, key, clock.wall_ns(), timeout_ns=timeout_ns)
        if used is None:

            def register(lsn: int, fate: Fate) -> None:
                self._keys.use(kind, key, lsn, clock.wall_ns(), fate)

            try:
                lsn, fate = submit(register=register)
            finally:
                self._keys.release(kind, key)
            return Ticket(intake.issuer, lsn, fate, lsn)
        earlier = used.fate or self._earlier(used.lsn)
        durable = earlier.durable
        if wait and durable is not None:
            durable.wait(None)
            durable.take()
        return Ticket(intake.issuer, used.lsn, earlier, used.lsn)

    def _earlier(self, lsn: int) -> Fate:
        """The fate of an operation that was submitted before, by somebody else or an earlier process, and is durable."""
        mine = Fate(self._threads, lsn, lsn, kept_promise(self._threads))
        fate = self._dispatcher.promises.find_or_add(LOGGED, mine)
        if fate is not mine:
            return fate
        # Registered first, and asked then: whoever settles it in between tells it.
        match self._status(lsn):
            case OperationStatus.APPLIED:
                fate.settle(lsn, APPLIED)
            case OperationStatus.DEAD:
                fate.settle(lsn, (None, OperationDead(lsn, "earlier", "see its dead letter")))
            case OperationStatus.CANCELLED:
                fate.settle(lsn, (None, OperationCancelled(lsn)))
            case _:
                pass
        return fate

    def _issuer(self, intake: Intake, options: Options) -> Issuer:
        """What a ticket has in common with the others of its lane: all but the delay that may be in its way."""
        if not options.not_before_ns:
            return intake.issuer
        return replace(intake.issuer, obstacle=partial(self._why_waiting, options.not_before_ns))

    def _why_waiting(self, not_before_ns: int, kind: str) -> str:
        """What is in the way of a delayed operation."""
        left_ns = not_before_ns - self._clock.wall_ns()
        if left_ns > 0:
            return f". In the way: it is delayed for another {left_ns / NS_PER_S:.3g} s (not_before)"
        return self._obstacle(kind)

    def timeout_ns(self, timeout: float | None) -> int | None:
        """A timeout in ns; FROM_SETTINGS: the one of the settings. Raises ConfigError."""
        if timeout == FROM_SETTINGS:
            return self._timeout_ns
        number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
        if timeout is not None and not (number and 0 <= timeout <= TIMEOUT_S_MAX):
            raise ConfigError(
                f"timeout is {timeout!r}, but must be seconds from 0 to {TIMEOUT_S_MAX:,}, or None: for ever"
            )
        return timeout_to_ns(timeout)


def _columns(intake: Intake, pairs: Sequence[Any]) -> tuple[Sequence[bytes], Sequence[bytes], int]:
    """The keys and the payloads of pairs, checked, and their bytes in all. Raises ConfigError, OperationTooLarge."""
    count = len(pairs)
    limit = intake.limits
    if list(map(type, pairs)).count(tuple) == count:
        try:
            keys = [key for key, _ in pairs]
        except ValueError:  # not all of them are pairs
            return _columns_one_by_one(intake, pairs)
        payloads = list(map(_SECOND, pairs))
        if list(map(type, keys)).count(bytes) == list(map(type, payloads)).count(bytes) == count:
            sizes = list(map(len, keys))
            key_bytes, payload_bytes = sum(sizes), sum(map(len, payloads))
            if (
                (key_bytes <= limit.key_bytes_max or max(sizes) <= limit.key_bytes_max)
                and (not limit.key_bytes_min or min(sizes, default=0) >= limit.key_bytes_min)
                and (payload_bytes <= limit.payload_bytes_max or max(map(len, payloads)) <= limit.payload_bytes_max)
            ):  # fmt: skip
                return keys, payloads, key_bytes + payload_bytes
    return _columns_one_by_one(intake, pairs)


def _columns_one_by_one(intake: Intake, pairs: Sequence[Any]) -> tuple[list[bytes], list[bytes], int]:
    """As `_columns`, for pairs of which some are to be copied, or refused with the words that fit."""
    keys: list[bytes] = []
    payloads: list[bytes] = []
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2:  # noqa: PLR2004 - a pair
            what = f"a tuple of {len(pair)}" if isinstance(pair, tuple) else type(pair).__name__
            raise ConfigError(f"submit_many takes (key, payload) tuples, not {what}")
        keys.append(intake.limits.key(intake.name, pair[0]))
        payloads.append(intake.limits.payload(intake.name, pair[1]))
    return keys, payloads, sum(map(len, keys)) + sum(map(len, payloads))
