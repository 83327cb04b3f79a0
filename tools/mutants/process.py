"""Mistakes about processes and callers: two of them, their end, and what they do with their bytes."""

from __future__ import annotations

from typing import Final

from tools.mutants.mutant import Edit, Mutant

COMMITTER: Final = "walbatch/runtime/committer.py"
DISPATCHER: Final = "walbatch/runtime/dispatcher.py"
CLOSING: Final = "walbatch/engine/closing.py"
LOG: Final = "walbatch/storage/log.py"
STORE: Final = "walbatch/storage/store.py"

MUTANTS: Final = (
    Mutant(
        name="a lock that somebody holds is no obstacle",
        row="two processes, one process twice, another spelling of the path",
        edits=(
            Edit(
                STORE,
                "    if not isinstance(lock, bytes):\n        return lock\n",
                """\
    if isinstance(lock, bytes):
        lock = fs.lock(layout.lock + "2", note)
    if not isinstance(lock, bytes):
        return lock
""",
            ),
        ),
        hint="schedules:two_engines",
    ),
    Mutant(
        name="the lock is given up before the engine is done",
        row="two processes, one process twice, another spelling of the path",
        edits=(
            Edit(
                CLOSING,
                "        stopped = dispatcher.stop(grace)",
                "        assembly.store.lock.release()\n        stopped = dispatcher.stop(grace)",
            ),
        ),
        hint="schedules:successor",
    ),
    Mutant(
        name="close says drained and has not drained",
        row="interpreter exit without close",
        edits=(
            Edit(
                CLOSING,
                'reason = "drained" if dispatcher.flushing.drain(left) else "timeout"\n',
                'reason = "drained" if left != 0 else "timeout"\n',
            ),
            Edit(
                CLOSING,
                '        if reason == "drained" and (remaining',
                '        if reason == "" and (remaining',
            ),
        ),
        hint="images:roll",
    ),
    Mutant(
        name="close leaves tickets that nobody resolves",
        row="every ticket resolves exactly once",
        edits=(Edit(CLOSING, "            assembly.dispatcher.abandon()\n", ""),),
        hint="schedules:abandoned",
    ),
    Mutant(
        name="a failed engine leaves tickets that nobody resolves",
        row="every ticket resolves exactly once",
        edits=(
            Edit(
                COMMITTER,
                "            pending.durable.resolve(error=failure)\n",
                "",
            ),
        ),
        hint="faults:single/datasync",
    ),
    Mutant(
        name="an engine that is closing accepts operations",
        row="SIGTERM during a drain",
        edits=(
            Edit(
                COMMITTER,
                "        if self._closed is not None:\n            raise EngineClosed(self._closed)\n",
                "",
            ),
        ),
        hint="schedules:closing",
    ),
    Mutant(
        name="close forgets what was accepted and not yet written",
        row="SIGTERM during a drain",
        edits=(
            Edit(
                COMMITTER,
                "                if self._stopping and idle:\n",
                "                if self._stopping:\n",
            ),
        ),
        hint="schedules:closing",
    ),
    Mutant(
        name="a payload is not copied when it is submitted",
        row="a caller who changes a bytearray after submit",
        edits=(
            Edit(
                "walbatch/lanes.py",
                "        return bytes(value)\n",
                "        return value  # type: ignore[return-value]\n",
            ),
        ),
        hint="schedules:changed_bytes",
    ),
    Mutant(
        name="a sealed segment stays open",
        row="descriptors exhausted at rotation",
        edits=(
            Edit(
                LOG,
                "            self._active = active\n        old.close()\n",
                "            self._active = active\n",
            ),
        ),
        hint="schedules:few_descriptors",
    ),
    Mutant(
        name="a leader that a signal interrupts leaves its group to nobody",
        row="SIGINT inside a submit",
        edits=(
            Edit(
                COMMITTER,
                "                self._leave(pending)\n            raise\n",
                "                with self._cond:\n"
                "                    self._release(pending)\n"
                "            raise\n",
            ),
        ),
        hint="interrupts:threads",
    ),
    Mutant(
        name="a group whose leader was interrupted is written a second time",
        row="SIGINT inside a submit",
        edits=(
            Edit(
                COMMITTER,
                "        if self._log.last_lsn >= group.last_lsn:\n"
                "            return  # a leader that was interrupted had written it\n",
                "",
            ),
        ),
        hint="interrupts:threads",
    ),
    Mutant(
        name="an interrupted leader keeps the log for itself",
        row="EINTR with a handler that raises",
        edits=(
            Edit(
                COMMITTER,
                "            pending.led = False\n            self._release(pending)\n",
                "            pending.led = False\n",
            ),
        ),
        hint="interrupts:threads",
    ),
    Mutant(
        name="a group that is handed over twice is delivered twice",
        row="SIGINT inside a submit",
        edits=(
            Edit(
                DISPATCHER,
                "            if isinstance(committed, Committed) and committed.group.last_lsn > self._flow.end_lsn:\n",
                "            if isinstance(committed, Committed):\n",
            ),
        ),
        hint="interrupts:threads",
    ),
    Mutant(
        name="the engine stops at its third commit, and nothing has failed",
        row="no thread waits for ever",
        edits=(
            Edit(
                COMMITTER,
                "        told: Sequence[PendingGroup] = ()\n        try:\n            if self._failure is None:\n",
                """\
        told: Sequence[PendingGroup] = ()
        if self.commits == 3 and self._failure is None:
            self._fail(StorageError("no reason"))
        try:
            if self._failure is None:
""",
            ),
        ),
        hint="images:roll",
    ),
)
