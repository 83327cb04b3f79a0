"""Names, the identity, and small files that are replaced as a whole."""

from __future__ import annotations

import errno
import itertools

import pytest

import walbatch as wb
from tests.memory import MemoryFileSystem, fail_at
from walbatch.core.recovery import IdentityState
from walbatch.storage.layout import (
    IDENTITY_BYTES,
    Layout,
    decode_identity,
    encode_identity,
    read_identity,
    segment_number,
    sync_directory,
    sync_file,
    write_durably,
)

STORE = bytes(range(16))


def test_the_number_in_a_segments_name_is_exact() -> None:
    layout = Layout("/q")
    assert layout.segment(7) == "/q/wal/0000000000000000007.seg"
    assert segment_number("0000000000000000007.seg") == 7
    assert segment_number(f"{2**63 - 1:019d}.seg") == 2**63 - 1
    for name in (
        "7.seg", "0000000000000000007.seg.tmp", "0000000000000000007", "x0000000000000000007.seg", "",
        "00000000000000000007.seg", "-000000000000000007.seg", "0000000000000000007.seg\n", "\u0660" * 18 + "\u0667.seg",
    ):  # fmt: skip
        assert segment_number(name) is None, name


def test_an_identity_comes_back() -> None:
    data = encode_identity(STORE, 5)
    assert len(data) == IDENTITY_BYTES == 64
    assert decode_identity(data) == (IdentityState.VALID, STORE)


@pytest.mark.parametrize("size", [0, 1, 8, 63, 65, 1000])
def test_an_identity_of_another_length_is_damaged(size: int) -> None:
    data = (encode_identity(STORE, 5) + bytes(1000))[:size]
    assert decode_identity(data) == (IdentityState.DAMAGED, None)


def test_a_missing_identity_is_missing() -> None:
    assert read_identity(MemoryFileSystem.of("/q", {}), Layout("/q")) == (IdentityState.MISSING, None)


def test_a_failed_sync_is_never_taken_for_a_full_disk() -> None:
    fs = MemoryFileSystem.of("/q", {"f": b""})
    file = fs.open_read("/q/f")
    for code in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
        fs.fail = fail_at(1, code, for_ever=True)
        with pytest.raises(wb.StorageError, match="sync of /q/f failed") as caught:
            sync_file(file, "/q/f")
        assert caught.value.errno == code
        assert not isinstance(caught.value, OSError)
        with pytest.raises(wb.StorageError, match="sync of /q failed"):
            sync_directory(fs, "/q")


def test_a_small_file_is_replaced_as_a_whole_or_not_at_all() -> None:
    done = False
    for number in itertools.count(1):
        fs = MemoryFileSystem.of("/q", {"f": b"before", "f.tmp": b"left over"})
        fs.fail = fail_at(number, errno.EIO, for_ever=True)
        done = True
        try:
            write_durably(fs, "/q/f", b"after!")
        except (OSError, wb.StorageError):
            done = False
        calls, fs.fail = len(fs.calls), None
        assert fs.open_files == 0
        after = fs.after_power_cut()
        assert bytes(after.files["/q/f"].data) in ({b"after!"} if done else {b"before", b"after!"})
        assert bytes(fs.files["/q/f"].data) in {b"before", b"after!"}
        write_durably(fs, "/q/f", b"again")
        assert bytes(fs.after_power_cut().files["/q/f"].data) == b"again"
        if calls < number:
            break
    assert done
    assert number > 4
