"""Payloads in one array, rows to their tickets: with real numpy, alone and through an engine."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import walbatch as wb
from tests.support import SMALL, wait_until
from walbatch import limits
from walbatch.backends.function import FunctionBackend, as_backend
from walbatch.backends.vectorized import decode_array, encode_array, vectorized
from walbatch.core.delivery import judge
from walbatch.errors import BatchTooLarge
from walbatch.types import CutReason, Rejected

Array = np.ndarray[Any, np.dtype[Any]]
FOREVER = wb.Trigger(count=10, linger_ms=3_600_000)
SOON = wb.Trigger(count=10, linger_ms=1)


def batch_of(payloads: Sequence[bytes]) -> wb.Batch:
    count = len(payloads)
    return wb.Batch(
        lane="infer", shard=0, store=b"s" * 16, lsns=tuple(range(1, count + 1)), keys=(b"k",) * count, payloads=tuple(payloads),
        priorities=(5,) * count, attempt=1, reason=CutReason.COUNT, mark=None,
    )  # fmt: skip


def results(answer: object) -> list[Any]:
    """What the tickets would get; an operation that was rejected gives its error."""
    assert isinstance(answer, list)
    return [outcome.result if isinstance(outcome, wb.Applied) else outcome.error for outcome in answer]


class Calls:
    """A function of an array that keeps what it was given, and doubles it."""

    def __init__(self) -> None:
        self.arrays: list[Array] = []

    def __call__(self, array: Array) -> Array:
        self.arrays.append(array.copy())
        return array * 2


def raw(*values: float) -> bytes:
    return np.array(values, dtype="<f4").tobytes()


# --- what goes in -------------------------------------------------------------------------------------------------


def test_raw_payloads_become_one_array_and_each_row_goes_back() -> None:
    calls = Calls()
    backend = vectorized(calls, dtype="<f4", shape=(2,))
    answer = results(backend(batch_of([raw(1, 2), raw(3, 4), raw(5, 6)])))
    (array,) = calls.arrays
    assert array.dtype == np.dtype("<f4")
    assert array.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert [row.tolist() for row in answer] == [[2, 4], [6, 8], [10, 12]]


@given(st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=6, max_size=6), min_size=1, max_size=20))
def test_rows_keep_the_order_of_the_batch_in_any_shape(rows: list[list[int]]) -> None:
    arrays = [np.array(row, dtype=np.int32).reshape(2, 3) for row in rows]
    backend = vectorized(lambda stacked: stacked.sum(axis=(1, 2), dtype=np.int64))
    answer = results(backend(batch_of([encode_array(array) for array in arrays])))
    assert [int(value) for value in answer] == [sum(row) for row in rows]


def test_what_is_no_such_array_is_rejected_alone() -> None:
    calls = Calls()
    backend = vectorized(calls, dtype="<f4", shape=(2,))
    good, odd, short, empty = raw(1, 2), b"abc", raw(7), b""
    answer = backend(batch_of([odd, good, short, good, empty]))
    assert isinstance(answer, list)
    assert [type(outcome) for outcome in answer] == [Rejected, wb.Applied, Rejected, wb.Applied, Rejected]
    assert all("not such an array" in outcome.error for outcome in answer if isinstance(outcome, Rejected))
    assert [array.shape for array in calls.arrays] == [(2, 2)]


def test_a_batch_of_nothing_good_calls_nobody() -> None:
    calls = Calls()
    answer = results(vectorized(calls)(batch_of([b"", b"x"])))
    assert len(answer) == 2
    assert calls.arrays == []


def test_an_npy_payload_of_another_shape_is_rejected_where_one_was_named() -> None:
    backend = vectorized(Calls(), shape=(2,))
    answer = results(backend(batch_of([encode_array([1.0, 2.0]), encode_array([1.0])])))
    assert answer[0].tolist() == [2, 4]
    assert "its shape is (1,), not (2,)" in answer[1]


def test_arrays_that_differ_go_in_one_call_for_each_kind() -> None:
    calls = Calls()
    payloads = [encode_array(np.full(size, value)) for size, value in [(2, 1.0), (3, 2.0), (2, 3.0)]]
    payloads.append(encode_array(np.array([4, 4])))
    answer = results(vectorized(calls)(batch_of(payloads)))
    assert [array.shape for array in calls.arrays] == [(2, 2), (1, 3), (1, 2)]
    assert [row.tolist() for row in answer] == [[2, 2], [4, 4, 4], [6, 6], [8, 8]]
    assert answer[3].dtype == np.int64


def test_a_scalar_and_an_empty_array_are_payloads_too() -> None:
    backend = vectorized(lambda stacked: stacked.sum(axis=tuple(range(1, stacked.ndim))))
    assert results(backend(batch_of([encode_array(7.0), encode_array(np.zeros((0, 3)))]))) == [7.0, 0.0]


def test_a_raw_payload_without_a_shape_is_one_axis_of_any_length() -> None:
    calls = Calls()
    answer = results(vectorized(calls, dtype=np.uint8)(batch_of([b"\x01\x02", b"\x03", b"\x04\x05"])))
    assert [row.tolist() for row in answer] == [[2, 4], [6], [8, 10]]
    assert [array.shape for array in calls.arrays] == [(2, 2), (1, 1)]


def test_a_codec_makes_the_arrays_and_rejects_what_it_cannot() -> None:
    backend = vectorized(Calls(), codec=lambda payload: np.array([float(payload)]))
    answer = results(backend(batch_of([b"1.5", b"one", b"2"])))
    assert (answer[0].tolist(), answer[2].tolist()) == ([3.0], [4.0])
    assert "could not convert" in answer[1]


# --- what comes out -----------------------------------------------------------------------------------------------


def test_a_row_that_is_kept_does_not_keep_the_whole_batch() -> None:
    answer = results(vectorized(Calls(), dtype="<f4", shape=(2,))(batch_of([raw(1, 2), raw(3, 4)])))
    assert all(row.base is None and row.flags.owndata for row in answer)


def test_the_function_may_change_what_it_is_given() -> None:
    payload = raw(1, 2)

    def in_place(array: Array) -> Array:
        array += 1
        return array

    assert results(vectorized(in_place, dtype="<f4")(batch_of([payload])))[0].tolist() == [2, 3]
    assert payload == raw(1, 2)


def test_none_says_that_all_were_applied() -> None:
    backend = vectorized(lambda array: None, dtype="<f4")
    answer = backend(batch_of([raw(1), b"abc", raw(2)]))
    assert isinstance(answer, list)
    assert answer[0] == answer[2] == wb.Applied(None)
    assert isinstance(answer[1], Rejected)


@pytest.mark.parametrize(
    ("answer", "found"),
    [(np.zeros(1), "1 rows"), (np.zeros(4), "4 rows"), (np.zeros((0, 3)), "0 rows"), (1.0, "no array"), ("xyz", "no array")],
)  # fmt: skip
def test_another_number_of_rows_is_no_answer(answer: Any, found: str) -> None:
    batch = batch_of([raw(1), raw(2), raw(3)])
    gave = vectorized(lambda array: cast("Array", answer), dtype="<f4", shape=(1,))(batch)
    assert f"returned {found} for 3 operations" in repr(gave)
    with pytest.raises(ValueError, match=f"returned {found} for 3 operations: expected one row for each"):
        judge(batch, cast("Any", gave), wb.Order.KEY)


def test_another_number_of_rows_kills_no_operation_and_health_says_so(tmp_path: Path) -> None:
    wrong = True

    def function(array: Array) -> Array:
        return array[1:] if wrong else array

    retry = wb.RetryPolicy(
        base_s=0.001, ceiling_s=0.002, attempts=1, batch_retries=0, breaker_s=0.001, breaker_s_max=0.002
    )
    lane = wb.Lane(vectorized(function, dtype="<f4"), trigger=SOON, retry=retry)
    with wb.Engine.open(tmp_path / "q", lanes={"put": lane}) as engine:
        ticket = engine.submit("put", key=b"k", payload=raw(1))
        wait_until(lambda: engine.stats().lanes["put"].failed_batches > 20, what="it was tried often")
        (reason,) = [reason for reason in engine.health().reasons if reason.name == "nonsense"]
        assert "returned 0 rows for 1 operations" in reason.text
        wrong = False
        ticket.result(timeout=30)
        assert engine.stats().dead == 0


def test_another_number_of_rows_for_the_second_kind_of_array_is_no_answer_either() -> None:
    async def double(array: Array) -> Array:
        return array[1:] if array.shape[1] == 2 else array

    def direct(array: Array) -> Array:
        return array[1:] if array.shape[1] == 2 else array

    for function in (double, direct):
        batch = batch_of([raw(1), raw(1, 2), raw(1, 2, 3)])
        gave = cast("Any", vectorized(function, dtype="<f4")(batch))
        answer = asyncio.run(cast("Any", gave)) if inspect.isawaitable(gave) else gave
        with pytest.raises(ValueError, match="returned 0 rows for 1 operations"):
            judge(batch, answer, wb.Order.KEY)


def test_a_list_of_rows_is_an_answer() -> None:
    backend = vectorized(lambda array: [float(row.sum()) for row in array], dtype="<f4")  # type: ignore[arg-type, return-value]
    assert results(backend(batch_of([raw(1, 2), raw(3, 4)]))) == [3.0, 7.0]


def test_what_the_function_raises_speaks_for_the_batch() -> None:
    def failing(array: Array) -> Array:
        raise wb.WalbatchError("the device is gone")

    with pytest.raises(wb.WalbatchError, match="device"):
        vectorized(failing, dtype="<f4")(batch_of([raw(1)]))


# --- padding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "multiple_of", "pad_to", "rows"),
    [(3, 1, None, 3), (3, 4, None, 4), (8, 4, None, 8), (9, 4, None, 12), (3, 1, 8, 8), (8, 1, 8, 8), (3, 4, 8, 8)],
)  # fmt: skip
def test_rows_of_zeros_fill_a_call_and_their_answers_are_dropped(
    count: int, multiple_of: int, pad_to: int | None, rows: int
) -> None:
    calls = Calls()
    backend = vectorized(calls, dtype="<f4", shape=(1,), multiple_of=multiple_of, pad_to=pad_to)
    answer = results(backend(batch_of([raw(index + 1) for index in range(count)])))
    (array,) = calls.arrays
    assert array.shape == (rows, 1)
    assert array[count:].sum() == 0
    assert [float(row[0]) for row in answer] == [2.0 * (index + 1) for index in range(count)]


def test_the_answer_must_have_a_row_for_the_padding_too() -> None:
    gave = vectorized(lambda array: array[:3], dtype="<f4", pad_to=4)(batch_of([raw(1), raw(2), raw(3)]))
    assert "returned 3 rows for 4 operations" in repr(gave)


def test_a_batch_of_more_than_it_pads_to_is_too_large_and_nothing_is_called() -> None:
    calls = Calls()
    backend = vectorized(calls, dtype="<f4", pad_to=2)
    with pytest.raises(BatchTooLarge) as caught:
        backend(batch_of([raw(1, 1), raw(1), raw(2), raw(3)]))
    assert caught.value.count == 2
    assert calls.arrays == []


# --- settings -----------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "a class": (lambda: vectorized(cast("Any", Calls)), "takes a function"),
    "no function": (lambda: vectorized(cast("Any", 3)), "takes a function"),
    "a multiple of nothing": (lambda: vectorized(Calls(), multiple_of=0), "multiple_of is 0"),
    "a multiple of a half": (lambda: vectorized(Calls(), multiple_of=cast("int", 0.5)), "multiple_of is 0.5"),
    "a multiple of truth": (lambda: vectorized(Calls(), multiple_of=True), "multiple_of is True"),
    "padding beyond any batch": (lambda: vectorized(Calls(), pad_to=limits.BATCH_COUNT_MAX + 1), "pad_to is 65537"),
    "padding to no multiple": (lambda: vectorized(Calls(), pad_to=3, multiple_of=8), "must be a multiple of"),
    "a codec and a dtype": (lambda: vectorized(Calls(), dtype="f4", codec=np.asarray), "leave dtype and shape out"),
    "a dtype that is none": (lambda: vectorized(Calls(), dtype="quux"), "quux"),
    "a dtype of objects": (lambda: vectorized(Calls(), dtype=object), "which raw bytes cannot hold"),
    "a dtype without bytes": (lambda: vectorized(Calls(), dtype="S0"), "which raw bytes cannot hold"),
    "a negative length": (lambda: vectorized(Calls(), dtype="f4", shape=(-1,)), "shape is"),
    "a length that is none": (lambda: vectorized(Calls(), dtype="f4", shape=cast("Any", ("x",))), "shape is"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "says"), WRONG.values(), ids=WRONG)
def test_wrong_settings_are_refused_when_it_is_made(make: Callable[[], object], says: str) -> None:
    with pytest.raises(wb.ConfigError, match=says):
        make()


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(wb.ConfigError) as caught:
        vectorized(Calls(), multiple_of=0, pad_to=0, dtype="quux")
    assert len(caught.value.problems) == 3


def test_it_is_named_after_its_function() -> None:
    def embed(array: Array) -> Array:
        return array

    assert "embed" in repr(vectorized(embed))
    assert "embed" in repr(as_backend(vectorized(embed)))
    assert "Calls" in repr(vectorized(Calls()))


def test_without_numpy_everything_else_works_and_this_says_what_to_install() -> None:
    program = """
import sys
sys.modules["numpy"] = None
import walbatch as wb
from walbatch.backends.vectorized import decode_array, encode_array, vectorized
for call in (lambda: vectorized(len), lambda: encode_array([1]), lambda: decode_array(b"")):
    try:
        call()
    except wb.ConfigError as error:
        assert "walbatch[numpy]" in str(error)
    else:
        raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_importing_walbatch_does_not_import_numpy() -> None:
    program = "import sys, walbatch, walbatch.backends.vectorized; assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# --- arrays as payloads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12).reshape(3, 4), np.asfortranarray(np.arange(12).reshape(2, 6)), np.array(3.5), np.zeros((0, 5)),
        np.array(["a", "bc"]), np.array([1, 2], dtype=">u2"), np.zeros(2, dtype=[("a", "i4"), ("b", "f8")]), np.array([True]),
        np.array([], dtype="S0"), np.array(["2026-01-01"], dtype="M8[D]"), [[1, 2], [3, 4]],
    ],
    ids=lambda array: f"{np.asarray(array).dtype}{np.asarray(array).shape}",
)  # fmt: skip
def test_an_array_survives_the_way_through_bytes(array: Any) -> None:
    again = decode_array(encode_array(array))
    assert again.dtype == np.asarray(array).dtype
    assert again.shape == np.asarray(array).shape
    assert again.tolist() == np.asarray(array).tolist()


def test_python_objects_do_not_become_payloads() -> None:
    with pytest.raises(ValueError, match="pickle"):
        encode_array(np.array([object()]))


def _npy(header: str, body: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode("latin-1")
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + body


HOSTILE = {
    "nothing": b"",
    "another magic": b"PK\x03\x04" + bytes(100),
    "a version to come": _npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }\n", bytes(4), b"\x09\x00"),
    "a header that ends": b"\x93NUMPY\x01\x00\xff\xff{",
    "a header that is code": _npy("__import__('os').system('true')\n"),
    "a header of brackets": _npy("(" * 5_000 + "\n"),
    "a long header": _npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }" + " " * 20_000 + "\n", bytes(4)),
    "a header that is a list": _npy("[]\n"),
    "a dtype that is none": _npy("{'descr': 'quux', 'fortran_order': False, 'shape': (1,), }\n", bytes(4)),
    "Python objects": _npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n", bytes(8)),
    "Python objects in a field": _npy("{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,), }\n", bytes(8)),
    "a terabyte": _npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 131072), }\n", bytes(8)),
    "lengths beyond any memory": _npy(f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({2**70}, {2**70}), }}\n"),
    "nothing, very often": _npy(f"{{'descr': '<f8', 'fortran_order': False, 'shape': (0, {2**40}), }}\n"),
    "no bytes, very often": _npy(f"{{'descr': '|S0', 'fortran_order': False, 'shape': ({2**40},), }}\n"),
    "no bytes in many axes": _npy(f"{{'descr': '|S0', 'fortran_order': False, 'shape': ({'1000000, ' * 8}), }}\n"),
    "a negative length": _npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }\n"),
    "two negative lengths": _npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -1), }\n", bytes(4)),
    "a hundred axes": _npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({'1, ' * 100}), }}\n", bytes(4)),
    "a byte too few": encode_array(np.arange(4))[:-1],
    "a byte too many": encode_array(np.arange(4)) + b"x",
}  # fmt: skip


@pytest.mark.parametrize("payload", HOSTILE.values(), ids=HOSTILE)
def test_hostile_bytes_are_a_value_error(payload: bytes) -> None:
    with pytest.raises(ValueError):
        decode_array(payload)


GOOD = encode_array(np.arange(3, dtype="<i2"))


@given(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=3))
def test_damaged_bytes_are_an_array_or_a_value_error(offset: int, damage: bytes) -> None:
    try:
        array = decode_array(GOOD[:offset] + damage + GOOD[offset + len(damage) :])
    except ValueError:
        return
    assert array.nbytes <= len(GOOD) + 3


# --- asynchronous -------------------------------------------------------------------------------------------------


def test_an_async_function_is_awaited_and_differing_arrays_one_after_the_other() -> None:
    under_way = 0

    async def double(array: Array) -> Array:
        nonlocal under_way
        under_way += 1
        assert under_way == 1
        await asyncio.sleep(0)
        under_way -= 1
        return array * 2

    async def run() -> object:
        answer = vectorized(double, dtype="<f4")(batch_of([raw(1), raw(1, 2), b"abc", raw(3)]))
        assert isinstance(answer, Awaitable)
        return await answer

    first, second, third, fourth = results(asyncio.run(run()))
    assert (first.tolist(), second.tolist(), fourth.tolist()) == ([2], [2, 4], [6])
    assert "not such an array" in third


def test_an_async_function_is_a_backend_for_an_engine_with_threads() -> None:
    async def double(array: Array) -> Array:
        await asyncio.sleep(0)
        return array * 2

    backend = as_backend(vectorized(double, dtype="<f4"))
    assert isinstance(backend, FunctionBackend)
    try:
        assert results(backend.apply(batch_of([raw(4)])))[0].tolist() == [8]
    finally:
        backend.close()


# --- through an engine --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", ["none", "sync"])
def test_each_ticket_gets_its_own_row_of_one_call(tmp_path: Path, durability: str) -> None:
    """Inference: ten callers, one call of the model."""
    calls = Calls()
    lanes = {
        "infer": wb.Lane(vectorized(calls), trigger=FOREVER, durability=durability, order="none"),
    }
    with wb.Engine.open(tmp_path / "queue", lanes, settings=SMALL) as engine:
        tickets = [
            engine.submit("infer", key=bytes([number]), payload=encode_array([number, number + 0.5]))
            for number in range(10)
        ]
        answers = [ticket.result(timeout=30) for ticket in tickets]
    assert [answer.tolist() for answer in answers] == [[2 * n, 2 * n + 1] for n in range(10)]
    assert [array.shape for array in calls.arrays] == [(10, 2)]
    assert (tickets[0].lsn is None) == (durability == "none")


@pytest.mark.parametrize("durability", ["none", "sync"])
def test_a_payload_that_is_no_array_dies_alone(tmp_path: Path, durability: str) -> None:
    lanes = {"infer": wb.Lane(vectorized(Calls()), trigger=FOREVER, durability=durability, order="none")}
    with wb.Engine.open(tmp_path / "queue", lanes, settings=SMALL) as engine:
        payloads = [encode_array([float(number)]) if number != 4 else b"no array" for number in range(10)]
        tickets = [
            engine.submit("infer", key=b"%d" % n, payload=payload) for n, payload in enumerate(payloads)
        ]
        with pytest.raises(wb.OperationDead, match="not such an array"):
            tickets.pop(4).result(timeout=30)
        answers = [ticket.result(timeout=30).tolist() for ticket in tickets]
    assert answers == [[2.0 * number] for number in range(10) if number != 4]


def test_what_was_not_inferred_before_a_restart_is_inferred_after_it(tmp_path: Path) -> None:
    calls = Calls()
    with wb.Engine.open(tmp_path / "queue", {"infer": wb.Lane(None, trigger=SOON)}, settings=SMALL) as engine:
        engine.submit_many("infer", [(bytes([n]), encode_array([n])) for n in range(5)])
    lanes = {"infer": wb.Lane(vectorized(calls), trigger=SOON)}
    with wb.Engine.open(tmp_path / "queue", lanes, settings=SMALL) as engine:
        engine.flush("infer", timeout=30)
    assert sorted(row[0] for array in calls.arrays for row in array.tolist()) == list(range(5))
