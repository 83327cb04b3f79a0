"""Compresses bodies where that pays, and finds out cheaply where it does not.

What is not here: which bodies are large enough to be tried (`columns.encode_body`).

The idea needed to read it: what the last bodies were like, the next one will be like. While they pay, each is compressed.
Once one did not, a sample of a few KiB decides. A sample misses what repeats far apart, so each of `UNTRIED_MAX` bodies is
tried as a whole all the same. Nothing depends on time or chance: the same bodies are stored in the same way again.
"""

from __future__ import annotations

from typing import Final

import zstandard

UNTRIED_MAX: Final = 32
"""Bodies in a row of which only a sample is compressed: a whole try costs a few times as much as all else that is done
with a body but writing it."""

PIECES: Final = 8
PIECE_BYTES: Final = 256
"""A sample has twice so many pieces: some from all over the body, and some from the same place of different payloads."""

SAVED_PART: Final = 16
"""Compressing pays where it saves one part in so many: below that, reading back costs more than the disk gains."""


class Compressor:
    """A zstd compressor that remembers whether it paid. Not thread-safe.

    With `always`, each body is tried as a whole: for those who must not write more than they have read.
    """

    def __init__(self, *, level: int, always: bool = False) -> None:
        self._zstd = zstandard.ZstdCompressor(level=level)
        self._always = always
        self._paid = True
        self._untried = 0

    def __repr__(self) -> str:
        return f"<Compressor, the last body {'paid' if self._paid else 'did not pay'}, {self._untried} untried since>"

    def compressed(self, raw: bytes, *, period: int = 0) -> bytes | None:
        """The body as a zstd frame; None where that saves too little, or is not worth a try.

        `period`: it ends with payloads of so many bytes each; 0: of different lengths.
        """
        if not (self._always or self._paid or self._is_worth_a_try(raw, period)):
            self._untried += 1
            return None
        self._untried = 0
        packed = self._zstd.compress(raw)
        self._paid = _pays(len(packed), len(raw))
        return packed if self._paid else None

    def _is_worth_a_try(self, raw: bytes, period: int) -> bool:
        """Whether a sample pays, or so many bodies went untried that this one is tried anyway."""
        last = len(raw) - PIECE_BYTES
        if self._untried >= UNTRIED_MAX or last <= 8 * PIECES * PIECE_BYTES:
            return True
        stride = last // PIECES
        if 0 < period <= stride:  # equal payloads show where the same place of each is looked at
            stride -= stride % period
        places = range(last, last - PIECES * stride, -stride)
        # As many between them, each at another distance, so that they tell of other places of the payloads too.
        between = [at - stride // 4 - stride // 2 * turn // PIECES for turn, at in enumerate(places)]
        sample = b"".join([raw[at : at + PIECE_BYTES] for at in (*places, *between)])
        return _pays(len(self._zstd.compress(sample)), len(sample))


def _pays(packed_bytes: int, raw_bytes: int) -> bool:
    return packed_bytes <= raw_bytes - raw_bytes // SAVED_PART
