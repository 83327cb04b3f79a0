"""Batches into files, beside the same files written plainly: `python3 tools/file_batches.py --seconds 2`.

Measures rows a second by batch size: a plain write of the same bytes to a new file that is synced, renamed, and whose directory is
synced (what a careful script does, and which promises nothing about repetitions), and the backend. Encoding counts in both. Prints
the tables of docs/backends.md, then the figures as JSON.

Needs the package with its development tools (`tools/test.py` makes `.venv` with them). Figures are of this machine and its disk.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from walbatch.backends.files.backend import FilesBackend  # noqa: E402 - found through the line above
from walbatch.backends.files.jsonlines import JsonLinesBackend  # noqa: E402
from walbatch.backends.files.parquet import ParquetBackend  # noqa: E402
from walbatch.types import Batch, CutReason, Mark  # noqa: E402

SIZES = (1, 10, 100, 1_000, 10_000, 50_000)
BATCHES_MIN = 15
STORE = bytes(16)


def batch_of(count: int, first: int) -> Batch:
    lsns = range(first, first + count)
    return Batch(
        lane="put", shard=0, store=STORE, lsns=lsns, keys=[b"key-%012d" % lsn for lsn in lsns],
        payloads=[b'{"id":%d,"name":"somebody","note":"%s"}' % (lsn, b"x" * 60) for lsn in lsns], priorities=[5] * count,
        attempt=1, reason=CutReason.COUNT, mark=Mark(epoch=1, watermark=first + count - 1),
    )  # fmt: skip


def write_plainly(folder: Path, backend: FilesBackend, batch: Batch) -> None:
    """The same bytes, as a careful script writes them."""
    content = backend.encode(batch, range(len(batch))).content
    temporary, path = folder / ".next.tmp", folder / f"{batch.lsns[0]:012d}{backend.suffix}"
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    os.writev(file, list(content))
    os.fdatasync(file)
    os.close(file)
    temporary.rename(path)
    directory = os.open(folder, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def measure(
    name: str, make: Callable[[Path], FilesBackend], seconds: float, place: Path
) -> list[dict[str, Any]]:
    """The ways take turns, so that a disturbance hits both alike; what counts is the median batch of each."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="walbatch-files-", dir=place) as scratch:
        plain = Path(scratch) / "plain"
        plain.mkdir()
        backend = make(Path(scratch) / "out")
        backend.open("put", 1, STORE)
        first = 1
        for count in SIZES:
            taken: dict[str, list[float]] = {"plain": [], "backend": []}
            until = time.monotonic() + seconds
            while time.monotonic() < until or len(taken["plain"]) < BATCHES_MIN:
                for way, spent in taken.items():
                    batch = batch_of(count, first)
                    first += count
                    began = time.perf_counter()
                    if way == "plain":
                        write_plainly(plain, backend, batch)
                    else:
                        backend.apply(batch)
                    spent.append(time.perf_counter() - began)
            plainly, through = (count / statistics.median(taken[way]) for way in ("plain", "backend"))
            rows.append(
                {
                    "format": name,
                    "rows": count,
                    "plain": plainly,
                    "backend": through,
                    "ratio": through / plainly,
                }
            )
            print(f"| {count:,} | {plainly:,.0f} | {through:,.0f} | {through / plainly:.2f} |", flush=True)
        backend.close()
    return rows


FORMATS: dict[str, Callable[[Path], FilesBackend]] = {
    "JSON lines": JsonLinesBackend,
    "JSON lines, zstd": lambda path: JsonLinesBackend(path, compress="zstd"),
    "Parquet": ParquetBackend,
    "Parquet, columns": lambda path: ParquetBackend(
        path, {"id": "int64", "name": "string", "note": "string"}
    ),
}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="for each size")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("/var/tmp"),  # noqa: S108
        help="on a disk (default %(default)s)",
    )
    wanted = parser.parse_args(arguments)
    rows = []
    for name, make in FORMATS.items():
        print(f"\n| {name}: rows in a batch | plain files | backend | ratio |\n|---|---|---|---|")
        rows += measure(name, make, wanted.seconds, wanted.folder)
    print(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
