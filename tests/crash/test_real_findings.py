"""What failing system calls and full disks have found in the engine: each of these was a breach."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import lmdb
import pytest

import walbatch as wb
from walbatch.inspection import look
from walbatch.limits import MIB
from walbatch.storage.filesystem import RealFileSystem
from walbatch.types import Batch, CutReason

PAGE_BYTES = 4096

with tempfile.TemporaryDirectory() as _folder, lmdb.open(_folder):
    META_PAGE = (Path(_folder) / "data.mdb").read_bytes()[:PAGE_BYTES]


def fail(*_: object, **__: object) -> Any:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def write_one(backend: wb.LmdbBackend) -> None:
    batch = Batch(
        lane="put", shard=0, store=bytes(16), lsns=[1], keys=[b"k"], payloads=[b"v"], priorities=[5], attempt=1,
        reason=CutReason.COUNT, mark=None,
    )  # fmt: skip
    backend.apply(batch)


@pytest.mark.parametrize("call", ["exists", "is_directory"])
def test_a_name_that_cannot_be_looked_at_does_not_count_as_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    look = getattr(RealFileSystem(), call)
    assert look(str(tmp_path))
    assert not look(str(tmp_path / "other"))
    (tmp_path / "file").write_bytes(b"")
    assert not look(str(tmp_path / "file" / "below"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", fail)
        patch.setattr(os, "stat", fail)
        with pytest.raises(OSError, match="Input/output"):
            look(str(tmp_path))


@pytest.mark.parametrize("lies", [1, 2])
def test_an_identity_that_cannot_be_looked_at_stops_the_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lies: int
) -> None:
    real, seen = os.lstat, 0

    def lstat(path: Any, **arguments: Any) -> os.stat_result:
        nonlocal seen
        if str(path).endswith("/identity"):
            seen += 1
            if seen == lies:
                fail()
        return real(path, **arguments)

    lanes = {"put": wb.Lane(lambda _: None)}
    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", lstat)
        with pytest.raises(wb.StorageError) as caught:
            wb.Engine.open(tmp_path / "store", lanes)
        assert caught.value.errno == errno.EIO
    with wb.Engine.open(tmp_path / "store", lanes) as engine:
        engine.submit("put", key=b"k", payload=b"v")


def test_a_shard_whose_file_cannot_be_looked_at_is_an_error_of_our_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.stat

    def stat(path: Path, **arguments: Any) -> os.stat_result:
        if path.name == "data.mdb":
            fail()
        return real(path, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", stat)
        with pytest.raises(wb.StorageError):
            wb.LmdbBackend(tmp_path / "blocks").open("put", 1, bytes(16))


@pytest.mark.parametrize(
    "left",
    [b"", bytes(PAGE_BYTES), bytes(2 * PAGE_BYTES), META_PAGE, META_PAGE + bytes(3 * PAGE_BYTES)],
    ids=["nothing", "a page of zeros", "two pages of zeros", "one meta page", "one meta page and zeros"],
)
def test_a_shard_whose_making_was_cut_off_is_made_again(tmp_path: Path, left: bytes) -> None:
    """A disk that is full, or loses its power, while LMDB writes the two first pages of a new file."""
    shard = tmp_path / "blocks" / "shard-000"
    shard.mkdir(parents=True)
    (shard / "data.mdb").write_bytes(left)
    backend = wb.LmdbBackend(tmp_path / "blocks")
    backend.open("put", 1, bytes(16))
    write_one(backend)
    assert backend.get(b"k") == b"v"
    backend.close()


@pytest.mark.parametrize(
    "left",
    [bytes(PAGE_BYTES), bytes(2 * PAGE_BYTES), META_PAGE, bytes(2 * PAGE_BYTES + MIB), META_PAGE + bytes(PAGE_BYTES + MIB)],
    ids=["a page of zeros", "two pages of zeros", "one meta page", "reserved zeros", "one meta page and reserved zeros"],
)  # fmt: skip
def test_a_state_whose_making_was_cut_off_is_no_lost_store(tmp_path: Path, left: bytes) -> None:
    """The disk was full, or lost its power, before the first segment was made: nothing was ever submitted."""
    lanes = {"put": wb.Lane(lambda _: None)}
    store = tmp_path / "store"
    with wb.Engine.open(store, lanes):
        pass
    for file in (store / "wal").iterdir():
        file.unlink()
    state = store / "state" / "data.mdb"
    state.write_bytes(left)
    found = look(store).store
    assert found.refusal is None
    assert found.next_lsn == 1
    with wb.Engine.open(store, lanes) as engine:
        assert engine.submit("put", key=b"k", payload=b"v").lsn == 1


def test_a_state_that_held_something_and_was_cut_off_is_damage(tmp_path: Path) -> None:
    lanes = {"put": wb.Lane(lambda _: None)}
    store = tmp_path / "store"
    for _ in range(2):
        with wb.Engine.open(store, lanes) as engine:
            engine.submit("put", key=b"k", payload=b"v")
    for file in (store / "wal").iterdir():
        file.unlink()
    for size in (2 * PAGE_BYTES, PAGE_BYTES, 300):
        os.truncate(store / "state" / "data.mdb", size)
        assert look(store).store.refusal is not None
        with pytest.raises(wb.CorruptionError):
            wb.Engine.open(store, lanes)


def test_a_shard_with_data_is_never_taken_for_an_unfinished_one(tmp_path: Path) -> None:
    backend = wb.LmdbBackend(tmp_path / "blocks")
    backend.open("put", 1, bytes(16))
    write_one(backend)
    backend.close()
    file = tmp_path / "blocks" / "shard-000" / "data.mdb"
    with file.open("r+b") as stream:
        stream.write(bytes(PAGE_BYTES))
        stream.truncate(64 * PAGE_BYTES)
    (tmp_path / "blocks" / "layout.json").unlink()
    with pytest.raises(wb.CorruptionError):
        wb.LmdbBackend(tmp_path / "blocks").open("put", 1, bytes(16))


@pytest.mark.parametrize("page", [0, 1])
def test_a_shard_that_was_applied_to_is_not_set_aside_for_one_lost_meta_page(
    tmp_path: Path, page: int
) -> None:
    backend = wb.LmdbBackend(tmp_path / "blocks")
    backend.open("put", 1, bytes(16))
    for _ in range(40):
        write_one(backend)
    backend.close()
    file = tmp_path / "blocks" / "shard-000" / "data.mdb"
    assert file.stat().st_size <= 16 * PAGE_BYTES
    with file.open("r+b") as stream:
        stream.seek(page * PAGE_BYTES)
        stream.write(bytes(PAGE_BYTES))
    (tmp_path / "blocks" / "layout.json").unlink()
    before = file.read_bytes()
    with pytest.raises(wb.CorruptionError):
        wb.LmdbBackend(tmp_path / "blocks").open("put", 1, bytes(16))
    assert file.read_bytes() == before


@pytest.mark.parametrize("what", ["state", "shard"])
def test_the_two_first_pages_are_durable_before_anything_follows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Otherwise a power cut leaves a file that has its size, or later pages, but not these two: it looks lost."""
    seen: list[tuple[str, str, int]] = []

    def noting(call: str) -> None:
        real = getattr(os, call)

        def noted(file: int, *arguments: int) -> None:
            path = os.readlink(f"/proc/self/fd/{file}").removeprefix(f"{tmp_path}/")
            seen.append((call, path, os.fstat(file).st_size))
            real(file, *arguments)

        monkeypatch.setattr(os, call, noted)

    for call in ("fdatasync", "fsync", "posix_fallocate"):
        noting(call)
    fresh = 2 * PAGE_BYTES
    if what == "state":
        wb.Engine.open(tmp_path / "store", {"put": wb.Lane(lambda _: None)}).close()
        calls = [(call, size) for call, path, size in seen if path == "store/state/data.mdb"]
        assert calls[:2] == [("fdatasync", fresh), ("posix_fallocate", fresh)]
        reserved = seen.index(("posix_fallocate", "store/state/data.mdb", fresh))
        synced = seen.index(("fdatasync", "store/state/data.mdb", fresh))
        assert ("fsync", "store/state") in [entry[:2] for entry in seen[synced:reserved]]
    else:
        backend = wb.LmdbBackend(tmp_path / "blocks")
        backend.open("put", 1, bytes(16))
        backend.close()
        assert ("fdatasync", "blocks/shard-000/data.mdb", fresh) in seen


def test_files_whose_making_was_cut_off_are_all_kept(tmp_path: Path) -> None:
    state, shard = tmp_path / "store" / "state", tmp_path / "blocks" / "shard-000"
    shard.mkdir(parents=True)
    for size in (PAGE_BYTES, 2 * PAGE_BYTES, 300):
        wb.Engine.open(tmp_path / "store", {"put": wb.Lane(lambda _: None)}).close()
        for file in (tmp_path / "store" / "wal").iterdir():
            file.unlink()
        (tmp_path / "blocks" / "layout.json").unlink(missing_ok=True)
        for folder in (state, shard):
            (folder / "data.mdb").write_bytes(bytes(size))
        wb.Engine.open(tmp_path / "store", {"put": wb.Lane(lambda _: None)}).close()
        backend = wb.LmdbBackend(tmp_path / "blocks")
        backend.open("put", 1, bytes(16))
        backend.close()
    for folder in (state, shard):
        kept = sorted(file.stat().st_size for file in folder.glob("data.unfinished*"))
        assert kept == [300, PAGE_BYTES, 2 * PAGE_BYTES]


def test_a_shard_that_cannot_be_looked_at_is_not_called_gone(tmp_path: Path) -> None:
    backend = wb.LmdbBackend(tmp_path / "blocks")
    backend.open("put", 1, bytes(16))
    backend.close()
    shard = tmp_path / "blocks" / "shard-000"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(shard)
    with pytest.raises(wb.StorageError) as caught:
        backend.open("put", 1, bytes(16))
    assert caught.value.errno == errno.ELOOP
