"""What failing system calls and full disks have found in the engine: each of these was a breach."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import lmdb
import pytest

import walbatch as wb
from walbatch.inspection import look
from walbatch.storage.filesystem import RealFileSystem
from walbatch.types import Batch, CutReason

PAGE_BYTES = 4096


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
    [b"", bytes(PAGE_BYTES), bytes(2 * PAGE_BYTES), bytes(24) + b"\xde\xc0\xef\xbe" + bytes(PAGE_BYTES - 28)],
    ids=["nothing", "a page of zeros", "two pages of zeros", "one meta page"],
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


@pytest.mark.parametrize("left", ["a page of zeros", "two pages of zeros", "one meta page"])
def test_a_state_whose_making_was_cut_off_is_no_lost_store(tmp_path: Path, left: str) -> None:
    """The disk was full, or lost its power, before the first segment was made: nothing was ever submitted."""
    lanes = {"put": wb.Lane(lambda _: None)}
    store = tmp_path / "store"
    with wb.Engine.open(store, lanes):
        pass
    for file in (store / "wal").iterdir():
        file.unlink()
    state = store / "state" / "data.mdb"
    with lmdb.open(os.fspath(tmp_path / "fresh")):
        fresh = (tmp_path / "fresh" / "data.mdb").read_bytes()
    pages = {"a page of zeros": bytes(PAGE_BYTES), "two pages of zeros": bytes(2 * PAGE_BYTES)}
    state.write_bytes(pages.get(left, fresh[:PAGE_BYTES]))
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
