"""CRC-32C: two implementations that agree with the standard and with each other."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import PathFinder
from types import ModuleType

import crc32c as package
import pytest
from hypothesis import given
from hypothesis import strategies as st

from walbatch.core import checksum
from walbatch.core.checksum import Crc, crc32c, crc32c_audit

# RFC 3720, appendix B.4, and the usual check value.
VECTORS = {
    "nothing": (b"", 0x00000000),
    "the check string": (b"123456789", 0xE3069283),
    "32 zeros": (bytes(32), 0x8A9136AA),
    "32 ones": (b"\xff" * 32, 0x62A8AB43),
    "ascending": (bytes(range(32)), 0x46DD794E),
    "descending": (bytes(range(31, -1, -1)), 0x113FDB5C),
    "an iSCSI read": (
        bytes.fromhex(
            "01c000000000000000000000000000001400000000000400000000140000001828000000000000000200000000000000"
        ),
        0xD9963A56,
    ),
}


@pytest.mark.parametrize("crc", [crc32c, crc32c_audit], ids=["crc32c", "crcmod"])
@pytest.mark.parametrize(("data", "expected"), VECTORS.values(), ids=VECTORS.keys())
def test_published_vectors(crc: Crc, data: bytes, expected: int) -> None:
    assert crc(data, 0) == expected


@given(data=st.binary(max_size=2000), seed=st.integers(0, 2**32 - 1))
def test_both_implementations_agree_for_every_seed(data: bytes, seed: int) -> None:
    assert crc32c(data, seed) == crc32c_audit(data, seed)


@given(parts=st.lists(st.binary(max_size=100)))
def test_a_sum_continues_over_parts(parts: list[bytes]) -> None:
    crc = 0
    for part in parts:
        crc = crc32c(part, crc)
    assert crc == crc32c(b"".join(parts), 0)


@given(data=st.binary(min_size=1, max_size=100))
def test_any_buffer_will_do(data: bytes) -> None:
    assert crc32c(bytearray(data), 0) == crc32c(memoryview(data), 0) == crc32c(data, 0)
    assert crc32c_audit(bytearray(data), 0) == crc32c_audit(memoryview(data), 0) == crc32c_audit(data, 0)


def load_again() -> ModuleType:
    """The module once more, with what can be imported now."""
    spec = importlib.util.spec_from_file_location("checksum_again", checksum.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_the_fast_package_the_slow_one_steps_in_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "crc32c", None)
    with pytest.warns(UserWarning, match="crc32c package is missing"):
        module = load_again()
    assert module.crc32c is module.crc32c_audit
    assert module.crc32c(b"123456789", 0) == 0xE3069283


def test_a_fast_package_that_is_laid_out_differently_is_imported_as_a_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(PathFinder, "find_spec", lambda *_: None)
    assert load_again().crc32c is package.crc32c


def test_the_fast_sum_is_the_one_of_the_package_without_what_the_package_imports() -> None:
    assert crc32c is not crc32c_audit
    assert crc32c is not package.crc32c
    assert getattr(crc32c, "__name__", "") == package.crc32c.__name__
