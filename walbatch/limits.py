"""Every ceiling and fixed size of walbatch, each with the reason for its value.

What is not here: settings a user may change (see `config`). A limit is what no setting can exceed, and what
the decoder checks before it believes a length that it read from disk; it is the same on write and on read.
"""

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

# --- the shape of the log on disk (docs/format.md) ---------------------------------------------------------

SECTOR_BYTES: Final = 512
"""Frames start on this boundary, so that an append never rewrites a sector that holds acknowledged bytes: a power
cut may leave any sector that is being written as garbage, and 512 is the smallest unit any disk writes."""

FRAME_HEADER_BYTES: Final = 64
FRAME_COUNT_MAX: Final = 65_536
"""Operations in one frame: bounds the memory that decoding one frame takes, and what a torn write can cost."""

FRAME_RAW_BYTES_MAX: Final = 64 * MIB
"""Decoded bytes of one frame. A hostile length costs at most this much memory."""

KIND_BYTES_MAX: Final = 64
"""A lane's name in UTF-8: it stands in every frame, so it stays short."""

KINDS_MAX: Final = 64
"""Lanes of one store: each has its own queues, so this bounds the fixed memory of an engine."""

KEY_BYTES_MAX: Final = 4 * KIB
"""Long enough for a path (PATH_MAX on Linux), short enough that a batch of keys stays cheap to compare."""

PAYLOAD_BYTES_MAX: Final = 16 * MIB
"""walbatch is for small operations; larger objects belong in a file whose name is the payload."""

SEGMENT_BYTES_MIN: Final = 4 * KIB
SEGMENT_BYTES_MAX: Final = 256 * MIB
"""A segment is the unit of trimming; larger ones would keep that much for a single unsettled operation."""

FOOTER_RAW_BYTES_MAX: Final = 256 * MIB
"""A seal footer lists every frame of its segment, with a count for each kind."""

LSN_MAX: Final = 2**63 - 1
"""Signed 64 bits, because databases that store an LSN have no unsigned integers."""

UNSYNCED_COUNT_MAX: Final = 2**20
"""LSNs handed out but not yet synced, at any moment. Submitting waits (or is refused) at this bound."""

LSN_JUMP: Final = 2**24
"""What an unclean open adds to the highest LSN it can see. Must exceed anything an earlier process can have handed
out beyond that: the operations it had not synced (UNSYNCED_COUNT_MAX) and one group that was in the middle of its
write. 2**63 / 2**24 unclean opens are half a million millions."""

SEGMENT_NUMBER_MAX: Final = 2**63 - 1

# --- memory, threads and waiting ----------------------------------------------------------------------------

GROUP_BYTES_MAX: Final = 8 * MIB
"""A commit group stops taking more company here: larger writes no longer gain throughput, only latency. One call
of submit_many may exceed it, up to FRAME_RAW_BYTES_MAX."""

UNSYNCED_BYTES_MAX: Final = 16 * MIB
"""Written but unsynced bytes of `interval` lanes: at this bound the interval is cut short. It bounds what recovery
copies forward."""

OPERATION_OVERHEAD_BYTES: Final = 256
"""What one queued operation costs in memory beside its key and payload (tuple, ints, two bytes objects), measured
on CPython 3.11 and rounded up."""

SHARDS_MAX: Final = 256
IN_FLIGHT_MAX: Final = 256
"""Batches in flight: each holds a thread."""

BATCH_COUNT_MAX: Final = 65_536
BATCH_BYTES_MAX: Final = 256 * MIB

RANGES_MAX: Final = 100_000
"""Settled ranges of one shard in a mark or a checkpoint."""

WINDOW_COUNT_MAX: Final = 75_000
"""Operations of one shard that may be settled in another order than theirs: each that waits can cost its mark a range. What is
beyond stays in LSN order, so the oldest one that waits blocks it: bounded, never dropped. The other ranges are for urgent
operations that were fetched ahead."""

RETRY_DELAY_NS_MAX: Final = 3_600 * 10**9

WALL_S_MAX: Final = 9_000_000_000
"""Seconds since 1970: the year 2255, beyond which nanoseconds do not fit into a signed 64-bit number for much longer."""

IDEMPOTENCY_KEY_BYTES_MAX: Final = 256
"""A UUID, a hash or a path-like name; it stands in memory for as long as the window lasts."""

IDEMPOTENCY_KEYS_MAX: Final = 1_000_000
"""Keys of one window: at this bound the oldest is forgotten before its time. Each takes 240 bytes of memory beside the key itself,
and half as much again until it is saved in state/; measured on CPython 3.11."""

DEAD_LETTERS_MAX: Final = 100_000
DEAD_LETTER_BYTES_MAX: Final = 256 * MIB
"""Dead letters of a store. At either bound nothing more is given up: the shard that would has to wait, loudly."""

ERROR_CHARS_MAX: Final = 2_000
"""Text of an error that a dead letter keeps: some backends quote the whole batch."""

CANCELLED_MAX: Final = 1_000_000
"""Cancelled operations that the checkpoint does not cover yet."""

CONTROLLER_BYTES_MAX: Final = 16 * KIB
"""What a size controller may keep in state/."""

ABANDONED_MAX: Final = 16
"""Calls of backends that were given up and have not returned: each holds a thread. At the bound, shards wait."""

COMPACTED_FACTOR: Final = 2
"""The log takes at most this many times what is unsettled, and four segments; beside what a moving watermark will pass soon."""
SALVAGE_VOIDS_MAX: Final = 1_000_000

SCAN_CHUNK_BYTES: Final = MIB
"""Read size of the scanner: bounds its memory whatever the size of a segment."""

MARK_BYTES_MAX: Final = 64 + 16 * RANGES_MAX

# --- relations that the rest of the code relies on ----------------------------------------------------------

assert WINDOW_COUNT_MAX < RANGES_MAX
assert FRAME_HEADER_BYTES < SECTOR_BYTES
assert SEGMENT_BYTES_MIN % SECTOR_BYTES == 0
assert PAYLOAD_BYTES_MAX + KEY_BYTES_MAX + 64 * KIB < FRAME_RAW_BYTES_MAX, (
    "one largest operation fits in a frame"
)
assert LSN_JUMP > 4 * (UNSYNCED_COUNT_MAX + FRAME_COUNT_MAX), "no LSN is ever handed out twice"
assert GROUP_BYTES_MAX <= FRAME_RAW_BYTES_MAX
assert LSN_JUMP < LSN_MAX // 2**32
assert (
    SEGMENT_BYTES_MAX // SECTOR_BYTES * (13 + 4 * KINDS_MAX) + KINDS_MAX * (KIND_BYTES_MAX + 1)
    < FOOTER_RAW_BYTES_MAX
)
