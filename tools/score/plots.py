"""The pictures of docs/batching.md. Needs matplotlib, which nothing else here does."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.score.series import Effort, Score, run_world
from tools.score.worlds import SCENARIOS, World

TRACE_SCENARIO = "knee, 20 % noise"
TRACE_WORLD = 4
COST_SHOWN_MAX = 3.0
PERCENT_SHOWN_MIN = 0.01
"""Regrets below are drawn here: the axis is logarithmic, and the luck of the draw makes some of them negative."""
INK, LINE, SOFT = "#333333", "#1f6f9f", "#b9c7d0"


def draw(folder: Path, scores: Sequence[Score], effort: Effort) -> list[Path]:
    """Write all pictures into `folder`, and say which."""
    folder.mkdir(parents=True, exist_ok=True)
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "walbatch", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False,
         "axes.spines.right": False, "text.color": INK, "axes.edgecolor": INK}
    )  # fmt: skip
    pyplot = importlib.import_module("matplotlib.pyplot")
    return [
        _trace(pyplot, folder / "controller-trace.svg", effort),
        _regrets(pyplot, folder / "controller-regret.svg", scores),
    ]


def _save(pyplot: Any, figure: Any, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None, "Creator": None}, dpi=200)
    pyplot.close(figure)
    return path


def _trace(pyplot: Any, path: Path, effort: Effort) -> Path:
    """The sizes of one run, over its batches and beside its cost curve."""
    scenario = next(scenario for scenario in SCENARIOS if scenario.name == TRACE_SCENARIO)
    world = World(scenario, TRACE_WORLD, effort.batches)
    sizes = run_world(scenario, "surface", effort, TRACE_WORLD).sizes
    best = world.best_now()
    low, high = min(sizes) * 0.8, max(sizes) * 1.25
    span = [low * (high / low) ** (step / 200) for step in range(201)]
    costs = [world.curves[0].cost(size) / world.curves[0].cost(best) for size in span]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(8.4, 3.2), sharey=True, gridspec_kw={"width_ratios": [3, 1]}, layout="constrained"
    )
    left.plot(range(1, len(sizes) + 1), sizes, ".", markersize=2.5, color=LINE, rasterized=True)
    left.set(xscale="log", yscale="log", xlabel="batch", ylabel="operations in the batch", ylim=(low, high))
    left.text(1, best * 1.06, f"best fixed size: {best:,}", va="bottom", color=INK)
    right.plot(costs, span, color=INK)
    right.set(xlabel="cost of an operation, best = 1", xlim=(0.9, COST_SHOWN_MAX))
    for axes in (left, right):
        axes.axhline(best, color=INK, linewidth=0.8, linestyle="--")
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_formatter("{x:,.0f}")
    return _save(pyplot, figure, path)


def _regrets(pyplot: Any, path: Path, scores: Sequence[Score]) -> Path:
    """All regrets of each scenario, as strokes in a row, with the median."""
    own = [found for found in scores if found.controller == "surface"][::-1]
    figure, axes = pyplot.subplots(figsize=(8.4, 0.25 * len(own) + 0.9), layout="constrained")
    for row, found in enumerate(own):
        shown = [max(regret * 100, PERCENT_SHOWN_MIN) for regret in found.regrets]
        axes.plot(shown, [row] * len(shown), "|", color=LINE, alpha=0.5, markersize=8, rasterized=True)
        axes.plot([max(found.regret_median * 100, PERCENT_SHOWN_MIN)], [row], "o", color=INK, markersize=4.5)
        axes.plot([max(found.regret_p90 * 100, PERCENT_SHOWN_MIN)], [row], "D", color=INK, markersize=4)
    axes.set(
        xscale="log", xlabel="regret in % (a stroke for each curve; dot: median, diamond: 90th percentile)"
    )
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(own)), [found.scenario for found in own])
    axes.grid(axis="x", color=SOFT, linewidth=0.5)
    return _save(pyplot, figure, path)
