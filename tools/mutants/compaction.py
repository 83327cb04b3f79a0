"""Mistakes of compaction: what is dropped, in which order names change, and who reads meanwhile."""

from __future__ import annotations

from typing import Final

from tools.mutants.mutant import Edit, Mutant

CHECKPOINTER: Final = "walbatch/runtime/checkpointer.py"
COLUMNS: Final = "walbatch/core/columns.py"
COMPACTION: Final = "walbatch/storage/compaction.py"
LOG: Final = "walbatch/storage/log.py"
POLICY: Final = "walbatch/core/compaction.py"
READING: Final = "walbatch/storage/reading.py"
RECOVERY: Final = "walbatch/core/recovery.py"

MUTANTS: Final = (
    Mutant(
        name="a compacted segment gets its name before its bytes are synced",
        row="no directory sync after create or rename",
        edits=(
            Edit(
                COMPACTION,
                "        self.writer.seal(wall_ns=self._wall_ns)\n",
                """\
        import walbatch.storage.segment as _segment

        sync, _segment.sync_file = _segment.sync_file, lambda file, path: None
        try:
            self.writer.seal(wall_ns=self._wall_ns)
        finally:
            _segment.sync_file = sync
""",
            ),
        ),
        hint="images:compaction",
    ),
    Mutant(
        name="a compaction drops what only the newest checkpoint covers",
        row="checkpoint behind trimmed segments",
        edits=(
            Edit(
                CHECKPOINTER, "            self._covered = last\n", "            self._covered = checkpoint\n"
            ),
        ),
        hint="stale:compaction",
    ),
    Mutant(
        name="merged segments are removed before the one in their place has its name",
        row="unlink durable before the checkpoint that allows it",
        edits=(
            Edit(
                LOG,
                "        with self._guard:\n            try:\n                self._fs.rename(path + TEMPORARY_SUFFIX, path)\n",
                """\
        for old in run[:-1]:
            self._fs.unlink(self._layout.segment(old.header.number))
        with self._guard:
            try:
                self._fs.rename(path + TEMPORARY_SUFFIX, path)
""",
            ),
            Edit(
                LOG,
                "            del self._compactions.superseded[last]\n",
                """\
            self._compactions.superseded.clear()
            self._closed_bytes -= sum(old.file_bytes for old in run[:-1])
""",
            ),
        ),
        hint="images:merge",
    ),
    Mutant(
        name="merged segments are removed before the name in their place is durable",
        row="no directory sync after create or rename",
        edits=(
            Edit(
                LOG,
                "            self._closed[last] = segment\n"
                "        with self._breaking():\n            sync_directory(self._fs, self._layout.wal)\n",
                "            self._closed[last] = segment\n",
            ),
        ),
        hint="images:merge",
    ),
    Mutant(
        name="a segment that was merged and came back is read as if it were needed",
        row="an unlinked segment that comes back",
        edits=(
            Edit(RECOVERY, "            found.add(number)\n            continue\n", "            pass\n"),
        ),
        hint="images:compacted_middle",
    ),
    Mutant(
        name="a cursor of before is believed in a segment that was compacted",
        row="a frame spliced in from another segment, store or incarnation",
        edits=(
            Edit(
                READING,
                "            if segment.header.compacted and placed is not segment.header:\n",
                "            if placed is segment.header is None:\n",
            ),
        ),
        hint="schedules:compacted_backlog",
    ),
    Mutant(
        name="a small segment is taken for one in which all is settled",
        row="checkpoint behind trimmed segments",
        edits=(
            Edit(
                COMPACTION,
                "    if is_superfluous(use_of(segment), covered):\n",
                "    if is_superfluous(use_of(segment), covered) or segment.end_offset <= 2 * SECTOR:\n",
            ),
        ),
        hint="images:compaction",
    ),
    Mutant(
        name="the mark of one shard is asked about the operations of all",
        row="minimum over the shards that answered",
        edits=(
            Edit(
                POLICY,
                "            rows = [row for row in rows if not marks[route[row]].covers(lsns[row])]\n",
                "            rows = [row for row in rows if route and not any(mark.covers(lsns[row]) for mark in marks)]\n",
            ),
        ),
        hint="schedules:half_settled",
    ),
    Mutant(
        name="operations of a compacted frame get LSNs without holes",
        row="gaps or repeats accepted",
        edits=(
            Edit(
                COLUMNS,
                "            return [first_lsn + offset for offset in self.lsn_offsets]\n",
                "            return range(first_lsn, first_lsn + len(self.keys))\n",
            ),
        ),
        hint="schedules:merge",
    ),
    Mutant(
        name="what compactions took for settled is not noted in the log",
        row="state lost",
        edits=(Edit(LOG, "            self._note_dropped(covered)\n", ""),),
        hint="schedules:compacted_without_state",
    ),
    Mutant(
        name="what compactions took for settled is noted after it was dropped",
        row="unlink durable before the checkpoint that allows it",
        edits=(
            Edit(LOG, "            self._note_dropped(covered)\n", ""),
            Edit(
                LOG,
                "        self._compactions.succeeded()\n",
                "        self._note_dropped(covered)\n        self._compactions.succeeded()\n",
            ),
        ),
        hint="images:compacted_without_state",
    ),
)
