"""A function of one array as a backend: the payloads of a batch are stacked, and each row of the answer goes to its ticket.

Not here: models, devices, and threads; how large a batch is best is the lane's size controller's question.

The idea needed to read it: a payload is an array, as raw bytes of a known dtype and shape or as the bytes of a .npy file. Those
of a batch become one array with the batch as its first axis. A payload that is no such array is rejected alone. Where a lane's
arrays differ in dtype or shape, those that are alike go together, in one call each.

numpy is imported when `vectorized`, `encode_array` or `decode_array` is first called: it is the extra `walbatch[numpy]`.
"""

from __future__ import annotations

import importlib
import inspect
import io
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

from walbatch import limits
from walbatch.errors import BatchTooLarge, ConfigError
from walbatch.types import Answer, Applied, Batch, Outcome, Rejected

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import DTypeLike

    Array = np.ndarray[Any, np.dtype[Any]]

_BYTES_MAX: Final = limits.PAYLOAD_BYTES_MAX
_HEADERS: Final = {(1, 0): "read_array_header_1_0", (2, 0): "read_array_header_2_0"}


def vectorized(
    function: Callable[[Array], Array | Awaitable[Array | None] | None],
    *,
    dtype: DTypeLike | None = None,
    shape: Sequence[int] | None = None,
    multiple_of: int = 1,
    pad_to: int | None = None,
    codec: Callable[[bytes], Array] | None = None,
) -> Vectorized:
    """A backend that calls `function` with one array for a batch: first axis the operations, oldest first.

    The function (sync or async) returns as many rows, in the same order, which become the results of the tickets; or None:
    all applied. It may change the array it is given. What it raises speaks for the whole batch. An answer with another number
    of rows is no answer: the batch is tried again, nothing of it is given up, and health says so.

    - `dtype` given: payloads are raw bytes of that dtype, in C order, of `shape` (None: any number of elements in one axis).
    - `dtype` not given: payloads are .npy bytes as `encode_array` makes them, of `shape` where that is given.
    - `codec`: bytes to array instead; a ValueError of it rejects the operation.
    - `multiple_of`, `pad_to`: rows of zeros are added up to the next multiple, or up to so many rows in every call, for
      accelerators that compile for a shape; a batch of more than `pad_to` is refused as too large. The answer's rows for them
      are dropped.

    Raises ConfigError, also where numpy is not installed.
    """
    return Vectorized(function, dtype=dtype, shape=shape, multiple_of=multiple_of, pad_to=pad_to, codec=codec)


class NoAnswer(list[Outcome]):
    """What a function gave that is no answer: who reads it is told why, as of any answer that makes no sense.

    Raised by `apply`, it would speak against the operations, which would be given up; so it speaks against the function, and the
    batch is tried again.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def __repr__(self) -> str:
        return f"<NoAnswer: {self.text}>"

    def __iter__(self) -> Iterator[Outcome]:
        raise ValueError(self.text)


class Vectorized:
    """A function of an array, as a function of a batch. Made by `vectorized`. As safe from several threads as its function."""

    def __init__(
        self, function: Callable[[Array], Any], *, dtype: DTypeLike | None, shape: Sequence[int] | None, multiple_of: int,
        pad_to: int | None, codec: Callable[[bytes], Array] | None,
    ) -> None:  # fmt: skip
        problems: list[str] = []
        if not callable(function) or isinstance(function, type):
            problems.append(f"vectorized takes a function of an array, not {function!r}")
        for name, value in (("multiple_of", multiple_of), ("pad_to", pad_to)):
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (whole and 1 <= value <= limits.BATCH_COUNT_MAX):
                problems.append(
                    f"{name} is {value!r}, but must be an int from 1 to {limits.BATCH_COUNT_MAX:,}"
                )
        if not problems and pad_to is not None and pad_to % multiple_of:
            problems.append(
                f"pad_to is {pad_to:,}, but must be a multiple of multiple_of with {multiple_of:,}"
            )
        if codec is not None and (dtype is not None or shape is not None):
            problems.append("codec makes the arrays: leave dtype and shape out")
        self._numpy = _numpy()
        self._function = function
        # What errors and threads of a function backend are named by.
        self.__qualname__ = getattr(function, "__qualname__", None) or type(function).__name__
        self._multiple_of = multiple_of
        self._pad_to = pad_to
        self._shape = _shape(shape, problems)
        self._dtype = None if dtype is None else _dtype(self._numpy, dtype, problems)
        if problems:
            raise ConfigError(*problems)
        self._decode = codec or (self._from_npy if dtype is None else self._from_raw)

    def __repr__(self) -> str:
        return f"<vectorized {self.__qualname__}>"

    def __call__(self, batch: Batch) -> Answer | Awaitable[Answer]:
        """Apply a batch: an awaitable where the function gives one."""
        outcomes: list[Outcome] = [Applied()] * len(batch)
        groups = self._groups(batch.payloads, outcomes)
        calls = [(list(rows), self._stack(list(rows.values()))) for rows in groups.values()]
        while calls:
            indexes, stacked = calls.pop(0)
            answer = self._function(stacked)
            if inspect.isawaitable(answer):
                return self._finish(answer, indexes, calls, outcomes)
            wrong = self._hand_out(answer, indexes, outcomes)
            if wrong is not None:
                return wrong
        return outcomes

    async def _finish(
        self, answer: Any, indexes: list[int], calls: list[tuple[list[int], Array]], outcomes: list[Outcome]
    ) -> Answer:
        """The same from the first call on that gave an awaitable."""
        wrong = self._hand_out(await answer, indexes, outcomes)
        for others, stacked in calls:
            if wrong is not None:
                break
            wrong = self._hand_out(await self._function(stacked), others, outcomes)
        return outcomes if wrong is None else wrong

    def _groups(
        self, payloads: Sequence[bytes], outcomes: list[Outcome]
    ) -> dict[tuple[Any, ...], dict[int, Array]]:
        """The arrays that are alike, each by its index in the batch; what is none is rejected in `outcomes`."""
        groups: dict[tuple[Any, ...], dict[int, Array]] = {}
        for index, payload in enumerate(payloads):
            try:
                row = self._numpy.asarray(self._decode(payload))
            except ValueError as error:
                outcomes[index] = Rejected(f"the payload is not such an array: {error}")
                continue
            groups.setdefault((row.dtype, row.shape), {})[index] = row
        return groups

    def _stack(self, rows: list[Array]) -> Array:
        """One array, with rows of zeros behind where padding is asked for."""
        count = len(rows)
        if self._pad_to is not None and count > self._pad_to:
            raise BatchTooLarge(f"{count:,} operations, of at most {self._pad_to:,}", count=self._pad_to)
        stacked = self._numpy.zeros((self._padded(count), *rows[0].shape), dtype=rows[0].dtype)
        self._numpy.stack(rows, out=stacked[:count])
        return cast("Array", stacked)

    def _padded(self, count: int) -> int:
        return -(-max(count, self._pad_to or 1) // self._multiple_of) * self._multiple_of

    def _hand_out(self, answer: object, indexes: Sequence[int], outcomes: list[Outcome]) -> NoAnswer | None:
        """Give each row of an answer to its operation. Returns what to answer instead where it has not a row for each.

        Each gets memory of its own: a result that somebody keeps must not keep that of the whole batch.
        """
        if answer is None:
            return None
        array = self._numpy.asarray(answer)
        padded = self._padded(len(indexes))
        if array.ndim == 0 or len(array) != padded:
            found = "no array" if array.ndim == 0 else f"{len(array):,} rows"
            return NoAnswer(
                f"{self.__qualname__} returned {found} for {padded:,} operations: expected one row for each"
            )
        for index, row in zip(indexes, array, strict=False):
            outcomes[index] = Applied(self._numpy.copy(row) if array.ndim > 1 else row)
        return None

    def _from_raw(self, payload: bytes) -> Array:
        array = self._numpy.frombuffer(payload, dtype=self._dtype)
        return cast("Array", array if self._shape is None else array.reshape(self._shape))

    def _from_npy(self, payload: bytes) -> Array:
        array = decode_array(payload)
        if self._shape is not None and array.shape != self._shape:
            raise ValueError(f"its shape is {array.shape}, not {self._shape}")
        return array


def encode_array(array: Any) -> bytes:
    """An array (or what numpy makes one of) as a payload: the bytes of a .npy file. Raises ValueError for Python objects."""
    buffer = io.BytesIO()
    _numpy().save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def decode_array(payload: bytes) -> Array:
    """The array of a payload that `encode_array` made. Read-only: it shares the payload's memory.

    Nothing is unpickled, and nothing is allocated before the header has been compared with the length. Raises ValueError for
    any other bytes.
    """
    numpy = _numpy()
    stream = io.BytesIO(payload)
    try:
        version = numpy.lib.format.read_magic(stream)
        header = _HEADERS.get(version)
        if header is None:
            raise ValueError(f"a .npy file of version {version} is none that encode_array makes")
        shape, fortran, dtype = getattr(numpy.lib.format, header)(stream)
    except ValueError:
        raise
    except Exception as error:  # numpy evaluates the header as a literal: hostile ones fail in many ways
        raise ValueError(f"the header of a .npy file cannot be read: {error!r}") from error
    start = stream.tell()
    if dtype.hasobject or any(length < 0 for length in shape):
        raise ValueError("a .npy file with Python objects or a negative length")
    if math.prod(shape) * dtype.itemsize != len(payload) - start:
        raise ValueError(
            f"{len(payload) - start:,} bytes follow the header of an array of {shape} of {dtype}"
        )
    if not math.prod(shape) or not dtype.itemsize:
        return cast("Array", numpy.empty(_bounded(shape), dtype))
    flat = numpy.frombuffer(payload, dtype=dtype, offset=start)
    return cast("Array", flat.reshape(shape, order="F" if fortran else "C"))


def _bounded(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of an array without bytes, which may claim any lengths."""
    if any(length > _BYTES_MAX for length in shape):
        raise ValueError(f"an array without bytes of the shape {shape}")
    return shape


def _shape(shape: Sequence[int] | None, problems: list[str]) -> tuple[int, ...] | None:
    if shape is None:
        return None
    lengths = tuple(shape)
    if not all(isinstance(length, int) and 0 <= length <= _BYTES_MAX for length in lengths):
        problems.append(f"shape is {lengths!r}, but must be lengths from 0 to {_BYTES_MAX:,}")
    return lengths


def _dtype(numpy: Any, dtype: DTypeLike, problems: list[str]) -> Any:
    try:
        found = numpy.dtype(dtype)
    except TypeError as error:
        problems.append(f"dtype is {dtype!r}: {error}")
        return None
    if found.hasobject or not found.itemsize:
        problems.append(f"dtype is {found}, which raw bytes cannot hold")
    return found


def _numpy() -> Any:
    try:
        return importlib.import_module("numpy")
    except ImportError as error:
        raise ConfigError(
            "numpy is not installed: pip install 'walbatch[numpy]', or '.[numpy]' from a clone"
        ) from error
