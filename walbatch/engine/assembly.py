"""The parts of an open store, wired to one another: log, committer, dispatcher, checkpointer.

What is not here: finding out how to open the store (`opening`), and any of the parts' work.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from walbatch import limits
from walbatch.config import NS_PER_MS, NS_PER_S, Lane, Settings
from walbatch.core.history import History
from walbatch.core.idempotency import requeued_lsn
from walbatch.core.pressure import Pressure
from walbatch.errors import EngineClosed, StorageError, WalbatchError
from walbatch.lanes import await_end, close_backends, trimmed_count
from walbatch.ports import Clock, Entropy, FileSystem, Memory, StateStore, Threads
from walbatch.runtime.checkpointer import CheckpointBase, Checkpointer
from walbatch.runtime.clock import RealClock, RealEntropy, RealThreads
from walbatch.runtime.committer import CommitSettings, Committer
from walbatch.runtime.dispatcher import Dispatcher, DispatchSettings
from walbatch.runtime.identities import KeyIndex
from walbatch.runtime.lane import LaneSetup
from walbatch.runtime.letters import DeadLetters, LetterSettings
from walbatch.runtime.promises import LOGGED
from walbatch.storage.checkpoint import LmdbState
from walbatch.storage.filesystem import RealFileSystem
from walbatch.storage.log import Log
from walbatch.storage.memory import RealMemory
from walbatch.storage.store import OpenStore
from walbatch.types import DeadLetter, Durability, Position


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """The ports an engine runs on. The default is the real machine; a simulation gives its own."""

    fs: FileSystem = field(default_factory=RealFileSystem)
    clock: Clock = field(default_factory=RealClock)
    threads: Threads = field(default_factory=RealThreads)
    entropy: Entropy = field(default_factory=RealEntropy)
    memory: Memory = field(default_factory=RealMemory)
    open_state: Callable[[str, bytes, str], StateStore] = LmdbState.open_for_engine
    """open_state(path, store UUID, quarantine): an empty quarantine means that nothing may be moved there."""


class Assembly:
    """The parts of one open store. All methods are safe from any thread.

    `state` is "open", "closing", "closed" or "failed"; `failure` why nothing is acknowledged any more.
    """

    def __init__(
        self, *, store: OpenStore, log: Log, environment: Environment, lanes: Mapping[str, Lane], setups: Sequence[LaneSetup],
        settings: Settings, letters: Sequence[DeadLetter], given_up: frozenset[int], keys: KeyIndex, history: History,
    ) -> None:  # fmt: skip
        plan = store.plan
        self.path = store.layout.root
        self.store = store
        self.log = log
        self.environment = environment
        self.settings = settings
        self.setups = setups
        self.keys = keys
        self.state = "open"
        self.failure: WalbatchError | None = None
        self.pid = os.getpid()
        self.pending_at_open = plan.pending
        clock, threads = environment.clock, environment.threads
        checkpoint = store.facts.checkpoint
        watermark = checkpoint.watermark if checkpoint else 0
        self.letters = DeadLetters(
            state=store.state, threads=threads, clock=clock, letters=letters,
            settings=LetterSettings(
                count_max=settings.dead_letters_max, bytes_max=settings.dead_letter_bytes_max,
                age_ns=None if settings.dead_letter_age_s is None else int(settings.dead_letter_age_s * NS_PER_S),
            ),
        )  # fmt: skip
        self.dispatcher = Dispatcher(
            log=log, clock=clock, threads=threads, entropy=environment.entropy,
            settings=DispatchSettings(
                timer_ns=int(settings.timer_ms * NS_PER_MS), in_flight_max=settings.in_flight_max,
                memory_bytes_max=settings.memory_bytes_max,
            ),
            store=store.uuid, epoch=plan.epoch, lanes=setups, start=Position(plan.first_segment, limits.SECTOR_BYTES),
            end_lsn=plan.next_lsn - 1, watermark=watermark, letters=self.letters,
            memory=environment.memory, state=store.state, history=history, given_up=given_up, on_failure=self.fail,
        )  # fmt: skip
        intervals = [lane.interval_ms for lane in lanes.values() if lane.durability is Durability.INTERVAL]
        self.committer = Committer(
            log=log, clock=clock, threads=threads,
            settings=CommitSettings(
                queue_bytes_max=settings.queue_bytes_max, disk_bytes_max=settings.disk_bytes_max,
                idle_stamp_ns=int(settings.idle_stamp_ms * NS_PER_MS),
                disk_full_wait_ns=int(settings.disk_full_wait_s * NS_PER_S),
                interval_ns=int(min(intervals, default=100.0) * NS_PER_MS),
            ),
            names=[setup.name for setup in setups], next_lsn=plan.next_lsn, on_durable=self.dispatcher.on_durable,
            on_failure=self.fail, is_pressed=lambda: self.dispatcher.pressure is Pressure.PAUSE,
            on_fate=partial(self.dispatcher.promises.add, LOGGED),
        )  # fmt: skip
        self.checkpointer = Checkpointer(
            log=log, state=store.state, clock=clock, threads=threads, interval_ns=int(settings.checkpoint_ms * NS_PER_MS),
            base=CheckpointBase(
                generation=checkpoint.generation if checkpoint else 0, epoch=plan.epoch,
                settled_count=checkpoint.settled_count if checkpoint else trimmed_count(store),
            ),
            settled=self.dispatcher.overview.settled, durable_lsn=lambda: self.committer.durable_lsn, on_failure=self.fail,
            before=self._save_beside,
        )  # fmt: skip
        self.checkpointer.checkpointed_lsn = watermark

    def __repr__(self) -> str:
        return (
            f"<Assembly {self.path} {self.state}: submitted lsn {self.committer.submitted_lsn}, durable "
            f"{self.committer.durable_lsn}, settled {self.dispatcher.overview.settled_lsn()}>"
        )

    def start(self) -> None:
        """Save a first checkpoint, so that a later loss of state/ can be told from a store that never had one; start."""
        self.checkpointer.checkpoint()
        self.committer.start()
        self.dispatcher.start()
        self.checkpointer.start()

    def check_owner(self) -> None:
        """Raise unless the store is this process's and open. Cheap: the lock knows of a fork."""
        if not self.store.lock.held:
            why = (
                "is closed" if self.pid == os.getpid() else "was opened by the process that this one was forked from"
            )  # fmt: skip
            raise EngineClosed(f"the engine of {self.path} {why}: open it again")

    def fail(self, error: WalbatchError) -> None:
        """Something below failed for good: stop acknowledging, stop delivering, tell everybody."""
        if self.failure is None:
            self.failure = error
            if self.state == "open":
                self.state = "failed"
        self.committer.halt(error)
        self.dispatcher.fail(error)

    def remaining(self) -> int:
        """Operations in the log that are not settled."""
        settled = self.dispatcher.overview.settled_count()
        return max(0, self.pending_at_open + self.committer.committed - settled)

    def release(self) -> None:
        """Give everything back, the lock last. Only when no thread of the engine is left. Idempotent."""
        if not self.store.lock.held:
            return
        backends = [setup.backend for setup in self.setups if setup.backend is not None]
        close_backends(backends)
        await_end(backends)
        try:
            self.store.state.close()
        finally:
            self.store.lock.release()

    def _save_beside(self, covered_lsn: int) -> int | None:
        """What goes to state/ with a checkpoint. `covered_lsn`: both generations cover everything up to it.

        Returns the LSN behind which the log must be kept, whatever is settled: the disk has no room for its idempotency keys.

        Crash story: idempotency keys are saved before the log may be trimmed by the checkpoint, so each is in the log or in
        state/. What controllers have learnt may be lost, to a full disk too: they learn again.
        """
        state, clock = self.store.state, self.environment.clock
        # A key under which a letter was submitted again is wanted as long as that letter is there.
        self.keys.forget_own(lambda key: self.letters.holds(requeued_lsn(key)))
        kept_lsn = self.keys.save(state, up_to_lsn=self.committer.durable_lsn, wall_ns=clock.wall_ns())
        snapshots = self.dispatcher.overview.controllers(clock.monotonic_ns(), last=self.state != "open")
        if snapshots:
            try:
                state.save_controllers(snapshots)
            except StorageError as error:
                if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                    raise
        state.forget_given_up(covered_lsn)
        self.dispatcher.forget_given_up(covered_lsn)
        return kept_lsn
