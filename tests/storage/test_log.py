"""The chain of segments: rolling, reading back, trimming, and what a failed sync ends."""

from __future__ import annotations

import errno
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

import walbatch as wb
from tests.memory import MemoryFileSystem
from tests.runtime.fakes import Caller
from walbatch.core.frame import SECTOR
from walbatch.core.recovery import StoreFacts, make_plan
from walbatch.errors import StorageError
from walbatch.ports import DecodedFrame
from walbatch.ports import Log as LogPort
from walbatch.runtime.clock import RealClock, RealEntropy, RealThreads
from walbatch.storage import layout
from walbatch.storage.layout import Layout, encode_identity, read_identity
from walbatch.storage.log import Log, LogSettings
from walbatch.storage.survey import survey
from walbatch.types import Checkpoint, Position

LAYOUT = Layout("/q")
SETTINGS = LogSettings(segment_bytes=4096, compress_bytes_min=None, compress_level=1)


def new_store() -> MemoryFileSystem:
    return MemoryFileSystem.of("/q", {"identity": encode_identity(bytes(16), 0)})


def look(fs: MemoryFileSystem, *, watermark: int = 0, full: bool = False) -> StoreFacts:
    identity, store = read_identity(fs, LAYOUT)
    checkpoint = None
    if watermark:
        checkpoint = Checkpoint(
            generation=1,
            epoch=1,
            watermark=watermark,
            durable_lsn=watermark,
            segment=1,
            settled_count=watermark,
        )
    return survey(fs, LAYOUT, identity=identity, store=store, checkpoint=checkpoint, full=full)


def open_log(fs: MemoryFileSystem, *, watermark: int = 0, settings: LogSettings | None = None) -> Log:
    facts = look(fs, watermark=watermark)
    plan = make_plan(facts)
    assert plan.refusal is None, plan.refusal
    return Log.open(
        fs, LAYOUT, RealClock(), RealEntropy(), RealThreads(), settings or SETTINGS, facts=facts, plan=plan
    )


def append(log: Log, *payloads: bytes, kind: str = "put", sync: bool = True) -> Position:
    position = log.append(
        first_lsn=log.last_lsn + 1, kinds=[kind], kind_indexes=[0] * len(payloads), priorities=[5] * len(payloads),
        keys=[b"k"] * len(payloads), payloads=payloads, synced_lsn=log.last_lsn if sync else 0,
    )  # fmt: skip
    if sync:
        log.sync()
    return position


def frames(log: Log, *, wanted: frozenset[str] | None = None) -> Iterator[DecodedFrame]:
    position, next_lsn = Position(1, SECTOR), 0
    while (frame := log.read_frame(position, next_lsn=next_lsn, wanted=wanted)) is not None:
        yield frame
        position, next_lsn = frame.next_position, frame.last_lsn + 1


def payloads_of(log: Log) -> dict[int, bytes]:
    return {
        lsn: payload for frame in frames(log) for lsn, payload in zip(frame.lsns, frame.payloads, strict=True)
    }


def filled(fs: MemoryFileSystem, count: int = 30) -> Log:
    """A log of single operations of 700 bytes, five to a segment; every tenth is of the kind "rare"."""
    log = open_log(fs)
    for number in range(1, count + 1):
        append(log, b"%d" % number * 200, kind="put" if number % 10 else "rare")
    return log


# --- rolling and reading back ----------------------------------------------------------------------------------------


def test_it_is_what_the_port_describes() -> None:
    log: LogPort = open_log(new_store())
    assert log.end == Position(1, SECTOR)


def test_a_log_rolls_and_reads_back_what_was_written() -> None:
    fs = new_store()
    log = filled(fs)
    assert log.segment_count > 4
    assert payloads_of(log) == {n: b"%d" % n * 200 for n in range(1, 31)}
    assert all(a.end is not None for a in [log])
    assert log.last_lsn == 30
    assert "30" in repr(log)
    log.close(next_lsn=31)
    again = open_log(fs)
    assert len(payloads_of(again)) == 30
    assert again.last_lsn == 30, "it was closed cleanly"
    again.close(next_lsn=None)
    assert fs.open_files == 0


def test_a_frame_larger_than_a_segment_goes_alone_into_one() -> None:
    fs = new_store()
    log = open_log(fs)
    append(log, b"small")
    big = append(log, bytes(20_000))
    after = append(log, b"small")
    assert big == Position(2, SECTOR)
    assert after.segment == 3
    assert [len(payload) for payload in payloads_of(log).values()] == [5, 20_000, 5]
    log.close(next_lsn=4)
    assert len(payloads_of(open_log(fs))) == 3


def test_a_segment_that_is_exactly_full_is_not_rolled_early() -> None:
    log = open_log(new_store())
    for _ in range(7):
        append(log, b"x")
    assert log.end == Position(1, 8 * SECTOR)
    assert append(log, b"x") == Position(2, SECTOR)
    log.close(next_lsn=None)


def test_reading_back_skips_segments_and_frames_that_hold_nothing_wanted() -> None:
    fs = new_store()
    log = filled(fs, 40)
    for closed_cleanly in (False, True):
        fs.calls.clear()
        found = [list(frame.lsns) for frame in frames(log, wanted=frozenset({"rare"}))]
        tail = log.end.segment
        sealed = [lsns for lsns in found if lsns[0] % 10 == 0]
        assert sealed == [[10], [20], [30], [40]]
        reads = [path for call, path in fs.calls if call == "read" and path != LAYOUT.segment(tail)]
        assert len(reads) < 40, (
            "sealed frames of other kinds are not read, in this process's segments neither"
        )
        if not closed_cleanly:
            log.close(next_lsn=41)
            log = open_log(fs)
    log.close(next_lsn=None)


def test_every_position_between_two_frames_leads_to_the_next() -> None:
    log = filled(new_store(), 12)
    first = next(frames(log))
    assert log.read_frame(first.next_position, next_lsn=2).lsns == range(2, 3)  # type: ignore[union-attr]
    assert log.read_frame(Position(1, 4096), next_lsn=0).lsns[0] > 1  # type: ignore[union-attr]
    assert log.read_frame(log.end, next_lsn=0) is None
    assert log.read_frame(Position(99, SECTOR), next_lsn=0) is None
    log.close(next_lsn=None)


def test_disk_bytes_are_those_of_the_files() -> None:
    fs = new_store()
    log = filled(fs)
    sealed = [path for path in fs.files if path.endswith(".seg") and path != LAYOUT.segment(log.end.segment)]
    assert log.disk_bytes - log.end.offset in {
        sum(len(fs.files[path].data) for path in sealed),
        sum(len(fs.files[path].data) for path in sealed) + 4096 - log.end.offset,
    }
    log.close(next_lsn=None)


def test_appending_and_reading_go_on_at_once() -> None:
    log = open_log(new_store())
    writing = Caller(lambda: [append(log, b"%d" % n * 100) for n in range(1, 400)])
    while not writing.done:
        position = Position(1, SECTOR)
        seen = 0
        while (frame := log.read_frame(position, next_lsn=seen + 1)) is not None:
            assert list(frame.lsns) == [seen + 1]
            seen += 1
            assert frame.payloads[0] == b"%d" % seen * 100
            position = frame.next_position
    assert writing.wait().error is None
    log.close(next_lsn=None)


# --- trimming --------------------------------------------------------------------------------------------------------


def test_only_segments_whose_operations_all_lie_below_are_removed_and_durably() -> None:
    fs = new_store()
    log = filled(fs)
    boundaries = {segment.header.number: segment.last_lsn for segment in log._closed.values()}
    before = log.disk_bytes
    assert log.trim(boundaries[2] - 1) == 1
    assert log.disk_bytes < before
    assert log.trim(boundaries[2]) == 1
    assert log.trim(boundaries[2]) == 0
    assert min(payloads_of(log)) == boundaries[2] + 1
    after = fs.after_power_cut()
    assert LAYOUT.segment(1) not in after.files
    assert LAYOUT.segment(3) in after.files
    assert log.trim(10**9) > 0, "the active segment stays"
    assert log.segment_count == 1
    append(log, b"more")
    log.close(next_lsn=log.last_lsn + 1)


def test_a_segment_that_comes_back_after_a_power_cut_is_settled() -> None:
    fs = new_store()
    log = filled(fs)
    kept = fs.files[LAYOUT.segment(2)]
    log.trim(15)
    log.close(next_lsn=31)
    fs.files[LAYOUT.segment(2)] = kept
    fs.directories["/q/wal"].add(f"{2:019d}.seg")
    assert make_plan(look(fs, watermark=15)).refusal is None


def test_a_reader_of_a_trimmed_segment_goes_on_behind_it() -> None:
    fs = new_store()
    log = filled(fs)
    first = next(frames(log))
    log.trim(10**9)
    assert log.read_frame(first.next_position, next_lsn=2).lsns[0] > 20  # type: ignore[union-attr]
    log.close(next_lsn=None)


def test_trimming_does_not_take_a_file_from_under_its_reader() -> None:
    fs = new_store()
    log = filled(fs)
    reached, go = threading.Event(), threading.Event()

    def hold(call: str, path: str) -> None:
        if call == "read" and path == LAYOUT.segment(1) and not reached.is_set():
            reached.set()
            assert go.wait(30)

    fs.fail = hold
    reading = Caller(lambda: log.read_frame(Position(1, SECTOR), next_lsn=0))
    assert reached.wait(30)
    assert log.trim(10**9) > 1
    go.set()
    assert reading.wait().error is None
    assert reading.result is None or reading.result.payloads[0] in {b"%d" % n * 200 for n in range(1, 31)}
    log.close(next_lsn=None)
    assert fs.open_files == 0


# --- damage and errors when reading back -----------------------------------------------------------------------------


def test_damage_in_a_sealed_segment_is_reported_with_its_place() -> None:
    fs = new_store()
    log = filled(fs)
    fs.files[LAYOUT.segment(2)].data[SECTOR + 100] ^= 1
    with pytest.raises(wb.CorruptionError, match="offset 512") as caught:
        payloads_of(log)
    assert caught.value.path == LAYOUT.segment(2)
    assert caught.value.offset == SECTOR
    log.close(next_lsn=None)


@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["open_read", "read"])
@pytest.mark.parametrize("wanted", [None, frozenset({"rare"})], ids=["all", "skipping"])
def test_an_error_while_reading_back_is_no_damage_and_passes(
    code: int, call: str, wanted: frozenset[str] | None
) -> None:
    fs = new_store()
    log = filled(fs)
    fs.fail = failing(call, code)
    with pytest.raises(wb.StorageError) as caught:
        list(frames(log, wanted=wanted))
    assert not isinstance(caught.value, wb.CorruptionError)
    assert caught.value.errno == code
    fs.fail = None
    assert len(payloads_of(log)) == 30
    log.close(next_lsn=None)
    assert fs.open_files == 0


# --- a failed sync is final ------------------------------------------------------------------------------------------


def failing(wanted: str, code: int) -> Callable[[str, str], None]:
    def fail(call: str, path: str) -> None:
        if call == wanted:
            raise OSError(code, "injected", path)

    return fail


def do_append(log: Log) -> None:
    append(log, b"x" * 100)


def do_roll(log: Log) -> None:
    append(log, b"x" * 3900, sync=False)


def do_stamp(log: Log) -> None:
    log.stamp(next_lsn=log.last_lsn + 1, clean=False)


def do_trim(log: Log) -> None:
    log.trim(10)


def do_close(log: Log) -> None:
    log.close(next_lsn=log.last_lsn + 1)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=errno.errorcode.get)
@pytest.mark.parametrize(
    ("step", "call"),
    [
        (do_append, "datasync"),
        (do_roll, "datasync"),
        (do_roll, "sync_directory"),
        (do_stamp, "datasync"),
        (do_trim, "sync_directory"),
        (do_close, "datasync"),
    ],
    ids=["append", "roll", "roll_directory", "stamp", "trim", "close"],
)
def test_after_a_failed_sync_the_log_takes_nothing_more_and_says_so_once_and_for_all(
    step: Callable[[Log], None], call: str, code: int
) -> None:
    fs = new_store()
    log = filled(fs, 20)
    fs.fail = failing(call, code)
    with pytest.raises(wb.StorageError, match="sync"):
        step(log)
    fs.fail = None
    before = len(fs.calls)
    refused: list[Callable[[], Any]] = [
        lambda: append(log, b"x"), log.sync, lambda: log.stamp(next_lsn=1, clean=False), lambda: log.trim(1),
    ]  # fmt: skip
    for call_again in refused:
        with pytest.raises(wb.StorageError, match="nothing more"):
            call_again()
    log.close(next_lsn=21)
    assert not [name for name, _ in fs.calls[before:] if name in {"write", "datasync"}], (
        "nothing is vouched for"
    )
    assert fs.open_files == 0
    again = open_log(fs.after_power_cut())
    found = payloads_of(again)
    assert {n: found[n] for n in range(1, 21)} == {n: b"%d" % n * 200 for n in range(1, 21)}


@pytest.mark.parametrize("where", ["sync", "roll"])
def test_a_failed_sync_is_not_tried_again_although_a_signal_hides_it(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def interrupted(*_: object) -> StorageError:
        raise KeyboardInterrupt

    fs = new_store()
    log = open_log(fs)
    append(log, bytes(3000), sync=where == "roll")
    tries = 0

    def before(call: str, _: str) -> None:
        nonlocal tries
        if call == "datasync":
            tries += 1
            raise OSError(errno.EIO, "broken")

    fs.fail = before
    with monkeypatch.context() as patch:
        patch.setattr(layout, "sync_failed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            log.sync() if where == "sync" else append(log, bytes(3000))
    for _ in range(2):
        with pytest.raises(StorageError):
            log.sync()
    assert tries == 1


def test_a_sync_that_a_signal_interrupts_can_be_made_again() -> None:
    fs = new_store()
    log = open_log(fs)
    append(log, b"a", sync=False)
    interrupts = iter([KeyboardInterrupt()])

    def before(call: str, _: str) -> None:
        if call == "datasync" and (error := next(interrupts, None)):
            raise error

    fs.fail = before
    try:
        raise OSError(errno.EIO, "what the caller is handling")
    except OSError:
        with pytest.raises(KeyboardInterrupt):
            log.sync()
    log.sync()
    log.close(next_lsn=2)


def test_a_second_failed_sync_of_the_same_segment_is_the_roll_that_must_not_believe_it() -> None:
    """The operations of an interval lane are synced by the roll; its failure must not be forgotten by the next append."""
    fs = new_store()
    log = open_log(fs)
    append(log, b"x" * 3000, sync=False)
    fs.fail = failing("datasync", errno.EIO)
    with pytest.raises(wb.StorageError):
        append(log, b"y" * 3000, sync=False)
    fs.fail = None
    with pytest.raises(wb.StorageError, match="nothing more"):
        append(log, b"y" * 3000, sync=False)
    log.close(next_lsn=None)


@pytest.mark.parametrize("call", ["write", "truncate", "create", "preallocate", "rename"])
def test_a_roll_that_finds_the_disk_full_goes_on_where_it_stopped(call: str) -> None:
    fs = new_store()
    log = filled(fs, 20)
    fs.fail = failing(call, errno.ENOSPC)
    for _ in range(3):
        try:
            append(log, b"x" * 3900)
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017 - a full disk may also be no obstacle
        else:
            break
    fs.fail = None
    if log.last_lsn == 20:
        append(log, b"x" * 3900)
    append(log, b"after")
    log.close(next_lsn=23)
    found = payloads_of(open_log(fs.after_power_cut()))
    assert list(found) == list(range(1, 23))
    assert found[21] == b"x" * 3900


def test_a_trim_whose_unlink_fails_can_be_made_again() -> None:
    fs = new_store()
    log = filled(fs)
    fs.fail = failing("unlink", errno.ENOSPC)
    with pytest.raises(OSError, match="injected"):
        log.trim(10**9)
    fs.fail = None
    log.trim(10**9)
    assert [path for path in fs.files if path.endswith(".seg")] == [LAYOUT.segment(log.end.segment)]
    log.close(next_lsn=None)


# --- opening ---------------------------------------------------------------------------------------------------------


def test_what_nothing_proves_is_copied_and_synced_before_it_can_be_read() -> None:
    fs = new_store()
    log = open_log(fs)
    append(log, b"proven")
    append(log, b"first", b"second", sync=False)
    append(log, b"third", sync=False)
    crashed = MemoryFileSystem.of("/q", {p.removeprefix("/q/"): bytes(c.data) for p, c in fs.files.items()})
    again = open_log(crashed)
    found = payloads_of(again)
    assert [found[n] for n in range(1, 5)] == [b"proven", b"first", b"second", b"third"]
    facts = look(crashed.after_power_cut())
    assert facts.segments[-1].number == 2
    assert facts.segments[-1].scan is not None
    assert facts.segments[-1].scan.unproven == ()
    assert again.last_lsn > 2**24, "the LSNs that may have been shown are skipped"
    assert log.end.segment == 1


def test_a_tail_that_reads_differently_the_second_time_is_an_error_and_nothing_is_made() -> None:
    fs = new_store()
    log = open_log(fs)
    append(log, b"tail", sync=False)
    facts = look(fs)
    plan = make_plan(facts)
    assert plan.copied
    fs.files[LAYOUT.segment(1)].data[SECTOR + 80] ^= 1
    with pytest.raises(wb.StorageError, match="differently"):
        Log.open(fs, LAYOUT, RealClock(), RealEntropy(), RealThreads(), SETTINGS, facts=facts, plan=plan)
    assert LAYOUT.segment(2) not in fs.files
    assert log.last_lsn == 1


def test_temporary_files_are_removed_and_nothing_else() -> None:
    fs = new_store()
    filled(fs).close(next_lsn=31)
    for name in ("0000000000000000099.seg.tmp", "x.tmp", "x.seg", "notes"):
        fs.create(f"/q/wal/{name}").close()
    open_log(fs).close(next_lsn=None)
    names = fs.directories["/q/wal"]
    assert {"x.seg", "notes"} <= names
    assert not [name for name in names if name.endswith(".tmp")]


def test_a_roll_remembers_what_was_checkpointed() -> None:
    fs = new_store()
    log = filled(fs)
    log.trim(12)
    append(log, b"x" * 3900)
    facts = look(fs, watermark=12)
    assert facts.segments[-1].header is not None
    assert facts.segments[-1].header.checkpointed_lsn == 12
    lost_checkpoint = replace(facts, checkpoint=None)
    assert make_plan(lost_checkpoint).refusal is None, "the headers tell that the first segments were trimmed"
    log.close(next_lsn=None)


# --- memory -----------------------------------------------------------------------------------------------------------

FAULTS_OF_GROUPS = """
import resource
from walbatch.core.columns import Columns, encode_body
from walbatch.storage.log import keep_freed_memory
keep_freed_memory()
count, size = 1000, 256_000
columns = Columns(
    kinds=("put",), kind_indexes=[0] * count, priorities=[5] * count, keys=[b"key"] * count,
    payloads=[b"%256d" % number for number in range(count)],
)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
encode_body(columns)
before = faults()
for _ in range(50):
    encode_body(columns)
print((faults() - before) / (50 * size / resource.getpagesize()))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators do as they like")
def test_the_memory_of_a_commit_group_is_kept_for_the_next_one() -> None:
    found = subprocess.run(
        [sys.executable, "-c", FAULTS_OF_GROUPS], capture_output=True, text=True, check=True
    )
    assert float(found.stdout) < 0.1, "page faults for each page of the groups"
