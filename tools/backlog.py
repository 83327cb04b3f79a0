"""A backlog that is far larger than memory, in one command: `python tools/backlog.py` (ten million operations).

A first process submits the backlog to a lane that is paused, while another lane flows beside it, and ends with a hundred urgent
operations. A second one opens the store and delivers everything. Both print the most memory they have held (VmHWM), which must not
grow with the backlog. What arrives is compared, shard by shard, with what was submitted: count, order of LSNs, and sums over
LSNs and payloads in their order, so nothing can be missing, doubled, changed or out of place. When the urgent ones came is
told as a part of the whole drain; a backend that takes its time (`--call-ms`) shows best what the search for them is worth.

Figures depend on the machine and its disk; `--dir` says on which.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import zlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import walbatch as wb
from walbatch.core.routing import shards_of

ROOT: Final = Path(__file__).resolve().parent.parent
COUNT: Final = 10_000_000
SHARDS: Final = 4
GROUP_COUNT: Final = 1_000
"""Operations of one commit group; every tenth group is followed by one of the lane that flows."""
FLOW_EVERY: Final = 10
URGENT_COUNT: Final = 100
PAYLOAD_BYTES: Final = 32
STEP_COUNT: Final = 1_000_000
"""The memory is printed after so many operations."""
GROWTH_MIB_MAX: Final = 128
"""What the peak may grow by beyond the bounds that are set, whatever the backlog: ten million operations held in memory
would take some thousand."""
MIB: Final = 2**20

KEYS: Final = tuple(b"key-%03d" % number for number in range(GROUP_COUNT))
"""Each group has every key once, so which of its operations go to which shard is always the same."""
ROUTE: Final = shards_of(KEYS, SHARDS)
ROWS: Final = tuple(tuple(row for row, shard in enumerate(ROUTE) if shard == own) for own in range(SHARDS))


@dataclass(slots=True)
class Stream:
    """What went through one shard, in its order, in a few numbers."""

    count: int = 0
    lsns: int = 0
    """CRC-32 of the LSNs, one after the other."""
    payloads: int = 0
    """The same of the payloads."""
    last_lsn: int = 0
    disorder: int = 0
    """LSNs that were not above the one before."""

    def take(self, lsns: Sequence[int], payloads: Iterable[bytes]) -> None:
        """More of it."""
        if not lsns:
            return
        self.count += len(lsns)
        self.lsns = zlib.crc32(array("Q", lsns).tobytes(), self.lsns)
        self.payloads = zlib.crc32(b"".join(payloads), self.payloads)
        self.disorder += (lsns[0] <= self.last_lsn) + sum(one >= other for one, other in pairwise(lsns))
        self.last_lsn = lsns[-1]


@dataclass(slots=True)
class Counting:
    """A backend that keeps nothing of what it is given but sums; urgent operations apart, with the time at which each came."""

    streams: list[Stream] = field(default_factory=lambda: [Stream() for _ in range(SHARDS)])
    urgent: dict[int, float] = field(default_factory=dict)
    doubled: int = 0
    call_s: float = 0.0
    """What a call takes at least."""

    def apply(self, batch: wb.Batch) -> None:
        """Take a batch. One at a time for each shard, so nothing is shared but `urgent`."""
        time.sleep(self.call_s)
        lsns, payloads = list(batch.lsns), batch.payloads
        if wb.PRIORITY_CRITICAL in batch.priorities:
            now = time.monotonic()
            rows = [row for row, priority in enumerate(batch.priorities) if priority < wb.PRIORITY_CRITICAL]
            for lsn in set(lsns) - {lsns[row] for row in rows}:
                self.doubled += lsn in self.urgent
                self.urgent[lsn] = now
            lsns, payloads = [lsns[row] for row in rows], [payloads[row] for row in rows]
        self.streams[batch.shard].take(lsns, payloads)


def payload_of(number: int) -> bytes:
    """What no compression makes smaller."""
    return blake2b(number.to_bytes(8, "little"), digest_size=PAYLOAD_BYTES).digest()


def peak_mib() -> float:
    """The most memory that this process has held."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


def settings_of(memory_mib: int) -> wb.Settings:
    return wb.Settings(memory_bytes_max=memory_mib * MIB, queue_bytes_max=max(1, memory_mib) * MIB)


# --- the first process ---------------------------------------------------------------------------------------------------


def submit(folder: Path, count: int, memory_mib: int) -> dict[str, Any]:
    """Make the backlog, beside a lane that flows. Returns what is expected of the second process."""
    flowing = Counting()
    backlog, flow = ([Stream() for _ in range(SHARDS)] for _ in range(2))
    lanes = {"backlog": wb.Lane(Counting(), shards=SHARDS), "flow": wb.Lane(flowing, shards=SHARDS)}
    started = time.monotonic()
    engine = wb.Engine.open(folder / "store", lanes=lanes, settings=settings_of(memory_mib))
    engine.pause("backlog")
    peaks = [peak_mib()]
    done = 0
    while done < count:
        size = min(GROUP_COUNT, count - done)
        _submit_group(engine, "backlog", done, size, backlog)
        if done // GROUP_COUNT % FLOW_EVERY == 0:
            _submit_group(engine, "flow", done, GROUP_COUNT, flow)
        if (done + size) // STEP_COUNT > done // STEP_COUNT:
            peaks.append(peak_mib())
            rate = (done + size) / (time.monotonic() - started)
            print(f"  submitted {done + size:>12,}  peak {peaks[-1]:7.1f} MiB  {rate:>9,.0f}/s", flush=True)
        done += size
    urgent = engine.submit_many(
        "backlog",
        [(b"urgent-%d" % number, b"") for number in range(URGENT_COUNT)],
        priority=wb.PRIORITY_CRITICAL,
    )
    submitted_s = time.monotonic() - started
    engine.flush("flow")
    stats = engine.stats()
    problems = differences("flow", flow, flowing.streams)
    if stats.unaccounted:
        problems.append(f"{stats.unaccounted} operations are unaccounted for")
    engine.close(drain=False)
    disk = sum(path.stat().st_size for path in (folder / "store" / "wal").glob("*.seg"))
    unsettled = sum(stream.count for stream in backlog) * (len(KEYS[0]) + PAYLOAD_BYTES)
    return {
        "streams": [asdict(stream) for stream in backlog], "urgent": [urgent[0], urgent[-1]], "seconds": submitted_s,
        "peaks": [*peaks, peak_mib()], "disk_bytes": disk, "unsettled_bytes": unsettled, "problems": problems,
        "flowed": sum(stream.count for stream in flowing.streams), "queue_peak_mib": stats.peak_memory_bytes / MIB,
    }  # fmt: skip


def _submit_group(engine: wb.Engine, kind: str, number: int, size: int, streams: Sequence[Stream]) -> None:
    payloads = [payload_of(one) for one in range(number, number + size)]
    lsns = engine.submit_many(kind, zip(KEYS, payloads, strict=False))
    for stream, rows in zip(streams, ROWS, strict=True):
        own = [row for row in rows if row < size]
        stream.take([lsns[row] for row in own], [payloads[row] for row in own])


# --- the second process --------------------------------------------------------------------------------------------------


def drain(folder: Path, expected: dict[str, Any], memory_mib: int, call_ms: float) -> dict[str, Any]:
    """Open the store again, deliver everything, and compare."""
    backend = Counting(call_s=call_ms / 1000)
    lanes = {"backlog": wb.Lane(backend, shards=SHARDS), "flow": wb.Lane(Counting(), shards=SHARDS)}
    started = time.monotonic()
    engine = wb.Engine.open(folder / "store", lanes=lanes, settings=settings_of(memory_mib))
    opened_s = time.monotonic() - started
    peaks = [peak_mib()]
    told = 0
    while True:
        try:
            engine.flush(timeout=0.2)
        except wb.ResultTimeout:
            engine.stats()  # each look counts for the peak of the queues
            done = sum(stream.count for stream in backend.streams)
        else:
            break
        if done // STEP_COUNT > told:
            told = done // STEP_COUNT
            peaks.append(peak_mib())
            rate = done / (time.monotonic() - started)
            print(f"  delivered {done:>12,}  peak {peaks[-1]:7.1f} MiB  {rate:>9,.0f}/s", flush=True)
    ended = time.monotonic()
    stats = engine.stats()
    engine.close()
    problems = differences("backlog", [Stream(**stream) for stream in expected["streams"]], backend.streams)
    first, last = expected["urgent"]
    if backend.doubled or sorted(backend.urgent) != list(range(first, last + 1)):
        problems.append(
            f"of {last - first + 1} urgent operations {len(backend.urgent)} came, {backend.doubled} twice"
        )
    if stats.unaccounted or stats.pending:
        problems.append(f"{stats.pending} operations are pending, {stats.unaccounted} unaccounted for")
    waits = sorted(at - started for at in backend.urgent.values()) or [ended - started]
    return {
        "seconds": ended - started, "opened_s": opened_s, "peaks": [*peaks, peak_mib()], "urgent_first_s": waits[0],
        "urgent_last_s": waits[-1], "delivered": sum(stream.count for stream in backend.streams), "problems": problems,
        "queue_peak_mib": stats.peak_memory_bytes / MIB,
    }  # fmt: skip


def differences(lane: str, expected: Sequence[Stream], found: Sequence[Stream]) -> list[str]:
    """What arrived otherwise than it was submitted, a sentence for each shard."""
    return [
        f"shard {shard} of {lane}: {got.count:,} operations came ({got.disorder:,} out of order), {want.count:,} were submitted"
        + ("" if got.count != want.count or got.disorder else ", but they are not the same")
        for shard, (want, got) in enumerate(zip(expected, found, strict=True)) if got != want
    ]  # fmt: skip


# --- both ----------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--count", type=int, default=COUNT, help="operations of the backlog (default %(default)s)"
    )
    parser.add_argument(
        "--memory-mib", type=int, default=64, help="Settings.memory_bytes_max (default %(default)s)"
    )
    parser.add_argument(
        "--dir", default=None, help="folder on the disk to use (default: a temporary one in .)"
    )
    parser.add_argument(
        "--call-ms",
        type=float,
        default=0.0,
        help="what a call of the backend takes at least (default %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON document, last")
    parser.add_argument("--part", choices=["submit", "drain"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.count < 1 or arguments.memory_mib < 1 or not 0 <= arguments.call_ms <= 1000:
        parser.error("--count and --memory-mib must be at least 1, and --call-ms from 0 to 1000")
    if arguments.part:
        _run_part(arguments, Path(arguments.dir))
        return
    with tempfile.TemporaryDirectory(prefix="walbatch-backlog-", dir=arguments.dir or ".") as folder:
        figures = {part: _in_process(part, Path(folder), arguments) for part in ("submit", "drain")}
    problems = _problems(figures, arguments.memory_mib)
    _show(figures, arguments.count)
    for problem in problems:
        print(f"PROBLEM: {problem}")
    if arguments.json:
        print(json.dumps({**figures, "problems": problems}))
    sys.exit(1 if problems else 0)


def _run_part(arguments: argparse.Namespace, folder: Path) -> None:
    if arguments.part == "submit":
        figures = submit(folder, arguments.count, arguments.memory_mib)
    else:
        expected = json.loads((folder / "submit.json").read_text(encoding="utf-8"))
        figures = drain(folder, expected, arguments.memory_mib, arguments.call_ms)
    (folder / f"{arguments.part}.json").write_text(json.dumps(figures), encoding="utf-8")


def _in_process(part: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run a part in a process of its own, so that its peak is its own."""
    print(f"{part}:", flush=True)
    done = subprocess.run(
        [sys.executable, __file__, "--part", part, "--dir", str(folder), "--count", str(arguments.count), "--memory-mib",
         str(arguments.memory_mib), "--call-ms", str(arguments.call_ms)],
        check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"the {part} process ended with {done.returncode}")
    figures: dict[str, Any] = json.loads((folder / f"{part}.json").read_text(encoding="utf-8"))
    return figures


def _problems(figures: dict[str, dict[str, Any]], memory_mib: int) -> list[str]:
    """What is not as it should be."""
    problems = [problem for part in figures.values() for problem in part["problems"]]
    for part, found in figures.items():
        growth = found["peaks"][-1] - found["peaks"][0]
        bound = 2 * memory_mib + GROWTH_MIB_MAX
        if growth > bound:
            problems.append(f"{part}: memory grew by {growth:.0f} MiB, more than {bound} MiB")
    return problems


def _show(figures: dict[str, dict[str, Any]], count: int) -> None:
    put, got = figures["submit"], figures["drain"]
    for part, found in figures.items():
        start, end = found["peaks"][0], found["peaks"][-1]
        print(
            f"{part}: {count:,} operations in {found['seconds']:.1f} s; peak memory {end:.1f} MiB, {end - start:.1f} more than "
            f"after the opening, of which walbatch counted {found['queue_peak_mib']:.1f} in its queues"
        )
    print(
        f"disk: {put['disk_bytes'] / MIB:.1f} MiB of log for {put['unsettled_bytes'] / MIB:.1f} MiB of unsettled keys and payloads "
        f"({put['disk_bytes'] / put['unsettled_bytes']:.2f} times); {put['flowed']:,} operations flowed past meanwhile"
    )
    print(
        f"urgent: the first of {URGENT_COUNT} after {got['urgent_first_s']:.2f} s, the last after {got['urgent_last_s']:.2f} s: "
        f"{got['urgent_last_s'] / got['seconds']:.1%} of the drain ({got['opened_s']:.2f} s of it the opening)"
    )


if __name__ == "__main__":
    main()
