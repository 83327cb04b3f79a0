"""Reads a store's facts for recovery, and changes nothing.

The idea needed to read it: what is settled needs no look, a sealed segment is trusted for its footer, and
only the tail is read byte by byte, so opening costs the tail whatever the backlog. A full survey reads
everything that is not settled.
"""

from __future__ import annotations

from collections.abc import Callable

from walbatch.core.frame import HeaderState, SegmentHeader
from walbatch.core.recovery import IdentityState, SegmentFacts, StoreFacts, superseded_numbers
from walbatch.core.scanner import Visit, scan_segment
from walbatch.ports import File, FileSystem
from walbatch.storage.dropped import read_dropped
from walbatch.storage.layout import Layout, segment_number
from walbatch.storage.segment import read_footer, read_header
from walbatch.types import Checkpoint

Progress = Callable[[int, int], None]
"""progress(bytes done, bytes in all)."""


def segment_numbers(fs: FileSystem, layout: Layout) -> list[int]:
    """The numbers of the segments in wal/, ascending. Other names are not segments."""
    if not fs.is_directory(layout.wal):
        return []
    return sorted(
        number for name in fs.list_directory(layout.wal) if (number := segment_number(name)) is not None
    )


def survey(
    fs: FileSystem,
    layout: Layout,
    *,
    identity: IdentityState,
    store: bytes | None,
    checkpoint: Checkpoint | None,
    state_findings: tuple[str, ...] = (),
    full: bool = False,
    progress: Progress | None = None,
    visit: Callable[[int, SegmentHeader], Visit | None] | None = None,
) -> StoreFacts:
    """Collect the facts. With `full`, every segment that is not settled is read to its last byte.

    `visit(number, header)` may return a function that sees every valid frame of that segment as it is read.
    Memory is bounded by one frame and the footers. Errors: OSError.
    """
    watermark = checkpoint.watermark if checkpoint else 0
    # Before the segments: beside a live engine, what it calls durable must be there to be read.
    dropped, findings = read_dropped(fs, layout, store)
    numbers = segment_numbers(fs, layout)
    files: list[File] = []
    try:
        heads: list[tuple[HeaderState, SegmentHeader | None, int]] = []
        for number in numbers:
            file = fs.open_read(layout.segment(number))
            try:
                heads.append((*read_header(file), file.size()))
            finally:
                file.close()
        superseded = superseded_numbers(
            [(number, state, header) for number, (state, header, _) in zip(numbers, heads, strict=True)],
            store,
        )
        if superseded:
            left = [row for row in zip(numbers, heads, strict=True) if row[0] not in superseded]
            numbers, heads = [number for number, _ in left], [head for _, head in left]
        total = sum(size for _, _, size in heads)
        done = 0
        segments: list[SegmentFacts] = []
        for index, (number, (state, header, size)) in enumerate(zip(numbers, heads, strict=True)):
            following = heads[index + 1][1] if index + 1 < len(heads) else None
            if following is not None and (following.store, following.number) != (store, numbers[index + 1]):
                following = None  # what is not what its name says, tells nothing about the one before it
            last = index + 1 == len(heads)
            settled = following is not None and following.prev_last_lsn <= watermark
            facts = SegmentFacts(number=number, file_bytes=size, state=state, header=header)
            if header is not None and (not settled or full):
                file = fs.open_read(layout.segment(number))
                files.append(file)
                footer = read_footer(file, header, size)
                if footer and following and footer[1].last_lsn > following.prev_last_lsn:
                    # A seal whose sync failed: a later opener has copied what was not proven and cut it off here. The seal may be
                    # on the disk all the same, and the frames that it lists need not be.
                    footer = None
                scan = None
                if last or full or footer is None:
                    scan = scan_segment(
                        file.read, header=header, file_bytes=size,
                        lsn_bound=following.prev_last_lsn if following else None,
                        visit=visit(number, header) if visit else None,
                    )  # fmt: skip
                facts = SegmentFacts(
                    number=number, file_bytes=size, state=state, header=header,
                    footer=footer[1] if footer and not full else None, scan=scan,
                )  # fmt: skip
                files.pop().close()
            segments.append(facts)
            done += size
            if progress:
                progress(done, total)
    finally:
        for file in files:
            file.close()
    return StoreFacts(
        identity=identity,
        store=store,
        segments=tuple(segments),
        checkpoint=checkpoint,
        state_findings=(*state_findings, *findings),
        superseded=tuple(sorted(superseded)),
        dropped=dropped,
    )
