"""A fork server: a process that has imported everything and has no threads, and forks a worker whenever it is told to.

What is not here: what a worker does (`worker`). Starting an interpreter takes half a second, forking this one takes two
milliseconds: that is the difference between forty and a thousand process kills a minute.

The idea needed to read it: a worker speaks through a pipe, one message after the other, each with its length; what it said
before it was killed is whole messages and perhaps a part of one, which does not count.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

ROOT: Final = Path(__file__).resolve().parent.parent.parent

PIPE_BYTES: Final = 1 << 20
"""Room between a worker and its listener, so that speaking rarely waits. Refused politely where the system allows less."""

F_SETPIPE_SZ: Final = 1031
REQUEST_BYTES_MAX: Final = 1 << 16
START_S: Final = 60.0

_LENGTH: Final = struct.Struct("<I")

Message = tuple[list[Any], bytes]
"""What was said: a word with its fields, and raw bytes (mostly none)."""


class Channel:
    """The worker's end: says one message at a time, from any thread."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()

    def say(self, *fields: object, raw: bytes = b"") -> None:
        """One message. Returns when it is in the pipe: a kill after that does not take it back."""
        body = json.dumps(fields, separators=(",", ":")).encode() + b"\n" + raw
        data = memoryview(_LENGTH.pack(len(body)) + body)
        with self._lock:
            while data:
                data = data[os.write(self._fd, data) :]


class Worker:
    """The parent's end of one worker: hears it, kills it, and learns how it ended."""

    def __init__(self, server: ForkServer, pid: int, fd: int) -> None:
        self._server = server
        self.pid = pid
        self._fd = fd
        self._buffer = bytearray()
        self._ended = False
        self.code: int | None = None
        """Exit code, or minus the signal's number, once it is reaped."""

    def hear(self, until: float) -> Message | None:
        """The next message; None when the time `until` (monotonic) has come or nobody will say anything any more."""
        while True:
            message = self._next()
            if message is not None or self._ended:
                return message
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._fd], [], [], left)[0]:
                return None
            data = os.read(self._fd, PIPE_BYTES)
            self._ended = not data
            self._buffer += data

    def _next(self) -> Message | None:
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        end = _LENGTH.size + length
        if len(self._buffer) < end:
            return None
        fields, _, raw = bytes(self._buffer[_LENGTH.size : end]).partition(b"\n")
        del self._buffer[:end]
        return json.loads(fields), raw

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, unless it was reaped."""
        if self.code is None:
            os.kill(self.pid, number)

    def end(self) -> list[Message]:
        """Kill it, unless it has ended; all that it had still said."""
        self.send(signal.SIGKILL)
        rest = []
        while (message := self.hear(time.monotonic() + START_S)) is not None:
            rest.append(message)
        self.reap()
        return rest

    def reap(self) -> int:
        """Wait for its end. Its exit code, or minus the number of the signal that ended it."""
        if self.code is None:
            self.code = int(self._server.ask({"reap": self.pid})["code"])
            os.close(self._fd)
        return self.code


class ForkServer:
    """Starts workers. A context manager: at its end no worker is left."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = ours
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tools.modes.forks", str(theirs.fileno())],
                cwd=ROOT, env={**os.environ, **(environment or {})}, pass_fds=[theirs.fileno()],
            )  # fmt: skip
        ours.settimeout(START_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._process.wait(START_S)

    def start(self, task: Mapping[str, object]) -> Worker:
        """Fork a worker for `task`."""
        reader, writer = os.pipe()
        with contextlib.suppress(OSError):
            import fcntl  # noqa: PLC0415 - the one use

            fcntl.fcntl(writer, F_SETPIPE_SZ, PIPE_BYTES)
        try:
            answer = self.ask(task, [writer])
        finally:
            os.close(writer)
        return Worker(self, int(answer["pid"]), reader)

    def ask(self, request: Mapping[str, object], fds: Sequence[int] = ()) -> dict[str, Any]:
        """One request, one answer."""
        socket.send_fds(self._socket, [json.dumps(request).encode()], fds)
        answer: dict[str, Any] = json.loads(self._socket.recv(REQUEST_BYTES_MAX))
        return answer


# --- the server's process ---------------------------------------------------------------------------------------------


def serve(connection: socket.socket) -> None:
    """Fork and reap as told, until the other end is closed; kill what is left then."""
    from tools.modes import worker  # noqa: PLC0415 - the parent needs none of it

    worker.warm_up()
    gc.collect()
    gc.freeze()
    alive: set[int] = set()
    while True:
        data, fds, _, _ = socket.recv_fds(connection, REQUEST_BYTES_MAX, 1)
        if not data:
            break
        request = json.loads(data)
        if "reap" in request:
            pid = request["reap"]
            alive.discard(pid)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            connection.send(json.dumps({"code": code}).encode())
            continue
        pid = os.fork()
        if pid == 0:
            connection.close()
            worker.run(request, Channel(fds[0]))  # does not return
        os.close(fds[0])
        alive.add(pid)
        connection.send(json.dumps({"pid": pid}).encode())
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    # The terminal's Ctrl-C is for the parent, which then closes its end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as its_end:
        serve(its_end)
