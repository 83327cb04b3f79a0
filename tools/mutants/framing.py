"""Mistakes about bytes: frames, checksums, and where one ends."""

from __future__ import annotations

from typing import Final

from tools.mutants.mutant import Edit, Mutant

FRAME: Final = "walbatch/core/frame.py"
COLUMNS: Final = "walbatch/core/columns.py"
LOG: Final = "walbatch/storage/log.py"
READING: Final = "walbatch/storage/reading.py"
SCANNER: Final = "walbatch/core/scanner.py"
SEGMENT: Final = "walbatch/storage/segment.py"

_PADDED_CRC: Final = "parts=(stored, tail), crc=crc32c(tail, crc32c(stored, 0)),\n"
_CHECK_CRC: Final = "    if crc32c(padded, 0) != header.body_crc:\n"

MUTANTS: Final = (
    Mutant(
        name="a frame that a failed write left in part is followed by the next one",
        row="bytes left by a failed append and the next one landing after them",
        edits=(
            Edit(
                SEGMENT,
                """\
        try:
            self._file.write([head, *body.parts, zeros], offset)
        except OSError:
""",
                """\
        try:
            self._file.write([head, *body.parts, zeros], offset)
        except OSError:
            self._tail = (offset + body.total_bytes, *self._tail[1:])
            raise
""",
            ),
        ),
        hint="faults:single/write",
    ),
    Mutant(
        name="the zeros ahead of a frame begin with its last sector",
        row="a frame straddling sectors",
        edits=(
            Edit(SEGMENT, "AHEAD_BYTES: Final = 128 * limits.KIB\n", "AHEAD_BYTES: Final = 1024\n"),
            Edit(
                SEGMENT,
                "            self._file.write([head, *body.parts, zeros], offset)\n",
                "            self._file.write([head, *body.parts], offset)\n"
                "            if zeros:\n"
                "                self._file.write([zeros], end - SECTOR)\n",
            ),
        ),
        hint="images:roll",
    ),
    Mutant(
        name="a write that a full disk has cut short is taken for done",
        row="short write",
        edits=(
            Edit(
                SEGMENT,
                """\
        except OSError:
            self._room_end = 0  # on a full disk the frame alone may fit
            raise
""",
                """\
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
""",
            ),
        ),
        hint="faults:roll/write",
    ),
    Mutant(
        name="the new segment takes the number of the last one and replaces it",
        row="append after a torn tail",
        edits=(
            Edit(
                "walbatch/core/recovery.py",
                "next_segment=max(numbers) + 1,",
                "next_segment=max([1, *numbers]),",
            ),
        ),
        hint="images:reopen",
    ),
    Mutant(
        name="frames share sectors with frames that were acknowledged",
        row="a frame straddling sectors",
        edits=(
            Edit("walbatch/limits.py", "SECTOR_BYTES: Final = 512\n", "SECTOR_BYTES: Final = 128\n"),
            Edit(
                "walbatch/limits.py",
                "SEGMENT_BYTES_MAX: Final = 256 * MIB\n",
                "SEGMENT_BYTES_MAX: Final = 64 * MIB\n",
            ),
        ),
        hint="images:single",
    ),
    Mutant(
        name="the CRC of a body leaves out the lengths and the names in front",
        row="CRC not covering the length",
        edits=(
            Edit(FRAME, _PADDED_CRC, "parts=(stored, tail), crc=crc32c((stored + tail)[96:], 0),\n"),
            Edit(FRAME, _CHECK_CRC, "    if crc32c(padded[96:], 0) != header.body_crc:\n"),
        ),
        hint="bits:killed",
    ),
    Mutant(
        name="the CRC of a frame's header is not checked",
        row="a header the CRC does not cover",
        edits=(
            Edit(
                FRAME,
                "    if crc32c(data[:crc_at], seed) != _FRAME_CRC.unpack_from(data, crc_at)[0]:\n",
                "    if crc_at != limits.FRAME_HEADER_BYTES - _FRAME_CRC.size:\n",
            ),
        ),
        hint="splice:killed",
    ),
    Mutant(
        name="the CRC of a segment's header is not checked",
        row="a header the CRC does not cover",
        edits=(Edit(FRAME, "    if not crc_valid:\n", "    if crc_valid is None:\n"),),
        hint="bits:killed",
    ),
    Mutant(
        name="the CRC of a body is not checked",
        row="CRC not covering the payload",
        edits=(Edit(FRAME, _CHECK_CRC, "    if header.body_crc < 0:\n"),),
        hint="bits:killed",
    ),
    Mutant(
        name="the CRC of a frame does not know which life of the store wrote it",
        row="a frame spliced in from another segment, store or incarnation",
        edits=(Edit(FRAME, "_SEED.pack(salt, number, offset)", "_SEED.pack(0, number, offset)"),),
        hint="splice:killed",
    ),
    Mutant(
        name="zeros are taken for the end though frames follow",
        row="zero length taken for the end though data follows",
        edits=(
            Edit(
                SCANNER,
                "    evidence = seen = resume = 0\n    end = start\n",
                "    evidence = seen = resume = 0\n"
                "    end = start\n"
                "    if not any(reader.get(SECTOR, start)):\n"
                "        return None\n",
            ),
        ),
        hint="zeros:killed",
    ),
    Mutant(
        name="a frame with as many operations as one may hold is written and cannot be read",
        row="an operation too large, accepted and then unreadable",
        edits=(
            Edit(
                FRAME,
                "    if count > limits.FRAME_COUNT_MAX or raw",
                "    if count >= limits.FRAME_COUNT_MAX or raw",
            ),
        ),
        hint="schedules:full_frame/1",
    ),
    Mutant(
        name="an empty payload is not read back",
        row="empty, one-byte and exact-limit payloads",
        edits=(
            Edit(
                COLUMNS,
                "    if end != raw_end:\n        raise",
                "    if end != raw_end or min(payload_bytes.values) < 4:\n        raise",
            ),
        ),
        hint="images:smallest",
    ),
    Mutant(
        name="the last frame of a segment that is exactly full is not read",
        row="a segment exactly full",
        edits=(
            Edit(
                SCANNER,
                "    while offset < file_bytes and not sealed:\n",
                "    while offset + SECTOR < file_bytes and not sealed:\n",
            ),
        ),
        hint="images:exactly_full",
    ),
    Mutant(
        name="old blocks in new room are read as a part of the log",
        row="size grown but zeros or old blocks as content",
        edits=(
            Edit(
                "walbatch/core/recovery.py",
                "        and (max(damage.evidence_lsn, durable_lsn) > segment.last_lsn or _is_compacted(segment)),\n",
                "        and damage.reason != 'no frame magic',\n",
            ),
        ),
        hint="images:single",
    ),
    Mutant(
        name="a frame that is damaged is passed over when it is read back",
        row="an undecodable payload that stops the world",
        edits=(
            Edit(
                READING,
                "        except FrameError as error:\n            path =",
                "        except FrameError as error:\n            return None\n            path =",
            ),
        ),
        hint="bits:backlog",
    ),
)
