"""Checkpoints: durable before anything is trimmed, and loud when they fail."""

from __future__ import annotations

import errno
from collections.abc import Callable
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
from walbatch.runtime.dispatcher import Settled
from walbatch.types import Checkpoint, LaneMark, Mark


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

    def __post_init__(self) -> None:
        rig = self

        class Log(FakeLog):
            def trim(self, lsn: int) -> int:
                rig.events.append(("trim", lsn))
                return 0

        class State(StateStore):
            def save_checkpoint(self, checkpoint: Checkpoint) -> None:
                rig.fail()
                rig.events.append(("save", checkpoint.watermark))
                rig.saved.append(checkpoint)

        self.checkpointer = Checkpointer(
            log=Log(), state=State(), clock=StillClock(), threads=RealThreads(), interval_ns=self.interval_ns,  # type: ignore[abstract]
            base=CheckpointBase(generation=7, epoch=3, settled_count=50), settled=lambda: self.settled,
            durable_lsn=lambda: self.durable_lsn, on_failure=self.failures.append,
        )  # fmt: skip


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
            assert lsn <= min(last_two)
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
    assert rig.events == [], "nothing is trimmed without a checkpoint"
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
