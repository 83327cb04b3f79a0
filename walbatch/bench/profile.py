"""How much is measured: three sizes of the whole, and a factor for any other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Counts of operations, and bounds of time. A subject that would take longer than `seconds_max` does fewer."""

    name: str
    rounds: int
    seconds_max: float
    """Of one measurement."""
    counts: Mapping[str, int]
    """Operations of one measurement, by workload."""
    backlogs: tuple[int, ...]
    """Pending operations of the stores of w8."""
    opens: int
    """How often each of them is opened."""
    trace_bytes: int
    """Of w9."""
    window_s: float
    """For how long w10 counts."""
    starts: int
    """How often a process is started to see how long that takes."""
    warm_bytes: int = 0
    """Of the page cache, touched before anything is measured."""
    group_count: int = 1_000
    large_group_count: int = 64
    threads: int = 32
    tasks: int = 1_000

    def with_rounds(self, rounds: int) -> Self:
        """The same with so many rounds."""
        return replace(self, rounds=rounds)

    def scaled(self, factor: float) -> Self:
        """The same with `factor` times the operations and the time. Groups, threads and tasks shrink with it, but do not grow."""
        shrink = min(1.0, factor)
        return replace(
            self,
            seconds_max=self.seconds_max * factor,
            counts={workload: max(1, int(count * factor)) for workload, count in self.counts.items()},
            backlogs=tuple(sorted({max(100, int(count * factor)) for count in self.backlogs})),
            trace_bytes=max(2**16, int(self.trace_bytes * factor)),
            warm_bytes=int(self.warm_bytes * factor),
            window_s=max(0.05, self.window_s * factor),
            group_count=max(2, int(self.group_count * shrink)),
            large_group_count=max(2, int(self.large_group_count * shrink)),
            threads=max(2, int(self.threads * shrink)),
            tasks=max(2, int(self.tasks * shrink)),
        )


QUICK: Final = Profile(
    name="quick", warm_bytes=2**28, rounds=2, seconds_max=0.1, opens=2, trace_bytes=8 * 2**20, window_s=0.5, starts=3,
    counts={"w1": 400, "w2": 3_200, "w3": 50_000, "w4": 1_024, "w4c": 1_024, "w5": 100_000, "w6": 20_000, "w7": 50_000},
    backlogs=(50_000, 200_000),
)  # fmt: skip
DEFAULT: Final = Profile(
    name="default", warm_bytes=2**31, rounds=5, seconds_max=0.5, opens=5, trace_bytes=64 * 2**20, window_s=1.5, starts=15,
    counts={"w1": 2_000, "w2": 16_000, "w3": 200_000, "w4": 4_096, "w4c": 4_096, "w5": 500_000, "w6": 100_000, "w7": 200_000},
    backlogs=(1_000_000, 3_000_000),
)  # fmt: skip
FULL: Final = Profile(
    name="full", warm_bytes=2**32, rounds=11, seconds_max=1.0, opens=9, trace_bytes=256 * 2**20, window_s=3.0, starts=31,
    counts={"w1": 4_000, "w2": 32_000, "w3": 400_000, "w4": 8_192, "w4c": 8_192, "w5": 1_000_000, "w6": 200_000, "w7": 400_000},
    backlogs=(1_000_000, 3_000_000, 10_000_000),
)  # fmt: skip
