"""What walbatch takes beside time: bytes on disk for each byte of payload, and how long it takes to start."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import walbatch as wb
from walbatch.bench import payloads
from walbatch.bench.own import Walbatch
from walbatch.bench.results import Sample

DISK: Final = "disk"
START: Final = "start"
PAYLOAD_BYTES: Final = 256
BLOCK_BYTES: Final = 512
"""Of `st_blocks`, whatever the file system's own are."""

STARTS: Final[dict[str, list[str]]] = {
    "bare": ["-c", "pass"],
    "import": ["-c", "import walbatch"],
    "engine": ["-c", "from walbatch import Engine, Lane"],
    "help": ["-m", "walbatch", "--help"],
}


def measure_disk(folder: Path, count: int, group_count: int) -> list[Sample]:
    """The log after groups as in w3, without compression, the store closed, nothing settled."""
    subject = Walbatch(wb.Settings(compress_bytes_min=None))
    values = payloads.random_payloads(count, PAYLOAD_BYTES)
    try:
        subject.open(folder)
        for at in range(0, count, group_count):
            part = values[at : at + group_count]
            subject.put_group(subject.group(payloads.keys(len(part), at), part))
    finally:
        subject.close()
    facts = [file.stat() for file in (folder / "store" / "wal").iterdir()]
    total = count * PAYLOAD_BYTES
    figures = {
        "written_ratio": sum(fact.st_size for fact in facts) / total,
        "allocated_ratio": sum(fact.st_blocks for fact in facts) * BLOCK_BYTES / total,
        "count": count,
    }
    return [Sample(workload=DISK, subject="walbatch", round=0, figures=figures)]


def measure_starts(folder: Path, starts: int, progress: Callable[[str], object]) -> list[Sample]:
    """How long processes take that do nothing, import the package, use it, and show the help; in turn."""
    samples = []
    for turn in range(
        -1, starts
    ):  # the first time is not counted: files come from the disk, bytecode is written
        progress(f"starting processes, {turn + 1} of {starts}")
        seconds = {name: _start(arguments, folder) for name, arguments in STARTS.items()}
        if turn < 0:
            continue
        for name, took in seconds.items():
            figures = {"ms": took * 1e3}
            if name != "bare":
                figures["over_bare_ms"] = (took - seconds["bare"]) * 1e3
            samples.append(Sample(workload=START, subject=name, round=turn, figures=figures))
    return samples


def _start(arguments: list[str], folder: Path) -> float:
    # What a user starts for the second time has its bytecode, whatever the shell that measures says of writing it.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started = time.perf_counter()
    subprocess.run(  # noqa: S603 - this interpreter
        [sys.executable, *arguments], check=True, cwd=folder, stdout=subprocess.DEVNULL, env=environment
    )
    return time.perf_counter() - started
