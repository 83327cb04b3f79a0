"""PostgreSQL that is locked, full, restarted, or closed to us, under a working engine.

Nothing is lost, done twice, or blamed on an operation, and all goes on by itself when the cause is gone.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

psycopg = pytest.importorskip(
    "psycopg", reason="PostgresBackend needs psycopg: pip install 'walbatch[postgres]'"
)

import walbatch as wb  # noqa: E402 - what needs psycopg
from tests.backends.servers import COUNTED, database, needed, own_server, shared_server  # noqa: E402
from tests.support import wait_until  # noqa: E402
from tools.postgres import Server, server  # noqa: E402

__all__ = ["own_server", "shared_server"]

DEADLINE_S: Final = 60.0

# One attempt: whatever is blamed on an operation makes it a dead letter at once.
RETRY: Final = wb.RetryPolicy(attempts=1, base_s=0.01, ceiling_s=0.1, breaker_s=0.05, breaker_s_max=0.2)


def eventually(what: Callable[[], bool]) -> None:
    wait_until(what, what="it becomes true", seconds=DEADLINE_S)


def run(conninfo: str, *statements: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(conninfo) as connection:
        rows: list[tuple[Any, ...]] = []
        for statement in statements:
            cursor = connection.execute(statement.encode())
            rows = cursor.fetchall() if cursor.description else []
        return rows


@contextlib.contextmanager
def opened(path: Path, backend: wb.Backend, timeout_s: float = 2.0) -> Iterator[wb.Engine]:
    lane = wb.Lane(backend, shards=2, retry=RETRY, timeout_s=timeout_s)
    with wb.Engine.open(path / "store", {"pages": lane}) as engine:
        yield engine


def pairs(first: int, count: int, payload: bytes = b"good") -> list[tuple[bytes, bytes]]:
    return [(b"%d" % number, payload) for number in range(first, first + count)]


def check(engine: wb.Engine, conninfo: str, keys: set[bytes]) -> None:
    """All of them took effect once, nothing else did, and nothing is dead."""
    engine.flush(timeout=DEADLINE_S)
    assert engine.dead_letters() == []
    effects: dict[bytes, int] = dict(run(conninfo, "SELECT key, count FROM effects"))
    assert effects.keys() == keys
    assert set(effects.values()) == {1}


# --- locks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", ["before the batch", "in the middle of it"])
def test_a_table_that_somebody_locks_makes_batches_wait_and_costs_no_operation_an_attempt(
    shared_server: Server, tmp_path: Path, begun: str
) -> None:
    conninfo = shared_server.conninfo(database(shared_server, tmp_path))
    run(conninfo, *COUNTED)
    with psycopg.connect(conninfo) as other:
        is_locked = False

        def write(cursor: Any, operation: wb.Operation) -> None:
            nonlocal is_locked
            cursor.execute("SELECT 1")
            if not is_locked and operation.key == b"14":
                is_locked = True
                other.execute("LOCK TABLE pages")
            cursor.execute("INSERT INTO pages VALUES (%s, %s)", (operation.key, operation.payload))

        is_before = begun == "before the batch"
        backend = (
            wb.PostgresBackend(conninfo, "pages") if is_before else wb.PostgresBackend(conninfo, write=write)
        )
        with opened(tmp_path, backend, timeout_s=0.5) as engine:
            engine.submit_many("pages", pairs(0, 10))
            engine.flush(timeout=DEADLINE_S)
            if is_before:
                other.execute("LOCK TABLE pages")
            engine.submit_many("pages", pairs(10, 10))
            eventually(lambda: engine.stats().lanes["pages"].failed_batches >= 3)
            assert "lock timeout" in str(engine.stats().lanes["pages"].last_error)
            assert engine.dead_letters() == []
            other.rollback()
            check(engine, conninfo, {key for key, _ in pairs(0, 20)})


# --- a full disk ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_server() -> Iterator[Server]:
    """A server whose folder is a disk of its own, of 96 MiB."""
    needed()
    folder = Path(tempfile.mkdtemp(prefix="walbatch-small-", dir="/tmp"))
    command = ["mount", "-t", "tmpfs", "-o", "size=96m,mode=755", "tmpfs", str(folder)]
    try:
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("only root can mount a small disk for the server")
        try:
            with server(folder, max_wal_size="'16MB'", min_wal_size="'8MB'") as running:
                yield running
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)
    finally:
        folder.rmdir()


def fill(path: Path, left_bytes: int) -> None:
    """Take all room of a disk but so much."""
    with path.open("wb", buffering=0) as filler:
        with contextlib.suppress(OSError):
            while filler.write(bytes(1 << 16)):
                pass
        filler.truncate(max(0, filler.tell() - left_bytes))


def fill_log(connection: Any) -> None:
    """Write so much into the server's log that there is no room for it either: then the whole server goes down."""
    for _ in range(200):
        connection.execute("SELECT pg_logical_emit_message(false, 'walbatch', repeat('x', 1000000))")


@pytest.mark.parametrize("left_bytes", [0, 1 << 20], ids=["at once", "in the middle of batches"])
def test_a_server_whose_disk_is_full_loses_nothing_and_goes_on_when_there_is_room(
    small_server: Server, tmp_path: Path, left_bytes: int
) -> None:
    conninfo, filler = small_server.conninfo(), small_server.folder / "filler"
    run(conninfo, *COUNTED)
    payload = bytes(range(256)) * 8
    with opened(tmp_path, wb.PostgresBackend(conninfo, "pages")) as engine:
        stats = engine.stats
        engine.submit_many("pages", pairs(0, 100, payload))
        engine.flush(timeout=DEADLINE_S)
        fill(filler, left_bytes)
        submitted = 100
        while stats().lanes["pages"].failed_batches < 5:
            assert submitted < 50_000, "the disk is not full"
            engine.submit_many("pages", pairs(submitted, 100, payload))
            submitted += 100
            eventually(lambda: stats().pending < 1_000 or stats().lanes["pages"].failed_batches >= 5)
        assert "No space left on device (SQLSTATE 53100)" in str(stats().lanes["pages"].last_error)
        assert stats().pending
        filler.unlink()
        check(engine, conninfo, {key for key, _ in pairs(0, submitted)})


def test_a_server_that_dies_of_its_full_disk_is_waited_for(small_server: Server, tmp_path: Path) -> None:
    conninfo, filler = small_server.conninfo(), small_server.folder / "filler"
    run(conninfo, *COUNTED)
    with opened(tmp_path, wb.PostgresBackend(conninfo, "pages")) as engine:
        engine.submit_many("pages", pairs(0, 100))
        engine.flush(timeout=DEADLINE_S)
        fill(filler, 0)
        engine.submit_many("pages", pairs(100, 100, bytes(2_000)))
        with (
            psycopg.connect(conninfo) as other,
            pytest.raises(psycopg.OperationalError, match=r"No space|closed"),
        ):
            fill_log(other)
        failed = engine.stats().lanes["pages"].failed_batches
        eventually(lambda: engine.stats().lanes["pages"].failed_batches > failed + 3)
        filler.unlink()
        if not small_server.is_alive:
            small_server.stop()
            small_server.start()
        check(engine, conninfo, {key for key, _ in pairs(0, 200)})


# --- servers that go, and come back -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ending", [signal.SIGINT, signal.SIGQUIT, signal.SIGKILL], ids=lambda ending: ending.name
)
def test_a_server_that_is_restarted_is_waited_for(
    own_server: Server, tmp_path: Path, ending: signal.Signals
) -> None:
    conninfo = own_server.conninfo()
    run(conninfo, *COUNTED)
    with opened(tmp_path, wb.PostgresBackend(conninfo, "pages")) as engine:
        for first in range(0, 300, 3):
            engine.submit_many("pages", pairs(first, 3))
            if first == 150:
                own_server.stop(ending)
        eventually(lambda: engine.stats().lanes["pages"].failed_batches >= 3)
        own_server.start()
        check(engine, conninfo, {key for key, _ in pairs(0, 300)})


def test_a_row_that_breaks_a_constraint_is_dead_alone_with_the_databases_message(
    shared_server: Server, tmp_path: Path
) -> None:
    conninfo = shared_server.conninfo(database(shared_server, tmp_path))
    run(conninfo, *COUNTED)
    with opened(tmp_path, wb.PostgresBackend(conninfo, "pages")) as engine:
        lsns = []
        for first in range(0, 300, 100):
            group = pairs(first, 100)
            group[50] = (group[50][0], b"bad")
            lsns.append(engine.submit_many("pages", group)[50])
            engine.flush(timeout=DEADLINE_S)
        letters = engine.dead_letters()
        assert [letter.lsn for letter in letters] == lsns
        for letter in letters:
            assert letter.reason == wb.DeathReason.REJECTED
            assert letter.payload == b"bad"
            assert letter.error.startswith('new row for relation "pages" violates check constraint "is_good"')
            assert letter.error.endswith("(SQLSTATE 23514)")
    effects = dict(run(conninfo, "SELECT key, count FROM effects"))
    assert effects == {key: 1 for key, _ in pairs(0, 300) if int(key) % 100 != 50}


# --- a standby that is not there ------------------------------------------------------------------------------------


def require_standby(connection: Any, name: str) -> None:
    """Let commits wait for a standby of this name; with none, let them go."""
    connection.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{name}'".encode())
    connection.execute("SELECT pg_reload_conf()")
    eventually(lambda: connection.execute("SHOW synchronous_standby_names").fetchone() == (name,))


@pytest.mark.parametrize("kind", ["rows", "rows and deletes", "write"])
def test_a_commit_that_waits_for_a_standby_is_given_up_in_time_and_takes_effect_once(
    own_server: Server, tmp_path: Path, kind: str
) -> None:
    conninfo = own_server.conninfo()
    run(conninfo, *COUNTED)

    def write(cursor: Any, operation: wb.Operation) -> None:
        cursor.execute("INSERT INTO pages VALUES (%s, %s)", (operation.key, operation.payload))

    table = wb.Table("pages", empty_deletes=kind != "rows")
    options: dict[str, Any] = {"write": write} if kind == "write" else {"table": table}
    backend = wb.PostgresBackend(conninfo, **options)
    last = [(b"absent", b"")] if kind == "rows and deletes" else []
    with opened(tmp_path, backend, timeout_s=1.0) as engine:
        engine.submit_many("pages", pairs(0, 10))
        engine.flush(timeout=DEADLINE_S)
        with psycopg.connect(conninfo, autocommit=True) as other:
            other.execute("SET synchronous_commit = local")
            require_standby(other, "nobody")
            started = time.monotonic()
            second = wb.PostgresBackend(conninfo, **options)
            with (
                pytest.raises(wb.StorageError, match="standby"),
                opened(tmp_path / "second", second, timeout_s=1.0),
            ):
                pass
            assert time.monotonic() - started < 10.0
            engine.submit_many("pages", pairs(10, 10) + last)
            eventually(lambda: engine.stats().lanes["pages"].failed_batches >= 3)
            (sessions,) = other.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'walbatch'"
            ).fetchall()
            assert sessions[0] <= 8, "sessions pile up"
            require_standby(other, "")
        check(engine, conninfo, {key for key, _ in pairs(0, 20)})


# --- passwords --------------------------------------------------------------------------------------------------------


def test_a_password_that_is_wrong_stops_the_shard_loses_nothing_and_is_never_shown(
    own_server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(own_server.conninfo(), *COUNTED, "CREATE ROLE app LOGIN SUPERUSER PASSWORD 'hunter2'")
    (own_server.folder / "data" / "pg_hba.conf").write_text(
        "local all postgres trust\nlocal all all scram-sha-256\n"
    )
    run(own_server.conninfo(), "SELECT pg_reload_conf()")
    with pytest.raises(wb.ConfigError, match="PGPASSWORD") as caught:
        wb.PostgresBackend(
            f"host={own_server.folder} user=app password=swordfish dbname=postgres", "pages"
        ).open("pages", 1, b"sixteen bytes...")
    assert "swordfish" not in str(caught.value)
    backend = wb.PostgresBackend(
        f"host={own_server.folder} user=app password=hunter2 dbname=postgres", "pages"
    )
    with opened(tmp_path, backend) as engine:
        engine.submit_many("pages", pairs(0, 10))
        engine.flush(timeout=DEADLINE_S)
        run(
            own_server.conninfo(), "ALTER ROLE app PASSWORD 'changed'",
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE usename = 'app'",
        )  # fmt: skip
        engine.submit_many("pages", pairs(10, 10))
        eventually(lambda: "password authentication failed" in str(engine.stats().lanes["pages"].last_error))
        with pytest.raises(wb.BackendError) as broken:
            engine.flush(timeout=DEADLINE_S)
        told = f"{broken.value} {engine.stats()} {engine.health()} {backend!r} {caplog.text}"
        assert "PGPASSWORD" in told
        assert "hunter2" not in told
        run(own_server.conninfo(), "ALTER ROLE app PASSWORD 'hunter2'")
        engine.resume("pages")
        check(engine, own_server.conninfo(), {key for key, _ in pairs(0, 20)})
