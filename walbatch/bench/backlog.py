"""w8: stores with millions of pending operations: how long opening takes, and how much memory draining does.

What is not here: whether the right operations come out in the right order (`tools/backlog.py`).

The idea needed to read it: each part runs in a process of its own, so that its time and its peak memory are its own. A store is
opened twice a round: after it was closed, and after the process that had it open ended without that.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import walbatch as wb
from walbatch.bench import payloads
from walbatch.bench.results import Sample

WORKLOAD: Final = "w8"
LANE: Final = "put"
GROUP_COUNT: Final = 1_000
PAYLOAD_BYTES: Final = 256
OPERATION_BYTES: Final = 320
"""Of the log, for each operation, more than it takes."""
KIB_A_MIB: Final = 1024


def needed_bytes(counts: Sequence[int]) -> int:
    """Of disk, for stores of these sizes at the same time."""
    return sum(counts) * OPERATION_BYTES


def measure(
    folder: Path, counts: Sequence[int], opens: int, progress: Callable[[str], object]
) -> list[Sample]:
    """Make the stores, open each as often as asked, drain them."""
    samples = []
    for count in counts:
        progress(f"making a store of {count:,}")
        _part("make", folder / str(count), count)
    for turn in range(opens):
        for count in counts:
            progress(f"opening, round {turn + 1} of {opens}, {count:,}")
            closed = _part("open-and-die", folder / str(count), count)
            killed = _part("open-and-close", folder / str(count), count)
            figures = {"open_s": closed["seconds"], "killed_open_s": killed["seconds"]}
            samples.append(
                Sample(workload=WORKLOAD, subject=f"{count:,} pending", round=turn, figures=figures)
            )
    for count in counts:
        progress(f"draining {count:,}")
        drained = _part("drain", folder / str(count), count)
        if drained["count"] != count:
            raise RuntimeError(f"{drained['count']:,.0f} of {count:,} operations came out")
        figures = {
            "drain_rate": count / drained["seconds"],
            "drain_rss_mib": drained["rss_mib"],
            "count": count,
        }
        samples.append(Sample(workload=WORKLOAD, subject=f"{count:,} drained", round=0, figures=figures))
    return samples


def _part(part: str, folder: Path, count: int) -> dict[str, float]:
    done = subprocess.run(  # noqa: S603 - this module
        [sys.executable, "-m", "walbatch.bench.backlog", part, str(folder), str(count)],
        capture_output=True, text=True, check=False, cwd=folder.parent,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{part}: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}")
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


# --- in a process of its own -----------------------------------------------------------------------------------------


def make(folder: Path, count: int) -> dict[str, float]:
    """A store of pending operations, closed."""
    engine = wb.Engine.open(folder, lanes={LANE: wb.Lane(None)})
    values = payloads.random_payloads(min(count, 100_000), PAYLOAD_BYTES)
    started = time.perf_counter()
    for first in range(0, count, GROUP_COUNT):
        size = min(GROUP_COUNT, count - first)
        at = first % len(values)
        group = values[at : at + size] if at + size <= len(values) else values[:size]
        engine.submit_many(LANE, zip(payloads.keys(size, first), group, strict=True))
    seconds = time.perf_counter() - started
    engine.close(drain=False)
    return {"seconds": seconds}


def open_only(folder: Path, *, close: bool) -> dict[str, float]:
    """The time of `Engine.open`, with a backend that takes nothing."""
    is_over = threading.Event()

    def refuse(_batch: wb.Batch) -> None:
        is_over.wait()
        raise wb.RetryBatch("not now")

    lanes = {LANE: wb.Lane(refuse)}
    opener = wb.Engine.open  # what is imported when it is first named is imported before the clock starts
    started = time.perf_counter()
    engine = opener(folder, lanes=lanes)
    seconds = time.perf_counter() - started
    if close:
        is_over.set()
        engine.close(drain=False)
    return {"seconds": seconds}


def drain(folder: Path) -> dict[str, float]:
    """Deliver everything to nobody; the most memory that took."""
    started = time.perf_counter()
    engine = wb.Engine.open(folder, lanes={LANE: wb.Lane(lambda _batch: None)})
    engine.flush(LANE)
    seconds = time.perf_counter() - started
    count = engine.stats().applied
    engine.close()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert peak is not None
    return {"seconds": seconds, "count": count, "rss_mib": int(peak[1]) / KIB_A_MIB}


def main() -> None:
    """Run a part; its figures go to standard output."""
    part, folder, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    match part:
        case "make":
            figures = make(folder, count)
        case "open-and-die" | "open-and-close":
            figures = open_only(folder, close=part == "open-and-close")
        case "drain":
            figures = drain(folder)
        case _:
            raise ValueError(part)
    sys.stdout.write(json.dumps(figures))
    sys.stdout.flush()
    if part == "open-and-die":
        os._exit(0)  # as a kill would: nothing is closed


if __name__ == "__main__":
    main()
