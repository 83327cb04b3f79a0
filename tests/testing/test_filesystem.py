"""The simulated disk is as bad as a real one may be, and not worse."""

from __future__ import annotations

import errno

import pytest

from walbatch.testing.simulation.disk import PIECE_BYTES, ZEROS, FailedSync, Inode
from walbatch.testing.simulation.faults import Fault, FaultPlan
from walbatch.testing.simulation.filesystem import Room, SimulatedFile, SimulatedFileSystem, SimulatedLock
from walbatch.testing.simulation.images import Cut, crash_images

A, B, C = (bytes([letter]) * PIECE_BYTES for letter in b"ABC")


def contents(fs: SimulatedFileSystem, path: str = "/f") -> bytes | None:
    """What a file holds; None where there is none."""
    if not fs.exists(path):
        return None
    file = fs.open_read(path)
    return file.read(file.size(), 0)


def after(fs: SimulatedFileSystem, path: str = "/f", *, strict: bool = False) -> list[bytes | None]:
    """What a file may hold after a power cut, over all images."""
    return [contents(image.fs, path) for image in crash_images(fs, Cut.POWER, strict=strict)]


def names(fs: SimulatedFileSystem, *, strict: bool = False) -> set[tuple[str, ...]]:
    """The lists of names that a power cut may leave in the root."""
    return {tuple(image.fs.list_directory("/")) for image in crash_images(fs, Cut.POWER, strict=strict)}


def durable_file(fs: SimulatedFileSystem, data: bytes = A) -> SimulatedFile:
    file = fs.create("/f")
    file.write([data], 0)
    file.datasync()
    fs.sync_directory("/")
    return file


def test_what_is_synced_is_there_after_any_crash() -> None:
    fs = SimulatedFileSystem()
    durable_file(fs, A + B)
    assert after(fs) == [A + B]


def test_a_synced_file_whose_directory_was_not_synced_may_be_gone() -> None:
    fs = SimulatedFileSystem()
    file = fs.create("/f")
    file.write([A], 0)
    file.datasync()
    assert set(after(fs)) == {None, A}


def test_each_unsynced_piece_has_a_fate_of_its_own() -> None:
    fs = SimulatedFileSystem()
    file = durable_file(fs, A + A)
    file.write([B + B], 0)
    found = after(fs)
    assert {A + A, A + B, B + A, B + B} <= set(found)
    pieces = {data[:PIECE_BYTES] for data in found if data}
    assert any(piece.startswith(B[:64]) and piece.endswith(A[64:]) for piece in pieces), "a torn piece"
    assert len(pieces) == 4, "old, new, torn, garbage"


def test_the_size_may_grow_without_the_content() -> None:
    fs = SimulatedFileSystem()
    file = durable_file(fs, A)
    fs.create("/old").write([C], 0)
    fs.unlink("/old")
    fs.sync_directory("/")
    file.write([B], PIECE_BYTES)
    found = set(after(fs))
    assert A in found, "neither size nor content"
    assert A + ZEROS in found
    assert A + C in found, "a block of a deleted file"
    assert A + B in found


def test_the_size_before_a_long_write_may_be_left_by_a_power_cut() -> None:
    inode = Inode(1)
    inode.truncate(32_768)
    for size in range(36_864, 73_728, 4_096):
        inode.truncate(size)
    assert {0, 32_768, 69_632} <= set(inode.possible_sizes())
    assert all(inode.may_have(size) for size in [0, *range(32_768, 73_728, 4_096)])
    assert not any(inode.may_have(size) for size in (512, 32_256, 73_728))


def test_a_piece_that_was_overwritten_twice_may_hold_what_was_between() -> None:
    fs = SimulatedFileSystem()
    file = durable_file(fs, A)
    file.write([B], 0)
    file.write([C], 0)
    assert {A, B, C} <= set(after(fs))


def test_a_power_cut_keeps_a_prefix_of_the_names_and_in_strict_mode_any_subset() -> None:
    fs = SimulatedFileSystem()
    fs.create("/a")
    fs.create("/b")
    assert names(fs) == {(), ("a",), ("a", "b")}
    assert names(fs, strict=True) == {(), ("a",), ("b",), ("a", "b")}


def test_directories_lose_their_names_independently() -> None:
    fs = SimulatedFileSystem()
    fs.make_directory("/d")
    fs.make_directory("/e")
    fs.sync_directory("/")
    fs.create("/d/x")
    fs.create("/e/y")
    found = {
        (tuple(image.fs.list_directory("/d")), tuple(image.fs.list_directory("/e")))
        for image in crash_images(fs, Cut.POWER)
    }
    assert found == {((), ()), (("x",), ()), ((), ("y",)), (("x",), ("y",))}


def test_a_rename_is_old_or_new_and_never_neither() -> None:
    fs = SimulatedFileSystem()
    durable_file(fs, A)
    temporary = fs.create("/t")
    temporary.write([B], 0)
    temporary.datasync()
    fs.rename("/t", "/f")
    assert set(after(fs)) == {A, B}
    assert set(after(fs, strict=True)) == {A, B}


def test_an_unlink_may_be_undone_until_the_directory_is_synced() -> None:
    fs = SimulatedFileSystem()
    durable_file(fs)
    fs.unlink("/f")
    assert set(after(fs)) == {None, A}
    fs.sync_directory("/")
    assert after(fs) == [None]


def test_a_failed_sync_loses_the_pieces_stays_readable_and_the_next_one_succeeds_without_them() -> None:
    fs = SimulatedFileSystem()
    file = durable_file(fs, A)
    fs.faults = FaultPlan((Fault(call="datasync"),))
    file.write([B], 0)
    with pytest.raises(OSError, match="injected"):
        file.datasync()
    file.datasync()
    assert contents(fs) == B
    assert A in after(fs), "the second sync has written nothing"


def test_a_piece_that_is_written_again_after_a_failed_sync_becomes_durable() -> None:
    fs = SimulatedFileSystem()
    file = durable_file(fs, A)
    fs.faults = FaultPlan((Fault(call="datasync"),))
    file.write([B], 0)
    with pytest.raises(OSError, match="injected"):
        file.datasync()
    file.write([C], 0)
    file.datasync()
    assert after(fs) == [C]


def test_a_failed_sync_may_show_the_old_content_or_be_reported_late() -> None:
    fs = SimulatedFileSystem()
    fs.failed_sync = FailedSync.REVERT
    file = durable_file(fs, A)
    fs.faults = FaultPlan((Fault(call="datasync"),))
    file.write([B], 0)
    with pytest.raises(OSError, match="injected"):
        file.datasync()
    assert contents(fs) == A

    late = SimulatedFileSystem()
    late.failed_sync = FailedSync.LATE
    file = durable_file(late, A)
    late.faults = FaultPlan((Fault(call="datasync"),))
    file.write([B], 0)
    file.datasync()
    with pytest.raises(OSError, match="injected"):
        file.datasync()
    file.datasync()


@pytest.mark.parametrize("drops", [False, True], ids=["stay pending", "dropped"])
def test_names_of_a_failed_directory_sync_stay_pending_or_are_unsure_for_ever(drops: bool) -> None:
    fs = SimulatedFileSystem()
    fs.failed_sync_drops_names = drops
    fs.create("/a")
    fs.faults = FaultPlan((Fault(call="sync_directory"),))
    with pytest.raises(OSError, match="injected"):
        fs.sync_directory("/")
    assert names(fs) == {(), ("a",)}
    fs.create("/b")
    fs.sync_directory("/")
    assert names(fs) == ({("b",), ("a", "b")} if drops else {("a", "b")})


def test_a_full_disk_writes_a_part_first_and_has_room_again_after_an_unlink() -> None:
    fs = SimulatedFileSystem()
    fs.capacity_bytes = 3 * PIECE_BYTES
    file = durable_file(fs, A + B)
    other = fs.create("/g")
    with pytest.raises(OSError, match="No space") as caught:
        other.write([A + B], 0)
    assert caught.value.errno == errno.ENOSPC
    assert other.size() == PIECE_BYTES
    file.close()
    fs.unlink("/f")
    other.write([A + B], 0)
    assert contents(fs, "/g") == A + B


@pytest.mark.parametrize(
    "code", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE], ids=errno.errorcode.get
)
def test_the_nth_call_of_a_kind_fails_once_or_for_ever(code: int) -> None:
    fs = SimulatedFileSystem()
    fs.faults = FaultPlan((
        Fault(call="create", number=2, error=code), Fault(call="unlink", error=code, forever=True),
    ))  # fmt: skip
    fs.create("/a")
    for call in (lambda: fs.create("/b"), lambda: fs.unlink("/a"), lambda: fs.unlink("/a")):
        with pytest.raises(OSError, match="injected") as caught:
            call()
        assert caught.value.errno == code
    fs.create("/b")
    assert fs.faults.hits == 3


def test_too_many_open_files_are_refused() -> None:
    fs = SimulatedFileSystem()
    fs.files_max = 1
    file = fs.create("/a")
    with pytest.raises(OSError, match="Too many"):
        fs.open_read("/a")
    file.close()
    fs.open_read("/a")


@pytest.mark.parametrize(("room", "expected"), [(Room.ZEROS, ZEROS), (Room.STALE, C)])
def test_preallocated_room_reads_as_it_is_told_to(room: Room, expected: bytes) -> None:
    fs = SimulatedFileSystem()
    fs.room = room
    fs.create("/old").write([C], 0)
    fs.unlink("/old")
    file = fs.create("/f")
    file.preallocate(2 * PIECE_BYTES)
    assert file.read(PIECE_BYTES, PIECE_BYTES) == expected
    assert file.size() == 2 * PIECE_BYTES


def test_what_a_truncation_cut_off_may_come_back_until_it_is_synced() -> None:
    fs = SimulatedFileSystem()
    file = durable_file(fs, A + B)
    file.truncate(100)
    assert {A + B, A[:100]} <= set(after(fs))
    file.truncate(2 * PIECE_BYTES)
    assert contents(fs) == A[:100].ljust(2 * PIECE_BYTES, b"\0"), "a reader sees zeros behind the cut"
    file.datasync()
    assert after(fs) == [contents(fs)]


def test_a_kill_keeps_the_cache_and_a_power_cut_may_still_follow() -> None:
    fs = SimulatedFileSystem()
    file = durable_file(fs, A)
    file.write([B], 0)
    (image,) = crash_images(fs, Cut.KILL)
    assert contents(image.fs) == B
    assert {A, B} <= set(after(image.fs))


def test_a_lock_ends_with_its_process_and_refuses_a_second_opener() -> None:
    fs = SimulatedFileSystem()
    lock = fs.lock("/lock", b"me")
    assert isinstance(lock, SimulatedLock)
    assert fs.lock("/lock", b"you") == b"me"
    (image,) = crash_images(fs, Cut.KILL)
    assert isinstance(image.fs.lock("/lock", b"you"), SimulatedLock)
    assert lock.held
    lock.release()
    assert not lock.held


def test_an_image_is_a_new_file_system() -> None:
    fs = SimulatedFileSystem()
    file = durable_file(fs, A)
    for cut in Cut:
        for image in crash_images(fs, cut):
            image.fs.unlink("/f")
            image.fs.sync_directory("/")
    file.write([B], 0)
    assert contents(fs) == B


def test_beyond_the_bound_there_are_the_extremes_and_seeded_samples() -> None:
    fs = SimulatedFileSystem()
    file = durable_file(fs, A * 20)
    file.write([B * 20], 0)

    def sampled(seed: int) -> list[bytes | None]:
        images = list(crash_images(fs, Cut.POWER, bound=64, samples=10, seed=seed))
        assert not any(image.exhaustive for image in images)
        return [contents(image.fs) for image in images]

    assert sampled(1) == sampled(1) != sampled(2)
    assert {A * 20, B * 20} <= set(sampled(1))
    assert 10 < len(sampled(1)) <= 30
