"""Whether an engine is well, and if not, what to do: facts in, a verdict with reasons out.

Not here: how the facts are gathered (the engine does, at each call of `health`), and what is done about them (nothing: whoever
asks decides).

The idea needed to read it: each check is a function of the facts of an engine, of a lane or of a shard, and gives a reason or
none. The verdict is that of the worst reason. *Degraded* means that it works, but somebody should look; *failing*, that
something is not being done and will not be until somebody acts. `Trend` and `ClockWatch` remember the little that a fact over
time needs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from walbatch.metrics import Health, HealthCheck, HealthReason, HealthVerdict

NS_PER_S: Final = 1_000_000_000

MEMORY_DEGRADED: Final = 0.80
MEMORY_FAILING: Final = 0.90
DISK_DEGRADED: Final = 0.75
DISK_FAILING: Final = 0.90
"""Water marks, as shares of `disk_bytes_max`: at the upper one there are minutes left until submitting waits."""
DEAD_LETTERS_DEGRADED: Final = 0.75
ABANDONED_DEGRADED: Final = 0.5
SYNC_S_MAX: Final = 0.25
"""A sync takes milliseconds on flash and tens on a disk; a quarter of a second is a device or a neighbour in trouble."""
SYNCS_MIN: Final = 20
"""A 99th percentile of fewer says nothing."""
CLOCK_JUMP_S: Final = 5.0
"""More than a leap second or a clock that is slewed: from here on delayed operations come visibly early or late."""
CLOCK_JUMP_SHOWN_S: Final = 600.0
TREND_S: Final = 60.0
"""Over how long a queue must grow; TREND_POINTS samples are kept of it."""
TREND_POINTS: Final = 12
GROWTH_MIN: Final = 1_000
GROWTH_SHARE: Final = 0.1
"""A queue grows when, over TREND_S, more was added than taken: by GROWTH_MIN operations and by a tenth of what was settled."""
NONSENSE_MAX: Final = 1
"""Answers in a row that are none. One is a defect of the backend, not of its day."""
FAILURES_MAX: Final = 5
"""Batches in a row that failed: fewer may be an operation that is searched for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneFacts:
    """What is known of a lane. `growth` and `settled` are over the last `trend_s` seconds (0: not known yet)."""

    name: str
    pending: int = 0
    waiting: int = 0
    """Operations of it that could go and do not: at least so many, since more may be in the log."""
    growth: int = 0
    settled: int = 0
    trend_s: float = 0.0
    paused: bool = False
    held: bool = False
    """It has no backend."""
    retries_waiting: int = 0
    """Retries that wait because the lane's retry budget is empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFacts:
    """What is known of a shard of a lane."""

    lane: str
    shard: int
    in_flight_s: float = 0.0
    """How long its oldest batch has been in flight."""
    timeout_s: float | None = None
    """The time limit of its batches; None: none."""
    breaker: str = "closed"
    breaker_open_s: float = 0.0
    """How long its breaker has been open, or half open."""
    broken: str = ""
    """What the backend said when it stopped the shard (`BackendBroken`)."""
    failures: int = 0
    """Batches in a row that failed, whoever was to blame."""
    nonsense: int = 0
    """Answers in a row that were none."""
    last_error: str = ""
    latency_target_s: float | None = None
    latency_s: float | None = None
    """What the controller expects of a batch at the size that it holds to be the best."""
    target_unreachable: bool = False
    clogged_bytes: int = 0
    """What delayed operations take of its memory, if nothing is read for it any more because of them; else 0."""
    memory_bytes_max: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthFacts:
    """What is known of an engine. A limit of 0 is none."""

    failure: str = ""
    """Why the engine stopped."""
    closed: bool = False
    """Whether somebody closed it, or is about to."""
    memory_bytes: int = 0
    memory_bytes_max: int = 0
    disk_bytes: int = 0
    disk_bytes_max: int = 0
    syncs: int = 0
    """Syncs that `sync_s_p99` is taken over."""
    sync_s_p99: float = 0.0
    sync_s_max: float = SYNC_S_MAX
    dead_letters: int = 0
    dead_letters_max: int = 0
    dead_letter_bytes: int = 0
    dead_letter_bytes_max: int = 0
    abandoned: int = 0
    """Calls of backends that were given up and have not returned."""
    abandoned_max: int = 0
    clock_jump_s: float = 0.0
    """How far the wall clock jumped of late; negative: back."""
    lanes: tuple[LaneFacts, ...] = ()
    shards: tuple[ShardFacts, ...] = ()


def assess(facts: HealthFacts) -> Health:
    """The verdict on these facts, worst reason first, then in the order of the checks below."""
    found = [reason for check in _ENGINE_CHECKS if (reason := check(facts)) is not None]
    found += [
        reason for check in _SHARD_CHECKS for shard in facts.shards if (reason := check(shard)) is not None
    ]
    found += [reason for check in _LANE_CHECKS for lane in facts.lanes if (reason := check(lane)) is not None]
    found.sort(key=lambda reason: reason.verdict is not HealthVerdict.FAILING)
    return Health(verdict=found[0].verdict if found else HealthVerdict.OK, reasons=tuple(found))


# --- of the engine ------------------------------------------------------------------------------------------------


def _stopped(facts: HealthFacts) -> HealthReason | None:
    if not facts.failure:
        return None
    return HealthReason(
        name=HealthCheck.STOPPED, verdict=HealthVerdict.FAILING,
        text=f"the engine has stopped: {facts.failure}. Close it, repair the cause, and open the store again",
    )  # fmt: skip


def _closed(facts: HealthFacts) -> HealthReason | None:
    if not facts.closed or facts.failure:
        return None
    return HealthReason(
        name=HealthCheck.CLOSED, verdict=HealthVerdict.FAILING,
        text="the engine is closed: it accepts and delivers nothing more. Open the store again",
    )  # fmt: skip


def _memory(facts: HealthFacts) -> HealthReason | None:
    share = _share(facts.memory_bytes, facts.memory_bytes_max)
    if share < MEMORY_DEGRADED:
        return None
    failing = share >= MEMORY_FAILING
    meanwhile = (
        "nothing new is taken in until it falls" if failing else "batches shrink and nothing is read ahead"
    )
    return HealthReason(
        name=HealthCheck.MEMORY, verdict=_bad(failing=failing), value=facts.memory_bytes,
        limit=facts.memory_bytes_max * (MEMORY_FAILING if failing else MEMORY_DEGRADED),
        text=f"{share:.0%} of the memory there is ({facts.memory_bytes:,} of {facts.memory_bytes_max:,} bytes) is in use: "
        f"{meanwhile}. Give the process more, or lower memory_bytes_max and queue_bytes_max",
    )  # fmt: skip


def _disk(facts: HealthFacts) -> HealthReason | None:
    share = _share(facts.disk_bytes, facts.disk_bytes_max)
    if share < DISK_DEGRADED:
        return None
    failing = share >= DISK_FAILING
    return HealthReason(
        name=HealthCheck.DISK, verdict=_bad(failing=failing), value=facts.disk_bytes,
        limit=facts.disk_bytes_max * (DISK_FAILING if failing else DISK_DEGRADED),
        text=f"the log takes {share:.0%} of disk_bytes_max ({facts.disk_bytes:,} of {facts.disk_bytes_max:,} bytes); at 100 % "
        "submitting waits. See which lane has the most pending, and make its backend keep up, or raise disk_bytes_max",
    )  # fmt: skip


def _dead_letters(facts: HealthFacts) -> HealthReason | None:
    counts = _share(facts.dead_letters, facts.dead_letters_max)
    sizes = _share(facts.dead_letter_bytes, facts.dead_letter_bytes_max)
    if max(counts, sizes) < DEAD_LETTERS_DEGRADED:
        return None
    by_count = counts >= sizes
    setting = "dead_letters_max" if by_count else "dead_letter_bytes_max"
    value = facts.dead_letters if by_count else facts.dead_letter_bytes
    maximum = facts.dead_letters_max if by_count else facts.dead_letter_bytes_max
    failing = value >= maximum
    meanwhile = "shards that would give an operation up wait" if failing else "at the limit shards will wait"
    return HealthReason(
        name=HealthCheck.DEAD_LETTERS, verdict=_bad(failing=failing), value=value,
        limit=maximum * (1.0 if failing else DEAD_LETTERS_DEGRADED),
        text=f"dead letters are at {value:,} of {setting} with {maximum:,}: {meanwhile}. Look at them (walbatch dlq list), then "
        "requeue or drop them",
    )  # fmt: skip


def _abandoned(facts: HealthFacts) -> HealthReason | None:
    share = _share(facts.abandoned, facts.abandoned_max)
    if share < ABANDONED_DEGRADED:
        return None
    failing = facts.abandoned >= facts.abandoned_max
    meanwhile = "no more are given up: shards wait" if failing else "each holds a thread"
    return HealthReason(
        name=HealthCheck.ABANDONED, verdict=_bad(failing=failing), value=facts.abandoned,
        limit=facts.abandoned_max * (1.0 if failing else ABANDONED_DEGRADED),
        text=f"{facts.abandoned} calls of backends were given up and have not returned (at most {facts.abandoned_max}): "
        f"{meanwhile}. Give the backend's client a time limit below the lane's timeout_s",
    )  # fmt: skip


def _sync(facts: HealthFacts) -> HealthReason | None:
    if facts.syncs < SYNCS_MIN or facts.sync_s_p99 <= facts.sync_s_max:
        return None
    return HealthReason(
        name=HealthCheck.SYNC, verdict=HealthVerdict.DEGRADED, value=facts.sync_s_p99, limit=facts.sync_s_max,
        text=f"one sync of the log in a hundred takes {facts.sync_s_p99:.3g} s or more: the disk is slow or shared. "
        "Every submit waits for it: measure the disk (walbatch doctor)",
    )  # fmt: skip


def _clock(facts: HealthFacts) -> HealthReason | None:
    if abs(facts.clock_jump_s) <= CLOCK_JUMP_S:
        return None
    way = "forward" if facts.clock_jump_s > 0 else "back"
    return HealthReason(
        name=HealthCheck.CLOCK, verdict=HealthVerdict.DEGRADED, value=facts.clock_jump_s, limit=CLOCK_JUMP_S,
        text=f"the wall clock jumped {abs(facts.clock_jump_s):.3g} s {way} (it was set, or the machine slept): delayed "
        "operations, deadlines and idempotency windows moved with it. See to the machine's time service",
    )  # fmt: skip


# --- of a shard ---------------------------------------------------------------------------------------------------


def _broken(facts: ShardFacts) -> HealthReason | None:
    if not facts.broken:
        return None
    return HealthReason(
        name=HealthCheck.BACKEND_BROKEN, verdict=HealthVerdict.FAILING, lane=facts.lane, shard=facts.shard,
        text=f"{_where(facts)} stands still, its work kept: the backend says {facts.broken!r}. Repair that, then resume the lane",
    )  # fmt: skip


def _nonsense(facts: ShardFacts) -> HealthReason | None:
    if facts.nonsense < NONSENSE_MAX:
        return None
    return HealthReason(
        name=HealthCheck.NONSENSE, verdict=HealthVerdict.FAILING, lane=facts.lane, shard=facts.shard, value=facts.nonsense,
        limit=NONSENSE_MAX,
        text=f"{_where(facts)}: the backend's last {_times(facts.nonsense)} no answer ({facts.last_error}): batches are tried "
        "again and again. Correct the backend: None, one outcome for each operation, or Failures",
    )  # fmt: skip


def _stuck(facts: ShardFacts) -> HealthReason | None:
    if facts.timeout_s is None or facts.in_flight_s <= facts.timeout_s:
        return None
    return HealthReason(
        name=HealthCheck.STUCK, verdict=HealthVerdict.FAILING, lane=facts.lane, shard=facts.shard, value=facts.in_flight_s,
        limit=facts.timeout_s,
        text=f"{_where(facts)}: a batch has been in flight for {facts.in_flight_s:.3g} s, its limit is {facts.timeout_s:.3g} s, "
        "and nothing may overtake it. See what the backend waits for, and give its client a time limit",
    )  # fmt: skip


def _breaker(facts: ShardFacts) -> HealthReason | None:
    if facts.breaker == "closed":
        return None
    cause = f" ({facts.last_error})" if facts.last_error else ""
    return HealthReason(
        name=HealthCheck.BREAKER, verdict=HealthVerdict.DEGRADED, lane=facts.lane, shard=facts.shard, value=facts.breaker_open_s,
        text=f"{_where(facts)}: the breaker opened {facts.breaker_open_s:.3g} s ago and is {facts.breaker}, because the backend "
        f"fails{cause}. Work waits in the log and goes on by itself when it answers again",
    )  # fmt: skip


def _failures(facts: ShardFacts) -> HealthReason | None:
    """Where no other check says why."""
    if facts.failures < FAILURES_MAX or facts.broken or facts.nonsense or facts.breaker != "closed":
        return None
    cause = f" ({facts.last_error})" if facts.last_error else ""
    return HealthReason(
        name=HealthCheck.FAILURES, verdict=HealthVerdict.DEGRADED, lane=facts.lane, shard=facts.shard, value=facts.failures,
        limit=FAILURES_MAX,
        text=f"{_where(facts)}: the last {facts.failures:,} batches all failed{cause}. If the backend is in the wrong, correct it: "
        "operations that fail too often are given up, and are found among the dead letters",
    )  # fmt: skip


def _latency_target(facts: ShardFacts) -> HealthReason | None:
    if not facts.target_unreachable:
        return None
    target = f" of {facts.latency_target_s:.3g} s" if facts.latency_target_s is not None else ""
    expected = f"; a batch takes {facts.latency_s:.3g} s" if facts.latency_s is not None else ""
    return HealthReason(
        name=HealthCheck.LATENCY_TARGET, verdict=HealthVerdict.DEGRADED, lane=facts.lane, shard=facts.shard,
        value=facts.latency_s or 0.0, limit=facts.latency_target_s or 0.0,
        text=f"{_where(facts)}: no size of batch keeps the latency target{target}{expected}. Raise the controller's latency_ms, "
        "or make a call of the backend cheaper",
    )  # fmt: skip


def _delayed(facts: ShardFacts) -> HealthReason | None:
    if not facts.clogged_bytes:
        return None
    return HealthReason(
        name=HealthCheck.DELAYED, verdict=HealthVerdict.DEGRADED, lane=facts.lane, shard=facts.shard, value=facts.clogged_bytes,
        limit=facts.memory_bytes_max,
        text=f"{_where(facts)}: delayed operations fill its memory ({facts.clogged_bytes:,} bytes; half of "
        f"{facts.memory_bytes_max:,} is enough for that): nothing behind them in the log is delivered before they are due. Raise "
        "memory_bytes_max, give them a lane of their own, or cancel some",
    )  # fmt: skip


# --- of a lane ----------------------------------------------------------------------------------------------------


def _paused(facts: LaneFacts) -> HealthReason | None:
    if not facts.paused or facts.held or not facts.waiting:
        return None
    return HealthReason(
        name=HealthCheck.PAUSED, verdict=HealthVerdict.DEGRADED, lane=facts.name, value=facts.waiting,
        text=f"lane {facts.name}: it is paused, and {_at_least(facts.waiting)}. Resume it with engine.resume({facts.name!r})",
    )  # fmt: skip


def _held(facts: LaneFacts) -> HealthReason | None:
    if not facts.held or not facts.waiting:
        return None
    return HealthReason(
        name=HealthCheck.HELD, verdict=HealthVerdict.DEGRADED, lane=facts.name, value=facts.waiting,
        text=f"lane {facts.name}: it has no backend here, and {_at_least(facts.waiting)} in the log. Open the store with a backend "
        "for it",
    )  # fmt: skip


def _growing(facts: LaneFacts) -> HealthReason | None:
    limit = max(GROWTH_MIN, GROWTH_SHARE * facts.settled)
    if facts.paused or facts.held or not facts.settled or facts.growth < limit:
        return None
    return HealthReason(
        name=HealthCheck.GROWING, verdict=HealthVerdict.DEGRADED, lane=facts.name, value=facts.growth, limit=limit,
        text=f"lane {facts.name}: in {facts.trend_s:.0f} s {facts.growth:,} operations more came in than the {facts.settled:,} "
        f"that were settled; {facts.pending:,} are pending. Give it more shards or a faster backend, or submit less",
    )  # fmt: skip


def _retry_budget(facts: LaneFacts) -> HealthReason | None:
    if not facts.retries_waiting:
        return None
    return HealthReason(
        name=HealthCheck.RETRY_BUDGET, verdict=HealthVerdict.DEGRADED, lane=facts.name, value=facts.retries_waiting,
        text=f"lane {facts.name}: its retry budget is empty, and {_plural(facts.retries_waiting, 'retry waits', 'retries wait')} "
        "for the longest delay. See why the backend fails so often",
    )  # fmt: skip


_ENGINE_CHECKS: Final[tuple[Callable[[HealthFacts], HealthReason | None], ...]] = (
    _stopped, _closed, _memory, _disk, _dead_letters, _abandoned, _sync, _clock,
)  # fmt: skip
_SHARD_CHECKS: Final[tuple[Callable[[ShardFacts], HealthReason | None], ...]] = (
    _broken, _nonsense, _stuck, _breaker, _failures, _latency_target, _delayed,
)  # fmt: skip
_LANE_CHECKS: Final[tuple[Callable[[LaneFacts], HealthReason | None], ...]] = (
    _paused, _held, _growing, _retry_budget,
)  # fmt: skip


def _bad(*, failing: bool) -> HealthVerdict:
    return HealthVerdict.FAILING if failing else HealthVerdict.DEGRADED


def _share(value: int, maximum: int) -> float:
    return value / maximum if maximum > 0 else 0.0


def _where(facts: ShardFacts) -> str:
    return f"shard {facts.shard} of lane {facts.lane}"


def _times(count: int) -> str:
    return "answer was" if count == 1 else f"{count:,} answers were"


def _at_least(count: int) -> str:
    return f"at least {_plural(count, 'operation waits', 'operations wait')}"


def _plural(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


# --- what a fact over time needs ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """What changed over the last `seconds`: pending operations, and how many were settled."""

    pending: int = 0
    settled: int = 0
    seconds: float = 0.0


class Trend:
    """How a lane's pending operations changed over the last minute. Not thread-safe: its owner locks.

    It may be told at every tick: it keeps TREND_POINTS points.
    """

    __slots__ = ("_last", "_points")

    def __init__(self) -> None:
        self._points: deque[tuple[int, int, int]] = deque()
        self._last = (0, 0, 0)

    def observe(self, now_ns: int, *, pending: int, settled: int) -> None:
        """So many are pending now, and so many were settled since the opening."""
        self._last = (now_ns, pending, settled)
        while self._points and now_ns - self._points[0][0] > TREND_S * NS_PER_S:
            self._points.popleft()
        if not self._points or now_ns - self._points[-1][0] >= TREND_S * NS_PER_S / TREND_POINTS:
            self._points.append(self._last)

    def growth(self) -> Growth:
        """The change since the oldest point, once there is a whole window; before that nothing."""
        if not self._points:
            return Growth()
        then_ns, pending_then, settled_then = self._points[0]
        now_ns, pending, settled = self._last
        seconds = (now_ns - then_ns) / NS_PER_S
        if seconds < TREND_S * (TREND_POINTS - 1) / TREND_POINTS:
            return Growth()
        return Growth(pending=pending - pending_then, settled=settled - settled_then, seconds=seconds)


class ClockWatch:
    """Notices that the wall clock was set: its distance from the monotonic one changed. Not thread-safe: its owner locks."""

    __slots__ = ("_distance_ns", "_jump_ns", "_jumped_at_ns")

    def __init__(self, *, monotonic_ns: int, wall_ns: int) -> None:
        self._distance_ns = wall_ns - monotonic_ns
        self._jump_ns = 0
        self._jumped_at_ns = 0

    def observe(self, *, monotonic_ns: int, wall_ns: int) -> None:
        """Both clocks, read one after the other. A slow drift is followed; a jump is kept."""
        distance_ns = wall_ns - monotonic_ns
        change_ns = distance_ns - self._distance_ns
        self._distance_ns = distance_ns
        if abs(change_ns) > CLOCK_JUMP_S * NS_PER_S:
            self._jump_ns, self._jumped_at_ns = change_ns, monotonic_ns

    def jump_s(self, *, monotonic_ns: int) -> float:
        """The last jump in seconds, negative where it went back; 0 once it is CLOCK_JUMP_SHOWN_S ago."""
        if monotonic_ns - self._jumped_at_ns > CLOCK_JUMP_SHOWN_S * NS_PER_S:
            return 0.0
        return self._jump_ns / NS_PER_S
