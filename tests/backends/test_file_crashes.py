"""Files of batches under the simulated disk: at every call a power cut, every state that it may leave, and what comes after it."""

from __future__ import annotations

import contextlib
import errno
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from walbatch.backends.files.backend import FilesBackend
from walbatch.backends.files.jsonlines import JsonLinesBackend
from walbatch.errors import BatchFailure, Fenced, StorageError, WalbatchError
from walbatch.testing.contracts import STORE, TransactionalBackendContract
from walbatch.testing.simulation.disk import FailedSync
from walbatch.testing.simulation.faults import Fault, FaultPlan
from walbatch.testing.simulation.filesystem import SimulatedFileSystem
from walbatch.testing.simulation.images import Cut, crash_images
from walbatch.types import Mark

FOLDER = "/out"
CONTRACT = TransactionalBackendContract()
LAST_LSN = 7
TRIES_MAX = 4


class World:
    """A disk, what the engine was told, and what a reader has taken away for good."""

    def __init__(self, fs: SimulatedFileSystem) -> None:
        self.fs = fs
        self.acknowledged: set[int] = set()
        self.consumed: Counter[int] = Counter()
        self.fading: set[int] = set()
        """LSNs of a file that a reader is just deleting: a power cut may bring it back."""

    def backend(self) -> FilesBackend:
        backend = JsonLinesBackend(FOLDER, fs=self.fs)
        backend.open("put", 1, STORE)
        return backend

    def visible(self) -> dict[str, list[int]]:
        """The files that a reader sees, with their LSNs. A file that is not whole ends the test."""
        found = {}
        if self.fs.is_directory(FOLDER):
            for name in self.fs.list_directory(FOLDER):
                if not name.startswith("."):
                    file = self.fs.open_read(f"{FOLDER}/{name}")
                    text = file.read(file.size(), 0).decode()
                    assert text.endswith("\n"), f"{name} is not whole"
                    found[name] = [json.loads(line)["lsn"] for line in text.split("\n")[:-1]]
        return found

    def consume(self) -> None:
        """What a careful reader does: take what is there, delete it, and make that durable."""
        for name, lsns in self.visible().items():
            self.fading = set(lsns)
            self.fs.unlink(f"{FOLDER}/{name}")
            self.fs.sync_directory(FOLDER)
            self.fading = set()
            self.consumed.update(lsns)

    def deliver(self, *, consumes: bool = False, size: int = 2, tries: int = 1) -> None:
        """An engine's life: ask for the mark, deliver the rest, retry what fails."""
        backend = self.backend()
        mark = backend.applied_mark(0)
        rest = [lsn for lsn in range(1, LAST_LSN + 1) if not mark.covers(lsn)]
        for start in range(0, len(rest), size):
            lsns = rest[start : start + size]
            pairs = [(b"key %d" % lsn, b"payload %d " % lsn * 60) for lsn in lsns]
            for attempt in range(tries):
                try:
                    backend.apply(CONTRACT.batch(pairs, lsns=lsns))
                    break
                except BatchFailure:
                    if attempt == tries - 1:
                        raise
            self.acknowledged.update(lsns)
            if consumes:
                self.consume()
        backend.close()

    def after(self, fs: SimulatedFileSystem) -> World:
        """The same story on another disk."""
        other = World(fs)
        other.acknowledged, other.consumed = set(self.acknowledged), Counter(self.consumed)
        other.fading = set(self.fading)
        return other

    def check(self) -> None:
        """Each operation that the mark covers stands in one file, or was taken away; nothing that was acknowledged is missing."""
        before = self.visible()
        backend = self.backend()
        mark = backend.applied_mark(0)
        backend.close()
        found = self.visible()
        assert set(before) <= set(found), "what was visible has gone"
        lsns = Counter(lsn for file in found.values() for lsn in file) + self.consumed
        covered = {lsn for lsn in range(1, LAST_LSN + 1) if mark.covers(lsn)}
        doubtful = self.fading
        assert covered >= self.acknowledged
        assert set(lsns) | doubtful >= covered
        assert set(lsns) <= covered
        assert all(count == 1 for lsn, count in lsns.items() if lsn not in doubtful), lsns


def on_every_call(fs: SimulatedFileSystem, look: Callable[[str], None]) -> None:
    """Call `look` before each call; not for calls that `look` makes itself, on other disks."""
    fs.on_call = lambda call, path: look(f"{call} {path}")


def power_cuts(
    world: World, *, strict: bool, bound: int, samples: int
) -> Iterator[tuple[str, SimulatedFileSystem]]:
    for image in crash_images(world.fs, Cut.POWER, bound=bound, samples=samples, strict=strict):
        yield image.label, image.fs.clone()


@pytest.mark.parametrize("strict", [False, True], ids=["prefixes", "subsets"])
@pytest.mark.parametrize("consumes", [False, True], ids=["kept", "consumed"])
def test_a_power_cut_at_any_call_leaves_each_operation_in_one_file(*, strict: bool, consumes: bool) -> None:
    world = World(SimulatedFileSystem())
    crashes = Counter[str]()

    def crash(call: str) -> None:
        for label, fs in power_cuts(world, strict=strict, bound=200, samples=60):
            crashes[call.partition(" ")[0]] += 1
            other = world.after(fs)
            try:
                other.check()
                other.deliver(size=3)
                other.check()
            except BaseException as error:
                error.add_note(f"power cut before {call}, image {label}")
                raise
            covered = set(range(1, LAST_LSN + 1))
            assert other.acknowledged | covered == covered

    on_every_call(world.fs, crash)
    world.deliver(consumes=consumes)
    world.fs.on_call = lambda call, path: None
    world.check()
    print(f"{sum(crashes.values()):,} power cuts: {dict(crashes)}")
    assert sum(crashes.values()) > 250


def test_a_power_cut_in_the_middle_of_recovery_changes_nothing() -> None:
    world = World(SimulatedFileSystem())
    chance = random.Random(5)
    crashes = 0

    def crash_again(call: str) -> None:
        nonlocal crashes
        for _label, fs in power_cuts(world, strict=True, bound=6, samples=3):
            if chance.random() < 0.75:
                continue
            second = world.after(fs)

            def third(call: str, second: World = second) -> None:
                nonlocal crashes
                for _label, fs in power_cuts(second, strict=True, bound=4, samples=2):
                    crashes += 1
                    last = second.after(fs)
                    last.check()

            on_every_call(second.fs, third)
            second.backend().close()
            second.fs.on_call = lambda call, path: None

    on_every_call(world.fs, crash_again)
    world.deliver()
    print(f"{crashes:,} second power cuts")
    assert crashes > 500


@pytest.mark.parametrize("failed_sync", [FailedSync.DROP, FailedSync.REVERT])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
def test_a_call_that_fails_is_made_up_for_and_nothing_is_half_visible(
    failed_sync: FailedSync, error: int
) -> None:
    quiet = World(SimulatedFileSystem())
    quiet.fs.faults = FaultPlan()
    quiet.deliver()
    calls = quiet.fs.faults.calls
    outcomes = Counter[str]()
    for call, count in calls.items():
        for number in range(1, count + 1):
            world = World(SimulatedFileSystem())
            world.fs.failed_sync = failed_sync
            world.fs.faults = FaultPlan(faults=(Fault(call=call, number=number, error=error),))
            try:
                world.deliver(tries=TRIES_MAX)
                outcomes["went on"] += 1
            except StorageError:
                outcomes["refused to open"] += 1
            except WalbatchError as failure:
                failure.add_note(f"{call} {number}")
                raise
            assert world.fs.faults.hits == 1
            world.fs.faults = FaultPlan()
            world.fs.locks.clear()
            for _label, fs in power_cuts(world, strict=True, bound=8, samples=4):
                try:
                    other = world.after(fs)
                    other.check()
                    other.deliver()
                    other.check()
                except BaseException as failure:
                    failure.add_note(f"{call} {number} failed")
                    raise
            world.deliver()
            world.check()
            assert world.acknowledged <= set(range(1, LAST_LSN + 1))
    print(dict(outcomes))
    assert outcomes["went on"] > 20


def test_a_full_disk_leaves_nothing_half_visible_and_goes_on_when_there_is_room() -> None:
    world = World(SimulatedFileSystem())
    backend = world.backend()
    world.fs.capacity_bytes = sum(inode.size for inode in world.fs.inodes(world.fs.root)) + 100
    batch = CONTRACT.batch([(b"key", b"p" * 1000)], lsns=[1])
    for _ in range(3):
        with pytest.raises(BatchFailure, match="No space left"):
            backend.apply(batch)
        assert world.visible() == {}
        assert backend.applied_mark(0) == Mark()
    world.fs.capacity_bytes = None
    backend.apply(batch)
    assert list(world.visible().values()) == [[1]]
    backend.close()


class Killed(BaseException):
    """The process ends here."""


class LockFree(SimulatedFileSystem):
    """A disk whose locks do not hold."""

    def lock(self, path: str, note: bytes) -> Any:
        while isinstance(held := super().lock(path, note), bytes):
            self.locks.clear()
        return held


def engine(world: World, epoch: int) -> Callable[[int], None]:
    """An engine that applies one LSN at a time, opened now, and what it delivers that its marks do not cover."""
    backend = world.backend()

    def apply(lsn: int) -> None:
        backend.apply(CONTRACT.batch([(b"k", b"%d" % lsn)], lsns=[lsn], epoch=epoch))

    mark = backend.applied_mark(0)
    insist(apply, [lsn for lsn in range(1, epoch * 2 + 1) if not mark.covers(lsn)])
    return apply


def at_call(world: World, moment: int, stroke: Callable[[], None]) -> None:
    """Do it once, before the call of that number from now."""
    passed = 0

    def look(_call: str, _path: str) -> None:
        nonlocal passed
        passed += 1
        if passed == moment:
            world.fs.on_call = lambda call, path: None
            stroke()

    world.fs.on_call = look


def insist(apply: Callable[[int], None], lsns: Sequence[int]) -> bool:
    """Whether the engine was fenced at last."""
    for lsn in lsns:
        for _ in range(TRIES_MAX):
            try:
                apply(lsn)
                break
            except BatchFailure:
                continue
            except Fenced:
                return True
    return False


@pytest.mark.parametrize("consumes", [False, True], ids=["kept", "consumed"])
@pytest.mark.parametrize("failing", ["", "rename", "datasync", "write", "create", "sync_directory"])
def test_an_old_engine_that_wakes_up_at_any_call_applies_nothing_behind_a_newer_one(
    failing: str, *, consumes: bool
) -> None:
    """Locks do not hold. At each call of the old engine, also while it recovers from an error, a newer one opens and delivers."""
    moments = 0
    for moment in range(1, 200):
        world = World(LockFree())
        old = engine(world, 1)
        newer: list[Callable[[int], None]] = []

        def wake(world: World = world, newer: list[Callable[[int], None]] = newer) -> None:
            world.fs.faults = FaultPlan()
            newer.append(engine(world, 2))
            if consumes:
                world.consume()

        if failing:
            world.fs.faults = FaultPlan(faults=(Fault(call=failing),))
        at_call(world, moment, wake)
        fenced = insist(old, range(3, 7))
        if not newer:
            break
        moments += 1
        assert fenced or insist(old, [9]), f"at call {moment} it was not fenced"
        assert not insist(newer[0], range(5, 6))
        if consumes:
            world.consume()
        third = engine(world, 3)
        assert insist(newer[0], range(8, 9))
        assert not insist(third, range(7, 8))
        found = world.consumed + Counter(lsn for file in world.visible().values() for lsn in file)
        assert found == Counter(range(1, 8)), f"the newer engine came at call {moment}: {found}"
    print(f"{moments} moments")
    assert moments > 15


@pytest.mark.parametrize("dies", [False, True], ids=["goes on", "killed"])
def test_of_engines_that_open_at_the_same_moment_one_is_left(*, dies: bool) -> None:
    """Locks do not hold. At each call of an opening another engine opens, which at each of its calls is killed, or goes on."""
    cases = 0
    for moment in range(1, 100):
        came = False
        for end in range(1 + moment % 2, 100, 2) if dies else [1000]:
            world = World(LockFree())
            engine(world, 1)
            others: list[Callable[[int], None]] = []
            killed: list[int] = []

            def kill(killed: list[int] = killed) -> None:
                killed.append(1)
                raise Killed

            def open_other(
                world: World = world, others: list[Callable[[int], None]] = others, end: int = end
            ) -> None:
                at_call(world, end, kill)
                with contextlib.suppress(Killed):
                    others.append(engine(world, 2))
                world.fs.on_call = lambda call, path: None
                others.append(lambda lsn: None)

            at_call(world, moment, open_other)
            first = engine(world, 2)
            world.fs.on_call = lambda call, path: None
            came = bool(others)
            if not came:
                break
            cases += 1
            fenced = [insist(apply, range(5, 7)) for apply in (first, others[0])]
            assert sum(fenced) <= 1
            engine(world, 4)
            assert insist(first, range(9, 10))
            found = Counter(lsn for file in world.visible().values() for lsn in file)
            assert found == Counter(range(1, 9)), f"at call {moment}, killed at {end}: {found}"
            if dies and not killed:
                break
        if not came:
            break
    print(f"{cases:,} cases")
    assert cases > 15


def test_openings_that_are_killed_and_lose_power_later_lose_nothing() -> None:
    """Two openings are killed, one after the other, at any of their calls; then the power fails."""
    images = 0
    for first in range(1, 100):
        survived = False
        for second in range(1, 100, 2):
            world = World(LockFree())
            world.acknowledged = {1, 2, 3}
            old = engine(world, 1)
            old(3)
            world.fs.faults = FaultPlan(faults=(Fault(call="rename"),))
            with contextlib.suppress(BatchFailure):
                old(4)  # committed, and not shown
            world.fs.faults = FaultPlan()
            ends = []
            for moment in (first, second):

                def kill() -> None:
                    raise Killed

                at_call(world, moment, kill)
                try:
                    world.backend().close()
                    ends.append(False)
                except Killed:
                    ends.append(True)
                world.fs.on_call = lambda call, path: None
            for _label, fs in power_cuts(world, strict=True, bound=12, samples=6):
                images += 1
                other = world.after(fs)
                try:
                    other.check()
                    assert other.backend().applied_mark(0).covers(4)
                except BaseException as error:
                    error.add_note(f"killed at {first} and {second}")
                    raise
            survived = not ends[0]
            if not ends[1]:
                break
        if survived:
            break
    print(f"{images:,} power cuts")
    assert images > 300


def test_nothing_lists_the_folder_however_many_files_are_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(SimulatedFileSystem())
    world.deliver()

    listed = world.fs.list_directory

    def refuse(path: str) -> list[str]:
        assert path != FOLDER, "the folder may hold a million files"
        return listed(path)

    with monkeypatch.context() as patch:
        patch.setattr(world.fs, "list_directory", refuse)
        world.deliver()
    world.check()


def test_a_mark_with_many_ranges_is_kept() -> None:
    world = World(SimulatedFileSystem())
    lsns = list(range(1, 40_000, 2))
    mark = Mark(epoch=1, ranges=tuple((lsn, lsn) for lsn in lsns))
    for _ in range(2):
        backend = world.backend()
        backend.apply(CONTRACT.batch([(b"k", b"p")] * len(lsns), lsns=lsns, mark=mark))
        assert backend.applied_mark(0) == mark
        backend.close()
    assert [len(found) for found in world.visible().values()] == [len(lsns)]
    for _label, fs in power_cuts(world, strict=True, bound=4, samples=2):
        assert world.after(fs).backend().applied_mark(0) == mark
