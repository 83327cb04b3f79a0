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
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    return path


def _trace(pyplot: Any, path: Path, effort: Effort) -> Path:
    """The sizes of one run, over its batches and over its cost curve."""
    scenario = next(scenario for scenario in SCENARIOS if scenario.name == TRACE_SCENARIO)
    world = World(scenario, TRACE_WORLD, effort.batches)
    sizes = run_world(scenario, "surface", effort, TRACE_WORLD).sizes
    best = world.best_now()
    span = [best * 2 ** (step / 8) for step in range(-40, 17)]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(8.4, 3.0), sharey=True, gridspec_kw={"width_ratios": [3, 1]}, layout="constrained"
    )
    left.plot(range(1, len(sizes) + 1), sizes, ".", markersize=2, color=LINE)
    left.axhline(best, color=INK, linewidth=0.8, linestyle="--")
    left.set(xscale="log", yscale="log", xlabel="batch", ylabel="operations in the batch")
    right.plot([world.curves[0].cost(size) / world.curves[0].cost(best) for size in span], span, color=INK)
    right.axhline(best, color=INK, linewidth=0.8, linestyle="--")
    right.set(xscale="log", xlabel="cost of an operation, best = 1", ylim=(span[0], span[-1]))
    return _save(pyplot, figure, path)


def _regrets(pyplot: Any, path: Path, scores: Sequence[Score]) -> Path:
    """All regrets of each scenario, as dots on a line, with the median."""
    own = [found for found in scores if found.controller == "surface"][::-1]
    figure, axes = pyplot.subplots(figsize=(8.4, 0.27 * len(own) + 0.9), layout="constrained")
    for row, found in enumerate(own):
        shown = [max(regret, 1e-4) * 100 for regret in found.regrets]
        axes.plot(shown, [row] * len(shown), "|", color=LINE, alpha=0.4, markersize=9)
        axes.plot([max(found.regret_median, 1e-4) * 100], [row], "o", color=INK, markersize=4)
        axes.plot([max(found.regret_p90, 1e-4) * 100], [row], "D", color=INK, markersize=3)
    axes.set(
        xscale="log", xlabel="regret in %, one line for each curve; dot: median, diamond: 90th percentile"
    )
    axes.set_yticks(range(len(own)), [found.scenario for found in own])
    axes.grid(axis="x", color=SOFT, linewidth=0.5)
    return _save(pyplot, figure, path)
