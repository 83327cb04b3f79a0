"""The figures of a run, as text and as the tables of docs/testing.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tools.modes import mutants
from tools.modes.tally import Tally

BEGIN: Final = "<!-- figures of tools/torture.py: begin -->"
END: Final = "<!-- figures of tools/torture.py: end -->"

INCOMPLETE: Final = "not all of it: the time was over first"

TITLES: Final[Mapping[str, str]] = {
    "corpus": "Failures of earlier runs, replayed",
    "images": "Simulated crash images",
    "seeded": "Seeded random runs",
    "faults": "Failing calls, simulated",
    "schedules": "Thread schedules",
    "bitrot": "Bit rot",
    "kill": "kill -9",
    "powercut": "Power cuts on real file systems",
    "fulldisk": "Full disks (tmpfs)",
    "syscalls": "Failing system calls (preloaded library)",
    "mutants": "Mutants",
}


def text(tallies: Mapping[str, Tally], seconds: float) -> str:
    """For the terminal."""
    lines = []
    for mode, title in TITLES.items():
        tally = tallies.get(mode)
        if tally is None:
            continue
        notes = [f"skipped: {tally.skipped}"] * bool(tally.skipped) + [INCOMPLETE] * (not tally.complete)
        lines.append(": ".join([title, *notes]))
        lines += [f"  {name:<55} {count:>14,}" for name, count in sorted(tally.figures.items())]
    failures = sum(tally.figures["failures"] for tally in tallies.values())
    lines.append(f"{failures:,} failures in {seconds / 60:.1f} minutes")
    return "\n".join(lines)


def markdown(tallies: Mapping[str, Tally], *, command: str, seconds: float, where: str) -> str:
    """The section of docs/testing.md."""
    lines = [f"`{command}`: {seconds / 60:.0f} minutes, {where}.", "", "| what | figure | |", "|---|---|---|"]
    for mode, title in TITLES.items():
        tally = tallies.get(mode)
        if tally is None:
            continue
        if tally.skipped:
            lines.append(f"| {title} | skipped | {tally.skipped} |")
        for name, count in sorted(tally.figures.items()):
            if name != "failures" or count:
                lines.append(f"| {title} | {name} | {count:,} |")
        if not tally.complete:
            lines.append(f"| {title} | {INCOMPLETE} | |")
        if not tally.figures["failures"] and not tally.skipped:
            lines.append(f"| {title} | **failures** | **0** |")
    images = tallies.get("images")
    if images is not None:
        lines += [
            "",
            "Crash states by the call at which the process ended:",
            "",
            *_counts(images.cells, "cut at "),
        ]
    for mode in ("faults", "syscalls"):
        tally = tallies.get(mode)
        if tally is not None and tally.cells:
            lines += ["", f"{TITLES[mode]}, visits by place and error:", "", *_matrix(tally.cells)]
    if "mutants" in tallies:
        lines += ["", mutants.table(tallies["mutants"])]
    return "\n".join(lines)


def write(path: Path, section: str) -> None:
    """Replace what stands between the two marks in the file."""
    content = path.read_text(encoding="utf-8")
    before, found, rest = content.partition(BEGIN)
    _, ends, after = rest.partition(END)
    if not found or not ends:
        raise SystemExit(f"{path} has no place for the figures: it needs the lines {BEGIN} and {END}")
    path.write_text(f"{before}{BEGIN}\n\n{section}\n\n{END}{after}", encoding="utf-8")


def _counts(cells: Mapping[str, int], prefix: str) -> list[str]:
    rows = [(name.removeprefix(prefix), count) for name, count in cells.items() if name.startswith(prefix)]
    rows.sort(key=lambda row: -row[1])
    return ["| call | states |", "|---|---|", *(f"| {name} | {count:,} |" for name, count in rows)]


def _matrix(cells: Mapping[str, int]) -> list[str]:
    """Cells are "place|error|how"; the counts of all hows add up."""
    table: dict[str, Counter[str]] = {}
    for cell, count in cells.items():
        place, error, *_ = cell.split("|")
        table.setdefault(place, Counter())[error] += count
    errors = sorted({error for row in table.values() for error in row})
    lines = [f"| place | {' | '.join(errors)} |", "|---" * (len(errors) + 1) + "|"]
    for place, row in sorted(table.items()):
        lines.append(
            f"| {place} | " + " | ".join(f"{row[error]:,}" if row[error] else "" for error in errors) + " |"
        )
    return lines
