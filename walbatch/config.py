"""Settings: what a user may choose, as validated values.

They reach components as arguments; nothing reads the environment.

Every class checks itself when made and reports all problems at once (`ConfigError.problems`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from walbatch import limits
from walbatch.errors import ConfigError
from walbatch.types import Durability, FailureOrder, Order, Overdue, Strategy, TriggerMode

NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000
INTERVAL_MS: Final = 100.0
"""How long a lane with durability "interval" leaves an acknowledged operation unsynced, unless it says otherwise."""


def _check(problems: list[str], name: str, value: object, low: float, high: float, unit: str = "") -> None:
    """Append a problem unless `value` is a number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        problems.append(f"{name} must be a number, not {type(value).__name__}")
    elif not low <= value <= high:
        problems.append(f"{name} is {value}{unit}, but must be from {low:g} to {high:g}{unit}")


def _check_choice(problems: list[str], owner: object, prefix: str, name: str, kind: type[StrEnum]) -> None:
    """Turn a choice into its enum, or append a problem."""
    value = getattr(owner, name)
    try:
        object.__setattr__(owner, name, kind(value))
    except ValueError:
        choices = ", ".join(repr(str(choice)) for choice in kind)
        problems.append(f"{prefix}.{name} is {value!r}, but must be one of {choices}")


def _check_int(problems: list[str], name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        problems.append(f"{name} must be an int, not {type(value).__name__}")
    elif not low <= value <= high:
        problems.append(f"{name} is {value:,}, but must be from {low:,} to {high:,}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trigger:
    """When a shard cuts a batch: at `count` operations, at `bytes`, or when the oldest has waited `linger_ms`.

    - `count`: None leaves the size to the lane's controller. It also bounds the batch.
    - `bytes` of keys and payloads. They also bound the batch; one larger operation still goes, alone.
    - `linger_ms`: None adapts it to a tenth of what a batch takes, from 1 to 20 ms, and keeps no idle backend waiting.
    - `mode`: "any" of the two conditions (size, time), "all" of them, "size" or "timeout" alone. Whatever the mode, nothing waits
      longer than twice the linger, and an urgent operation, a flush or a drain cuts at once.
    """

    count: int | None = None
    bytes: int = limits.MIB
    linger_ms: float | None = None
    mode: str | TriggerMode = TriggerMode.ANY

    def __post_init__(self) -> None:
        problems: list[str] = []
        if self.count is not None:
            _check_int(problems, "Trigger.count", self.count, 1, limits.BATCH_COUNT_MAX)
        _check_int(problems, "Trigger.bytes", self.bytes, 1, limits.BATCH_BYTES_MAX)
        if self.linger_ms is not None:
            _check(problems, "Trigger.linger_ms", self.linger_ms, 0, 3_600_000, " ms")
        _check_choice(problems, self, "Trigger", "mode", TriggerMode)
        if not problems and self.mode in {TriggerMode.SIZE, TriggerMode.ALL} and self.linger_ms == 0:
            problems.append(
                f'Trigger.mode is "{self.mode}" with a linger of 0, which would cut every operation alone before the size could '
                "be reached: give it a linger"
            )
        if problems:
            raise ConfigError(*problems)

    @property
    def linger_ns(self) -> int | None:
        """The linger in nanoseconds; None where it adapts."""
        return None if self.linger_ms is None else int(self.linger_ms * NS_PER_MS)

    @classmethod
    def preset(cls, kind: str, *, batch_max: int = 1_000, linger_ms: float | None = None) -> Trigger:
        """The trigger that suits a kind of operation of a content store, as a part of the largest batch.

        "add" and "dag" 25 %, "get" and "list" 50 %, "pin" and "unpin" 33 %; "pubsub" and "dht" go at once. Raises ConfigError.
        """
        share = _PRESETS.get(kind)
        if share is None:
            raise ConfigError(f"no preset for {kind!r}: there are {', '.join(map(repr, _PRESETS))}")
        problems: list[str] = []
        _check_int(problems, "batch_max", batch_max, 1, limits.BATCH_COUNT_MAX)
        if problems:
            raise ConfigError(*problems)
        return cls(count=max(1, batch_max * share // 100), linger_ms=linger_ms)


_PRESETS: Final = {
    "add": 25, "get": 50, "pin": 33, "unpin": 33, "list": 50, "dag": 25, "pubsub": 0, "dht": 0,
}  # fmt: skip
"""Percent of the largest batch."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """A size controller that does not control: every batch is cut at `count` operations."""

    count: int

    def __post_init__(self) -> None:
        problems: list[str] = []
        _check_int(problems, "Fixed.count", self.count, 1, limits.BATCH_COUNT_MAX)
        if problems:
            raise ConfigError(*problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class Aimd:
    """Additive increase, multiplicative decrease of the batch size, around a duration of a batch of `latency_ms`."""

    latency_ms: float = 100.0
    count_min: int = 1
    count_max: int = 10_000

    def __post_init__(self) -> None:
        _check_sizes("Aimd", self.latency_ms, self.count_min, self.count_max, 1)
        if self.latency_ms is None:
            raise ConfigError("Aimd.latency_ms must be a number, not NoneType")


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptive:
    """The controller that looks for the size with the least time per operation (docs/batching.md).

    `latency_ms`: what `quantile` of the batches may take at most; None: no bound. Sizes stay from `count_min` to `count_max`, and
    are multiples of `multiple_of`.
    """

    latency_ms: float | None = None
    quantile: float = 0.95
    count_min: int = 1
    count_max: int = 10_000
    multiple_of: int = 1

    def __post_init__(self) -> None:
        _check_sizes("Adaptive", self.latency_ms, self.count_min, self.count_max, self.multiple_of)
        problems: list[str] = []
        _check(problems, "Adaptive.quantile", self.quantile, 0.5, 0.999)
        if problems:
            raise ConfigError(*problems)


SizeControl = Fixed | Aimd | Adaptive


def _check_sizes(
    name: str, latency_ms: float | None, count_min: int, count_max: int, multiple_of: int
) -> None:
    problems: list[str] = []
    if latency_ms is not None:
        _check(problems, f"{name}.latency_ms", latency_ms, 0.1, 3_600_000, " ms")
    _check_int(problems, f"{name}.count_min", count_min, 1, limits.BATCH_COUNT_MAX)
    _check_int(problems, f"{name}.count_max", count_max, 1, limits.BATCH_COUNT_MAX)
    _check_int(problems, f"{name}.multiple_of", multiple_of, 1, limits.BATCH_COUNT_MAX)
    if not problems and not count_min <= count_max:
        problems.append(f"{name}.count_min is {count_min:,}, more than count_max with {count_max:,}")
    if not problems and count_max // multiple_of * multiple_of < max(count_min, multiple_of):
        problems.append(f"{name}: no multiple of {multiple_of:,} lies from {count_min:,} to {count_max:,}")
    if problems:
        raise ConfigError(*problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """What happens to what failed: full jitter, uniform in [0, min(ceiling, base x 2^n)] seconds after n failures.

    - `attempts`: tries that may fail by an operation's own fault before it becomes a dead letter; None: no limit. An outage, a
      split, a timeout or a throttled batch is nobody's own fault.
    - `batch_retries`: how often a batch that failed for no stated reason is tried whole before it is split.
    - `budget`: retries of batches per batch that succeeds, over the lane; beyond it a retry waits for the ceiling.
    - `deaths_share_max`: the part of the last hundred settled operations of a shard that may become dead letters. Beyond it the
      backend is more likely to be wrong than they are: its breaker opens, and they are tried again. 1: whatever dies, dies.
    - `breaker_failures` in a row (or half of the last twenty batches of a shard) open its breaker, for `breaker_s` at first and
      `breaker_s_max` at most.

    Source of the formula: M. Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015.
    """

    base_s: float = 0.1
    ceiling_s: float = 30.0
    attempts: int | None = 10
    batch_retries: int = 3
    budget: float = 0.2
    deaths_share_max: float = 0.2
    breaker_failures: int = 5
    breaker_s: float = 1.0
    breaker_s_max: float = 60.0

    def __post_init__(self) -> None:
        problems: list[str] = []
        _check(problems, "RetryPolicy.base_s", self.base_s, 0.0001, 3600, " s")
        _check(problems, "RetryPolicy.ceiling_s", self.ceiling_s, 0.0001, 3600, " s")
        if self.attempts is not None:
            _check_int(problems, "RetryPolicy.attempts", self.attempts, 1, 1_000_000)
        _check_int(problems, "RetryPolicy.batch_retries", self.batch_retries, 0, 1_000)
        _check(problems, "RetryPolicy.budget", self.budget, 0.0, 1_000)
        _check(problems, "RetryPolicy.deaths_share_max", self.deaths_share_max, 0.01, 1)
        _check_int(problems, "RetryPolicy.breaker_failures", self.breaker_failures, 1, 1_000_000)
        _check(problems, "RetryPolicy.breaker_s", self.breaker_s, 0.0001, 3600, " s")
        _check(problems, "RetryPolicy.breaker_s_max", self.breaker_s_max, 0.0001, 3600, " s")
        if not problems:
            problems += [
                f"RetryPolicy.{low} is {getattr(self, low):g} s, more than {high} with {getattr(self, high):g} s"
                for low, high in (("base_s", "ceiling_s"), ("breaker_s", "breaker_s_max"))
                if getattr(self, low) > getattr(self, high)
            ]
        if problems:
            raise ConfigError(*problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one operation costs, or a batch may cost at most. 0 means: does not matter.

    CPU and duration in seconds, memory, I/O and network in bytes.
    """

    cpu_s: float = 0.0
    seconds: float = 0.0
    memory_bytes: float = 0.0
    io_bytes: float = 0.0
    network_bytes: float = 0.0

    def __post_init__(self) -> None:
        problems: list[str] = []
        for name in ("cpu_s", "seconds", "memory_bytes", "io_bytes", "network_bytes"):
            _check(problems, f"Cost.{name}", getattr(self, name), 0, 10**18)
        if problems:
            raise ConfigError(*problems)

    def count_max(self, budget: Cost) -> int | None:
        """How many operations of this cost `budget` pays for, at least 1; None: any number."""
        counts = [
            int(getattr(budget, name) / getattr(self, name))
            for name in ("cpu_s", "seconds", "memory_bytes", "io_bytes", "network_bytes")
            if getattr(budget, name) and getattr(self, name)
        ]
        return max(1, min(counts)) if counts else None


@dataclass(frozen=True, slots=True)
class Lane:
    """The queue of one kind of operation: its backend and how batches reach it.

    - `backend` is a Backend or a function of a batch (sync or async); None holds operations in the log, undelivered.
    - `shards` is fixed for the life of the store.
    - `interval_ms` is how long a lane with durability "interval" may leave an acknowledged operation unsynced; others take none.
    - `controller` chooses the size of batches: Fixed, Aimd or Adaptive; None: Fixed where the trigger has a count, else Adaptive.
    - `strategy`: "parallel" (one batch in flight for each shard, more with order "none") or "serial" (one over all shards).
    - `on_failure`: what waits while an operation waits for its retry: "block" the shard, "hold_key", or "continue"; None: what the
      order needs.
    - `timeout_s` bounds a call of `apply`; `overdue` says what happens then: "retry" or "wait"; None: "retry" where nothing can be
      overtaken by the call that was given up (a transactional backend, order "none"), else "wait".
    - `cost` of an operation and `batch_cost`, what a batch may cost at most, bound the count.
    - `moved_from`: the URL of the backend before this one, to be left although operations are pending for it.
    """

    backend: Any = None
    shards: int = field(default=1, kw_only=True)
    trigger: Trigger = field(default_factory=Trigger, kw_only=True)
    order: str | Order = field(default=Order.KEY, kw_only=True)
    durability: str | Durability = field(default=Durability.SYNC, kw_only=True)
    interval_ms: float = field(default=INTERVAL_MS, kw_only=True)
    retry: RetryPolicy = field(default_factory=RetryPolicy, kw_only=True)
    controller: SizeControl | None = field(default=None, kw_only=True)
    strategy: str | Strategy = field(default=Strategy.PARALLEL, kw_only=True)
    on_failure: str | FailureOrder | None = field(default=None, kw_only=True)
    timeout_s: float | None = field(default=30.0, kw_only=True)
    overdue: str | Overdue | None = field(default=None, kw_only=True)
    cost: Cost | None = field(default=None, kw_only=True)
    batch_cost: Cost | None = field(default=None, kw_only=True)
    moved_from: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        problems: list[str] = []
        _check_int(problems, "Lane.shards", self.shards, 1, limits.SHARDS_MAX)
        _check(problems, "Lane.interval_ms", self.interval_ms, 1, 60_000, " ms")
        _check_choice(problems, self, "Lane", "order", Order)
        _check_choice(problems, self, "Lane", "durability", Durability)
        _check_choice(problems, self, "Lane", "strategy", Strategy)
        for name, kind in (("on_failure", FailureOrder), ("overdue", Overdue)):
            if getattr(self, name) is not None:
                _check_choice(problems, self, "Lane", name, kind)
        if self.timeout_s is not None:
            _check(problems, "Lane.timeout_s", self.timeout_s, 0.001, 10**6, " s")
        for name, types in _LANE_TYPES.items():
            value = getattr(self, name)
            if not isinstance(value, types):
                names = " or ".join(kind.__name__ for kind in types if kind is not type(None))
                problems.append(f"Lane.{name} must be a {names}, not {type(value).__name__}")
        if not problems:
            problems += self._contradictions()
        backend: object = self.backend
        if backend is not None and not callable(backend) and not callable(getattr(backend, "apply", None)):
            problems.append(
                f"Lane.backend must be a Backend (an object with apply(batch)) or a function, not {type(backend).__name__}"
            )
        if isinstance(backend, type):
            problems.append(f"Lane.backend is the class {backend.__name__}; make an object of it")
        if problems:
            raise ConfigError(*problems)

    def _contradictions(self) -> list[str]:
        """What each setting allows, and both together do not."""
        problems: list[str] = []
        count = self.trigger.count
        if isinstance(self.controller, Fixed) and count is not None and count < self.controller.count:
            problems.append(
                f"Lane.controller is Fixed({self.controller.count:,}), but the trigger cuts at {count:,}: leave one of them out"
            )
        if (
            isinstance(self.controller, (Aimd, Adaptive))
            and count is not None
            and count < self.controller.count_min
        ):
            problems.append(
                f"Lane.controller has count_min {self.controller.count_min:,}, but the trigger cuts at {count:,}"
            )
        if self.order is Order.SHARD and self.on_failure not in {None, FailureOrder.BLOCK}:
            problems.append(
                f'Lane.on_failure is "{self.on_failure}", which breaks order "shard": use "block"'
            )
        if self.order is Order.KEY and self.on_failure is FailureOrder.CONTINUE:
            problems.append(
                'Lane.on_failure is "continue", which breaks order "key": use "hold_key" or "block"'
            )
        if self.batch_cost is not None and self.cost is None:
            problems.append(
                "Lane.batch_cost says what a batch may cost: Lane.cost must say what an operation costs"
            )
        if (
            self.batch_cost is not None
            and self.cost is not None
            and self.cost.count_max(self.batch_cost) is None
        ):
            problems.append("Lane.cost and Lane.batch_cost have nothing in common, so they bound no batch")
        if isinstance(self.controller, Adaptive) and count is not None and count >= self.controller.count_min:
            step = self.controller.multiple_of
            if min(count, self.controller.count_max) // step * step < max(self.controller.count_min, step):
                problems.append(
                    f"Lane.controller wants a multiple of {step:,} from {self.controller.count_min:,} on, but the trigger cuts at "
                    f"{count:,}"
                )
        return problems + self._time_contradictions()

    def _time_contradictions(self) -> list[str]:
        """The same of settings of time."""
        problems: list[str] = []
        if self.timeout_s is None and self.overdue is Overdue.RETRY:
            problems.append(
                'Lane.overdue is "retry", but without timeout_s no call is ever overdue: give it a time limit'
            )
        target_ms = self.controller.latency_ms if isinstance(self.controller, (Aimd, Adaptive)) else None
        if self.timeout_s is not None and target_ms is not None and target_ms / 1e3 > self.timeout_s:
            problems.append(
                f"Lane.controller aims at batches of {target_ms:g} ms, but timeout_s gives them up after {self.timeout_s:g} s"
            )
        if self.durability is not Durability.INTERVAL and self.interval_ms != INTERVAL_MS:
            problems.append(
                f'Lane.interval_ms is {self.interval_ms:g} ms, but durability is "{self.durability}": only "interval" goes by it'
            )
        return problems


_LANE_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "trigger": (Trigger,), "retry": (RetryPolicy,), "controller": (Fixed, Aimd, Adaptive, type(None)),
    "cost": (Cost, type(None)), "batch_cost": (Cost, type(None)), "moved_from": (str, type(None)),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of a store's engine. Times end in their unit, sizes are bytes.

    - `timer_ms`: how often the timer task looks at every shard (it also wakes when a trigger is met).
    - `in_flight_max`: batches handed to backends at the same time, over all lanes; each lane may have one all the same.
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
    - `idempotency_window_s`: how long an idempotency key is remembered.
    - `dead_letters_max`, `dead_letter_bytes_max`: bounds of the dead letters that are kept. At either bound nothing more is given
      up: the shard waits, and health says so.
    - `dead_letter_age_s`: dead letters older than that are dropped; None: never.
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
    idempotency_window_s: float = 3_600.0
    dead_letters_max: int = 10_000
    dead_letter_bytes_max: int = 64 * limits.MIB
    dead_letter_age_s: float | None = None

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
        _check(problems, "idempotency_window_s", self.idempotency_window_s, 0, 10**9, " s")
        _check_int(problems, "dead_letters_max", self.dead_letters_max, 1, limits.DEAD_LETTERS_MAX)
        _check_int(
            problems, "dead_letter_bytes_max", self.dead_letter_bytes_max, 1, limits.DEAD_LETTER_BYTES_MAX
        )
        if self.dead_letter_age_s is not None:
            _check(problems, "dead_letter_age_s", self.dead_letter_age_s, 1, 10**10, " s")
        if not problems and self.disk_bytes_max < 4 * self.segment_bytes:
            problems.append(
                f"disk_bytes_max is {self.disk_bytes_max:,}, but must be at least four segments of {self.segment_bytes:,} bytes"
            )
        if problems:
            raise ConfigError(*problems)
