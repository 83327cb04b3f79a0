"""An HTTP API as a backend, on a real server that is killed: at least once, and once at a server that honours idempotency keys."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any, ClassVar
from uuid import UUID

import pytest

httpx = pytest.importorskip("httpx", reason="HttpBackend needs httpx: pip install 'walbatch[http]'")

import walbatch as wb  # noqa: E402 - what needs httpx
from tests.backends.http_server import HttpServer, http_server  # noqa: E402
from tools.redis_server import free_port  # noqa: E402
from walbatch.backends import as_backend, open_backend, strip_password, url_of  # noqa: E402
from walbatch.backends.http import HttpBackend  # noqa: E402
from walbatch.backends.http.backend import RESULT_BYTES_MAX, ServerError, _Bearer  # noqa: E402
from walbatch.backends.http.meaning import AFTER_S_MAX, Meaning, of_status, retry_after  # noqa: E402
from walbatch.backends.http.url import fill  # noqa: E402
from walbatch.errors import (  # noqa: E402
    BackendBroken,
    BatchRejected,
    BatchTooLarge,
    ConfigError,
    EngineClosed,
    RetryBatch,
    Throttled,
)
from walbatch.testing.contracts import STORE, BackendContract, Pair  # noqa: E402
from walbatch.types import Applied, Operation, Options, Rejected, Retry  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 60


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for here is on this machine, whatever the environment says of the way to others."""
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture(scope="session")
def shared_http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    """A server for all tests of a session, with a name for each of them."""
    with http_server(tmp_path_factory.mktemp("http")) as running:
        yield running


class HttpSuite(BackendContract):
    kills = 10
    options: ClassVar[dict[str, Any]] = {}
    rest = "objects/{key}"

    @pytest.fixture(autouse=True)
    def _on(self, shared_http: HttpServer) -> None:
        self.server = shared_http

    def name(self, path: Path) -> str:
        return f"t{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"

    def make(self, path: Path, **options: Any) -> HttpBackend:
        return HttpBackend(self.server.url(self.name(path), self.rest), **{**self.options, **options})

    def make_backend(self, path: Path) -> Any:
        return self.make(path)

    def effects(self, path: Path) -> list[dict[str, Any]]:
        return self.server.effects(self.name(path))

    def content(self, path: Path) -> Iterable[Pair]:
        effects = self.effects(path)
        ids = Counter(effect["id"] for effect in effects if effect["id"])
        assert set(ids.values()) <= {1}, "an idempotency key took effect twice"
        return {effect["key"]: effect["payload"] for effect in effects}.items()

    def seen(self, path: Path) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(self.server.url(self.name(path), "seen")).json()
        return found

    @contextlib.contextmanager
    def with_options(self, path: Path, **options: Any) -> Iterator[Any]:
        backend = as_backend(self.make(path, **options))
        backend.limit_time(20.0)  # type: ignore[attr-defined]
        backend.open(self.lane, self.shards, STORE)  # type: ignore[attr-defined]
        try:
            yield backend
        finally:
            backend.close()  # type: ignore[attr-defined]


class TestInQueries(HttpSuite):
    rest = "objects?key={key}"


class TestWhole(HttpSuite):
    rest = "batch"
    options: ClassVar[dict[str, Any]] = {"batch": True}


class TestHttp(HttpSuite):
    # --- requests -------------------------------------------------------------------------------------------------

    def test_an_operation_is_named_for_ever_by_its_store_and_its_first_lsn(self, tmp_path: Path) -> None:
        with self.with_options(tmp_path, content_type="text/plain", headers={"X-App": "a"}) as backend:
            batch = self.batch([(b"a", b"1"), (b"b", b"2")], first_lsn=7)
            backend.apply(replace(batch, options=[Options(origin=3), Options()]))
        headers = sorted(self.seen(tmp_path)["headers"], key=lambda one: str(one["path"]))
        assert [one["Idempotency-Key"] for one in headers] == [
            f"{UUID(bytes=STORE)}-3",
            f"{UUID(bytes=STORE)}-8",
        ]
        assert {(one["method"], one["Content-Type"], one["X-App"]) for one in headers} == {
            ("PUT", "text/plain", "a")
        }

    def test_an_empty_payload_is_a_delete_where_that_was_asked_for(self, tmp_path: Path) -> None:
        with self.with_options(tmp_path, empty_deletes=True, method="post") as backend:
            assert backend.apply(self.batch([(b"a", b"1"), (b"a", b"")])) == [Applied(), Applied()]
        assert [effect["method"] for effect in self.effects(tmp_path)] == ["POST", "DELETE"]

    @pytest.mark.parametrize("key", [b".", b".."])
    def test_no_key_leads_to_another_path(self, tmp_path: Path, key: bytes) -> None:
        with self.with_options(tmp_path) as backend:
            answer = backend.apply(self.batch([(key, b"1"), (b"../x/..", b"2"), (b"?a=1#b", b"3")]))
        assert isinstance(answer[0], Rejected)
        assert "another path" in answer[0].error
        assert [effect["key"] for effect in self.effects(tmp_path)] == [b"../x/..", b"?a=1#b"] or Counter(
            effect["key"] for effect in self.effects(tmp_path)
        ) == Counter([b"../x/..", b"?a=1#b"])

    def test_json_lines_hold_any_bytes(self, tmp_path: Path) -> None:
        self.rest = "batch"
        with self.with_options(tmp_path, batch=True) as backend:
            assert backend.apply(self.batch([("\u00e4".encode(), b"\xff"), (b"\0", b"\n")])) is None
        (headers,) = self.seen(tmp_path)["headers"]
        assert headers["Content-Type"] == "application/jsonl"
        assert "Idempotency-Key" not in headers, "a batch is cut differently when it comes again"
        assert [effect["id"] for effect in self.effects(tmp_path)] == [
            f"{UUID(bytes=STORE)}-{lsn}" for lsn in (1, 2)
        ]
        assert dict(self.content(tmp_path)) == {"\u00e4".encode(): b"\xff", b"\0": b"\n"}

    def test_a_function_makes_any_request(self, tmp_path: Path) -> None:
        target = self.server.url(self.name(tmp_path), "objects/fixed")

        def request(operation: Operation) -> Any:
            return httpx.Request("PATCH", target, content=operation.payload + operation.key)

        def whole(operations: list[Operation]) -> Any:
            return httpx.Request("PUT", target, content=b",".join(operation.key for operation in operations))

        with self.with_options(tmp_path, request=request) as backend:
            assert backend.apply(self.batch([(b"a", b"1")])) == [Applied()]
        self.rest = "objects"
        with self.with_options(tmp_path, request=whole, batch=True) as backend:
            assert backend.apply(self.batch([(b"a", b"1"), (b"b", b"1")], first_lsn=5)) is None
        assert [(one["method"], one["payload"]) for one in self.effects(tmp_path)] == [
            ("PATCH", b"1a"),
            ("PUT", b"a,b"),
        ]

    def test_what_the_function_raises_speaks_for_the_batch(self, tmp_path: Path) -> None:
        for made, error in ((ZeroDivisionError(), ZeroDivisionError), ("text", TypeError)):

            def request(operation: Operation, made: Any = made) -> Any:
                if isinstance(made, Exception):
                    raise made
                return made

            with self.with_options(tmp_path, request=request) as backend, pytest.raises(error):
                backend.apply(self.batch(self.pairs(3)))

    # --- order and concurrency ------------------------------------------------------------------------------------

    def test_requests_go_out_some_at_a_time_over_all_shards(self, tmp_path: Path) -> None:
        with self.with_options(tmp_path, concurrency=3) as backend, ThreadPoolExecutor(2) as pool:
            batches = [
                self.batch([(b"%d.%d" % (shard, n), b"!slow") for n in range(10)], first_lsn=100 * shard + 1, shard=shard)
                for shard in range(2)
            ]  # fmt: skip
            assert list(pool.map(backend.apply, batches)) == [[Applied()] * 10] * 2
        assert self.seen(tmp_path)["most_at_once"] == 3

    def test_requests_with_one_key_go_out_in_their_order_and_stop_behind_one_that_failed(
        self, tmp_path: Path
    ) -> None:
        pairs = [
            (b"a", b"1"),
            (b"b", b"!once 500"),
            (b"a", b"2"),
            (b"b", b"2"),
            (b"c", b"!422"),
            (b"c", b"3"),
        ]
        with self.with_options(tmp_path) as backend:
            answer = backend.apply(self.batch(pairs))
            assert [type(outcome) for outcome in answer] == [
                Applied,
                Retry,
                Applied,
                Retry,
                Rejected,
                Applied,
            ]
            assert backend.apply(self.batch([pairs[1], pairs[3]], lsns=(2, 4))) == [Applied(), Applied()]
        effects = self.effects(tmp_path)
        for key, payloads in ((b"a", [b"1", b"2"]), (b"b", [b"!once 500", b"2"]), (b"c", [b"3"])):
            assert [effect["payload"] for effect in effects if effect["key"] == key] == payloads

    def test_with_the_order_of_a_shard_nothing_is_sent_behind_one_that_failed(self, tmp_path: Path) -> None:
        pairs = [(b"a", b"1"), (b"b", b"!500"), (b"c", b"2")]
        with self.with_options(tmp_path, order="shard", concurrency=5) as backend:
            answer = backend.apply(self.batch(pairs))
        assert [type(outcome) for outcome in answer] == [Applied, Retry, Retry]
        assert self.seen(tmp_path)["requests"] == {"a": 1, "b": 1}

    def test_without_an_order_those_with_one_key_go_out_at_once(self, tmp_path: Path) -> None:
        with self.with_options(tmp_path, order="none", concurrency=4) as backend:
            assert backend.apply(self.batch([(b"k", b"!slow")] * 8)) == [Applied()] * 8
        assert self.seen(tmp_path)["most_at_once"] > 1

    # --- statuses -------------------------------------------------------------------------------------------------

    ALONE: ClassVar[dict[str, tuple[Any, str]]] = {
        "!301": (BackendBroken, "301"), "!401": (BackendBroken, "401"), "!403": (BackendBroken, "403"),
        "!405": (BackendBroken, "405"), "!407": (BackendBroken, "407"),
        "!408": (RetryBatch, "408"), "!425": (RetryBatch, "425"), "!429 7": (Throttled, "429"),
        "!500": (ServerError, "what the server says"), "!501": (ServerError, "501"), "!502": (RetryBatch, "502"),
        "!503 7": (Throttled, "503"), "!504": (RetryBatch, "504"), "!599": (ServerError, "599"),
    }  # fmt: skip

    @pytest.mark.parametrize("order", ALONE)
    def test_a_status_that_speaks_of_nobody_or_of_the_server_speaks_for_the_batch(
        self, tmp_path: Path, order: str
    ) -> None:
        error, says = self.ALONE[order]
        with self.with_options(tmp_path) as backend:
            with pytest.raises(error, match=says) as caught:
                backend.apply(self.batch([(b"a", order.encode())]))
            assert type(caught.value) is error
            assert getattr(caught.value, "after", 0.0) == (7.0 if " 7" in order else 0.0)

    @pytest.mark.parametrize("status", [300, 304, 400, 402, 404, 406, 409, 410, 412, 413, 414, 415, 422, 451])
    def test_a_status_that_speaks_of_the_operation_rejects_it_with_what_the_server_says(
        self, tmp_path: Path, status: int
    ) -> None:
        with self.with_options(tmp_path) as backend:
            answer = backend.apply(self.batch([(b"a", b"!%d" % status), (b"b", b"1")]))
        assert isinstance(answer[0], Rejected)
        assert answer[0].error.startswith(f"HTTP {status} ")
        assert status == 304 or "what the server says" in answer[0].error
        assert answer[1] == Applied()

    def test_what_was_applied_before_is_applied(self, tmp_path: Path) -> None:
        with self.with_options(tmp_path, conflict="applied", empty_deletes=True) as backend:
            assert backend.apply(self.batch([(b"a", b"!409")])) == [Applied()]
        self.rest = "status/{key}"
        with self.with_options(tmp_path, empty_deletes=True) as backend:
            assert backend.apply(self.batch([(b"404", b""), (b"410", b"")])) == [Applied(), Applied()]

    WHOLE: ClassVar[dict[int, Any]] = {
        400: BatchRejected, 404: BackendBroken, 410: BackendBroken, 413: BatchTooLarge, 429: Throttled, 500: ServerError,
        502: RetryBatch, 401: BackendBroken,
    }  # fmt: skip

    @pytest.mark.parametrize("status", WHOLE)
    def test_a_status_in_answer_to_a_batch_speaks_for_all_of_it(self, tmp_path: Path, status: int) -> None:
        self.rest = f"status/{status}"
        with self.with_options(tmp_path, batch=True) as backend:
            with pytest.raises(self.WHOLE[status], match=str(status)) as caught:
                backend.apply(self.batch(self.pairs(3)))
            assert type(caught.value) is self.WHOLE[status]

    def test_every_status_means_something(self) -> None:
        for status in range(200, 600):
            for batch in (False, True):
                of_status(status, method="PUT", conflict_is_applied=False, batch=batch)
        assert of_status(299, method="PUT", conflict_is_applied=False, batch=False) is Meaning.APPLIED

    NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    AFTER: ClassVar[dict[str | None, float]] = {
        None: 0.0, "": 0.0, "0": 0.0, " 12 ": 12.0, "999999": AFTER_S_MAX, "9" * 400: AFTER_S_MAX, "-3": 0.0, "1.5": 0.0,
        "soon": 0.0, "\u0663": 0.0, format_datetime(NOW + timedelta(seconds=90), usegmt=True): 90.0,
        format_datetime(NOW - timedelta(days=1), usegmt=True): 0.0,
        format_datetime(NOW + timedelta(days=9), usegmt=True): AFTER_S_MAX,
        "Fri, 02 Jan 2026 03:05:05": 60.0, "Fri, 99 Jan 2026 03:05:05 GMT": 0.0, "Friday, 02-Jan-26 03:04:35 GMT": 30.0,
    }  # fmt: skip

    @pytest.mark.parametrize("value", AFTER)
    def test_a_wait_is_a_number_or_a_date_and_bounded(self, value: str | None) -> None:
        assert retry_after(value, self.NOW) == self.AFTER[value]

    def test_a_redirect_is_never_followed(self, tmp_path: Path) -> None:
        before = httpx.get(self.server.url("elsewhere", "seen")).json()["requests"]
        with (
            self.with_options(tmp_path) as backend,
            pytest.raises(BackendBroken, match=r"127\.0\.0\.1.*not followed"),
        ):
            backend.apply(self.batch([(b"a", b"!moved")]))
        assert httpx.get(self.server.url("elsewhere", "seen")).json()["requests"] == before

    def test_a_body_is_the_result_if_it_is_small_and_asked_for(self, tmp_path: Path) -> None:
        with self.with_options(tmp_path, result_bytes_max=100) as backend:
            answer = backend.apply(self.batch([(b"a", b"1"), (b"b", b"!large"), (b"c", b"!gzip")]))
            assert answer == [Applied(b"done: a"), Applied(), Applied(b"done: c")]
            assert backend.apply(self.batch([(b"d", b"1")], first_lsn=9)) == [Applied(b"done: d")]
            assert not list(backend._target._client.cookies.jar), "nothing of a server's is kept"

    @pytest.mark.parametrize("order", ["!endless", "!cut"])
    def test_a_body_that_nobody_wants_does_not_change_what_the_status_says(
        self, tmp_path: Path, order: str
    ) -> None:
        with self.with_options(tmp_path) as backend:
            pairs = [(b"a", order.encode()), (b"b", b"1"), (b"c", f"{order} 422".encode())]
            answer = backend.apply(self.batch(pairs))
            assert answer[:2] == [Applied(), Applied()]
            assert isinstance(answer[2], Rejected)
            assert "as far as it goes" in answer[2].error
        assert self.seen(tmp_path)["requests"] == {"a": 1, "b": 1, "c": 1}

    @pytest.mark.parametrize("order", ["!endless", "!cut"])
    def test_a_result_that_is_not_complete_is_none(self, tmp_path: Path, order: str) -> None:
        with self.with_options(tmp_path, result_bytes_max=RESULT_BYTES_MAX) as backend:
            backend.limit_time(2.0)
            with pytest.raises(RetryBatch):
                backend.apply(self.batch([(b"a", order.encode())]))

    # --- what comes again -----------------------------------------------------------------------------------------

    def test_a_batch_that_comes_again_sends_only_what_was_not_answered(self, tmp_path: Path) -> None:
        pairs = [(b"a", b"1"), (b"b", b"!422"), (b"c", b"!once 429 2"), (b"d", b"!once 503")]
        with self.with_options(tmp_path, concurrency=1, result_bytes_max=50) as backend:
            with pytest.raises(Throttled) as caught:
                backend.apply(self.batch(pairs))
            assert caught.value.after == 2.0
            with pytest.raises(Throttled):
                backend.apply(self.batch(pairs))
            answer = backend.apply(self.batch(pairs))
            assert [type(outcome) for outcome in answer] == [Applied, Rejected, Applied, Applied]
            assert answer[0] == Applied(b"done: a")
            assert not backend._target._known
            assert not backend._target._known_bytes
        assert self.seen(tmp_path)["requests"] == {"a": 1, "b": 1, "c": 2, "d": 2}

    def test_of_unlogged_operations_nothing_is_remembered(self, tmp_path: Path) -> None:
        pairs = [(b"a", b"1"), (b"c", b"!once 429")]
        with self.with_options(tmp_path, concurrency=1) as backend:
            with pytest.raises(Throttled):
                backend.apply(self.batch(pairs, logged=False))
            assert backend.apply(self.batch(pairs, logged=False)) == [Applied(), Applied()]
        assert self.seen(tmp_path)["requests"] == {"a": 2, "c": 2}
        assert all("Idempotency-Key" not in one for one in self.seen(tmp_path)["headers"])

    def test_an_answer_that_is_lost_makes_it_come_again_and_take_effect_once(self, tmp_path: Path) -> None:
        with self.with_options(tmp_path) as backend:
            with pytest.raises(RetryBatch, match="unknown"):
                backend.apply(self.batch([(b"a", b"!drop")]))
            answer = backend.apply(self.batch([(b"a", b"!drop"), (b"b", b"1")]))
            assert [type(outcome) for outcome in answer] == [Retry, Applied], (
                "the server works, but for this one"
            )
        assert [effect["key"] for effect in self.effects(tmp_path)] in ([b"a", b"b"], [b"b", b"a"])

    def test_a_server_that_says_nothing_costs_no_more_than_the_lane_allows(self, tmp_path: Path) -> None:
        with self.with_options(tmp_path) as backend:
            backend.limit_time(0.6)
            with pytest.raises(RetryBatch):
                backend.apply(self.batch([(b"a", b"!hang")]))
            backend.limit_time(4.0)
            answer = backend.apply(self.batch([(b"a", b"!hang"), (b"b", b"1"), (b"c", b"1")]))
            assert [type(outcome) for outcome in answer] == [Retry, Applied, Applied]

    def test_more_than_fits_into_the_time_asks_for_a_smaller_batch(self, tmp_path: Path) -> None:
        with self.with_options(tmp_path, concurrency=1) as backend:
            backend.limit_time(0.6)
            with pytest.raises(BatchTooLarge) as caught:
                backend.apply(self.batch([(b"%d" % number, b"!slow") for number in range(100)]))
            assert caught.value.count is not None
            assert 0 < caught.value.count < 100

    def test_a_server_that_is_away_is_nobodys_fault(self) -> None:
        backend = as_backend(HttpBackend(f"http://127.0.0.1:{free_port()}/{{key}}"))
        backend.open("put", 1, STORE)  # type: ignore[attr-defined]
        with pytest.raises(RetryBatch, match="was not sent"):
            backend.apply(self.batch(self.pairs(50)))
        backend.close()  # type: ignore[attr-defined]

    def test_a_certificate_is_verified(self) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()

            def answer() -> None:
                with contextlib.suppress(OSError), listener.accept()[0] as client:
                    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

            threading.Thread(target=answer, daemon=True).start()
            backend = as_backend(HttpBackend(f"https://127.0.0.1:{listener.getsockname()[1]}/{{key}}"))
            backend.open("put", 1, STORE)  # type: ignore[attr-defined]
            with pytest.raises(RetryBatch):
                backend.apply(self.batch(self.pairs(1)))
            backend.close()  # type: ignore[attr-defined]

    # --- who asks -------------------------------------------------------------------------------------------------

    def test_a_token_comes_from_the_environment_and_goes_to_its_own_host_only(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with (
            pytest.raises(ConfigError, match="APP_TOKEN holds no token"),
            self.with_options(tmp_path, bearer="APP_TOKEN"),
        ):
            pass
        monkeypatch.setenv("APP_TOKEN", "hunter2")
        with self.with_options(tmp_path, bearer="APP_TOKEN") as backend:
            assert backend.apply(self.batch([(b"a", b"1")])) == [Applied()]
            assert "hunter2" not in f"{backend!r} {backend.url}"
            assert "bearer=APP_TOKEN" in (url_of(backend) or "")

        def elsewhere(operation: Operation) -> Any:
            url = self.server.url(self.name(tmp_path), "objects/x").replace("127.0.0.1", "localhost")
            return httpx.Request("PUT", url, content=operation.payload)

        with self.with_options(tmp_path, bearer="APP_TOKEN", request=elsewhere) as backend:
            assert backend.apply(self.batch([(b"a", b"1")])) == [Applied()]
        sent = [one.get("Authorization") for one in self.seen(tmp_path)["headers"]]
        assert sent == ["Bearer hunter2", None]

    def test_a_token_that_a_server_repeats_is_not_shown(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("APP_TOKEN", "server")
        with self.with_options(tmp_path, bearer="APP_TOKEN") as backend:
            (outcome,) = backend.apply(self.batch([(b"a", b"!422")]))
        assert outcome == Rejected("HTTP 422 Unprocessable Entity: what the [the token] says")

    def test_spaces_and_line_ends_around_a_token_are_no_part_of_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("APP_TOKEN", " hunter2\r\n")
        with self.with_options(tmp_path, bearer="APP_TOKEN") as backend:
            assert backend.apply(self.batch([(b"a", b"1")])) == [Applied()]
        assert self.seen(tmp_path)["headers"][0]["Authorization"] == "Bearer hunter2"

    @pytest.mark.parametrize(
        "token", ["hunter2\nhunter2", "hunter2 x", "hunter2\u00e4", "hunter2\x7f", " \n"]
    )
    def test_a_token_that_no_header_can_hold_is_refused_and_not_shown(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str
    ) -> None:
        monkeypatch.setenv("APP_TOKEN", token)
        with pytest.raises(ConfigError, match="APP_TOKEN holds no") as caught:
            self.make(tmp_path, bearer="APP_TOKEN").open("put", 1, STORE)
        assert "hunter2" not in str(caught.value)
        assert caught.value.__cause__ is None

    def test_a_request_that_cannot_be_sent_is_an_operations_fault_only_if_a_function_made_it(
        self, tmp_path: Path
    ) -> None:
        def request(operation: Operation) -> Any:
            url = self.server.url(self.name(tmp_path), "objects/x")
            headers = {"X": "hunter2\r\nEvil: 1"} if operation.key == b"bad" else {}
            return httpx.Request("PUT", url, headers=headers, content=operation.payload)

        with self.with_options(tmp_path, request=request) as backend:
            answer = backend.apply(self.batch([(b"bad", b"1"), (b"good", b"1")]))
        assert isinstance(answer[0], Rejected)
        assert "header" in answer[0].error
        assert "hunter2" not in answer[0].error
        assert answer[1] == Applied()
        with self.with_options(tmp_path) as backend:
            backend._target._auth = _Bearer("hunter2\n")  # which `open` never lets through
            with pytest.raises(BackendBroken, match="header") as caught:
                backend.apply(self.batch([(b"a", b"1"), (b"b", b"1")]))
        assert "hunter2" not in str(caught.value)

    def test_a_password_comes_from_netrc(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        with (
            pytest.raises(ConfigError, match="netrc cannot be read"),
            self.with_options(tmp_path, netrc=True),
        ):
            pass
        (tmp_path / ".netrc").write_text("machine 127.0.0.1 login app password hunter2\n")
        (tmp_path / ".netrc").chmod(0o600)
        with self.with_options(tmp_path, netrc=True) as backend:
            assert backend.apply(self.batch([(b"a", b"1")])) == [Applied()]
        assert self.seen(tmp_path)["headers"][0]["Authorization"].startswith("Basic ")
        (tmp_path / ".netrc").write_text("machine hunter2 nonsense\n")
        with (
            pytest.raises(ConfigError, match="correct it") as caught,
            self.with_options(tmp_path, netrc=True),
        ):
            pass
        assert "hunter2" not in str(caught.value)

    # --- opening and closing --------------------------------------------------------------------------------------

    def test_it_belongs_to_one_lane_and_closed_it_sends_nothing(self, tmp_path: Path) -> None:
        backend = self.make(tmp_path)
        with pytest.raises(EngineClosed):
            asyncio.run(backend.apply(self.batch(self.pairs(1))))
        backend.open("put", 1, STORE)
        with pytest.raises(ConfigError, match="one of its own"):
            backend.open("other", 1, STORE)
        closing = backend.close()
        assert closing is not None
        asyncio.run(closing)  # type: ignore[arg-type]  # it is a coroutine
        assert backend.close() is None

    def test_a_file_of_certificates_that_is_not_there_is_a_config_error(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="cannot be read"):
            self.make(tmp_path, ca_file=str(tmp_path / "absent")).open("put", 1, STORE)


# --- the whole engine ---------------------------------------------------------------------------------------------

RETRY = wb.RetryPolicy(base_s=0.005, ceiling_s=0.1, breaker_s=0.05, breaker_s_max=0.2)

WORKER = """
import sys
import walbatch as wb

one, whole, store, life = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
retry = wb.RetryPolicy(base_s=0.005, ceiling_s=0.1, breaker_s=0.05, breaker_s_max=0.2)
lanes = {"one": wb.Lane(wb.HttpBackend(one), shards=2, retry=retry),
         "whole": wb.Lane(wb.HttpBackend(whole, batch=True), shards=2, retry=retry)}
engine = wb.Engine.open(store, lanes)
number = life * 1_000_000
while True:
    names = [b"%d" % (number + at) for at in range(5)]
    for lane in lanes:
        engine.submit_many(lane, [(name, name) for name in names])
    print(number, flush=True)
    number += 5
    while engine.stats().pending > 200:
        engine.flush(timeout=60)
"""


def test_kills_of_the_engine_and_of_the_server_leave_each_effect_once(tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    store = str(tmp_path / "store")
    acknowledged: set[bytes] = set()
    with http_server(tmp_path / "server") as server:
        for life in range(3):
            urls = [server.url("one"), server.url("whole", "batch")]
            process = subprocess.Popen(
                [sys.executable, "-c", WORKER, *urls, store, str(life)], stdout=subprocess.PIPE, text=True, cwd=ROOT,
            )  # fmt: skip
            assert process.stdout is not None
            said = [next(process.stdout) for _ in range(20)]
            for _ in range(2):
                server.restart()
                said += [next(process.stdout) for _ in range(10)]
            process.kill()
            said += process.stdout.read().splitlines(keepends=True)
            process.wait(DEADLINE_S)
            process.stdout.close()
            for line in said:
                if line.endswith("\n"):
                    acknowledged.update(b"%d" % (int(line) + at) for at in range(5))
        lanes = {
            "one": wb.Lane(HttpBackend(server.url("one")), shards=2, retry=RETRY),
            "whole": wb.Lane(HttpBackend(server.url("whole", "batch"), batch=True), shards=2, retry=RETRY),
        }
        with wb.Engine.open(store, lanes) as engine:
            engine.flush(timeout=DEADLINE_S)
            assert not engine.dead_letters()
        for name in lanes:
            effects = server.effects(name)
            assert acknowledged <= {effect["key"] for effect in effects}
            assert set(Counter(effect["id"] for effect in effects).values()) == {1}
            assert set(Counter(effect["key"] for effect in effects).values()) == {1}


def test_a_dead_letter_that_is_requeued_keeps_its_name(shared_http: HttpServer, tmp_path: Path) -> None:
    lanes = {"put": wb.Lane(HttpBackend(shared_http.url("letters")), retry=RETRY)}
    with wb.Engine.open(tmp_path / "store", lanes) as engine:
        ticket = engine.submit("put", key=b"a", payload=b"!once 422")
        with pytest.raises(wb.OperationDead, match="HTTP 422"):
            ticket.result(DEADLINE_S)
        engine.requeue()
        engine.flush(timeout=DEADLINE_S)
    names = [
        one["Idempotency-Key"] for one in httpx.get(shared_http.url("letters", "seen")).json()["headers"]
    ]
    assert len(names) == 2
    assert len(set(names)) == 1
    assert names[0].endswith(f"-{ticket.lsn}")


def test_the_command_line_delivers_what_is_left(shared_http: HttpServer, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    with wb.Engine.open(store, {"put": wb.Lane(None, shards=2)}) as engine:
        engine.submit_many("put", [(b"%d" % number, b"x") for number in range(40)])
    command = [sys.executable, "-m", "walbatch", "recover", store]
    url = shared_http.url("cli", "objects/{key}?v=1#method=POST&concurrency=4")
    subprocess.run([*command, "--lane", f"put={url}"], check=True, cwd=ROOT, capture_output=True)
    assert len(shared_http.effects("cli")) == 40
    assert {effect["method"] for effect in shared_http.effects("cli")} == {"POST"}
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)


# --- URLs ---------------------------------------------------------------------------------------------------------

URLS = {
    "https://host/{key}": "https://host/{key}",
    "http://host:81/a/{key}?v=1&w=%20#method=POST": "http://host:81/a/{key}?v=1&w=%20#method=POST",
    "https://host/{key}#concurrency=8&order=key&conflict=rejected": "https://host/{key}",
    "https://host/batch#batch=true&bearer=API": "https://host/batch#batch=true&bearer=API",
    "https://host/?k={key}#netrc=1&conflict=applied&empty_deletes=true&result_bytes_max=9&order=shard&content_type=a/b%3B%20x": (
        "https://host/?k={key}#content_type=a/b%3B%20x&order=shard&empty_deletes=true&conflict=applied&result_bytes_max=9&netrc=true"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("url", "remembered"), URLS.items())
def test_what_is_remembered_of_a_url_makes_it_again(url: str, remembered: str) -> None:
    backend = open_backend(url, allow_python=False)
    assert url_of(backend) == remembered
    assert url_of(open_backend(remembered, allow_python=False)) == remembered
    assert strip_password(remembered) == remembered


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("https://app:hunter2@host/{key}", "holds a user or password"),
        ("https://host/{key}?api_key=hunter2", "would be remembered"),
        ("https://host/{key}?access_token=hunter2", "would be remembered"),
        ("https://{key}.host/x", "not in its host"),
        ("https:///x/{key}", "must be https"),
        ("https://host:port/{key}", "must be https"),
        ("https://host/{name}", "only"),
        ("https://host/{key}#batch=true", "take"),
        ("https://host/{key}#method", "must stand behind"),
        ("https://host/{key}#method=PUT&method=POST", "must stand behind"),
        ("https://host/{key}#nonsense=1", "is not known"),
        ("https://host/{key}#concurrency=x", "is not known"),
        ("https://host/{key}#concurrency=0", "from 1 to"),
        ("https://host/{key}#order=x", "must be one of"),
        ("https://host/{key}#method=P%20T", "name of an HTTP method"),
        ("https://host/{key}#bearer=A&netrc=true", "use one of them"),
    ],
)
def test_a_url_that_cannot_be_right_is_refused_without_its_secrets(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        open_backend(url, allow_python=False)
    assert "hunter2" not in str(caught.value)


def test_what_no_url_can_say_is_not_remembered() -> None:
    assert HttpBackend("https://host/{key}", headers={"X": "secret"}).url is None
    assert HttpBackend("https://host/{key}", request=lambda operation: None).url is None  # type: ignore[arg-type, return-value]
    with pytest.raises(ConfigError, match="function"):
        HttpBackend("https://host/{key}", request=7)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"content_type": "a/b\r\nX-Evil: hunter2"},
        {"content_type": "a/hunter2\u00e4"},
        {"headers": {"X": "hunter2\n"}},
        {"headers": {"X\nhunter2": "1"}},
        {"headers": {"hunter2 ": "1"}},
        {"headers": {"X": 7, "Y": "hunter2"}},
        {"headers": {"Content-Length": "7"}},
        {"headers": {"transfer-encoding": "hunter2"}},
        {"bearer": "hunter2.what.a.token"},
    ],
)
def test_what_no_request_can_have_is_refused_and_not_shown(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        HttpBackend("https://host/{key}", **options)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        *(
            f"https://host/{{key}}?v=1&{name}=hunter2"
            for name in (
                "sig", "key", "auth", "access_key", "accessKey", "AWSAccessKeyId", "credential", "X-Amz-Credential",
                "X-Amz-Signature", "signature", "authorization", "oauth_nonce", "si%67", "subscription-key", "jwt", "pass",
            )
        ),
        "https://host/{key}?hunter2-token",
        "https://host/{key}?token=hunter2;v=1",
        "https://host/{key}?v=1;sig=hunter2",
        "https://app:12?hunter2@host/{key}",
        "https://app:12#hunter2@host/{key}",
        "https://app:12#hunter2=x@host/{key}",
        "https://host/{key}#order=hunter2",
    ],
)  # fmt: skip
def test_what_may_be_a_secret_is_neither_remembered_nor_shown(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_backend(url, allow_python=False)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("query", ["key={key}", "author=ann", "v=1&k={key}", "design=2", "mail=a@b"])
def test_a_query_without_secrets_is_taken(query: str) -> None:
    url = f"https://host/{{key}}?{query}"
    assert HttpBackend(url).url == url


def test_an_address_has_no_fragment() -> None:
    with pytest.raises(ConfigError, match="arguments"):
        HttpBackend("https://host/{key}#hunter2")


def test_every_byte_of_a_key_survives_its_way_into_a_url() -> None:
    for byte in range(256):
        key = bytes([byte]) + b"x"
        made = httpx.URL(fill("https://host/a/{key}/b?k={key}", key))
        escaped = fill("https://host/{key}", key).removeprefix("https://host/")
        assert made.raw_path.decode() == f"/a/{escaped}/b?k={escaped}"


def test_without_httpx_it_is_said_what_to_install() -> None:
    program = (
        "import sys; sys.modules['httpx'] = None\n"
        "import walbatch as wb\n"
        "def url(): wb.backends.open_backend('https://x/{key}', allow_python=False)\n"
        "for use in (lambda: wb.HttpBackend, url):\n"
        "    try: use()\n"
        "    except (ImportError, wb.ConfigError) as error: print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == ["HttpBackend needs httpx: pip install 'walbatch[http]'"] * 2


def test_httpx_is_imported_only_when_it_is_used() -> None:
    program = "import sys, walbatch; assert not {'httpx', 'ssl'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
