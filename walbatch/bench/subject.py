"""What is measured: something that takes operations and says when they are on disk.

What is not here: what it is asked to do, and the clock (`workloads`).

The idea needed to read it: `item` and `group` bring operations into the form that a subject likes best, before the clock starts;
`put` and `put_group` return once they are durable.
"""

from __future__ import annotations

import asyncio
import enum
import importlib
import importlib.util
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Final

EXECUTOR_THREADS: Final = 32
"""Of the tasks of a subject that knows no asyncio."""

DRAIN_COUNT: Final = 1_000
"""Operations that are read and settled together where a subject can."""

Take = Callable[[Sequence[bytes]], object]
"""What payloads are handed to while they are drained."""


class Role(enum.StrEnum):
    """What a subject is there for."""

    OWN = "own"
    LIMIT = "limit"
    """What the file system does when nobody asks more of it: the measure of the others."""
    HINT = "hint"
    """Shown beside the others, and compared with nobody."""
    PEER = "peer"


class Subject:
    """One subject, open in a folder of its own between `open` and `close`."""

    name: ClassVar[str]
    title: ClassVar[str]
    role: ClassVar[Role] = Role.PEER
    syncs: ClassVar[bool] = True
    """Whether what it acknowledges is on disk. One that does not wait for the disk is shown, and never the best peer."""
    note: ClassVar[str] = ""
    """What a reader of the table must know."""
    modules: ClassVar[tuple[str, ...]] = ()
    package: ClassVar[str] = ""
    """What to install for `modules`."""
    program: ClassVar[str] = ""
    """What must be on the PATH."""
    workloads: ClassVar[frozenset[str]] = frozenset({"w1", "w2", "w3", "w4", "w4c", "w5", "w6"})

    def __init__(self) -> None:
        self.extra: dict[str, float] = {}
        """Figures of its own that a sample shows beside the others."""

    @classmethod
    def missing(cls) -> str:
        """What to install before it can be measured; empty if nothing."""
        if any(importlib.util.find_spec(module) is None for module in cls.modules):
            return f"pip install {cls.package}"
        if cls.program and shutil.which(cls.program) is None:
            return f"{cls.program} on the PATH"
        return ""

    @classmethod
    def release(cls) -> str:
        """The version of what is installed; empty where there is none to tell."""
        try:
            return f"{cls.package} {version(cls.package)}" if cls.package else ""
        except PackageNotFoundError:
            return ""

    def open(self, folder: Path) -> None:
        """Begin in an empty folder."""
        raise NotImplementedError

    def item(self, key: bytes, payload: bytes) -> Any:
        """One operation as `put` takes it."""
        return key, payload

    def group(self, keys: Sequence[bytes], payloads: Sequence[bytes]) -> Any:
        """Operations as `put_group` takes them."""
        return list(zip(keys, payloads, strict=True))

    def put(self, item: Any) -> None:
        """Take one operation; it is durable when this returns. From any thread."""
        raise NotImplementedError

    def put_group(self, group: Any) -> None:
        """Take operations; all are durable when this returns."""
        raise NotImplementedError

    def settle(self) -> None:
        """Return once everything that was put is where it belongs. Only end-to-end workloads wait for it."""

    def drain(self, count: int, take: Take) -> int:
        """Hand out the `count` operations that were put, in order, and settle them durably. Returns how many there were."""
        raise NotImplementedError

    def close(self) -> None:
        """End; also after a failed `open`, and twice."""

    # --- with asyncio ---

    async def open_in_loop(self, folder: Path) -> None:
        """Begin, for tasks of the running loop."""
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(EXECUTOR_THREADS))
        self.open(folder)

    async def put_in_loop(self, item: Any) -> None:
        """`put`, awaited by one of many tasks; here in a thread."""
        await asyncio.get_running_loop().run_in_executor(None, self.put, item)

    async def close_in_loop(self) -> None:
        """End what `open_in_loop` began."""
        self.close()


def load(module: str) -> Any:
    """A module that may not be installed everywhere; its names are checked by nobody."""
    return importlib.import_module(module)
