"""The golden files of format version 1: whatever the code becomes, it reads them, and writes the same bytes."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import pytest
import zstandard

from tools import make_golden
from walbatch import limits
from walbatch.core.checksum import crc32c, crc32c_audit
from walbatch.core.columns import decode_body, encode_body
from walbatch.core.frame import (
    EMPTY_BODY,
    Body,
    Codec,
    FrameHeader,
    FrameType,
    HeaderState,
    SegmentHeader,
    decode_segment_header,
    encode_frame_header,
    encode_segment_header,
    frame_seed,
)
from walbatch.core.mark import decode_mark, encode_mark
from walbatch.core.recovery import IdentityState, StoreFacts, make_plan
from walbatch.core.routing import shard_of, shards_of
from walbatch.core.scanner import SegmentScan, scan_segment
from walbatch.storage.envelope import (
    decode_checkpoint,
    decode_lane,
    encode_checkpoint,
    encode_lane,
    seal,
    unseal,
)
from walbatch.storage.filesystem import RealFileSystem
from walbatch.storage.layout import Layout, decode_identity, encode_identity, read_identity
from walbatch.storage.segment import read_footer
from walbatch.storage.survey import survey
from walbatch.types import Checkpoint, LaneMemory, Mark

GOLDEN: Final = Path(__file__).resolve().parents[2] / "fixtures" / "golden" / "v1"
EXPECTED: Final[dict[str, Any]] = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
SEGMENTS: Final[list[dict[str, Any]]] = EXPECTED["segments"]
STORE: Final = bytes.fromhex(EXPECTED["identity"]["store"])

each_segment = pytest.mark.parametrize("expected", SEGMENTS, ids=[segment["file"] for segment in SEGMENTS])

Visited = list[tuple[int, FrameHeader, bytes]]


def read_segment(expected: dict[str, Any]) -> tuple[bytes, SegmentHeader]:
    data = (GOLDEN / expected["file"]).read_bytes()
    state, header = decode_segment_header(data[: limits.SECTOR_BYTES])
    assert state is HeaderState.VALID
    assert header is not None
    return data, header


def scan(expected: dict[str, Any]) -> tuple[bytes, SegmentHeader, SegmentScan, Visited]:
    data, header = read_segment(expected)
    visited: Visited = []
    found = scan_segment(
        lambda size, offset: data[offset : offset + size],
        header=header,
        file_bytes=len(data),
        visit=lambda offset, frame, padded: visited.append((offset, frame, padded)),
    )
    return data, header, found, visited


def unshort(text: str) -> bytes:
    """Bytes from what `make_golden.short` wrote."""
    byte, times, count = text.partition("*")
    return bytes.fromhex(byte) * (int(count) if times else 1)


def raw_frames() -> Iterator[Any]:
    for segment in SEGMENTS:
        for index, frame in enumerate(segment["frames"]):
            if frame["codec"] == "RAW":
                yield pytest.param(segment, index, id=f"{segment['file']}-{frame['offset']}")


def test_no_golden_file_has_changed() -> None:
    files = {str(path.relative_to(GOLDEN)): path for path in GOLDEN.rglob("*") if path.is_file()}
    del files["expected.json"]
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()} == EXPECTED[
        "files"
    ]


def test_golden_files_are_small() -> None:
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 64 * limits.KIB


def test_the_identity_decodes_and_encodes_to_the_same_bytes() -> None:
    data = (GOLDEN / "identity").read_bytes()
    assert decode_identity(data) == (IdentityState.VALID, STORE)
    assert encode_identity(STORE, EXPECTED["identity"]["wall_ns"]) == data


@each_segment
def test_a_segment_header_decodes_and_encodes_to_the_same_bytes(expected: dict[str, Any]) -> None:
    data, header = read_segment(expected)
    assert {**asdict(header), "store": header.store.hex()} == {"flags": 0, **expected["header"]}
    assert encode_segment_header(header) == data[: limits.SECTOR_BYTES]


@each_segment
def test_a_segment_scans_to_the_expected_facts(expected: dict[str, Any]) -> None:
    _, _, found, _ = scan(expected)
    torn = expected["torn"]
    damage = found.damage
    assert found.last_lsn == expected["last_lsn"]
    assert found.proven_lsn == expected["proven_lsn"]
    assert found.operations == expected["operations"]
    assert found.sealed == expected["sealed"]
    assert found.clean == expected["clean"]
    assert [frame.offset for frame in found.unproven] == expected["unproven"]
    assert (damage and {key: getattr(damage, key) for key in torn}) == torn


@each_segment
def test_frames_decode_to_the_expected_values(expected: dict[str, Any]) -> None:
    _, _, _, visited = scan(expected)
    assert [decoded(*frame) for frame in visited] == expected["frames"]


def decoded(offset: int, frame: FrameHeader, padded: bytes) -> dict[str, Any]:
    """A frame in the form of the JSON."""
    entry: dict[str, Any] = {
        "offset": offset,
        "type": frame.type.name,
        "codec": frame.codec.name,
        "flags": frame.flags,
        "first_lsn": frame.first_lsn,
        "synced_lsn": frame.synced_lsn,
        "span": frame.span,
        "wall_ns": frame.wall_ns,
    }
    if frame.type is FrameType.OPERATIONS:
        columns = decode_body(frame, padded)
        rows = zip(columns.kind_indexes, columns.priorities, columns.keys, columns.payloads, strict=True)
        entry["operations"] = [
            [columns.kinds[kind], priority, make_golden.short(key), make_golden.short(payload)]
            for kind, priority, key, payload in rows
        ]
        assert frame.count == len(columns.keys)
    return entry


@pytest.mark.parametrize(("expected", "index"), list(raw_frames()))
def test_a_raw_frame_encodes_to_the_same_bytes(expected: dict[str, Any], index: int) -> None:
    data, header = read_segment(expected)
    frame = expected["frames"][index]
    offset = frame["offset"]
    body = operations_body(frame) if frame["type"] == "OPERATIONS" else EMPTY_BODY
    head = encode_frame_header(
        body,
        type=FrameType[frame["type"]],
        first_lsn=frame["first_lsn"],
        span=frame["span"],
        synced_lsn=frame["synced_lsn"],
        wall_ns=frame["wall_ns"],
        seed=frame_seed(header.salt, header.number, offset),
        flags=frame["flags"],
    )
    assert head + body.padded == data[offset : offset + body.total_bytes]


def operations_body(frame: dict[str, Any]) -> Body:
    """The uncompressed body of the operations that the JSON names."""
    rows = [
        (kind, priority, unshort(key), unshort(payload))
        for kind, priority, key, payload in frame["operations"]
    ]
    return encode_body(make_golden.columns_of(rows))


@each_segment
def test_a_compressed_frame_inflates_to_the_bytes_of_the_raw_one(expected: dict[str, Any]) -> None:
    _, _, _, visited = scan(expected)
    for (_, frame, padded), entry in zip(visited, expected["frames"], strict=True):
        if frame.type is FrameType.OPERATIONS and frame.codec is Codec.ZSTD:
            raw = zstandard.ZstdDecompressor().decompress(padded[: frame.stored_bytes])
            body = operations_body(entry)
            assert raw == body.padded[: body.stored_bytes]


@each_segment
def test_the_footer_lists_the_frames_before_it(expected: dict[str, Any]) -> None:
    _, header = read_segment(expected)
    path = GOLDEN / expected["file"]
    file = RealFileSystem().open_read(str(path))
    try:
        found = read_footer(file, header, path.stat().st_size)
    finally:
        file.close()
    assert (found is not None) == expected["sealed"]
    if found is None:
        return
    offset, index = found
    *frames, seal = expected["frames"]
    assert offset == seal["offset"]
    assert index.last_lsn == expected["last_lsn"]
    assert index.operation_count == expected["operations"]
    assert list(index.offsets) == [frame["offset"] for frame in frames]
    assert list(index.first_lsns) == [frame["first_lsn"] for frame in frames]
    rows = [frame.get("operations", []) for frame in frames]
    assert list(index.priorities) == [max((row[1] for row in frame), default=0) for frame in rows]
    assert list(index.counts) == [
        sum(row[0] == kind for row in frame) for frame in rows for kind in index.kinds
    ]


@each_segment
@pytest.mark.parametrize("audit", [False, True], ids=["fast", "audit"])
def test_both_checksum_implementations_agree_on_the_golden_bytes(
    expected: dict[str, Any], *, audit: bool
) -> None:
    crc = crc32c_audit if audit else crc32c
    data, header, _, visited = scan(expected)
    covered = limits.SECTOR_BYTES - 4
    assert crc(data[:covered], 0) == int.from_bytes(data[covered : covered + 4], "little")
    place = [number.to_bytes(8, "little") for number in (header.salt, header.number)]
    for offset, frame, padded in visited:
        # The rule as docs/format.md has it: one sum over the place and the first 60 bytes.
        head = b"".join((*place, offset.to_bytes(8, "little"), data[offset : offset + 60]))
        assert crc(head, 0) == int.from_bytes(data[offset + 60 : offset + 64], "little")
        assert crc(padded, 0) == frame.body_crc


def test_a_mark_decodes_and_encodes_to_the_same_bytes() -> None:
    data = (GOLDEN / "values" / "mark").read_bytes()
    assert plain(decode_mark(data)) == EXPECTED["mark"]
    assert encode_mark(decode_mark(data)) == data


def test_a_checkpoint_decodes_and_encodes_to_the_same_bytes() -> None:
    data = (GOLDEN / "values" / "checkpoint").read_bytes()
    checkpoint = decode_checkpoint(unseal(b"1", data, STORE))
    assert plain(checkpoint) == EXPECTED["checkpoint"]
    assert seal(b"1", encode_checkpoint(checkpoint), STORE) == data


def test_the_memory_of_a_lane_decodes_and_encodes_to_the_same_bytes() -> None:
    data = (GOLDEN / "values" / "lane").read_bytes()
    memory = decode_lane(b"put", unseal(b"put", data, STORE))
    assert plain(memory) == EXPECTED["lane"]
    assert seal(b"put", encode_lane(memory), STORE) == data


def plain(value: Mark | Checkpoint | LaneMemory) -> Any:
    """A value in the form of the JSON, which has lists for tuples."""
    return json.loads(json.dumps(asdict(value)))


def golden_facts() -> StoreFacts:
    fs, layout = RealFileSystem(), Layout(str(GOLDEN))
    identity, store = read_identity(fs, layout)
    return survey(fs, layout, identity=identity, store=store, checkpoint=None)


def test_recovery_accepts_the_golden_store() -> None:
    plan = make_plan(golden_facts())
    assert plan.refusal is None
    assert [case.label for case in plan.cases] == ["S7", "W11"]
    assert plan.pending == sum(len(rows) for rows in live_operations())
    assert [frame.offset for frame in plan.copied] == SEGMENTS[-1]["unproven"]
    assert plan.next_lsn == SEGMENTS[-1]["last_lsn"] + limits.LSN_JUMP + 1
    assert (plan.next_segment, plan.epoch) == (6, 5)


def live_operations() -> Iterator[list[list[Any]]]:
    """Operations of every frame that no later segment supersedes."""
    for segment, following in zip(SEGMENTS, [*SEGMENTS[1:], None], strict=True):
        bound = following["header"]["prev_last_lsn"] if following else limits.LSN_MAX
        for frame in segment["frames"]:
            if frame["first_lsn"] <= bound:
                yield frame.get("operations", [])


def test_routing_is_pinned() -> None:
    assert crc32c(b"123456789", 0) == 0xE306_9283, "the check value of CRC-32C"
    assert shard_of(b"123456789", 256) == 0x83
    assert shards_of([b"", b"a", b"123456789"], 7) == [0, 0xC1D0_4330 % 7, 0xE306_9283 % 7]


def test_golden_files_are_never_written_again(tmp_path: Path) -> None:
    folder = tmp_path / "v1"
    make_golden.main([str(folder)])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match="never written again"):
        make_golden.main([str(folder)])
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_generator_writes_what_is_committed(tmp_path: Path) -> None:
    folder = tmp_path / "v1"
    make_golden.make_golden(folder)
    made = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    # What zstd makes of a segment depends on its version: that file is compared by what it decodes to, above.
    for name in [name for name in made["files"] if name not in compressed_files()]:
        assert made["files"][name] == EXPECTED["files"][name], name
    assert made["segments"][1:] == EXPECTED["segments"][1:]


def compressed_files() -> set[str]:
    return {
        segment["file"]
        for segment in SEGMENTS
        if any(frame["codec"] == "ZSTD" for frame in segment["frames"])
    }
