"""Batches into LMDB, beside the same rows put directly: `python3 tools/lmdb_batches.py --seconds 2`.

Measures rows a second by batch size: `putmulti` in a synced transaction, and `LmdbBackend.apply`, which keeps the mark, too.
Keys are spread like hashes. Prints the table of docs/backends.md.

Needs the package with its development tools (`tools/test.py` makes `.venv` with them). Figures are of this machine and its disk.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import lmdb

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import walbatch as wb  # noqa: E402 - found through the line above
from walbatch.types import Batch, CutReason, Mark  # noqa: E402

SIZES = (1, 10, 100, 1_000, 10_000, 30_000)
BATCHES_MIN = 15
STORE = bytes(16)
PAYLOAD = bytes(100)
SPREAD = 0x9E3779B97F4A7C15


def batch_of(count: int, first: int) -> Batch:
    lsns = range(first, first + count)
    return Batch(
        lane="put", shard=0, store=STORE, lsns=lsns, keys=[b"%016x" % (lsn * SPREAD % 2**64) for lsn in lsns],
        payloads=[PAYLOAD] * count, priorities=[5] * count, attempt=1, reason=CutReason.COUNT,
        mark=Mark(epoch=1, watermark=first + count - 1),
    )  # fmt: skip


def measure(count: int, first: int, seconds: float, ways: Sequence[Callable[[Batch], object]]) -> list[float]:
    """Rows a second of each way, in the median batch. They take turns, so that a disturbance hits all alike."""
    taken: list[list[float]] = [[] for _ in ways]
    until = time.monotonic() + seconds
    while time.monotonic() < until or len(taken[0]) < BATCHES_MIN:
        for way, times in zip(ways, taken, strict=True):
            batch = batch_of(count, first)
            began = time.perf_counter()
            way(batch)
            times.append(time.perf_counter() - began)
        first += count
    return [count / statistics.median(times) for times in taken]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="for each size")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="on a disk")  # noqa: S108
    wanted = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="walbatch-lmdb-", dir=wanted.folder) as scratch:
        direct = lmdb.open(f"{scratch}/direct", map_size=2**33)

        def put(batch: Batch) -> None:
            with direct.begin(write=True) as txn, txn.cursor() as cursor:
                cursor.putmulti(list(zip(batch.keys, batch.payloads, strict=True)))

        backend = wb.LmdbBackend(f"{scratch}/backend")
        backend.open("put", 1, STORE)
        best, rows = 0.0, []
        print("| LMDB: rows a second | putmulti | `LmdbBackend` | ratio |\n|---|---|---|---|")
        for turn, count in enumerate(SIZES):
            plainly, through = measure(count, 1 + turn * 10**9, wanted.seconds, (put, backend.apply))
            print(f"| {count:,} | {plainly:,.0f} | {through:,.0f} | {through / plainly:.2f} |", flush=True)
            best = max(best, plainly)
            rows.append(through)
        print(f"best of LmdbBackend to best of putmulti: {max(rows) / best:.2f}")
        backend.close()
        direct.close()


if __name__ == "__main__":
    main(sys.argv[1:])
