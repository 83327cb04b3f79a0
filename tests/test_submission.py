"""Pairs that are submitted together: checked by column, and no other than one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

import walbatch as wb
from tests.memory import MemoryFileSystem, environment
from tests.support import FAST, Recorder
from walbatch.engine.submission import Intake, _columns, _columns_one_by_one
from walbatch.lanes import OperationLimits
from walbatch.runtime.ticket import Issuer
from walbatch.types import Durability

INTAKE = Intake(
    name="put", index=0, limits=OperationLimits(2, 5, 40), shards=1, durability=Durability.SYNC,
    issuer=Issuer("put", Durability.SYNC),
)  # fmt: skip


class Pair(NamedTuple):
    key: bytes
    payload: bytes


class Text(bytes):
    """Bytes that lie about themselves."""

    def __len__(self) -> int:
        return 3


GOOD = st.tuples(st.binary(min_size=2, max_size=5), st.binary(max_size=40))
ODD: st.SearchStrategy[Any] = st.sampled_from(
    [
        (b"k", b""), (b"longer", b""), (b"key", bytes(41)), (bytearray(b"key"), b""), (b"key", memoryview(b"payload")),
        Pair(b"key", b"payload"), (Text(b"key2"), b""), ("key", b""), (b"key", None), [b"key", b""], (b"key",), (b"key", b"", b""),
        b"ke", None,
    ]
)  # fmt: skip


def outcome(take: Callable[[Intake, Sequence[Any]], Any], pairs: Sequence[Any]) -> Any:
    """What a check gives, or how it refuses."""
    try:
        keys, payloads, size = take(INTAKE, pairs)
    except wb.WalbatchError as error:
        return type(error), str(error)
    assert {type(one) for one in [*keys, *payloads]} <= {bytes}
    return list(keys), list(payloads), size


@given(pairs=st.lists(GOOD, max_size=20), odd=st.lists(ODD, max_size=2), at=st.integers(0, 20))
def test_a_check_by_column_finds_what_a_look_at_each_finds(pairs: list[Any], odd: list[Any], at: int) -> None:
    pairs[at:at] = odd
    assert outcome(_columns, pairs) == outcome(_columns_one_by_one, pairs)


@pytest.mark.parametrize("given", [list, tuple, iter], ids=lambda given: given.__name__)
def test_pairs_come_from_any_iterable_and_change_nothing_after_they_were_submitted(given: Any) -> None:
    recorder = Recorder()
    pairs: list[tuple[Any, Any]] = [
        (b"a", bytearray(b"1")),
        (bytearray(b"b"), memoryview(b"2")),
        (b"c", b"3"),
    ]
    with wb.Engine.open(
        "/q", lanes={"put": wb.Lane(recorder, trigger=FAST)}, environment=environment(MemoryFileSystem())
    ) as engine:
        engine.pause("put")
        assert list(engine.submit_many("put", given(pairs))) == [1, 2, 3]
        pairs[0][1][:] = b"x"
        pairs[1][0][:] = b"x"
        assert list(engine.submit_many("put", iter(()))) == []
        engine.resume("put")
    assert [(key, payload) for _, key, payload in recorder.applied] == [
        (b"a", b"1"),
        (b"b", b"2"),
        (b"c", b"3"),
    ]
