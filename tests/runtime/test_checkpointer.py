"""Checkpoints: durable before anything is trimmed, and loud when they fail."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest

import walbatch as wb
from tests.memory import MemoryFileSystem, environment
from tests.runtime.fakes import FakeLog, StillClock
from tests.support import FAST, Recorder, wait_until
from walbatch.errors import StorageError, WalbatchError
from walbatch.ports import StateStore
from walbatch.runtime.checkpointer import CheckpointBase, Checkpointer
from walbatch.runtime.clock import RealThreads
from walbatch.runtime.identities import KeyIndex
from walbatch.runtime.overview import Settled
from walbatch.runtime.ticket import Fate
from walbatch.types import Checkpoint, KeyUse, LaneMark, Mark


@dataclass
class Rig:
    """A checkpointer with all around it in memory. `events` has saves and trims in order."""

    fail: Callable[[], None] = lambda: None
    interval_ns: int = 1_000_000
    events: list[tuple[str, int]] = field(default_factory=list)
    saved: list[Checkpoint] = field(default_factory=list)
    failures: list[WalbatchError] = field(default_factory=list)
    settled: Settled = field(default_factory=lambda: settled_up_to(0))
    durable_lsn: int = 100
    kept_lsn: int | None = None
    compacted: list[Checkpoint] = field(default_factory=list)

    def __post_init__(self) -> None:
        rig = self

        class Log(FakeLog):
            def trim(self, lsn: int) -> int:
                rig.events.append(("trim", lsn))
                return 1

            def compact(self, covered: Checkpoint) -> bool:
                rig.compacted.append(covered)
                return False

        class State(StateStore):
            def save_checkpoint(self, checkpoint: Checkpoint) -> None:
                rig.fail()
                rig.events.append(("save", checkpoint.watermark))
                rig.saved.append(checkpoint)

        self.checkpointer = Checkpointer(
            log=Log(), state=State(), clock=StillClock(), threads=RealThreads(), interval_ns=self.interval_ns,  # type: ignore[abstract]
            base=CheckpointBase(generation=7, epoch=3, settled_count=50), settled=lambda: self.settled,
            durable_lsn=lambda: self.durable_lsn, on_failure=self.failures.append, before=self.before,
        )  # fmt: skip

    def before(self, covered_lsn: int) -> int | None:
        self.events.append(("before", covered_lsn))
        return self.kept_lsn


def settled_up_to(lsn: int) -> Settled:
    return Settled(watermark=lsn, lanes={"put": LaneMark(shards=(Mark(watermark=lsn),))}, settled_count=lsn)


def test_a_checkpoint_is_durable_before_the_log_is_trimmed_by_it_and_trims_never_pass_either_generation() -> (
    None
):
    rig = Rig()
    for lsn in (10, 20, 30, 30):
        rig.settled = settled_up_to(lsn)
        rig.checkpointer.checkpoint()
    last_two: list[int] = [0, 0]
    for event, lsn in rig.events:
        if event == "save":
            last_two = [last_two[1], lsn]
        else:
            assert lsn <= min(last_two), "which both generations on the disk cover"
    assert ("trim", 30) in rig.events
    assert [checkpoint.generation for checkpoint in rig.saved] == list(range(8, 8 + len(rig.saved)))
    assert rig.saved[0].epoch == 3
    assert rig.saved[0].settled_count == 60
    assert rig.checkpointer.checkpointed_lsn == 30
    assert repr(rig.checkpointer).startswith("<Checkpointer generation")


def test_a_checkpoint_in_which_nothing_changed_is_not_saved_again() -> None:
    rig = Rig()
    rig.settled = settled_up_to(10)
    while rig.checkpointer.checkpoint():
        assert len(rig.saved) < 5
    saved = len(rig.saved)
    rig.checkpointer.checkpoint()
    assert len(rig.saved) == saved


def test_a_checkpoint_claims_as_durable_only_what_is() -> None:
    rig = Rig(durable_lsn=100)
    rig.settled = settled_up_to(10)
    rig.checkpointer.checkpoint()
    assert rig.saved[-1].durable_lsn == 100
    assert rig.saved[-1].segment == 1
    rig.settled = settled_up_to(120)
    rig.checkpointer.checkpoint()
    assert rig.saved[-1].durable_lsn == 120, (
        "what is settled was durable, although the other figure was read later"
    )


def test_a_full_disk_is_waited_for_and_the_generation_is_used_again() -> None:
    tries = 0

    def full() -> None:
        nonlocal tries
        tries += 1
        if tries <= 3:
            raise StorageError("no space", errno=errno.ENOSPC)

    rig = Rig(fail=full)
    rig.settled = settled_up_to(10)
    rig.checkpointer.start()
    wait_until(lambda: bool(rig.saved), what="there is room again")
    assert rig.checkpointer.stop(30 * 10**9)
    assert rig.saved[0].generation == 8
    assert not rig.failures
    assert tries >= 4


def test_what_could_not_be_saved_beside_a_checkpoint_stays_in_the_log_until_it_is() -> None:
    rig = Rig(kept_lsn=15)
    rig.settled = Settled(
        watermark=30, lanes={"put": LaneMark(shards=(Mark(watermark=30, ranges=((32, 40),)), Mark(watermark=9)))},
        settled_count=30,
    )  # fmt: skip
    for _ in range(4):
        rig.checkpointer.checkpoint()
    assert {checkpoint.watermark for checkpoint in rig.saved} == {30}, "the marks are what they are"
    assert [lsn for event, lsn in rig.events if event == "trim"] == [15, 15, 15]
    rig.kept_lsn = 35
    rig.checkpointer._compact()
    rig.checkpointer.checkpoint()
    rig.checkpointer._compact()
    rig.kept_lsn = None
    rig.checkpointer.checkpoint()
    rig.checkpointer._compact()
    assert [event for event in rig.events if event[0] == "trim"][-2:] == [("trim", 30), ("trim", 30)]
    assert [(covered.watermark, covered.lanes["put"].shards) for covered in rig.compacted] == [
        (15, (Mark(watermark=15), Mark(watermark=9))),
        (30, (Mark(watermark=30, ranges=((32, 35),)), Mark(watermark=9))),
        (30, (Mark(watermark=30, ranges=((32, 40),)), Mark(watermark=9))),
    ]
    saved = len(rig.saved)
    assert not rig.checkpointer.checkpoint()
    assert len(rig.saved) == saved


def test_room_that_was_made_on_a_full_disk_is_used_at_once() -> None:
    rig = Rig(kept_lsn=10, interval_ns=10**12)
    rig.settled = settled_up_to(90)

    def before(covered_lsn: int) -> int | None:
        """Each segment that is trimmed makes room for what some more need."""
        trims = sum(event == "trim" for event, _ in rig.events)
        return 10 + 10 * trims if trims < 5 else None

    rig.checkpointer._before = before
    rig.checkpointer.checkpoint()
    rig.checkpointer._checkpoint_in_room()
    assert [lsn for event, lsn in rig.events if event == "trim"] == [10, 20, 30, 40, 50, 90]


def test_the_log_is_compacted_although_the_checkpoint_waits_for_room() -> None:
    def full() -> None:
        if len(rig.saved) == 2:
            raise StorageError("no space", errno=errno.ENOSPC)

    rig = Rig(fail=full)
    for lsn in (10, 20):
        rig.settled = settled_up_to(lsn)
        rig.checkpointer.checkpoint()
    rig.settled = settled_up_to(30)
    rig.checkpointer.start()
    wait_until(lambda: bool(rig.compacted), what="it is compacted")
    assert rig.checkpointer.stop(30 * 10**9)
    assert len(rig.saved) == 2
    assert rig.compacted[0].watermark == 10
    assert not rig.failures


def test_what_goes_beside_a_checkpoint_is_told_what_both_generations_on_the_disk_cover() -> None:
    rig = Rig()
    for lsn in (10, 20, 30, 40):
        rig.settled = settled_up_to(lsn)
        rig.checkpointer.checkpoint()
    on_disk: list[int] = [0, 0]
    for event, lsn in rig.events:
        if event == "save":
            on_disk = [on_disk[1], lsn]
        elif event == "before":
            assert lsn <= min(on_disk)
    assert ("before", 20) in rig.events


def test_a_full_disk_stops_no_checkpoint_whatever_is_saved_beside_it_and_loses_no_idempotency_key() -> None:
    fs = MemoryFileSystem()
    settings = wb.Settings(segment_bytes=4096, timer_ms=1, checkpoint_ms=1, compress_bytes_min=None)

    def full(call: str, path: str) -> None:
        if call in {"save_controllers", "save_keys"}:
            raise OSError(errno.ENOSPC, "full")

    fs.fail = full
    recorder = Recorder()

    def opened() -> wb.Engine:
        lanes = {"put": wb.Lane(recorder, trigger=FAST)}
        return wb.Engine.open("/q", lanes=lanes, settings=settings, environment=environment(fs))

    def submit(engine: wb.Engine, number: int) -> int | None:
        return engine.submit("put", key=b"k", payload=bytes(600), idempotency_key=b"%d" % number).lsn

    with opened() as engine:
        lsns = [submit(engine, number) for number in range(60)]
        engine.flush(timeout=30)
        wait_until(
            lambda: all(c.watermark == lsns[-1] for c in fs.checkpoints.values()),
            what="the checkpoint covers it",
        )
        assert engine.stats().disk_bytes > 60 * 1024, "only the log has the keys"
    with opened() as engine:
        assert [submit(engine, number) for number in range(60)] == lsns, (
            "they are found there, settled or not"
        )
        fs.fail = None
        wait_until(lambda: engine.stats().disk_bytes < 20_000, what="there is room, and all is trimmed")
    with opened() as engine:
        assert [submit(engine, number) for number in range(60)] == lsns
    assert len(recorder.lsns) == 60


@pytest.mark.parametrize("room", [0, 1, 7, 50, 99])
def test_as_many_idempotency_keys_are_saved_as_there_is_room_for_the_oldest_first(room: int) -> None:
    saved: list[KeyUse] = []
    notes: list[int] = []

    class State(StateStore):
        def save_keys(self, uses: Sequence[KeyUse], *, up_to_lsn: int, oldest_wall_ns: int) -> None:
            if len(saved) + len(uses) > room:
                raise StorageError("no space", errno=errno.EDQUOT)
            saved.extend(uses)
            notes.append(up_to_lsn)

    state = State()  # type: ignore[abstract]
    keys = KeyIndex(threads=RealThreads(), clock=StillClock(), age_ns=10**9, uses=(), saved_lsn=0)
    for lsn in range(2, 202, 2):
        keys.use("put", b"%d" % lsn, lsn, 5, Fate(RealThreads(), lsn, lsn, None))
    assert keys.save(state, up_to_lsn=200, wall_ns=6) == 2 * room + 1
    assert [use.lsn for use in saved] == [*range(2, 2 * room + 1, 2)]
    assert not notes or notes[-1] == 2 * room
    room = 1000
    assert keys.save(state, up_to_lsn=200, wall_ns=6) is None
    assert [use.lsn for use in saved] == [*range(2, 202, 2)]
    assert keys.save(state, up_to_lsn=201, wall_ns=6) is None


@pytest.mark.parametrize(
    "error",
    [StorageError("broken", errno=errno.EIO), OSError(errno.EIO, "broken"), MemoryError("of anything")],
    ids=repr,
)
def test_a_checkpoint_that_fails_ends_the_thread_loudly(error: BaseException) -> None:
    def fail() -> None:
        raise error

    rig = Rig(fail=fail)
    rig.settled = settled_up_to(10)
    rig.checkpointer.start()
    wait_until(lambda: bool(rig.failures), what="the failure is told")
    assert rig.checkpointer.stop(30 * 10**9)
    assert rig.events == [("before", 0)], "nothing is trimmed without a checkpoint"
    assert len(rig.failures) == 1


def test_a_failed_checkpoint_stops_the_engine_and_loses_nothing() -> None:
    fs = MemoryFileSystem()
    settings = wb.Settings(segment_bytes=4096, timer_ms=1, checkpoint_ms=1)
    before, after = Recorder(), Recorder()
    lanes = {"put": wb.Lane(before, trigger=FAST)}
    engine = wb.Engine.open("/q", lanes=lanes, settings=settings, environment=environment(fs))

    def fail(call: str, path: str) -> None:
        if call == "save_checkpoint":
            raise OSError(errno.EIO, "broken")

    fs.fail = fail
    acknowledged: set[int | None] = set()

    def submit_for_ever() -> None:
        while True:
            acknowledged.add(engine.submit("put", key=b"k", payload=bytes(100)).lsn)

    with pytest.raises(wb.StorageError, match="checkpoint failed"):
        submit_for_ever()
    assert engine.close().reason.startswith("failed")
    fs.fail = None
    lanes = {"put": wb.Lane(after, trigger=FAST)}
    with wb.Engine.open("/q", lanes=lanes, settings=settings, environment=environment(fs)) as engine:
        engine.flush(timeout=30)
    assert acknowledged <= {*before.lsns, *after.lsns}


def test_where_nothing_settles_the_checkpoint_still_shows_how_far_the_log_reached() -> None:
    fs = MemoryFileSystem()
    settings = wb.Settings(segment_bytes=4096, timer_ms=1, checkpoint_ms=1)
    engine = wb.Engine.open(
        "/q", lanes={"put": wb.Lane(None)}, settings=settings, environment=environment(fs)
    )
    for number in range(200):
        engine.submit("put", key=b"k", payload=b"%d" % number * 50)
    engine.close()
    segments = sorted(path for path in fs.files if path.endswith(".seg"))
    assert len(segments) > 3
    del fs.files[segments[-1]]
    fs.directories["/q/wal"].discard(segments[-1].rpartition("/")[2])
    with pytest.raises(wb.CorruptionError, match="W8"):
        wb.Engine.open("/q", lanes={"put": wb.Lane(None)}, settings=settings, environment=environment(fs))


def test_the_older_generation_alone_is_enough_to_open_a_trimmed_store() -> None:
    fs = MemoryFileSystem()
    settings = wb.Settings(segment_bytes=4096, timer_ms=1, checkpoint_ms=1, compress_bytes_min=None)
    lanes = {"put": wb.Lane(Recorder(), trigger=FAST)}
    with wb.Engine.open("/q", lanes=lanes, settings=settings, environment=environment(fs)) as engine:
        for number in range(100):
            engine.submit("put", key=b"k", payload=b"%d" % number * 50)
        engine.flush(timeout=30)
        wait_until(lambda: engine.stats().disk_bytes < 10_000, what="segments are trimmed")
    newest = max(fs.checkpoints, key=lambda slot: fs.checkpoints[slot].generation)
    older = fs.checkpoints[1 - newest]
    fs.checkpoints = {0: replace(older, generation=older.generation)}
    recorder = Recorder()
    lanes = {"put": wb.Lane(recorder, trigger=FAST)}
    with wb.Engine.open("/q", lanes=lanes, settings=settings, environment=environment(fs)) as engine:
        engine.flush(timeout=30)
    assert len(recorder.lsns) == len(set(recorder.lsns))
