"""How fast operations get into Redis, and out over HTTP, by batch size: `python3 tools/redis_commands.py [--http]`.

Ways of sending the same commands are measured against each other, and against `apply` of the backend, which also stores the mark:
all in one run, because the machine decides the figures, and only their ratios say something. Redis syncs before it answers. The
ways take turns, so that a disturbance hits all of them alike; what is printed is operations a second of the best batch.

Needs the package with its development tools, and Debian's package redis-server. The folder should lie on a disk, not in memory.
"""

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import httpx
import redis

import walbatch as wb
from tests.backends.http_server import http_server
from tools.redis_server import RedisServer, server
from walbatch.backends import as_backend

STORE = b"sixteen bytes..."
SIZES = (1, 10, 100, 1_000)
ROUNDS_MAX = 100
ROWS_WANTED = 60_000
Rows = list[tuple[bytes, bytes]]
Way = Callable[[Rows], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--http", action="store_true", help="measure HTTP instead")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("/var/tmp"),  # noqa: S108
        help="on a disk (default %(default)s)",
    )
    arguments = parser.parse_args()
    if arguments.http:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, http_server(Path(folder)) as api:
            url = api.url("plain", "status/200")
            measure("HTTP", http_ways(url, api.url("lines", "status/200/lines")), rows_wanted=2_000)
        return
    with server(arguments.folder) as running:
        measure("Redis, strings", string_ways(running), rows_wanted=ROWS_WANTED)
    with server(arguments.folder) as running:
        measure("Redis, lists", list_ways(running), rows_wanted=ROWS_WANTED)


def measure(title: str, ways: dict[str, Way], *, rows_wanted: int) -> None:
    """A table in Markdown: a line for each size, a column for each way."""
    print(f"\n| {title}: operations a second | {' | '.join(ways)} |\n|---|{'---|' * len(ways)}")
    for size in SIZES:
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        turns = list(ways.items())
        for _ in range(max(5, min(ROUNDS_MAX, rows_wanted // size))):
            turns.append(
                turns.pop(0)
            )  # who comes first is not always the same: a sync is quicker behind some others
            for name, way in turns:
                rows = [(os.urandom(16).hex().encode(), os.urandom(100)) for _ in range(size)]
                started = time.perf_counter()
                way(rows)
                seconds[name].append(time.perf_counter() - started)
        rates = [f"{size / min(taken):,.0f}" for taken in seconds.values()]
        print(f"| {size:,} | {' | '.join(rates)} |", flush=True)


def through(target: Any) -> Way:
    """`apply` of an open backend."""
    backend: Any = as_backend(target)
    backend.open("rows", 1, STORE)
    last = 0

    def apply(rows: Rows) -> None:
        nonlocal last
        lsns = range(last + 1, last + 1 + len(rows))
        last += len(rows)
        keys, payloads = [key for key, _ in rows], [payload for _, payload in rows]
        batch = wb.Batch(
            lane="rows", shard=0, store=STORE, lsns=lsns, keys=keys, payloads=payloads, priorities=[5] * len(rows), attempt=1,
            reason=wb.CutReason.COUNT, mark=wb.Mark(epoch=1, watermark=last),
        )  # fmt: skip
        answer = backend.apply(batch)
        assert answer is None or all(type(outcome) is wb.Applied for outcome in answer)

    return apply


def client_of(running: RedisServer) -> Any:
    return redis.Redis(unix_socket_path=str(running.socket))


def string_ways(running: RedisServer) -> dict[str, Way]:
    client = client_of(running)

    def pipeline(rows: Rows) -> None:
        queue = client.pipeline(transaction=False)
        for key, payload in rows:
            queue.set(key, payload)
        queue.execute()

    def transaction(rows: Rows) -> None:
        queue = client.pipeline(transaction=True)
        queue.watch("mark")
        queue.get("mark")
        queue.multi()
        for key, payload in rows:
            queue.set(key, payload)
        queue.set("mark", bytes(48))
        queue.execute()

    return {
        "pipeline of SET": pipeline,
        "MSET": lambda rows: client.mset(dict(rows)),
        "WATCH, MULTI, SET": transaction,
        "`RedisBackend`": through(wb.RedisBackend(running.url(), "b:")),
    }


def list_ways(running: RedisServer) -> dict[str, Way]:
    client = client_of(running)

    def pipeline(rows: Rows) -> None:
        queue = client.pipeline(transaction=False)
        for key, payload in rows:
            queue.rpush(key, payload)
        queue.execute()

    def write(queue: Any, operation: wb.Operation) -> None:
        queue.rpush(operation.key, operation.payload)

    return {
        "pipeline of RPUSH": pipeline,
        '`RedisBackend`, type "list"': through(
            wb.RedisBackend(running.url(), wb.RedisKeys("b:", type="list"))
        ),
        "`RedisBackend`, `write`": through(wb.RedisBackend(running.url(), write=write)),
    }


def http_ways(plain: str, lines: str) -> dict[str, Way]:
    """The server does nothing but answer: what is measured is what asking costs."""
    client = httpx.Client()
    many = httpx.AsyncClient(limits=httpx.Limits(max_connections=8, max_keepalive_connections=8))
    loop = asyncio.new_event_loop()

    def one_by_one(rows: Rows) -> None:
        for _, payload in rows:
            client.put(plain, content=payload)

    async def eight(rows: Rows) -> None:
        waiting = iter(rows)

        async def work() -> None:
            for _, payload in waiting:
                await many.put(plain, content=payload)

        await asyncio.gather(*(work() for _ in range(8)))

    return {
        "httpx, one by one": one_by_one,
        "httpx, eight at a time": lambda rows: loop.run_until_complete(eight(rows)),
        "`HttpBackend`": through(wb.HttpBackend(plain + "/{key}")),
        "`HttpBackend`, `batch`": through(wb.HttpBackend(lines, batch=True)),
    }


if __name__ == "__main__":
    main()
