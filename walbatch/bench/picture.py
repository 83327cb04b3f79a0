"""Draws the whole at a glance: every workload a row, every subject a mark, on one logarithmic scale.

What is not here: figures; they stand in the tables. Needs matplotlib, which nothing else here does.

The idea needed to read it: the raw disk is 1 in every row, so rows of different units share an axis, and the distance to the disk
is what the eye measures. Colours are of medium lightness and the ground is clear, so it reads on a light page and on a dark one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from walbatch.bench.results import Results, Spread, WorkloadNote
from walbatch.bench.subject import load
from walbatch.bench.table import COMPARED, number
from walbatch.bench.targets import OWN, RAW, TARGETS

INK: Final = "#7a8490"
SOFT: Final = "#9aa5b1"
OWN_COLOUR: Final = "#e0632f"
RAW_COLOUR: Final = "#4a90d9"
TARGET_COLOUR: Final = "#2fa36b"
BEST_COLOUR: Final = "#8a6fd8"
NAMES: Final = ("walbatch-bench.png", "walbatch-bench.svg")
ROW_INCHES: Final = 0.62
"""Of height."""
DPI: Final = 200


def draw(results: Results, folder: Path) -> list[Path]:
    """Write the picture as PNG and as SVG, and say where; nothing if nothing was compared."""
    rows = [
        note
        for note in results.workloads
        if note.name in COMPARED and results.spread(note.name, OWN) is not None
    ]
    if not rows:
        return []
    matplotlib = load("matplotlib")
    matplotlib.use("agg")
    style = {
        "svg.hashsalt": "walbatch",
        "svg.fonttype": "none",
        "font.size": 9,
        "text.color": INK,
        "font.family": "sans-serif",
    }
    with matplotlib.rc_context(style):
        pyplot = load("matplotlib.pyplot")
        figure, axes = pyplot.subplots(figsize=(10.4, 1.3 + ROW_INCHES * len(rows)), layout="constrained")
        for place, note in enumerate(rows):
            _draw_row(axes, results, note, len(rows) - place)
        _finish(axes, rows)
        paths = [folder / name for name in NAMES]
        for path in paths:
            metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else None
            figure.savefig(path, dpi=DPI, transparent=True, metadata=metadata)
        pyplot.close(figure)
    return paths


def _draw_row(axes: Any, results: Results, note: WorkloadNote, height: float) -> None:
    measure = _measure_of(results, note)
    rates = {
        name: ratio.median
        for name in results.measured(note.name)
        if (ratio := Spread.of(results.ratios(note.name, name, measure))) is not None
    }
    if OWN not in rates:
        return
    others = {name: rate for name, rate in rates.items() if name not in {OWN, RAW}}
    roles = {subject.name: subject for subject in results.subjects}
    peers = {name: rate for name, rate in others.items() if (subject := roles.get(name)) and subject.is_peer}
    rest = {name: rate for name, rate in others.items() if name not in peers}
    ends = [min(rates.values()), max(rates.values())]
    axes.plot(ends, [height] * 2, color=SOFT, linewidth=0.8, alpha=0.5, zorder=1)
    axes.plot(list(peers.values()), [height] * len(peers), "o", color=SOFT, markersize=6, zorder=2)
    open_dot = {"markerfacecolor": "none", "markeredgecolor": SOFT, "markersize": 6}
    axes.plot(list(rest.values()), [height] * len(rest), "o", zorder=2, **open_dot)
    for at in _bounds(results, note, rates[OWN]):
        axes.plot([at], [height + 0.24], "v", color=TARGET_COLOUR, markersize=7, zorder=3)
    if RAW in rates:
        axes.plot([rates[RAW]], [height], "|", color=RAW_COLOUR, markersize=20, markeredgewidth=3, zorder=3)
    axes.plot([rates[OWN]], [height], "o", color=OWN_COLOUR, markersize=11, zorder=4)
    own = results.spread(note.name, OWN)
    assert own is not None
    axes.annotate(
        f"{_short(own.median)} {note.unit}", (rates[OWN], height), (0, -15), textcoords="offset points", ha="center",
        color=OWN_COLOUR, fontweight="bold", fontsize=8.5,
    )  # fmt: skip
    if ranked := [name for name in results.peers(note.name) if name in peers]:
        best = ranked[0]
        ratio = Spread.of(results.ratios(note.name, OWN, best))
        axes.plot([peers[best]], [height], "o", color=BEST_COLOUR, markersize=7.5, zorder=3)
        axes.text(
            1.015, height, f"{number(ratio.median)}x {best}" if ratio else best, transform=axes.get_yaxis_transform(),
            va="center", fontsize=9, color=BEST_COLOUR,
        )  # fmt: skip


def _measure_of(results: Results, note: WorkloadNote) -> str:
    """Who is 1 on the axis: the raw disk, else the best of the others, else walbatch itself."""
    measured = results.measured(note.name)
    if RAW in measured:
        return RAW
    medians = {
        name: spread.median
        for name in measured
        if name != OWN and (spread := results.spread(note.name, name)) is not None
    }
    return max(medians, key=lambda name: medians[name], default=OWN)


def _bounds(results: Results, note: WorkloadNote, own: float) -> Sequence[float]:
    """Where on the axis walbatch, which is at `own`, would just meet all targets; nothing where there are none."""
    found = [
        own * target.at_least / ratio.median
        for target in TARGETS
        if target.workload == note.name
        and target.at_least is not None
        and (ratio := Spread.of(target.values(results))) is not None
    ]
    return [max(found)] if found else []


def _finish(axes: Any, rows: Sequence[WorkloadNote]) -> None:
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows), 0, -1), [f"{note.title}  {note.name}" for note in rows])
    axes.set_ylim(0.3, len(rows) + 0.7)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.tick_params(which="both", colors=INK, length=0)
    axes.text(
        1.015, len(rows) + 0.62, "walbatch to\nthe best peer", transform=axes.get_yaxis_transform(), va="bottom",
        fontsize=8, color=BEST_COLOUR,
    )  # fmt: skip
    axes.grid(visible=True, axis="x", color=SOFT, alpha=0.25, linewidth=0.6)
    axes.axvline(1, color=RAW_COLOUR, linewidth=0.8, alpha=0.6, zorder=0)
    axes.set_xlabel(
        "throughput (faster to the right); the raw disk is 1, or the best of the others where it has no part",
        color=INK,
    )
    for spine in axes.spines.values():
        spine.set_visible(False)
    marks = [
        ("o", OWN_COLOUR, OWN_COLOUR, 9, "walbatch"),
        ("|", RAW_COLOUR, RAW_COLOUR, 13, "raw write + sync"),
        ("o", SOFT, SOFT, 6, "durable peers"),
        ("o", BEST_COLOUR, BEST_COLOUR, 7.5, "the best of them"),
        ("o", "none", SOFT, 6, "not durable, or a bound"),
        ("v", TARGET_COLOUR, TARGET_COLOUR, 7, "target"),
    ]
    for marker, face, edge, size, label in marks:
        axes.plot([], [], marker, markerfacecolor=face, markeredgecolor=edge, markersize=size, label=label,
                  markeredgewidth=3 if marker == "|" else 1, linestyle="none")  # fmt: skip
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.26, 1.0), ncols=len(marks), frameon=False, fontsize=8, handletextpad=0.2,
        columnspacing=1.4,
    )  # fmt: skip


def _short(value: float) -> str:
    """A rate in three digits."""
    for scale, suffix in ((1e6, " M"), (1e3, " k")):
        if value >= scale:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.3g}"
