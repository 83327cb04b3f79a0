"""w9: the writes of a real disk trace, the one of the quickstart, in its groups and sizes.

What is not here: its reads, and the kill in the middle (`tools/replay.py`).

The trace stands in `fixtures/` of a source checkout and is no part of an installed package; without it, the workload is left out.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

import zstandard

from walbatch.bench.embedded import Sqlite
from walbatch.bench.endtoend import LmdbPutmulti, WalbatchIntoLmdb
from walbatch.bench.profile import Profile
from walbatch.bench.raw import Raw
from walbatch.bench.subject import Subject
from walbatch.bench.workloads import MIB, Figures, Workload, settle_groups

TRACE: Final = Path(__file__).resolve().parents[2] / "fixtures" / "cloudphysics-vm-io.csv.zst"
WRITE: Final = "2a"
GROUP_COUNT: Final = 64
"""Writes without a read between them that share one group, at most: as in the quickstart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """One write of the trace. `run` is the same for writes that no read stands between."""

    run: int
    key: bytes
    size: int


class WalbatchIntoShards(WalbatchIntoLmdb):
    """Into LMDB of four shards, as the quickstart does."""

    shards: ClassVar[int] = 4


def trace_workload(path: Path, bytes_max: int) -> tuple[Workload, int]:
    """The workload, and how many writes it has at most."""
    writes = read_writes(path, bytes_max)
    return Workload(
        name="w9", title="writes of a real disk trace, into LMDB", unit="MiB/s", measure=functools.partial(_replay, writes),
        subjects=(Raw, WalbatchIntoShards, Sqlite, LmdbPutmulti),
    ), len(writes)  # fmt: skip


def read_writes(path: Path, bytes_max: int) -> list[Write]:
    """The first writes of a trace, together of at most so many bytes."""
    writes: list[Write] = []
    run = left = 0
    left = bytes_max
    with path.open("rb") as file:
        text = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="ascii")
        for row in csv.DictReader(text):
            if row["op"] != WRITE:
                run += 1
                continue
            left -= int(row["size"])
            if left < 0:
                break
            writes.append(Write(run=run, key=int(row["lbn"]).to_bytes(8, "big"), size=int(row["size"])))
    return writes


def _replay(
    writes: Sequence[Write], subject: Subject, folder: Path, count: int, _profile: Profile
) -> Figures:
    chosen = writes[:count]
    prepared = [
        subject.group([write.key for write in group], [_payload(at + index, write.size) for index, write in enumerate(group)])
        for at, group in _groups(chosen)
    ]  # fmt: skip
    figures = settle_groups(subject, folder, count, prepared)
    written = sum(write.size for write in chosen)
    return figures | {"rate": written / MIB / figures["seconds"], "groups": len(prepared)}


def _groups(writes: Sequence[Write]) -> Iterator[tuple[int, Sequence[Write]]]:
    """Runs of writes, cut at `GROUP_COUNT`, each with the index of its first."""
    at = 0
    for _, run in itertools.groupby(writes, key=lambda write: write.run):
        left = list(run)
        for first in range(0, len(left), GROUP_COUNT):
            yield at + first, left[first : first + GROUP_COUNT]
        at += len(left)


def _payload(number: int, size: int) -> bytes:
    """Bytes that no compression makes smaller; the trace has none."""
    return hashlib.shake_128(number.to_bytes(8, "little")).digest(size)
