"""Bodies are compressed where that pays, and what does not compress costs next to nothing."""

from __future__ import annotations

import random

import pytest
import zstandard

from walbatch.core import compression
from walbatch.core.compression import UNTRIED_MAX, Compressor


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def text(size: int, seed: int = 0) -> bytes:
    chance = random.Random(seed)
    words = (b"alpha ", b"beta ", b"gamma ", b"delta ", b"%d " % chance.randrange(1000))
    return b"".join(chance.choices(words, k=size))[:size]


def unpaid() -> Compressor:
    """One whose last body did not pay."""
    compressor = Compressor(level=1)
    assert compressor.compressed(noise(100_000)) is None
    return compressor


def tried(compressor: Compressor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes that the compressor is given from now on."""
    sizes: list[int] = []
    zstd = zstandard.ZstdCompressor(level=1)

    class Watched:
        def compress(self, raw: bytes) -> bytes:
            sizes.append(len(raw))
            return zstd.compress(raw)

    monkeypatch.setattr(compressor, "_zstd", Watched())
    return sizes


def test_what_compresses_is_compressed_each_time_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    compressor = Compressor(level=1)
    sizes = tried(compressor, monkeypatch)
    for seed in range(100):
        raw = text(50_000, seed)
        assert compressor.compressed(raw) == zstandard.ZstdCompressor(level=1).compress(raw)
    assert sizes == [50_000] * 100


def test_it_pays_where_it_saves_a_sixteenth() -> None:
    raw = noise(15_000) + bytes(1_100)
    assert Compressor(level=1).compressed(raw) is not None
    assert Compressor(level=1).compressed(noise(15_000) + bytes(900)) is None


def test_of_noise_only_a_sample_is_compressed_and_one_body_in_many_as_a_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compressor = unpaid()
    sizes = tried(compressor, monkeypatch)
    for seed in range(2 * (UNTRIED_MAX + 1)):
        assert compressor.compressed(noise(200_000, seed)) is None
    assert sizes.count(200_000) == 2
    assert max(size for size in sizes if size != 200_000) == 2 * compression.PIECES * compression.PIECE_BYTES


@pytest.mark.parametrize("period", [0, 1000, 100_000])
def test_text_after_noise_is_compressed_at_once(period: int) -> None:
    raw = text(100_000)
    assert unpaid().compressed(raw, period=period) == Compressor(level=1).compressed(raw)


@pytest.mark.parametrize("size", [700, 4096, 12_345])
def test_equal_payloads_after_noise_are_noticed_although_each_is_noise(size: int) -> None:
    raw = noise(3000, 1) + noise(size, 2) * (300_000 // size)
    assert unpaid().compressed(raw, period=size) is not None


@pytest.mark.parametrize("size", [256, 1000, 16_384])
def test_different_noise_of_one_size_is_not_tried(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compressor = unpaid()
    sizes = tried(compressor, monkeypatch)
    assert compressor.compressed(noise(64 * 16_384), period=size) is None
    assert len(sizes) == 1
    assert sizes[0] < 10_000


def test_small_bodies_are_tried_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    compressor = unpaid()
    sizes = tried(compressor, monkeypatch)
    for size in (0, 1, 255, 256, 5000, 16_640):
        assert compressor.compressed(noise(size)) is None
    assert sizes == [0, 1, 255, 256, 5000, 16_640]
    assert compressor.compressed(noise(16_641)) is None
    assert sizes[-1] < 16_641


def test_repeats_that_no_sample_shows_are_found_in_the_end() -> None:
    compressor = unpaid()
    raw = noise(120_000, 1) + noise(60_000, 1)
    answers = [compressor.compressed(raw) for _ in range(UNTRIED_MAX + 3)]
    assert answers[0] is None
    assert answers[-2] is not None
    assert answers[-1] is not None, "once it paid, the next one is tried as a whole"


def test_with_always_each_body_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    compressor = Compressor(level=1, always=True)
    sizes = tried(compressor, monkeypatch)
    for seed in range(5):
        assert compressor.compressed(noise(100_000, seed)) is None
    assert sizes == [100_000] * 5


def test_it_shows_what_it_remembers() -> None:
    assert repr(Compressor(level=1)) == "<Compressor, the last body paid, 0 untried since>"
    compressor = unpaid()
    compressor.compressed(noise(100_000, 1))
    assert repr(compressor) == "<Compressor, the last body did not pay, 1 untried since>"
