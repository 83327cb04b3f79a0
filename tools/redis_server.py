"""A Redis server of one's own, of the binary that Debian's package installs.

Tests and tools start, kill and restart it. It has a folder of its own, listens on a unix socket in there (and on a port of
127.0.0.1, if asked), syncs before it answers, and ends with the `with` block.

The folder lies in memory where there is room: a kill of processes leaves the page cache alone, so nothing that a test can
kill would be lost on a disk, either. Who measures asks for a folder on a disk.
"""

import contextlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAM = "redis-server"
START_S = 60.0
MEMORY = Path("/dev/shm")  # noqa: S108
MEMORY_BYTES_MIN = 1 << 30

SETTINGS = {"appendonly": "yes", "appendfsync": "always", "save": ""}


class NoRedisError(Exception):
    """There is no Redis here. The text says what to install."""


def needed() -> str:
    """Where the server's program is. Raises NoRedisError."""
    found = shutil.which(PROGRAM)
    if found is None:
        raise NoRedisError(
            f"no {PROGRAM}: apt-get install redis-server (the server that it starts is not needed)"
        )
    return found


class RedisServer:
    """A folder, and the server on it while it runs. `url(...)` is how to reach it."""

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        """Not for users: see `server`."""
        self.folder = folder
        self.settings = settings
        self._process: subprocess.Popen[Any] | None = None

    def __repr__(self) -> str:
        return f"<RedisServer {self.folder} {'running' if self._process else 'stopped'}>"

    @property
    def socket(self) -> Path:
        """Its unix socket."""
        return self.folder / "socket"

    @property
    def is_running(self) -> bool:
        """Whether it was started, and not stopped."""
        return self._process is not None

    def url(self, query: str = "", *, database: int = 0) -> str:
        """What `RedisBackend` takes."""
        return f"redis+unix://{self.socket}?db={database}{'&' if query else ''}{query}"

    def start(self, **settings: str) -> None:
        """Start it, and wait until it has read its files and answers. `settings` are for this life only."""
        assert self._process is None
        options = {"port": "0", **self.settings, **settings}
        command = [needed(), "--unixsocket", str(self.socket), "--dir", str(self.folder), "--daemonize", "no"]
        for name, value in options.items():
            command += [f"--{name.replace('_', '-')}", value]
        self.socket.unlink(missing_ok=True)
        with (self.folder / "log").open("ab") as log:
            process = self._process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_S
        while not self._answers():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Redis does not start: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.01)

    def _answers(self) -> bool:
        """Whether it takes commands: it answers something else while it still reads its files."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
            client.settimeout(START_S)
            client.connect(str(self.socket))
            client.sendall(b"PING\r\n")
            answer = client.recv(64)
            return answer.startswith((b"+PONG", b"-NOAUTH", b"-NOPERM"))
        return False

    def stop(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal, and wait for its end. Nothing where it does not run. SIGTERM: an orderly shutdown."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(number)
            process.wait(START_S)

    def wait(self) -> int:
        """Wait until it has ended by itself. Returns how."""
        assert self._process is not None
        code = self._process.wait(START_S)
        self._process = None
        return code

    def restart(self, number: int = signal.SIGKILL, **settings: str) -> None:
        """Stop it in this way, and start it again."""
        self.stop(number)
        self.start(**settings)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on at present."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def server(parent: Path | None = None, **settings: str) -> Iterator[RedisServer]:
    """A running server without any data. It is stopped, and its folder removed, whatever happens inside."""
    needed()
    if parent is None:
        has_room = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > MEMORY_BYTES_MIN
        parent = MEMORY if has_room else Path("/tmp")  # noqa: S108
    folder = Path(tempfile.mkdtemp(prefix="walbatch-redis-", dir=parent))
    made = RedisServer(folder, {**SETTINGS, **settings})
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)
