"""How the cost of an operation grows: `python tools/bench/growth.py` (about ten minutes; `--quick` one).

Each point is a process of its own: it submits operations to a lane that is paused, then delivers them to a function that does
nothing, and tells the CPU time and the rate of both, and the most memory that it has held. A curve changes one thing and leaves
the others as they are in `Load`. The points are gone through in turns, all of them in each round, in another order each time, so
that what else the machine does falls on all of them; medians are shown.

What is told beside each point is the exponent of the law that leads to it from the one before: cost of an operation ~ x^e. The
whole is linear where e is 0 (of payloads: 1), and quadratic one above that. What is steeper than linear is marked.

`--json FILE` keeps all measurements, `--plots FOLDER` draws them (needs matplotlib), `--from FILE` draws or shows old ones, and
`--write` puts the tables into docs/performance.md.
Figures depend on the machine and its disk; `--dir` says on which.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from walbatch.bench.place import work_place

MIB: Final = 2**20
GROUP_BYTES_MAX: Final = 4 * MIB
"""Payloads of one call of submit_many: larger ones come in smaller groups, as a program with such payloads would do it."""
TOTAL_BYTES_MAX: Final = 128 * MIB
"""Payloads of a point, where their size is what changes."""
DOCUMENT: Final = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
MARKED: Final = re.compile(r"(?P<start><!-- growth -->\n).*?(?P<end><!-- end of growth -->)", re.DOTALL)
WARM_BYTES: Final = 2**31
"""Of the page cache, touched before anything is measured: see `walbatch.bench.place`."""
DISTINCT: Final = 0
STEEP: Final = 0.2
"""How far above that of a linear growth an exponent must be to be marked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one point does."""

    count: int = 100_000
    payload_bytes: int = 256
    threads: int = 0
    """0: one thread, groups of `group`. Else so many threads, one operation a call."""
    group: int = 1_000
    shards: int = 1
    keys: int = DISTINCT
    flows: bool = False
    """Whether operations are delivered while others are submitted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one process found. CPU time is that of all its threads."""

    submit_cpu_us: float
    submit_rate: float
    drain_cpu_us: float
    """0 where both happened at once: then it is in the other."""
    drain_rate: float
    peak_mib: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One thing that changes."""

    title: str
    unit: str
    points: Mapping[int, Load]
    linear: float = 0.0
    """The exponent at which the whole is linear: 1 where an operation itself grows."""


def curves(*, quick: bool) -> dict[str, Curve]:
    """All of them. `quick`: fewer points, and smaller ones, to see whether they can be measured at all."""
    base = Load(count=20_000 if quick else 100_000)
    single = replace(base, count=2_000 if quick else 8_000, threads=1)
    counts = [10**4, 10**5] if quick else [10**4, 3 * 10**4, 10**5, 3 * 10**5, 10**6, 3 * 10**6, 10**7]
    sizes = [16, 4_096, MIB] if quick else [16, 64, 256, 1_024, 4_096, 16_384, 65_536, 262_144, MIB]
    threads = [1, 32] if quick else [1, 2, 4, 8, 16, 32, 64, 128, 256]
    shards = [1, 64] if quick else [1, 2, 4, 8, 16, 32, 64]
    keys = [1, 1_000, 0] if quick else [1, 10, 100, 1_000, 0]
    return {
        "operations": Curve(
            title="operations", unit="operations in all",
            points={count: replace(base, count=count, payload_bytes=64) for count in counts},
        ),
        "payloads": Curve(
            title="payloads", unit="bytes of a payload", linear=1.0,
            points={size: _sized(base, size) for size in sizes},
        ),
        "threads": Curve(
            title="threads", unit="threads, one operation a call",
            points={count: replace(single, threads=count) for count in threads},
        ),
        "shards": Curve(
            title="shards", unit="shards, groups of 1,000",
            points={count: replace(base, shards=count) for count in shards},
        ),
        "flow": Curve(
            title="shards, delivered one by one", unit="shards, 8 threads, delivery under way",
            points={count: replace(single, threads=8, shards=count, flows=True) for count in shards},
        ),
        "keys": Curve(
            title="keys", unit="keys (the last: all distinct)",
            points={count or 10_000: replace(base, keys=count, shards=4) for count in keys},
        ),
    }  # fmt: skip


def _sized(base: Load, size: int) -> Load:
    return replace(
        base, payload_bytes=size, count=max(16, min(base.count, TOTAL_BYTES_MAX // size)),
        group=max(1, min(base.group, GROUP_BYTES_MAX // size)),
    )  # fmt: skip


# --- one point -------------------------------------------------------------------------------------------------------


def peak_mib() -> float:
    """The most memory that this process has held."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) / 1024


@dataclass(slots=True)
class Stopwatch:
    """CPU time of the process and time of day since it was made."""

    cpu_s: float = 0.0
    wall_s: float = 0.0

    def __post_init__(self) -> None:
        self.cpu_s, self.wall_s = time.process_time(), time.perf_counter()

    def read(self, count: int) -> tuple[float, float]:
        """CPU microseconds an operation, and operations a second."""
        return (time.process_time() - self.cpu_s) * 1e6 / count, count / (time.perf_counter() - self.wall_s)


def groups_of(load: Load) -> Iterator[list[tuple[bytes, bytes]]]:
    """The operations, as they are submitted. Their payloads overlap, so nothing may compress them."""
    noise = os.urandom(load.payload_bytes + load.group)
    payloads = [noise[at : at + load.payload_bytes] for at in range(load.group)]
    for first in range(0, load.count, load.group):
        numbers = range(first, min(first + load.group, load.count))
        keys = [b"key-%d" % (number % load.keys if load.keys else number) for number in numbers]
        yield list(zip(keys, payloads, strict=False))


def measure(load: Load, folder: Path) -> Measured:
    """Submit and drain, in this process."""
    import walbatch as wb  # noqa: PLC0415 - the process that starts the others does without

    lanes = {"put": wb.Lane(lambda _: None, shards=load.shards)}
    with wb.Engine.open(folder / "store", lanes, settings=wb.Settings(compress_bytes_min=None)) as engine:
        if not load.flows:
            engine.pause("put")
        watch = Stopwatch()
        if load.threads:
            _submit_in_threads(engine, load)
            if load.flows:
                engine.flush("put", timeout=600)
        else:
            for group in groups_of(load):
                engine.submit_many("put", group)
        submit_cpu_us, submit_rate = watch.read(load.count)
        watch = Stopwatch()
        engine.resume("put")
        engine.flush("put", timeout=600)
        drain_cpu_us, drain_rate = (0.0, 0.0) if load.flows else watch.read(load.count)
        applied = engine.stats().lanes["put"].applied
    assert applied == load.count, f"{applied:,} of {load.count:,} were applied"
    return Measured(
        submit_cpu_us=submit_cpu_us, submit_rate=submit_rate, drain_cpu_us=drain_cpu_us, drain_rate=drain_rate, peak_mib=peak_mib()
    )  # fmt: skip


def _submit_in_threads(engine: Any, load: Load) -> None:
    payload = os.urandom(load.payload_bytes)

    def submit(own: int) -> None:
        for number in range(own, load.count, load.threads):
            engine.submit("put", key=b"key-%d" % number, payload=payload)

    threads = [threading.Thread(target=submit, args=(own,)) for own in range(load.threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def in_a_process(load: Load, folder: Path) -> Measured:
    """The same in a process of its own, in a folder of its own below `folder`."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="growth-") as own:
        done = subprocess.run(
            [sys.executable, __file__, "--point", json.dumps(asdict(load)), "--dir", own],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        sys.exit(f"{load} failed:\n{done.stderr}")
    return Measured(**json.loads(done.stdout))


# --- all points ------------------------------------------------------------------------------------------------------

Found = dict[str, dict[int, list[Measured]]]
"""By curve and by what changes: one for each round."""


def measure_all(wanted: Mapping[str, Curve], *, rounds: int, budget_s: float, folder: Path) -> Found:
    """Go through all points so many times, as long as there is time: the long ones are left out of later rounds first."""
    found: Found = {name: {x: [] for x in curve.points} for name, curve in wanted.items()}
    points = [(name, x, load) for name, curve in wanted.items() for x, load in curve.points.items()]
    took_s: dict[tuple[str, int], float] = {}
    until, share_s = time.monotonic() + budget_s, budget_s / len(points)
    order = random.Random(0)
    for round_ in range(rounds):
        order.shuffle(points)
        if took_s:  # the short ones first, in this order: what no longer fits is left out
            points.sort(key=lambda point: took_s[point[0], point[1]] > share_s)
        for name, x, load in points:
            if time.monotonic() + took_s.get((name, x), 0.0) > until and found[name][x]:
                continue
            started = time.monotonic()
            found[name][x].append(in_a_process(load, folder))
            took_s[name, x] = time.monotonic() - started
            print(
                f"  round {round_ + 1}: {name} {x:,} in {took_s[name, x]:.1f} s", file=sys.stderr, flush=True
            )
    return found


def median(measured: Sequence[Measured], field: str) -> float:
    return float(statistics.median(getattr(one, field) for one in measured))


def exponents(points: Mapping[int, Sequence[Measured]], field: str) -> list[float | None]:
    """For each point e, where the cost of an operation grows as x^e from the point before; None for the first."""
    xs = list(points)
    costs = [median(points[x], field) for x in xs]
    return [None] + [
        math.log(cost / before) / math.log(x / x_before) if cost > 0 and before > 0 else None
        for (x_before, before), (x, cost) in zip(
            zip(xs, costs, strict=True), list(zip(xs, costs, strict=True))[1:], strict=False
        )
    ]


def table(found: Found, wanted: Mapping[str, Curve]) -> Iterator[str]:
    """The medians of each curve, for people."""
    for name, points in found.items():
        linear = wanted[name].linear
        yield f"\n{name}"
        yield f"{'':>12} {'submit us':>10} {'x^e':>6} {'op/s':>12} {'drain us':>10} {'x^e':>6} {'op/s':>12} {'peak MiB':>9}"
        rows = zip(points, exponents(points, "submit_cpu_us"), exponents(points, "drain_cpu_us"), strict=True)
        for x, submit, drain in rows:
            one = points[x]
            yield (
                f"{x:>12,} {median(one, 'submit_cpu_us'):>10.2f} {_power(submit, linear):>6} {median(one, 'submit_rate'):>12,.0f} "
                f"{median(one, 'drain_cpu_us'):>10.2f} {_power(drain, linear):>6} {median(one, 'drain_rate'):>12,.0f} "
                f"{median(one, 'peak_mib'):>9.1f}"
            )


def filled(text: str, lines: Iterable[str]) -> str:
    """The text of a page with these lines between its marks."""
    shown = "\n".join(["```text", *lines, "```"]).replace("```text\n\n", "```text\n")
    return MARKED.sub(lambda match: f"{match['start']}{shown}\n{match['end']}", text)


def _power(exponent: float | None, linear: float) -> str:
    if exponent is None:
        return ""
    return f"{exponent:+.2f}{'!' if exponent >= linear + STEEP else ''}"


# --- pictures --------------------------------------------------------------------------------------------------------

ROWS: Final = (
    ("CPU time of an operation, us", ("submit_cpu_us", "drain_cpu_us")),
    ("operations a second", ("submit_rate", "drain_rate")),
    ("most memory held, MiB", ("peak_mib",)),
)
COLOURS: Final = {
    "submit_cpu_us": "#1f6f9f",
    "submit_rate": "#1f6f9f",
    "drain_cpu_us": "#c1622d",
    "drain_rate": "#c1622d",
}
INK: Final = "#333333"


def draw(found: Found, wanted: Mapping[str, Curve], folder: Path) -> list[Path]:
    """One picture of all curves, as PNG and SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "walbatch", "svg.fonttype": "none", "font.size": 8, "axes.spines.top": False, "axes.spines.right": False,
         "text.color": INK, "axes.edgecolor": INK}
    )  # fmt: skip
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    figure, grid = pyplot.subplots(
        len(ROWS),
        len(found),
        figsize=(2.5 * len(found), 6.6),
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for column, (name, points) in enumerate(found.items()):
        for row, (label, fields) in enumerate(ROWS):
            axes = grid[row][column]
            for field in fields:
                _line(axes, points, field)
            axes.set(xscale="log", yscale="log")
            axes.grid(color="#dde4e8", linewidth=0.5)
            if column == 0:
                axes.set_ylabel(label)
        grid[0][column].set_title(wanted[name].title, fontsize=9)
        grid[-1][column].set_xlabel(wanted[name].unit)
    for colour, text, y in ((COLOURS["submit_rate"], "submit", 0.95), (COLOURS["drain_rate"], "drain", 0.85)):
        grid[0][0].text(0.05, y, text, color=colour, transform=grid[0][0].transAxes, va="top")
    paths = [folder / "growth.png", folder / "growth.svg"]
    for path in paths:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=160)
    pyplot.close(figure)
    return paths


def _line(axes: Any, points: Mapping[int, Sequence[Measured]], field: str) -> None:
    """The medians, and every measurement as a dot."""
    colour = COLOURS.get(field, INK)
    medians = {x: median(measured, field) for x, measured in points.items()}
    shown = {x: y for x, y in medians.items() if y > 0}
    axes.plot(list(shown), list(shown.values()), "-", color=colour, linewidth=1.2)
    dots = [(x, getattr(one, field)) for x in shown for one in points[x]]
    axes.plot([x for x, _ in dots], [y for _, y in dots], ".", color=colour, alpha=0.4, markersize=3)


# --- the command -----------------------------------------------------------------------------------------------------


def as_json(found: Found, *, quick: bool) -> str:
    rows = {
        name: {str(x): [asdict(one) for one in measured] for x, measured in points.items()}
        for name, points in found.items()
    }
    machine = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processors": os.cpu_count(),
    }
    return json.dumps({"machine": machine, "quick": quick, "curves": rows}, indent=1)


def from_json(text: str) -> Found:
    rows = json.loads(text)["curves"]
    return {
        name: {int(x): [Measured(**one) for one in measured] for x, measured in points.items()}
        for name, points in rows.items()
    }


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few small points, one round")
    parser.add_argument(
        "--rounds", type=int, default=None, help="how often every point is measured (3, quick: 1)"
    )
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="after that no point is measured again (10)"
    )
    parser.add_argument("--only", action="append", help="this curve alone; may be repeated")
    parser.add_argument(
        "--dir", type=Path, default=None, help="where the stores stand while they are measured"
    )
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="keep all measurements")
    parser.add_argument(
        "--plots", type=Path, default=None, metavar="FOLDER", help="draw growth.png and growth.svg"
    )
    parser.add_argument(
        "--from", dest="source", type=Path, default=None, metavar="FILE", help="measure nothing: read this"
    )
    parser.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    parser.add_argument("--point", default=None, help=argparse.SUPPRESS)
    chosen = parser.parse_args(None if arguments is None else list(arguments))
    if chosen.point is not None:
        print(json.dumps(asdict(measure(Load(**json.loads(chosen.point)), chosen.dir))))
        return
    all_curves = curves(quick=chosen.quick)
    unknown = set(chosen.only or ()) - all_curves.keys()
    if unknown:
        parser.error(f"no curve is named {', '.join(sorted(unknown))}: there are {', '.join(all_curves)}")
    wanted = {name: curve for name, curve in all_curves.items() if not chosen.only or name in chosen.only}
    if chosen.source is not None:
        found = from_json(chosen.source.read_text(encoding="utf-8"))
    else:
        folder = chosen.dir or Path(tempfile.gettempdir())
        with work_place(folder) as place:
            place.warm_page_cache(0 if chosen.quick else WARM_BYTES)
        found = measure_all(
            wanted,
            rounds=chosen.rounds or (1 if chosen.quick else 3),
            budget_s=chosen.minutes * 60,
            folder=folder,
        )
    print("\n".join(table(found, all_curves)))
    if chosen.write:
        DOCUMENT.write_text(
            filled(DOCUMENT.read_text(encoding="utf-8"), table(found, all_curves)), encoding="utf-8"
        )
    if chosen.json is not None:
        chosen.json.write_text(as_json(found, quick=chosen.quick), encoding="utf-8")
    if chosen.plots is not None:
        print("\n".join(str(path) for path in draw(found, all_curves, chosen.plots)))


if __name__ == "__main__":
    main()
