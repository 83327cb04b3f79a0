"""How results are shown: text for people, JSON for programs, progress on the terminal's error stream."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer


def show_json(value: object) -> None:
    """One JSON document on one line."""
    typer.echo(json_text(value))


def json_text(value: object) -> str:
    """JSON on one line, with escapes where the output could not show the characters themselves."""
    plain = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    return json.dumps(value, ensure_ascii=plain)


def is_stdout_usable() -> bool:
    """Whether what was written to standard output can get there. If not, everything that is left goes nowhere.

    Otherwise the interpreter would fail on it at its end, with a message and an exit code of its own.
    """
    try:
        sys.stdout.flush()
    except OSError:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return False
    return True


def size_text(size: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:  # noqa: PLR2004 - a binary unit
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def duration_text(seconds: float) -> str:
    """A duration for people."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:,.1f} {unit}"
    return f"{seconds / 1e-6:,.0f} us"


def count_text(count: int, noun: str) -> str:
    """A number and its noun: `1 operation`, `2,000 operations`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def bytes_field(name: str, value: bytes) -> dict[str, str]:
    """A JSON field for bytes: as text where it is UTF-8, else as `<name>_base64`."""
    try:
        return {name: value.decode()}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(value).decode()}


Step = Callable[[int, int], None]
"""step(done, total)."""


@contextmanager
def progress_bar(label: str, *, hidden: bool) -> Iterator[Step]:
    """A progress bar on standard error, drawn only on a terminal. Yields a function to call with done and total."""
    if hidden or not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    with typer.progressbar(length=1, label=label, file=sys.stderr, show_eta=True) as bar:
        shown: Any = bar

        def step(done: int, total: int) -> None:
            shown.length = max(1, total)
            shown.update(min(done, shown.length) - shown.pos)

        yield step
