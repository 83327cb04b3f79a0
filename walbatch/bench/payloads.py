"""What operations carry: keys in their order, payloads that no compression makes smaller, and such that it does.

The idea needed to read it: a payload is a slice of a pool. Steps of any size come to each place of a pool once if its length is
prime, so every payload is another one, and neighbours never overlap.
"""

from __future__ import annotations

import functools
import random
from typing import Final

RANDOM_SPAN: Final = 2**23 - 15
TEXT_SPAN: Final = 2**22 - 3
"""Both prime."""
SLICE_BYTES_MAX: Final = 2**16
SEED: Final = 20_240_229
"""The same bytes in each run, so that two runs can be compared."""
KEY_BYTES: Final = 8


def keys(count: int, first: int = 0) -> list[bytes]:
    """Keys of eight bytes, ascending: where a peer is a tree, that is the order it likes best."""
    return [number.to_bytes(KEY_BYTES, "big") for number in range(first, first + count)]


def random_payloads(count: int, size: int) -> list[bytes]:
    """Payloads of random bytes."""
    return _slices(_random_pool(), RANDOM_SPAN, count, size)


def text_payloads(count: int, size: int) -> list[bytes]:
    """Payloads of text as a server logs it, which zstd makes about a fifth as large."""
    return _slices(_text_pool(), TEXT_SPAN, count, size)


def _slices(pool: bytes, span: int, count: int, size: int) -> list[bytes]:
    assert 0 < size <= SLICE_BYTES_MAX
    assert count < span
    return [pool[at : at + size] for at in (number * size % span for number in range(count))]


@functools.cache
def _random_pool() -> bytes:
    pool = random.Random(SEED).randbytes(RANDOM_SPAN)
    return pool + pool[:SLICE_BYTES_MAX]


@functools.cache
def _text_pool() -> bytes:
    chance = random.Random(SEED)
    words = [
        "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(4, 9))) for _ in range(500)
    ]
    lines: list[str] = []
    size = 0
    while size < TEXT_SPAN:
        lines.append(
            f'{{"at": "2024-02-29T{len(lines) // 3600 % 24:02}:{len(lines) // 60 % 60:02}:{len(lines) % 60:02}", "host": '
            f'"node-{chance.randrange(40)}", "path": "/{chance.choice(words)}/{chance.choice(words)}", "status": '
            f'{chance.choice((200, 200, 200, 404, 500))}, "took_us": {chance.randrange(100_000)}, "request": '
            f'"{chance.getrandbits(64):016x}"}}\n'
        )
        size += len(lines[-1])
    pool = "".join(lines).encode()[:TEXT_SPAN]
    return pool + pool[:SLICE_BYTES_MAX]
