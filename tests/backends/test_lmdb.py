"""LMDB as a backend: exactly once in effect, whatever is retried, killed, late, or full."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lmdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from walbatch.backends import shard as shard_module
from walbatch.backends.lmdb import LmdbBackend
from walbatch.core.mark import encode_mark
from walbatch.core.routing import shard_of
from walbatch.errors import (
    ConfigError,
    CorruptionError,
    EngineClosed,
    Fenced,
    StorageError,
    UnsupportedFormat,
    WalbatchError,
)
from walbatch.limits import KIB
from walbatch.ports import TransactionalBackend
from walbatch.types import Applied, Batch, CutReason, Mark, Operation, merge_ranges, ranges_of

ROOT = Path(__file__).resolve().parents[2]
STORE = b"store-uuid-16-by"
DEADLINE_S = 30
NUMBER = struct.Struct("<Q")


def batch(
    lsns: Sequence[int],
    *,
    keys: Sequence[bytes] | None = None,
    payloads: Sequence[bytes] | None = None,
    shard: int = 0,
    settled: Sequence[int] = (),
    epoch: int = 1,
    mark: Mark | None = None,
    store: bytes = STORE,
    lane: str = "put",
) -> Batch:
    """A batch whose mark covers its own operations and those in `settled`."""
    covered = merge_ranges(ranges_of(sorted({*lsns, *settled})), 0)
    return Batch(
        lane=lane,
        shard=shard,
        store=store,
        lsns=lsns,
        keys=keys if keys is not None else [b"key %d" % lsn for lsn in lsns],
        payloads=payloads if payloads is not None else [b"payload %d" % lsn for lsn in lsns],
        priorities=[5] * len(lsns),
        attempt=1,
        reason=CutReason.COUNT,
        mark=mark or Mark(epoch=epoch, ranges=covered),
    )


def unlogged(keys: Sequence[bytes], payloads: Sequence[bytes]) -> Batch:
    """A batch of a lane with durability "none"."""
    return Batch(
        lane="put",
        shard=0,
        store=STORE,
        lsns=(),
        keys=keys,
        payloads=payloads,
        priorities=[5] * len(keys),
        attempt=1,
        reason=CutReason.COUNT,
        mark=None,
    )


def count_up(txn: lmdb.Transaction[bytes], operation: Operation) -> int:
    """A write that shows every repetition: how often each key was written."""
    seen = NUMBER.unpack(txn.get(operation.key, NUMBER.pack(0)))[0] + 1
    txn.put(operation.key, NUMBER.pack(seen))
    return int(seen)


def opened(path: Path, *, shards: int = 1, **options: Any) -> LmdbBackend:
    backend = LmdbBackend(path, **options)
    backend.open("put", shards, STORE)
    return backend


def counts(backend: LmdbBackend) -> dict[bytes, int]:
    return {key: NUMBER.unpack(value)[0] for key, value in backend.items()}


# --- applying -----------------------------------------------------------------------------------------------------


def test_it_is_a_transactional_backend(tmp_path: Path) -> None:
    assert isinstance(LmdbBackend(tmp_path), TransactionalBackend)


def test_what_was_applied_can_be_read_and_survives_closing(tmp_path: Path) -> None:
    backend = opened(tmp_path / "blocks", shards=4)
    keys = [b"key %d" % number for number in range(100)]
    for number, key in enumerate(keys, 1):
        backend.apply(batch([number], keys=[key], shard=shard_of(key, 4)))
    assert backend.get(b"key 7") == b"payload 8"
    assert backend.get(b"absent") is None
    assert backend.count() == 100
    backend.close()

    reader = LmdbBackend(tmp_path / "blocks")
    assert dict(reader.items()) == {key: b"payload %d" % number for number, key in enumerate(keys, 1)}
    reader.close()


def test_the_last_payload_of_a_key_wins(tmp_path: Path) -> None:
    backend = opened(tmp_path)
    backend.apply(batch([1, 2, 3], keys=[b"a", b"b", b"a"], payloads=[b"old", b"b", b"new"]))
    assert dict(backend.items()) == {b"a": b"new", b"b": b"b"}
    backend.close()


@pytest.mark.parametrize("key", [b"\0", b"k" * 511], ids=["shortest", "longest"])
def test_keys_of_every_allowed_length_are_taken(tmp_path: Path, key: bytes) -> None:
    backend = opened(tmp_path)
    assert backend.key_bytes_min <= len(key) <= backend.key_bytes_max
    backend.apply(batch([1], keys=[key], payloads=[b""]))
    assert backend.get(key) == b""
    backend.close()


@pytest.mark.parametrize("key", [b"", b"k" * 512], ids=["empty", "too long"])
def test_keys_of_other_lengths_are_a_config_error_and_never_found(tmp_path: Path, key: bytes) -> None:
    backend = opened(tmp_path)
    with pytest.raises(ConfigError, match="1 to 511 bytes"):
        backend.apply(batch([1, 2], keys=[b"good", key]))
    assert backend.get(key) is None
    assert backend.count() == 0, "nothing of the batch took effect"
    backend.close()


def test_write_replaces_the_default_and_its_results_are_the_answer(tmp_path: Path) -> None:
    backend = opened(tmp_path, write=count_up)
    assert backend.apply(batch([1, 2, 3], keys=[b"a", b"b", b"a"])) == [Applied(1), Applied(1), Applied(2)]
    assert counts(backend) == {b"a": 2, b"b": 1}
    backend.close()


def test_what_write_raises_undoes_the_whole_batch(tmp_path: Path) -> None:
    def refuse(txn: lmdb.Transaction[bytes], operation: Operation) -> None:
        count_up(txn, operation)
        if operation.key == b"bad":
            raise ZeroDivisionError

    backend = opened(tmp_path, write=refuse)
    with pytest.raises(ZeroDivisionError):
        backend.apply(batch([1, 2], keys=[b"good", b"bad"]))
    assert backend.count() == 0
    assert backend.applied_mark(0) == Mark()
    backend.close()


def test_write_can_read_through_the_backend(tmp_path: Path) -> None:
    def look(_: lmdb.Transaction[bytes], operation: Operation) -> bytes | None:
        return backend.get(operation.key)

    backend = opened(tmp_path)
    backend.apply(batch([1], keys=[b"a"], payloads=[b"before"]))
    backend._write = look
    assert backend.apply(batch([2], keys=[b"a"])) == [Applied(b"before")]
    backend.close()


# --- exactly once -------------------------------------------------------------------------------------------------


def test_a_batch_that_comes_again_has_no_effect(tmp_path: Path) -> None:
    backend = opened(tmp_path, write=count_up)
    backend.apply(batch([1, 2]))
    assert backend.apply(batch([1, 2])) == [Applied(None), Applied(None)]
    assert counts(backend) == {b"key 1": 1, b"key 2": 1}
    backend.close()


def test_only_what_is_fresh_of_a_batch_cut_differently_takes_effect(tmp_path: Path) -> None:
    backend = opened(tmp_path, write=count_up)
    backend.apply(batch([2, 4]))
    answer = backend.apply(batch([1, 2, 3, 4, 5]))
    assert answer == [Applied(1), Applied(None), Applied(1), Applied(None), Applied(1)]
    assert set(counts(backend).values()) == {1}
    assert backend.applied_mark(0) == Mark(epoch=1, ranges=((1, 5),))
    backend.close()


def test_an_operation_that_took_effect_does_not_overwrite_a_later_one_when_it_comes_again(
    tmp_path: Path,
) -> None:
    backend = opened(tmp_path)
    backend.apply(batch([1], keys=[b"a"], payloads=[b"old"]))
    backend.apply(batch([2], keys=[b"a"], payloads=[b"new"], settled=[1]))
    backend.apply(batch([1, 3], keys=[b"a", b"b"], payloads=[b"old", b"b"]))
    assert dict(backend.items()) == {b"a": b"new", b"b": b"b"}
    backend.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.lists(st.lists(st.integers(1, 12), unique=True, min_size=1).map(sorted), max_size=12))
def test_every_operation_takes_effect_once_in_whatever_cuts_it_comes(
    tmp_path: Path, cuts: list[list[int]]
) -> None:
    shutil.rmtree(tmp_path)
    backend = opened(tmp_path, write=count_up)
    for cut in cuts:
        backend.apply(batch(cut))
    wanted = {b"key %d" % lsn: 1 for cut in cuts for lsn in cut}
    assert counts(backend) == wanted
    mark = backend.applied_mark(0)
    assert [lsn for lsn in range(14) if mark.covers(lsn)] == sorted(
        {0, *(lsn for cut in cuts for lsn in cut)}
    )
    backend.close()


def test_the_late_commit_of_a_zombie_does_not_move_the_mark_back(tmp_path: Path) -> None:
    backend = opened(tmp_path, write=count_up)
    late = batch([1], mark=Mark(epoch=1, watermark=1))
    backend.apply(batch([1, 2, 3], mark=Mark(epoch=1, watermark=3)))
    assert backend.apply(late) == [Applied(None)]
    assert backend.applied_mark(0) == Mark(epoch=1, watermark=3)
    assert set(counts(backend).values()) == {1}
    backend.close()


def test_an_engine_that_a_newer_one_replaced_is_fenced(tmp_path: Path) -> None:
    backend = opened(tmp_path)
    backend.apply(batch([1], epoch=2))
    with pytest.raises(Fenced, match="epoch 2"):
        backend.apply(batch([5], epoch=1))
    assert backend.count() == 1
    assert not backend.applied_mark(0).covers(5)
    backend.close()


def test_a_newer_engine_raises_the_epoch_even_with_a_batch_that_took_effect_before(tmp_path: Path) -> None:
    backend = opened(tmp_path)
    backend.apply(batch([1], epoch=1))
    backend.apply(batch([1], epoch=2))
    assert backend.applied_mark(0).epoch == 2
    with pytest.raises(Fenced):
        backend.apply(batch([2], epoch=1))
    backend.close()


def test_an_unlogged_batch_is_written_every_time_and_leaves_the_mark_alone(tmp_path: Path) -> None:
    backend = opened(tmp_path, write=count_up)
    backend.apply(batch([1], keys=[b"a"], epoch=9))
    for _ in range(2):
        backend.apply(unlogged([b"a"], [b""]))
    assert counts(backend) == {b"a": 3}
    assert backend.applied_mark(0) == Mark(epoch=9, ranges=((1, 1),))
    backend.close()


def test_marks_are_kept_for_each_store_lane_and_shard(tmp_path: Path) -> None:
    backend = opened(tmp_path, shards=2)
    backend.apply(batch([1]))
    assert backend.applied_mark(0).covers(1)
    assert backend.applied_mark(1) == Mark()
    backend.close()
    for lane, store in (("put", b"another-stores-u"), ("other", STORE)):
        backend.open(lane, 2, store)
        assert backend.applied_mark(0) == Mark()
        backend.apply(batch([1], lane=lane, store=store, epoch=0))
        backend.close()
    backend.open("put", 2, STORE)
    assert backend.applied_mark(0) == Mark(epoch=1, ranges=((1, 1),))
    backend.close()


KILLED = """
import sys
sys.path.insert(0, sys.argv[2])
from tests.backends.test_lmdb import Path, batch, count_up, opened
backend = opened(Path(sys.argv[1]), write=count_up, map_bytes=65536)
mark = backend.applied_mark(0)
done = mark.ranges[-1][1] if mark.ranges else 0
# What was offered last may or may not have taken effect: offer it again, in other cuts.
first = max(1, done - 30)
size = 1
while True:
    lsns = range(first, first + size)
    backend.apply(batch(lsns, settled=range(1, first), payloads=[b"x" * 300] * size))
    print(lsns[-1], flush=True)
    first, size = lsns[-1] + 1, size % 17 + 1
"""


def test_after_kill_9_data_and_mark_agree_and_nothing_took_effect_twice(tmp_path: Path) -> None:
    path = tmp_path / "counters"
    highest = 0
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(path), str(ROOT)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(40):
            acknowledged = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        acknowledged = max([acknowledged, *map(int, process.stdout.read().split("\n")[:-1])])
        process.stdout.close()
        process.wait()
        backend = opened(path)
        mark, found = backend.applied_mark(0), counts(backend)
        backend.close()
        assert len(mark.ranges) == 1
        assert mark.ranges[0][0] == 1
        assert highest < acknowledged <= mark.ranges[0][1]
        highest = mark.ranges[0][1]
        assert found == {b"key %d" % lsn: 1 for lsn in range(1, highest + 1)}


# --- room ---------------------------------------------------------------------------------------------------------


def test_the_map_grows_from_a_tiny_one_and_the_batch_takes_effect_once(tmp_path: Path) -> None:
    def count_and_fill(txn: lmdb.Transaction[bytes], operation: Operation) -> None:
        count_up(txn, operation)
        txn.put(b"z" + NUMBER.pack(operation.lsn or 0), bytes(50_000))

    backend = opened(tmp_path, map_bytes=32 * KIB, write=count_and_fill)
    first = backend.stats().map_bytes
    for number in range(1, 41):
        backend.apply(batch([number], keys=[b"same"]))
    assert NUMBER.unpack(backend.get(b"same") or b"") == (40,)
    assert backend.count() == 41
    assert backend.stats().map_bytes > 8 * first
    backend.close()
    # Opened with a map that is smaller than the file.
    backend = opened(tmp_path, map_bytes=32 * KIB)
    backend.apply(batch([50], payloads=[bytes(100_000)]))
    assert backend.count() == 42
    backend.close()


def test_a_map_at_its_ceiling_is_an_error_that_says_what_to_do_and_undoes_the_batch(tmp_path: Path) -> None:
    backend = opened(tmp_path, map_bytes=32 * KIB, map_bytes_max=200_000)
    backend.apply(batch([1]))
    with pytest.raises(StorageError, match=r"map_bytes_max \(200,000\).*larger") as caught:
        backend.apply(batch([2, 3], payloads=[b"x" * 150_000] * 2))
    assert caught.value.errno == errno.ENOSPC
    assert [key for key, _ in backend.items()] == [b"key 1"]
    backend.apply(batch([2], payloads=[b"x" * 50_000]))
    assert backend.count() == 2
    backend.close()


def test_readers_see_whole_batches_while_the_map_grows_under_them(tmp_path: Path) -> None:
    backend = opened(tmp_path, map_bytes=32 * KIB)
    pairs = [b"left", b"right"]
    backend.apply(batch([1, 2], keys=pairs, payloads=[NUMBER.pack(0)] * 2))
    done = threading.Event()

    def read() -> int:
        looks = 0
        while not done.wait(0.001) or not looks:
            left, right = backend.get(b"left"), backend.get(b"right")
            both = dict(backend.items())
            assert both[b"left"] == both[b"right"]
            assert left is not None
            assert right is not None
            assert NUMBER.unpack_from(left) <= NUMBER.unpack_from(right)
            looks += 1
        return looks

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read) for _ in range(3)]
        try:
            for number in range(1, 40):
                value = NUMBER.pack(number) + bytes(3_000 * number)
                backend.apply(batch([2 * number + 1, 2 * number + 2], keys=pairs, payloads=[value] * 2))
        finally:
            done.set()
        assert all(reader.result(DEADLINE_S) for reader in readers)
    assert backend.stats().map_bytes > 32 * KIB
    backend.close()


def test_a_file_that_a_write_left_short_is_made_whole(tmp_path: Path) -> None:
    def put_and_delete(txn: lmdb.Transaction[bytes], operation: Operation) -> None:
        # LMDB does not write pages at the end of the file that the same transaction took and gave back.
        txn.put(operation.key, b"x" * 300_000)
        txn.delete(operation.key)

    backend = opened(tmp_path, write=put_and_delete)
    for number in range(1, 10):
        backend.apply(batch([number]))
        backend.close()
        backend.open("put", 1, STORE)
    assert backend.count() == 0
    backend.close()


FULL = """
import resource, signal, sys
sys.path.insert(0, sys.argv[2])
from tests.backends.test_lmdb import Path, StorageError, batch, opened
backend = opened(Path(sys.argv[1]))
backend.apply(batch([1]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, unlimited[1]))
large = batch([2], payloads=[b"x" * 500_000])
for attempt in range(2):
    try:
        backend.apply(large)
    except StorageError as error:
        print(error.errno, error.path == sys.argv[1] + "/shard-000", backend.count(), backend.applied_mark(0).ranges)
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
backend.apply(large)
print(backend.count(), backend.applied_mark(0).ranges)
"""


def test_a_write_that_fails_undoes_the_batch_and_it_can_be_tried_again(tmp_path: Path) -> None:
    done = run(FULL, str(tmp_path / "blocks"), str(ROOT))
    failed = "5 True 1 ((1, 1),)\n"
    assert (done.stdout, done.stderr) == (f"{failed}{failed}2 ((1, 2),)\n", "")


def test_a_full_disk_is_told_as_such_though_lmdb_calls_it_an_io_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_module, "_is_disk_full", lambda _: True)
    error = lmdb.Error("mdb_txn_commit: Input/output error")
    error.code = errno.EIO  # type: ignore[misc]
    with (
        pytest.raises(StorageError, match="make room on the disk") as caught,
        shard_module.shard_errors(tmp_path),
    ):
        raise error
    assert caught.value.errno == errno.ENOSPC


def test_the_lock_file_has_no_holes_that_a_full_disk_could_not_fill(tmp_path: Path) -> None:
    backend = opened(tmp_path)
    lock = (tmp_path / "shard-000" / "lock.mdb").stat()
    assert lock.st_size == shard_module.LOCK_BYTES, "LMDB did not extend it"
    assert lock.st_blocks * 512 >= lock.st_size
    backend.close()


def test_on_a_full_disk_lmdb_is_not_let_near_a_lock_file_with_holes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(tmp_path).close()
    lock = tmp_path / "shard-000" / "lock.mdb"
    lock.unlink()
    lock.touch()
    os.truncate(lock, shard_module.LOCK_BYTES)
    with monkeypatch.context() as full:
        full.setattr(shard_module, "_is_disk_full", lambda _: True)
        for use in (lambda: opened(tmp_path), lambda: LmdbBackend(tmp_path).count()):
            with pytest.raises(StorageError, match="make room"):
                use()
    opened(tmp_path).close()


def test_a_lock_file_that_cannot_be_made_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda *_: 100)
        with pytest.raises(StorageError, match="make room"):
            opened(tmp_path)
    assert [*(tmp_path / "shard-000").iterdir()] == []
    opened(tmp_path).close()


# --- the directory ------------------------------------------------------------------------------------------------


def test_parents_are_made_for_their_owner_only(tmp_path: Path) -> None:
    opened(tmp_path / "a" / "b", shards=2).close()
    for directory in (tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "shard-001"):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    files = [file for file in (tmp_path / "a").rglob("*") if file.is_file()]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_the_layout_remembers_the_shards(tmp_path: Path) -> None:
    opened(tmp_path, shards=3).close()
    layout = json.loads((tmp_path / "layout.json").read_text())
    assert (layout["format"], layout["version"], layout["shards"]) == ("walbatch-lmdb", 1, 3)
    with pytest.raises(ConfigError, match=r"has 3 shards.*'put' has 2.*shards=3"):
        opened(tmp_path, shards=2)
    opened(tmp_path, shards=3).close()


def break_layout(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        layout = json.loads((path / "layout.json").read_text())
        change(layout)
        (path / "layout.json").write_text(json.dumps(layout))

    return damage


def write_layout(data: bytes) -> Callable[[Path], object]:
    return lambda path: (path / "layout.json").write_bytes(data)


def layout_as_directory(path: Path) -> None:
    (path / "layout.json").unlink()
    (path / "layout.json").mkdir()


def shard_as_file(path: Path) -> None:
    shutil.rmtree(path / "shard-001")
    (path / "shard-001").write_bytes(b"")


def overwrite(name: str, offset: int, data: bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with (path / name).open("r+b") as file:
            file.seek(offset)
            file.write(data)

    return damage


def damage_mark(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with lmdb.open(str(path / "shard-000"), max_dbs=8) as env:
            marks = env.open_db(b"marks")
            with env.begin(db=marks, write=True) as txn:
                stored = txn.get(STORE + b"put")
                assert stored is not None
                txn.put(STORE + b"put", change(stored))

    return damage


# Situation: how to damage a backend of two shards that has data; which error, with which words.
DAMAGE: dict[str, tuple[Callable[[Path], object], type[WalbatchError], str]] = {
    "layout gone": (lambda p: (p / "layout.json").unlink(), CorruptionError, "layout.json is gone"),
    "layout empty": (write_layout(b""), CorruptionError, "layout.json is damaged"),
    "layout of garbage": (write_layout(b"\xff\xfe"), CorruptionError, "layout.json is damaged"),
    "layout too large": (write_layout(b" " * 10_000), CorruptionError, "layout.json is damaged"),
    "layout nested without end": (write_layout(b"[" * 4_000), CorruptionError, "layout.json is damaged"),
    "layout of something else": (
        break_layout(lambda f: f.update(format="other")),
        CorruptionError,
        "layout.json is damaged",
    ),
    "layout with another number": (
        break_layout(lambda f: f.update(shards=3)),
        CorruptionError,
        "layout.json is damaged",
    ),
    "layout with an absurd number": (
        break_layout(lambda f: f.update(shards=10**9)),
        CorruptionError,
        "layout.json is damaged",
    ),
    "newer layout": (break_layout(lambda f: f.update(version=2)), UnsupportedFormat, "version 2.*upgrade"),
    "layout is a directory": (layout_as_directory, StorageError, "directory"),
    "shard gone": (lambda p: shutil.rmtree(p / "shard-001"), CorruptionError, "shard-001 is gone"),
    "shard is a file": (shard_as_file, CorruptionError, "shard-001 is gone"),
    "file cut": (
        lambda p: os.truncate(p / "shard-000" / "data.mdb", 5 * 4096),
        CorruptionError,
        "has 20,480 bytes.*cut off.*backup",
    ),
    "file of garbage": (
        overwrite("shard-000/data.mdb", 0, b"\xa5" * 8192),
        CorruptionError,
        "damaged.*backup",
    ),
    "mark damaged": (
        damage_mark(lambda mark: bytes([mark[0], mark[1], mark[2], mark[3] ^ 1]) + mark[4:]),
        CorruptionError,
        "mark of lane b'put' is damaged",
    ),
    "mark cut": (damage_mark(lambda mark: mark[:-1]), CorruptionError, "mark of lane b'put' is damaged"),
    "mark emptied": (damage_mark(lambda _: b""), CorruptionError, "mark of lane b'put' is damaged"),
    "mark of a newer version": (
        damage_mark(lambda _: newer_mark()),
        CorruptionError,
        "version 2",
    ),
}


def newer_mark() -> bytes:
    from walbatch.core.checksum import crc32c  # noqa: PLC0415 - only here

    body = b"WBmk" + struct.pack("<I", 2) + encode_mark(Mark(watermark=7))[8:-4]
    return body + struct.pack("<I", crc32c(body, 0))


@pytest.mark.parametrize(("damage", "error", "words"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_an_error_and_nothing_is_applied_over_it(
    tmp_path: Path, damage: Callable[[Path], object], error: type[WalbatchError], words: str
) -> None:
    path = tmp_path / "blocks"
    backend = opened(path, shards=2)
    backend.apply(batch(range(1, 40), payloads=[b"x" * 500] * 39))
    backend.close()
    damage(path)
    with pytest.raises(error, match=words):
        opened(path, shards=2).applied_mark(0)


def test_a_batch_never_goes_over_a_damaged_mark(tmp_path: Path) -> None:
    backend = opened(tmp_path, write=count_up)
    backend.apply(batch([1]))
    backend.close()
    damage_mark(lambda mark: mark[:-1])(tmp_path)
    backend.open("put", 1, STORE)
    with pytest.raises(CorruptionError):
        backend.apply(batch([1]))
    assert counts(backend) == {b"key 1": 1}
    backend.close()


@pytest.mark.parametrize("left", ["nothing", "an empty directory", "empty shards", "a temporary layout"])
def test_an_interrupted_creation_is_taken_over(tmp_path: Path, left: str) -> None:
    if left == "an empty directory":
        (tmp_path / "shard-000").mkdir()
    elif left != "nothing":
        opened(tmp_path, shards=2).close()
        (tmp_path / "layout.json").unlink()
    if left == "a temporary layout":
        (tmp_path / "layout.json.tmp").write_bytes(b"{")
    backend = opened(tmp_path, shards=2)
    backend.apply(batch([1]))
    assert backend.count() == 1
    backend.close()
    assert not (tmp_path / "layout.json.tmp").exists()


def test_a_path_that_is_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", tmp_path / "file" / "blocks"):
        with pytest.raises(StorageError, match="must be a directory"):
            opened(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_path_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="make it writable"):
        opened(tmp_path / "blocks")


def test_too_many_open_files_are_a_storage_error_and_none_stays_open(tmp_path: Path) -> None:
    script = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from tests.backends.test_lmdb import Path, STORE, StorageError, LmdbBackend, os
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
backend = LmdbBackend(Path(sys.argv[1]))
before = len(os.listdir("/proc/self/fd"))
try:
    backend.open("put", 256, STORE)
except StorageError as error:
    print("ulimit -n" in str(error), len(os.listdir("/proc/self/fd")) - before)
backend.open("put", 2, STORE)
print(backend.count())
"""
    done = run(script, str(tmp_path / "blocks"), str(ROOT))
    assert (done.stdout, done.stderr) == ("True 0\n0\n", "")


# --- who may use it -----------------------------------------------------------------------------------------------


def test_a_second_lane_is_refused(tmp_path: Path) -> None:
    backend = opened(tmp_path)
    for lane in ("other", "put"):
        with pytest.raises(ConfigError, match=f"already the backend of lane 'put'.*{lane}"):
            backend.open(lane, 1, STORE)
    backend.apply(batch([1]))
    backend.close()


def test_a_second_backend_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    backend = opened(tmp_path)
    with pytest.raises(ConfigError, match="already open in this process"):
        opened(tmp_path)
    backend.apply(batch([1]))
    assert backend.count() == 1
    backend.close()


def test_nothing_is_applied_before_open_or_after_close(tmp_path: Path) -> None:
    backend = LmdbBackend(tmp_path)
    with pytest.raises(EngineClosed, match="not open for writing"):
        backend.apply(batch([1]))
    backend.open("put", 1, STORE)
    backend.close()
    backend.close()
    for call in (lambda: backend.apply(batch([1])), lambda: backend.applied_mark(0)):
        with pytest.raises(EngineClosed, match="not open for writing"):
            call()


def test_reading_works_before_and_after_an_engine_uses_it(tmp_path: Path) -> None:
    opened(tmp_path).close()
    backend = LmdbBackend(tmp_path)
    assert backend.get(b"key 1") is None
    backend.open("put", 1, STORE)
    backend.apply(batch([1]))
    assert backend.get(b"key 1") == b"payload 1"
    backend.close()
    assert backend.get(b"key 1") == b"payload 1"
    backend.close()


def test_reading_where_nothing_was_ever_applied_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing was ever applied"):
        LmdbBackend(tmp_path / "missing").get(b"a")
    assert [*tmp_path.iterdir()] == []


READ = """
import sys
from walbatch.backends.lmdb import LmdbBackend
backend = LmdbBackend(sys.argv[1])
for line in sys.stdin:
    print(len(backend.get(line.strip().encode()) or b""), backend.count(), flush=True)
"""


def test_another_process_reads_while_the_file_outgrows_its_map(tmp_path: Path) -> None:
    backend = opened(tmp_path)
    backend.apply(batch([1]))
    reader = subprocess.Popen(
        [sys.executable, "-c", READ, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert reader.stdin is not None
    assert reader.stdout is not None

    def ask(key: str) -> str:
        reader.stdin.write(f"{key}\n")  # type: ignore[union-attr]
        reader.stdin.flush()  # type: ignore[union-attr]
        return reader.stdout.readline()  # type: ignore[union-attr]

    assert ask("key 1") == "9 1\n"
    large = 70 * KIB * KIB
    backend.apply(batch([2], payloads=[bytes(large)]))
    assert ask("key 2") == f"{large} 2\n"
    reader.stdin.close()
    assert reader.wait(DEADLINE_S) == 0
    reader.stdout.close()
    backend.close()


def test_two_processes_write_to_one_directory_each_with_its_own_store(tmp_path: Path) -> None:
    script = """
import sys
sys.path.insert(0, sys.argv[2])
from tests.backends.test_lmdb import LmdbBackend, batch
backend = LmdbBackend(sys.argv[1], map_bytes=65536)
backend.open("put", 1, b"another-stores-u")
for number in range(1, 30):
    backend.apply(batch([number], keys=[b"theirs %d" % number], store=b"another-stores-u", payloads=[bytes(20_000)]))
"""
    backend = opened(tmp_path, map_bytes=64 * KIB)
    other = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), str(ROOT)], stderr=subprocess.PIPE)
    assert other.stderr is not None
    number = 0
    while other.poll() is None:
        number += 1
        backend.apply(batch([number], payloads=[bytes(20_000)]))
        backend.get(b"key 1")
    errors = other.stderr.read()
    other.stderr.close()
    assert errors == b""
    assert backend.count() == number + 29
    backend.close()


FORK = """
import os, sys
from walbatch.errors import EngineClosed
from walbatch.backends.lmdb import LmdbBackend
backend = LmdbBackend(sys.argv[1])
backend.open("put", 1, bytes(16))
child = os.fork()
if child == 0:
    refused = 0
    for call in (lambda: backend.get(b"a"), backend.count, lambda: backend.applied_mark(0), lambda: backend.apply(None)):
        try:
            call()
        except EngineClosed:
            refused += 1
    backend.close()
    os._exit(refused)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), backend.count())
backend.close()
"""


def test_a_forked_child_can_use_nothing_of_it_and_does_no_harm(tmp_path: Path) -> None:
    done = run(FORK, str(tmp_path))
    assert (done.stdout, done.stderr) == ("4 0\n", "")


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script with the package in its path."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# --- shards and iteration -----------------------------------------------------------------------------------------


def test_shards_are_written_in_parallel(tmp_path: Path) -> None:
    together = threading.Barrier(3)

    def meet(_: lmdb.Transaction[bytes], operation: Operation) -> bytes:
        together.wait(DEADLINE_S)
        return operation.key

    backend = opened(tmp_path, shards=3, write=meet)
    with ThreadPoolExecutor(3) as pool:
        answers = [*pool.map(lambda shard: backend.apply(batch([shard + 1], shard=shard)), range(3))]
    assert answers == [[Applied(b"key 1")], [Applied(b"key 2")], [Applied(b"key 3")]]
    backend.close()


def test_two_calls_for_one_shard_run_one_after_the_other(tmp_path: Path) -> None:
    inside = threading.Lock()

    def alone(txn: lmdb.Transaction[bytes], operation: Operation) -> int:
        assert inside.acquire(blocking=False)
        try:
            return count_up(txn, operation)
        finally:
            inside.release()

    backend = opened(tmp_path, write=alone, map_bytes=32 * KIB)
    with ThreadPoolExecutor(4) as pool:
        assert len([*pool.map(lambda lsn: backend.apply(batch([lsn], keys=[b"same"])), range(1, 60))]) == 59
    assert counts(backend) == {b"same": 59}
    backend.close()


@pytest.mark.parametrize(
    ("count", "size"), [(0, 0), (999, 10), (1000, 10), (1001, 10), (2500, 10), (5, 700_000)]
)
def test_items_come_in_steps_but_all_and_in_order(tmp_path: Path, count: int, size: int) -> None:
    backend = opened(tmp_path)
    keys = [b"%06d" % number for number in range(count)]
    if keys:
        backend.apply(batch(range(1, count + 1), keys=keys, payloads=[bytes(size)] * count))
    assert [key for key, _ in backend.items()] == keys
    backend.close()


def test_iterating_holds_no_transaction_open_while_the_caller_works(tmp_path: Path) -> None:
    backend = opened(tmp_path, map_bytes=64 * KIB)
    keys = [b"%06d" % number for number in range(3000)]
    backend.apply(batch(range(1, 3001), keys=keys))
    items = backend.items()
    seen = [next(items)[0]]
    backend.apply(batch([4000], keys=[b"000000x"], payloads=[bytes(500_000)]))
    seen += [key for key, _ in items]
    assert [key for key in seen if key != b"000000x"] == keys
    backend.close()


def test_closing_while_somebody_reads_ends_in_a_clear_error_or_a_reader(tmp_path: Path) -> None:
    backend = opened(tmp_path)
    keys = [b"%06d" % number for number in range(3000)]
    backend.apply(batch(range(1, 3001), keys=keys))
    items = backend.items()
    assert next(items)[0] == b"000000"
    backend.close()
    with pytest.raises(EngineClosed, match="closed"):
        list(items)


def test_closing_does_not_wait_for_ever_for_a_write_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_module, "CLOSE_WAIT_S", 0.05)
    entered, release = threading.Event(), threading.Event()

    def hang(_txn: lmdb.Transaction[bytes], _operation: Operation) -> None:
        entered.set()
        release.wait(DEADLINE_S)

    backend = opened(tmp_path, write=hang)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(backend.apply, batch([1]))
        assert entered.wait(DEADLINE_S)
        backend.close()
        release.set()
        assert call.result(DEADLINE_S) == [Applied(None)]


# --- arguments and views ------------------------------------------------------------------------------------------

WRONG: dict[str, dict[str, Any]] = {
    "no room at all": {"map_bytes": 0},
    "a first map above the ceiling": {"map_bytes": 2**20, "map_bytes_max": 2**19},
    "a write that is no function": {"write": "put"},
}


@pytest.mark.parametrize("options", WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments_are_config_errors(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        LmdbBackend(tmp_path, **options)


def test_making_one_touches_nothing(tmp_path: Path) -> None:
    backend = LmdbBackend(tmp_path / "blocks")
    assert backend.url == f"lmdb://{tmp_path}/blocks"
    assert [*tmp_path.iterdir()] == []


def test_repr_and_stats_show_its_state(tmp_path: Path) -> None:
    backend = LmdbBackend(tmp_path)
    assert repr(backend) == f"<LmdbBackend {tmp_path} closed, 0 shards>"
    backend.open("put", 2, STORE)
    backend.apply(batch([1]))
    assert repr(backend) == f"<LmdbBackend {tmp_path} lane 'put', 2 shards>"
    stats = backend.stats()
    assert (stats.shards, stats.count) == (2, 1)
    assert 0 < stats.disk_bytes < stats.map_bytes
    assert re.fullmatch(r"<Shard \S+ open>", repr(backend._shards[0]))
    backend.close()
    assert backend.count() == 1
    assert repr(backend) == f"<LmdbBackend {tmp_path} reading, 2 shards>"
    backend.close()
