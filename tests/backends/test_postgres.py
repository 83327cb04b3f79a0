"""PostgreSQL as a backend, on real servers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.backends.servers import database, own_server, shared_server
from tools.postgres import Server
from walbatch.backends.postgres import PostgresBackend
from walbatch.testing.contracts import Pair, TransactionalBackendContract

__all__ = ["own_server", "shared_server"]


class TestPostgres(TransactionalBackendContract):
    @pytest.fixture(autouse=True)
    def _on(self, shared_server: Server) -> None:
        self.server = shared_server

    def make_backend(self, path: Path) -> Any:
        return PostgresBackend(self.server.conninfo(database(self.server, path)), "pages")

    def content(self, path: Path) -> Iterable[Pair]:
        with psycopg.connect(self.server.conninfo(database(self.server, path))) as connection:
            return connection.execute("SELECT key, payload FROM pages").fetchall()
