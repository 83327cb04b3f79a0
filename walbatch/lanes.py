"""Lanes, from what was asked for, what the store remembers, what the log holds and what the backends have applied.

What is not here: the queues of a lane (`runtime.dispatcher`). Everything here runs while a store is being opened, or checks
one argument of a submit.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from walbatch import limits
from walbatch.backends.function import FunctionBackend, as_backend
from walbatch.backends.urls import url_of
from walbatch.config import Lane, Settings
from walbatch.core.columns import decode_body
from walbatch.core.frame import FrameError, FrameHeader, FrameType, SegmentHeader
from walbatch.core.idempotency import OWN_PREFIX
from walbatch.errors import ConfigError, CorruptionError, OperationTooLarge
from walbatch.ports import Backend, FileSystem
from walbatch.runtime.lane import LaneSetup
from walbatch.storage.dropped import marks_for, noted_lanes
from walbatch.storage.store import OpenStore, storage_errors
from walbatch.storage.survey import survey
from walbatch.types import PRIORITY_MAX, Durability, LaneMemory, Mark, Options, When

_logger = logging.getLogger("walbatch")

WALL_S_MIN: Final = 946_684_800
"""The year 2000 in seconds since 1970: an earlier time was meant as seconds from now."""


@dataclass(frozen=True, slots=True)
class OperationLimits:
    """What a lane's operations may look like: the engine's limits, narrowed by its backend's."""

    key_bytes_min: int
    key_bytes_max: int
    payload_bytes_max: int

    @classmethod
    def of(cls, setup: LaneSetup) -> OperationLimits:
        """The limits of a lane."""
        backend = setup.backend
        return cls(
            getattr(backend, "key_bytes_min", 0),
            min(limits.KEY_BYTES_MAX, getattr(backend, "key_bytes_max", limits.KEY_BYTES_MAX)),
            min(limits.PAYLOAD_BYTES_MAX, getattr(backend, "payload_bytes_max", limits.PAYLOAD_BYTES_MAX)),
        )

    def key(self, kind: str, key: object) -> bytes:
        """The key as bytes of its own, checked."""
        if type(key) is not bytes:
            key = _to_bytes(kind, "key", key)
        if not self.key_bytes_min <= len(key) <= self.key_bytes_max:
            raise OperationTooLarge(
                f"lane {kind!r}: the key has {len(key):,} bytes, but must have {self.key_bytes_min:,} to {self.key_bytes_max:,}"
            )
        return key

    def payload(self, kind: str, payload: object) -> bytes:
        """The payload as bytes of its own, checked."""
        if type(payload) is not bytes:
            payload = _to_bytes(kind, "payload", payload)
        if len(payload) > self.payload_bytes_max:
            raise OperationTooLarge(
                f"lane {kind!r}: the payload has {len(payload):,} bytes, but at most {self.payload_bytes_max:,} are allowed; "
                "store it elsewhere and submit its name"
            )
        return payload


def _to_bytes(kind: str, name: str, value: object) -> bytes:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    hint = ": encode it first, for example with .encode()" if isinstance(value, str) else ""
    raise ConfigError(f"lane {kind!r}: {name} must be bytes, not {type(value).__name__}{hint}")


def check_priority(priority: int) -> None:
    """Raise ConfigError unless it is a priority."""
    if type(priority) is not int or not 0 <= priority <= PRIORITY_MAX:
        raise ConfigError(f"priority must be an int from 0 to {PRIORITY_MAX}, not {priority!r}")


def make_options(
    kind: str, *, idempotency_key: object, not_before: When, deadline: When, wall_ns: int
) -> Options:
    """The options of an operation, checked. Raises ConfigError; a deadline must lie ahead."""
    key = _to_bytes(kind, "idempotency_key", idempotency_key)
    if len(key) > limits.IDEMPOTENCY_KEY_BYTES_MAX or key.startswith(OWN_PREFIX):
        raise ConfigError(
            f"lane {kind!r}: the idempotency key {key[:16]!r} must have at most {limits.IDEMPOTENCY_KEY_BYTES_MAX} bytes, and must "
            "not begin with a zero byte"
        )
    options = Options(
        not_before_ns=_wall_ns(kind, "not_before", not_before), deadline_ns=_wall_ns(kind, "deadline", deadline),
        idempotency_key=key,
    )  # fmt: skip
    if options.deadline_ns and options.deadline_ns <= max(wall_ns, options.not_before_ns):
        what = (
            f"the operation must not be delivered before that (not_before is {not_before})"
            if options.deadline_ns > wall_ns
            else "it has passed"
        )
        raise ConfigError(
            f"lane {kind!r}: the deadline {deadline} cannot be kept: {what}. Nothing was accepted"
        )
    return options


def _wall_ns(kind: str, name: str, when: object) -> int:
    if when is None:
        return 0
    if isinstance(when, datetime):
        if when.tzinfo is None:
            raise ConfigError(f"lane {kind!r}: {name} is a datetime without a time zone: give it one")
        when = when.timestamp()
    number = when if isinstance(when, (int, float)) and not isinstance(when, bool) else math.nan
    if not WALL_S_MIN <= number < limits.WALL_S_MAX:
        hint = ""
        if 0 < number < WALL_S_MIN:
            hint = f". Seconds since 1970: time.time() + {when}"
        elif WALL_S_MIN * 1_000 <= number < limits.WALL_S_MAX * 1_000:
            hint = ". Is it in milliseconds?"
        raise ConfigError(
            f"lane {kind!r}: {name} must be seconds since 1970 or a datetime, not {when!r}{hint}"
        )
    return int(number * 1_000_000_000)


def check_settings(lanes: Mapping[str, Lane], settings: Settings) -> None:
    """Raise ConfigError with every problem of what `Engine.open` was given."""
    problems: list[str] = []
    if not isinstance(settings, Settings):
        problems.append(f"settings must be a Settings, not {type(settings).__name__}: write Settings(...)")
    if not isinstance(lanes, Mapping):
        problems.append(f"lanes must be a mapping of kind to Lane, not {type(lanes).__name__}")
    if problems:
        raise ConfigError(*problems)
    if not 0 < len(lanes) <= limits.KINDS_MAX:
        problems.append(f"{len(lanes)} lanes given, but a store has 1 to {limits.KINDS_MAX}")
    for name, lane in lanes.items():
        if (
            not isinstance(name, str)
            or not 0 < len(name.encode("utf-8", "replace")) <= limits.KIND_BYTES_MAX
            or not name.isprintable()
        ):
            problems.append(
                f"lane name {name!r} must be printable text of 1 to {limits.KIND_BYTES_MAX} bytes"
            )
        if not isinstance(lane, Lane):
            problems.append(
                f"lane {name!r} must be a Lane, not {type(lane).__name__}; write Lane({type(lane).__name__}(...))"
            )
        elif lane.trigger.bytes > settings.memory_bytes_max:
            problems.append(
                f"lane {name!r}: Trigger.bytes is {lane.trigger.bytes:,}, more than Settings.memory_bytes_max with "
                f"{settings.memory_bytes_max:,}: no batch could become so large"
            )
    if problems:
        raise ConfigError(*problems)


def check_remembered(
    lanes: Mapping[str, Lane],
    remembered: Mapping[str, LaneMemory],
    kinds: Collection[str],
    noted: Mapping[str, LaneMemory],
) -> None:
    """Raise ConfigError where a lane is not what it was.

    Shards are stable for ever: a key must stay in the shard where its earlier operations went. A lane that was logged may have
    operations in the log, which a lane with durability "none" would never read. `kinds` are those that the log is known to
    hold. `noted` are lanes as they were when operations of them were dropped: what state/ has lost, the log still knows.
    """
    problems = [
        f"lane {name!r} was made with {shards} shards and is opened with {lane.shards}: the number cannot change, because order "
        f"and marks are kept for each. Open it with {shards}, or deliver what is pending and use a new lane name"
        for name, lane in lanes.items()
        for shards in sorted({known[name].shards for known in (remembered, noted) if name in known})
        if shards != lane.shards
    ]
    problems += [
        f"lane {name!r} was logged before and is opened with durability 'none', which would leave its operations in the log "
        "undelivered: use a new lane name"
        for name, lane in lanes.items()
        if (name in remembered or name in kinds or name in noted) and lane.durability is Durability.NONE
    ]
    count = len({*lanes, *remembered})
    if count > limits.KINDS_MAX:
        problems.append(f"the store would have {count} lanes, but at most {limits.KINDS_MAX} are allowed")
    if problems:
        raise ConfigError(*problems)


def lane_memory(name: str, lane: Lane, before: LaneMemory | None) -> LaneMemory:
    """What to remember of a lane. A lane that is opened without a backend keeps the URL it had."""
    url = url_of(lane.backend) if lane.backend is not None else before.url if before else None
    return LaneMemory(name=name, shards=lane.shards, url=url)


def set_up(
    store: OpenStore,
    lanes: Mapping[str, Lane],
    remembered: Mapping[str, LaneMemory],
    kinds: Iterable[str],
    opened: list[Backend],
    snapshots: Mapping[tuple[str, int], bytes],
) -> list[LaneSetup]:
    """Open the backends (collected in `opened`), ask what they hold, describe every lane."""
    checkpoint = store.facts.checkpoint
    setups = []
    noted = noted_lanes(store.facts.dropped)
    unnamed = {kind: Lane(shards=noted[kind].shards if kind in noted else 1) for kind in sorted(kinds)}
    held = {name: Lane(shards=memory.shards) for name, memory in remembered.items()}
    for name, lane in {**unnamed, **held, **lanes}.items():
        backend = None
        if lane.backend is not None:
            backend = as_backend(lane.backend)
            limiter, opener = getattr(backend, "limit_time", None), getattr(backend, "open", None)
            if callable(limiter):
                limiter(lane.timeout_s)
            if callable(opener):
                opener(name, lane.shards, store.uuid)
            opened.append(backend)
        known = checkpoint.lanes.get(name) if checkpoint else None
        watermark = checkpoint.watermark if checkpoint else 0
        counted = (
            known.shards
            if known and len(known.shards) == lane.shards
            else (Mark(watermark=watermark),) * lane.shards
        )
        transactional = callable(getattr(backend, "applied_mark", None))
        logged = lane.durability is not Durability.NONE
        initial = counted
        if transactional and logged:
            marks = [backend.applied_mark(shard) for shard in range(lane.shards)]  # type: ignore[union-attr]
            _check_marks(store, name, marks)
            initial = tuple(mark.union(held) for mark, held in zip(counted, marks, strict=True))
        dropped = store.facts.dropped.lanes.get(name) if store.facts.dropped else None
        if dropped is not None and (passed_over := marks_for(dropped, lane.shards)):
            # Newer operations of a key may be gone from the log, so what is left of it must not be delivered again.
            initial = tuple(mark.union(other) for mark, other in zip(initial, passed_over, strict=True))
        setups.append(
            LaneSetup(
                name=name, backend=backend, transactional=transactional,
                interruptible=getattr(backend, "interruptible", False) is True, settings=lane, counted=tuple(counted),
                initial=tuple(initial) if logged else (Mark(),) * lane.shards,
                snapshots=tuple(snapshots.get((name, shard)) for shard in range(lane.shards)),
            )
        )  # fmt: skip
    return setups


def _check_marks(store: OpenStore, lane: str, marks: Sequence[Mark]) -> None:
    """A backend's mark never names what the log has not held durably, nor a later incarnation: the log would be an old copy.

    Going on would hand out LSNs that the backend takes for applied, and leave their operations out.
    """
    last_lsn = max((segment.last_lsn for segment in store.facts.segments), default=0)
    named = max((mark.ranges[-1][1] if mark.ranges else mark.watermark for mark in marks), default=0)
    epoch = max((mark.epoch for mark in marks), default=0)
    if named > last_lsn or epoch >= store.plan.epoch:
        raise CorruptionError(
            f"the backend of lane {lane!r} has applied operations up to LSN {named} (incarnation {epoch}), but the log of "
            f"{store.layout.root} ends at {last_lsn} (incarnation {store.plan.epoch - 1}): the store lost its end, or is an older "
            "copy. Nothing was changed; restore the newest store, or give the lane a new backend",
            path=store.layout.wal, first_lsn=last_lsn + 1, last_lsn=named, expected="a log that reaches the backend's mark",
        )  # fmt: skip


def kinds_in_log(fs: FileSystem, store: OpenStore) -> frozenset[str]:
    """Every kind that the log holds an operation of. Needed only when state/ is lost: it reads the whole log.

    Raises StorageError.
    """
    kinds: set[str] = set()

    def visit(_number: int, _header: SegmentHeader) -> Callable[[int, FrameHeader, bytes], None]:
        def see(_offset: int, frame: FrameHeader, padded: bytes) -> None:
            if frame.type is FrameType.OPERATIONS:
                with contextlib.suppress(FrameError):
                    kinds.update(decode_body(frame, padded).kinds)

        return see

    facts = store.facts
    with storage_errors(store.layout.root):
        survey(
            fs,
            store.layout,
            identity=facts.identity,
            store=facts.store,
            checkpoint=None,
            full=True,
            visit=visit,
        )
    return frozenset(kinds)


def trimmed_count(store: OpenStore) -> int:
    """Operations that were settled (or given up) before those the plan calls pending: where to count from without state/."""
    plan = store.plan
    return plan.operations_before + sum(frame.header.count for frame in plan.copied) - plan.pending


def close_backends(backends: Iterable[Backend]) -> None:
    """Close every backend; one that fails, whatever it raises, must not keep the others open."""
    for backend in backends:
        closer = getattr(backend, "close", None)
        if callable(closer):
            try:
                closer()
            except BaseException:
                _logger.exception("closing %r failed; it counts as closed", backend)


def await_end(backends: Iterable[Backend]) -> None:
    """Wait until nothing runs that closed backends have left on their event loops, however long that takes."""
    for backend in backends:
        if isinstance(backend, FunctionBackend):
            backend.has_ended(None)
