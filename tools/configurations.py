"""What the three configurations of docs/configuration.md come to: `python tools/configurations.py`.

Each is run as the page has it, and so is the default, under the same load in the same run: on real LMDB, and on a function that
takes its time as a service elsewhere would. A backlog that is submitted as fast as submit allows tells throughput and memory; a
steady flow tells how long an operation takes from its submission until it is applied. Printed are medians over rounds that take
turns, and ratios to the default.

Figures depend on the machine and its disk: compare the ratios, and run it where you will run walbatch.
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

import walbatch as wb

ROOT: Final = Path(__file__).resolve().parent.parent
PAGE: Final = ROOT / "docs" / "configuration.md"
DEFAULT: Final = "default"
CONFIGURATIONS: Final = (DEFAULT, "throughput", "latency", "memory")
BACKENDS: Final = ("lmdb", "slow function")

PAYLOAD_BYTES: Final = 1024
GROUP_COUNT: Final = 100
PRODUCERS: Final = 2
BACKLOG_COUNT: Final = 100_000
STEADY_PER_S: Final = 1_000
STEADY_S: Final = 6.0
CALL_S: Final = 0.010
EACH_S: Final = 0.00005
"""The slow function: 10 ms for a call, and 50 us for each operation."""
SAMPLE_S: Final = 0.005
_STAMP: Final = struct.Struct("<q")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one run came to."""

    throughput: float
    """Operations of the backlog applied in a second."""
    p50_ms: float
    p99_ms: float
    """From submission until applied, in the steady flow."""
    memory_mib: float
    """What the backlog added to the process at its peak."""
    count: float
    """Operations in a batch of the backlog."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--rounds", type=int, default=3, help="runs of each configuration (default %(default)s)"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="part of the load, for a quick look (default %(default)s)"
    )
    parser.add_argument(
        "--dir", default=None, help="folder on the disk to measure (default: a temporary one)"
    )
    parser.add_argument("--one", nargs=2, metavar=("CONFIGURATION", "BACKEND"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        configuration, backend = arguments.one
        figures = run(configuration, backend, Path(arguments.dir), scale=arguments.scale)
        print(json.dumps({name: getattr(figures, name) for name in Figures.__dataclass_fields__}))
        return
    if arguments.rounds < 1 or not 0 < arguments.scale <= 100:
        parser.error("--rounds must be at least 1, and --scale above 0")
    for backend in BACKENDS:
        compare(backend, arguments.rounds, arguments.scale, arguments.dir)


def compare(backend: str, rounds: int, scale: float, folder: str | None) -> None:
    """Run every configuration in turn, and print a table."""
    runs: dict[str, list[Figures]] = {name: [] for name in CONFIGURATIONS}
    for _ in range(rounds):
        for name in CONFIGURATIONS:
            with tempfile.TemporaryDirectory(dir=folder, prefix="configurations-") as work:
                command = [
                    sys.executable,
                    __file__,
                    "--dir",
                    work,
                    "--scale",
                    str(scale),
                    "--one",
                    name,
                    backend,
                ]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[name].append(Figures(**json.loads(done.stdout)))
    base = median(runs[DEFAULT])
    print(f"\n{backend}: medians of {rounds} runs, and ratios to the default\n")
    print(
        "| configuration | operations/s | p50 until applied | p99 until applied | peak memory | in a batch |"
    )
    print("|---|---|---|---|---|---|")
    for name, found in runs.items():
        figures = median(found)
        cells = [
            f"{figures.throughput:,.0f} ({figures.throughput / base.throughput:.2f})",
            f"{figures.p50_ms:.1f} ms ({figures.p50_ms / base.p50_ms:.2f})",
            f"{figures.p99_ms:.1f} ms ({figures.p99_ms / base.p99_ms:.2f})",
            f"{figures.memory_mib:.0f} MiB ({figures.memory_mib / base.memory_mib:.2f})",
            f"{figures.count:,.0f}",
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def median(runs: Sequence[Figures]) -> Figures:
    return Figures(
        **{
            name: statistics.median(getattr(figures, name) for figures in runs)
            for name in Figures.__dataclass_fields__
        }
    )


# --- one run, in a process of its own ---------------------------------------------------------------------------------


def run(configuration: str, backend: str, folder: Path, *, scale: float) -> Figures:
    settings, lane = load(configuration, folder)
    delays: list[int] = []
    made = Stamped(str(folder / "applied"), delays) if backend == "lmdb" else slow_function(delays)
    lane = replace(lane, backend=made)
    throughput, memory_mib, count = backlog(folder / "backlog", settings, lane, scale=scale)
    if backend == "lmdb":
        lane = replace(lane, backend=Stamped(str(folder / "applied-steadily"), delays))
    delays.clear()
    steady(folder / "steady", settings, lane, scale=scale)
    delays.sort()
    return Figures(
        throughput=throughput, p50_ms=delays[len(delays) // 2] / 1e6, p99_ms=delays[len(delays) * 99 // 100] / 1e6,
        memory_mib=memory_mib, count=count,
    )  # fmt: skip


def load(configuration: str, folder: Path) -> tuple[wb.Settings, wb.Lane]:
    """Settings and lane of an example of the page, which is run up to where it opens an engine."""
    if configuration == DEFAULT:
        return wb.Settings(), wb.Lane(print)
    text = PAGE.read_text(encoding="utf-8")
    (example,) = re.findall(
        rf"^```python\n# {configuration}\.py\n(.*?)^with ", text, re.DOTALL | re.MULTILINE
    )
    path = folder / f"{configuration}.py"
    path.write_text(example, encoding="utf-8")
    names: dict[str, Any] = runpy.run_path(str(path))
    return names["settings"], names["lane"]


class Stamped(wb.LmdbBackend):
    """LMDB, noting how old an operation is when it has been applied."""

    def __init__(self, path: str, delays: list[int]) -> None:
        super().__init__(path)
        self._delays = delays

    def apply(self, batch: wb.Batch) -> Any:
        """Apply, then note."""
        answer = super().apply(batch)
        note(batch, self._delays)
        return answer


def slow_function(delays: list[int]) -> Callable[[wb.Batch], None]:
    def apply(batch: wb.Batch) -> None:
        time.sleep(CALL_S + EACH_S * len(batch))
        note(batch, delays)

    return apply


def note(batch: wb.Batch, delays: list[int]) -> None:
    now_ns = time.perf_counter_ns()
    delays.extend(now_ns - _STAMP.unpack_from(payload)[0] for payload in batch.payloads)


def operation(number: int) -> tuple[bytes, bytes]:
    """A key of its own, and a payload that says when it was submitted and does not compress well."""
    body = (number * 0x9E3779B97F4A7C15 % 2**64).to_bytes(8, "little") * ((PAYLOAD_BYTES - _STAMP.size) // 8)
    return b"key-%012d" % number, _STAMP.pack(time.perf_counter_ns()) + body


def backlog(
    folder: Path, settings: wb.Settings, lane: wb.Lane, *, scale: float
) -> tuple[float, float, float]:
    """Operations per second until all are applied, peak memory in MiB, and the size of batches."""
    groups = max(2, round(BACKLOG_COUNT * scale / GROUP_COUNT / PRODUCERS))
    with wb.Engine.open(folder, {"put": lane}, settings=settings) as engine, PeakMemory() as peak:
        started = time.perf_counter()

        def produce(producer: int) -> None:
            for group in range(groups):
                first = (producer * groups + group) * GROUP_COUNT
                engine.submit_many(
                    "put", [operation(first + index) for index in range(GROUP_COUNT)], timeout=None
                )

        threads = [threading.Thread(target=produce, args=(number,)) for number in range(PRODUCERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        engine.flush("put", timeout=None)
        elapsed = time.perf_counter() - started
        stats = engine.stats().batch_stats
    return groups * GROUP_COUNT * PRODUCERS / elapsed, peak.bytes / 2**20, stats.count_average


def steady(folder: Path, settings: wb.Settings, lane: wb.Lane, *, scale: float) -> None:
    """Operations at an even pace, each on its own."""
    count = max(10, round(STEADY_PER_S * STEADY_S * scale))
    with wb.Engine.open(folder, {"put": lane}, settings=settings) as engine:
        started = time.perf_counter()
        for number in range(count):
            ahead = started + number / STEADY_PER_S - time.perf_counter()
            if ahead > 0:
                time.sleep(ahead)
            key, payload = operation(number)
            engine.submit_nowait("put", key=key, payload=payload)
        engine.flush("put", timeout=None)


class PeakMemory:
    """Watches the memory of this process that is no file's, and keeps how much was added at the peak."""

    def __init__(self) -> None:
        self.bytes = 1
        self._start = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self.bytes = max(self.bytes, anonymous_bytes() - self._start)


def anonymous_bytes() -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(text.partition("RssAnon:")[2].split(maxsplit=1)[0])


if __name__ == "__main__":
    main()
