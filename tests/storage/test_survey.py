"""Looking at a store: what is read, and what is not."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

import walbatch as wb
from tests.memory import MemoryFileSystem, environment
from walbatch.core.frame import (
    FrameHeader,
    HeaderState,
    SegmentHeader,
    decode_segment_header,
    encode_segment_header,
)
from walbatch.core.recovery import IdentityState, StoreFacts, make_plan
from walbatch.core.scanner import Visit
from walbatch.storage.dropped import write_dropped
from walbatch.storage.layout import Layout, read_identity
from walbatch.storage.survey import segment_numbers, survey
from walbatch.types import Checkpoint

LAYOUT = Layout("/q")


@pytest.fixture(scope="module")
def fs() -> MemoryFileSystem:
    """Many sealed segments and an active one."""
    fs = MemoryFileSystem()
    settings = wb.Settings(segment_bytes=4096, compress_bytes_min=None, checkpoint_ms=3_600_000)
    engine = wb.Engine.open(
        "/q", lanes={"put": wb.Lane(None)}, settings=settings, environment=environment(fs)
    )
    for number in range(40):
        engine.submit("put", key=b"k", payload=b"%d " % number * 200)
    engine.close(drain=False)
    return fs


def look(
    fs: MemoryFileSystem, *, watermark: int = 0, full: bool = False, visits: list[int] | None = None
) -> StoreFacts:
    identity, store = read_identity(fs, LAYOUT)
    checkpoint = Checkpoint(
        generation=1, epoch=1, watermark=watermark, durable_lsn=watermark, segment=1, settled_count=watermark
    )
    fs.calls.clear()

    def visit(number: int, header: SegmentHeader) -> Visit | None:
        assert header.number == number

        def see(_offset: int, frame: FrameHeader, _padded: bytes) -> None:
            if visits is not None:
                visits.extend(range(frame.first_lsn, frame.last_lsn + 1))

        return see

    return survey(fs, LAYOUT, identity=identity, store=store, checkpoint=checkpoint, full=full, visit=visit)


def reads(fs: MemoryFileSystem) -> dict[str, int]:
    return Counter(path for call, path in fs.calls if call == "read")


def test_only_the_tail_is_read_and_a_sealed_segment_is_trusted_for_its_footer(fs: MemoryFileSystem) -> None:
    facts = look(fs)
    assert len(facts.segments) > 8
    for segment in facts.segments[:-1]:
        assert segment.footer is not None
        assert segment.scan is None
    assert facts.segments[-1].scan is not None
    assert facts.segments[-1].last_lsn == 40
    assert sum(segment.operations for segment in facts.segments) == 40
    assert max(reads(fs).values()) <= 5
    assert fs.open_files == 0


def test_of_what_is_settled_only_the_header_is_read(fs: MemoryFileSystem) -> None:
    facts = look(fs, watermark=30)
    settled = [segment for segment in facts.segments if segment.footer is None and segment.scan is None]
    assert len(settled) > 4
    assert all(reads(fs)[LAYOUT.segment(segment.number)] == 1 for segment in settled)
    assert all(segment.header is not None for segment in settled)


def test_a_full_survey_reads_every_byte_and_shows_every_frame(fs: MemoryFileSystem) -> None:
    visits: list[int] = []
    facts = look(fs, full=True, visits=visits)
    assert all(segment.scan is not None for segment in facts.segments)
    assert visits == list(range(1, 41))


def test_a_footer_is_not_trusted_beyond_where_the_next_segment_cuts_off(fs: MemoryFileSystem) -> None:
    """The seal survived a failed sync and a power cut, and a frame before it did not: it was copied to the next segment."""
    first, second = (bytes(fs.files[LAYOUT.segment(number)].data) for number in (1, 2))
    state, header = decode_segment_header(second)
    assert state is HeaderState.VALID
    assert header is not None
    footer = look(fs).segments[0].footer
    assert footer is not None
    lost = footer.offsets[-1]
    cut_off = replace(header, prev_last_lsn=footer.last_lsn - 1, first_lsn=footer.last_lsn)
    damaged = MemoryFileSystem.of("/q", {
        "identity": bytes(fs.files[LAYOUT.identity].data),
        "wal/0000000000000000001.seg": first[:lost] + bytes(512) + first[lost + 512 :],
        "wal/0000000000000000002.seg": encode_segment_header(cut_off) + second[512:],
    })  # fmt: skip
    segment = look(damaged).segments[0]
    assert segment.footer is None
    assert segment.scan is not None
    assert (segment.scan.last_lsn, segment.end_offset) == (footer.last_lsn - 1, lost)


def test_under_which_marks_operations_were_dropped_is_read_before_any_segment(fs: MemoryFileSystem) -> None:
    """Beside a live engine, what it says was durable must be in what is read after it."""
    store = read_identity(fs, LAYOUT)[1]
    assert store is not None
    noted = Checkpoint(generation=1, epoch=1, watermark=0, durable_lsn=40, segment=2, settled_count=0)
    write_dropped(fs, LAYOUT, store, noted)
    facts = look(fs)
    fs.unlink(LAYOUT.dropped)
    assert facts.dropped == noted
    read = [path for call, path in fs.calls if call == "open_read" and path.startswith(LAYOUT.wal)]
    assert read[0] == LAYOUT.dropped
    assert set(read[1:]) == {LAYOUT.segment(segment.number) for segment in facts.segments}


def test_without_an_identity_the_marks_tell_only_that_the_store_was_used() -> None:
    damaged = MemoryFileSystem.of("/q", {"wal/dropped": b"whatever"})
    facts = survey(damaged, LAYOUT, identity=IdentityState.MISSING, store=None, checkpoint=None)
    assert facts.dropped is None
    assert [case.label for case in make_plan(facts).cases] == ["S1"]


def test_progress_ends_at_all_bytes(fs: MemoryFileSystem) -> None:
    identity, store = read_identity(fs, LAYOUT)
    seen: list[tuple[int, int]] = []
    survey(
        fs,
        LAYOUT,
        identity=identity,
        store=store,
        checkpoint=None,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert (
        seen[-1][0]
        == seen[-1][1]
        == sum(len(fs.files[path].data) for path in fs.files if path.endswith(".seg"))
    )


def test_a_directory_without_segments_has_none() -> None:
    assert segment_numbers(MemoryFileSystem(), LAYOUT) == []
    other = MemoryFileSystem.of(
        "/q", {"wal/x.seg": b"", "wal/0000000000000000003.seg": b"", "wal/0000000000000000002.seg": b""}
    )
    assert segment_numbers(other, LAYOUT) == [2, 3]


def test_an_error_while_reading_is_no_damage_and_leaves_no_file_open(fs: MemoryFileSystem) -> None:
    total = 0
    look(fs)
    calls = len(fs.calls)
    for number in range(1, calls + 1):
        seen = 0

        def fail(call: str, path: str, number: int = number) -> None:
            nonlocal seen
            seen += 1
            if seen == number:
                raise OSError(5, "transient", path)

        fs.fail = fail
        with pytest.raises(OSError, match="transient"):
            look(fs)
        fs.fail = None
        assert fs.open_files == 0
        total += 1
    assert total == calls
    assert look(fs).segments[-1].last_lsn == 40, "the next look is as if nothing had been"
