"""The shortcut that makes half a million recoveries affordable: an unchanged file reads as it read before.

What is not here: any decision. Recovery runs in full for every damage; only what the shipped decoders said of a file that the
damage did not touch is remembered, by the file and the arguments. `verdict` repeats a part of the damages without it, and
compares.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from walbatch.core.frame import FrameHeader, SegmentHeader
from walbatch.storage import survey
from walbatch.storage.log import Log
from walbatch.storage.reading import Frame, Reader
from walbatch.storage.segment import ClosedSegment
from walbatch.types import Position

CHANGED = 0
"""The inode number of a file that is not what it was. Those that are have numbers below it; files that recovery makes have higher
ones. Nothing is remembered but of the former."""

_found: dict[object, Any] = {}


class RememberingLog(Log):
    """A log that remembers the frames of unchanged segments."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._reader = _RememberingReader(self._fs, self._layout, self._extent_at)


class _RememberingReader(Reader):
    def _read_at(
        self, segment: ClosedSegment, position: Position, next_lsn: int
    ) -> Frame | FrameHeader | None:
        opened = self._segment(segment.header)
        number = opened.file._inode.number if opened is not None else CHANGED  # type: ignore[attr-defined]  # noqa: SLF001
        if number >= CHANGED:
            return super()._read_at(segment, position, next_lsn)
        key = (number, segment.header.salt, position, next_lsn)
        if key not in _found:
            _found[key] = super()._read_at(segment, position, next_lsn)
        found: Frame | FrameHeader | None = _found[key]
        return found


def _remembering(read: Callable[..., Any]) -> Callable[..., Any]:
    """A reader of `survey`, whose first argument is a file (or its `read`)."""

    def reading(source: Any, *arguments: Any, **named: Any) -> Any:
        file = getattr(source, "__self__", source)
        number = file._inode.number  # noqa: SLF001 - the simulated file has no other name
        if number >= CHANGED or named.get("visit") is not None:
            return read(source, *arguments, **named)
        # Headers are values that are made once for each file: their identity is in the key by their salt and number.
        key = (read, number, *map(_name, arguments), *((name, _name(value)) for name, value in named.items()))
        if key not in _found:
            _found[key] = read(source, *arguments, **named)
        return _found[key]

    return reading


def _name(value: Any) -> object:
    return (value.salt, value.number, value.prev_last_lsn) if isinstance(value, SegmentHeader) else value


@contextlib.contextmanager
def remembering() -> Iterator[None]:
    """Let `survey` remember what it read of unchanged files."""
    readers: dict[str, Any] = {
        name: _remembering(getattr(survey, name)) for name in ("read_header", "read_footer", "scan_segment")
    }
    with mock.patch.multiple(survey, **readers):
        yield


def forget() -> None:
    """Remember nothing: other stores come."""
    _found.clear()
