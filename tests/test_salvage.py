"""A salvage: what it keeps, what it gives up and says, and that it can be cut short anywhere."""

from __future__ import annotations

import errno
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import walbatch as wb
from tests.stores import PAYLOAD_BYTES, TINY, Made, deliver, flip, make_store, note_dropped, picture
from tests.support import FAST, FailingFileSystem, failing_when
from walbatch import limits
from walbatch.core.checksum import crc32c
from walbatch.errors import ConfigError, CorruptionError, StorageError, StoreLocked, UnsupportedFormat
from walbatch.inspection import look, operations
from walbatch.salvage import Salvage, salvage_store, salvaging
from walbatch.storage.filesystem import RealFile, RealFileSystem

KINDS = {"put": 2, "log": 2}
SECTOR = limits.SECTOR_BYTES
FRAME = 2 * SECTOR
"""Bytes of a frame with one operation of a test store."""

Damage = Callable[[Made], None]


def flip_in(segment: int, offset: int, *, count: int = 1) -> Damage:
    """Change bytes of one segment (by index)."""
    return lambda made: flip(made.segments[segment], offset, count=count)


def zero(segment: int, offset: int, end: int | None = None) -> Damage:
    def damage(made: Made) -> None:
        path = made.segments[segment]
        data = bytearray(path.read_bytes())
        last = len(data) if end is None else end
        data[offset:last] = bytes(last - offset)
        path.write_bytes(data)

    return damage


def cut(segment: int, size: int) -> Damage:
    def damage(made: Made) -> None:
        path = made.segments[segment]
        path.write_bytes(path.read_bytes()[:size])

    return damage


def remove(*segments: int) -> Damage:
    def damage(made: Made) -> None:
        for path in [made.segments[segment] for segment in segments]:
            path.unlink()

    return damage


def swap(first: int, second: int) -> Damage:
    """Each of two segments stands under the other's name."""

    def damage(made: Made) -> None:
        one, other = made.segments[first], made.segments[second]
        aside = one.with_suffix(".aside")
        one.rename(aside)
        other.rename(one)
        aside.rename(other)

    return damage


def foreign(segment: int) -> Damage:
    """A segment of another store, of the same number."""

    def damage(made: Made) -> None:
        other = make_store(made.path.with_name("other"), count=40)
        shutil.copy(other.path / "wal" / made.segments[segment].name, made.segments[segment])

    return damage


def both(*damages: Damage) -> Damage:
    def damage(made: Made) -> None:
        for each in damages:
            each(made)

    return damage


def every_header(made: Made) -> None:
    for path in made.segments[:-1]:
        flip(path, 100)


DAMAGES: Mapping[str, Damage] = {
    "a byte of the first header": flip_in(0, 100),
    "a byte of a middle header": flip_in(3, 100),
    "a byte of the last header": flip_in(-1, 100),
    "the first header is zeroed": zero(0, 0, SECTOR),
    "a middle header is zeroed": zero(3, 0, SECTOR),
    "two headers in a row": both(flip_in(3, 100), flip_in(4, 100)),
    "two headers in a row are zeroed": both(zero(3, 0, SECTOR), zero(4, 0, SECTOR)),
    "the header and a frame of a middle segment": both(flip_in(3, 100), flip_in(3, SECTOR + 100)),
    "every header but the last": every_header,
    "the first frame of the first segment": flip_in(0, SECTOR + 100),
    "the first frame of a middle segment": flip_in(3, SECTOR + 100),
    "a frame's header in a middle segment": flip_in(3, SECTOR + FRAME + 20),
    "the first frame of the last segment": flip_in(-1, SECTOR + 100),
    "frames in three segments": both(
        flip_in(1, SECTOR + 100), flip_in(2, SECTOR + 100), flip_in(5, SECTOR + 100)
    ),
    "every frame of a middle segment is zeroed": zero(3, SECTOR),
    "every frame of the last segment is zeroed": zero(-1, SECTOR),
    "the first segment is missing": remove(0),
    "a middle segment is missing": remove(3),
    "two segments in a row are missing": remove(3, 4),
    "the last segment is missing": remove(-1),
    "the last two segments are missing": remove(-2, -1),
    "a middle and the last segment are missing": remove(3, -1),
    "a missing segment after a damaged one": both(flip_in(2, SECTOR + 100), remove(3)),
    "a middle segment is cut in a frame": cut(3, SECTOR + FRAME + 100),
    "a middle segment is cut behind a frame": cut(3, SECTOR + FRAME),
    "a middle segment is cut to its header": cut(3, SECTOR),
    "a middle segment is empty": cut(3, 0),
    "the last segment is cut in a frame": cut(-1, SECTOR + 100),
    "the last segment is cut to its header": cut(-1, SECTOR),
    "the last segment is empty": cut(-1, 0),
    "two segments stand under each other's name": swap(2, 4),
    "a segment of another store": foreign(3),
}


def without_state(made: Made) -> None:
    shutil.rmtree(made.path / "state")


def in_ranges(lsn: int, found: Salvage) -> bool:
    beyond = found.end_lost_after is not None and lsn > found.end_lost_after
    return beyond or any(first <= lsn <= last for first, last in found.lost)


def check_salvage(made: Made) -> Salvage:
    """Salvage a damaged store, and check all that must hold whatever the damage was."""
    before = picture(made.path)
    damaged = {path.name: path.read_bytes() for path in made.segments}
    planned = salvage_store(made.path, dry_run=True)
    assert picture(made.path) == before, "a dry run writes nothing"
    found = salvage_store(made.path)
    assert found == planned, "a dry run says what the real run does"

    after = {name: state for name, state in picture(made.path).items() if name != "lock"}
    again = salvage_store(made.path)
    assert {name: state for name, state in picture(made.path).items() if name != "lock"} == after
    assert (again.lost, again.end_lost_after, again.rebuilt) == ((), None, ())
    assert again.pending == found.pending

    for number in found.rebuilt:
        name = f"{number:019d}.seg"
        copies = [path.read_bytes() for path in (made.path / "quarantine").glob(f"{name}.?")]
        assert copies == ([damaged[name]] if name in damaged else [])
        assert (made.path / "quarantine" / f"{name}.0.note").exists()

    exact, quick = look(made.path, full=True, lock=True).store, look(made.path, lock=True).store
    assert exact.refusal is None
    assert exact.pending == sum(count.operations for count in found.pending.values())
    assert quick.pending == exact.pending + exact.passed_over
    assert exact.next_lsn == found.next_lsn

    check_delivery(made, found)
    return found


def check_delivery(made: Made, found: Salvage) -> None:
    """Every pending operation is delivered as it was submitted, or is said to be lost."""
    state_is_left = look(made.path).store.checkpoint_generation is not None
    predicted = [operation.lsn for operation in operations(made.path, pending_only=True)]
    delivered = deliver(made.path, kinds=KINDS)
    assert sorted(lsn or 0 for lsn, _, _ in delivered) == predicted, "a look says what the opening delivers"
    expected = made.pending if state_is_left else set(made.submitted)
    # Without state/ what is settled comes again, unless a compaction has noted that.
    needed = made.pending
    lsns = [lsn for lsn, _, _ in delivered]
    assert len(lsns) == len(set(lsns)), "each is delivered once"
    assert set(lsns) <= expected
    for lsn, key, payload in delivered:
        assert lsn is not None
        assert made.submitted[lsn][1:] == (key, payload)
        assert not in_ranges(lsn, found), "what is delivered is not called lost"
    for lsn in {lsn for lsn in needed - set(lsns) if lsn <= made.known_lsn}:
        assert in_ranges(lsn, found), f"operation {lsn} is neither delivered nor called lost"
    for key in {key for _, key, _ in delivered}:
        own = [lsn for lsn, other, _ in delivered if other == key and lsn is not None]
        for kind in KINDS:
            of_kind = [lsn for lsn in own if made.submitted[lsn][0] == kind]
            assert all(first < second for first, second in pairwise(of_kind)), "a key keeps its order"
    with wb.Engine.open(made.path, lanes={"put": wb.Lane(None, shards=2)}, settings=TINY) as engine:
        assert engine.stats().pending == 0
        lsn = engine.submit("put", key=b"new").lsn
        assert lsn is not None
        assert lsn > max(made.submitted)
        assert engine.stats().pending == 1


@pytest.mark.parametrize("clean", [True, False], ids=["closed", "killed"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_what_is_whole_is_delivered_and_what_is_not_is_named(
    tmp_path: Path, damage: Damage, clean: bool
) -> None:
    made = make_store(tmp_path / "q", clean=clean)
    damage(made)
    refused = look(made.path, full=True).store.refusal
    found = check_salvage(made)
    assert (refused is not None) == bool(found.rebuilt)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_it_is_exact_where_other_lanes_have_settled_around_what_is_lost(
    tmp_path: Path, damage: Damage
) -> None:
    made = make_store(tmp_path / "q", kinds=("put", "log"), settle="log", count=20)
    damage(made)
    check_salvage(made)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_it_works_without_a_checkpoint(tmp_path: Path, damage: Damage) -> None:
    made = make_store(tmp_path / "q", kinds=("put", "log"), settle="log", count=20)
    first_lsn = look(made.path).store.segments[0].first_lsn
    damage(made)
    without_state(made)
    if damage in {
        DAMAGES["the first segment is missing"],
        *(DAMAGES[name] for name in DAMAGES if "last" in name),
    }:
        # Without a checkpoint nothing proves that these were there: recovery does not refuse, or cannot know all.
        salvage_store(made.path)
        assert look(made.path, full=True).store.refusal is None
        return
    assert first_lsn == 1
    check_salvage(made)


def test_random_damage_is_never_delivered_and_never_silent(tmp_path: Path) -> None:
    """A few of the many that were run once; the seed is in the path of what fails."""
    made = make_store(tmp_path / "q", kinds=("put", "log"), settle="log", count=24)
    for seed in range(40):
        chance = random.Random(seed)
        copy = replace(made, path=tmp_path / f"seed-{seed}")
        shutil.copytree(made.path, copy.path)
        for _ in range(chance.choice([1, 1, 2, 3])):
            path = chance.choice(copy.segments)
            data = bytearray(path.read_bytes())
            at = chance.randrange(len(data))
            match chance.randrange(4):
                case 0:
                    data[at] ^= 1 << chance.randrange(8)
                case 1:
                    del data[at:]
                case 2:
                    data[at : at + 3000] = bytes(len(data[at : at + 3000]))
                case _:
                    data[at : at + 3000] = chance.randbytes(len(data[at : at + 3000]))
            path.write_bytes(data)
            if chance.random() < 0.1 and len(copy.segments) > 1:
                path.unlink()
        check_salvage(copy)


# --- what it refuses -------------------------------------------------------------------------------------------------


def test_a_sound_store_is_left_as_it_is(tmp_path: Path) -> None:
    made = make_store(tmp_path / "q", clean=False)
    before = {name: state for name, state in picture(made.path).items() if name != "lock"}
    found = salvage_store(made.path)
    assert not found.lost_something
    assert found.pending["put"].operations == 30
    assert {name: state for name, state in picture(made.path).items() if name != "lock"} == before


def lose_identity(made: Made) -> None:
    (made.path / "identity").unlink()


def lose_wal(made: Made) -> None:
    for path in made.segments:
        path.unlink()


def only_one_segment_without_header(made: Made) -> None:
    without_state(made)
    for path in made.segments[1:]:
        path.unlink()
    zero(0, 0, SECTOR)(made)


@pytest.mark.parametrize("dry_run", [True, False], ids=["dry", "real"])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lose_identity, "identity is missing"),
        (lambda made: flip(made.path / "identity", 20), "identity is damaged"),
        (lose_wal, "wal/ holds no segment"),
        (only_one_segment_without_header, "header of segment 1 is damaged"),
    ],
    ids=["no identity", "damaged identity", "no log", "nothing tells the header"],
)
def test_what_it_cannot_work_around_is_corruption_and_nothing_is_changed(
    tmp_path: Path, damage: Damage, says: str, dry_run: bool
) -> None:
    made = make_store(tmp_path / "q")
    damage(made)
    before = {name: state for name, state in picture(made.path).items() if name != "lock"}
    with pytest.raises(CorruptionError, match=says) as caught:
        salvage_store(made.path, dry_run=dry_run)
    assert "Nothing was changed" in str(caught.value)
    assert "restore" in str(caught.value)
    assert {name: state for name, state in picture(made.path).items() if name != "lock"} == before


def test_a_newer_segment_is_left_to_a_newer_walbatch(tmp_path: Path) -> None:
    made = make_store(tmp_path / "q")
    flip(made.segments[1], 100)
    newer = bytearray(made.segments[3].read_bytes())
    newer[8:12] = (2).to_bytes(4, "little")
    newer[SECTOR - 4 : SECTOR] = crc32c(bytes(newer[: SECTOR - 4]), 0).to_bytes(4, "little")
    made.segments[3].write_bytes(newer)
    wal = picture(made.path / "wal")
    with pytest.raises(UnsupportedFormat, match="newer format"):
        salvage_store(made.path)
    assert picture(made.path / "wal") == wal


def test_a_store_that_is_open_is_not_touched(tmp_path: Path) -> None:
    with wb.Engine.open(tmp_path / "q", lanes={"put": wb.Lane(None)}), pytest.raises(StoreLocked):
        salvage_store(tmp_path / "q")


def test_a_path_that_is_no_store_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no store"):
        salvage_store(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        salvage_store(tmp_path / "nowhere")


# --- cut short -------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process."""


class MortalFileSystem(RealFileSystem):
    """The real file system, until its `life`-th change: that one happens, or not, and nothing after it."""

    def __init__(self, life: int, *, happens: bool) -> None:
        self.life = life
        self.happens = happens

    def change(self, call: Callable[[], Any]) -> Any:
        self.life -= 1
        if self.life > 0:
            return call()
        if self.life == 0 and self.happens:
            call()
        raise Killed

    def make_directory(self, path: str) -> None:
        self.change(lambda: super(MortalFileSystem, self).make_directory(path))

    def create(self, path: str) -> RealFile:
        file: RealFile = self.change(lambda: super(MortalFileSystem, self).create(path))
        return MortalFile(file, path, self)

    def rename(self, source: str, target: str) -> None:
        self.change(lambda: super(MortalFileSystem, self).rename(source, target))

    def unlink(self, path: str) -> None:
        # What is not there needs no life.
        if self.exists(path):
            self.change(lambda: super(MortalFileSystem, self).unlink(path))
        else:
            raise FileNotFoundError(path)

    def sync_directory(self, path: str) -> None:
        self.change(lambda: super(MortalFileSystem, self).sync_directory(path))


class MortalFile(RealFile):
    """A file of a `MortalFileSystem`."""

    def __init__(self, file: RealFile, path: str, fs: MortalFileSystem) -> None:
        super().__init__(file._fd, path)
        self._fs = fs

    def write(self, buffers: Any, offset: int) -> None:
        self._fs.change(lambda: super(MortalFile, self).write(buffers, offset))

    def datasync(self) -> None:
        self._fs.change(lambda: super(MortalFile, self).datasync())


@pytest.mark.parametrize("happens", [True, False], ids=["after", "before"])
def test_it_can_be_killed_at_any_change_and_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, happens: bool
) -> None:
    made = make_store(tmp_path / "q", kinds=("put", "log"), settle="log", count=12)
    both(flip_in(1, SECTOR + 100), remove(3), flip_in(-1, SECTOR + 100))(made)
    whole = replace(made, path=tmp_path / "whole")
    shutil.copytree(made.path, whole.path)
    expected = salvage_store(whole.path)
    assert len(expected.rebuilt) == 3
    contents = {
        name: data
        for name, (_, _, data) in picture(whole.path).items()
        if name.startswith(("wal", "quarantine"))
    }

    life = 0
    while True:
        life += 1
        torn = replace(made, path=tmp_path / f"killed-{life}")
        shutil.copytree(made.path, torn.path)
        with monkeypatch.context() as patch:
            patch.setattr(
                salvaging, "RealFileSystem", lambda life=life: MortalFileSystem(life, happens=happens)
            )
            try:
                salvage_store(torn.path)
            except Killed:
                pass
            else:
                break
        assert look(torn.path, full=True).problems == ()
        again = salvage_store(torn.path)
        assert again.pending == expected.pending
        assert set(again.lost) <= set(expected.lost)
        assert look(torn.path).store.refusal is None
        assert look(torn.path).store.pending == sum(count.operations for count in expected.pending.values())
        left = {
            name: data
            for name, (_, _, data) in picture(torn.path).items()
            if name.startswith(("wal", "quarantine"))
        }
        assert left == contents, "as if nothing had happened"
        check_delivery(torn, expected)
        shutil.rmtree(torn.path)
    assert life > 30


def test_a_full_disk_ends_it_in_an_error_with_the_damage_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_store(tmp_path / "q")
    flip(made.segments[3], SECTOR + 100)
    wal = picture(made.path / "wal")
    fs = FailingFileSystem()
    fs.fail = failing_when("write", 3, errno.ENOSPC)
    with monkeypatch.context() as patch:
        patch.setattr(salvaging, "RealFileSystem", lambda: fs)
        with pytest.raises(StorageError, match="repair the cause"):
            salvage_store(made.path)
    after = picture(made.path / "wal")
    assert {name: state[2] for name, state in after.items()} == {
        name: state[2] for name, state in wal.items()
    }
    check_salvage(made)


# --- what it says ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage", [remove(-1), remove(-2, -1), cut(-1, SECTOR), cut(-1, SECTOR + 100)],
    ids=["missing", "two missing", "cut to its header", "cut in a frame"],
)  # fmt: skip
def test_an_end_that_only_compactions_have_noted_is_given_up_as_one_that_the_checkpoint_knows(
    tmp_path: Path, damage: Damage
) -> None:
    made = make_store(tmp_path / "q")
    noted = note_dropped(made.path)
    without_state(made)
    damage(made)
    refusal = look(made.path, full=True, lock=True).store.refusal
    assert refusal is not None
    found = check_salvage(made)
    assert found.lost_something
    assert found.next_lsn > noted.durable_lsn + 2**40


def test_the_loss_is_exactly_the_damaged_frame(tmp_path: Path) -> None:
    made = make_store(tmp_path / "q")
    flip(made.segments[3], SECTOR + FRAME + 100)
    assert check_salvage(made).lost == ((11, 11),)


def test_what_every_shard_has_settled_is_not_called_lost(tmp_path: Path) -> None:
    def all_but_the_first(batch: wb.Batch) -> list[wb.Applied | wb.Retry]:
        return [wb.Retry(after=60) if lsn == 1 else wb.Applied() for lsn in batch.lsns]

    path = tmp_path / "q"
    lane = wb.Lane(all_but_the_first, order="none", trigger=FAST)
    seldom = replace(TINY, checkpoint_ms=60_000)  # nothing is compacted meanwhile
    with wb.Engine.open(path, lanes={"put": lane}, settings=seldom) as engine:
        tickets = [engine.submit("put", key=b"%d" % n, payload=bytes(PAYLOAD_BYTES)) for n in range(30)]
        for ticket in tickets[1:]:
            ticket.result(timeout=30)
        engine.close(drain=False)
    segment = sorted((path / "wal").glob("*.seg"))[3]
    flip(segment, SECTOR + 100)
    assert look(path, full=True).store.refusal is not None
    found = salvage_store(path)
    assert (found.rebuilt, found.lost, found.lost_something) == ((4,), (), False)
    assert [lsn for lsn, _, _ in deliver(path, kinds={"put": 1})] == [1]


def test_the_end_of_the_log_is_said_to_be_open_where_nothing_tells_how_much_is_gone(tmp_path: Path) -> None:
    made = make_store(tmp_path / "q", clean=False)
    last_lsn = max(made.submitted)
    flip(made.segments[-2], SECTOR + 100)
    assert salvage_store(made.path, dry_run=True).end_lost_after is None
    made.segments[-1].unlink()
    found = salvage_store(made.path)
    assert found.end_lost_after is not None
    assert found.end_lost_after <= last_lsn
    with wb.Engine.open(made.path, lanes={"put": wb.Lane(None, shards=2)}, settings=TINY) as engine:
        lsn = engine.submit("put", key=b"k").lsn
        assert lsn is not None
        assert lsn > found.end_lost_after + 2**40, "beyond all that can have been handed out"


def test_a_backend_that_is_ahead_of_the_salvaged_log_goes_on(tmp_path: Path) -> None:
    """Its mark names LSNs that the log has lost: they must not be handed out again."""
    path = tmp_path / "q"
    with wb.Engine.open(
        path, lanes={"put": wb.Lane(wb.LmdbBackend(tmp_path / "blocks")), "log": wb.Lane(None)}, settings=TINY
    ) as engine:
        for number in range(20):
            engine.submit("put", key=b"%d" % number, payload=bytes(600))
            engine.submit("log", key=b"%d" % number, payload=bytes(600))
        engine.flush("put", timeout=30)
    segments = sorted((path / "wal").glob("*.seg"))
    segments[-1].unlink()
    segments[-2].unlink()
    assert salvage_store(path).lost_something
    backend = wb.LmdbBackend(tmp_path / "blocks")
    with wb.Engine.open(path, lanes={"put": wb.Lane(backend), "log": wb.Lane(None)}, settings=TINY) as engine:
        engine.submit("put", key=b"new", payload=b"new").result(timeout=30)
        assert backend.get(b"new") == b"new"


def test_the_note_in_quarantine_says_what_is_lost(tmp_path: Path) -> None:
    made = make_store(tmp_path / "q")
    flip(made.segments[3], SECTOR + 100)
    salvage_store(made.path)
    note = (made.path / "quarantine" / f"{made.segments[3].name}.0.note").read_text()
    assert note == (
        "segment 4 was rebuilt by a salvage: damaged or cut below what the next segment proves "
        "(frame body does not match its CRC). LSNs that are lost: 10 to 10\n"
    )
