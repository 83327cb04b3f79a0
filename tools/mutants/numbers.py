"""Mistakes about LSNs."""

from __future__ import annotations

from typing import Final

from tools.mutants.mutant import Edit, Mutant

RECOVERY: Final = "walbatch/core/recovery.py"
SCANNER: Final = "walbatch/core/scanner.py"

_NEXT: Final = (
    "            next_lsn = scan.last_lsn + 1 if clean else _highest_lsn(facts) + limits.LSN_JUMP + 1\n"
)

MUTANTS: Final = (
    Mutant(
        name="LSNs of a tail that was lost are given out again",
        row="LSN reused after a lost tail",
        edits=(Edit(RECOVERY, _NEXT, "            next_lsn = scan.last_lsn + 1\n"),),
        hint="names:nowait",
    ),
    Mutant(
        name="LSNs start at 1 again when the last segment is empty",
        row="LSN reset on an empty log",
        edits=(
            Edit(RECOVERY, _NEXT, _NEXT.replace("if clean", "if clean and scan.operations else 1 if clean")),
            Edit(
                RECOVERY,
                "prev_last_lsn = copied[0].header.first_lsn - 1 if copied else scan.last_lsn\n",
                "prev_last_lsn = copied[0].header.first_lsn - 1 if copied else scan.last_lsn if scan.operations else 0\n",
            ),
        ),
        hint="images:reopen",
    ),
    Mutant(
        name="the next LSN is taken from the checkpoint alone",
        row="LSN taken from the checkpoint instead of the larger of both",
        edits=(
            Edit(
                RECOVERY, _NEXT, "            next_lsn = (checkpoint.durable_lsn if checkpoint else 0) + 1\n"
            ),
        ),
        hint="images:single",
    ),
    Mutant(
        name="gaps between frames are accepted",
        row="gaps or repeats accepted",
        edits=(
            Edit(
                SCANNER,
                "            if frame.first_lsn != expected or frame.synced_lsn >= expected:\n",
                "            if frame.first_lsn < expected or frame.synced_lsn >= frame.first_lsn:\n",
            ),
            Edit("walbatch/core/frame.py", "_SEED.pack(salt, number, offset)", "_SEED.pack(salt, number, 0)"),
        ),
        hint="splice:killed",
    ),
    Mutant(
        name="repeated LSNs are accepted",
        row="gaps or repeats accepted",
        edits=(
            Edit(
                SCANNER,
                "            if frame.first_lsn != expected or frame.synced_lsn >= expected:\n",
                "            if frame.first_lsn > expected:\n",
            ),
            Edit("walbatch/core/frame.py", "_SEED.pack(salt, number, offset)", "_SEED.pack(salt, number, 0)"),
        ),
        hint="splice:killed",
    ),
)
