"""Groups that must arrive in LMDB: through walbatch and its `LmdbBackend`, and written there at once.

The idea needed to read it: through walbatch, an operation is synced twice, in the log and in LMDB; what that costs is the question.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import walbatch as wb
from walbatch.bench.embedded import Lmdb
from walbatch.bench.own import LANE, Walbatch


class WalbatchIntoLmdb(Walbatch):
    """An engine whose lane delivers, to LMDB, while it takes."""

    workloads: ClassVar[frozenset[str]] = frozenset({"w7", "w9"})
    shards: ClassVar[int] = 1

    def open(self, folder: Path) -> None:
        """Open a new store."""
        lanes = {LANE: wb.Lane(wb.LmdbBackend(folder / "lmdb"), shards=self.shards)}
        self._engine = wb.Engine.open(folder / "store", lanes=lanes, settings=self._settings)

    def settle(self) -> None:
        """Flush: each operation is in LMDB, with the mark that says so."""
        self.engine.flush(LANE)


class LmdbPutmulti(Lmdb):
    """LMDB with the same groups, a transaction each, and without being told that keys ascend."""

    title: ClassVar[str] = "LMDB putmulti (sync)"
    workloads: ClassVar[frozenset[str]] = frozenset({"w7", "w9"})
    ascending: ClassVar[bool] = False
