"""What became of a shard's batches, counted as they are cut and as they end.

Not here: the clock (every call is told the time), and the size controller's own sums (`core.controller`).

The idea needed to read it: a tally is a few sums and two histograms, so that counting a batch costs microseconds whatever its
size; averages, quantiles and rates are worked out when somebody asks (`batch_stats`), over one tally or many.

Two figures are estimates: the fixed cost of a call, F, and what batching saved. A batch of n operations is taken to last
F + c n seconds; F and c come from least squares over the batches that did not fail, each weighted by 1 / n (the noise of a batch
grows with its length) and by how recent it is. One call for each operation would have paid F so many times more as there were
operations than batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from walbatch.core.histogram import Histogram
from walbatch.metrics import BatchStats, CutStats, Spread
from walbatch.types import CutReason

NS_PER_S: Final = 1_000_000_000
WINDOW_S: Final = 10
"""What "recent" means for throughput and load."""

_FADE: Final = 1 - 1 / 512
"""How much a batch weighs in the estimate of F after the next one: a backend that changed is forgotten in a few thousand."""
_KNOWN_BATCHES: Final = 8
_KNOWN_SPREAD: Final = 0.01
"""Least squares need sizes that differ: this much of 1 - (sum w n)^2 / (sum w)(sum w n^2)."""


class _Cut:
    """The sums of one cut reason."""

    __slots__ = (
        "applied", "batches", "bytes", "dead", "ended", "failed_batches", "operations", "queue_ns", "retried", "seconds",
    )  # fmt: skip

    def __init__(self) -> None:
        self.batches = self.ended = self.failed_batches = self.operations = self.bytes = 0
        self.applied = self.retried = self.dead = 0
        self.queue_ns = 0
        self.seconds = 0.0

    def add(self, other: _Cut) -> None:
        """Add the sums of another."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def stats(self) -> CutStats:
        """The sums, as what they say."""
        return CutStats(
            batches=self.batches, failed_batches=self.failed_batches, operations=self.operations, bytes=self.bytes,
            applied=self.applied, retried=self.retried, dead=self.dead, count_average=_ratio(self.operations, self.batches),
            seconds_average=_ratio(self.seconds, self.ended), queue_s_average=_ratio(self.queue_ns / NS_PER_S, self.operations),
        )  # fmt: skip


class _CallCost:
    """Least squares of "seconds = F + c n" over weights 1 / n: five sums, fading."""

    __slots__ = ("_batches", "_w", "_wn", "_wnn", "_ws", "_wsn")

    def __init__(self) -> None:
        self._batches = 0
        self._w = self._wn = self._wnn = self._ws = self._wsn = 0.0

    def observe(self, count: int, seconds: float) -> None:
        """One batch that did not fail."""
        self._batches += 1
        self._w = self._w * _FADE + 1 / count
        self._wn = self._wn * _FADE + 1
        self._wnn = self._wnn * _FADE + count
        self._ws = self._ws * _FADE + seconds / count
        self._wsn = self._wsn * _FADE + seconds

    def fixed_s(self) -> float | None:
        """F, at least 0; None while it cannot be told from c."""
        whole = self._w * self._wnn
        spread = whole - self._wn * self._wn
        if self._batches < _KNOWN_BATCHES or spread < _KNOWN_SPREAD * whole:
            return None
        return max(0.0, (self._wnn * self._ws - self._wn * self._wsn) / spread)


class _Recent:
    """Sums over the last WINDOW_S seconds, in cells of a second."""

    __slots__ = ("_applied", "_busy_ns", "_second")

    def __init__(self, now_ns: int) -> None:
        self._second = now_ns // NS_PER_S
        self._applied = [0] * (WINDOW_S + 1)
        self._busy_ns = [0] * (WINDOW_S + 1)

    def _turn(self, now_ns: int) -> None:
        """Empty the cells between the last second and this one."""
        second = now_ns // NS_PER_S
        for old in range(max(self._second, second - WINDOW_S - 1) + 1, second + 1):
            self._applied[old % (WINDOW_S + 1)] = 0
            self._busy_ns[old % (WINDOW_S + 1)] = 0
        self._second = max(self._second, second)

    def applied(self, now_ns: int, count: int) -> None:
        """So many operations were applied."""
        self._turn(now_ns)
        self._applied[self._second % (WINDOW_S + 1)] += count

    def busy(self, start_ns: int, end_ns: int) -> None:
        """The backend had work from `start_ns` to `end_ns`."""
        self._turn(end_ns)
        start_ns = max(start_ns, (self._second - WINDOW_S) * NS_PER_S)
        while start_ns < end_ns:
            second = start_ns // NS_PER_S
            stop = min((second + 1) * NS_PER_S, end_ns)
            self._busy_ns[second % (WINDOW_S + 1)] += stop - start_ns
            start_ns = stop

    def sums(self, now_ns: int) -> tuple[int, int]:
        """Operations applied, and nanoseconds with work, since the window began (see `window_ns`)."""
        self._turn(now_ns)
        return sum(self._applied), sum(self._busy_ns)

    @staticmethod
    def window_ns(opened_ns: int, now_ns: int) -> int:
        """How long the window is: whole seconds before this one and what of this one has passed, not before the opening."""
        return max(1, now_ns - max(opened_ns, (now_ns // NS_PER_S - WINDOW_S) * NS_PER_S))


class ShardTally:
    """What became of one shard's batches. Not thread-safe: its owner locks.

    Each `cut` is followed by exactly one `done`, also where the call was given up. Times are monotonic nanoseconds.
    """

    __slots__ = (
        "_busy_since", "_call_cost", "_cuts", "_in_flight", "_individual", "_opened_ns", "_queue", "_recent", "_results",
        "_seconds", "_target_count", "_target_total",
    )  # fmt: skip

    def __init__(self, *, now_ns: int) -> None:
        self._opened_ns = now_ns
        self._cuts: dict[CutReason, _Cut] = {}
        self._results: dict[str, int] = {}
        self._queue = Histogram()
        self._seconds = Histogram()
        self._call_cost = _CallCost()
        self._recent = _Recent(now_ns)
        self._individual = 0
        self._in_flight = 0
        self._busy_since = 0
        self._target_count = 0
        self._target_total = 0

    def __repr__(self) -> str:
        batches = sum(cut.batches for cut in self._cuts.values())
        return f"<ShardTally {batches} batches, {self._in_flight} in flight>"

    def cut(
        self, reason: CutReason, count: int, bytes: int, *, target_count: int, oldest_ns: int, mean_ns: int, now_ns: int
    ) -> None:  # fmt: skip
        """A batch was cut: `count` operations of `bytes`, where `target_count` were aimed at.

        Its oldest operation has waited `oldest_ns`, all of them `mean_ns` in the mean.
        """
        cut = self._cuts.get(reason)
        if cut is None:
            cut = self._cuts[reason] = _Cut()
        cut.batches += 1
        cut.operations += count
        cut.bytes += bytes
        waited_ns = mean_ns * count
        cut.queue_ns += waited_ns
        self._queue.add(oldest_ns)
        if count == 1:
            self._individual += 1
        else:
            self._queue.add(max(0, waited_ns - oldest_ns) // (count - 1), count - 1)
        self._target_count = target_count
        self._target_total += max(count, target_count)
        if not self._in_flight:
            self._busy_since = now_ns
        self._in_flight += 1

    def done(
        self, reason: CutReason, count: int, seconds: float, *, applied: int, retried: int, dead: int, failed: bool,
        result: str, now_ns: int,
    ) -> None:  # fmt: skip
        """A batch that was cut for `reason` has ended after `seconds`, or was given up.

        `applied`, `retried` and `dead` operations of its `count`; `failed` says that it failed as a whole, `result` what became
        of it (`core.controller.BatchResult`).
        """
        assert self._in_flight, "a batch ends once, after its cut"
        self._in_flight -= 1
        cut = self._cuts[reason]
        cut.ended += 1
        cut.failed_batches += failed
        cut.applied += applied
        cut.retried += retried
        cut.dead += dead
        cut.seconds += seconds
        self._seconds.add(max(0, int(seconds * NS_PER_S)))
        self._results[result] = self._results.get(result, 0) + 1
        if not failed:
            self._call_cost.observe(count, seconds)
        if applied:
            self._recent.applied(now_ns, applied)
        if not self._in_flight:
            self._recent.busy(self._busy_since, now_ns)

    def snapshot(self, *, now_ns: int) -> BatchStats:
        """What this shard's batches came to."""
        return batch_stats((self,), now_ns=now_ns)

    @property
    def has_cut(self) -> bool:
        """Whether any batch was cut."""
        return bool(self._cuts)


def batch_stats(tallies: Sequence[ShardTally], *, now_ns: int) -> BatchStats:
    """What the batches of several shards came to, under the locks of their owners.

    Means over shards (target, load) are over those that have cut a batch.
    """
    active = [tally for tally in tallies if tally.has_cut]
    if not active:
        return BatchStats()
    cuts = _merged_cuts(active)
    whole = _Cut()
    for cut in cuts.values():
        whole.add(cut)
    opened_ns = min(tally._opened_ns for tally in active)  # noqa: SLF001 - this module's own class, here and below
    recent_applied = recent_busy_ns = 0
    for tally in active:
        applied, busy_ns = tally._recent.sums(now_ns)  # noqa: SLF001
        recent_applied += applied
        recent_busy_ns += busy_ns + _unfinished_ns(tally, now_ns)
    window_ns = _Recent.window_ns(opened_ns, now_ns)
    individual = sum(tally._individual for tally in active)  # noqa: SLF001
    answered = whole.applied + whole.retried + whole.dead
    saved_calls, saved_s, call_s = _savings(active)
    return BatchStats(
        operations=whole.operations, batched=whole.operations - individual, individual=individual, applied=whole.applied,
        retried=whole.retried, dead=whole.dead, batches=whole.batches, failed_batches=whole.failed_batches,
        in_flight=sum(tally._in_flight for tally in active), bytes=whole.bytes,  # noqa: SLF001
        count_average=whole.operations / whole.batches, bytes_average=whole.bytes / whole.batches,
        seconds=_spread(tally._seconds for tally in active),  # noqa: SLF001
        queue_seconds=_spread(tally._queue for tally in active),  # noqa: SLF001
        throughput=recent_applied * NS_PER_S / window_ns,
        throughput_overall=whole.applied * NS_PER_S / max(1, now_ns - opened_ns),
        target_count=round(sum(tally._target_count for tally in active) / len(active)),  # noqa: SLF001
        efficiency=_ratio(whole.operations, sum(tally._target_total for tally in active)),  # noqa: SLF001
        error_rate=_ratio(whole.retried + whole.dead, answered),
        load=min(1.0, recent_busy_ns / window_ns / len(active)),
        saved_calls=saved_calls, saved_s=saved_s, call_s=call_s,
        cuts={reason.value: cut.stats() for reason, cut in cuts.items()}, results=_merged_results(active),
    )  # fmt: skip


def _merged_cuts(tallies: Iterable[ShardTally]) -> dict[CutReason, _Cut]:
    merged: dict[CutReason, _Cut] = {}
    for tally in tallies:
        for reason, cut in tally._cuts.items():  # noqa: SLF001
            merged.setdefault(reason, _Cut()).add(cut)
    return merged


def _merged_results(tallies: Iterable[ShardTally]) -> dict[str, int]:
    merged: dict[str, int] = {}
    for tally in tallies:
        for result, batches in tally._results.items():  # noqa: SLF001
            merged[result] = merged.get(result, 0) + batches
    return merged


def _unfinished_ns(tally: ShardTally, now_ns: int) -> int:
    """How long the backend has had the work that it has now, within the window."""
    if not tally._in_flight:  # noqa: SLF001
        return 0
    return now_ns - max(tally._busy_since, (now_ns // NS_PER_S - WINDOW_S) * NS_PER_S)  # noqa: SLF001


def _savings(tallies: Iterable[ShardTally]) -> tuple[int, float | None, float | None]:
    """Calls saved, seconds saved, and the fixed cost of a call (the mean over batches); None where no shard knows it."""
    saved_calls = batches = 0
    saved_s = cost_s = 0.0
    for tally in tallies:
        good = [cut for cut in tally._cuts.values() if cut.applied]  # noqa: SLF001
        calls = sum(cut.ended - cut.failed_batches for cut in good)
        saved = max(0, sum(cut.applied for cut in good) - calls)
        saved_calls += saved
        fixed_s = tally._call_cost.fixed_s()  # noqa: SLF001
        if fixed_s is not None:
            batches += calls
            saved_s += saved * fixed_s
            cost_s += calls * fixed_s
    if not batches:
        return saved_calls, None, None
    return saved_calls, saved_s, cost_s / batches


def _spread(histograms: Iterable[Histogram]) -> Spread:
    """A spread in seconds of histograms in nanoseconds."""
    whole = Histogram.merged(histograms)
    p50, p95, p99 = (value / NS_PER_S for value in whole.quantiles((0.5, 0.95, 0.99)))
    return Spread(
        count=whole.count, average=whole.average / NS_PER_S, p50=p50, p95=p95, p99=p99, maximum=whole.maximum / NS_PER_S
    )  # fmt: skip


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
