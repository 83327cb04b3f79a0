"""Settings: what a user may choose, as validated values.

They reach components as arguments; nothing reads the environment.

Every class checks itself when made and reports all problems at once (`ConfigError.problems`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from walbatch import limits
from walbatch.errors import ConfigError
from walbatch.types import Durability, Order

NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000


def _check(problems: list[str], name: str, value: object, low: float, high: float, unit: str = "") -> None:
    """Append a problem unless `value` is a number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        problems.append(f"{name} must be a number, not {type(value).__name__}")
    elif not low <= value <= high:
        problems.append(f"{name} is {value}{unit}, but must be from {low:g} to {high:g}{unit}")


def _check_int(problems: list[str], name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        problems.append(f"{name} must be an int, not {type(value).__name__}")
    elif not low <= value <= high:
        problems.append(f"{name} is {value:,}, but must be from {low:,} to {high:,}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trigger:
    """When a shard cuts a batch: at `count` operations, at `bytes`, or when the oldest has waited `linger_ms`.

    Whichever comes first. Count and bytes also bound the batch (one larger operation still goes, alone).
    """

    count: int = 1_000
    bytes: int = limits.MIB
    linger_ms: float = 50.0

    def __post_init__(self) -> None:
        problems: list[str] = []
        _check_int(problems, "Trigger.count", self.count, 1, limits.BATCH_COUNT_MAX)
        _check_int(problems, "Trigger.bytes", self.bytes, 1, limits.BATCH_BYTES_MAX)
        _check(problems, "Trigger.linger_ms", self.linger_ms, 0, 3_600_000, " ms")
        if problems:
            raise ConfigError(*problems)

    @property
    def linger_ns(self) -> int:
        """The linger in nanoseconds."""
        return int(self.linger_ms * NS_PER_MS)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How long a failed batch waits: full jitter, uniform in [0, min(ceiling, base x 2^n)] seconds after n failures.

    There is no last attempt: an operation is tried until it is applied. Source of the formula: M. Brooker,
    "Exponential Backoff and Jitter", AWS Architecture Blog, 2015.
    """

    base_s: float = 0.1
    ceiling_s: float = 30.0

    def __post_init__(self) -> None:
        problems: list[str] = []
        _check(problems, "RetryPolicy.base_s", self.base_s, 0.0001, 3600, " s")
        _check(problems, "RetryPolicy.ceiling_s", self.ceiling_s, 0.0001, 3600, " s")
        if problems:
            raise ConfigError(*problems)


@dataclass(frozen=True, slots=True)
class Lane:
    """The queue of one kind of operation: its backend and how batches reach it.

    `backend` is a Backend or a function of a batch (sync or async); None holds operations in the log, undelivered.
    `shards` is fixed for the life of the store. `interval_ms` is how long a lane with durability "interval" may leave
    an acknowledged operation unsynced.
    """

    backend: Any = None
    shards: int = field(default=1, kw_only=True)
    trigger: Trigger = field(default_factory=Trigger, kw_only=True)
    order: str | Order = field(default=Order.KEY, kw_only=True)
    durability: str | Durability = field(default=Durability.SYNC, kw_only=True)
    interval_ms: float = field(default=100.0, kw_only=True)
    retry: RetryPolicy = field(default_factory=RetryPolicy, kw_only=True)

    def __post_init__(self) -> None:
        problems: list[str] = []
        _check_int(problems, "Lane.shards", self.shards, 1, limits.SHARDS_MAX)
        _check(problems, "Lane.interval_ms", self.interval_ms, 1, 60_000, " ms")
        for name, kind in (("order", Order), ("durability", Durability)):
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, kind(value))
            except ValueError:
                choices = ", ".join(repr(str(choice)) for choice in kind)
                problems.append(f"Lane.{name} is {value!r}, but must be one of {choices}")
        if not isinstance(self.trigger, Trigger):
            problems.append(f"Lane.trigger must be a Trigger, not {type(self.trigger).__name__}")
        if not isinstance(self.retry, RetryPolicy):
            problems.append(f"Lane.retry must be a RetryPolicy, not {type(self.retry).__name__}")
        backend: object = self.backend
        if backend is not None and not callable(backend) and not callable(getattr(backend, "apply", None)):
            problems.append(
                f"Lane.backend must be a Backend (an object with apply(batch)) or a function, not {type(backend).__name__}"
            )
        if isinstance(backend, type):
            problems.append(f"Lane.backend is the class {backend.__name__}; make an object of it")
        if problems:
            raise ConfigError(*problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of a store's engine. Times end in their unit, sizes are bytes.

    - `timer_ms`: how often the timer task looks at every shard (it also wakes when a trigger is met).
    - `in_flight_max`: batches handed to backends at the same time, over all lanes.
    - `memory_bytes_max`: queued operations in memory, over all lanes; what exceeds it is read back from the log.
    - `queue_bytes_max`: operations that wait for their commit. At this bound submit blocks or is refused.
    - `disk_bytes_max`: bytes of all segments. At this bound submit blocks or is refused until some are trimmed.
    - `segment_bytes`: size at which the log rolls to a new segment.
    - `compress_bytes_min`: frames of at least this many bytes are compressed with zstd where it pays; None: never.
    - `compress_level`: zstd level.
    - `checkpoint_ms`: how often settled operations are checkpointed and the log is trimmed.
    - `idle_stamp_ms`: quiet time after which the log proves its end with an idle stamp.
    - `submit_timeout_s`: how long a submit waits at a bound, unless the call says otherwise; None: for ever.
    - `disk_full_wait_s`: how long a commit waits for room on a full disk before the engine stops.
    """

    timer_ms: float = 50.0
    in_flight_max: int = 8
    memory_bytes_max: int = 64 * limits.MIB
    queue_bytes_max: int = 64 * limits.MIB
    disk_bytes_max: int = 64 * limits.GIB
    segment_bytes: int = 64 * limits.MIB
    compress_bytes_min: int | None = limits.KIB
    compress_level: int = 1
    checkpoint_ms: float = 200.0
    idle_stamp_ms: float = 500.0
    submit_timeout_s: float | None = 30.0
    disk_full_wait_s: float = 5.0

    def __post_init__(self) -> None:
        problems: list[str] = []
        _check(problems, "timer_ms", self.timer_ms, 1, 60_000, " ms")
        _check_int(problems, "in_flight_max", self.in_flight_max, 1, limits.IN_FLIGHT_MAX)
        _check_int(problems, "memory_bytes_max", self.memory_bytes_max, limits.MIB, 2**50)
        _check_int(problems, "queue_bytes_max", self.queue_bytes_max, limits.MIB, 2**50)
        _check_int(
            problems, "segment_bytes", self.segment_bytes, limits.SEGMENT_BYTES_MIN, limits.SEGMENT_BYTES_MAX
        )
        _check_int(problems, "disk_bytes_max", self.disk_bytes_max, limits.SEGMENT_BYTES_MIN, 2**60)
        if self.compress_bytes_min is not None:
            _check_int(problems, "compress_bytes_min", self.compress_bytes_min, 1, limits.FRAME_RAW_BYTES_MAX)
        _check_int(problems, "compress_level", self.compress_level, 1, 19)
        _check(problems, "checkpoint_ms", self.checkpoint_ms, 1, 3_600_000, " ms")
        _check(problems, "idle_stamp_ms", self.idle_stamp_ms, 1, 3_600_000, " ms")
        if self.submit_timeout_s is not None:
            _check(problems, "submit_timeout_s", self.submit_timeout_s, 0, 10**9, " s")
        _check(problems, "disk_full_wait_s", self.disk_full_wait_s, 0, 3600, " s")
        if not problems and self.disk_bytes_max < 4 * self.segment_bytes:
            problems.append(
                f"disk_bytes_max is {self.disk_bytes_max:,}, but must be at least four segments of {self.segment_bytes:,} bytes"
            )
        if problems:
            raise ConfigError(*problems)
