"""An HTTP API for tests, in a process of its own that can be killed: `python3 tests/backends/http_server.py FOLDER PORT`.

What is not here: mercy. It answers what the payload of a request asks for, and keeps what took effect in a synced file.

It honours `Idempotency-Key`: a request whose key is in the file changes nothing more, also after a kill. Paths are
`/NAME/...`: each NAME has a file of its own, with a JSON line for each effect.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

START_S = 30.0
HANG_S = 600.0


class Names:
    """What took effect, by name; one file each, and what else tests ask for. All of it under one lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.Lock()
        self.ids: dict[str, set[str]] = {}
        self.requests: dict[str, Counter[str]] = {}
        self.headers: dict[str, list[dict[str, str]]] = {}
        self.at_once: Counter[str] = Counter()
        self.most_at_once: Counter[str] = Counter()

    def apply(self, name: str, effects: list[dict[str, Any]]) -> None:
        """Keep effects, all or none, but for those that are there."""
        with self.lock:
            path = self.folder / f"{name}.jsonl"
            ids = self.ids.get(name)
            if ids is None:
                ids = self.ids[name] = {effect["id"] for effect in read(path) if effect["id"]}
                if path.exists():  # what a kill cut off was never answered
                    data = path.read_bytes()
                    os.truncate(path, data.rfind(b"\n") + 1)
            fresh = [effect for effect in effects if not effect["id"] or effect["id"] not in ids]
            with path.open("ab", buffering=0) as file:
                file.write("".join(f"{json.dumps(effect)}\n" for effect in fresh).encode())
                os.fsync(file.fileno())
            ids.update(effect["id"] for effect in fresh if effect["id"])


def read(path: Path) -> list[dict[str, Any]]:
    """The effects in a file."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    found = []
    for line in lines:
        effect = json.loads(line)
        effect["key"] = base64.b64decode(effect["key"])
        effect["payload"] = base64.b64decode(effect["payload"])
        found.append(effect)
    return found


class Answers(BaseHTTPRequestHandler):
    """A payload that begins with `!` is an order, all else takes effect.

    `!429 3` (a status, with Retry-After), `!once 500`, `!hang`, `!drop` (take effect, say nothing), `!slow`, `!large`,
    `!gzip`, `!moved`, `!endless` and `!cut` (200 or the status behind it, and a body that does not end, or not as promised).
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    names: Names

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, _, query = self.path.partition("?")
        _, name, kind, *rest = path.split("/")
        key = unquote_to_bytes("/".join(rest) or query.removeprefix("key="))
        names = self.names
        with names.lock:
            names.at_once[name] += 1
            names.most_at_once[name] = max(names.most_at_once[name], names.at_once[name])
            names.requests.setdefault(name, Counter())[key.decode("latin-1")] += 1
            count = names.requests[name][key.decode("latin-1")]
            names.headers.setdefault(name, []).append(
                {**self.headers, "method": self.command, "path": self.path}
            )
        try:
            self._answer(name, kind, key, body, count)
        finally:
            with names.lock:
                names.at_once[name] -= 1
        self.wfile.flush()

    do_POST = do_DELETE = do_PATCH = do_PUT  # noqa: N815 - the library finds them by their names

    def _answer(self, name: str, kind: str, key: bytes, body: bytes, count: int) -> None:
        order = body.decode("latin-1") if body.startswith(b"!") else ""
        if kind == "status":
            order, key = f"!{key.decode().partition('/')[0]}", b""
        once = order.startswith("!once ")
        if once:
            order = f"!{order[6:]}" if count == 1 else ""
        if match := re.fullmatch(r"!(\d+)(?: (.*))?", order):
            headers = {"Retry-After": match[2]} if match[2] else {}
            self._reply(int(match[1]), b"what the server says", headers)
            return
        if order == "!moved":
            host, port = self.connection.getsockname()
            self._reply(307, b"", {"Location": f"http://{host}:{port}/elsewhere/objects/x"})
            return
        if match := re.fullmatch(r"!(endless|cut)(?: (\d+))?", order):
            status = int(match[2] or 200)
            if status == 200:
                self.names.apply(name, [effect(self.command, self.headers.get("Idempotency-Key"), key, body)])
            self._begin(status, ends=match[1] == "cut")
            return
        if order == "!hang":
            time.sleep(HANG_S)
        if order == "!slow":
            time.sleep(0.03)
        if kind == "batch":
            lines = [json.loads(line) for line in body.splitlines()]
            pairs = [(field(one, "key"), field(one, "payload")) for one in lines]
            self.names.apply(
                name, [effect("POST", one.get("id"), *pair) for one, pair in zip(lines, pairs, strict=True)]
            )
        else:
            self.names.apply(name, [effect(self.command, self.headers.get("Idempotency-Key"), key, body)])
        if order == "!drop":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        headers = {"Set-Cookie": f"c{count}=1"}
        if order == "!gzip":
            headers["Content-Encoding"] = "gzip"
        self._reply(200, b"x" * 200_000 if order == "!large" else b"done: " + key, headers)

    def do_GET(self) -> None:
        names, name = self.names, self.path.split("/")[1]
        with names.lock:
            found: dict[str, Any] = {
                "requests": names.requests.get(name, {}), "headers": names.headers.get(name, []),
                "most_at_once": names.most_at_once[name],
            }  # fmt: skip
        self._reply(200, json.dumps(found).encode(), {})

    def _reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _begin(self, status: int, *, ends: bool) -> None:
        """A body that is cut off, or goes on until nobody reads it any more."""
        self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(b"as far as it goes")
            self.wfile.flush()
            while not ends:
                time.sleep(0.05)
                self.wfile.write(b".")
                self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def effect(method: str, id_: str | None, key: bytes, payload: bytes) -> dict[str, Any]:
    return {
        "method": method, "id": id_, "key": base64.b64encode(key).decode(), "payload": base64.b64encode(payload).decode(),
    }  # fmt: skip


def field(line: dict[str, str], name: str) -> bytes:
    return line[name].encode() if name in line else base64.b64decode(line[f"{name}_base64"])


class HttpServer:
    """The process, and its folder. `url(...)` is how to reach it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = 0
        self.process: subprocess.Popen[str] | None = None

    def url(self, name: str, rest: str = "objects/{key}") -> str:
        return f"http://127.0.0.1:{self.port}/{name}/{rest}"

    def start(self) -> None:
        command = [sys.executable, __file__, str(self.folder), str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def kill(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait(START_S)
            if process.stdout is not None:
                process.stdout.close()

    def restart(self) -> None:
        self.kill()
        self.start()

    def effects(self, name: str) -> list[dict[str, Any]]:
        """What took effect, in its order."""
        return read(self.folder / f"{name}.jsonl")


@contextlib.contextmanager
def http_server(folder: Path) -> Iterator[HttpServer]:
    """A running server, which is killed in the end."""
    made = HttpServer(folder)
    try:
        made.start()
        yield made
    finally:
        made.kill()


def main() -> None:
    Answers.names = Names(Path(sys.argv[1]))
    listening = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Answers)
    print(listening.server_port, flush=True)
    listening.serve_forever()


if __name__ == "__main__":
    main()
