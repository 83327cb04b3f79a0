"""The operations in the log, one by one.

What is not here: counting them (`tally`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from walbatch import limits
from walbatch.core.columns import Columns, decode_body
from walbatch.core.frame import SECTOR, FrameError, FrameHeader, FrameType, NewerFrameError, SegmentHeader
from walbatch.core.recovery import make_plan
from walbatch.core.routing import shards_of
from walbatch.core.scanner import iterate_frames
from walbatch.errors import CorruptionError
from walbatch.inspection.looking import find_store
from walbatch.inspection.reports import LoggedOperation
from walbatch.inspection.tally import marks_of
from walbatch.storage.filesystem import RealFileSystem
from walbatch.storage.layout import Layout
from walbatch.storage.observation import Settled, observe
from walbatch.storage.reading import newer_frame
from walbatch.storage.segment import read_header
from walbatch.storage.store import raise_refusal, storage_errors
from walbatch.types import NO_OPTIONS


def operations(
    path: str | os.PathLike[str], *, kind: str | None = None, key: bytes | None = None, first_lsn: int = 1,
    last_lsn: int = limits.LSN_MAX, pending_only: bool = False,
) -> Iterator[LoggedOperation]:  # fmt: skip
    """The operations in the log, by LSN, settled ones included until their segment is trimmed. Memory: one frame.

    Raises ConfigError for a path that is no store; CorruptionError where the log is damaged and UnsupportedFormat
    where it is newer, after everything before that was yielded.
    """
    layout = find_store(path)
    fs = RealFileSystem()
    with storage_errors(layout.root):
        found = observe(fs, layout)
    facts = found.facts
    reached = first_lsn - 1
    for index, segment in enumerate(facts.segments):
        following = facts.segments[index + 1].header if index + 1 < len(facts.segments) else None
        bound = min(following.prev_last_lsn if following else segment.last_lsn, last_lsn)
        if segment.header is None or bound < first_lsn:
            continue
        if segment.scan is None and segment.footer is None and pending_only:
            continue  # settled
        with storage_errors(layout.root):
            for operation in segment_operations(
                fs, layout, segment.number, segment.header, bound, found.settled
            ):
                # A live engine may have merged segments meanwhile: the later one begins with what stood in those before it.
                if not reached < operation.lsn <= last_lsn:
                    continue
                reached = operation.lsn
                if (
                    (kind is None or operation.kind == kind) and (key is None or operation.key == key)
                    and not (pending_only and operation.settled)
                ):  # fmt: skip
                    yield operation
    raise_refusal(make_plan(facts), layout)


def segment_operations(
    fs: RealFileSystem, layout: Layout, number: int, header: SegmentHeader, bound: int, settled: Settled
) -> Iterator[LoggedOperation]:  # fmt: skip
    """The operations of one segment up to LSN `bound`."""
    path = layout.segment(number)
    try:
        file = fs.open_read(path)
    except FileNotFoundError:
        return  # a live engine trimmed it, or merged it into a later one
    offset = SECTOR
    try:
        if header.first_lsn > bound:
            return
        present = read_header(file)[1]
        if present is not None and present.compacted:
            header = present  # a live engine may have compacted it just now
        for offset, frame in iterate_frames(file.read, header=header, offset=SECTOR, end=file.size()):
            body = file.read(
                frame.total_bytes - limits.FRAME_HEADER_BYTES, offset + limits.FRAME_HEADER_BYTES
            )
            if frame.type is FrameType.OPERATIONS:
                yield from _operations(number, offset, frame, decode_body(frame, body), settled)
            if frame.last_lsn >= bound:
                return
    except NewerFrameError as error:
        raise newer_frame(path, offset, error) from error
    except FrameError as error:
        raise CorruptionError(
            f"{path} at offset {offset}: {error}. Nothing was changed; look with 'walbatch verify {layout.root}'",
            path=path,
            offset=offset,
            expected="a valid frame",
        ) from error
    finally:
        file.close()


def _operations(
    number: int,
    offset: int,
    frame: FrameHeader,
    columns: Columns,
    settled: Settled,
) -> Iterator[LoggedOperation]:
    """The operations of one frame, each with whether it is settled."""
    marks = [marks_of(kind, settled.passed_over) for kind in columns.kinds]
    routes = [shards_of(columns.keys, len(shards)) for shards in marks]
    rows = zip(
        columns.lsns(frame.first_lsn), columns.kind_indexes, columns.keys, columns.payloads, columns.priorities,
        columns.options or [NO_OPTIONS] * frame.count, strict=True,
    )  # fmt: skip
    for row, (lsn, kind_index, key, payload, priority, options) in enumerate(rows):
        covered = marks[kind_index][routes[kind_index][row]].covers(lsn)
        yield LoggedOperation(
            lsn=lsn, kind=columns.kinds[kind_index], key=key, payload=payload, priority=priority, segment=number,
            offset=offset, settled=covered or lsn in settled.given_up, options=options,
        )  # fmt: skip
