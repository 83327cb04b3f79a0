"""A stretch of network between a client and PostgreSQL that fails when a test wants it to."""

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
    """What happens to the first COMMIT that passes, and to its connection."""

    REQUEST = "it does not arrive; the server hears that the client has gone"
    REQUEST_SILENT = "it does not arrive; the server hears nothing, and waits"
    WHILE_AT_WORK = "it arrives, and the client goes while the server is at it"
    ANSWER = "its answer does not arrive"


class Proxy:
    """Passes bytes on between a unix socket of its own and a server's. `loss` happens once, then it passes everything."""

    def __init__(self, server: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="walbatch-proxy-", dir="/tmp"))
        self.loss: Loss | None = None
        self.held: list[socket.socket] = []
        self._server = str(server / ".s.PGSQL.5432")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.folder / ".s.PGSQL.5432"))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def conninfo(self, database: str) -> str:
        return f"host={self.folder} user=postgres dbname={database}"

    def close(self) -> None:
        self._listener.close()
        self.release()

    def release(self) -> None:
        """Let the server know of the clients that have gone."""
        while self.held:
            self.held.pop().close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._server)
                threading.Thread(target=self._pass, args=(client, server), daemon=True).start()

    def _pass(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                for side in select.select([client, server], [], [])[0]:
                    data = side.recv(1 << 16)
                    other = server if side is client else client
                    loss = self.loss
                    is_commit = b"COMMIT\0" in data and side is (server if loss is Loss.ANSWER else client)
                    if loss is not None and is_commit:
                        self.loss = None
                        if loss is Loss.WHILE_AT_WORK:
                            server.sendall(data)
                        client.close()
                        if loss in {Loss.REQUEST_SILENT, Loss.WHILE_AT_WORK}:
                            self.held.append(server)
                        else:
                            server.close()
                        return
                    if not data:
                        client.close()
                        server.close()
                        return
                    other.sendall(data)
