"""The scanner: it returns exactly the valid prefix of a segment, and says what the headers behind the damage prove."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.segments import (
    STORE,
    Placed,
    Segment,
    columns_of,
    flipped,
    overwritten,
    reader,
    renumbered,
    scan,
    segment_header,
    with_header,
    zeroed,
)
from walbatch import limits
from walbatch.core.columns import decode_body, encode_body
from walbatch.core.frame import (
    EMPTY_BODY,
    FRAME_MAGIC,
    SECTOR,
    SEGMENT_COMPACTED,
    FrameError,
    FrameHeader,
    FrameType,
    SegmentHeader,
)
from walbatch.core.scanner import Damage, iterate_frames, scan_segment

HEADER_BYTES = limits.FRAME_HEADER_BYTES
Visited = list[tuple[int, FrameHeader, bytes]]


@st.composite
def segments(draw: st.DrawFn, *, frames_min: int = 1, frames_max: int = 6) -> Segment:
    """A segment of random frames, each with a synced LSN that may lag behind, and sometimes a preallocated tail."""
    segment = Segment(segment_header(prev_last_lsn=draw(st.integers(0, 5))))
    proven = segment.last_lsn
    for _ in range(draw(st.integers(frames_min, frames_max))):
        proven = draw(st.integers(proven, segment.last_lsn))
        kind = draw(st.sampled_from(["operations", "operations", "large", "stamp", "clean", "void"]))
        if kind == "operations":
            segment.operations(
                *draw(st.lists(st.binary(max_size=4), min_size=1, max_size=3)), synced_lsn=proven
            )
        elif kind == "large":
            segment.operations(bytes(draw(st.integers(400, 1200))), synced_lsn=proven)
        elif kind == "void":
            segment.void(draw(st.integers(1, 9)), lost=draw(st.booleans()), synced_lsn=proven)
        else:
            segment.stamp(clean=kind == "clean", synced_lsn=proven)
    return segment


def intact_prefix(segment: Segment, data: bytes) -> list[Placed]:
    """The frames in front whose bytes are all as they were written."""
    kept: list[Placed] = []
    for frame in segment.frames:
        if data[frame.offset : frame.end] != segment.bytes_of(frame):
            break
        kept.append(frame)
    return kept


def expected_damage(segment: Segment, data: bytes, kept: list[Placed]) -> Damage | None:
    """What the headers that are still intact say, told by somebody who knows where they stand."""
    start = kept[-1].end if kept else SECTOR
    if not data[start:].strip(b"\0"):
        return None
    expected = kept[-1].header.last_lsn + 1 if kept else segment.header.first_lsn
    intact = [
        frame
        for frame in segment.frames[len(kept) :]
        if data[frame.offset : frame.offset + HEADER_BYTES] == segment.bytes_of(frame)[:HEADER_BYTES]
    ]
    behind = [frame.header for frame in intact if frame.offset > start]
    continued = [header.last_lsn for header in behind if header.span and header.first_lsn == expected]
    return Damage(
        offset=start,
        end=start + len(data[start:].rstrip(b"\0")),
        reason="",
        evidence_lsn=max([frame.header.synced_lsn for frame in intact] + continued, default=0),
        seen_lsn=max((frame.header.last_lsn for frame in intact), default=0),
        resume_lsn=behind[0].first_lsn if behind else 0,
    )


def check_scan(segment: Segment, data: bytes) -> None:
    """Scan `data`, which is `segment` after damage, and compare everything with what must be found."""
    visited: Visited = []
    found = scan(data, segment.header, visit=lambda *frame: visited.append(frame))
    kept = intact_prefix(segment, data)
    headers = [frame.header for frame in kept]
    proven = max([segment.header.prev_last_lsn] + [header.synced_lsn for header in headers])
    assert [(offset, header) for offset, header, _ in visited] == [(f.offset, f.header) for f in kept]
    assert [body for _, _, body in visited] == [segment.bytes_of(frame)[HEADER_BYTES:] for frame in kept]
    assert found.end_offset == (kept[-1].end if kept else SECTOR)
    assert found.last_lsn == (headers[-1].last_lsn if headers else segment.header.prev_last_lsn)
    assert found.frames == len(kept)
    assert found.operations == sum(header.count for header in headers)
    assert found.proven_lsn == proven
    assert found.lost == sum(header.span for header in headers if header.flags & 4)
    assert found.clean == bool(headers and headers[-1].type is FrameType.STAMP and headers[-1].flags & 1)
    assert found.sealed == bool(headers and headers[-1].type is FrameType.SEAL)
    assert [(frame.offset, frame.header) for frame in found.unproven] == [
        (f.offset, f.header) for f in kept if f.header.span and f.header.last_lsn > proven
    ]
    damage = found.damage and replace(found.damage, reason="")
    assert damage == expected_damage(segment, data, kept)


# --- undamaged ----------------------------------------------------------------------------------------------


@given(segment=segments(frames_min=0), tail=st.integers(0, 3))
def test_an_undamaged_segment_is_read_to_its_last_frame(segment: Segment, tail: int) -> None:
    found = scan(segment.preallocated(tail).data, segment.header)
    assert (found.last_lsn, found.damage) == (segment.last_lsn, None)
    check_scan(segment, bytes(segment.data))


def test_an_empty_segment_ends_where_the_one_before_it_ended() -> None:
    segment = Segment(segment_header(prev_last_lsn=9)).preallocated(2)
    found = scan(segment.data, segment.header)
    assert (found.end_offset, found.last_lsn, found.proven_lsn, found.frames) == (SECTOR, 9, 9, 0)


def test_a_file_that_ends_with_its_header_holds_no_frames() -> None:
    segment = Segment()
    assert scan(segment.data[:SECTOR], segment.header).damage is None


def test_a_later_header_proves_the_frames_up_to_its_synced_lsn() -> None:
    segment = Segment()
    segment.operations(b"a", synced_lsn=0)
    segment.operations(b"b", synced_lsn=0)
    segment.operations(b"c", synced_lsn=1)
    found = scan(segment.data, segment.header)
    assert (found.proven_lsn, [frame.header.first_lsn for frame in found.unproven]) == (1, [2, 3])


def test_a_stamp_proves_everything_before_it() -> None:
    segment = Segment()
    segment.operations(b"a", b"b")
    segment.stamp()
    found = scan(segment.data, segment.header)
    assert (found.proven_lsn, found.unproven, found.clean) == (2, (), False)


def test_a_clean_stamp_counts_only_as_the_last_frame() -> None:
    segment = Segment()
    segment.stamp(clean=True)
    assert scan(segment.data, segment.header).clean
    segment.operations(b"a")
    assert not scan(segment.data, segment.header).clean


def test_a_seal_proves_and_ends_the_segment() -> None:
    segment = Segment()
    segment.operations(b"a")
    segment.seal()
    found = scan(segment.data, segment.header)
    assert (found.sealed, found.unproven, found.end_offset) == (True, (), len(segment.data))


def test_nothing_behind_a_seal_is_a_frame() -> None:
    segment = Segment()
    segment.operations(b"a")
    seal = segment.seal()
    segment.operations(b"b")
    found = scan(segment.data, segment.header)
    assert (found.last_lsn, found.end_offset) == (1, seal.end)
    assert found.damage is not None
    assert (found.damage.reason, found.damage.seen_lsn) == ("bytes behind the last frame", 2)


def test_skipped_lsns_are_counted_as_lost_only_where_a_salvage_gave_them_up() -> None:
    segment = Segment()
    segment.void(5)
    segment.void(7, lost=True)
    found = scan(segment.data, segment.header)
    assert (found.last_lsn, found.operations, found.lost) == (12, 0, 7)


def test_a_frame_larger_than_the_read_size_is_read_whole() -> None:
    segment = Segment()
    payload = bytes([1]) * (2 * limits.SCAN_CHUNK_BYTES)
    segment.operations(payload)
    segment.operations(b"small")
    bodies: list[bytes] = []

    def visit(_offset: int, header: FrameHeader, padded: bytes) -> None:
        bodies.extend(decode_body(header, padded).payloads)

    scan(segment.data, segment.header, visit=visit)
    assert bodies == [payload, b"small"]


# --- cut off by the next segment ----------------------------------------------------------------------------


def test_frames_above_the_bound_are_superseded_whatever_they_are() -> None:
    segment = Segment()
    kept = segment.operations(b"a", b"b")
    segment.operations(b"c")
    data = bytes(segment.data) + b"garbage"
    found = scan(data, segment.header, lsn_bound=2)
    assert (found.last_lsn, found.end_offset, found.damage) == (2, kept.end, None)


def test_a_bound_before_the_first_frame_supersedes_all() -> None:
    segment = Segment(segment_header(prev_last_lsn=9))
    segment.operations(b"a")
    found = scan(segment.data, segment.header, lsn_bound=9)
    assert (found.last_lsn, found.end_offset, found.frames, found.damage) == (9, SECTOR, 0, None)


def test_damage_below_the_bound_is_reported() -> None:
    segment = Segment()
    segment.operations(b"a")
    broken = segment.operations(b"b")
    found = scan(flipped(segment.data, broken.offset), segment.header, lsn_bound=2)
    assert found.last_lsn == 1
    assert found.damage is not None


# --- damage, exhaustively -----------------------------------------------------------------------------------


def sample() -> Segment:
    """All types of frames, some of them unproven, in a few sectors."""
    segment = Segment(segment_header(prev_last_lsn=4))
    segment.operations(b"first", b"second")
    segment.stamp()
    segment.operations(b"x" * 500, synced_lsn=6)
    segment.void(3, synced_lsn=6)
    segment.operations(b"last", synced_lsn=7)
    return segment


def test_a_segment_cut_at_any_byte_keeps_exactly_its_whole_frames() -> None:
    segment = sample()
    for size in range(SECTOR, len(segment.data)):
        check_scan(segment, bytes(segment.data[:size]))


def test_a_segment_with_any_byte_changed_keeps_exactly_the_frames_before_it() -> None:
    segment = sample()
    for at in range(SECTOR, len(segment.data)):
        check_scan(segment, flipped(segment.data, at, 1 << at % 8))


def test_a_segment_zeroed_from_any_byte_on_keeps_exactly_its_whole_frames() -> None:
    segment = sample()
    for at in range(SECTOR, len(segment.data), 7):
        check_scan(segment, zeroed(segment.data, at, len(segment.data)))


@given(segment=segments(), data=st.data())
def test_any_mixture_of_damage_keeps_exactly_the_valid_prefix(segment: Segment, data: st.DataObject) -> None:
    damaged = bytes(segment.preallocated(data.draw(st.integers(0, 2))).data)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(SECTOR, len(damaged) - 1))
        how = data.draw(st.sampled_from(["bit", "zeros", "garbage", "cut"]))
        if how == "bit":
            damaged = flipped(damaged, at, 1 << data.draw(st.integers(0, 7)))
        elif how == "zeros":
            damaged = zeroed(damaged, at // SECTOR * SECTOR)
        elif how == "garbage":
            damaged = overwritten(damaged, at, data.draw(st.binary(max_size=len(damaged) - at)))[
                : len(damaged)
            ]
        else:
            damaged = damaged[: max(at, SECTOR + 1)]
    check_scan(segment, damaged)


@given(segment=segments(frames_min=2), data=st.data())
def test_frames_that_changed_places_are_not_believed(segment: Segment, data: st.DataObject) -> None:
    one, other = data.draw(st.lists(st.sampled_from(segment.frames), min_size=2, max_size=2, unique=True))
    check_scan(segment, overwritten(segment.data, one.offset, segment.bytes_of(other))[: len(segment.data)])


ELSEWHERE: dict[str, SegmentHeader] = {
    "another incarnation": segment_header(salt=8),
    "another segment": segment_header(number=2),
    # A store has a salt of its own: the frames carry no UUID.
    "another store": segment_header(store=STORE[::-1], salt=9),
}


@pytest.mark.parametrize("header", ELSEWHERE.values(), ids=ELSEWHERE.keys())
def test_a_frame_from_elsewhere_is_not_believed_even_at_its_own_offset(header: SegmentHeader) -> None:
    segment, foreign = Segment(), Segment(header)
    for built in (segment, foreign):
        built.operations(b"a")
        built.operations(b"b")
    assert segment.frames[1].offset == foreign.frames[1].offset
    spliced = overwritten(segment.data, segment.frames[1].offset, foreign.bytes_of(foreign.frames[1]))
    found = scan(spliced, segment.header)
    assert found.last_lsn == 1
    assert found.damage is not None
    assert (found.damage.evidence_lsn, found.damage.seen_lsn) == (0, 0)


@pytest.mark.parametrize("header", ELSEWHERE.values(), ids=ELSEWHERE.keys())
@given(segment=segments(frames_max=3), stale=segments(frames_min=4))
def test_stale_bytes_in_the_preallocated_tail_invent_nothing(
    header: SegmentHeader, segment: Segment, stale: Segment
) -> None:
    old = Segment(renumbered(stale.header, salt=header.salt + 100, number=header.number, store=header.store))
    for frame in stale.frames:
        body = with_header(stale.bytes_of(frame), frame.header, seed=old.seed(frame.offset))
        old.data += body
    written = len(segment.data)
    data = bytes(segment.data) + bytes(old.data[written:])
    found = scan(data, segment.header)
    assert (found.last_lsn, found.end_offset, found.frames) == (
        segment.last_lsn,
        written,
        len(segment.frames),
    )
    if data[written:].strip(b"\0"):
        assert found.damage is not None
        assert (found.damage.offset, found.damage.evidence_lsn, found.damage.seen_lsn) == (written, 0, 0)


@pytest.mark.parametrize("shift", [0, 1, SECTOR - HEADER_BYTES, 3 * SECTOR], ids=str)
def test_a_payload_that_looks_like_a_frame_is_not_one(shift: int) -> None:
    """A store that stores its own segments: the copies never stand where they were made for."""
    inner = Segment()
    inner.operations(b"inner", b"inner")
    inner.operations(b"inner", synced_lsn=2)
    segment = Segment()
    segment.operations(b"a")
    outer = segment.operations(bytes(shift) + bytes(inner.data[SECTOR:]))
    visited: Visited = []
    scan(segment.data, segment.header, visit=lambda *frame: visited.append(frame))
    assert [header.last_lsn for _, header, _ in visited] == [1, 2]
    found = scan(flipped(segment.data, outer.offset), segment.header)
    assert found.damage is not None
    assert (found.damage.evidence_lsn, found.damage.seen_lsn, found.damage.resume_lsn) == (0, 0, 0)


# --- frames that are valid in themselves, but not here ------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfit:
    first_lsn: int
    synced_lsn: int


MISFITS = {
    "a gap in the LSNs": Misfit(first_lsn=4, synced_lsn=2),
    "a repeated LSN": Misfit(first_lsn=2, synced_lsn=1),
    "an LSN of an earlier life": Misfit(first_lsn=1, synced_lsn=0),
    "proof of its own durability": Misfit(first_lsn=3, synced_lsn=3),
    "proof of what does not exist yet": Misfit(first_lsn=3, synced_lsn=99),
}


@pytest.mark.parametrize("misfit", MISFITS.values(), ids=MISFITS.keys())
def test_a_frame_with_valid_crcs_is_rejected_for(misfit: Misfit) -> None:
    segment = Segment()
    segment.operations(b"a", b"b")
    segment.put(
        EMPTY_BODY, type_=FrameType.VOID, span=1, first_lsn=misfit.first_lsn, synced_lsn=misfit.synced_lsn
    )
    found = scan(segment.data, segment.header)
    assert (found.last_lsn, found.frames) == (2, 1)
    assert found.damage is not None
    assert "expected" in found.damage.reason
    assert found.damage.seen_lsn == misfit.first_lsn


# --- evidence -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    build: Callable[[Segment], Placed]
    """Builds behind two operations, and returns the frame to damage."""
    proven: bool
    """Whether what is behind proves that the damaged bytes, or those behind them, had been acknowledged."""


def _unsynced_neighbour(segment: Segment) -> Placed:
    damaged = segment.operations(b"c", synced_lsn=2)
    segment.operations(b"d", synced_lsn=2)
    return damaged


def _synced_neighbour(segment: Segment) -> Placed:
    damaged = segment.operations(b"c")
    segment.operations(b"d")
    return damaged


def _neighbour_that_syncs_a_part(segment: Segment) -> Placed:
    damaged = segment.operations(b"c", synced_lsn=2)
    segment.operations(b"d", synced_lsn=2)
    segment.operations(b"e", synced_lsn=3)
    return damaged


def _stamp_behind(segment: Segment) -> Placed:
    damaged = segment.operations(b"c")
    segment.stamp()
    return damaged


def _seal_behind(segment: Segment) -> Placed:
    damaged = segment.operations(b"c")
    segment.seal()
    return damaged


def _damaged_stamp_before_operations(segment: Segment) -> Placed:
    damaged = segment.stamp()
    segment.operations(b"c")
    return damaged


def _damaged_stamp_before_a_stamp(segment: Segment) -> Placed:
    damaged = segment.stamp()
    segment.stamp(clean=True)
    return damaged


EVIDENCE = {
    "nothing behind it": Evidence(build=lambda segment: segment.operations(b"c"), proven=False),
    "a frame of the same unsynced write": Evidence(build=_unsynced_neighbour, proven=False),
    "a frame written after its sync": Evidence(build=_synced_neighbour, proven=True),
    "a frame written after the sync of just it": Evidence(build=_neighbour_that_syncs_a_part, proven=True),
    "an idle stamp": Evidence(build=_stamp_behind, proven=True),
    "a seal footer": Evidence(build=_seal_behind, proven=True),
    "a damaged stamp, and operations written after it": Evidence(
        build=_damaged_stamp_before_operations, proven=True
    ),
    "a damaged stamp, and nothing but a stamp after it": Evidence(
        build=_damaged_stamp_before_a_stamp, proven=False
    ),
}


@pytest.mark.parametrize("part", ["header", "body"])
@pytest.mark.parametrize("case", EVIDENCE.values(), ids=EVIDENCE.keys())
def test_evidence_that_damaged_bytes_were_acknowledged(case: Evidence, part: str) -> None:
    segment = Segment()
    segment.operations(b"a", b"b")
    damaged = case.build(segment)
    at = damaged.offset + (8 if part == "header" else HEADER_BYTES)
    found = scan(flipped(segment.preallocated(1).data, at), segment.header)
    assert found.last_lsn == 2
    assert found.damage is not None
    assert (found.damage.evidence_lsn > found.last_lsn) == case.proven


def test_evidence_is_found_megabytes_behind_the_damage_on_both_sides_of_a_read() -> None:
    header = segment_header()
    for distance in (limits.SCAN_CHUNK_BYTES - SECTOR, limits.SCAN_CHUNK_BYTES, 3 * limits.SCAN_CHUNK_BYTES):
        segment = Segment(header)
        damaged = segment.operations(b"a")
        segment.preallocated((distance - SECTOR) // SECTOR)
        proof = segment.stamp()
        assert proof.offset - damaged.offset == distance
        found = scan(flipped(segment.data, damaged.offset), header)
        assert found.damage is not None
        assert (found.damage.evidence_lsn, found.damage.end > proof.offset) == (1, True)


def test_a_segment_of_nothing_but_frame_magic_is_damage_without_evidence() -> None:
    segment = Segment()
    data = bytes(segment.data) + FRAME_MAGIC * (SECTOR * 4)
    found = scan(data, segment.header)
    assert found.damage is not None
    assert (found.damage.offset, found.damage.end) == (SECTOR, len(data))
    assert (found.damage.evidence_lsn, found.damage.seen_lsn, found.damage.resume_lsn) == (0, 0, 0)


# --- bounded ------------------------------------------------------------------------------------------------


def test_a_file_shorter_than_was_said_ends_where_it_ends() -> None:
    segment = Segment()
    segment.operations(b"a")
    found = scan_segment(
        reader(segment.data), header=segment.header, file_bytes=len(segment.data) + 10 * SECTOR
    )
    assert (found.last_lsn, found.damage) == (1, None)


def test_the_scanner_reads_in_pieces_of_bounded_size() -> None:
    segment = Segment()
    for _ in range(20):
        segment.operations(bytes(200_000))
    sizes: list[int] = []
    read = reader(flipped(segment.data, segment.frames[5].offset))

    def watched(size: int, offset: int) -> bytes:
        sizes.append(size)
        return read(size, offset)

    scan_segment(watched, header=segment.header, file_bytes=len(segment.data))
    assert max(sizes) <= limits.SCAN_CHUNK_BYTES
    assert sum(sizes) < 4 * len(segment.data)


def test_work_grows_with_the_frames_and_not_with_their_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane that syncs at intervals may leave tens of thousands of frames without proof."""
    looks = 0
    plain = vars(FrameHeader)["last_lsn"].fget

    def counted(header: FrameHeader) -> int:
        nonlocal looks
        looks += 1
        return int(plain(header))

    segment = Segment()
    for _ in range(500):
        segment.void(1, synced_lsn=0)
    monkeypatch.setattr(FrameHeader, "last_lsn", property(counted))
    assert len(scan(segment.data, segment.header).unproven) == 500
    assert looks < 4 * 500


def test_an_error_of_reading_passes_through() -> None:
    segment = Segment()
    segment.operations(b"a")

    def broken(size: int, offset: int) -> bytes:
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        scan_segment(broken, header=segment.header, file_bytes=len(segment.data))


def test_an_error_of_the_visitor_passes_through() -> None:
    segment = Segment()
    segment.operations(b"a")

    def visit(_offset: int, _header: FrameHeader, _padded: bytes) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        scan(segment.data, segment.header, visit=visit)


# --- headers only -------------------------------------------------------------------------------------------


def test_headers_are_iterated_up_to_the_end() -> None:
    segment = sample()
    frames = list(
        iterate_frames(reader(segment.data), header=segment.header, offset=SECTOR, end=len(segment.data))
    )
    assert frames == [(frame.offset, frame.header) for frame in segment.frames]


def test_iterating_headers_stops_loudly_at_the_first_that_is_damaged() -> None:
    segment = sample()
    damaged = flipped(segment.data, segment.frames[2].offset)
    frames = iterate_frames(reader(damaged), header=segment.header, offset=SECTOR, end=len(damaged))
    assert [next(frames)[0], next(frames)[0]] == [frame.offset for frame in segment.frames[:2]]
    with pytest.raises(FrameError):
        next(frames)


# --- frames with holes ----------------------------------------------------------------------------------------


def sparse(flags: int) -> Segment:
    """A segment whose first frame names three LSNs of nine."""
    segment = Segment(replace(segment_header(), flags=flags))
    body = encode_body(replace(columns_of([b"a", b"b", b"c"]), lsn_offsets=[0, 4, 7]))
    segment.put(body, type_=FrameType.OPERATIONS, span=9)
    segment.operations(b"d")
    return segment


def test_frames_may_have_holes_in_a_compacted_segment() -> None:
    segment = sparse(SEGMENT_COMPACTED)
    found = scan(segment.data, segment.header)
    assert found.damage is None
    assert (found.last_lsn, found.operations, found.frames) == (10, 4, 2)


def test_frames_have_no_holes_in_a_segment_that_was_not_compacted() -> None:
    segment = sparse(SEGMENT_COMPACTED)
    header = replace(segment.header, flags=0)
    found = scan(segment.data, header)
    assert found.damage is not None
    assert "not compacted" in found.damage.reason
    assert found.last_lsn == 0
