"""Mistakes about what may be called durable, and about what a failed sync means."""

from __future__ import annotations

from typing import Final

from tools.mutants.mutant import Edit, Mutant

COMMITTER: Final = "walbatch/runtime/committer.py"
LAYOUT: Final = "walbatch/storage/layout.py"
LOG: Final = "walbatch/storage/log.py"
SEGMENT: Final = "walbatch/storage/segment.py"

_DATASYNC_FAILED: Final = """\
        file.datasync()
    except OSError as error:
        raise sync_failed(path, error) from error
"""

_SYNC_ENDS_THE_LOG: Final = "            else:\n                self._broken = str(failure)\n"
_SYNC_IS_UNKNOWN: Final = (
    "            failure = _failure_under(error, ambient)\n"
    "            if failure is None:\n"
    f"                self._syncing = False\n{_SYNC_ENDS_THE_LOG}"
)

MUTANTS: Final = (
    Mutant(
        name="a commit group is acknowledged without any sync",
        row="ack before sync",
        edits=(Edit(COMMITTER, "                if sync:\n                    self._sync_log()\n", ""),),
        hint="images:single",
    ),
    Mutant(
        name="a commit group is acknowledged right before its sync",
        row="ack before sync",
        edits=(
            Edit(
                COMMITTER,
                "                if sync:\n                    self._sync_log()\n",
                "                if sync:\n                    pending.durable.resolve()\n                    self._sync_log()\n",
            ),
        ),
        hint="images:nowait/8",
    ),
    Mutant(
        name="a ticket that nobody waits for says durable at once",
        row="ack before sync",
        edits=(
            Edit(
                COMMITTER,
                "                elif opened and not wait:\n                    self._rouse()\n",
                "                elif not wait:\n"
                "                    pending.durable.resolve()\n"
                "                    self._rouse()\n",
            ),
        ),
        hint="images:nowait",
    ),
    Mutant(
        name="who comes while a group is being written joins it",
        row="a late arrival acknowledged by a sync that began before its write",
        edits=(
            Edit(
                COMMITTER,
                "pending is None or pending.position is not None or not pending.group",
                "pending is None or not pending.group",
            ),
        ),
        hint="images:threads",
    ),
    Mutant(
        name="a sync for interval lanes counts what a leader wrote while it ran",
        row="a late arrival acknowledged by a sync that began before its write",
        edits=(
            Edit(
                COMMITTER,
                "                self._owner = pending or self\n",
                "                self._owner = pending\n",
            ),
            Edit(
                COMMITTER,
                "if self._owner or self._failure or not (pending or sync_due or stamp_due):",
                "if self._failure or not (sync_due or (not self._owner and (pending or stamp_due))):",
            ),
            Edit(
                COMMITTER,
                """\
            else:
                self._sync_log()
        except (OSError, StorageError) as error:
            self._fail(error)
        else:
            if not stamp:
                with self._cond:
                    told = self._note_synced()
                self._hand_on(told)
        self._give_back(told)
""",
                """\
            else:
                self._sync_log()
        except (OSError, StorageError) as error:
            self._fail(error)
        else:
            if not stamp:
                self._finish_sync()
        if stamp:
            self._give_back(told)
""",
            ),
        ),
        hint="schedules:on_the_dot/500",
    ),
    Mutant(
        name="a group of lanes of both kinds is synced only if its last operation asks for it",
        row="ack before sync",
        edits=(
            Edit(
                "walbatch/core/commit_group.py",
                "self.needs_sync = self.needs_sync or needs_sync",
                "self.needs_sync = needs_sync",
            ),
        ),
        hint="images:mixed",
    ),
    Mutant(
        name="an interval lane is acknowledged and synced only when the engine closes",
        row="ack before sync",
        edits=(
            Edit(
                COMMITTER,
                "sync_due = bool(self._written) and now >= self._written_since_ns + self._settings.interval_ns",
                "sync_due = False",
            ),
            Edit(
                COMMITTER,
                "        if self._written:\n"
                "            return self._written_since_ns + self._settings.interval_ns\n",
                "",
            ),
        ),
        hint="images:interval",
    ),
    Mutant(
        name="the interval of a lane starts again with every commit of a busy log",
        row="ack before sync",
        edits=(
            Edit(
                COMMITTER,
                "            if not self._written:\n                self._written_since_ns",
                "            if True:\n                self._written_since_ns",
            ),
        ),
        hint="images:busy_interval",
    ),
    Mutant(
        name="the error of a datasync is swallowed",
        row="a sync error swallowed",
        edits=(
            Edit(LAYOUT, _DATASYNC_FAILED, "        file.datasync()\n    except OSError:\n        pass\n"),
        ),
        hint="faults:single/datasync",
    ),
    Mutant(
        name="a failed datasync is tried again and believed",
        row="a sync error retried and believed",
        edits=(
            Edit(
                LAYOUT,
                _DATASYNC_FAILED,
                "        file.datasync()\n    except OSError:\n        file.datasync()\n",
            ),
        ),
        hint="faults:single/datasync",
    ),
    Mutant(
        name="the error of a directory sync is swallowed",
        row="a sync error sticky on one path only: directory",
        edits=(
            Edit(
                LAYOUT,
                "        fs.sync_directory(path)\n"
                "    except OSError as error:\n"
                "        raise sync_failed(path, error) from error\n",
                "        fs.sync_directory(path)\n    except OSError:\n        pass\n",
            ),
        ),
        hint="faults:single/sync_directory",
    ),
    Mutant(
        name="the error of a sync that says the disk is full is taken for a full disk and tried again",
        row="a sync error retried and believed",
        edits=(
            Edit(LAYOUT, _DATASYNC_FAILED, "        file.datasync()\n    except OSError:\n        raise\n"),
        ),
        hint="faults:roll/datasync",
    ),
    Mutant(
        name="a failed sync fails its own group, and the engine goes on",
        row="a sync error sticky on one path only: commit",
        edits=(
            Edit(LOG, "            self._broken = str(error)\n            raise\n", "            raise\n"),
            Edit(LOG, _SYNC_IS_UNKNOWN, "            self._syncing = False\n"),
            Edit(
                COMMITTER,
                """\
        except (OSError, StorageError) as error:
            self._fail(error)
        else:
            if self._failure is None:
                told = self._finish(pending, synced=sync)
""",
                """\
        except (OSError, StorageError) as error:
            with self._cond:
                self._queue.popleft()
            pending.durable.resolve(error=DurabilityUnknown(str(error)))
        else:
            if self._failure is None:
                told = self._finish(pending, synced=sync)
""",
            ),
        ),
        hint="faults:stubborn/datasync",
    ),
    Mutant(
        name="a failed sync while the log rolls is not sticky",
        row="a sync error sticky on one path only: rotation, seal",
        edits=(
            Edit(LOG, "            self._broken = str(error)\n            raise\n", "            raise\n"),
            Edit(LOG, _SYNC_ENDS_THE_LOG, ""),
            Edit(
                COMMITTER,
                "            except OSError as error:\n                if error.errno not in {errno.ENOSPC, errno.EDQUOT} or",
                "            except (OSError, StorageError) as error:\n                if",
            ),
        ),
        hint="faults:roll/datasync",
    ),
    Mutant(
        name="a failed sync of an interval lane is not told",
        row="a sync error sticky on one path only: interval",
        edits=(
            Edit(LOG, "            self._broken = str(error)\n            raise\n", "            raise\n"),
            Edit(LOG, _SYNC_ENDS_THE_LOG, ""),
            Edit(
                COMMITTER,
                """\
                self._sync_log()
        except (OSError, StorageError) as error:
            self._fail(error)
        else:
            if not stamp:
                with self._cond:
""",
                """\
                self._sync_log()
        except (OSError, StorageError):
            self._finish_sync()
        else:
            if not stamp:
                with self._cond:
""",
            ),
        ),
        hint="faults:interval/datasync",
    ),
    Mutant(
        name="what a killed process wrote and never synced is believed where it stands",
        row="a process restarted after a failed sync trusting the page cache",
        edits=(
            Edit(
                "walbatch/core/recovery.py",
                "            copied = scan.unproven\n",
                "            copied = ()\n",
            ),
        ),
        hint="twice:single",
    ),
    Mutant(
        name="what recovery has copied forward is not synced before it is delivered",
        row="replaying an unsynced tail to a backend and then losing it to a power cut",
        edits=(
            Edit(
                SEGMENT,
                "            sync_file(file, temporary)\n",
                "            if not first:\n                sync_file(file, temporary)\n",
            ),
        ),
        hint="twice:single",
    ),
    Mutant(
        name="a frame claims that all before it was synced",
        row="ack before sync",
        edits=(
            Edit(
                COMMITTER,
                "        synced_lsn = self._durable_lsn\n",
                "        synced_lsn = group.first_lsn - 1\n",
            ),
        ),
        hint="images:interval",
    ),
    Mutant(
        name="an idle stamp claims what has not been synced",
        row="ack before sync",
        edits=(
            Edit(
                COMMITTER,
                "                    not self._queue and not self._written and self._stamped_lsn < self._durable_lsn\n",
                "                    not self._queue and self._stamped_lsn < self._log.last_lsn\n",
            ),
            Edit(
                COMMITTER,
                "self._log.stamp(next_lsn=self._durable_lsn + 1, clean=False)",
                "self._log.stamp(next_lsn=self._log.last_lsn + 1, clean=False)",
            ),
            Edit(
                COMMITTER,
                "            self._stamped_lsn = self._durable_lsn\n",
                "            self._stamped_lsn = self._log.last_lsn\n",
            ),
            Edit(
                COMMITTER,
                "        if self._written:\n"
                "            return self._written_since_ns + self._settings.interval_ns\n"
                "        if self._stamped_lsn < self._durable_lsn:\n",
                "        if self._stamped_lsn < self._log.last_lsn:\n",
            ),
            Edit(
                LOG,
                "        self.sync()\n        assert next_lsn == self._active.last_lsn + 1\n",
                "        assert next_lsn == self._active.last_lsn + 1\n",
            ),
        ),
        hint="images:slow_interval",
    ),
)
