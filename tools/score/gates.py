"""What the controller must score, or the build fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tools.score.series import Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """One figure of one scenario, and the most it may be."""

    scenario: str
    figure: str
    most: float

    def __str__(self) -> str:
        return f"{self.scenario}: {self.figure} <= {self.most:g}"


GATES = [
    *(
        Gate(scenario=scenario, figure=figure, most=most)
        for scenario in ("knee, no noise", "knee, 10 % noise", "knee, 20 % noise", "under-filled by time")
        for figure, most in (("regret_median", 0.02), ("regret_p90", 0.05), ("stuck", 0))
    ),
    Gate(scenario="knee, 50 % noise", figure="regret_median", most=0.04),
    Gate(scenario="knee, 50 % noise", figure="regret_p90", most=0.10),
    Gate(scenario="drift", figure="regret_median", most=0.05),
    Gate(scenario="latency-bound", figure="violations", most=0.05),
    *(
        Gate(scenario=scenario, figure="stuck", most=0)
        for scenario in (
            "knee, 50 % noise",
            "under-filled by bytes",
            "drift",
            "growing table",
            "latency-bound",
            "stalls by bytes",
        )
    ),
]
COST_US_MAX = 15.0


def broken(scores: Mapping[str, Score]) -> list[str]:
    """The gates that do not hold, from the scores by scenario; each with its figure."""
    return [
        f"{gate}: is {getattr(scores[gate.scenario], gate.figure):.4g}"
        for gate in GATES
        if not getattr(scores[gate.scenario], gate.figure) <= gate.most
    ]
