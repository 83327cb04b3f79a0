"""Another backend, or another number of shards, while operations are pending: refused, or the same data elsewhere."""

from __future__ import annotations

import logging
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import walbatch as wb
from tests.cli.program import walbatch
from walbatch.inspection import look, remembered_lanes
from walbatch.types import Batch

COUNT = 6


def fill(path: Path, backend: Any, *, settled: int = 0, start: int = 0, **options: Any) -> None:
    """A store whose lane was delivered to a backend as far as `settled`; COUNT more operations are pending."""
    with wb.Engine.open(path / "store", {"put": wb.Lane(backend, **options)}) as engine:
        if settled:
            engine.submit_many("put", [(b"done %d" % n, b"") for n in range(settled)])
            engine.flush("put", timeout=30)
        engine.pause("put")
        engine.submit_many("put", [(b"%d" % (start + n), b"x") for n in range(COUNT)])
        engine.close(drain=False)


def reopen(path: Path, backend: Any, **options: Any) -> None:
    with wb.Engine.open(path / "store", {"put": wb.Lane(backend, **options)}) as engine:
        engine.flush("put", timeout=30)


def pending(path: Path) -> int:
    return look(path / "store", full=True).store.pending


def url(path: Path) -> str | None:
    return remembered_lanes(path / "store")["put"].url


@pytest.mark.parametrize("settled", [0, 3])
def test_pending_operations_do_not_go_to_another_place(tmp_path: Path, settled: int) -> None:
    fill(tmp_path, wb.LmdbBackend(tmp_path / "a"), settled=settled)
    with pytest.raises(wb.ConfigError) as refused:
        reopen(tmp_path, wb.LmdbBackend(tmp_path / "b"))
    text = str(refused.value)
    assert (
        f"lane 'put' has {COUNT} pending operations for lmdb://{tmp_path}/a, and is opened with lmdb://{tmp_path}/b"
        in text
    )
    assert f"walbatch recover {tmp_path}/store --lane put=lmdb://{tmp_path}/a" in text
    assert f"Lane(..., moved_from='lmdb://{tmp_path}/a')" in text
    assert (pending(tmp_path), url(tmp_path)) == (COUNT, f"lmdb://{tmp_path}/a"), "nothing was changed"


def test_the_command_that_it_names_delivers_to_the_old_place_and_then_the_new_one_is_welcome(
    tmp_path: Path,
) -> None:
    fill(tmp_path, wb.LmdbBackend(tmp_path / "a"))
    with pytest.raises(wb.ConfigError) as refused:
        reopen(tmp_path, wb.LmdbBackend(tmp_path / "b"))
    command = str(refused.value).partition("Deliver them there first: walbatch ")[2].partition(";")[0]
    ended = walbatch(*command.split(), cwd=tmp_path)
    assert ended.code == 0, ended.error
    assert wb.LmdbBackend(tmp_path / "a").count() == COUNT
    reopen(tmp_path, wb.LmdbBackend(tmp_path / "b"))
    assert url(tmp_path) == f"lmdb://{tmp_path}/b"
    with pytest.raises(wb.ConfigError, match=r"nothing was ever applied|holds no data"):
        wb.LmdbBackend(tmp_path / "c").count()


def test_moved_from_lets_them_go_to_the_new_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = f"lmdb://{tmp_path}/a"
    fill(tmp_path, wb.LmdbBackend(tmp_path / "a"))
    with pytest.raises(
        wb.ConfigError, match="moved_from is 'lmdb:///elsewhere', which is not what is remembered"
    ):
        reopen(tmp_path, wb.LmdbBackend(tmp_path / "b"), moved_from="lmdb:///elsewhere")
    with caplog.at_level(logging.WARNING, "walbatch"):
        reopen(tmp_path, wb.LmdbBackend(tmp_path / "b"), moved_from=old)
    assert "as moved_from says" in caplog.text
    assert wb.LmdbBackend(tmp_path / "b").count() == COUNT
    fill(tmp_path, wb.LmdbBackend(tmp_path / "b"), moved_from=old)
    with pytest.raises(wb.ConfigError, match=r"has 6 pending operations for lmdb://.*/b"):
        reopen(tmp_path, wb.LmdbBackend(tmp_path / "c"), moved_from=old)


def test_the_same_data_under_another_address_is_told_by_its_marks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, wb.LmdbBackend(tmp_path / "a"), settled=3)
    shutil.move(tmp_path / "a", tmp_path / "b")
    with caplog.at_level(logging.WARNING, "walbatch"):
        reopen(tmp_path, wb.LmdbBackend(tmp_path / "b"))
    assert "counts as the same data" in caplog.text
    assert wb.LmdbBackend(tmp_path / "b").count() == COUNT + 3
    caplog.clear()
    fill(tmp_path, wb.LmdbBackend(tmp_path / "b"), start=10)
    reopen(tmp_path, wb.LmdbBackend(tmp_path / "b"))
    assert not caplog.text, "the same URL is no move"


def test_a_place_that_was_left_for_another_is_not_the_same_data(tmp_path: Path) -> None:
    fill(tmp_path, wb.LmdbBackend(tmp_path / "a"), settled=3)
    reopen(tmp_path, wb.LmdbBackend(tmp_path / "a"))
    fill(tmp_path, wb.LmdbBackend(tmp_path / "b"), settled=3, start=10)
    with pytest.raises(wb.ConfigError, match="whose marks of this store lack operations that are settled"):
        reopen(tmp_path, wb.LmdbBackend(tmp_path / "a"))
    assert pending(tmp_path) == COUNT
    reopen(tmp_path, wb.LmdbBackend(tmp_path / "a"), moved_from=f"lmdb://{tmp_path}/b")
    assert pending(tmp_path) == 0


def writing(path: Path) -> wb.LmdbBackend:
    """A backend without a URL."""

    def write(txn: Any, operation: wb.Operation) -> None:
        txn.put(operation.key, operation.payload)

    return wb.LmdbBackend(path, write=write)


def test_a_place_without_a_url_that_lacks_what_is_settled_is_spoken_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, writing(tmp_path / "a"), settled=3)
    assert not caplog.text
    reopen(tmp_path, writing(tmp_path / "b"))
    assert "whose marks of this store lack operations that are settled" in caplog.text
    assert pending(tmp_path) == 0


def test_the_place_of_before_is_not_taken_for_another_for_what_other_lanes_and_cancelling_settled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def lanes() -> dict[str, wb.Lane]:
        return {"put": wb.Lane(writing(tmp_path / "a")), "log": wb.Lane(writing(tmp_path / "log"))}

    with wb.Engine.open(tmp_path / "store", lanes()) as engine:
        engine.submit_many("put", [(b"done", b"")])
        engine.flush("put", timeout=30)
        engine.pause("put")
        last = engine.submit("put", key=b"last", payload=b"")
        assert last.lsn is not None
        assert engine.cancel(last.lsn)
        engine.submit_many("log", [(b"%d" % n, b"") for n in range(5)])
        engine.flush("log", timeout=30)
        engine.submit_many("put", [(b"%d" % n, b"") for n in range(COUNT)])
        engine.close(drain=False)
    for _ in range(2):
        with wb.Engine.open(tmp_path / "store", lanes()) as engine:
            engine.flush("put", timeout=30)
    assert not caplog.text
    assert pending(tmp_path) == 0


def test_another_kind_of_place_is_another_place(tmp_path: Path) -> None:
    fill(tmp_path, wb.LmdbBackend(tmp_path / "a"), settled=3)
    for backend in (wb.JsonLinesBackend(tmp_path / "out"), wb.SqliteBackend(tmp_path / "app.db", "pages")):
        with pytest.raises(wb.ConfigError, match="holds no mark of this store"):
            reopen(tmp_path, backend)
    with pytest.raises(wb.ConfigError, match="a backend without a URL"):
        reopen(tmp_path, wb.LmdbBackend(tmp_path / "b", write=lambda txn, operation: None))
    assert pending(tmp_path) == COUNT


def test_a_database_may_be_written_by_a_function_from_now_on(tmp_path: Path) -> None:
    fill(tmp_path, wb.SqliteBackend(tmp_path / "app.db", "pages"), settled=3)

    def write(cursor: Any, operation: wb.Operation) -> None:
        cursor.execute("INSERT INTO pages VALUES (?, ?)", (operation.key, operation.payload))

    reopen(tmp_path, wb.SqliteBackend(tmp_path / "app.db", write=write))
    assert pending(tmp_path) == 0


def test_a_function_promises_no_more_than_before_and_is_only_spoken_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, wb.LmdbBackend(tmp_path / "a"), settled=3)
    seen: list[bytes] = []

    def deliver(batch: Batch) -> None:
        seen.extend(batch.keys)

    with caplog.at_level(logging.WARNING, "walbatch"):
        reopen(tmp_path, deliver)
    assert "is now to a backend without a URL, at least once" in caplog.text
    assert len(seen) == COUNT
    caplog.clear()
    fill(tmp_path, deliver)
    reopen(tmp_path, seen.append)
    reopen(tmp_path, wb.LmdbBackend(tmp_path / "b"))
    assert not caplog.text, "a function has no place that could be remembered"


def test_a_lane_that_is_held_keeps_the_place_that_it_had(tmp_path: Path) -> None:
    fill(tmp_path, wb.LmdbBackend(tmp_path / "a"))
    with wb.Engine.open(tmp_path / "store", {"put": wb.Lane()}):
        pass
    assert url(tmp_path) == f"lmdb://{tmp_path}/a"
    with pytest.raises(wb.ConfigError, match="moved_from"):
        reopen(tmp_path, wb.LmdbBackend(tmp_path / "b"))


def test_only_the_lane_s_own_operations_count(tmp_path: Path) -> None:
    lanes = {"put": wb.Lane(wb.LmdbBackend(tmp_path / "a")), "log": wb.Lane()}
    with wb.Engine.open(tmp_path / "store", lanes) as engine:
        lsns = engine.submit_many("put", [(b"%d" % n, b"") for n in range(3)])
        engine.submit_many("log", [(b"%d" % n, b"") for n in range(5)])
        engine.flush("put", timeout=30)
        engine.pause("put")
        last = engine.submit("put", key=b"last", payload=b"")
        assert last.lsn is not None
        assert engine.cancel(last.lsn)
        assert lsns
        engine.close(drain=False)
    assert pending(tmp_path) == 5
    lanes = {"put": wb.Lane(wb.LmdbBackend(tmp_path / "b")), "log": wb.Lane()}
    with wb.Engine.open(tmp_path / "store", lanes):
        pass
    assert url(tmp_path) == f"lmdb://{tmp_path}/b"


def test_every_lane_that_must_not_move_is_named(tmp_path: Path) -> None:
    names = ("put", "log")
    with wb.Engine.open(tmp_path / "s", {n: wb.Lane(wb.LmdbBackend(tmp_path / n)) for n in names}) as engine:
        for name in names:
            engine.pause(name)
            engine.submit(name, key=b"k", payload=b"")
        engine.close(drain=False)
    with pytest.raises(wb.ConfigError) as refused:
        wb.Engine.open(tmp_path / "s", {n: wb.Lane(wb.LmdbBackend(tmp_path / f"{n}2")) for n in names})
    assert len(refused.value.problems) == 2


def test_a_password_in_moved_from_makes_no_difference(tmp_path: Path) -> None:
    class Database:
        """Transactional, at an address with a password, and empty."""

        def __init__(self, url: str) -> None:
            self.url = url

        def apply(self, batch: Batch) -> None:
            pass

        def applied_mark(self, shard: int) -> wb.Mark:
            return wb.Mark()

    fill(tmp_path, Database("postgresql://app:old@a/app?table=t"))
    assert url(tmp_path) == "postgresql://app@a/app?table=t"
    with pytest.raises(wb.ConfigError) as refused:
        reopen(tmp_path, Database("postgresql://app:new@b/app?table=t"))
    assert "new" not in str(refused.value).replace("new place", "")
    reopen(tmp_path, Database("postgresql://app:other@a/app?table=t"))
    fill(tmp_path, Database("postgresql://app:old@a/app?table=t"))
    reopen(
        tmp_path, Database("postgresql://app@b/app?table=t"), moved_from="postgresql://app:old@a/app?table=t"
    )


KILLED_AT_THE_FIRST_BATCH = """
import os, signal, sys
import walbatch as wb

class Database(wb.LmdbBackend):
    def apply(self, batch):
        super().apply(batch)
        os.kill(os.getpid(), signal.SIGKILL)

path = sys.argv[1]
lane = wb.Lane(Database(f"{path}/b"), moved_from=f"lmdb://{path}/a")
with wb.Engine.open(f"{path}/store", {"put": lane}) as engine:
    engine.flush()
"""


def test_the_new_place_is_remembered_before_the_first_batch_goes_there(tmp_path: Path) -> None:
    fill(tmp_path, wb.LmdbBackend(tmp_path / "a"))
    ended = subprocess.run([sys.executable, "-c", KILLED_AT_THE_FIRST_BATCH, str(tmp_path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert wb.LmdbBackend(tmp_path / "b").count() > 0
    assert url(tmp_path) == f"lmdb://{tmp_path}/b"
    with pytest.raises(wb.ConfigError, match="holds no mark"):
        reopen(tmp_path, wb.LmdbBackend(tmp_path / "a"), moved_from=f"lmdb://{tmp_path}/a")
    reopen(tmp_path, wb.LmdbBackend(tmp_path / "b"))
    assert wb.LmdbBackend(tmp_path / "b").count() == COUNT


def test_the_number_of_shards_never_changes(tmp_path: Path) -> None:
    fill(tmp_path, wb.LmdbBackend(tmp_path / "a"), shards=4)
    for shards in (1, 8):
        with pytest.raises(
            wb.ConfigError, match="Open it with 4, or deliver what is pending and use a new lane name"
        ):
            reopen(tmp_path, wb.LmdbBackend(tmp_path / "a"), shards=shards)
    assert pending(tmp_path) == COUNT
    reopen(tmp_path, wb.LmdbBackend(tmp_path / "a"), shards=4)
    with wb.Engine.open(
        tmp_path / "store",
        {
            "put": wb.Lane(wb.LmdbBackend(tmp_path / "a"), shards=4),
            "put8": wb.Lane(wb.LmdbBackend(tmp_path / "b"), shards=8),
        },
    ) as engine:
        engine.submit("put8", key=b"k", payload=b"").result(timeout=30)


# --- on the command line ------------------------------------------------------------------------------------------


def test_who_names_another_place_on_the_command_line_means_it(tmp_path: Path) -> None:
    fill(tmp_path, wb.LmdbBackend(tmp_path / "a"), settled=3)
    there = f"lmdb://{tmp_path}/b"
    dry = walbatch("recover", "store", "--lane", f"put={there}", "--dry-run", cwd=tmp_path)
    assert f"lane put: would go to {there} from now on" in dry.output
    assert url(tmp_path) == f"lmdb://{tmp_path}/a"
    ended = walbatch("recover", "store", "--lane", f"put={there}", cwd=tmp_path)
    assert ended.code == 0, ended.error
    assert f"lane put: goes to {there} from now on; unless that is the same data" in ended.output
    assert wb.LmdbBackend(tmp_path / "b").count() == COUNT
    assert url(tmp_path) == there


def test_naming_the_place_that_is_remembered_says_nothing(tmp_path: Path) -> None:
    fill(tmp_path, wb.LmdbBackend(tmp_path / "a"))
    ended = walbatch("recover", "store", "--to", f"lmdb:{tmp_path}/a", cwd=tmp_path)
    assert ended.code == 0, ended.error
    assert "from now on" not in ended.output
