"""The shipped engine on the ports of a simulated process.

What is not here: the ports (`simulation`), and what is done with the engine.

The idea needed to read it: the simulation knows no engine; this is the one place that puts the two together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

from greenlet import getcurrent

from walbatch.backends.lmdb import LmdbBackend
from walbatch.config import Lane, Settings
from walbatch.engine import Engine, Environment
from walbatch.testing.simulation.looks import STORE
from walbatch.testing.simulation.machine import Process


class AmpleMemory:
    """Memory that never runs short: what the real one says would differ from run to run."""

    def look(self) -> tuple[int, int]:
        """Says nothing."""
        return 0, 0


def environment_of(process: Process) -> Environment:
    """The ports of a simulated process, for `Engine.open(..., environment=...)`."""
    return Environment(
        fs=process.fs, clock=process.clock, threads=process.threads, entropy=process.entropy, memory=AmpleMemory(),
        open_state=process.open_state,
    )  # fmt: skip


def open_engine(process: Process, lanes: Mapping[str, Lane], settings: Settings) -> Engine:
    """The shipped engine on simulated ports, with its store at `/store`: what an `Explorer` opens."""
    return Engine.open(STORE, lanes, settings=settings, environment=environment_of(process))


@contextlib.contextmanager
def real_world_refused() -> Iterator[None]:
    """No simulated thread may open an engine on the real ports, or an LMDB backend: no crash of the simulation reaches them."""
    open_real, open_backend = Engine.open.__func__, LmdbBackend.open  # type: ignore[attr-defined]

    def open_simulated(
        kind: type[Engine], /, *arguments: Any, environment: Environment | None = None, **options: Any
    ) -> Any:
        if environment is None and _is_simulated():
            raise ValueError(
                "this would open a real store: pass environment=process.environment to Engine.open"
            )
        return open_real(kind, *arguments, environment=environment, **options)

    def refuse(backend: LmdbBackend, lane: str, shards: int, store: bytes) -> None:
        if _is_simulated():
            raise ValueError(
                f"{backend!r} keeps real files, which the simulation does not crash: use process.database({lane!r}, "
                "transactional=True) in its place"
            )
        open_backend(backend, lane, shards, store)

    with (
        mock.patch.object(Engine, "open", classmethod(open_simulated)),
        mock.patch.object(LmdbBackend, "open", refuse),
    ):
        yield


def _is_simulated() -> bool:
    """Whether the caller runs in a simulated thread."""
    return getcurrent().parent is not None
