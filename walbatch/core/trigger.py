"""When a batch is cut, and why.

What is not here: the queue (`batcher`), and what goes into the batch (`fairness`).

The idea needed to read it: a lane's policy says which of size and time is its trigger; urgent operations, memory, flush, drain and
the age bound cut in every mode.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from walbatch import limits
from walbatch.types import CutReason, TriggerMode

LINGER_NS_MIN: Final = 1_000_000
"""An adaptive linger gathers company for at least as long as a timer can keep."""
LINGER_NS_MAX: Final = 20_000_000
"""And costs no operation more latency than somebody would notice."""
COMPANY_NS: Final = 500_000
"""How long a batch waits for company where nothing is in flight and the linger adapts."""
PROBE_COUNT: Final = 8
"""Operations of a probe: few, because they may fail."""
AGE_FACTOR: Final = 2
"""Nothing that is ready waits longer than that many lingers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CutPolicy:
    """The trigger of a lane, in the units of the core. `count` None: the target alone; `linger_ns` None: it adapts."""

    mode: TriggerMode = TriggerMode.ANY
    count: int | None
    bytes: int
    linger_ns: int | None
    count_max: int = limits.BATCH_COUNT_MAX
    ceiling: int = field(init=False)
    """What bounds the count, whatever the controller's target."""
    is_sized: bool = field(init=False)
    """Whether size alone cuts; `is_timed`: whether time alone does."""
    is_timed: bool = field(init=False)

    def __post_init__(self) -> None:
        ceiling = self.count_max if self.count is None else min(self.count, self.count_max)
        object.__setattr__(self, "ceiling", ceiling)
        object.__setattr__(self, "is_sized", self.mode in {TriggerMode.ANY, TriggerMode.SIZE})
        object.__setattr__(self, "is_timed", self.mode in {TriggerMode.ANY, TriggerMode.TIMEOUT})

    def limit(self, target: int) -> int:
        """How many operations the next batch may hold: `target` is the controller's size for it."""
        return max(1, min(target, self.ceiling))


class Situation(NamedTuple):
    """What a queue cannot know. `target` is the controller's size for the next batch.

    A tuple, because each look at a queue takes one.
    """

    now_ns: int
    target: int
    flush_lsn: int = 0
    draining: bool = False
    window_full: bool = False
    memory_pressed: bool = False
    probing: bool = False


class Ready(Protocol):
    """What is ready in a queue: `bytes` of keys and payloads, and how many have an urgent priority."""

    bytes: int
    urgent: int

    def __len__(self) -> int: ...

    def oldest_ns(self) -> int:
        """When the first one arrived; 0 if there is none."""

    def lowest_lsn(self) -> int:
        """The LSN of the first one; 0 if there is none."""


class Linger:
    """How long the first operation of a batch waits for company: a tenth of what a batch takes, smoothed.

    Source: FoundationDB's commit proxy (COMMIT_TRANSACTION_BATCH_INTERVAL_LATENCY_FRACTION, _SMOOTHER_ALPHA).
    """

    __slots__ = ("ns",)

    def __init__(self) -> None:
        self.ns = LINGER_NS_MIN

    def __repr__(self) -> str:
        return f"<Linger {self.ns:,} ns>"

    def observe(self, seconds: float) -> None:
        """A batch took that long."""
        ns = 0.9 * self.ns + 0.1 * (0.1 * seconds * 1e9)
        self.ns = int(min(max(ns, LINGER_NS_MIN), LINGER_NS_MAX))


class Cutter:
    """A lane's policy, and the linger that adapts to what batches take. `policy` may be replaced at any time."""

    __slots__ = ("linger", "policy")

    def __init__(self, policy: CutPolicy) -> None:
        self.policy = policy
        self.linger = Linger()

    def __repr__(self) -> str:
        return f"<Cutter {self.policy.mode} {self.linger!r}>"

    def reason(self, situation: Situation, ready: Ready, *, eager: bool, in_flight: bool) -> CutReason | None:
        """Whether a batch of what is ready, at least one operation, should be cut now, and why.

        `eager`: some of it does not linger, since it was cut before.
        """
        if situation.probing:
            return CutReason.PROBE
        mode = self.policy.mode
        size = None if mode is TriggerMode.TIMEOUT else self._size_reached(situation.target, ready)
        oldest_ns = ready.oldest_ns()
        linger_ns, because = self._linger(in_flight=in_flight)
        lingered = situation.now_ns >= oldest_ns + linger_ns
        if size is not None and (lingered or mode is not TriggerMode.ALL):
            return size
        if ready.urgent:
            return CutReason.URGENT
        if eager:
            return CutReason.RETRY
        pressed = self._pressed(situation, ready)
        if pressed is not None:
            return pressed
        if lingered and self.policy.is_timed:
            return because
        return CutReason.AGE if situation.now_ns >= oldest_ns + self._age_max() else None

    def due_at_ns(self, target: int, ready: Ready, *, eager: bool, in_flight: bool) -> int:
        """When time alone makes a batch of what is ready due; 0 if it is already."""
        mode = self.policy.mode
        reached = mode is not TriggerMode.TIMEOUT and self._size_reached(target, ready) is not None
        if ready.urgent or eager or (reached and mode is not TriggerMode.ALL):
            return 0
        if self.policy.is_timed or reached:
            return ready.oldest_ns() + min(self._linger(in_flight=in_flight)[0], self._age_max())
        return ready.oldest_ns() + self._age_max()

    def _size_reached(self, target: int, ready: Ready) -> CutReason | None:
        if len(ready) >= self.policy.limit(target):
            return CutReason.COUNT
        return CutReason.BYTES if ready.bytes >= self.policy.bytes else None

    @staticmethod
    def _pressed(situation: Situation, ready: Ready) -> CutReason | None:
        """What does not wait for the trigger."""
        if situation.memory_pressed:
            return CutReason.MEMORY
        if situation.draining:
            return CutReason.DRAIN
        if ready.lowest_lsn() <= situation.flush_lsn:
            return CutReason.FLUSH
        return CutReason.BACKLOG if situation.window_full else None

    def _linger(self, *, in_flight: bool) -> tuple[int, CutReason]:
        """How long the oldest waits for company, and what it is called when it has."""
        if self.policy.linger_ns is not None:
            return self.policy.linger_ns, CutReason.LINGER
        if in_flight:
            return self.linger.ns, CutReason.LINGER
        return COMPANY_NS, CutReason.IDLE

    def _age_max(self) -> int:
        return AGE_FACTOR * (self.linger.ns if self.policy.linger_ns is None else self.policy.linger_ns)
