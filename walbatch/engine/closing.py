"""Closing an engine: refuse, commit, drain, stop, checkpoint, stamp, release, and say what was achieved.

The idea needed to read it: a thread of its own does the work, so that whoever asked for it may be interrupted while waiting.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace

from walbatch.config import NS_PER_S
from walbatch.engine.assembly import Assembly
from walbatch.errors import StorageError
from walbatch.metrics import CloseReport
from walbatch.ports import Thread
from walbatch.runtime.interruption import cuts_in
from walbatch.runtime.ticket import timeout_to_ns

_logger = logging.getLogger("walbatch")

NOTHING_TO_CLOSE = CloseReport(
    settled=0, dead=0, remaining=0, elapsed_s=0.0, reason="nothing to close in this process"
)
COMMIT_GRACE_NS = 30 * NS_PER_S
"""How long close waits for the log to take what was accepted; a disk that takes longer is told as a failure."""
STOP_GRACE_NS = 5 * NS_PER_S
"""How long close waits for batches in flight beyond its timeout: a backend must not be left in the middle lightly."""

INTERRUPT_GRACE_NS = 1 * NS_PER_S
"""How long close waits after that for coroutines, which it cancels then."""


class Closing:
    """The end of one engine, which comes once. Safe from any thread, and from a signal handler."""

    def __init__(self, assembly: Assembly) -> None:
        self._assembly = assembly
        # Guards all below; also what requeueing waits on, so that it ends when this begins.
        self._cond = assembly.environment.threads.condition()
        self._has_begun = False
        self._report: CloseReport | None = None
        self._releaser: Thread | None = None

    def __repr__(self) -> str:
        state = "not begun" if not self._has_begun else "under way" if self._report is None else "done"
        return f"<Closing of {self._assembly.path}, {state}>"

    def pause_for(self, pause_ns: int) -> None:
        """Wait; an engine that is closed meanwhile ends the wait."""
        with self._cond:
            self._cond.wait(pause_ns)

    def close(self, *, drain: bool, timeout: float | None, engine: object) -> CloseReport:
        """As `Engine.close`, in the process that opened the store. `engine`: whose calls this one may have cut into."""
        dispatcher = self._assembly.dispatcher
        inside = self._is_called_from_inside()
        cuts_in_a_call = not inside and cuts_in(engine)
        if cuts_in_a_call or not self._has_begun:
            timeout_ns = timeout_to_ns(timeout)
            # More than one may be started, if a signal handler closes, too. The first that runs does the work.
            self._assembly.environment.threads.spawn(
                "walbatch-close", lambda: self._run(drain=drain and not inside, timeout_ns=timeout_ns)
            )
        if cuts_in_a_call:
            return self._report or replace(
                NOTHING_TO_CLOSE,
                reason="closing: called in the middle of another call of the engine, which must go on first",
            )
        if inside or not drain:
            dispatcher.flushing.hurry()
        if inside:
            return self._report or replace(
                NOTHING_TO_CLOSE, reason="closing: called from a backend, which must return first"
            )
        with self._cond:
            while self._report is None:
                self._cond.wait()
            return self._report

    def _is_called_from_inside(self) -> bool:
        """Whether the caller is a thread of the engine, which closing has to wait for: a backend, for example."""
        assembly, releaser = self._assembly, self._releaser
        if releaser is not None and releaser.is_current():
            return True
        return assembly.dispatcher.is_own_thread() or assembly.committer.is_own_thread()

    def _run(self, *, drain: bool, timeout_ns: int | None) -> None:
        """The closing thread: close, report, and in the end release the store, whatever goes wrong."""
        assembly = self._assembly
        with self._cond:
            is_first, self._has_begun = not self._has_begun, True
            if is_first:
                assembly.state = "closing"
        if not is_first:
            if not drain:
                assembly.dispatcher.flushing.hurry()
            return
        report = replace(NOTHING_TO_CLOSE, reason="failed")
        try:
            report = self._close_in_order(drain=drain, timeout_ns=timeout_ns)
        except BaseException as error:
            _logger.critical("closing %s failed", assembly.path, exc_info=True)
            report = replace(NOTHING_TO_CLOSE, reason=f"failed: {error!r}")
        finally:
            assembly.dispatcher.abandon()
            with self._cond:
                self._report = report
                assembly.state = "failed" if assembly.failure is not None else "closed"
                self._cond.notify_all()
        # Whoever still works for this engine works on its files: only when all have ended may another engine have them.
        assembly.dispatcher.stop(None)
        assembly.committer.stop(None)
        assembly.checkpointer.stop(None)
        with contextlib.suppress(OSError, StorageError):
            assembly.log.close(next_lsn=None)
        self._release(None)

    def _release(self, timeout_ns: int | None) -> bool:
        """Close the backends and give the store back, in a thread: what a backend does then is its own affair.

        Returns whether all is given back. May be called again, to wait longer.
        """

        def release() -> None:
            with (
                self._cond
            ):  # until it is known which thread this is: a backend may close its engine once more
                pass
            self._assembly.release()

        if self._releaser is None:
            with self._cond:
                self._releaser = self._assembly.environment.threads.spawn("walbatch-release", release)
        return self._releaser.join(timeout_ns)

    def _close_in_order(self, *, drain: bool, timeout_ns: int | None) -> CloseReport:
        """Commit, drain, stop, checkpoint, stamp.

        Crash story: everything accepted is durable before the drain begins, so being cut off at any later point costs
        re-delivery of what the last checkpoint does not know, nothing else. The stamp of a clean end is written only when
        nobody else can be writing and no LSN was handed out that is not durable.
        """
        assembly = self._assembly
        clock, dispatcher, committer = assembly.environment.clock, assembly.dispatcher, assembly.committer
        started = clock.monotonic_ns()
        settled, dead = dispatcher.overview.settled_count(), dispatcher.overview.dead_count()
        committer.refuse(f"the engine of {assembly.path} is closed: nothing was accepted")
        reason = "not drained"
        quiet = committer.stop(COMMIT_GRACE_NS)
        if not quiet:
            assembly.fail(
                StorageError(
                    f"the disk of {assembly.path} did not answer within {COMMIT_GRACE_NS // NS_PER_S} s"
                )
            )
        if drain and assembly.failure is None:
            left = None if timeout_ns is None else max(0, started + timeout_ns - clock.monotonic_ns())
            reason = "drained" if dispatcher.flushing.drain(left) else "timeout"
        grace = None
        if timeout_ns is not None:
            grace = max(STOP_GRACE_NS, started + timeout_ns - clock.monotonic_ns())
        stopped = dispatcher.stop(grace) or (dispatcher.interrupt() and dispatcher.stop(INTERRUPT_GRACE_NS))
        if not stopped:
            reason = "timeout: a backend has not returned; the store stays locked until it does"
        quiet = assembly.checkpointer.stop(STOP_GRACE_NS) and quiet
        if quiet and assembly.failure is None:
            self._finish_log()
        if assembly.failure is not None:
            reason = f"failed: {assembly.failure}"
        if stopped and quiet:
            # The usual end: everything is released before anybody is told.
            with contextlib.suppress(OSError, StorageError):
                assembly.log.close(next_lsn=None)
            if not self._release(STOP_GRACE_NS):
                reason = "timeout: a backend's close has not returned; the store stays locked until it does"
        remaining = assembly.remaining()
        if reason == "drained" and (remaining or dispatcher.overview.unlogged_count()):
            reason = "drained, except for what is delayed, paused, or has no backend that works"
        if remaining:
            _logger.log(
                logging.WARNING if drain else logging.INFO,
                "%s closed with %s undelivered (%s); %s in the log and will be replayed by the next open",
                assembly.path, "1 operation" if remaining == 1 else f"{remaining:,} operations", reason,
                "it is" if remaining == 1 else "they are",
            )  # fmt: skip
        return CloseReport(
            settled=dispatcher.overview.settled_count() - settled,
            dead=dispatcher.overview.dead_count() - dead,
            remaining=remaining,
            elapsed_s=(clock.monotonic_ns() - started) / NS_PER_S,
            reason=reason,
        )

    def _finish_log(self) -> None:
        """The last checkpoint, in both generations so that the log is trimmed up to it, and the stamp of a clean end."""
        assembly = self._assembly
        committer = assembly.committer
        clean = committer.submitted_lsn == committer.durable_lsn
        try:
            assembly.checkpointer.checkpoint()
            assembly.checkpointer.checkpoint()
            assembly.log.close(next_lsn=committer.durable_lsn + 1 if clean else None)
        except (OSError, StorageError) as error:
            assembly.failure = StorageError(
                f"closing {assembly.path} failed: {error}. Nothing acknowledged is lost"
            )
