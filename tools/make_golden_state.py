"""Writes golden values of state/ that format version 1 has got since its first golden files, and what they must decode to.

    python3 -m tools.make_golden_state fixtures/golden/v1-state

As `make_golden`: what is committed is never written again, and every input is chosen here.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from tools.make_golden import STORE, WALL_NS
from walbatch.storage.envelope import seal
from walbatch.storage.key_uses import encode_chunk
from walbatch.storage.letters import encode_letter
from walbatch.storage.lsnkeys import key_of
from walbatch.types import DeadLetter, DeathReason, KeyUse, Options

LETTER: Final = DeadLetter(
    lsn=0x0102_0304_0506,
    lane="blöcke",
    key=b"key\x00\xff",
    payload=bytes(range(40)),
    priority=9,
    options=Options(
        not_before_ns=WALL_NS + 1, deadline_ns=WALL_NS + 2, origin=0x0A0B, idempotency_key=b"order-4711"
    ),
    reason=DeathReason.ATTEMPTS,
    error="ValueError: schlüssel fehlt",
    attempts=10,
    died_wall_ns=WALL_NS + 3,
)
PLAIN_LETTER: Final = DeadLetter(
    lsn=1, lane="put", key=b"", payload=b"", priority=0, options=Options(), reason=DeathReason.REJECTED, error="",
    attempts=0, died_wall_ns=0,
)  # fmt: skip
BLOCK: Final = 3
GIVEN_UP: Final = (3 * 16_384, 3 * 16_384 + 1, 3 * 16_384 + 0x0102, 4 * 16_384 - 1)
USES: Final = (
    KeyUse(key=b"order-1", lane="put", lsn=7, used_wall_ns=WALL_NS),
    KeyUse(key=b"", lane="notify", lsn=8, used_wall_ns=WALL_NS - 1),
    KeyUse(key=b"\xff" * 256, lane="put", lsn=0x0102_0304, used_wall_ns=WALL_NS + 1),
)
POSITION: Final = 0x0102_0304_05
SNAPSHOT: Final = ("blöcke", 0x00A1, b"\x00whatever it says")


def values() -> dict[str, tuple[bytes, bytes]]:
    """Key and value of each file, by its name."""
    offsets = b"".join((lsn - BLOCK * 16_384).to_bytes(2, "little") for lsn in GIVEN_UP)
    lane, shard, snapshot = SNAPSHOT
    bodies = {
        "letter": (key_of(LETTER.lsn), encode_letter(LETTER)),
        "plain-letter": (key_of(PLAIN_LETTER.lsn), encode_letter(PLAIN_LETTER)),
        "given-up": (key_of(BLOCK + 1), offsets),
        "keys": (key_of(1), encode_chunk(USES)),
        "keys-position": (bytes(8), POSITION.to_bytes(8, "little")),
        "controller": (shard.to_bytes(2, "big") + lane.encode(), snapshot),
    }
    return {name: (key, seal(key, body, STORE)) for name, (key, body) in bodies.items()}


def expected() -> dict[str, Any]:
    """What the values decode to, made from the inputs."""
    lane, shard, snapshot = SNAPSHOT
    return {
        "store": STORE.hex(),
        "letter": plain(LETTER),
        "plain-letter": plain(PLAIN_LETTER),
        "given-up": list(GIVEN_UP),
        "keys": [plain(use) for use in USES],
        "keys-position": POSITION,
        "controller": [lane, shard, snapshot.hex()],
        "files": {
            name: [key.hex(), hashlib.sha256(value).hexdigest()] for name, (key, value) in values().items()
        },
    }


def plain(value: DeadLetter | KeyUse) -> Any:
    """A value in the form of the JSON, bytes in hexadecimal."""
    return json.loads(json.dumps(asdict(value), default=bytes.hex))


def main(arguments: Sequence[str]) -> None:
    if len(arguments) != 1:
        sys.exit("usage: python3 -m tools.make_golden_state FOLDER")
    folder = Path(arguments[0])
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} holds files: golden files are never written again. Choose a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, (_, value) in values().items():
        (folder / name).write_bytes(value)
    (folder / "expected.json").write_text(json.dumps(expected(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
