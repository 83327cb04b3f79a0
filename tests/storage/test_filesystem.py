"""The real file system: whole writes, whole reads, and a lock that ends with its holder."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from walbatch.ports import File, FileLock, FileSystem
from walbatch.storage.filesystem import IOV_MAX, RealFile, RealFileSystem, RealLock


@pytest.fixture
def fs() -> RealFileSystem:
    return RealFileSystem()


def test_it_is_what_the_ports_describe(fs: RealFileSystem, tmp_path: Path) -> None:
    system: FileSystem = fs
    file: File = system.create(str(tmp_path / "f"))
    lock = system.lock(str(tmp_path / "lock"), b"note")
    assert not isinstance(lock, bytes)
    held: FileLock = lock
    assert held.held
    held.release()
    file.close()


def test_a_directory_that_is_there_but_cannot_be_looked_at_is_an_error_of_its_own(
    fs: RealFileSystem, tmp_path: Path
) -> None:
    fs.make_directory(str(tmp_path))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileExistsError):
        fs.make_directory(str(tmp_path / "file"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError, match="symbolic links") as caught:
        fs.make_directory(str(tmp_path / "loop"))
    assert caught.value.errno == errno.ELOOP


def test_many_buffers_are_written_one_after_the_other(fs: RealFileSystem, tmp_path: Path) -> None:
    file = fs.create(str(tmp_path / "f"))
    buffers = [b"%d " % n for n in range(3 * IOV_MAX)] + [b""]
    file.write(buffers, 10)
    whole = b"".join(buffers)
    assert file.size() == 10 + len(whole)
    assert file.read(len(whole) + 100, 10) == whole
    assert file.read(5, 10 + len(whole)) == b""
    file.datasync()
    file.close()


def test_a_short_write_is_continued(
    fs: RealFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwritev

    def short(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return real(fd, [buffers[0][:3]], offset)

    monkeypatch.setattr(os, "pwritev", short)
    file = fs.create(str(tmp_path / "f"))
    file.write([b"abcdefgh", b"", b"ij"], 0)
    assert file.read(100, 0) == b"abcdefghij"
    file.close()


def test_a_write_that_makes_no_progress_is_an_error(
    fs: RealFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwritev", lambda *_: 0)
    file = fs.create(str(tmp_path / "f"))
    with pytest.raises(OSError, match="no progress") as caught:
        file.write([b"a"], 0)
    assert caught.value.errno == errno.EIO
    file.close()


def test_a_short_write_before_a_full_disk_ends_in_the_error(
    fs: RealFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[Any] = [2, OSError(errno.ENOSPC, "no space")]

    def full(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        assert isinstance(answer, int)
        return answer

    monkeypatch.setattr(os, "pwritev", full)
    file = fs.create(str(tmp_path / "f"))
    with pytest.raises(OSError, match="no space"):
        file.write([b"abc"], 0)
    assert answers == []
    file.close()


def test_a_short_read_is_continued(
    fs: RealFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_bytes(b"abcdefgh")
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: real(fd, min(size, 3), offset))
    file = fs.open_read(str(tmp_path / "f"))
    assert file.read(8, 0) == b"abcdefgh"
    assert file.read(100, 2) == b"cdefgh"
    file.close()


def test_preallocating_grows_a_file_also_where_the_file_system_cannot(
    fs: RealFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = fs.create(str(tmp_path / "f"))
    file.preallocate(5000)
    assert file.size() == 5000

    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "unsupported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    file.preallocate(9000)
    assert file.size() == 9000
    monkeypatch.setattr(os, "posix_fallocate", _full)
    with pytest.raises(OSError, match="no space"):
        file.preallocate(10_000)
    file.truncate(17)
    assert file.size() == 17
    file.close()
    file.close()
    assert "fd -1" in repr(file)


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "no space")


def test_files_are_private_and_never_taken_over(fs: RealFileSystem, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        fs.make_directory(str(tmp_path / "d"))
        fs.create(str(tmp_path / "d" / "f")).close()
    finally:
        os.umask(before)
    assert os.stat(tmp_path / "d").st_mode & 0o777 == 0o700
    assert os.stat(tmp_path / "d" / "f").st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        fs.create(str(tmp_path / "d" / "f"))
    fs.make_directory(str(tmp_path / "d"))
    with pytest.raises(FileExistsError):
        fs.make_directory(str(tmp_path / "d" / "f"))


def test_links_are_not_followed_and_dangling_ones_exist(fs: RealFileSystem, tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError):
        fs.open_read(str(tmp_path / "link"))
    with pytest.raises(OSError):
        fs.lock(str(tmp_path / "link"), b"note")
    assert (tmp_path / "target").read_bytes() == b"x"
    assert fs.exists(str(tmp_path / "dangling"))
    assert not fs.exists(str(tmp_path / "nothing"))


def test_names_are_listed_in_order_and_changed_at_once(fs: RealFileSystem, tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / name).write_bytes(name.encode())
    fs.rename(str(tmp_path / "a"), str(tmp_path / "c"))
    fs.sync_directory(str(tmp_path))
    assert fs.list_directory(str(tmp_path)) == ["b", "c"]
    assert (tmp_path / "c").read_bytes() == b"a"
    fs.unlink(str(tmp_path / "b"))
    assert fs.list_directory(str(tmp_path)) == ["c"]
    assert fs.is_directory(str(tmp_path))
    assert not fs.is_directory(str(tmp_path / "c"))
    with pytest.raises(FileNotFoundError):
        fs.list_directory(str(tmp_path / "nothing"))


def test_descriptors_do_not_reach_programs_that_are_started(fs: RealFileSystem, tmp_path: Path) -> None:
    file = fs.create(str(tmp_path / "f"))
    lock = fs.lock(str(tmp_path / "lock"), b"note")
    assert isinstance(lock, RealLock)
    assert isinstance(file, RealFile)
    assert not os.get_inheritable(file._fd)
    assert not os.get_inheritable(lock._fd)
    file.close()
    lock.release()


def test_a_lock_is_exclusive_also_within_a_process_and_ends_with_its_release(
    fs: RealFileSystem, tmp_path: Path
) -> None:
    path = str(tmp_path / "lock")
    held = fs.lock(path, b"mine")
    assert isinstance(held, RealLock)
    assert fs.lock(path, b"yours") == b"mine"
    assert fs.lock(path, b"") == b"mine"
    held.release()
    held.release()
    again = fs.lock(path, b"y")
    assert isinstance(again, RealLock)
    assert Path(path).read_bytes() == b"y", "an earlier note leaves nothing behind"
    again.release()
    assert os.path.exists(path)


def test_a_lock_is_looked_at_without_a_trace(fs: RealFileSystem, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fs.lock(str(tmp_path / "lock"), b"")
    assert os.listdir(tmp_path) == []
    held = fs.lock(str(tmp_path / "lock"), b"mine")
    assert isinstance(held, RealLock)
    held.release()
    looked = fs.lock(str(tmp_path / "lock"), b"")
    assert isinstance(looked, RealLock)
    assert (tmp_path / "lock").read_bytes() == b"mine"
    looked.release()
