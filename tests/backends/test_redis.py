"""Redis as a backend, on real servers: exactly once in effect, whatever becomes of connections, servers and commands."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

redis = pytest.importorskip("redis", reason="RedisBackend needs redis-py: pip install 'walbatch[redis]'")

import walbatch as wb  # noqa: E402 - what needs redis
from tests.backends.proxy import Loss, Proxy  # noqa: E402
from tools.redis_server import NoRedisError, RedisServer, free_port, needed, server  # noqa: E402
from walbatch.backends import open_backend, strip_password, url_of  # noqa: E402
from walbatch.backends.redis import RedisBackend, RedisKeys, script  # noqa: E402
from walbatch.backends.redis.backend import Held  # noqa: E402
from walbatch.backends.redis.connections import LOOK_EVERY_S  # noqa: E402
from walbatch.backends.redis.persistence import SETTINGS, shortcomings, why_not_in_force  # noqa: E402
from walbatch.core.mark import encode_mark  # noqa: E402
from walbatch.errors import (  # noqa: E402
    BackendBroken,
    BatchTooLarge,
    ConfigError,
    CorruptionError,
    EngineClosed,
    Fenced,
    RetryBatch,
    StorageError,
    Throttled,
)
from walbatch.testing.contracts import STORE, Pair, TransactionalBackendContract  # noqa: E402
from walbatch.types import Applied, Batch, Failures, Mark, Operation, Rejected  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 60
DATABASES = 1_000
NUMBERS: dict[str, int] = {}
"""The databases that belong to the folders of tests."""

MARK_KEY = f"walbatch:mark:{STORE.hex()}:put:0"


@pytest.fixture(scope="session")
def shared_redis() -> Iterator[RedisServer]:
    """A server for all tests of a session, with a database for each of them."""
    try:
        needed()
    except NoRedisError as error:
        pytest.skip(str(error))
    with server(databases=str(DATABASES)) as running:
        yield running


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A server that a test may kill."""
    try:
        needed()
    except NoRedisError as error:
        pytest.skip(str(error))
    with server() as running:
        yield running


def raw(running: RedisServer, database: int = 0) -> Any:
    return redis.Redis(unix_socket_path=str(running.socket), db=database)


class RedisSuite(TransactionalBackendContract):
    @pytest.fixture(autouse=True)
    def _on(self, shared_redis: RedisServer) -> None:
        self.server = shared_redis

    def database(self, path: Path) -> int:
        """The number of the database that belongs to a folder."""
        return NUMBERS.setdefault(str(path), len(NUMBERS) + 1)

    def make(self, path: Path, keys: Any = None, **options: Any) -> RedisBackend:
        return RedisBackend(self.server.url(database=self.database(path)), keys, **options)

    def raw(self, path: Path) -> Any:
        return raw(self.server, self.database(path))

    @contextlib.contextmanager
    def with_keys(self, path: Path, keys: Any = None, **options: Any) -> Iterator[RedisBackend]:
        backend = self.make(path, keys, **options)
        backend.open(self.lane, self.shards, STORE)
        try:
            yield backend
        finally:
            backend.close()


def count(pipeline: Any, operation: Operation) -> None:
    """A write that shows every repetition."""
    pipeline.hincrby("counts", operation.key, 1)


def again_and_again(call: Callable[[], object], *, until: Callable[[], bool]) -> None:
    while not until():
        call()


class TestStrings(RedisSuite):
    prefix = b"page:"

    def make_backend(self, path: Path) -> Any:
        return self.make(path, RedisKeys(self.prefix))

    def content(self, path: Path) -> Iterable[Pair]:
        client = self.raw(path)
        keys = [key for key in client.scan_iter(count=10_000) if not key.startswith(b"walbatch:")]
        return [(key.removeprefix(self.prefix), client.get(key)) for key in keys]


class TestLists(RedisSuite):
    """Every operation adds: what took effect twice would be seen."""

    replaces = False
    kills = 10

    def make_backend(self, path: Path) -> Any:
        return self.make(path, RedisKeys("list:", type="list"))

    def content(self, path: Path) -> Iterable[Pair]:
        client = self.raw(path)
        return [
            (key.removeprefix(b"list:"), value)
            for key in client.scan_iter("list:*", count=10_000)
            for value in client.lrange(key, 0, -1)
        ]


class TestWrite(RedisSuite):
    """The same with a function, which also counts."""

    replaces = False
    kills = 10

    @staticmethod
    def write(pipeline: Any, operation: Operation) -> None:
        pipeline.xadd(b"all", {"key": operation.key, "payload": operation.payload})
        pipeline.incr("total")

    def make_backend(self, path: Path) -> Any:
        return self.make(path, write=self.write)

    def content(self, path: Path) -> Iterable[Pair]:
        client = self.raw(path)
        found = [(fields[b"key"], fields[b"payload"]) for _, fields in client.xrange("all")]
        assert int(client.get("total") or 0) == len(found)
        return found


class TestRedis(RedisSuite):
    def make_backend(self, path: Path) -> Any:
        return self.make(path, RedisKeys("", empty_deletes=False))

    def content(self, path: Path) -> Iterable[Pair]:
        client = self.raw(path)
        return [(key, client.get(key)) for key in client.scan_iter(count=10_000) if not key.startswith(b"walbatch:")]  # fmt: skip

    # --- keys -----------------------------------------------------------------------------------------------------

    def test_a_json_object_sets_fields_of_a_hash_and_null_removes_them(self, tmp_path: Path) -> None:
        with self.with_keys(tmp_path, RedisKeys("user:", type="hash")) as backend:
            first = b'{"name": "Ann", "age": 7, "tags": ["a"], "is_new": true, "email": "a@x"}'
            self.apply(backend, self.batch([(b"1", first), (b"2", b'{"name": "Bo"}'), (b"3", b"{}")]))
            self.apply(
                backend, self.batch([(b"1", b'{"email": null, "age": 8.5}'), (b"2", b"")], first_lsn=4)
            )
        client = self.raw(tmp_path)
        assert client.hgetall("user:1") == {
            b"name": b"Ann", b"age": b"8.5", b"tags": b'["a"]', b"is_new": b"true",
        }  # fmt: skip
        assert not client.exists("user:2", "user:3")

    def test_an_empty_payload_deletes_a_string_only_where_that_was_asked_for(self, tmp_path: Path) -> None:
        for number, (wanted, left) in enumerate([(False, {b"a": b""}), (True, {})]):
            with self.with_keys(tmp_path, RedisKeys("", empty_deletes=wanted)) as backend:
                self.apply(backend, self.batch([(b"a", b"1"), (b"a", b"")], first_lsn=1 + 2 * number))
            assert dict(self.content(tmp_path)) == left

    @pytest.mark.parametrize("kind", ["list", "stream"])
    def test_a_bound_keeps_the_newest(self, tmp_path: Path, kind: str) -> None:
        with self.with_keys(tmp_path, RedisKeys("", type=kind, length_max=3)) as backend:
            self.apply(backend, self.batch([(b"k", b"%d" % number) for number in range(2_000)]))
        client = self.raw(tmp_path)
        if kind == "list":
            assert client.lrange("k", 0, -1) == [b"1997", b"1998", b"1999"]
        else:
            found = [fields[b"payload"] for _, fields in client.xrange("k")]
            assert 3 <= len(found) < 500, "about so many: whole nodes of the stream are dropped"
            assert found[-3:] == [b"1997", b"1998", b"1999"]

    def test_what_cannot_be_read_is_rejected_by_itself(self, tmp_path: Path) -> None:
        bad = [b"[1]", b"{", b"\xff", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"[" * 100_000, b'{"a": "\\ud800"}']
        with self.with_keys(tmp_path, RedisKeys("", type="hash")) as backend:
            batch = self.batch([*((b"k", payload) for payload in bad), (b"good", b'{"a": 1}')])
            answer = backend.apply(batch)
            assert isinstance(answer, Failures)
            assert sorted(answer.outcomes) == [*range(len(bad))]
            assert backend.applied_mark(0) == Mark(epoch=1, ranges=((8, 8),))
        assert self.raw(tmp_path).hgetall("good") == {b"a": b"1"}

    def test_no_operation_reaches_the_marks(self, tmp_path: Path) -> None:
        with self.with_keys(tmp_path) as backend:
            answer = backend.apply(self.batch([(MARK_KEY.encode(), b"x"), (b"k", b"v")]))
            assert isinstance(answer, Failures)
            assert "backend's own" in str(answer.outcomes[0])
            assert backend.applied_mark(0) == Mark(epoch=1, ranges=((2, 2),))
        with pytest.raises(ConfigError, match="must not begin"):
            RedisKeys("walbatch:mark:")

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"type": "set"}, "must be one of"),
            ({"type": "list", "empty_deletes": True}, "only added to"),
            ({"length_max": 3}, "for list and stream"),
            ({"type": "list", "length_max": 0}, "a number from 1"),
            ({"prefix": 7}, "text or bytes"),
        ],
    )
    def test_keys_that_make_no_sense_are_refused(self, options: dict[str, Any], says: str) -> None:
        with pytest.raises(ConfigError, match=says):
            RedisKeys(**options)

    # --- what is refused ------------------------------------------------------------------------------------------

    def test_of_a_batch_only_what_redis_refuses_is_rejected_with_its_own_message(
        self, tmp_path: Path
    ) -> None:
        client = self.raw(tmp_path)
        client.set("bad", "a string")
        pairs = [(b"good", b"1"), (b"bad", b"2"), (b"good", b"3"), (b"bad", b"4"), (b"last", b"5")]
        with self.with_keys(tmp_path, RedisKeys("", type="list")) as backend:
            answer = backend.apply(self.batch(pairs))
            assert isinstance(answer, Failures)
            assert sorted(answer.outcomes) == [1, 3]
            assert all("WRONGTYPE" in str(outcome) for outcome in answer.outcomes.values())
            assert backend.apply(self.batch(pairs)) == answer, "it comes again, and is refused again"
            assert backend.applied_mark(0) == Mark(epoch=1, ranges=((1, 1), (3, 3), (5, 5)))
            assert backend.apply(self.batch(pairs)) == answer
        with self.with_keys(tmp_path, RedisKeys("", type="list")) as backend:
            assert backend.applied_mark(0) == Mark(epoch=1, ranges=((1, 1), (3, 3), (5, 5)))
            backend.apply(self.batch([(b"good", b"6")], first_lsn=6, mark=Mark(epoch=1, watermark=6)))
            assert backend.applied_mark(0) == Mark(epoch=1, watermark=6), (
                "the engine has kept it as a dead letter"
            )
        assert client.hget(MARK_KEY, "out") is None
        assert client.lrange("good", 0, -1) == [b"1", b"3", b"6"]

    def test_any_operations_are_refused_and_all_others_applied(self, tmp_path: Path) -> None:
        client, first = self.raw(tmp_path), 1
        with self.with_keys(tmp_path, RedisKeys("", type="list")) as backend:
            for bad in (set(), {0}, {15}, {7, 8}, {*range(0, 16, 2)}, {*range(16)}):
                names = [b"%d" % (first + place) for place in range(16)]
                for place in bad:
                    client.set(names[place], "taken")
                answer = backend.apply(self.batch([(name, b"x") for name in names], first_lsn=first))
                assert set(answer.outcomes if isinstance(answer, Failures) else ()) == bad
                found = {place for place, name in enumerate(names) if client.type(name) == b"list"}
                assert found == {*range(16)} - bad
                mark = backend.applied_mark(0)
                assert {place for place in range(16) if mark.covers(first + place)} == found
                first += 16

    def test_of_an_operation_with_several_commands_the_first_error_is_the_last_command(
        self, tmp_path: Path
    ) -> None:
        self.raw(tmp_path).set("bad", "a string")

        def write(pipeline: Any, operation: Operation) -> None:
            pipeline.incr("before")
            pipeline.lpush(operation.key, operation.payload)
            pipeline.incr("after")

        with self.with_keys(tmp_path, write=write) as backend:
            answer = backend.apply(self.batch([(b"a", b"x"), (b"bad", b"x"), (b"b", b"x")]))
        assert isinstance(answer, list)
        assert [answer[0], answer[2]] == [Applied([1, 1, 1]), Applied([3, 1, 2])]
        assert isinstance(answer[1], Rejected)
        assert "WRONGTYPE" in answer[1].error

    def test_a_permission_that_is_missing_in_the_middle_stops_the_shard_and_nothing_is_applied_twice(
        self, tmp_path: Path
    ) -> None:
        admin, name = self.raw(tmp_path), f"user{self.database(tmp_path)}"
        admin.execute_command("ACL", "SETUSER", name, "on", "nopass", "+@all", "~walbatch:*", "~a:ok*")
        url = self.server.url("persistence=any", database=self.database(tmp_path)).replace(
            "unix://", f"unix://{name}@"
        )
        pairs = [(b"ok1", b"1"), (b"secret", b"2"), (b"ok1", b"3"), (b"ok2", b"4")]
        for kind in ("list", "string"):
            backend = RedisBackend(url.replace(f"{name}@", f"{name}:x@"), RedisKeys("a:", type=kind))
            backend.open(kind, 1, STORE)
            batch = replace(self.batch(pairs), lane=kind)
            with pytest.raises(BackendBroken, match="grant this user"):
                backend.apply(batch)
            assert backend.applied_mark(0) == Mark(epoch=1, ranges=((1, 1),))
            admin.execute_command("ACL", "SETUSER", name, "~a:secret")
            backend.apply(batch)
            assert backend.applied_mark(0) == batch.mark
            backend.close()
            if kind == "list":
                assert admin.lrange("a:ok1", 0, -1) == [b"1", b"3"]
                admin.execute_command("DEL", "a:ok1", "a:ok2", "a:secret")
                admin.execute_command("ACL", "SETUSER", name, "resetkeys", "~walbatch:*", "~a:ok*")
        assert admin.mget("a:ok1", "a:secret", "a:ok2") == [b"3", b"2", b"4"]

    @pytest.mark.parametrize("length_max", [1, 5])
    def test_a_list_that_may_not_be_shortened_is_not_added_to(self, tmp_path: Path, length_max: int) -> None:
        admin, name = self.raw(tmp_path), f"user{self.database(tmp_path)}"
        admin.execute_command("ACL", "SETUSER", name, "on", "nopass", "+@all", "-ltrim", "~*")
        url = self.server.url("persistence=any", database=self.database(tmp_path))
        backend = RedisBackend(
            url.replace("unix://", f"unix://{name}:x@"), RedisKeys("", type="list", length_max=length_max)
        )
        backend.open(self.lane, 1, STORE)
        for _ in range(2):
            with pytest.raises(BackendBroken, match="grant this user"):
                backend.apply(self.batch([(b"k", b"once")]))
        assert not admin.exists("k")
        admin.execute_command("ACL", "SETUSER", name, "+ltrim")
        assert backend.apply(self.batch([(b"k", b"once")])) is None
        backend.close()
        assert admin.lrange("k", 0, -1) == [b"once"]

    @pytest.mark.parametrize("reopens", [False, True])
    def test_what_was_applied_in_part_becomes_a_dead_letter_instead_of_being_applied_again(
        self, tmp_path: Path, reopens: bool
    ) -> None:
        admin, name = self.raw(tmp_path), f"user{self.database(tmp_path)}"
        admin.execute_command("ACL", "SETUSER", name, "on", "nopass", "+@all", "-lpush", "~*")
        url = self.server.url("persistence=any", database=self.database(tmp_path)).replace(
            "unix://", f"unix://{name}:x@"
        )

        def write(pipeline: Any, operation: Operation) -> None:
            pipeline.incr(operation.key)
            if operation.payload:
                pipeline.lpush("all", operation.payload)

        def opened() -> RedisBackend:
            backend = RedisBackend(url, write=write)
            backend.open(self.lane, 1, STORE)
            return backend

        pairs = [(b"a", b""), (b"b", b"1"), (b"c", b"2")]
        backend = opened()
        with pytest.raises(BackendBroken, match=r"LSN 2 .* in part.*grant this user"):
            backend.apply(self.batch(pairs))
        assert backend.applied_mark(0) == Mark(epoch=1, ranges=((1, 1),))
        backend.apply(self.batch([(b"d", b"")], first_lsn=9))  # which keeps what is known of the second
        admin.execute_command("ACL", "SETUSER", name, "+lpush")
        for _ in range(2):
            if reopens:
                backend.close()
                backend = opened()
            answer = backend.apply(self.batch(pairs))
            assert isinstance(answer, list)
            assert isinstance(answer[1], Rejected)
            assert "applied in part" in answer[1].error
            assert isinstance(answer[0], Applied)
            assert isinstance(answer[2], Applied)
        assert admin.mget("a", "b", "c", "d") == [b"1"] * 4
        assert admin.lrange("all", 0, -1) == [b"2"]
        backend.apply(self.batch([(b"e", b"")], first_lsn=10, mark=Mark(epoch=1, watermark=10)))
        assert backend.applied_mark(0) == Mark(epoch=1, watermark=10), (
            "the engine has kept it as a dead letter"
        )
        backend.close()
        assert admin.hget(MARK_KEY, "out") is None

    def test_of_an_operation_whose_second_command_is_refused_the_first_runs_once(
        self, tmp_path: Path
    ) -> None:
        self.raw(tmp_path).set("bad", "a string")

        def write(pipeline: Any, operation: Operation) -> None:
            pipeline.incr("before")
            pipeline.lpush(operation.key, operation.payload)

        with self.with_keys(tmp_path, write=write) as backend:
            for says in ("WRONGTYPE", "applied in part", "applied in part"):
                answer = backend.apply(self.batch([(b"bad", b"x")]))
                assert isinstance(answer, list)
                (outcome,) = answer
                assert isinstance(outcome, Rejected)
                assert says in outcome.error
        assert self.raw(tmp_path).get("before") == b"1"

    @pytest.mark.parametrize(
        ("command", "says"),
        [(("NONSENSE", "x"), "nknown"), (("SUBSCRIBE", "x"), "not allowed"), (("EVAL", "return 1", 0), "not allowed")],
    )  # fmt: skip
    def test_a_command_that_there_is_not_stops_the_shard_instead_of_killing_everything(
        self, tmp_path: Path, command: tuple[Any, ...], says: str
    ) -> None:
        def write(pipeline: Any, operation: Operation) -> None:
            pipeline.execute_command(*command)

        with self.with_keys(tmp_path, write=write) as backend:
            with pytest.raises(BackendBroken, match=says):
                backend.apply(self.batch([(b"a", b""), (b"b", b"")]))
            assert not backend.applied_mark(0).covers(1)

    @pytest.mark.parametrize("use", ["execute", "watch", "outside"])
    def test_write_must_only_queue(self, tmp_path: Path, use: str) -> None:
        def write(pipeline: Any, operation: Operation) -> None:
            pipeline.incr("total")
            if use == "outside":
                raise ZeroDivisionError
            pipeline.watch("x") if use == "watch" else pipeline.execute()

        with self.with_keys(tmp_path, write=write) as backend:
            with pytest.raises(ZeroDivisionError if use == "outside" else BackendBroken):
                backend.apply(self.batch([(b"a", b"")]))
            assert backend.applied_mark(0) == Mark()
        assert self.raw(tmp_path).get("total") is None

    def test_more_values_than_a_command_can_have_are_refused_alone(self, tmp_path: Path) -> None:
        def write(pipeline: Any, operation: Operation) -> None:
            pipeline.rpush(operation.key, *range(int(operation.payload)))

        with self.with_keys(tmp_path, write=write) as backend:
            fits = script.ARGUMENTS_MAX - 2
            answer = backend.apply(self.batch([(b"a", b"%d" % fits), (b"b", b"%d" % (fits + 1))]))
        assert isinstance(answer, list)
        assert answer[0] == Applied([fits])
        assert isinstance(answer[1], Rejected)

    def test_more_than_a_script_takes_asks_for_a_smaller_batch(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(script, "VALUES_MAX", 50)
        with self.with_keys(tmp_path) as backend:
            with pytest.raises(BatchTooLarge):
                backend.apply(self.batch(self.pairs(40)))
            self.apply(backend, self.batch(self.pairs(5)))

    def test_large_batches_are_applied_whole(self, tmp_path: Path) -> None:
        pairs = [(b"%d" % number, b"v%d" % number) for number in range(20_000)]
        for first, keys in ((1, RedisKeys()), (100_000, RedisKeys("h:", empty_deletes=True))):
            with self.with_keys(tmp_path, keys) as backend:
                self.apply(backend, self.batch(pairs, first_lsn=first))
        assert self.raw(tmp_path).dbsize() == 40_001

    def test_a_full_memory_refuses_a_batch_whole_and_it_comes_again(self, own_redis: RedisServer) -> None:
        backend = RedisBackend(own_redis.url(), RedisKeys("", type="list"))
        backend.open(self.lane, self.shards, STORE)
        client = raw(own_redis)
        client.config_set("maxmemory", "1")
        batch = self.batch(self.pairs(3))
        for _ in range(2):
            with pytest.raises(Throttled, match="maxmemory"):
                backend.apply(batch)
            assert backend.applied_mark(0) == Mark()
        client.config_set("maxmemory", "0")
        self.apply(backend, batch)
        assert sum(client.llen(key) for key, _ in self.pairs(3)) == 3
        backend.close()

    # --- answers --------------------------------------------------------------------------------------------------

    def test_what_redis_answers_is_the_result(self, tmp_path: Path) -> None:
        def write(pipeline: Any, operation: Operation) -> None:
            pipeline.set("k", operation.payload)
            pipeline.get("k")
            pipeline.get("absent")
            pipeline.hset("h", mapping={"a": 1})
            pipeline.hgetall("h")
            pipeline.xgroup_create(f"s{operation.lsn}", "g", mkstream=True)

        with self.with_keys(tmp_path, write=write) as backend:
            batch = self.batch([(b"a", b"1"), (b"b", b"2")])
            expected = [True, b"1", None, 1, {b"a": b"1"}, True]
            answer = backend.apply(batch)
            assert isinstance(answer, list)
            assert answer[0] == Applied(expected)
            assert backend.apply(batch) == [Applied(None)] * 2

    def test_write_may_do_nothing(self, tmp_path: Path) -> None:
        with self.with_keys(tmp_path, write=lambda pipeline, operation: None) as backend:
            assert backend.apply(self.batch([(b"a", b"")])) == [Applied([])]
            assert backend.applied_mark(0).covers(1)

    # --- marks ----------------------------------------------------------------------------------------------------

    def test_a_damaged_mark_is_never_taken_for_none(self, tmp_path: Path) -> None:
        for field, value in (("mark", b"nonsense"), ("out", b"x")):
            self.raw(tmp_path).flushdb()
            with self.with_keys(tmp_path) as backend:
                self.apply(backend, self.batch(self.pairs(1)))
                self.raw(tmp_path).hset(MARK_KEY, field, value)
                with pytest.raises(CorruptionError, match="restore"):
                    backend.applied_mark(0)
                with pytest.raises(BackendBroken, match="restore"):
                    backend.apply(self.batch(self.pairs(1)))

    def test_a_newer_engine_fences_an_older_one_that_is_still_open(self, tmp_path: Path) -> None:
        with self.with_keys(tmp_path) as old, self.with_keys(tmp_path) as new:
            self.apply(old, self.batch(self.pairs(1), epoch=1))
            self.apply(new, self.batch(self.pairs(1), epoch=2))
            with pytest.raises(Fenced):
                old.apply(self.batch(self.pairs(1, start=9), first_lsn=9, epoch=1))
        self.check_content(tmp_path, self.pairs(1))

    def test_a_batch_that_many_calls_apply_at_once_takes_effect_once(self, tmp_path: Path) -> None:
        batch = self.batch([(b"%d" % number, b"") for number in range(50)])
        together = threading.Barrier(6)

        def work(backend: RedisBackend) -> None:
            together.wait(DEADLINE_S)
            backend.apply(batch)

        with self.with_keys(tmp_path, write=count) as one, self.with_keys(tmp_path, write=count) as other:
            with ThreadPoolExecutor(6) as pool:
                for done in [pool.submit(work, backend) for backend in (one, other) * 3]:
                    done.result(DEADLINE_S)
            assert one.applied_mark(0) == batch.mark
        assert set(self.raw(tmp_path).hvals("counts")) == {b"1"}

    def test_an_emptied_redis_is_reported_and_the_engine_goes_on(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with self.with_keys(tmp_path, write=count) as backend:
            backend.apply(self.batch([(b"a", b""), (b"b", b"")]))
            self.raw(tmp_path).flushdb()
            backend.apply(self.batch([(b"c", b"")], first_lsn=3, mark=Mark(epoch=1, watermark=3)))
            assert [record.levelname for record in caplog.records] == ["ERROR"]
            assert "has gone back, from LSN 2 to 0" in caplog.text
            backend.apply(self.batch([(b"a", b"")], mark=Mark(epoch=1, watermark=3)))
            assert len(caplog.records) == 1
            assert backend.applied_mark(0) == Mark(epoch=1, watermark=3)
        assert self.raw(tmp_path).hgetall("counts") == {b"c": b"1"}

    def test_what_another_call_has_seen_meanwhile_is_no_loss(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with self.with_keys(tmp_path) as backend:
            backend.apply(self.batch(self.pairs(2)))
            backend._see(0, Held(), None)  # of a call that was overtaken
            backend.apply(self.batch(self.pairs(1, start=5), first_lsn=3))
        assert not caplog.records

    # --- connections ----------------------------------------------------------------------------------------------

    @pytest.fixture
    def proxy(self, shared_redis: RedisServer) -> Iterator[Proxy]:
        proxy = Proxy(shared_redis.folder, name="socket", request=b"EVALSHA", answer=b"")
        yield proxy
        proxy.close()

    @pytest.mark.parametrize("loss", Loss)
    def test_a_lost_connection_leaves_each_effect_once(
        self, tmp_path: Path, proxy: Proxy, loss: Loss
    ) -> None:
        url = f"redis+unix://{proxy.folder}/socket?db={self.database(tmp_path)}"
        backend = RedisBackend(url, write=count)
        backend.limit_time(5.0)
        backend.open(self.lane, self.shards, STORE)
        first, second = self.batch([(b"a", b""), (b"b", b"")]), self.batch([(b"c", b"")], first_lsn=3)
        backend.apply(first)
        proxy.loss = loss
        with pytest.raises(RetryBatch):
            backend.apply(second)
        assert proxy.loss is None
        backend.apply(second)
        proxy.release()
        backend.apply(self.batch([(b"c", b""), (b"d", b"")], first_lsn=3))
        assert backend.applied_mark(0) == Mark(epoch=1, ranges=((1, 4),))
        backend.close()
        assert self.raw(tmp_path).hgetall("counts") == dict.fromkeys((b"a", b"b", b"c", b"d"), b"1")

    def test_a_request_that_arrives_after_its_repetition_does_nothing(self, tmp_path: Path) -> None:
        """What a call that was given up has sent: the same bytes, late."""
        with self.with_keys(tmp_path, write=count) as backend:
            sent: list[tuple[Any, ...]] = []
            run = backend._run
            backend._run = lambda *arguments: sent.append(arguments) or run(*arguments)  # type: ignore[method-assign, func-returns-value]
            backend.apply(self.batch([(b"a", b"")]))
            backend.apply(self.batch([(b"b", b"")], first_lsn=2))
            late = [arguments for arguments in sent if arguments[1] == script.RUN]
            assert [run(*arguments)[0] for arguments in late] == [script.STALE] * 2
        assert self.raw(tmp_path).hgetall("counts") == {b"a": b"1", b"b": b"1"}

    def test_a_server_that_does_not_answer_costs_no_more_than_the_lane_allows(
        self, own_redis: RedisServer
    ) -> None:
        backend = RedisBackend(own_redis.url(), write=count)
        backend.limit_time(0.4)
        backend.open(self.lane, self.shards, STORE)
        batch = self.batch([(b"a", b"")])
        assert own_redis._process is not None
        own_redis._process.send_signal(signal.SIGSTOP)
        with pytest.raises(RetryBatch):
            backend.apply(batch)
        own_redis._process.send_signal(signal.SIGCONT)
        backend.limit_time(None)
        backend.apply(batch)
        backend.close()
        assert raw(own_redis).hgetall("counts") == {b"a": b"1"}

    def test_a_script_of_somebody_else_makes_the_batch_wait_and_come_again(
        self, own_redis: RedisServer
    ) -> None:
        backend = RedisBackend(own_redis.url(), write=count)
        backend.open(self.lane, self.shards, STORE)
        client = raw(own_redis)
        client.config_set("busy-reply-threshold", 1)
        with ThreadPoolExecutor(1) as pool:
            endless = pool.submit(client.eval, "while true do end", 0)
            with pytest.raises(RetryBatch, match="BUSY"):
                again_and_again(lambda: backend.apply(self.batch([(b"a", b"")])), until=endless.done)
            raw(own_redis).script_kill()
            with pytest.raises(redis.ResponseError):
                endless.result(DEADLINE_S)
        backend.apply(self.batch([(b"a", b"")]))
        backend.close()
        assert client.hgetall("counts") == {b"a": b"1"}

    def test_scripts_that_redis_has_lost_are_sent_again(self, tmp_path: Path) -> None:
        for first, keys in ((1, RedisKeys()), (5, RedisKeys(type="list", prefix="l"))):
            with self.with_keys(tmp_path, keys) as backend:
                for number in range(2):
                    self.raw(tmp_path).script_flush()
                    self.apply(backend, self.batch(self.pairs(1), first_lsn=first + number))

    # --- opening and closing --------------------------------------------------------------------------------------

    def test_it_belongs_to_one_lane(self, tmp_path: Path) -> None:
        with self.with_keys(tmp_path) as backend, pytest.raises(ConfigError, match="one of its own"):
            backend.open("other", 1, STORE)

    def test_closed_it_applies_nothing_and_can_be_opened_again(self, tmp_path: Path) -> None:
        backend = self.make(tmp_path)
        with pytest.raises(EngineClosed):
            backend.apply(self.batch(self.pairs(1)))
        for number in range(2):
            backend.open(self.lane, self.shards, STORE)
            self.apply(backend, self.batch(self.pairs(1, start=number), first_lsn=number + 1))
            backend.close()
            with pytest.raises(EngineClosed):
                backend.applied_mark(0)
        self.check_content(tmp_path, self.pairs(2))

    def test_in_a_forked_child_it_applies_nothing(self, tmp_path: Path) -> None:
        with self.with_keys(tmp_path) as backend:
            self.apply(backend, self.batch(self.pairs(1)))
            backend._pid = os.getpid() + 1
            with pytest.raises(EngineClosed):
                backend.apply(self.batch(self.pairs(1), first_lsn=2))
            backend.close()
            backend._pid = os.getpid()

    def test_marks_say_whose_they_are(self, tmp_path: Path) -> None:
        with self.with_keys(tmp_path) as backend:
            batch = self.batch(self.pairs(2), epoch=3)
            self.apply(backend, batch)
        assert batch.mark is not None
        found = self.raw(tmp_path).hgetall(MARK_KEY)
        assert int(found.pop(b"opened")) > 0
        assert found == {b"mark": encode_mark(batch.mark)}

    def test_a_server_that_is_away_is_a_storage_error(self, tmp_path: Path) -> None:
        for url in (f"redis+unix://{tmp_path}/socket", f"redis://127.0.0.1:{free_port()}/0"):
            with pytest.raises(StorageError, match="is the server running"):
                RedisBackend(url).open("put", 1, STORE)

    def test_a_database_that_does_not_exist_is_a_config_error(self) -> None:
        with pytest.raises(ConfigError, match="out of range"):
            RedisBackend(self.server.url(database=1_000_000)).open("put", 1, STORE)


# --- what Redis promises ------------------------------------------------------------------------------------------

GOOD = {"appendonly": "yes", "appendfsync": "always", "no-appendfsync-on-rewrite": "no", "maxmemory": "0",
        "maxmemory-policy": "noeviction"}  # fmt: skip
PROMISES: dict[str, tuple[dict[str, str], str]] = {
    "no file": ({"appendonly": "no"}, "appendonly"),
    "synced every second": ({"appendfsync": "everysec"}, "appendfsync is 'everysec'"),
    "never synced": ({"appendfsync": "no"}, "appendfsync is 'no'"),
    "not synced while it is rewritten": ({"no-appendfsync-on-rewrite": "yes"}, "no-appendfsync-on-rewrite"),
    "drops keys": ({"maxmemory": "100000000", "maxmemory-policy": "allkeys-lru"}, "maxmemory-policy"),
}


@pytest.mark.parametrize("case", PROMISES)
def test_a_redis_that_may_lose_what_it_acknowledged_is_refused_unless_that_is_asked_for(
    own_redis: RedisServer, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings, says = PROMISES[case]
    assert shortcomings(GOOD) == []
    assert len(shortcomings(GOOD | settings)) == 1
    client = raw(own_redis)
    for name, value in settings.items():
        client.config_set(name, value)
    with pytest.raises(ConfigError, match=f"{says}.*persistence='any'"):
        RedisBackend(own_redis.url()).open("put", 1, STORE)
    backend = RedisBackend(own_redis.url("persistence=any"))
    backend.open("put", 1, STORE)
    backend.close()
    assert says in caplog.text
    assert "lost for good" in caplog.text


PERSISTED = {"aof_enabled": "1", "aof_rewrite_in_progress": "0", "aof_rewrite_scheduled": "0",
             "aof_last_write_status": "ok"}  # fmt: skip


def test_a_file_is_in_force_when_nothing_of_it_is_still_to_be_written() -> None:
    assert why_not_in_force(PERSISTED) == ""
    for name, value in (
        ("aof_enabled", "0"), ("aof_rewrite_in_progress", "1"), ("aof_rewrite_scheduled", "1"),
        ("aof_last_write_status", "err"),
    ):  # fmt: skip
        assert why_not_in_force(PERSISTED | {name: value})
    for name in PERSISTED:
        assert why_not_in_force({key: value for key, value in PERSISTED.items() if key != name})


def slowly_rewritten(running: RedisServer, *, seconds: int) -> Any:
    """A client of a server that takes at least so long to rewrite its file."""
    client = raw(running)
    client.config_set("rdb-key-save-delay", str(10_000 * seconds))
    client.mset({f"x{number}": 1 for number in range(100)})
    return client


@pytest.mark.parametrize("had_one", [False, True])
def test_a_file_that_was_switched_on_just_now_is_waited_for(own_redis: RedisServer, had_one: bool) -> None:
    if had_one:
        raw(own_redis).bgrewriteaof()
        wait_for_rewrite(raw(own_redis))
        raw(own_redis).config_set("appendonly", "no")
    else:
        own_redis.restart(appendonly="no")
    client = slowly_rewritten(own_redis, seconds=60)
    client.config_set("appendonly", "yes")
    with pytest.raises(StorageError, match="not in force yet"):
        RedisBackend(own_redis.url()).open("put", 1, STORE)
    client.config_set("rdb-key-save-delay", "0")
    client.config_set("appendonly", "no")
    client.config_set("appendonly", "yes")
    wait_for_rewrite(client)
    suite, backend = TestStrings(), RedisBackend(own_redis.url())
    backend.open("put", 1, STORE)
    suite.apply(backend, suite.batch([(b"k", b"kept")]))
    backend.close()
    own_redis.restart()
    assert raw(own_redis).get("k") == b"kept"


def wait_for_rewrite(client: Any) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        found = client.info("persistence")
        if not found["aof_rewrite_in_progress"] and not found["aof_rewrite_scheduled"]:
            return
        assert time.monotonic() < deadline


def test_a_file_that_is_rewritten_meanwhile_hinders_nobody(own_redis: RedisServer) -> None:
    """Redis has had it since its start: what comes is appended, and synced, as before."""
    own_redis.restart(rdb_key_save_delay="600000")
    client = raw(own_redis)
    client.mset({f"x{number}": 1 for number in range(100)})
    client.bgrewriteaof()
    assert client.info("persistence")["aof_rewrite_in_progress"]
    suite, backend = TestStrings(), RedisBackend(own_redis.url())
    backend.open("put", 1, STORE)
    suite.apply(backend, suite.batch([(b"k", b"kept")]))
    backend._connections._looked_at = 0.0
    suite.apply(backend, suite.batch([(b"k2", b"kept")], first_lsn=2))
    backend.close()
    own_redis.restart()
    assert raw(own_redis).mget("k", "k2") == [b"kept"] * 2


def test_settings_that_change_while_it_works_are_seen(own_redis: RedisServer) -> None:
    suite, backend, client = TestWrite(), RedisBackend(own_redis.url(), write=count), raw(own_redis)
    backend.open("put", 1, STORE)
    backend.apply(suite.batch([(b"0", b"")]))
    numbers = itertools.count(2)
    for name, other, usual in (("appendonly", "no", "yes"), ("appendfsync", "everysec", "always")):
        client.config_set(name, other)
        until = time.monotonic() + DEADLINE_S
        batch = suite.batch([])
        with pytest.raises(BackendBroken, match=name):  # noqa: PT012 - the one that looks again
            while time.monotonic() < until:
                number = next(numbers)
                batch = suite.batch([(b"%d" % number, b"")], first_lsn=number)
                backend.apply(batch)
        for _ in range(2):
            with pytest.raises(BackendBroken, match=name):
                backend.apply(batch)
        client.config_set(name, usual)
        wait_for_rewrite(client)
        backend.apply(batch)
    backend.close()
    assert set(client.hgetall("counts").values()) == {b"1"}


def test_settings_are_not_asked_for_with_every_batch(own_redis: RedisServer) -> None:
    suite, backend = TestStrings(), RedisBackend(own_redis.url())
    backend.open("put", 1, STORE)
    client = raw(own_redis)
    client.config_resetstat()
    started = time.monotonic()
    for number in range(50):
        suite.apply(backend, suite.batch([(b"k", b"v")], first_lsn=number + 1))
    took_s = time.monotonic() - started
    backend.close()
    asked = client.info("commandstats").get("cmdstat_config|get", {"calls": 0})["calls"]
    assert asked <= len(SETTINGS) * (1 + took_s / LOOK_EVERY_S)


def test_a_mark_is_believed_when_redis_has_synced_it(own_redis: RedisServer) -> None:
    """What Redis has read from its files may not be on the disk: it is, once Redis has synced something behind it."""
    suite, backend = TestStrings(), RedisBackend(own_redis.url())
    backend.open("put", 1, STORE)
    suite.apply(backend, suite.batch(suite.pairs(1)))
    backend.close()
    own_redis.restart()
    client = raw(own_redis)
    before = client.info("persistence")["aof_current_size"]
    backend.open("put", 1, STORE)
    assert backend.applied_mark(0).covers(1)
    backend.close()
    assert client.info("persistence")["aof_current_size"] > before
    assert client.hget(MARK_KEY, "opened")


def test_a_redis_that_nobody_may_ask_is_refused_unless_that_is_asked_for(own_redis: RedisServer) -> None:
    raw(own_redis).execute_command("ACL", "SETUSER", "default", "-config")
    with pytest.raises(ConfigError, match=r"may not be read.*persistence='any'"):
        RedisBackend(own_redis.url()).open("put", 1, STORE)
    backend = RedisBackend(own_redis.url(), persistence="any")
    backend.open("put", 1, STORE)
    backend.close()


def test_a_redis_that_comes_back_with_other_settings_stops_the_shard(own_redis: RedisServer) -> None:
    suite = TestStrings()
    backend = RedisBackend(own_redis.url())
    backend.open("put", 2, STORE)
    suite.apply(backend, suite.batch(suite.pairs(1)))
    own_redis.restart(appendfsync="everysec")
    with pytest.raises((BackendBroken, RetryBatch)):
        backend.apply(suite.batch(suite.pairs(1), first_lsn=2))
    with pytest.raises(BackendBroken, match="appendfsync"):
        backend.apply(suite.batch(suite.pairs(1), first_lsn=2))
    own_redis.restart()
    suite.apply(backend, suite.batch(suite.pairs(1), first_lsn=2))
    backend.close()


def test_a_replica_is_refused(own_redis: RedisServer) -> None:
    raw(own_redis).execute_command("REPLICAOF", "127.0.0.1", str(free_port()))
    with pytest.raises(ConfigError, match="name its master"):
        RedisBackend(own_redis.url()).open("put", 1, STORE)


def test_a_cluster_is_refused(own_redis: RedisServer) -> None:
    own_redis.restart(cluster_enabled="yes", port=str(free_port()), cluster_port=str(free_port()))
    with pytest.raises(ConfigError, match="cluster"):
        RedisBackend(own_redis.url()).open("put", 1, STORE)


# --- servers that die ---------------------------------------------------------------------------------------------


def test_a_server_that_is_killed_in_the_middle_of_batches_has_each_effect_once(
    own_redis: RedisServer,
) -> None:
    backend = RedisBackend(own_redis.url(), write=count)
    backend.open("put", 2, STORE)
    suite, deaths = TestWrite(), itertools.cycle([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
    done = threading.Event()
    kills = 0

    def attack() -> int:
        nonlocal kills
        while not done.is_set() and kills < 12:
            own_redis.restart(next(deaths))
            kills += 1
            done.wait(0.05)
        return kills

    with ThreadPoolExecutor(1) as pool:
        attacker = pool.submit(attack)
        number, unknown = 0, 0
        while not attacker.done() or number < 50:
            pairs = [(b"%d.%d" % (number, part), b"") for part in range(20)]
            batch = suite.batch(pairs, first_lsn=20 * number + 1)
            while True:
                try:
                    backend.apply(batch)
                except RetryBatch:
                    unknown += 1
                else:
                    break
            number += 1
        done.set()
        assert attacker.result(DEADLINE_S) == 12
    assert unknown, "no batch was hit"
    assert backend.applied_mark(0) == Mark(epoch=1, ranges=((1, 20 * number),))
    backend.close()
    found = raw(own_redis).hgetall("counts")
    assert len(found) == 20 * number
    assert set(found.values()) == {b"1"}


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A disk of 8 MiB, with a short name: a socket's has 107 bytes."""
    place = Path(tempfile.mkdtemp(prefix="walbatch-", dir="/tmp"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        place.rmdir()
        pytest.skip("a small disk cannot be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
        place.rmdir()


def test_a_redis_whose_disk_is_full_loses_nothing(small_disk: Path) -> None:
    """It ends itself, since it cannot keep its word. Batches wait until somebody has made room."""
    try:
        needed()
    except NoRedisError as error:
        pytest.skip(str(error))
    suite, ballast = TestWrite(), small_disk / "ballast"
    ballast.write_bytes(bytes(6 << 20))

    def write(pipeline: Any, operation: Operation) -> None:
        pipeline.hincrby("counts", operation.key, 1)
        pipeline.set("last", operation.payload)

    with server(small_disk) as running:
        backend = RedisBackend(running.url(), write=write)
        backend.open("put", 1, STORE)
        refused = 0
        for number in range(40):
            pairs = [(b"%d.%d" % (number, part), os.urandom(5_000)) for part in range(20)]
            batch = suite.batch(pairs, first_lsn=20 * number + 1)
            try:
                backend.apply(batch)
            except RetryBatch:
                refused += 1
                assert running.wait() != 0
                ballast.unlink()
                running.start()
                backend.apply(batch)
        assert refused == 1, "its disk was never full"
        backend.close()
        counts = raw(running).hgetall("counts")
    assert len(counts) == 800
    assert set(counts.values()) == {b"1"}


def test_a_file_that_is_cut_off_loses_whole_batches_with_their_marks(own_redis: RedisServer) -> None:
    """What a crash leaves of a file that was not synced: any beginning of it."""
    suite = TestWrite()
    backend = RedisBackend(own_redis.url(), write=count)
    backend.open("put", 2, STORE)
    for number in range(30):
        backend.apply(
            suite.batch([(b"%d" % (3 * number + part), b"") for part in range(3)], first_lsn=3 * number + 1)
        )
    backend.close()
    own_redis.stop()
    (log,) = (own_redis.folder / "appendonlydir").glob("*.incr.aof")
    entire = log.read_bytes()
    begins = len(entire) // 2
    for size in range(begins, len(entire), (len(entire) - begins) // 12):
        log.write_bytes(entire[:size])
        own_redis.start()
        found = raw(own_redis).hgetall("counts")
        backend.open("put", 2, STORE)
        mark = backend.applied_mark(0)
        backend.close()
        assert sorted(map(int, found)) == list(range(len(found)))
        assert len(found) % 3 == 0
        assert mark == Mark(epoch=1, ranges=((1, len(found)),))
        own_redis.stop()


# --- the whole engine ---------------------------------------------------------------------------------------------

RETRY = wb.RetryPolicy(base_s=0.005, ceiling_s=0.1, breaker_s=0.05, breaker_s_max=0.2)

WORKER = """
import sys
import walbatch as wb

def count(pipeline, operation):
    pipeline.hincrby("counts", operation.key, 1)

url, store, life = sys.argv[1], sys.argv[2], int(sys.argv[3])
lanes = {"count": wb.Lane(wb.RedisBackend(url, write=count), shards=2),
         "put": wb.Lane(wb.RedisBackend(url, "p:"), shards=2)}
engine = wb.Engine.open(store, lanes)
number = life * 1_000_000
while True:
    names = [b"%d" % (number + at) for at in range(25)]
    for lane in lanes:
        engine.submit_many(lane, [(name, name) for name in names])
    print(number, flush=True)
    number += 25
"""


def test_an_engine_that_is_killed_again_and_again_has_each_effect_once(
    own_redis: RedisServer, tmp_path: Path
) -> None:
    store = str(tmp_path / "store")
    acknowledged: set[int] = set()
    for life in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, own_redis.url(), store, str(life)], stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        assert process.stdout is not None
        said = [next(process.stdout) for _ in range(8 + 5 * life)]
        if life == 2:
            own_redis.restart()
        process.kill()
        said += process.stdout.read().splitlines(keepends=True)
        process.wait(DEADLINE_S)
        process.stdout.close()
        for line in said:
            if line.endswith("\n"):
                acknowledged.update(range(int(line), int(line) + 25))
    lanes = {
        "count": wb.Lane(RedisBackend(own_redis.url(), write=count), shards=2, retry=RETRY),
        "put": wb.Lane(RedisBackend(own_redis.url(), "p:"), shards=2, retry=RETRY),
    }
    with wb.Engine.open(store, lanes) as engine:
        engine.flush(timeout=DEADLINE_S)
    client = raw(own_redis)
    counts = client.hgetall("counts")
    assert acknowledged <= set(map(int, counts))
    assert set(counts.values()) == {b"1"}
    assert {b"p:%d" % number for number in acknowledged} <= set(client.keys("p:*"))


def test_the_command_line_delivers_what_is_left(own_redis: RedisServer, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    with wb.Engine.open(store, {"put": wb.Lane(None, shards=2)}) as engine:
        engine.submit_many("put", [(b"%d" % number, b"x") for number in range(100)])
    command = [sys.executable, "-m", "walbatch", "recover", store]
    url = own_redis.url("prefix=p:")
    subprocess.run([*command, "--lane", f"put={url}"], check=True, cwd=ROOT, capture_output=True)
    client = raw(own_redis)
    assert len(client.keys("p:*")) == 100
    again = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0


# --- URLs and passwords -------------------------------------------------------------------------------------------

URLS = {
    "redis://db": "redis://db:6379/0",
    "redis://app:secret@db.example:7000/3?prefix=page:": "redis://app@db.example:7000/3?prefix=page:",
    "redis://:secret@[::1]/0": "redis://[::1]:6379/0",
    "rediss://db/1?ssl_ca_certs=/etc/ca.pem&type=hash": "rediss://db:6379/1?ssl_ca_certs=%2Fetc%2Fca.pem&type=hash",
    "unix:///run/redis.sock?db=2": "redis+unix:///run/redis.sock?db=2",
    "redis+unix:///run/r%20s?type=stream&length_max=9": "redis+unix:///run/r%20s?db=0&type=stream&length_max=9",
    "redis://db/0?prefix=a%26%FF&empty_deletes=true": "redis://db:6379/0?prefix=a%26%FF&empty_deletes=true",
    "redis://db/0?type=hash&empty_deletes=false&persistence=any": (
        "redis://db:6379/0?type=hash&empty_deletes=false&persistence=any"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("url", "remembered"), URLS.items())
def test_what_is_remembered_of_a_url_makes_it_again_and_has_no_password(url: str, remembered: str) -> None:
    backend = RedisBackend(url)
    assert url_of(backend) == remembered
    assert "secret" not in repr(backend)
    again = open_backend(remembered, allow_python=False)
    assert url_of(again) == remembered
    assert isinstance(again, RedisBackend)
    assert again.keys == backend.keys
    assert strip_password(remembered) == remembered


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis://:hunter2@db/x", "database"),
        ("redis://:hunter2@/0", "names no host"),
        ("redis+unix://host/0", "names no socket"),
        ("redis://:hunter2@db:port/0", "no URL of a Redis"),
        ("redis://:hunter2@db/0?prefix=a&prefix=b", "must stand there once"),
        ("redis://:hunter2@db/0?nonsense=1", "not known; known: prefix"),
        ("redis://app:12?hunter2@db/0", "percent-escaped"),
        ("redis://app:12?hun=hunter2@db/0", "percent-escaped"),
        ("redis://app:12?prefix=hunter2@db/0", "percent-escaped"),
        ("redis://app:12?hunter2=", "not known"),
        ("redis://app:12?hunter2", "must stand there once"),
        ("redis://app:12#hunter2@db/0", "no URL of a Redis"),
        ("redis://app:12/hunter2@db/0", "database"),
        ("redis://db/0?type=hunter2", "must be one of"),
        ("redis://db/0?persistence=hunter2", "must be one of"),
        ("redis://:hunter2@db/0?type=set", "must be one of"),
        ("redis://:hunter2@db/0?length_max=x", "length_max"),
        ("redis://:hunter2@db/0?empty_deletes=x", "true or false"),
        ("redis://:hunter2@db/0?persistence=x", "persistence"),
        ("redis://:hunter2@db/0?ssl_ca_certs=x", "for rediss"),
    ],
)
def test_a_url_that_cannot_be_right_is_refused_without_its_password(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        open_backend(url, allow_python=False)
    assert "hunter2" not in str(caught.value)


def test_keys_are_said_once() -> None:
    for arguments, options in (
        (("redis://db/0?prefix=a", "b"), {}),
        (("redis://db", "b"), {"write": count}),
        (("redis://db", 7), {}),
        (("redis://db",), {"write": 7}),
        (("mysql://db",), {}),
    ):
        with pytest.raises(ConfigError):
            RedisBackend(*arguments, **options)
    assert RedisBackend("redis://db", write=count).url is None


def test_a_password_comes_from_the_url_or_the_environment_and_reaches_no_error(
    own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_redis.restart(requirepass="hunter2")
    with pytest.raises(ConfigError, match="REDISCLI_AUTH"):
        RedisBackend(own_redis.url()).open("put", 1, STORE)
    given = RedisBackend(own_redis.url().replace("unix://", "unix://:hunter2@"))
    monkeypatch.setenv("REDISCLI_AUTH", "hunter2")
    for backend in (given, RedisBackend(own_redis.url())):
        backend.open("put", 1, STORE)
        assert "hunter2" not in f"{backend!r} {backend.url}"
        backend.close()
    monkeypatch.setenv("REDISCLI_AUTH", "hunter3")
    with pytest.raises(ConfigError) as caught:
        RedisBackend(own_redis.url()).open("put", 1, STORE)
    assert "hunter3" not in str(caught.value)


def test_an_encrypted_connection_is_made_to_the_right_server_only(
    own_redis: RedisServer, tmp_path: Path
) -> None:
    certificate, key, port = tmp_path / "cert.pem", tmp_path / "key.pem", free_port()
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "1",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"], capture_output=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("openssl makes no certificate here")
    try:
        own_redis.restart(
            tls_port=str(port), tls_cert_file=str(certificate), tls_key_file=str(key), tls_auth_clients="no",
            tls_ca_cert_file=str(certificate),
        )  # fmt: skip
    except RuntimeError:
        pytest.skip("this redis-server was built without TLS")
    suite = TestStrings()
    backend = RedisBackend(f"rediss://localhost:{port}/0?ssl_ca_certs={certificate}")
    backend.open("put", 1, STORE)
    suite.apply(backend, suite.batch(suite.pairs(1)))
    backend.close()
    for other in (
        f"rediss://localhost:{port}/0",
        f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}",
    ):
        with pytest.raises(StorageError, match="certificate verify failed"):
            RedisBackend(other).open("put", 1, STORE)


def test_without_redis_it_is_said_what_to_install() -> None:
    program = (
        "import sys; sys.modules['redis'] = None\n"
        "import walbatch as wb\n"
        "def url(): wb.backends.open_backend('redis://x', allow_python=False)\n"
        "for use in (lambda: wb.RedisBackend, url):\n"
        "    try: use()\n"
        "    except (ImportError, wb.ConfigError) as error: print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == ["RedisBackend needs redis-py: pip install 'walbatch[redis]'"] * 2


def test_redis_is_imported_only_when_it_is_used() -> None:
    program = "import sys, walbatch; assert not {'redis', 'ssl'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def unlogged(batch: Batch) -> Batch:
    return replace(batch, lsns=[], mark=None)


def test_an_unlogged_batch_moves_no_mark(own_redis: RedisServer) -> None:
    suite = TestWrite()
    for options in ({"write": count}, {"keys": "p:"}):
        backend = RedisBackend(own_redis.url(), **options)
        backend.open("put", 1, STORE)
        backend.apply(unlogged(suite.batch(suite.pairs(3))))
        assert backend.applied_mark(0) == Mark()
        backend.close()
    assert raw(own_redis).hlen("counts") == len(raw(own_redis).keys("p:*")) == 3
