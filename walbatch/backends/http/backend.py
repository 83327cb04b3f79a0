"""An HTTP API as a backend: a request for each operation, some at a time, or one for a batch. At least once.

What is not here: how requests are made (`requests`), what answers mean (`meaning`), URLs (`url`).

The idea needed to read it: no server stores our mark, so what was sent may come again, after a crash or a lost answer; a
server that honours `Idempotency-Key` makes once in effect of it. While the process lives, what was answered is remembered
until the whole batch is, so that a batch which comes again, because some of it met a server that asks for a pause, sends only
the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections import OrderedDict, deque
from collections.abc import Awaitable, Mapping, Sequence
from datetime import UTC, datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from netrc import NetrcParseError
from typing import Any, Final

import httpx

from walbatch.backends.http.meaning import CONFLICT, Meaning, Reply, of_error, of_status, retry_after, said
from walbatch.backends.http.requests import Build, Requests, UnbuildableError, check_headers, token_of
from walbatch.backends.http.url import KEY, check_target, check_variable, url_with
from walbatch.errors import (
    BackendBroken,
    BatchRejected,
    BatchTooLarge,
    ConfigError,
    EngineClosed,
    RetryBatch,
    Throttled,
    WalbatchError,
)
from walbatch.limits import MIB
from walbatch.types import Answer, Applied, Batch, Operation, Outcome, Rejected, Retry

CALL_S: Final = 30.0
"""How long a call may take where nobody said: what a lane's `timeout_s` is by default."""

CALL_PART: Final = 0.9
"""The part of it that requests may take, so that the call ends before it is given up."""

REQUEST_PART: Final = 0.5
"""The part of it for which a server may say nothing at all, so that others of the batch can still be answered."""

CONNECT_S: Final = 10.0
CONCURRENCY_MAX: Final = 256
RESULT_BYTES_MAX: Final = MIB
ERROR_BYTES_MAX: Final = 2_048
"""Of a body that is only shown to people."""

BODY_BYTES_MAX: Final = 64 * 1024
"""Of a body that nobody wants, read so that the connection can be used again. A longer one costs a new connection."""

BODY_S: Final = 1.0
BODY_PART: Final = 0.05
"""How long to wait for the rest of such a body, at most; and the part of a call for it. The status has said what counts."""

REMEMBERED_MAX: Final = 65_536
REMEMBERED_BYTES_MAX: Final = 64 * MIB
"""Answers that are remembered, and bytes of results. Beyond it the oldest are forgotten: those requests come again."""

FINAL: Final = frozenset({Meaning.APPLIED, Meaning.REJECTED})
HALTING: Final = frozenset({Meaning.BROKEN, Meaning.THROTTLED, Meaning.AWAY})
"""After such an answer nothing more of a batch is sent."""


class ServerError(WalbatchError):
    """The server failed, and does not say why: some operation may be the cause."""


class HttpBackend:
    """An HTTP API at `url`, for example `https://host/objects/{key}`; `{key}` is the operation's key, percent-escaped.

    - One request for each operation, with its payload as the body, `concurrency` at a time over all shards; those with one key one
      after the other. `method` is "PUT" unless said otherwise; `empty_deletes` makes a DELETE of an empty payload.
    - `batch=True`: one request ("POST") for a batch, with a JSON line for each operation: id, key, payload.
    - `request`, a function of an operation (with `batch`: of a list of them) that returns an `httpx.Request`, in place of both.
    - `order`: "key"; "shard" for a lane with that order: one request at a time, and nothing is sent behind one that failed; "none".
    - `conflict`: "rejected", or "applied" where a 409 says that the operation was applied before.
    - `result_bytes_max`: a body up to so long is the ticket's result, as bytes; 0: none is.
    - `bearer`: the name of an environment variable with a token for `Authorization: Bearer`; `netrc`: user and password come from
      ~/.netrc. Both go to the URL's own host only. `headers` are sent with every request, and never remembered.
    - `ca_file`: certificates to trust instead of the usual ones. They are always verified.

    Redirects are never followed. At least once: each request has an `Idempotency-Key`, which the server should honour.
    """

    def __init__(
        self, url: str, *, method: str | None = None, content_type: str | None = None, headers: Mapping[str, str] | None = None,
        batch: bool = False, request: Build | None = None, order: str = "key", concurrency: int = 8, empty_deletes: bool = False,
        conflict: str = "rejected", result_bytes_max: int = 0, bearer: str | None = None,
        netrc: bool = False, ca_file: str | None = None,
    ) -> None:  # fmt: skip
        problems = check_target(url, batch=batch)
        for name, value, allowed in (
            ("order", order, ("key", "shard", "none")),
            ("conflict", conflict, ("rejected", "applied")),
        ):
            if value not in allowed:
                problems.append(f"{name} must be one of {', '.join(allowed)}")
        for name, number, low, high in (
            ("concurrency", concurrency, 1, CONCURRENCY_MAX),
            ("result_bytes_max", result_bytes_max, 0, RESULT_BYTES_MAX),
        ):
            if isinstance(number, bool) or not isinstance(number, int) or not low <= number <= high:
                problems.append(f"{name} is {number!r}, but must be from {low} to {high:,}")
        if method is not None and not (method.isascii() and method.isalpha()):
            problems.append("method must be the name of an HTTP method, such as PUT")
        if request is not None and not callable(request):
            problems.append(f"request must be a function, not {type(request).__name__}")
        sent = {"Accept-Encoding": "identity", "User-Agent": "walbatch", **(headers or {})}
        if request is None or content_type is not None:
            usual = "application/jsonl" if batch else "application/octet-stream"
            sent.setdefault("Content-Type", usual if content_type is None else content_type)
        problems += check_headers(sent)
        if bearer is not None:
            problems += check_variable(bearer)
        if bearer and netrc:
            problems.append("bearer and netrc both say who asks: use one of them")
        if problems:
            raise ConfigError(*problems)
        self._target = url
        try:
            self._origin = _origin(httpx.URL(url.replace(KEY, "")))
        except httpx.InvalidURL:
            raise ConfigError("the URL of an HttpBackend is none that httpx can read") from None
        self._options: dict[str, Any] = {
            "method": method, "content_type": content_type, "batch": batch or None, "order": None if order == "key" else order,
            "concurrency": None if concurrency == 8 else concurrency, "empty_deletes": empty_deletes or None,  # noqa: PLR2004
            "conflict": None if conflict == "rejected" else conflict, "result_bytes_max": result_bytes_max or None,
            "bearer": bearer, "netrc": netrc or None, "ca_file": ca_file,
        }  # fmt: skip
        self._requests = Requests(
            target=url, method=(method or ("POST" if batch else "PUT")).upper(), headers=sent, empty_deletes=empty_deletes,
            build=request,
        )  # fmt: skip
        self.url: Final = None if headers or request is not None else url_with(url, self._options)
        self.key_bytes_min: Final = 1 if KEY in url else 0
        self._batch, self._order, self._concurrency = batch, order, 1 if order == "shard" else concurrency
        self._conflict_is_applied, self._result_bytes_max = conflict == "applied", result_bytes_max
        self._bearer, self._netrc, self._ca_file = bearer, netrc, ca_file
        self._limit_s: float | None = CALL_S
        # The rest is used on one event loop, and set while nothing runs there.
        self._lane: str | None = None
        self._pid = os.getpid()
        self._client: httpx.AsyncClient | None = None
        self._auth: httpx.Auth | None = None
        self._slots = asyncio.Semaphore(self._concurrency)
        self._known: OrderedDict[int, Reply] = OrderedDict()
        self._known_bytes = 0

    def __repr__(self) -> str:
        use = f"lane {self._lane!r}" if self._lane is not None else "closed"
        return f"<HttpBackend {self._requests.method} {self._target}, {use}>"

    # --- opening and closing --------------------------------------------------------------------------------------

    def limit_time(self, timeout_s: float | None) -> None:
        """How long a call may take, from now on: what the lane allows. None: for ever."""
        self._limit_s = timeout_s

    def open(self, lane: str, shards: int, store: bytes) -> None:
        """Get ready. Nothing is sent: the server may be away. Raises ConfigError for a second lane, and for a missing token."""
        if self._lane is not None:
            raise ConfigError(
                f"{self!r} cannot be the backend of lane {lane!r} too: give each lane one of its own"
            )
        token = token_of(os.environ.get(self._bearer, "")) if self._bearer else None
        if self._bearer and token is None:
            raise ConfigError(
                f"{self!r}: the environment variable {self._bearer} holds no token, which is visible ASCII without spaces: set it, "
                "or leave bearer out"
            )  # fmt: skip
        try:
            self._auth = _Bearer(token) if token else httpx.NetRCAuth() if self._netrc else None
            context = ssl.create_default_context(cafile=self._ca_file)
        except NetrcParseError:
            raise ConfigError(f"{self!r}: ~/.netrc cannot be read: correct it") from None
        except OSError as error:
            what = "~/.netrc" if self._netrc else self._ca_file
            raise ConfigError(f"{self!r}: {what} cannot be read: {error.strerror or error}") from error
        limits = httpx.Limits(max_connections=self._concurrency, max_keepalive_connections=self._concurrency)
        no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=()))
        self._client = httpx.AsyncClient(
            verify=context, limits=limits, follow_redirects=False, cookies=no_cookies
        )
        self._slots, self._known, self._known_bytes = asyncio.Semaphore(self._concurrency), OrderedDict(), 0
        self._lane, self._pid = lane, os.getpid()

    def close(self) -> Awaitable[None] | None:
        """Close the connections, once that is awaited; None where there are none. Idempotent."""
        client, self._client, self._lane = self._client, None, None
        return client.aclose() if client is not None and self._pid == os.getpid() else None

    # --- batches --------------------------------------------------------------------------------------------------

    async def apply(self, batch: Batch) -> Answer:
        """Send what is in the batch, and wait for the answers.

        Crash story: what is answered as applied was answered as taken by the server, and is as durable as that makes it. Killed
        before the engine has heard of it, the engine sends it again, with the same `Idempotency-Key`.

        Returns None or an outcome for each operation; raises a BatchFailure that says what to do, after which what has been
        answered is not sent again by this process.
        """
        client = self._client
        if client is None or self._pid != os.getpid():
            raise EngineClosed(f"{self!r} is not open in this process: open it with an engine")
        if self._batch:
            return await self._apply_whole(client, batch)
        operations = list(batch)
        replies: list[Reply | None] = [self._known.get(operation.identity or 0) for operation in operations]
        known = sum(reply is not None for reply in replies)
        try:
            async with asyncio.timeout(None if self._limit_s is None else CALL_PART * self._limit_s):
                await self._send_all(client, operations, replies, batch.store)
        except TimeoutError:
            if done := sum(reply is not None for reply in replies) - known:
                raise BatchTooLarge(
                    f"{self._target}: {done} of {len(operations)} requests were answered in the time that the lane allows",
                    count=done
                ) from None  # fmt: skip
            raise RetryBatch(
                f"{self._target}: no request was answered in the time that the lane allows"
            ) from None
        return self._conclude(operations, replies)

    async def _send_all(
        self,
        client: httpx.AsyncClient,
        operations: Sequence[Operation],
        replies: list[Reply | None],
        store: bytes,
    ) -> None:
        """Fill in `replies`. Of each chain one at a time, and nothing behind what was not applied."""
        chains: dict[object, list[int]] = {}
        for index, operation in enumerate(operations):
            name = {"key": operation.key, "shard": None}.get(self._order, index)
            chains.setdefault(name, []).append(index)

        async def follow(chain: Sequence[int]) -> None:
            for index in chain:
                reply = replies[index]
                if reply is None:
                    async with self._slots:
                        reply = replies[index] = await self._send_one(client, operations[index], store)
                    self._remember(operations[index], reply)
                if reply.meaning in HALTING:
                    waiting.clear()
                if reply.meaning not in FINAL:
                    return

        waiting = deque(chains.values())

        async def work() -> None:
            while waiting:
                await follow(waiting.popleft())

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._concurrency, len(chains))):
                    group.create_task(work())
        except BaseExceptionGroup as errors:  # of the function that makes requests
            raise errors.exceptions[0] from None

    async def _send_one(self, client: httpx.AsyncClient, operation: Operation, store: bytes) -> Reply:
        try:
            request = self._requests.one(operation, store)
        except UnbuildableError as error:
            return Reply(meaning=Meaning.REJECTED, text=str(error))
        return await self._send(client, request)

    async def _send(self, client: httpx.AsyncClient, request: httpx.Request) -> Reply:
        part_s = None if self._limit_s is None else REQUEST_PART * self._limit_s
        connect_s = CONNECT_S if part_s is None else min(CONNECT_S, part_s)
        request.extensions = {
            **request.extensions, "timeout": {"connect": connect_s, "pool": part_s, "read": part_s, "write": part_s},
        }  # fmt: skip
        auth = self._auth if _origin(request.url) == self._origin else None
        try:
            response = await client.send(request, stream=True, auth=auth, follow_redirects=False)
        except (httpx.HTTPError, httpx.StreamError) as error:
            return of_error(error, is_built=self._requests.build is not None)
        is_wanted = response.is_success and self._result_bytes_max > 0
        body_s = part_s
        if not is_wanted:
            body_s = BODY_S if self._limit_s is None else min(BODY_S, BODY_PART * self._limit_s)
        body = bytearray()
        try:
            async with contextlib.aclosing(response), asyncio.timeout(body_s):
                await self._read(response, body)
        except (httpx.HTTPError, httpx.StreamError, TimeoutError) as error:
            if is_wanted:
                return Reply(
                    meaning=Meaning.UNKNOWN, text=f"its answer ends too early: {type(error).__name__}"
                )
        return self._reply(request.method, response, bytes(body))

    async def _read(self, response: httpx.Response, body: bytearray) -> None:
        """The beginning of a body, as far as anybody wants it. Compressed ones are not asked for, and not unpacked."""
        wanted = self._result_bytes_max + 1 if response.is_success else ERROR_BYTES_MAX
        most, size = max(wanted, BODY_BYTES_MAX), 0
        async for part in response.aiter_raw():
            body += part[: wanted - len(body)]
            size += len(part)
            if size > most:
                return

    def _reply(self, method: str, response: httpx.Response, body: bytes) -> Reply:
        status = response.status_code
        meaning = of_status(
            status, method=method, conflict_is_applied=self._conflict_is_applied, batch=self._batch
        )
        if meaning is Meaning.APPLIED:
            fits = self._result_bytes_max and len(body) <= self._result_bytes_max and status != CONFLICT
            return Reply(meaning=meaning, result=body if fits else None)
        if meaning is Meaning.TOO_LARGE and not self._batch:
            meaning = Meaning.REJECTED
        after_s = retry_after(response.headers.get("Retry-After"), datetime.now(UTC))
        if isinstance(self._auth, _Bearer):  # some servers repeat what they were asked with
            body = self._auth.hidden(body)
        text = said(status, response.reason_phrase, body, _moved_to(response))
        return Reply(meaning=meaning, text=text, after_s=after_s)

    # --- what becomes of it ---------------------------------------------------------------------------------------

    def _conclude(self, operations: Sequence[Operation], replies: Sequence[Reply | None]) -> Answer:
        """What the engine is told. Raises what speaks for all of a batch of which something is not final."""
        open_ = [reply for reply in replies if reply is not None and reply.meaning not in FINAL]
        if open_:
            self._raise_for(open_, len(operations), all_failed=len(open_) == sum(map(bool, replies)))
        outcomes: list[Outcome] = []
        for operation, reply in zip(operations, replies, strict=True):
            self._forget(operation.identity or 0)
            if reply is None:
                outcomes.append(Retry(error="it waits for an earlier one"))
            elif reply.meaning is Meaning.APPLIED:
                outcomes.append(Applied(reply.result))
            elif reply.meaning is Meaning.REJECTED:
                outcomes.append(Rejected(reply.text))
            else:
                outcomes.append(Retry(reply.after_s, reply.text))
        return outcomes

    def _raise_for(self, replies: Sequence[Reply], count: int, *, all_failed: bool) -> None:
        """Raise for what is nobody's fault. What the server failed at while it did others is left: it is those operations' own."""
        after_s = max(reply.after_s for reply in replies)
        for meaning in (Meaning.BROKEN, Meaning.THROTTLED, Meaning.AWAY):
            if found := next((reply for reply in replies if reply.meaning is meaning), None):
                text = f"{self._target}: {found.text}"
                if meaning is Meaning.BROKEN:
                    raise BackendBroken(text)
                raise (Throttled if meaning is Meaning.THROTTLED else RetryBatch)(text, after=after_s)
        if not all_failed:
            return
        text = f"{self._target}: {replies[0].text}"
        if any(reply.meaning is Meaning.UNKNOWN for reply in replies):
            raise RetryBatch(text, after=after_s)
        if any(reply.meaning is Meaning.FAILED for reply in replies):
            raise ServerError(text)

    async def _apply_whole(self, client: httpx.AsyncClient, batch: Batch) -> Answer:
        operations = list(batch)
        request = self._requests.whole(operations, batch.store)
        try:
            async with (
                asyncio.timeout(None if self._limit_s is None else CALL_PART * self._limit_s),
                self._slots,
            ):
                reply = await self._send(client, request)
        except TimeoutError:
            raise RetryBatch(
                f"{self._target}: the request was not answered in the time that the lane allows"
            ) from None
        text = f"{self._target}: {reply.text}"
        match reply.meaning:
            case Meaning.APPLIED:
                return None if reply.result is None else [Applied(reply.result) for _ in operations]
            case Meaning.REJECTED:
                raise BatchRejected(text)
            case Meaning.TOO_LARGE:
                raise BatchTooLarge(text)
            case _:
                self._raise_for([reply], len(operations), all_failed=True)
                raise AssertionError(reply)

    def _remember(self, operation: Operation, reply: Reply) -> None:
        if operation.identity is None or reply.meaning not in FINAL:
            return
        self._forget(operation.identity)
        self._known[operation.identity] = reply
        self._known_bytes += len(reply.result or b"")
        while len(self._known) > REMEMBERED_MAX or self._known_bytes > REMEMBERED_BYTES_MAX:
            self._forget(next(iter(self._known)))

    def _forget(self, identity: int) -> None:
        reply = self._known.pop(identity, None)
        if reply is not None:
            self._known_bytes -= len(reply.result or b"")


class _Bearer(httpx.Auth):
    """A token, which no representation shows."""

    def __init__(self, token: str) -> None:
        self._token = token

    def hidden(self, text: bytes) -> bytes:
        """A text without it."""
        return text.replace(self._token.encode(), b"[the token]")

    def auth_flow(self, request: httpx.Request) -> Any:
        """Add it."""
        request.headers["Authorization"] = f"Bearer {self._token}"
        yield request


def _moved_to(response: httpx.Response) -> str | None:
    """Where a redirect leads, without what may be a secret in it."""
    if not response.has_redirect_location:
        return None
    try:
        return httpx.URL(response.headers["Location"]).host or "another path"
    except httpx.InvalidURL:
        return "nowhere"


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port
