"""Mistakes about the names of files: what is there after a power cut, and what must not be taken for something else."""

from __future__ import annotations

from typing import Final

from tools.mutants.mutant import Edit, Mutant

CHECKPOINTER: Final = "walbatch/runtime/checkpointer.py"
LAYOUT: Final = "walbatch/storage/layout.py"
LOG: Final = "walbatch/storage/log.py"
RECOVERY: Final = "walbatch/core/recovery.py"
SEGMENT: Final = "walbatch/storage/segment.py"
STORE: Final = "walbatch/storage/store.py"
SURVEY: Final = "walbatch/storage/survey.py"

MUTANTS: Final = (
    Mutant(
        name="the directory is not synced after a segment is created",
        row="no directory sync after create or rename",
        edits=(
            Edit(
                SEGMENT,
                '            fs.rename(temporary, path)\n            sync_directory(fs, path.rpartition("/")[0])\n',
                "            fs.rename(temporary, path)\n",
            ),
        ),
        hint="images:single",
    ),
    Mutant(
        name="a segment gets its name before its bytes are synced",
        row="no directory sync after create or rename",
        edits=(
            Edit(
                SEGMENT,
                "            sync_file(file, temporary)\n            fs.rename(temporary, path)\n",
                "            fs.rename(temporary, path)\n            sync_file(file, temporary)\n",
            ),
        ),
        hint="images:single",
    ),
    Mutant(
        name="the identity is renamed before it is synced",
        row="no directory sync after create or rename",
        edits=(
            Edit(
                LAYOUT,
                "        file.write([data], 0)\n        sync_file(file, temporary)\n",
                "        file.write([data], 0)\n",
            ),
        ),
        hint="images:single",
    ),
    Mutant(
        name="the directory is not synced after the identity got its name",
        row="no directory sync after create or rename",
        edits=(
            Edit(
                LAYOUT,
                """\
        file.write([data], 0)
        sync_file(file, temporary)
    finally:
        file.close()
    fs.rename(temporary, path)
    sync_directory(fs, path.rpartition("/")[0])
""",
                """\
        file.write([data], 0)
        sync_file(file, temporary)
    finally:
        file.close()
    fs.rename(temporary, path)
""",
            ),
        ),
        hint="images:single",
    ),
    Mutant(
        name="the parents that a new store made are not synced",
        row="no directory sync after creating parents",
        edits=(
            Edit(
                STORE,
                '            _sync_parent(fs, parent)\n            parent = parent.rpartition("/")[0]\n',
                '            parent = parent.rpartition("/")[0]\n',
            ),
        ),
        hint="images:deep",
    ),
    Mutant(
        name="the name of a new store is not synced in its parent",
        row="no directory sync after creating parents",
        edits=(Edit(STORE, '        _sync_parent(fs, "/")\n', ""),),
        hint="images:single",
    ),
    Mutant(
        name="a store that a killed opener made is taken over without a sync of its names",
        row="no directory sync after create or rename",
        edits=(
            Edit(
                STORE,
                "        sync_directory(fs, layout.root)\n        return uuid\n",
                "        return uuid\n",
            ),
        ),
        hint="twice:single",
    ),
    Mutant(
        name="a segment that a killed opener named is built on without a sync of its name",
        row="no directory sync after create or rename",
        edits=(Edit(LOG, "        sync_directory(fs, layout.wal)\n        remove", "        remove"),),
        hint="images:half_named",
    ),
    Mutant(
        name="segments are unlinked before the checkpoint that allows it",
        row="unlink durable before the checkpoint that allows it",
        edits=(
            Edit(
                CHECKPOINTER,
                "        self._state.save_checkpoint(checkpoint)\n",
                "        self._log.trim(settled.watermark)\n        self._state.save_checkpoint(checkpoint)\n",
            ),
        ),
        hint="images:roll",
    ),
    Mutant(
        name="the log is trimmed up to the newest checkpoint alone",
        row="checkpoint behind trimmed segments",
        edits=(
            Edit(
                CHECKPOINTER,
                "        lsn = self._covered.watermark\n",
                "        lsn = self.checkpointed_lsn\n",
            ),
        ),
        hint="stale:roll",
    ),
    Mutant(
        name="a trimmed segment that comes back is read as if it were needed",
        row="an unlinked segment that comes back",
        edits=(
            Edit(
                RECOVERY,
                "        applies=lambda v: v.settled),\n",
                "        applies=lambda v: False),\n",
            ),
            Edit(
                RECOVERY,
                "    if header.prev_last_lsn <= watermark:\n        return True\n",
                "",
            ),
        ),
        hint="images:roll",
    ),
    Mutant(
        name="a segment that is missing in the middle is not noticed",
        row="a segment known but absent",
        edits=(
            Edit(
                RECOVERY, "        applies=lambda v: not v.chained),\n", "        applies=lambda v: False),\n"
            ),
        ),
        hint="loss:backlog",
    ),
    Mutant(
        name="a last segment that is missing is not noticed",
        row="a segment known but absent",
        edits=(
            Edit(
                RECOVERY,
                "    lost = last and facts.last_segment > segment.number\n",
                "    lost = False\n",
            ),
        ),
        hint="loss:second_life",
    ),
    Mutant(
        name="a segment of another store is taken for this one's",
        row="a segment present but unknown",
        edits=(Edit(RECOVERY, "        and segment.header.store == facts.store\n", ""),),
        hint="loss:killed",
    ),
    Mutant(
        name="a segment under another one's name is taken for it",
        row="a segment present but unknown",
        edits=(
            Edit(RECOVERY, "        and segment.header.number == segment.number\n", ""),
            Edit(
                RECOVERY,
                "        and before.header.salt == header.prev_salt\n",
                "",
            ),
            Edit(
                RECOVERY, "        before.number == header.prev_number\n        and before", "        before"
            ),
        ),
        hint="loss:backlog",
    ),
    Mutant(
        name="a log that is gone is taken for a new one",
        row="a fresh store silently created over an existing one",
        edits=(
            Edit(
                RECOVERY,
                "    if not facts.segments and known:\n",
                "    if False:\n",
            ),
        ),
        hint="loss:backlog",
    ),
    Mutant(
        name="a temporary file that was left over is in the way of the next segment",
        row="leftover temporary files",
        edits=(
            Edit(LOG, "        remove_temporary_files(fs, layout)\n", ""),
            Edit(
                SEGMENT,
                "        if fs.exists(temporary):\n            fs.unlink(temporary)\n",
                "",
            ),
        ),
        hint="images:single",
    ),
    Mutant(
        name="a temporary file that was left over is in the way of the identity",
        row="leftover temporary files",
        edits=(
            Edit(
                LAYOUT,
                """\
    temporary = path + TEMPORARY_SUFFIX
    if fs.exists(temporary):
        fs.unlink(temporary)
    file = fs.create(temporary)
""",
                """\
    temporary = path + TEMPORARY_SUFFIX
    file = fs.create(temporary)
""",
            ),
        ),
        hint="images:single",
    ),
    Mutant(
        name="a temporary file in the log is taken for a segment",
        row="foreign files",
        edits=(
            Edit(
                LAYOUT,
                "    match = _SEGMENT_NAME.fullmatch(name)\n",
                "    match = _SEGMENT_NAME.match(name)\n",
            ),
        ),
        hint="images:single",
    ),
    Mutant(
        name="segments are read in the order of the listing",
        row="order taken from mtime or listing",
        edits=(
            Edit(LAYOUT, "{self.wal}/{number:019d}.seg", "{self.wal}/{number}.seg"),
            Edit(LAYOUT, r'r"(\d{19})\.seg"', r'r"(\d{1,19})\.seg"'),
            Edit(
                SURVEY,
                """\
    return sorted(
        number for name in fs.list_directory(layout.wal) if (number := segment_number(name)) is not None
    )
""",
                """\
    return [
        number for name in fs.list_directory(layout.wal) if (number := segment_number(name)) is not None
    ]
""",
            ),
        ),
        hint="images:eleven_segments",
    ),
)
