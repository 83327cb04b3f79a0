"""Compaction of the log: what is left is what was not settled, in its order, whatever fails and whoever reads meanwhile."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

import walbatch as wb
from tests.memory import MemoryFileSystem
from tests.runtime.fakes import Caller
from tests.storage.test_log import LAYOUT, SETTINGS, append, failing, frames, look, new_store, open_log
from walbatch.core.frame import (
    EMPTY_BODY,
    FLAG_LOST,
    SECTOR,
    SEGMENT_COMPACTED,
    SEGMENT_OPTIONS,
    FrameType,
    SegmentHeader,
)
from walbatch.core.recovery import make_plan
from walbatch.core.routing import shard_of
from walbatch.core.scanner import iterate_frames
from walbatch.limits import COMPACTED_FACTOR
from walbatch.storage.compaction import UNREAD_GENERATIONS
from walbatch.storage.dropped import read_dropped, write_dropped
from walbatch.storage.layout import read_identity
from walbatch.storage.log import Log, LogSettings
from walbatch.storage.segment import SegmentWriter, read_header
from walbatch.storage.survey import survey
from walbatch.types import Checkpoint, LaneMark, Mark, Options, Position, merge_ranges

SLOW_EVERY = 10
STORE = bytes(16)


def covering(
    *settled: tuple[int, int], watermark: int = 0, generation: int = 1, slow: Mark | None = None
) -> Checkpoint:
    """A checkpoint that calls ranges of the kind "put" settled, and nothing of "slow"."""
    ranges = merge_ranges(settled, watermark)
    lanes = {"put": LaneMark(shards=(Mark(watermark=watermark, ranges=ranges),))}
    lanes["slow"] = LaneMark(shards=(slow or Mark(watermark=watermark),))
    return Checkpoint(
        generation=generation,
        epoch=1,
        watermark=watermark,
        durable_lsn=watermark,
        segment=1,
        settled_count=0,
        lanes=lanes,
    )


ALL_PUT = covering((1, 10**6))


def mixed(fs: MemoryFileSystem, count: int = 40) -> Log:
    """A log of single operations of 700 bytes, five to a segment; every tenth is of the kind "slow"."""
    log = open_log(fs)
    for number in range(1, count + 1):
        append(log, b"%d" % number * 200, kind="put" if number % SLOW_EVERY else "slow")
    return log


def rows(log: Log) -> dict[int, bytes]:
    return {
        lsn: payload for frame in frames(log) for lsn, payload in zip(frame.lsns, frame.payloads, strict=True)
    }


def slow_rows(count: int = 40) -> dict[int, bytes]:
    return {n: b"%d" % n * 200 for n in range(SLOW_EVERY, count + 1, SLOW_EVERY)}


def compacted(log: Log, covered: Checkpoint = ALL_PUT) -> int:
    """Compact until nothing more is worth it; how many steps that took."""
    steps = 0
    while log.compact(covered):
        steps += 1
        assert steps < 1000
    return steps


def segment_files(fs: MemoryFileSystem) -> list[str]:
    return sorted(path for path in fs.files if path.endswith(".seg"))


def header_of(fs: MemoryFileSystem, number: int) -> SegmentHeader:
    file = fs.open_read(LAYOUT.segment(number))
    header = read_header(file)[1]
    file.close()
    assert header is not None
    return header


# --- what is left ----------------------------------------------------------------------------------------------------


def test_what_is_settled_is_gone_and_the_rest_stays_in_its_order_with_its_lsns() -> None:
    fs = new_store()
    log = mixed(fs)
    before = log.disk_bytes
    assert compacted(log) > 0
    active = log.end.segment
    left = rows(log)
    assert {lsn for lsn in left if lsn % SLOW_EVERY} <= set(range(36, 41)), "what the active segment holds"
    assert {lsn: left[lsn] for lsn in slow_rows()} == slow_rows()
    assert list(left) == sorted(left)
    assert log.disk_bytes < before / 2
    assert log.segment_count <= 4
    log.close(next_lsn=41)
    after = fs.after_power_cut()
    assert segment_files(after) == segment_files(fs)
    again = open_log(after)
    assert rows(again) == left
    again.close(next_lsn=None)
    assert fs.open_files == after.open_files == 0
    assert active == max(int(path[-23:-4]) for path in segment_files(fs))


def test_the_chain_is_what_it_was_and_recovery_reads_every_byte_of_it() -> None:
    fs = new_store()
    log = mixed(fs)
    compacted(log)
    log.close(next_lsn=41)
    plan = make_plan(look(fs))
    assert plan.refusal is None
    assert [case.label for case in plan.cases] == ["S7", "W10"]
    assert plan.operations_before == 40
    assert plan.pending == len(rows_of(fs))
    first, *_, last = (int(path[-23:-4]) for path in segment_files(fs))
    header = header_of(fs, first)
    assert header.flags == SEGMENT_COMPACTED
    assert (header.prev_number, header.prev_last_lsn, header.first_lsn, header.operations_before) == (
        0,
        0,
        1,
        0,
    )
    assert header_of(fs, last).flags == 0


def rows_of(fs: MemoryFileSystem) -> dict[int, bytes]:
    """What an opening of these files finds."""
    twin = MemoryFileSystem.of(
        "/q", {path.removeprefix("/q/"): bytes(content.data) for path, content in fs.files.items()}
    )
    log = open_log(twin)
    try:
        return rows(log)
    finally:
        log.close(next_lsn=None)


def test_a_log_that_is_compacted_again_and_again_goes_on() -> None:
    fs = new_store()
    log = open_log(fs)
    kept = {}
    for number in range(1, 401):
        kind = "put" if number % 25 else "slow"
        append(log, b"%d" % number * 200, kind=kind)
        if kind == "slow":
            kept[number] = b"%d" % number * 200
        if number % 7 == 0:
            log.compact(covering((1, number - 3), generation=number))
            unsettled = 1024 * (number // 25 + 3)
            assert log.disk_bytes <= COMPACTED_FACTOR * unsettled + 4 * SETTINGS.segment_bytes
            assert log.segment_count <= 4 + unsettled // 1024
    found = rows(log)
    assert {lsn: found[lsn] for lsn in kept} == kept
    log.close(next_lsn=None)


def test_a_straggler_and_many_openings_leave_few_files() -> None:
    fs = new_store()
    for life in range(30):
        log = open_log(fs)
        append(log, b"%d" % life * 100, kind="put" if life else "slow")
        append(log, b"%d" % life * 100)
        compacted(log, covering((1, 10**9), generation=life + 1))
        log.close(next_lsn=log.last_lsn + 1)
    assert len(segment_files(fs)) <= 4
    assert min(rows_of(fs)) == 1


def test_nothing_settled_nothing_rewritten() -> None:
    fs = new_store()
    log = mixed(fs)
    before = {path: bytes(content.data) for path, content in fs.files.items()}
    assert not log.compact(covering())
    assert {path: bytes(content.data) for path, content in fs.files.items()} == before
    assert not log.compact(covering())
    log.close(next_lsn=None)


def test_small_operations_are_joined_into_larger_frames_and_keep_all_that_they_have() -> None:
    fs = new_store()
    log = open_log(fs)
    options = Options(not_before_ns=5, idempotency_key=b"once")
    append(log, b"first", kind="slow")
    log.append(
        first_lsn=2, kinds=["slow", "put"], kind_indexes=[0, 1, 0], priorities=[9, 5, 1], keys=[b"a", b"b", b"c"],
        payloads=[b"x", b"y", b"z"], synced_lsn=1, options=[options, wb.types.NO_OPTIONS, wb.types.NO_OPTIONS],
    )  # fmt: skip
    for _ in range(20):
        append(log, bytes(600))
    compacted(log)
    frame = log.read_frame(Position(1, SECTOR), next_lsn=1)
    assert frame is not None
    assert [(lsn, key) for lsn, key in zip(frame.lsns, frame.keys, strict=True)] == [
        (1, b"k"),
        (2, b"a"),
        (4, b"c"),
    ]
    assert [*frame.priorities] == [5, 9, 1]
    assert [*frame.options] == [wb.types.NO_OPTIONS, options, wb.types.NO_OPTIONS]
    assert [frame.kinds[index] for index in frame.kind_indexes] == ["slow"] * 3
    assert header_of(fs, frame.position.segment).flags == SEGMENT_COMPACTED | SEGMENT_OPTIONS
    log.close(next_lsn=None)


def test_the_first_options_begin_a_segment_that_says_so_and_so_does_every_later_one() -> None:
    fs = new_store()
    log = open_log(fs)
    append(log, b"none")
    for _ in range(2):
        log.append(
            first_lsn=log.last_lsn + 1, kinds=["put"], kind_indexes=[0], priorities=[5], keys=[b"k"], payloads=[b"p"],
            synced_lsn=log.last_lsn, options=[Options(deadline_ns=7)],
        )  # fmt: skip
    assert log.end.segment == 2
    append(log, bytes(3000))
    assert [header_of(fs, number).flags for number in (1, 2, 3)] == [0, SEGMENT_OPTIONS, SEGMENT_OPTIONS]
    log.close(next_lsn=log.last_lsn + 1)
    again = open_log(fs)
    assert header_of(fs, 4).flags == SEGMENT_OPTIONS
    assert [frame.options[0].deadline_ns for frame in frames(again) if frame.options] == [7, 7]
    again.close(next_lsn=None)


def test_what_a_salvage_gave_up_stays_visible() -> None:
    fs = new_store()
    log = open_log(fs)
    append(log, b"a", kind="slow")
    log._active.append(
        EMPTY_BODY, type=FrameType.VOID, first_lsn=2, span=3, synced_lsn=1, wall_ns=0, flags=FLAG_LOST
    )
    for _ in range(8):
        append(log, bytes(700))
    compacted(log)
    segment = look(fs, full=True).segments[0]
    assert segment.header is not None
    assert segment.header.compacted
    assert segment.scan is not None
    assert segment.scan.lost == 3
    log.close(next_lsn=None)


def test_a_tail_that_was_cut_off_is_left_behind() -> None:
    fs = new_store()
    log = open_log(fs)
    append(log, b"proven", kind="slow")
    append(log, b"copied", kind="slow", sync=False)
    crashed = MemoryFileSystem.of("/q", {p.removeprefix("/q/"): bytes(c.data) for p, c in fs.files.items()})
    again = open_log(crashed)
    append(again, bytes(3900))
    append(again, bytes(3900))
    compacted(again)
    assert [payload for payload in rows(again).values() if len(payload) < 100] == [b"proven", b"copied"]
    again.close(next_lsn=None)


# --- who reads meanwhile ---------------------------------------------------------------------------------------------


def test_every_cursor_goes_on_where_it_was_whatever_was_compacted_or_merged_since() -> None:
    for steps in range(1, 5):
        fs = new_store()
        log = mixed(fs)
        cursors = [(Position(1, SECTOR), 1)]
        cursors += [(frame.next_position, frame.last_lsn + 1) for frame in frames(log)]
        cursors += [(frame.position, frame.last_lsn) for frame in frames(log)]
        for _ in range(steps):
            log.compact(ALL_PUT)
            cursors += [(frame.next_position, frame.last_lsn + 1) for frame in frames(log)]
        left = rows(log)
        for position, next_lsn in cursors:
            assert list(read_on(log, position, next_lsn)) == [lsn for lsn in left if lsn >= next_lsn]
        log.close(next_lsn=None)
        assert fs.open_files == 0


def read_on(
    log: Log, position: Position, next_lsn: int, wanted: frozenset[str] | None = None
) -> Iterator[int]:
    while (frame := log.read_frame(position, next_lsn=next_lsn, wanted=wanted)) is not None:
        yield from (lsn for lsn in frame.lsns if lsn >= next_lsn)
        position, next_lsn = frame.next_position, frame.last_lsn + 1


def test_kinds_and_priorities_are_skipped_by_in_what_was_compacted_too() -> None:
    log = mixed(new_store())
    compacted(log)
    assert list(read_on(log, Position(1, SECTOR), 1, frozenset({"slow"}))) == [10, 20, 30, *range(36, 41)]
    assert list(read_on(log, Position(1, SECTOR), 1, frozenset({"other"}))) == [*range(36, 41)]
    frame = log.read_frame(Position(1, SECTOR), next_lsn=1, priority_min=6)
    assert frame is not None
    assert frame.position.segment == log.end.segment, "which is not skipped"
    assert log.position_of(15).segment < log.end.segment
    assert log.position_of(10**6) == Position(log.end.segment, SECTOR)
    log.close(next_lsn=None)


@pytest.mark.parametrize("held", ["open_read", "read"])
def test_a_reader_that_is_overtaken_by_a_compaction_reads_what_it_would_have(held: str) -> None:
    for number in range(1, 5):
        fs = new_store()
        log = mixed(fs)
        reached, go = threading.Event(), threading.Event()
        seen = 0

        def hold(
            call: str, path: str, *, number: int = number, reached: threading.Event = reached, go: threading.Event = go
        ) -> None:  # fmt: skip
            nonlocal seen
            if (
                call == held
                and path.endswith(".seg")
                and threading.current_thread() is not threading.main_thread()
            ):
                seen += 1
                if seen == number:
                    reached.set()
                    assert go.wait(30)

        fs.fail = hold
        reading = Caller(lambda log=log: list(read_on(log, Position(1, SECTOR), 1)))  # type: ignore[misc]
        assert reached.wait(30)
        compacted(log)
        go.set()
        assert reading.wait().error is None
        assert [lsn for lsn in reading.result if lsn % SLOW_EVERY == 0] == [10, 20, 30, 40]
        assert reading.result == sorted(reading.result)
        log.close(next_lsn=None)
        assert fs.open_files == 0


def test_appending_reading_and_compacting_go_on_at_once() -> None:
    log = open_log(new_store())
    count = 300

    def write() -> None:
        for number in range(1, count + 1):
            append(log, b"%d" % number * 150, kind="put" if number % SLOW_EVERY else "slow")

    writing = Caller(write)
    rounds = 0
    while not writing.done or not rounds:
        rounds += 1
        last = log.last_lsn - 1  # what is written later, the reader may miss
        reading = Caller(lambda: list(read_on(log, Position(1, SECTOR), 1)))
        log.compact(covering((1, max(1, last)), generation=rounds))
        assert reading.wait().error is None, reading.error
        assert [lsn for lsn in reading.result if lsn % SLOW_EVERY == 0][: last // SLOW_EVERY] == list(
            range(SLOW_EVERY, last + 1, SLOW_EVERY)
        )
    assert writing.wait().error is None
    log.close(next_lsn=None)


# --- crashes ---------------------------------------------------------------------------------------------------------


def settled_state(fs: MemoryFileSystem) -> dict[int, bytes]:
    return {lsn: payload for lsn, payload in rows_of(fs).items() if lsn % SLOW_EVERY == 0}


@pytest.mark.parametrize(
    "call",
    ["create", "write", "datasync", "rename", "sync_directory", "unlink", "truncate", "open_read", "read"],
)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_whatever_fails_nothing_is_lost_and_only_a_failed_sync_ends_the_log(call: str, code: int) -> None:
    for number in range(1, 60, 5 if call == "read" else 1):
        fs = new_store()
        log = mixed(fs, 20)
        before = rows(log)
        calls = 0

        def fail(name: str, path: str, *, number: int = number) -> None:
            nonlocal calls
            if name == call:
                calls += 1
                if calls == number:
                    raise OSError(code, "injected", path)

        fs.fail = fail
        ended = None
        for generation in range(1, 20):
            try:
                log.compact(replace(ALL_PUT, generation=generation))
            except wb.StorageError as error:
                ended = error
                break
        fs.fail = None
        if calls < number:
            assert number > 1
            log.close(next_lsn=None)
            break
        assert (ended is not None) == (call in {"datasync", "sync_directory"})
        if ended is None:
            assert not [path for path in fs.files if path.endswith(".tmp")]
            assert {lsn: before[lsn] for lsn in slow_rows(20)} == {
                lsn: rows(log)[lsn] for lsn in slow_rows(20)
            }
            assert log.segment_count <= 3, "it was done later"
            append(log, b"more")
        log.close(next_lsn=None)
        assert fs.open_files == 0
        assert settled_state(fs.after_power_cut()) == slow_rows(20)
    else:
        raise AssertionError(f"there is no end to the calls of {call}")


def test_a_rename_that_reports_an_error_and_has_happened_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    fs = new_store()
    log = mixed(fs)
    rename = fs.rename

    def rename_and_fail(source: str, target: str) -> None:
        rename(source, target)
        if target.endswith(".seg"):
            raise OSError(errno.EIO, "injected")

    monkeypatch.setattr(fs, "rename", rename_and_fail)
    assert log.compact(ALL_PUT)
    monkeypatch.undo()
    assert {lsn: rows(log)[lsn] for lsn in slow_rows()} == slow_rows()
    log.close(next_lsn=None)
    assert settled_state(fs.after_power_cut()) == slow_rows()


def test_a_rename_of_which_nobody_can_tell_whether_it_happened_ends_the_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fs = new_store()
    log = mixed(fs)

    def fail(path: str) -> bool:
        raise OSError(errno.EIO, "injected", path)

    def rename(source: str, target: str) -> None:
        if target.endswith(".seg"):
            monkeypatch.setattr(fs, "exists", fail)
            fail(target)
        MemoryFileSystem.rename(fs, source, target)

    monkeypatch.setattr(fs, "rename", rename)
    with pytest.raises(wb.StorageError):
        log.compact(ALL_PUT)
    monkeypatch.undo()
    with pytest.raises(wb.StorageError, match="nothing more"):
        append(log, b"x")
    log.close(next_lsn=None)
    assert settled_state(fs.after_power_cut()) == slow_rows()


def test_what_was_merged_and_could_not_be_removed_is_known_and_removed_by_the_next_opening() -> None:
    fs = new_store()
    log = mixed(fs)
    fs.fail = failing("unlink", errno.EIO)
    compacted(log)
    names = segment_files(fs)
    disk_bytes = log.disk_bytes
    fs.fail = None
    facts = look(fs)
    assert facts.superseded
    plan = make_plan(facts)
    assert plan.refusal is None
    assert (
        {case.segment for case in plan.cases if case.label == "S9"}
        == set(facts.superseded)
        == set(plan.superseded)
    )
    assert not any(case.is_noteworthy for case in plan.cases if case.label == "S9")
    assert disk_bytes >= sum(len(fs.files[path].data) for path in names[:-1]), "what is left over counts"
    log.close(next_lsn=41)
    again = open_log(fs)
    assert not look(fs).superseded
    assert {LAYOUT.segment(number) for number in facts.superseded}.isdisjoint(fs.files)
    assert {lsn: rows(again)[lsn] for lsn in slow_rows()} == slow_rows()
    again.close(next_lsn=None)


def test_what_was_merged_is_removed_later_and_does_not_outlive_what_has_its_place() -> None:
    fs = new_store()
    log = mixed(fs)
    fs.fail = failing("unlink", errno.EIO)
    compacted(log)
    assert look(fs).superseded
    with pytest.raises(OSError, match="injected"):
        log.trim(10**6)
    assert look(fs).superseded
    fs.fail = None
    assert log.trim(10**6) > 0
    assert segment_files(fs) == [LAYOUT.segment(log.end.segment)]
    assert log.disk_bytes == log.end.offset
    log.close(next_lsn=None)


def test_one_segment_that_cannot_be_removed_keeps_no_other_and_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fs = new_store()
    log = mixed(fs, 200)
    stuck = LAYOUT.segment(2)

    def fail(call: str, path: str) -> None:
        if (call, path) == ("unlink", stuck):
            raise OSError(errno.EPERM, "injected", path)

    fs.fail = fail
    for generation in range(1, 5):
        compacted(log, covering((1, 10**6), generation=generation))
    assert set(log._compactions.superseded) == {2}
    assert len(segment_files(fs)) == 1 + log.segment_count
    assert [record.message for record in caplog.records if "cannot be removed" in record.message] == [
        f"segment 2 was merged and cannot be removed: [Errno 1] injected: '{stuck}'"
    ]
    log.close(next_lsn=None)


def test_a_segment_that_the_disk_does_not_give_is_left_alone_for_a_while_and_no_other_is() -> None:
    fs = new_store()
    log = mixed(fs, 100)
    before = log.disk_bytes
    bad = LAYOUT.segment(2)

    def fail(call: str, path: str) -> None:
        if (call, path) == ("open_read", bad):
            raise OSError(errno.EIO, "injected", path)

    fs.fail = fail
    compacted(log)
    assert LAYOUT.segment(2) in fs.files
    assert log.disk_bytes < before / 3
    left = log.segment_count
    fs.fail = None
    compacted(log, covering((1, 10**6), generation=UNREAD_GENERATIONS))
    assert log.segment_count == left
    compacted(log, covering((1, 10**6), generation=UNREAD_GENERATIONS + 1))
    assert log.segment_count < left
    assert {lsn: rows(log)[lsn] for lsn in slow_rows(100)} == slow_rows(100)
    log.close(next_lsn=None)


def test_small_operations_of_a_paused_lane_do_not_keep_the_large_ones_of_another() -> None:
    fs = new_store()
    log = open_log(fs)
    for _ in range(40):
        append(log, bytes(3000), kind="put")
        append(log, *[b"note"] * 10, kind="slow")
    compacted(log)
    assert log.disk_bytes <= COMPACTED_FACTOR * 40 * 1024 + 4 * SETTINGS.segment_bytes
    assert sum(len(payload) == 4 for payload in rows(log).values()) == 400
    log.close(next_lsn=None)


def test_a_segment_of_which_too_much_is_needed_does_not_end_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("walbatch.core.compaction.STEP_BYTES_MIN", 0)
    fs = new_store()
    log = open_log(fs)
    for needed in (3, 1):
        for _ in range(10):
            for number in range(4):
                append(log, bytes(700), kind="slow" if number < needed else "put")
    before = log.disk_bytes
    compacted(log)
    assert log.disk_bytes < before - 20_000, "what came first, and is needed, was looked at once"
    log.close(next_lsn=None)


def test_each_step_looks_at_other_segments_than_the_one_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("core", "storage"):
        monkeypatch.setattr(f"walbatch.{module}.compaction.EXAMINED_MAX", 8)
    fs = new_store()
    log = mixed(fs, 200)
    renamed: list[str] = []
    fs.fail = lambda call, path: renamed.append(path) if call == "rename" and path.endswith(".seg") else None
    for _ in range(3):
        assert log.compact(ALL_PUT)
    assert [path[-6:-4] for path in renamed] == ["08", "23", "38"]
    compacted(log)
    assert log.segment_count <= 8
    log.close(next_lsn=None)


def test_after_a_reopening_what_was_compacted_does_not_keep_what_is_new_from_its_turn() -> None:
    fs = new_store()
    sick = LaneMark(shards=(Mark(watermark=10**6), Mark()))
    keys = {shard_of(key, 2): key for key in (b"%d" % n for n in range(20))}

    def grown(log: Log, generation: int) -> None:
        for shard in (0, 1, 0, 0) * 5:
            last = log.last_lsn
            log.append(
                first_lsn=last + 1, kinds=["put"], kind_indexes=[0], priorities=[5], keys=[keys[shard]], payloads=[bytes(700)],
                synced_lsn=last,
            )  # fmt: skip
        log.sync()
        covered = replace(covering(generation=generation), lanes={"put": sick})
        compacted(log, covered)
        unsettled = 1024 * 5 * generation
        assert log.disk_bytes <= COMPACTED_FACTOR * unsettled + 4 * SETTINGS.segment_bytes

    log = open_log(fs)
    for generation in range(1, 31):
        grown(log, generation)
    log.close(next_lsn=log.last_lsn + 1)
    log = open_log(fs)
    read: list[str] = []
    fs.fail = lambda call, path: read.append(path) if call == "open_read" else None
    for generation in range(31, 61):
        grown(log, generation)
    assert not any(path <= LAYOUT.segment(100) for path in read), (
        "nothing of it was settled since, so none of it is read"
    )
    log.close(next_lsn=None)


@pytest.mark.parametrize("now", [None, 1024])
def test_merging_never_makes_more_of_what_was_compressed(now: int | None) -> None:
    fs = new_store()
    repeated = [b"%d the same again and again" % (number % 7) * 8 for number in range(600)]
    block = random.Random(5).randbytes(2**16)
    large = [block + b"%d" % number for number in range(16)]
    packed = LogSettings(segment_bytes=2**20, compress_bytes_min=1024, compress_level=1)
    for life in range(8):
        log = open_log(fs, settings=packed)
        append(log, *(large if life % 2 else repeated))
        log.close(next_lsn=log.last_lsn + 1)
    log = open_log(fs, settings=replace(packed, compress_bytes_min=now))
    before, content = log.disk_bytes, rows(log)
    assert compacted(log, covering()) > 0
    assert log.disk_bytes <= before
    assert log.segment_count <= 3
    assert rows(log) == content
    log.close(next_lsn=log.last_lsn + 1)
    assert make_plan(look(fs, full=True)).refusal is None


def test_what_would_grow_by_merging_is_tried_once_and_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("walbatch.storage.compaction.FRAME_BYTES", 512)
    fs = new_store()
    packed = LogSettings(segment_bytes=2**20, compress_bytes_min=64, compress_level=1)
    for _ in range(4):
        log = open_log(fs, settings=packed)
        append(log, *[b"the same again and again" * 2] * 9, kind="put")
        for _ in range(30):
            append(log, *[b"the same again and again" * 2] * 400, kind="slow")
        log.close(next_lsn=log.last_lsn + 1)
    log = open_log(fs, settings=packed)
    names, before = segment_files(fs), log.disk_bytes
    monkeypatch.setattr(
        "walbatch.storage.compaction._Output.copy",
        lambda output, frame, padded, columns: output.take(columns, range(frame.count), frame),
    )
    compacted(log, covering((1, 9)))
    assert (segment_files(fs), log.disk_bytes) == (names, before)
    log.close(next_lsn=None)


def test_disk_bytes_are_those_of_the_files_after_each_step() -> None:
    fs = new_store()
    log = mixed(fs)
    active = LAYOUT.segment(log.end.segment)
    while log.compact(ALL_PUT):
        closed = sum(
            len(content.data)
            for path, content in fs.files.items()
            if path.endswith(".seg") and path != active
        )
        assert log.disk_bytes - log.end.offset == closed
    log.close(next_lsn=None)


def test_a_segment_that_cannot_be_read_is_left_alone_and_damage_is_told_when_it_is_needed() -> None:
    fs = new_store()
    log = mixed(fs)
    fs.files[LAYOUT.segment(2)].data[SECTOR + 100] ^= 1
    compacted(log)
    assert LAYOUT.segment(2) in fs.files
    assert log.read_frame(log.position_of(11), next_lsn=11) is not None
    with pytest.raises(wb.CorruptionError):
        log.read_frame(Position(2, SECTOR), next_lsn=6)
    log.close(next_lsn=None)


def test_damage_to_a_compacted_segment_is_corruption_wherever_it_stands() -> None:
    fs = new_store()
    log = mixed(fs)
    compacted(log)
    log.close(next_lsn=41)
    path = segment_files(fs)[0]
    for last in (False, True):
        twin = MemoryFileSystem.of("/q", {
            name.removeprefix("/q/"): bytes(content.data) for name, content in fs.files.items() if not last or name <= path
        })  # fmt: skip
        twin.files[path].data[SECTOR + 100] ^= 1
        plan = make_plan(look(twin, full=True))
        assert plan.refusal is not None
        assert plan.refusal.label == ("W7" if last else "W6")


# --- what it is told that is settled -----------------------------------------------------------------------------------


def test_what_was_dropped_under_is_in_the_log_before_anything_is_dropped() -> None:
    fs = new_store()
    log = mixed(fs)
    renames: list[str] = []
    rename = fs.rename

    def watch(source: str, target: str) -> None:
        renames.append(target)
        if target.endswith(".seg"):
            durable = fs.after_power_cut()
            found, findings = read_dropped(durable, LAYOUT, STORE)
            assert found is not None
            assert found.lanes == ALL_PUT.lanes
            assert findings == ()
        rename(source, target)

    fs.rename = watch  # type: ignore[method-assign]
    compacted(log)
    assert renames[0] == LAYOUT.dropped
    assert renames.count(LAYOUT.dropped) == 1, "once for each checkpoint"
    log.close(next_lsn=41)
    assert look(fs).dropped == ALL_PUT


def test_what_was_dropped_under_once_stays_known() -> None:
    fs = new_store()
    log = mixed(fs)
    log.compact(covering((1, 9), slow=Mark(ranges=((3, 5),))))
    log.close(next_lsn=41)
    again = open_log(fs)
    for number in range(10):
        append(again, b"%d" % number * 200)
    compacted(again, covering((11, 40), generation=2))
    dropped = look(fs).dropped
    assert dropped is not None
    assert dropped.lanes["put"].shards[0].ranges == ((1, 9), (11, 40))
    assert dropped.lanes["slow"].shards[0].ranges == ((3, 5),)
    again.close(next_lsn=None)


@pytest.mark.parametrize("damage", [b"", b"x", bytes(300)], ids=["empty", "short", "zeros"])
def test_a_damaged_note_is_a_finding_and_no_refusal(damage: bytes) -> None:
    fs = new_store()
    log = mixed(fs)
    compacted(log)
    log.close(next_lsn=41)
    fs.files[LAYOUT.dropped].data[:] = damage
    facts = look(fs, watermark=1)
    assert facts.dropped is None
    plan = make_plan(facts)
    assert plan.refusal is None
    assert [case.message for case in plan.cases if case.label == "S6"] == [facts.state_findings[0]]
    assert "wal/dropped" in facts.state_findings[0]


@pytest.mark.parametrize("lost", ["removed", "damaged"])
def test_a_note_that_is_lost_where_no_checkpoint_tells_the_marks_is_said(lost: str) -> None:
    fs = new_store()
    log = mixed(fs)
    compacted(log)
    log.close(next_lsn=41)
    if lost == "removed":
        fs.unlink(LAYOUT.dropped)
    else:
        fs.files[LAYOUT.dropped].data[:] = b"x"
    identity, store = read_identity(fs, LAYOUT)
    plan = make_plan(survey(fs, LAYOUT, identity=identity, store=store, checkpoint=None))
    assert plan.refusal is None
    assert "S10" in {case.label for case in plan.cases if case.is_noteworthy}


def test_a_note_of_another_store_is_not_believed() -> None:
    fs = new_store()
    write_dropped(fs, LAYOUT, b"another store 00", ALL_PUT)
    found, findings = read_dropped(fs, LAYOUT, STORE)
    assert found is None
    assert "another store" in findings[0] or "belongs" in findings[0]


def test_marks_with_too_many_ranges_are_not_dropped_under() -> None:
    fs = new_store()
    log = mixed(fs)
    many = tuple((2 * n + 10**7, 2 * n + 10**7) for n in range(wb.limits.RANGES_MAX))
    before = segment_files(fs)
    assert not log.compact(covering((1, 10**6), *many))
    assert segment_files(fs) == before
    log.close(next_lsn=None)


# --- the writer of a segment ------------------------------------------------------------------------------------------


def test_frames_of_a_compacted_segment_name_each_lsn_once() -> None:
    fs = new_store()
    log = mixed(fs)
    compacted(log)
    log.close(next_lsn=41)
    for path in segment_files(fs)[:-1]:
        file = fs.open_read(path)
        header = read_header(file)[1]
        assert header is not None
        expected = header.first_lsn
        kinds = []
        for _, frame in iterate_frames(file.read, header=header, offset=SECTOR, end=file.size()):
            assert frame.first_lsn == expected
            assert frame.synced_lsn == frame.first_lsn - 1
            expected += frame.span
            kinds.append(frame.type)
        assert kinds[-1] is FrameType.SEAL
        file.close()


def test_the_file_it_writes_to_is_not_that_of_a_new_segment() -> None:
    fs = new_store()
    log = mixed(fs)
    assert isinstance(log._active, SegmentWriter)
    for number in range(1, log.end.segment):
        fs.create(LAYOUT.segment(number) + ".tmp").close()
    assert log.compact(ALL_PUT)
    (merged,) = (number for number, segment in log._closed.items() if segment.header.compacted)
    assert LAYOUT.segment(merged) + ".tmp" not in fs.files
    for path in [path for path in fs.files if path.endswith(".tmp")]:
        fs.unlink(path)
    compacted(log)
    assert not [path for path in fs.files if path.endswith(".tmp")]
    log.close(next_lsn=None)


# --- what will be trimmed soon -----------------------------------------------------------------------------------------


def test_what_a_moving_watermark_will_pass_soon_is_not_rewritten() -> None:
    fs = new_store()
    log = mixed(fs)
    bytes_before = log.disk_bytes
    assert compacted(log, covering((1, 4), watermark=4, generation=1)) == 0
    assert compacted(log, covering((1, 30), watermark=8, generation=2)) == 0, "it comes to 8 + 32 * 4"
    assert log.disk_bytes == bytes_before
    log.close(next_lsn=41)


def test_what_was_spared_is_rewritten_once_the_watermark_stands_still() -> None:
    fs = new_store()
    log = mixed(fs)
    log.compact(covering(watermark=4, generation=1))
    assert compacted(log, covering((9, 35), watermark=8, generation=2)) == 0
    assert compacted(log, covering((9, 35), watermark=8, generation=2)) > 0, "no checkpoint came since"
    left = rows(log)
    assert set(left) & set(range(9, 31)) == {10, 20, 30}, "of the kind that nothing is settled of"
    log.close(next_lsn=41)
