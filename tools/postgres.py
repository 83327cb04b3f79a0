"""A PostgreSQL server of one's own, of the binaries that Debian's packages install.

Tests and tools start, kill and restart it. It has a folder of its own, listens on no network but a unix socket in there, asks
for no password, and ends with the `with` block. PostgreSQL refuses to run as root: started by root it runs as the system's user
`postgres`.

The one idea needed to read it: making an empty cluster takes a second or two, so it is made once for each process, and copied.
Both lie in memory where there is room: a kill of processes leaves the page cache alone, so nothing that a test can kill would be
lost on a disk, either. Who measures asks for a folder on a disk.
"""

import contextlib
import functools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BINARIES = Path("/usr/lib/postgresql")
USER = "postgres"
START_S = 60.0
MEMORY = Path("/dev/shm")  # noqa: S108
MEMORY_BYTES_MIN = 2 << 30

SETTINGS = {
    "listen_addresses": "''", "shared_buffers": "'32MB'", "max_connections": "40", "max_wal_size": "'256MB'",
    "log_min_messages": "'fatal'", "autovacuum": "off", "jit": "off", "dynamic_shared_memory_type": "mmap",
}  # fmt: skip
"""Shared memory lies in the folder, so that a killed server leaves nothing elsewhere. What is not named is as a fresh installation
has it: fsync and synchronous_commit are on."""


class NoPostgresError(Exception):
    """There is no PostgreSQL here. The text says what to install."""


@functools.cache
def binaries() -> Path:
    """Where the newest installed version has its programs. Raises NoPostgresError."""
    found = [path.parent for path in BINARIES.glob("*/bin/postgres")]
    if not found:
        raise NoPostgresError(
            f"no PostgreSQL below {BINARIES}: apt-get install postgresql (the server that it starts is not needed)"
        )
    if os.geteuid() == 0:
        try:
            pwd.getpwnam(USER)
        except KeyError:
            raise NoPostgresError(f"PostgreSQL does not run as root, and there is no user {USER!r}") from None
    return max(found, key=lambda path: float(path.parent.name))


class Server:
    """A cluster in a folder, and the server on it while it runs. `conninfo(database)` is how to reach it."""

    def __init__(self, folder: Path, *, settings: dict[str, str]) -> None:
        """Not for users: see `server`."""
        self.folder = folder
        self._settings = settings
        self._process: subprocess.Popen[Any] | None = None

    def __repr__(self) -> str:
        return f"<Server {self.folder} {'running' if self._process else 'stopped'}>"

    def conninfo(self, database: str = "postgres") -> str:
        """What libpq takes."""
        return f"host={self.folder} user={USER} dbname={database}"

    def url(self, database: str = "postgres") -> str:
        """The same as a URL."""
        return f"postgresql:///{database}?host={self.folder}&user={USER}"

    @property
    def is_alive(self) -> bool:
        """Whether it runs: started, and neither stopped nor ended by itself."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it, and wait until it takes connections; after a kill that is when it has recovered."""
        assert self._process is None
        options = [
            part
            for name, value in self._settings.items()
            for part in ("-c", f"{name}={value.strip(chr(39))}")
        ]
        command: list[Any] = [
            binaries() / "postgres",
            "-D",
            self.folder / "data",
            "-k",
            self.folder,
            *options,
        ]
        with (self.folder / "log").open("ab") as log:
            process = self._process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd="/", start_new_session=True, **_as_user()
            )
        deadline = time.monotonic() + START_S
        ready: list[Any] = [binaries() / "pg_isready", "-q", "-h", self.folder, "-d", "postgres", "-U", USER]
        while subprocess.run(ready, check=False).returncode != 0:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL does not start: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.02)

    def stop(self, number: int = signal.SIGINT) -> None:
        """Send the server a signal, and wait for its end, and for that of all its processes. Nothing where it does not run.

        SIGINT: fast shutdown. SIGQUIT: immediate shutdown, as a crash. SIGKILL: kill -9 of all of its processes.
        """
        process, self._process = self._process, None
        if process is None:
            return
        if number == signal.SIGKILL:
            # All at once, so that no process of it can say goodbye to its client. Stopped first, the server makes no new ones.
            process.send_signal(signal.SIGSTOP)
            children = _children(process.pid)
            for pid in (process.pid, *children):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        else:
            process.send_signal(number)
            children = []
        process.wait(START_S)
        deadline = time.monotonic() + START_S
        while any(map(_is_alive, children)) and time.monotonic() < deadline:
            time.sleep(0.01)  # a server does not start while one of an earlier life has its shared memory

    def restart(self, number: int = signal.SIGQUIT) -> None:
        """Stop it in this way, and start it again."""
        self.stop(number)
        self.start()


@contextlib.contextmanager
def server(parent: Path | None = None, **settings: str) -> Iterator[Server]:
    """A running server on an empty cluster. It is stopped, and its folder removed, whatever happens inside."""
    folder = _folder(parent)
    made = Server(folder, settings={**SETTINGS, **settings})
    try:
        shutil.copytree(_template(), folder / "data", symlinks=True, copy_function=_copy)
        (folder / "data").chmod(0o700)
        _give(folder)
        made.start()
        yield made
    finally:
        made.stop(signal.SIGQUIT)
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def _template() -> Path:
    """An empty cluster, made once for each process."""
    folder = _folder()
    _give(folder)
    command: list[Any] = [
        binaries() / "initdb", "-D", folder / "data", "-U", USER, "--auth=trust", "--no-sync", "--wal-segsize=4",
        "--encoding=UTF8", "--locale=C", "--no-instructions",
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/", **_as_user())
    _clean_up_at_exit(folder)
    return folder / "data"


def _clean_up_at_exit(folder: Path) -> None:
    import atexit  # noqa: PLC0415 - only here

    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not in a forked child
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)


def _folder(parent: Path | None = None) -> Path:
    """A folder with a short path: a socket's name has 107 bytes."""
    if parent is None:
        has_room = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > MEMORY_BYTES_MIN
        parent = MEMORY if has_room else Path("/tmp")  # noqa: S108
    return Path(tempfile.mkdtemp(prefix="walbatch-pg-", dir=parent))


def _copy(source: str, target: str) -> None:
    shutil.copyfile(source, target)
    Path(target).chmod(0o600)


def _as_user() -> dict[str, Any]:
    return {"user": USER, "group": USER, "extra_groups": []} if os.geteuid() == 0 else {}


def _give(folder: Path) -> None:
    """Let the server's user own a folder and all that is in it."""
    if os.geteuid() != 0:
        return
    user = pwd.getpwnam(USER)
    for path in (folder, *folder.rglob("*")):
        os.chown(path, user.pw_uid, user.pw_gid, follow_symlinks=False)


def _children(parent: int) -> list[int]:
    """The processes that a process has started. Each of a server's has a session of its own."""
    return [pid for pid, (_, found) in _processes().items() if found == parent]


def _is_alive(pid: int) -> bool:
    """Whether it has not ended."""
    return _processes().get(pid, ("Z", 0))[0] != "Z"


def _processes() -> dict[int, tuple[str, int]]:
    """State and parent of each process, by its number."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = stat.read_text().rpartition(")")[2].split()
            found[int(stat.parent.name)] = fields[0], int(fields[1])
    return found
