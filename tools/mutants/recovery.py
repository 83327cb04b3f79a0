"""Mistakes of recovery: damage that is taken for a torn tail, tails that are taken for damage, and second crashes."""

from __future__ import annotations

from typing import Final

from tools.mutants.mutant import Edit, Mutant

FRAME: Final = "walbatch/core/frame.py"
LAYOUT: Final = "walbatch/storage/layout.py"
LOG: Final = "walbatch/storage/log.py"
OPENING: Final = "walbatch/storage/opening.py"
RECOVERY: Final = "walbatch/core/recovery.py"
SCANNER: Final = "walbatch/core/scanner.py"

MUTANTS: Final = (
    Mutant(
        name="a later frame is no proof that damaged bytes were durable",
        row="corruption in the middle cut off as a torn tail",
        edits=(
            Edit(
                SCANNER,
                "                        evidence = max(evidence, frame.synced_lsn)\n",
                "                        evidence = max(evidence, frame.synced_lsn if frame.type > 1 else 0)\n",
            ),
            Edit(
                SCANNER,
                "                            evidence = max(evidence, frame.last_lsn)\n",
                "                            evidence = max(evidence, 0)\n",
            ),
        ),
        hint="bits:killed",
    ),
    Mutant(
        name="an idle stamp is no proof that damaged bytes were durable",
        row="corruption in the middle cut off as a torn tail",
        edits=(
            Edit(
                SCANNER,
                "                        evidence = max(evidence, frame.synced_lsn)\n",
                "                        evidence = max(evidence, frame.synced_lsn if frame.type != 2 else 0)\n",
            ),
        ),
        hint="bits:quiet",
    ),
    Mutant(
        name="a seal footer is no proof that damaged bytes were durable",
        row="a sealed segment damaged or cut at a frame boundary",
        edits=(
            Edit(
                SCANNER,
                "                        evidence = max(evidence, frame.synced_lsn)\n",
                "                        evidence = max(evidence, frame.synced_lsn if frame.type != 3 else 0)\n",
            ),
        ),
        hint="bits:sealed",
    ),
    Mutant(
        name="the header of the next segment is no proof of where the one before ended",
        row="a sealed segment damaged or cut at a frame boundary",
        edits=(
            Edit(
                RECOVERY,
                "        bound = following.prev_last_lsn if following and following.prev_number == segment.number else 0\n",
                "        bound = 0\n",
            ),
        ),
        hint="cuts:backlog",
    ),
    Mutant(
        name="the checkpoint is no proof of where the log ended",
        row="a missing middle or last segment",
        edits=(
            Edit(
                RECOVERY,
                "    durable_lsn = facts.durable_lsn\n    last = index",
                "    durable_lsn = 0\n    last = index",
            ),
        ),
        hint="bits:held",
    ),
    Mutant(
        name="a torn tail is refused as corruption",
        row="a torn tail refused as corruption",
        edits=(
            Edit(
                RECOVERY,
                "        applies=lambda v: v.damaged and v.evidence),\n",
                "        applies=lambda v: v.damaged),\n",
            ),
        ),
        hint="images:single",
    ),
    Mutant(
        name="a torn tail is not copied to quarantine",
        row="the quarantine copy not synced",
        edits=(Edit(LOG, "        for torn in plan.torn:\n            quarantine(fs, layout, torn)\n", ""),),
        hint="quarantine:single",
    ),
    Mutant(
        name="the copy in quarantine is not synced",
        row="the quarantine copy not synced",
        edits=(
            Edit(
                LAYOUT,
                "            sync_file(target, temporary)\n        finally:\n            target",
                "        finally:\n            target",
            ),
        ),
        hint="quarantine:single",
    ),
    Mutant(
        name="the name of the copy in quarantine is not synced",
        row="the quarantine copy not synced",
        edits=(
            Edit(
                LAYOUT,
                """\
    fs.rename(temporary, path)
    sync_directory(fs, path.rpartition("/")[0])
    return path
""",
                """\
    fs.rename(temporary, path)
    return path
""",
            ),
            Edit(OPENING, '    write_durably(fs, f"{name}.note", note.encode())\n', "    del note\n"),
        ),
        hint="quarantine:single",
    ),
    Mutant(
        name="the old segment is cut before the new one is durable",
        row="evidence overwritten",
        edits=(
            Edit(
                LOG,
                "        active = SegmentWriter.create(\n"
                "            fs, layout.segment(header.number), header, segment_bytes=settings",
                """\
        frames = list(first_frames(fs, layout, plan))
        cut_predecessor(fs, layout, closed_segments(facts, plan), header.prev_number)
        active = SegmentWriter.create(
            fs, layout.segment(header.number), header, segment_bytes=settings""",
            ),
            Edit(
                LOG,
                "            first=list(first_frames(fs, layout, plan)),\n",
                "            first=frames,\n",
            ),
        ),
        hint="twice:single",
    ),
    Mutant(
        name="a read that failed is taken for damage and its bytes for a torn tail",
        row="a transient read error repaired",
        edits=(
            Edit(
                SCANNER,
                "    frame = read_frame_header(reader.get, header=header, offset=offset)\n    padded",
                """\
    try:
        frame = read_frame_header(reader.get, header=header, offset=offset)
    except OSError as error:
        raise FrameError(str(error)) from error
    padded""",
            ),
        ),
        hint="reads:one",
    ),
    Mutant(
        name="recovery copies the unproven frames and leaves one out",
        row="a crash or I/O error inside recovery, again and again",
        edits=(
            Edit(
                OPENING,
                "            for frame in plan.copied:\n",
                "            for frame in plan.copied[: max(1, len(plan.copied) - 1)]:\n",
            ),
        ),
        hint="images:interval",
    ),
    Mutant(
        name="every opening is of the same epoch",
        row="recovery that is not idempotent",
        edits=(Edit(RECOVERY, "epoch=max(epochs) + 1,", "epoch=max(1, *epochs),"),),
        hint="images:transactional",
    ),
)
