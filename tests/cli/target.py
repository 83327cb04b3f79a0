"""Backends that the command line finds by name: `python:tests.cli.target:apply`, or as a copy of this file."""

from __future__ import annotations

import json
from pathlib import Path

import walbatch as wb


def apply(batch: wb.Batch) -> None:
    """Write what comes to a file in the working directory."""
    with Path("delivered.jsonl").open("a", encoding="utf-8") as out:
        for operation in batch:
            row = [
                batch.lane,
                operation.lsn,
                operation.key.decode(errors="replace"),
                operation.payload.decode(errors="replace"),
            ]
            out.write(f"{json.dumps(row)}\n")


def fail(batch: wb.Batch) -> None:
    """Be down."""
    raise RuntimeError("the database\nis down")


def half(batch: wb.Batch) -> list[wb.Applied | wb.Retry]:
    """Take the even ones."""
    return [wb.Retry(after=60) if lsn % 2 else wb.Applied() for lsn in batch.lsns]
