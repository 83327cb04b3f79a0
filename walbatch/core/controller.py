"""How many operations the next batch of a shard should hold: what every size controller offers, and the two plain ones.

Not here: the controller that learns (`surface`), batches in flight (`concurrency`), and the ceilings in bytes and memory,
which the cut itself keeps.

The idea needed to read it: a controller is told what each batch cost, and is asked for a size. It has no clock, its
randomness is seeded, and what it has learnt can be taken out as bytes and put back after a restart.
"""

from __future__ import annotations

import enum
import math
import struct
from dataclasses import dataclass
from typing import Final, Protocol

from walbatch.limits import BATCH_COUNT_MAX

SNAPSHOT_BYTES_MAX: Final = 16 * 1024
"""Every shard's controller is persisted with the checkpoint: 256 shards of 64 lanes are at most 256 MiB."""

START_COUNT: Final = 64
AIMD_TARGET_S: Final = 0.1
_AIMD: Final = struct.Struct("<4sBQd")
_AIMD_MAGIC: Final = b"WBca"
_AIMD_VERSION: Final = 1
_MASK: Final = 2**64 - 1


class BatchResult(enum.StrEnum):
    """What became of a whole batch, as far as its size is concerned."""

    DELIVERED = "delivered"
    """The backend took it. Single operations of it may have failed: their own affair."""
    TOO_LARGE = "too large"
    TIMED_OUT = "timed out"
    THROTTLED = "throttled"
    UNAVAILABLE = "unavailable"
    FAILED = "failed"
    """Refused as a whole, for none of the reasons above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One batch: what it held, and how long the backend had it."""

    count: int
    bytes: int
    seconds: float
    result: BatchResult
    learnable: bool
    """Cut by size or bytes while a backlog remained, and not the first after idle, a reconnect or an open breaker: only
    such a batch tells what its size costs when there is work."""
    concurrency: int = 1
    """Batches of the lane in flight while this one was, itself included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The size of the next batch, and why: "fixed", "aimd", "slow start", "lead", "explore", "scout" or "capped"."""

    count: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerState:
    """What a controller believes. None where it does not know."""

    name: str
    lead_count: int
    """The size it holds to be the best."""
    cap_count: int
    """The largest size it would ask for now."""
    cost_s: float | None = None
    """Seconds for each operation at the lead."""
    latency_s: float | None = None
    """Seconds of a batch at the lead, at the quantile of the latency target."""
    latency_unreachable: bool = False
    """No size keeps the latency target: it is exceeded as little as one octave of throughput allows."""
    samples: int = 0
    drifts: int = 0
    """How often the cost changed so much that what had been learnt was discarded."""


class SizeController(Protocol):
    """The size of one shard's batches. Not thread-safe: its owner locks."""

    def target(self) -> Target:
        """The size for the next batch. May draw randomness, so ask once for each batch."""

    def observe(self, observation: Observation) -> None:
        """Learn from a batch that has ended."""

    def limit(self, count_max: int) -> None:
        """Move the ceiling: no target exceeds it, unless it lies below the smallest size."""

    def predict_s(self, count: int) -> float | None:
        """How long a batch of `count` should take; None while unknown."""

    def snapshot(self) -> bytes:
        """What was learnt, in at most SNAPSHOT_BYTES_MAX bytes. Without a checksum: its keeper adds one."""

    def restore(self, data: bytes) -> bool:
        """Take up a snapshot. False, and nothing changed, for bytes that `snapshot` of this class did not write."""

    def describe(self) -> ControllerState:
        """What the controller believes now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeBounds:
    """Which sizes a batch may have: multiples of `multiple_of` from `count_min` to `count_max`.

    Raises ValueError if there is none.
    """

    count_min: int = 1
    count_max: int = BATCH_COUNT_MAX
    multiple_of: int = 1

    def __post_init__(self) -> None:
        if not (1 <= self.count_min <= self.count_max <= BATCH_COUNT_MAX and self.multiple_of >= 1):
            raise ValueError(
                f"sizes from {self.count_min} to {self.count_max} in multiples of {self.multiple_of}: must be "
                f"1 <= count_min <= count_max <= {BATCH_COUNT_MAX} and multiple_of >= 1"
            )
        if self.largest < self.smallest:
            raise ValueError(
                f"no multiple of {self.multiple_of} lies between {self.count_min} and {self.count_max}"
            )

    @property
    def smallest(self) -> int:
        """The least size."""
        return -(-self.count_min // self.multiple_of) * self.multiple_of

    @property
    def largest(self) -> int:
        """The greatest size."""
        return self.count_max // self.multiple_of * self.multiple_of

    def clamp(self, count: float) -> int:
        """The largest allowed size up to `count`, or else the smallest."""
        within = int(min(count, self.count_max)) // self.multiple_of * self.multiple_of
        return max(within, self.smallest)

    def beside(self, count: int, lead: int, *, up: bool) -> int:
        """`count`, or where that is the `lead` itself, the next allowed size on that side, if there is one."""
        if count != lead:
            return count
        return self.clamp(lead + self.multiple_of if up else lead - 1)

    def limited(self, count_max: int) -> SizeBounds:
        """The same with another ceiling, which is raised to the smallest size where it lies below."""
        ceiling = min(max(count_max, self.smallest), BATCH_COUNT_MAX)
        return SizeBounds(count_min=self.count_min, count_max=ceiling, multiple_of=self.multiple_of)


class Chance:
    """Uniform numbers in [0, 1) from a seed: the same ones everywhere. Its state is one integer.

    Source: S. Vigna, splitmix64, 2015 (public domain).
    """

    __slots__ = ("state",)

    def __init__(self, seed: int) -> None:
        self.state = seed & _MASK

    def __call__(self) -> float:
        """The next number."""
        self.state = (self.state + 0x9E3779B97F4A7C15) & _MASK
        mixed = self.state
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        return ((mixed ^ (mixed >> 31)) >> 11) * 2.0**-53


class FixedSize:
    """Always the same size, within the bounds. Learns nothing."""

    def __init__(self, *, count: int, count_max: int = BATCH_COUNT_MAX, multiple_of: int = 1) -> None:
        self._bounds = SizeBounds(count_max=count_max, multiple_of=multiple_of)
        self._count = count
        self._samples = 0

    def __repr__(self) -> str:
        return f"<FixedSize {self._bounds.clamp(self._count)}>"

    def target(self) -> Target:
        """The size."""
        return Target(count=self._bounds.clamp(self._count), reason="fixed")

    def observe(self, observation: Observation) -> None:
        """Count it."""
        self._samples += 1

    def limit(self, count_max: int) -> None:
        """Move the ceiling."""
        self._bounds = self._bounds.limited(count_max)

    def predict_s(self, count: int) -> float | None:
        """Unknown."""
        return None

    def snapshot(self) -> bytes:
        """Nothing was learnt."""
        return b""

    def restore(self, data: bytes) -> bool:
        """Only nothing can be taken up."""
        return data == b""

    def describe(self) -> ControllerState:
        """The size."""
        count = self._bounds.clamp(self._count)
        return ControllerState(name="fixed", lead_count=count, cap_count=count, samples=self._samples)


class LatencyAimd:
    """Grow by a step while batches keep the latency target, shrink by a tenth when one does not.

    What others ship: it finds the largest size that meets a target, whatever that costs. Here for comparison, and for
    users who want exactly that.

    Source: D. Crankshaw et al., "Clipper", NSDI 2017, section 4.3 (additive increase, back off by 10 %).
    """

    def __init__(
        self,
        *,
        count_min: int = 1,
        count_max: int = BATCH_COUNT_MAX,
        multiple_of: int = 1,
        start: int = START_COUNT,
        latency_target_s: float = AIMD_TARGET_S,
    ) -> None:
        self._bounds = SizeBounds(count_min=count_min, count_max=count_max, multiple_of=multiple_of)
        self._target_s = latency_target_s
        self._size = float(self._bounds.clamp(start))
        self._step = max(1.0, self._size / 8)
        self._samples = 0

    def __repr__(self) -> str:
        return f"<LatencyAimd {self._bounds.clamp(self._size)}>"

    def target(self) -> Target:
        """The size, as the last batches left it."""
        return Target(count=self._bounds.clamp(self._size), reason="aimd")

    def observe(self, observation: Observation) -> None:
        """Grow or shrink. A backend that is down or throttles says nothing about the size."""
        if not observation.learnable or observation.result in {
            BatchResult.THROTTLED,
            BatchResult.UNAVAILABLE,
            BatchResult.FAILED,
        }:
            return
        self._samples += 1
        if observation.result is not BatchResult.DELIVERED:
            self._size *= 0.5
        elif observation.seconds > self._target_s:
            self._size *= 0.9
        else:
            self._size += self._step
        self._size = min(max(self._size, self._bounds.smallest), self._bounds.largest)

    def limit(self, count_max: int) -> None:
        """Move the ceiling."""
        self._bounds = self._bounds.limited(count_max)
        self._size = min(self._size, self._bounds.largest)

    def predict_s(self, count: int) -> float | None:
        """Unknown."""
        return None

    def snapshot(self) -> bytes:
        """The size."""
        return _AIMD.pack(_AIMD_MAGIC, _AIMD_VERSION, self._samples, self._size)

    def restore(self, data: bytes) -> bool:
        """Go on from the size of a snapshot, as far as the bounds allow."""
        if len(data) != _AIMD.size:
            return False
        magic, version, samples, size = _AIMD.unpack(data)
        if (magic, version) != (_AIMD_MAGIC, _AIMD_VERSION) or not math.isfinite(size):
            return False
        self._samples = samples
        self._size = min(max(size, self._bounds.smallest), self._bounds.largest)
        return True

    def describe(self) -> ControllerState:
        """The size."""
        count = self._bounds.clamp(self._size)
        return ControllerState(
            name="aimd", lead_count=count, cap_count=self._bounds.largest, samples=self._samples
        )
