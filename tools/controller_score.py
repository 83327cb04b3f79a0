"""How far the size controller is from the best fixed size: `python tools/controller_score.py [--quick] [--json]`.

Runs the scenarios of tools/score/worlds.py in virtual time, with fixed seeds, with the controller, a latency AIMD and a fixed
size, and prints regrets, violations of latency targets, and what a batch costs in CPU. Exit code 1 if a gate (tools/score/gates.py)
does not hold. --real measures SQLite, LMDB and a file with fsync on this machine instead; --plots draws the pictures of
docs/batching.md (needs matplotlib).
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.score.gates import COST_US_MAX, GATES, broken
from tools.score.plots import draw
from tools.score.real import STORES, Real, measure
from tools.score.series import FULL, MAKERS, QUICK, Effort, Score, cost_us, score
from tools.score.worlds import SCENARIOS

COLUMNS = [
    "scenario", "median", "90 %", "max", "from the first batch", "within 5 % after batches: median, 90 %",
    "over the target", "stuck", "AIMD: median, 90 %", "fixed 500: median, 90 %",
]  # fmt: skip
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "batching.md"
COST_SCENARIOS = ["knee, 20 % noise", "latency-bound"]


def main() -> None:
    arguments = parse_arguments()
    if arguments.real:
        sys.exit(run_real(arguments))
    sys.exit(run_virtual(arguments))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer worlds and batches: what the tests run")
    parser.add_argument("--scenario", help="only those whose name contains this; no gates then")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the pictures into this folder")
    parser.add_argument("--write", action="store_true", help="put the table into docs/batching.md")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default %(default)s)")
    parser.add_argument("--real", action="store_true", help="measure real storage instead")
    parser.add_argument("--turns", type=int, default=120, help="of --real, 0.25 s each (default %(default)s)")
    parser.add_argument("--dir", type=Path, help="of --real: where to write (default: a temporary folder)")
    return parser.parse_args()


def run_virtual(arguments: argparse.Namespace) -> int:
    """Print the scores; 1 if a gate does not hold."""
    effort = QUICK if arguments.quick else FULL
    chosen = [found for found in SCENARIOS if not arguments.scenario or arguments.scenario in found.name]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        running = [pool.submit(score, scenario, name, effort) for scenario in chosen for name in MAKERS]
        scores = [future.result() for future in running]
    costs = costs_us(effort)
    problems = (
        [] if arguments.scenario else broken({s.scenario: s for s in scores if s.controller == "surface"})
    )
    problems += [
        f"CPU, {name}: {cost:.1f} us, must be <= {COST_US_MAX:g}"
        for name, cost in costs.items() if cost > COST_US_MAX
    ]  # fmt: skip
    if arguments.plots is not None:
        for path in draw(arguments.plots, scores, effort):
            print(f"drawn: {path}", file=sys.stderr)
    if arguments.write:
        write("score", [*table(scores, effort), "", cost_line(costs)])
    if arguments.json:
        found = {"effort": asdict(effort), "scores": [asdict(one) for one in scores], "cost_us": costs}
        print(json.dumps(found | {"broken": problems}, indent=1))
    else:
        print("\n".join(table(scores, effort)))
        print(f"\n{cost_line(costs)}")
        print(f"{len(GATES)} gates, {len(problems)} broken")
    for problem in problems:
        print(f"BROKEN: {problem}", file=sys.stderr)
    return 1 if problems else 0


def cost_line(costs: dict[str, float]) -> str:
    """The costs as a sentence."""
    shown = ", ".join(f"{cost:.1f} us ({name})" for name, cost in costs.items())
    return f"CPU of one `target` and one `observe`: {shown}."


def write(mark: str, lines: Sequence[str]) -> None:
    """Replace what stands between two marks in docs/batching.md, and nothing else."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, start, rest = text.partition(f"<!-- {mark} -->\n")
    _, end, after = rest.partition(f"<!-- end of {mark} -->\n")
    if not start or not end:
        raise ValueError(f"{DOCUMENT.name} has no part between the marks of {mark!r}")
    DOCUMENT.write_text(before + start + "\n".join(["", *lines, "", ""]) + end + after, encoding="utf-8")


def costs_us(effort: Effort) -> dict[str, float]:
    """What the controller costs in two scenarios."""
    few = Effort(worlds=5, batches=effort.batches, warm_up=effort.warm_up)
    return {found.name: cost_us(found, few) for found in SCENARIOS if found.name in COST_SCENARIOS}


def table(scores: Sequence[Score], effort: Effort) -> list[str]:
    """The scores as Markdown: as they stand in docs/batching.md."""
    lines = [
        f"{effort.worlds} curves for each scenario, {effort.batches:,} batches on each, the first {effort.warm_up} as warm-up.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    for own in (found for found in scores if found.controller == "surface"):
        others = {found.controller: found for found in scores if found.scenario == own.scenario}
        late = f"{own.violations:.1%}" if own.scenario.startswith("latency") else "-"
        lines.append(
            f"| {own.scenario} | {own.regret_median:.1%} | {own.regret_p90:.1%} | {own.regret_max:.1%} "
            f"| {own.regret_whole_median:.1%} | {own.within_median:,.0f}, {own.within_p90:,.0f} | {late} | {own.stuck} "
            f"| {pair(others['aimd'])} | {pair(others['fixed'])} |"
        )
    return lines


def pair(found: Score) -> str:
    """Median and 90th percentile; regrets of a controller that never delivers are infinite."""
    shown = [
        f"{value:,.0%}" if value < 100 else "> 10,000%" for value in (found.regret_median, found.regret_p90)
    ]
    return ", ".join(shown)


def run_real(arguments: argparse.Namespace) -> int:
    """Print what real storage says."""
    with tempfile.TemporaryDirectory(dir=arguments.dir, prefix="controller-score-") as folder:
        found = [measure(name, Path(folder), arguments.turns) for name in STORES]
    if arguments.write:
        write("real", real_table(found))
    if arguments.json:
        print(json.dumps([asdict(real) for real in found], indent=1))
    else:
        print("\n".join(real_table(found)))
    return 0


def real_table(found: Sequence[Real]) -> list[str]:
    """As Markdown."""
    lines = [
        "| store | to best fixed size, standard error | from the first batch | lead at the end | best fixed size | operations/s |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {real.store} | {real.ratio:.3f}, {real.error:.3f} | {real.ratio_whole:.3f} | {real.lead_count:,} | {real.best_count:,} "
        f"| {real.operations_s:,.0f} |"
        for real in found
    ]
    return lines


if __name__ == "__main__":
    main()
