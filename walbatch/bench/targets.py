"""What walbatch is meant to reach, and what it did.

The idea needed to read it: a target is a bound on the median of a ratio within rounds, or of a figure where no ratio says it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from walbatch.bench.results import Results, Spread

Values = Callable[[Results], Sequence[float]]

OWN: Final = "walbatch"
RAW: Final = "raw"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One of them. `values` gives one value for each round."""

    workload: str
    what: str
    at_least: float | None = None
    at_most: float | None = None
    unit: str = "x"
    values: Values

    def is_met(self, value: float) -> bool:
        """Whether a median keeps the bound."""
        return (self.at_least is None or value >= self.at_least) and (
            self.at_most is None or value <= self.at_most
        )

    @property
    def bound(self) -> str:
        """The bound as text."""
        sign, value = (">=", self.at_least) if self.at_least is not None else ("<=", self.at_most)
        return f"{sign} {value:g} {self.unit}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A target and what was measured; `found` is None where it was not."""

    workload: str
    what: str
    bound: str
    unit: str
    found: Spread | None
    is_met: bool | None


def verdicts(results: Results) -> list[Verdict]:
    """All targets of the workloads that were measured."""
    measured = {sample.workload for sample in results.samples}
    return [
        Verdict(
            workload=target.workload, what=target.what, bound=target.bound, unit=target.unit,
            found=(found := Spread.of(target.values(results))), is_met=target.is_met(found.median) if found else None,
        )
        for target in TARGETS if target.workload in measured
    ]  # fmt: skip


def to_best_peer(workload: str) -> Values:
    """The rate through that of the peer with the best median."""

    def values(results: Results) -> Sequence[float]:
        peers = results.peers(workload)
        return results.ratios(workload, OWN, peers[0]) if peers else []

    return values


def _flush_to_best_peer(results: Results) -> Sequence[float]:
    """Of w5: the rate until `flush` returns. All is settled then, and the checkpoint that says so comes soon after."""
    peers = results.peers("w5")
    flushed = results.values("w5", OWN, "flush_rate")
    theirs = results.values("w5", peers[0], "rate") if peers else {}
    return [flushed[turn] / theirs[turn] for turn in sorted(flushed.keys() & theirs.keys())]


def to_raw(workload: str, figure: str = "rate") -> Values:
    """A figure through that of the raw disk."""
    return lambda results: results.ratios(workload, OWN, RAW, figure=figure)


def _to_lmdb(results: Results) -> Sequence[float]:
    return results.ratios("w7", OWN, "lmdb")


def _backlogs(results: Results, suffix: str) -> list[str]:
    """The stores of w8, the smallest first."""
    names = [name for name in results.measured("w8") if name.endswith(suffix)]
    return sorted(names, key=lambda name: int(name.split()[0].replace(",", "")))


def _largest_open(figure: str) -> Values:
    def values(results: Results) -> Sequence[float]:
        stores = _backlogs(results, "pending")
        return list(results.values("w8", stores[-1], figure).values()) if stores else []

    return values


def _open_growth(results: Results) -> Sequence[float]:
    stores = _backlogs(results, "pending")
    return results.ratios("w8", stores[-1], stores[0], figure="open_s") if len(stores) > 1 else []


def _drain_memory(results: Results) -> Sequence[float]:
    stores = _backlogs(results, "drained")
    return list(results.values("w8", stores[-1], "drain_rss_mib").values()) if stores else []


def _kept(ailment: str) -> Values:
    return lambda results: results.ratios("w10", ailment, "healthy")


def _figure(workload: str, subject: str, figure: str) -> Values:
    return lambda results: list(results.values(workload, subject, figure).values())


TARGETS: Final = (
    Target(workload="w1", what="rate to the best peer", at_least=1.0, values=to_best_peer("w1")),
    Target(workload="w1", what="p50 latency to a raw append", at_most=1.0, values=to_raw("w1", "p50_us")),
    Target(workload="w2", what="rate to the best peer", at_least=1.5, values=to_best_peer("w2")),
    Target(workload="w3", what="rate to raw", at_least=0.75, values=to_raw("w3")),
    Target(workload="w3", what="rate to the best peer", at_least=1.2, values=to_best_peer("w3")),
    Target(workload="w4", what="rate to raw, incompressible", at_least=0.9, values=to_raw("w4")),
    Target(workload="w4c", what="rate to raw, text", at_least=1.0, values=to_raw("w4c")),
    Target(workload="w5", what="rate to the best peer", at_least=2.0, values=to_best_peer("w5")),
    Target(workload="w5", what="the same, until flush returns", at_least=2.0, values=_flush_to_best_peer),
    Target(workload="w6", what="rate to raw groups of 1,000", at_least=0.15, values=to_raw("w6")),
    Target(workload="w7", what="rate to LMDB putmulti of the same groups", at_least=0.5, values=_to_lmdb),
    Target(workload="w8", what="opening the largest backlog", at_most=0.3, unit="s", values=_largest_open("open_s")),
    Target(
        workload="w8", what="the same after a kill", at_most=0.3, unit="s", values=_largest_open("killed_open_s")
    ),
    Target(workload="w8", what="opening the largest to opening the smallest", at_most=1.5, values=_open_growth),
    Target(workload="w8", what="peak memory of draining the largest", at_most=150, unit="MiB", values=_drain_memory),
    Target(workload="w10", what="healthy lanes beside one that hangs", at_least=0.9, values=_kept("hanging")),
    Target(workload="w10", what="healthy lanes beside one that fails", at_least=0.9, values=_kept("failing")),
    Target(
        workload="disk", what="bytes on disk to bytes of payload", at_most=1.06,
        values=_figure("disk", "walbatch", "allocated_ratio"),
    ),
    Target(
        workload="start", what="import walbatch, beyond bare Python", at_most=80, unit="ms",
        values=_figure("start", "import", "over_bare_ms"),
    ),
    Target(
        workload="start", what="the same with Engine and Lane", at_most=80, unit="ms",
        values=_figure("start", "engine", "over_bare_ms"),
    ),
    Target(workload="start", what="walbatch --help", at_most=300, unit="ms", values=_figure("start", "help", "ms")),
)  # fmt: skip
