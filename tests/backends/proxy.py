"""A stretch of network between a client and a server (PostgreSQL, Redis) that fails when a test wants it to."""

from __future__ import annotations

import contextlib
import enum
import select
import socket
import tempfile
import threading
from pathlib import Path

DEADLINE_S = 30


class Loss(enum.Enum):
    """What happens to the first commit that passes, and to its connection."""

    REQUEST = "it does not arrive; the server hears that the client has gone"
    REQUEST_SILENT = "it does not arrive; the server hears nothing, and waits"
    WHILE_AT_WORK = "it arrives, and the client goes while the server is at it"
    LATE = "it arrives when the test says so, long after the client has gone"
    ANSWER = "its answer does not arrive"


class Proxy:
    """Passes bytes on between a unix socket of its own and a server's. `loss` happens once, then it passes everything.

    `name` is that of the sockets in their folders; `request` tells a commit by what it contains, `answer` what follows it.
    """

    def __init__(
        self, server: Path, *, name: str = ".s.PGSQL.5432", request: bytes = b"COMMIT\0", answer: bytes = b"COMMIT\0"
    ) -> None:  # fmt: skip
        self.folder = Path(tempfile.mkdtemp(prefix="walbatch-proxy-", dir="/tmp"))
        self.loss: Loss | None = None
        # With what has still to be sent to the server.
        self.held: list[tuple[socket.socket, bytes]] = []
        self._request, self._answer = request, answer
        self._server = str(server / name)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.folder / name))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def conninfo(self, database: str) -> str:
        return f"host={self.folder} user=postgres dbname={database}"

    def close(self) -> None:
        self._listener.close()
        self.release()

    def release(self) -> None:
        """Send what is late, let the server know of the clients that have gone, and wait until it has done with them."""
        while self.held:
            server, late = self.held.pop()
            with contextlib.suppress(OSError):
                server.settimeout(DEADLINE_S)
                server.sendall(late)
                server.shutdown(socket.SHUT_WR)
                while server.recv(1 << 16):
                    pass
            server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._server)
                threading.Thread(target=self._pass, args=(client, server), daemon=True).start()

    def _pass(self, client: socket.socket, server: socket.socket) -> None:
        is_asked = False
        with contextlib.suppress(OSError):
            while True:
                for side in select.select([client, server], [], [])[0]:
                    data = side.recv(1 << 16)
                    other = server if side is client else client
                    loss = self.loss
                    if side is client:
                        is_commit = self._request in data and loss is not Loss.ANSWER
                        is_asked |= self._request in data
                    else:
                        is_commit = is_asked and self._answer in data and loss is Loss.ANSWER
                        is_asked = False
                    if loss is not None and is_commit:
                        self.loss = None
                        if loss is Loss.WHILE_AT_WORK:
                            server.sendall(data)
                        client.close()
                        if loss in {Loss.REQUEST_SILENT, Loss.WHILE_AT_WORK, Loss.LATE}:
                            self.held.append((server, data if loss is Loss.LATE else b""))
                        else:
                            server.close()
                        return
                    if not data:
                        client.close()
                        server.close()
                        return
                    other.sendall(data)
