"""The header of a segment that has none any more."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from walbatch.core.checksum import crc32c
from walbatch.core.frame import (
    SECTOR,
    SEGMENT_COMPACTED,
    SEGMENT_OPTIONS,
    FrameType,
    SegmentHeader,
    decode_segment_header,
    encode_segment_header,
)
from walbatch.core.recovery import StoreFacts
from walbatch.errors import CorruptionError
from walbatch.ports import File
from walbatch.salvage.loss import settled_lsn
from walbatch.salvage.repair import valid_frames


def find_header(facts: StoreFacts, index: int, file: File) -> SegmentHeader:
    """The header that a segment must have had, as its neighbours and its own remains tell.

    A wrong guess does no harm: no frame is whole under the salt of another life of the store.
    """
    assert facts.store is not None
    number = facts.segments[index].number
    before = facts.segments[index - 1] if index else None
    following = facts.segments[index + 1].header if index + 1 < len(facts.segments) else None
    if following is not None and following.prev_number != number:
        following = None
    remains = _remains(file.read(SECTOR, 0), facts.store, number)
    models = [
        header for header in (following, remains, before.header if before else None) if header is not None
    ]
    if not models:
        raise CorruptionError(
            f"the header of segment {number} is damaged, and nothing else tells what it was. Nothing was changed; restore the "
            "file from a copy",
            path=f"segment {number}",
            expected="a header, or another segment beside it",
        )
    salts = [following.prev_salt] if following is not None else [header.salt for header in models]
    # Every flag only allows something; those that the frames do not need are taken back.
    candidates = [
        replace(
            models[0], number=number, salt=salt, store=facts.store, flags=SEGMENT_COMPACTED | SEGMENT_OPTIONS
        )
        for salt in salts
    ]
    header = max(candidates, key=lambda candidate: sum(1 for _ in valid_frames(file, candidate)))
    if before is not None:
        prev_last_lsn = before.last_lsn
        operations_before = (before.header.operations_before if before.header else 0) + before.operations
    else:
        prev_last_lsn = _first_prev_lsn(facts, file, header, remains)
        operations_before = remains.operations_before if remains is not None else 0
    epochs = [model.epoch for model in models] + ([facts.checkpoint.epoch] if facts.checkpoint else [])
    return replace(
        header, epoch=following.epoch if following is not None else max(epochs) + 1, prev_number=before.number if before else 0,
        prev_salt=before.header.salt if before and before.header else 0, prev_last_lsn=prev_last_lsn,
        first_lsn=prev_last_lsn + 1, operations_before=operations_before,
        checkpointed_lsn=min(settled_lsn(facts), prev_last_lsn), flags=_flags_needed(file, header),
    )  # fmt: skip


def _flags_needed(file: File, header: SegmentHeader) -> int:
    """What the frames of a segment need its header to say. Whether their bodies have options is not looked at: they may."""
    sparse = any(
        whole.header.type is FrameType.OPERATIONS and whole.header.count < whole.header.span
        for whole in valid_frames(file, header)
    )
    return SEGMENT_OPTIONS | (SEGMENT_COMPACTED if sparse else 0)


def _first_prev_lsn(
    facts: StoreFacts, file: File, header: SegmentHeader, remains: SegmentHeader | None
) -> int:
    """The LSN that the log's first segment follows. Everything up to it was trimmed, hence settled."""
    settled = settled_lsn(facts)
    first = next(valid_frames(file, header), None)
    if first is None:
        return settled
    limit = first.header.first_lsn - 1
    if facts.checkpoint is not None:
        return min(settled, limit)  # what lies between them is gone, and nobody has settled it
    if first.offset == SECTOR:
        return limit
    return min(remains.prev_last_lsn if remains is not None else settled, limit)


def _remains(sector: bytes, store: bytes, number: int) -> SegmentHeader | None:
    """What a damaged header says, if it still says that it is of this store and segment.

    Only its salt is used as it is, and proven by the frames that are whole under it.
    """
    if len(sector) < SECTOR:
        return None
    body = _HEADER_START + sector[len(_HEADER_START) : -_CRC_BYTES]
    _, header = decode_segment_header(body + crc32c(body, 0).to_bytes(_CRC_BYTES, "little"))
    return header if header is not None and (header.store, header.number) == (store, number) else None


_CRC_BYTES: Final = 4
_HEADER_START: Final = encode_segment_header(
    SegmentHeader(
        store=bytes(16), salt=0, epoch=0, number=1, first_lsn=1, prev_number=0, prev_salt=0, prev_last_lsn=0,
        operations_before=0, checkpointed_lsn=0, created_wall_ns=0,
    )
)[:16]  # fmt: skip
"""Magic, version and flags: the same in every segment of this version."""
