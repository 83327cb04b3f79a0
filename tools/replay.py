"""The work of `quickstart.py`, inside its environment: replay, kill, recover, check everything.

`show` is the whole story; it runs `work` in a process of its own, which it kills.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

import walbatch as wb

TRACE = Path(__file__).resolve().parent.parent / "fixtures" / "cloudphysics-vm-io.csv.zst"
LANE = "block"
GROUP_COUNT = 64
"""Writes without a read between them that share one commit group, at most."""
_STAMP = struct.Struct("<QQ")


@dataclass(frozen=True, slots=True)
class Request:
    """One row of the trace."""

    row: int
    is_write: bool
    block: int
    size: int


def read_trace(fraction: float) -> list[Request]:
    """The first part of the trace."""
    with TRACE.open("rb") as file:
        text = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="ascii")
        rows = [
            Request(row, fields["op"] == "2a", int(fields["lbn"]), int(fields["size"]))
            for row, fields in enumerate(csv.DictReader(text))
        ]
    return rows[: max(100, int(len(rows) * fraction))]


def payload_of(request: Request) -> bytes:
    """What this write stores: block and row, then bytes derived from them, in the real size."""
    stamp = _STAMP.pack(request.block, request.row)
    return stamp + hashlib.shake_128(stamp).digest(request.size - _STAMP.size)


def key_of(block: int) -> bytes:
    """A block's key."""
    return block.to_bytes(8, "big")


def row_of(payload: bytes | None) -> int:
    """The row that wrote a payload; -1 for no payload."""
    return _STAMP.unpack_from(payload)[1] if payload is not None else -1


# --- the process that is killed -------------------------------------------------------------------------------------


def work(directory: Path, fraction: float, shards: int, start: int) -> None:
    """Replay from row `start`.

    Says on standard output what is acknowledged: "a <rows>" after each group, then a summary.
    """
    trace = read_trace(fraction)
    last_write: dict[int, int] = {request.block: request.row for request in trace[:start] if request.is_write}
    backend = wb.LmdbBackend(directory / "blocks")
    reads = 0
    with wb.Engine.open(directory / "store", lanes={LANE: wb.Lane(backend, shards=shards)}) as engine:
        unsettled: dict[int, int] = {}
        for group in groups(trace[start:]):
            if group[0].is_write:
                lsns = engine.submit_many(
                    LANE, [(key_of(request.block), payload_of(request)) for request in group]
                )
                for request, lsn in zip(group, lsns, strict=True):
                    last_write[request.block] = request.row
                    unsettled[request.block] = lsn
            else:
                for request in group:
                    check_read(engine, backend, unsettled, request.block, last_write.get(request.block, -1))
                    reads += 1
            print("a", group[-1].row + 1, reads, flush=True)
    print("done", json.dumps({"reads": reads}), flush=True)


def groups(requests: list[Request]) -> Iterator[list[Request]]:
    """Runs of writes or of reads, cut at GROUP_COUNT."""
    group: list[Request] = []
    for request in requests:
        if group and (group[0].is_write != request.is_write or len(group) >= GROUP_COUNT):
            yield group
            group = []
        group.append(request)
    if group:
        yield group


def check_read(
    engine: wb.Engine, backend: wb.LmdbBackend, unsettled: dict[int, int], block: int, expected_row: int
) -> None:
    """Read a block and compare. A write that has not reached LMDB yet is waited for first."""
    if unsettled.get(block, 0) > engine.stats().settled_lsn:
        engine.flush(LANE)
        unsettled.clear()
    found = row_of(backend.get(key_of(block)))
    if found != expected_row:
        sys.exit(f"WRONG: block {block} holds row {found}, the trace wrote row {expected_row}")


# --- the story ---


def show(directory: Path, fraction: float, shards: int) -> None:
    """Replay, kill, recover, go on, check, summarise."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    trace = read_trace(fraction)
    writes = [request for request in trace if request.is_write]
    total = sum(request.size for request in writes)
    print(
        f"trace: {len(trace):,} requests, {len(writes):,} writes of {total / 1e6:,.0f} MB, {len(trace) - len(writes):,} reads"
    )

    started = time.perf_counter()
    acknowledged, reads = run_worker(directory, fraction, shards, 0, len(trace), kill_at=len(trace) // 2)
    durable = sum(write.row < acknowledged for write in writes)
    print(f"killed with SIGKILL: trace rows below {acknowledged:,} ({durable:,} writes) were acknowledged")

    command = [str(Path(sys.executable).with_name("walbatch")), "recover", str(directory / "store")]
    print("$ walbatch recover", directory / "store", flush=True)
    if subprocess.run(command, check=False).returncode != 0:
        sys.exit("WRONG: recovery failed")

    resumed = resume_row(directory, trace, acknowledged)
    after, more_reads = run_worker(directory, fraction, shards, resumed, len(trace), kill_at=None)
    elapsed = time.perf_counter() - started
    if after != len(trace):
        sys.exit(f"WRONG: the replay ended at row {after}")
    check(directory, writes)
    print()
    print(f"  writes submitted, settled exactly once  {len(writes):>10,} of {len(writes):,}")
    print(f"  blocks whose final content is right     {len({w.block for w in writes}):>10,}")
    print(f"  reads checked against the trace         {reads + more_reads:>10,}")
    print(f"  acknowledged when it was killed         {durable:>10,} writes, none lost")
    print(
        f"  time, recovery included                 {elapsed:>10,.1f} s, {total / 1e6 / elapsed:,.0f} MB/s of writes"
    )
    size = sum(path.stat().st_size for path in (directory / "store").rglob("*") if path.is_file())
    print(f"  left in the log                         {size / 1e6:>10,.1f} MB (trimmed as it is settled)")
    print(f"\nlook around: .venv/bin/walbatch inspect {directory / 'store'}")


def run_worker(
    directory: Path, fraction: float, shards: int, start: int, rows: int, *, kill_at: int | None
) -> tuple[int, int]:
    """Run `work`; kill it once it has acknowledged row `kill_at`.

    Returns the first row not acknowledged, and reads checked.
    """
    command = [
        sys.executable,
        __file__,
        "work",
        "--fraction",
        str(fraction),
        "--dir",
        str(directory),
        "--shards",
        str(shards),
    ]
    acknowledged, reads = start, 0
    with subprocess.Popen([*command, "--start", str(start)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            word, *fields = line.split()
            if word != "a":
                continue
            acknowledged, reads = int(fields[0]), int(fields[1])
            bar(acknowledged, rows)
            if kill_at is not None and acknowledged >= kill_at:
                process.send_signal(signal.SIGKILL)
                kill_at = rows + 1
        code = process.wait()
    bar(acknowledged, rows, end=True)
    if code not in {0, -signal.SIGKILL}:
        sys.exit(f"WRONG: the replay failed (exit code {code})")
    return acknowledged, reads


def bar(done: int, total: int, *, end: bool = False) -> None:
    """A progress bar, on terminals only."""
    if sys.stdout.isatty():
        width = 40 * done // max(1, total)
        print(
            f"\r  [{'#' * width}{'.' * (40 - width)}] {done:,} of {total:,} requests",
            end="\n" if end else "",
            flush=True,
        )


def resume_row(directory: Path, trace: list[Request], acknowledged: int) -> int:
    """Where to go on: behind the group that was under way if it became durable, which is all or nothing."""
    group = next(groups(trace[acknowledged:]), [])
    if not group or not group[0].is_write:
        return acknowledged
    backend = wb.LmdbBackend(directory / "blocks")
    try:
        landed = [row_of(backend.get(key_of(request.block))) >= acknowledged for request in group]
    finally:
        backend.close()
    if any(landed) != all(landed):
        sys.exit("WRONG: a commit group was applied in part")
    fate = "had become durable and was delivered" if all(landed) else "never became durable"
    print(f"the group under way when it was killed {fate}")
    return group[-1].row + 1 if all(landed) else acknowledged


def check(directory: Path, writes: list[Request]) -> None:
    """Compare every block with the trace, and the engine's count with the number of writes."""
    final = {request.block: request for request in writes}
    backend = wb.LmdbBackend(directory / "blocks")
    try:
        for done, (block, request) in enumerate(final.items(), 1):
            if backend.get(key_of(block)) != payload_of(request):
                sys.exit(f"WRONG: block {block} does not hold what row {request.row} wrote")
            if done % 1000 == 0:
                bar(done, len(final))
        if backend.count() != len(final):
            sys.exit(f"WRONG: {backend.count():,} blocks stored, {len(final):,} written")
    finally:
        backend.close()
    look = [str(Path(sys.executable).with_name("walbatch")), "verify", str(directory / "store"), "--json"]
    report = json.loads(
        subprocess.run(look, check=True, capture_output=True, text=True, env=dict(os.environ)).stdout
    )
    if report["pending"] or report["settled_count"] != len(writes):
        sys.exit(
            f"WRONG: {report['settled_count']:,} operations settled and {report['pending']:,} pending, {len(writes):,} written"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="The work of quickstart.py.")
    parser.add_argument("mode", choices=["show", "work"])
    parser.add_argument("--fraction", type=float, required=True)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--shards", type=int, required=True)
    parser.add_argument("--start", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.mode == "show":
        show(arguments.dir, arguments.fraction, arguments.shards)
    else:
        work(arguments.dir, arguments.fraction, arguments.shards, arguments.start)


if __name__ == "__main__":
    main()
