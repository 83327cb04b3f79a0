"""Peers that are servers: Redis streams and NATS JetStream, each started for one measurement and always stopped.

What is not here: a server that runs already. Those started here listen on a port of their own, on loopback, and keep their files
in the folder of the measurement.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import socket
import subprocess
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar

from walbatch.bench.subject import DRAIN_COUNT, Subject, Take, load

LOOPBACK: Final = "127.0.0.1"
START_S: Final = 15.0
STOP_S: Final = 10.0
POLL_S: Final = 0.01
CONNECTIONS_MAX: Final = 64
NATS_PENDING_MAX: Final = 8_192
SYNC_ALWAYS: Final = (2, 10)
"""The first nats-server that knows `sync_interval: always`."""

_T = TypeVar("_T")


class Server:
    """A child process that listens. In a session of its own, so that Ctrl-C reaches it through `stop` only."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        log = (folder / "server.log").open("wb")
        with log:
            self._process = subprocess.Popen(  # noqa: S603 - a program that the caller has named
                list(command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=folder
            )  # fmt: skip
        self._log = folder / "server.log"

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def await_port(self, port: int) -> None:
        """Return once it accepts connections. Raises RuntimeError if it ends, or does not within `START_S`."""
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, port), timeout=1):
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                last = self._log.read_text(errors="replace").strip().splitlines()[-1:]
                raise RuntimeError(f"the server did not start: {' '.join(last) or 'it said nothing'}")
            time.sleep(POLL_S)

    def stop(self) -> None:
        """End the process, by force where it does not listen."""
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def free_port() -> int:
    """A port that nobody listens on, a moment ago."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


@functools.cache
def server_version(program: str) -> str:
    """What a server says that its version is: numbers and points, or nothing."""
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout  # noqa: S603
    found = re.search(r"\bv=?(\d+(?:\.\d+)+)", said)
    return found[1] if found else ""


class _Served(Subject):
    """What a server keeps."""

    @classmethod
    def release(cls) -> str:
        """Those of the client and of the server."""
        return f"{super().release()}, {cls.program} {server_version(cls.program)}"


class RedisStream(_Served):
    """A stream whose every write is synced before the answer; clients that wait at once share a sync."""

    name: ClassVar[str] = "redis"
    title: ClassVar[str] = "Redis stream (appendfsync always)"
    note: ClassVar[str] = "a server of its own, over loopback"
    modules: ClassVar[tuple[str, ...]] = ("redis",)
    package: ClassVar[str] = "redis"
    program: ClassVar[str] = "redis-server"

    def __init__(self) -> None:
        super().__init__()
        self._server: Server | None = None
        self._client: Any = None
        self._async_client: Any = None
        self._port = 0

    def open(self, folder: Path) -> None:
        """Start the server and a client."""
        self._start(folder)
        self._client = load("redis").Redis(host=LOOPBACK, port=self._port)
        self._client.ping()

    def _start(self, folder: Path) -> None:
        self._port = free_port()
        options = {
            "--bind": LOOPBACK,
            "--port": str(self._port),
            "--dir": str(folder),
            "--appendonly": "yes",
            "--appendfsync": "always",
            "--save": "",
        }
        self._server = Server([self.program, *(word for pair in options.items() for word in pair)], folder)
        self._server.await_port(self._port)

    def item(self, key: bytes, payload: bytes) -> dict[str, bytes]:
        """An entry of the stream."""
        return {"k": key, "p": payload}

    def group(self, keys: Sequence[bytes], payloads: Sequence[bytes]) -> list[dict[str, bytes]]:
        """Entries of the stream."""
        return [self.item(key, payload) for key, payload in zip(keys, payloads, strict=True)]

    def put(self, item: Any) -> None:
        """Add an entry; each thread has a connection of the client's pool."""
        self._client.xadd("stream", item)

    def put_group(self, group: Any) -> None:
        """Add entries in one pipeline: what arrives together is synced together."""
        pipeline = self._client.pipeline(transaction=False)
        for item in group:
            pipeline.xadd("stream", item)
        pipeline.execute()

    def drain(self, count: int, take: Take) -> int:
        """Read a thousand as a consumer of a group, acknowledge and delete them."""
        self._client.xgroup_create("stream", "group", id="0")
        drained = 0
        while found := self._client.xreadgroup("group", "consumer", {"stream": ">"}, count=DRAIN_COUNT):
            (_, entries), *_ = found.items() if isinstance(found, dict) else found
            rows = entries[0] if isinstance(found, dict) else entries
            take([fields[b"p"] for _, fields in rows])
            numbers = [number for number, _ in rows]
            pipeline = self._client.pipeline(transaction=False)
            pipeline.xack("stream", "group", *numbers)
            pipeline.xdel("stream", *numbers)
            pipeline.execute()
            drained += len(rows)
        return drained

    def close(self) -> None:
        """Close the client and stop the server."""
        try:
            if self._client is not None:
                self._client.close()
        finally:
            self._client = None
            if self._server is not None:
                self._server.stop()
                self._server = None

    async def open_in_loop(self, folder: Path) -> None:
        """Start the server and a client for tasks, which waits for one of `CONNECTIONS_MAX` connections."""
        self._start(folder)
        library = load("redis.asyncio")
        pool = library.BlockingConnectionPool(
            host=LOOPBACK, port=self._port, max_connections=CONNECTIONS_MAX, timeout=None
        )
        self._async_client = library.Redis(connection_pool=pool)

    async def put_in_loop(self, item: Any) -> None:
        """Add an entry."""
        await self._async_client.xadd("stream", item)

    async def close_in_loop(self) -> None:
        """Close the client and stop the server."""
        try:
            if self._async_client is not None:
                await self._async_client.connection_pool.disconnect()
        finally:
            self._async_client = None
            self.close()


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".") if part)


class NatsJetStream(_Served):
    """A stream in files, which the server syncs when it pleases unless it knows how to do it always."""

    name: ClassVar[str] = "nats"
    title: ClassVar[str] = "NATS JetStream (file)"
    modules: ClassVar[tuple[str, ...]] = ("nats",)
    package: ClassVar[str] = "nats-py"
    program: ClassVar[str] = "nats-server"
    syncs: ClassVar[bool] = False
    note: ClassVar[str] = (
        "does not wait for the disk: this server's version has no sync_interval: always (2.10 has)"
    )
    workloads: ClassVar[frozenset[str]] = Subject.workloads - {"w2"}

    def __init__(self) -> None:
        super().__init__()
        self._server: Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connection: Any = None
        self._stream: Any = None

    @classmethod
    def missing(cls) -> str:
        """What to install; also finds out what the server that is there can do."""
        lacking = super().missing()
        if not lacking and _numbers(server_version(cls.program)) >= SYNC_ALWAYS:
            cls.syncs = True
            cls.note = "a server of its own, over loopback, sync_interval: always"
        return lacking

    def open(self, folder: Path) -> None:
        """Start the server, and a client in a loop of its own."""
        self._loop = asyncio.new_event_loop()
        self._run(self._begin, folder)

    def _run(self, step: Callable[..., Coroutine[Any, Any, _T]], *arguments: Any) -> _T:
        assert self._loop is not None
        return self._loop.run_until_complete(step(*arguments))

    async def _begin(self, folder: Path) -> None:
        port = free_port()
        sync = "\n  sync_interval: always" if self.syncs else ""
        settings = folder / "nats.conf"
        settings.write_text(
            f'listen: "{LOOPBACK}:{port}"\njetstream {{\n  store_dir: "{folder / "jetstream"}"{sync}\n}}\n'
        )
        self._server = Server([self.program, "-c", str(settings)], folder)
        self._server.await_port(port)
        self._connection = await load("nats").connect(f"nats://{LOOPBACK}:{port}")
        self._stream = self._connection.jetstream(publish_async_max_pending=NATS_PENDING_MAX)
        await self._stream.add_stream(name="stream", subjects=["stream.>"], storage="file")

    def item(self, key: bytes, payload: bytes) -> bytes:
        """The payload."""
        return payload

    def group(self, keys: Sequence[bytes], payloads: Sequence[bytes]) -> Sequence[bytes]:
        """The payloads."""
        return payloads

    def put(self, item: Any) -> None:
        """Publish and wait for the answer."""
        self._run(self.put_in_loop, item)

    def put_group(self, group: Any) -> None:
        """Publish, then wait for all answers."""
        self._run(self._publish, group)

    async def _publish(self, group: Sequence[bytes]) -> None:
        await asyncio.gather(*[await self._stream.publish_async("stream.put", item) for item in group])

    def drain(self, count: int, take: Take) -> int:
        """Fetch a thousand, acknowledge each."""
        return self._run(self._fetch, count, take)

    async def _fetch(self, count: int, take: Take) -> int:
        subscription = await self._stream.pull_subscribe("stream.put", "durable")
        drained = 0
        while drained < count:
            messages = await subscription.fetch(min(DRAIN_COUNT, count - drained), timeout=START_S)
            take([message.data for message in messages])
            for message in messages:
                await message.ack()
            drained += len(messages)
        await self._connection.flush()
        return drained

    def close(self) -> None:
        """Close the client and stop the server."""
        if self._loop is not None:
            try:
                self._run(self.close_in_loop)
            finally:
                self._loop.close()
                self._loop = None

    async def open_in_loop(self, folder: Path) -> None:
        """Start the server, and a client in the running loop."""
        await self._begin(folder)

    async def put_in_loop(self, item: Any) -> None:
        """Publish and wait for the answer."""
        await self._stream.publish("stream.put", item)

    async def close_in_loop(self) -> None:
        """Close the client and stop the server."""
        try:
            if self._connection is not None:
                await self._connection.close()
        finally:
            self._connection = None
            if self._server is not None:
                self._server.stop()
                self._server = None
