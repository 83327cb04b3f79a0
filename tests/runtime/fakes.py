"""A log that writes nowhere, a clock that stands still, and a committer on them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from walbatch.errors import WalbatchError
from walbatch.ports import DecodedFrame
from walbatch.runtime.clock import RealThreads
from walbatch.runtime.committer import CommitSettings, Committed, Committer
from walbatch.types import Checkpoint, Options, Position

MS = 1_000_000


class StillClock:
    """Time that moves when it is told to."""

    def __init__(self) -> None:
        self.now_ns = 10**12

    def monotonic_ns(self) -> int:
        return self.now_ns

    def wall_ns(self) -> int:
        return 0

    def advance(self, ms: float) -> None:
        self.now_ns += int(ms * MS)


class FakeLog:
    """Keeps what it is told, in `events`: ("append", first LSN, payloads), ("sync", LSN), ("stamp", next LSN).

    `before` is called with the name of each call and may block or raise.
    """

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.before: Callable[[str], None] = lambda call: None
        self.last_lsn = 0
        self.synced_lsn = 0
        self.disk_bytes = 0
        self.checkpointed_lsn = 0
        self.has_options = False
        self.trimmed: list[int] = []
        self.compacted: list[Checkpoint] = []
        self._busy = threading.Lock()

    def _enter(self, call: str) -> None:
        assert self._busy.acquire(blocking=False), "two threads use the append side at once"
        try:
            self.before(call)
        finally:
            self._busy.release()

    def append(
        self, *, first_lsn: int, kinds: Sequence[str], kind_indexes: Sequence[int], priorities: Sequence[int],
        keys: Sequence[bytes], payloads: Sequence[bytes], synced_lsn: int, options: Sequence[Options] = (),
    ) -> Position:  # fmt: skip
        self._enter("append")
        assert first_lsn == self.last_lsn + 1
        assert synced_lsn <= self.synced_lsn, "a frame may not vouch for what is not synced"
        assert len(kind_indexes) == len(priorities) == len(keys) == len(payloads)
        position = self.end
        self.last_lsn += len(keys)
        self.events.append(("append", first_lsn, list(payloads)))
        return position

    def sync(self) -> None:
        reaches = self.last_lsn
        self._enter("sync")
        self.synced_lsn = reaches
        self.events.append(("sync", reaches))

    def stamp(self, *, next_lsn: int, clean: bool) -> None:
        self._enter("stamp")
        assert next_lsn == self.last_lsn + 1
        assert self.synced_lsn == self.last_lsn
        self.events.append(("stamp", next_lsn))

    @property
    def end(self) -> Position:
        return Position(1, 512 * (self.last_lsn + 1))

    def read_frame(
        self,
        position: Position,
        *,
        next_lsn: int,
        wanted: frozenset[str] | None = None,
        priority_min: int = 0,
    ) -> DecodedFrame | None:
        return None

    def position_of(self, lsn: int) -> Position:
        return Position(1, 512 * lsn)

    def trim(self, lsn: int) -> int:
        self.trimmed.append(lsn)
        return 0

    def compact(self, covered: Checkpoint) -> bool:
        self.compacted.append(covered)
        return False

    def of(self, call: str) -> list[tuple[Any, ...]]:
        return [event for event in self.events if event[0] == call]


class Gate:
    """Holds calls of a log until it is opened."""

    def __init__(self, log: FakeLog, wanted: str) -> None:
        self.reached = threading.Semaphore(0)
        self.allowed = threading.Semaphore(0)
        log.before = self._hold
        self._wanted = wanted
        self._open = False

    def _hold(self, call: str) -> None:
        if call == self._wanted and not self._open:
            self.reached.release()
            assert self.allowed.acquire(timeout=30)

    def wait_reached(self) -> None:
        assert self.reached.acquire(timeout=30)

    def open(self) -> None:
        """Let everything through from now on."""
        self._open = True
        self.allowed.release()


@dataclass
class Rig:
    """A committer on a fake log, and what it reported."""

    log: FakeLog = field(default_factory=FakeLog)
    clock: StillClock = field(default_factory=StillClock)
    durable: list[Committed] = field(default_factory=list)
    failures: list[WalbatchError] = field(default_factory=list)
    on_durable: Callable[[Committed], None] = lambda committed: None
    queue_bytes_max: int = 1 << 30
    disk_bytes_max: int = 1 << 40
    idle_stamp_ms: float = 3_600_000
    disk_full_wait_ms: float = 0
    interval_ms: float = 1
    start: bool = True
    threads: Any = field(default_factory=RealThreads)

    def __post_init__(self) -> None:
        self.committer = Committer(
            log=self.log, clock=self.clock, threads=self.threads,
            settings=CommitSettings(
                queue_bytes_max=self.queue_bytes_max, disk_bytes_max=self.disk_bytes_max,
                idle_stamp_ns=int(self.idle_stamp_ms * MS), disk_full_wait_ns=int(self.disk_full_wait_ms * MS),
                interval_ns=int(self.interval_ms * MS),
            ),
            names=["put", "soon"], next_lsn=1, on_durable=self._on_durable, on_failure=self.failures.append,
        )  # fmt: skip
        if self.start:
            self.committer.start()

    def _on_durable(self, committed: Committed) -> None:
        self.on_durable(committed)
        self.durable.append(committed)

    def submit(
        self, *payloads: bytes, wait: bool = True, needs_sync: bool = True, timeout_ms: float | None = None
    ) -> tuple[int, Any]:
        lsn, fate = self.committer.submit(
            0, 0, [b"k"] * len(payloads), payloads, 5, sum(map(len, payloads)) + len(payloads),
            needs_sync=needs_sync, timeout_ns=None if timeout_ms is None else int(timeout_ms * MS), wait=wait,
        )  # fmt: skip
        return lsn, fate.durable

    def stop(self) -> None:
        self.committer.refuse("closed")
        assert self.committer.stop(30 * 10**9)


class Caller:
    """A call in a thread of its own, and what came of it."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()

    def _run(self, call: Callable[[], Any]) -> None:
        try:
            self.result = call()
        except BaseException as error:  # noqa: BLE001 - it is what the test asks for
            self.error = error

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> Caller:
        self._thread.join(30)
        assert self.done, "the call does not return"
        return self
