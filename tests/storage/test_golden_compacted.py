"""The golden files of what flags of a segment allow: whatever the code becomes, it reads them, and writes the same bytes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import pytest

from tools import make_golden_compacted
from tools.make_golden import STORE, fields_of
from tools.make_golden_compacted import rows_of
from walbatch import limits
from walbatch.core.columns import decode_body
from walbatch.core.frame import SECTOR, FrameHeader, FrameType, HeaderState, decode_segment_header
from walbatch.core.recovery import StoreFacts, make_plan
from walbatch.core.scanner import SegmentScan, scan_segment
from walbatch.storage.dropped import read_dropped
from walbatch.storage.filesystem import RealFileSystem
from walbatch.storage.layout import Layout, read_identity
from walbatch.storage.survey import survey

GOLDEN: Final = Path(__file__).resolve().parents[2] / "fixtures" / "golden" / "v1-compacted"
EXPECTED: Final[dict[str, Any]] = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
LAYOUT: Final = Layout(str(GOLDEN))


def scan(number: int) -> tuple[SegmentScan, list[list[list[Any]]]]:
    """The facts of a segment, and the operations of its frames."""
    data = Path(LAYOUT.segment(number)).read_bytes()
    state, header = decode_segment_header(data[:SECTOR])
    assert state is HeaderState.VALID
    assert header is not None
    assert fields_of(header) in EXPECTED["headers"]
    frames: list[list[list[Any]]] = []

    def see(_offset: int, frame: FrameHeader, padded: bytes) -> None:
        if frame.type is FrameType.OPERATIONS:
            frames.append(rows_of(decode_body(frame, padded), frame.first_lsn))

    found = scan_segment(
        lambda size, offset: data[offset : offset + size], header=header, file_bytes=len(data), visit=see
    )
    return found, frames


def look() -> StoreFacts:
    fs = RealFileSystem()
    identity, store = read_identity(fs, LAYOUT)
    return survey(fs, LAYOUT, identity=identity, store=store, checkpoint=None)


def test_no_golden_file_has_changed() -> None:
    files = {str(path.relative_to(GOLDEN)): path for path in GOLDEN.rglob("*") if path.is_file()}
    del files["expected.json"]
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()} == EXPECTED[
        "files"
    ]


def test_frames_with_holes_and_with_options_decode_to_the_expected_values() -> None:
    compacted, frames = scan(4)
    assert (compacted.sealed, compacted.last_lsn, compacted.lost, compacted.damage) == (True, 200, 5, None)
    options, more = scan(5)
    assert (options.sealed, options.last_lsn, options.damage) == (False, 203, None)
    assert [*frames, *more] == EXPECTED["frames"]


def test_what_was_dropped_under_decodes_to_the_expected_value() -> None:
    dropped, findings = read_dropped(RealFileSystem(), LAYOUT, STORE)
    assert findings == ()
    assert dropped is not None
    assert json.loads(json.dumps(asdict(dropped))) == EXPECTED["dropped"]


def test_recovery_accepts_the_golden_store() -> None:
    plan = make_plan(look())
    assert plan.refusal is None
    assert [case.label for case in plan.cases] == ["S7", "W11"]
    assert plan.pending == sum(map(len, EXPECTED["frames"]))
    assert plan.copied == ()
    assert plan.operations_before == 63
    assert plan.next_lsn == 203 + limits.LSN_JUMP + 1


def test_the_generator_writes_what_is_committed_and_nothing_twice(tmp_path: Path) -> None:
    folder = tmp_path / "v1"
    make_golden_compacted.main([str(folder)])
    made = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    # What zstd makes of a footer depends on its version: that file is compared by what it decodes to, above.
    sealed = "wal/0000000000000000004.seg"
    assert {**made["files"], sealed: ""} == {**EXPECTED["files"], sealed: ""}
    assert {**made, "files": {}} == {**EXPECTED, "files": {}}
    with pytest.raises(SystemExit, match="never written again"):
        make_golden_compacted.main([str(folder)])
