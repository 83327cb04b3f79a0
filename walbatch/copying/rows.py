"""A row as the bytes of an operation, and back: every value with its type, exactly.

What is not here: what a database makes of a value (`values`).

The idea needed to read it: a row begins with one letter for each value. Rows with the same letters have the same shape, so a plan
made once for a shape packs and unpacks all of them. The plans that are kept are bounded, and each length is checked against what
is there: a hostile row costs its own size, and ends in a RowError.

    operation key      = values of the key columns
    operation payload  = "R" number (8 bytes, big-endian) values of the other columns
                       | "X" number (8 bytes, big-endian) length of the key's values (4) the key's values, reason in UTF-8
    values             = count (2) letters fixed parts, each in order, then texts and bytes one after the other; little-endian

`number` counts the rows of a table as they were read, from 1.

| letter | value                              | fixed part       |
|--------|------------------------------------|------------------|
| n      | NULL                               | none             |
| t, f   | true, false                        | none             |
| i      | an integer of 64 bits              | 8 bytes, signed  |
| r      | a floating-point number            | 8 bytes, IEEE 754 |
| I      | a larger integer, in decimal digits | length, 4 bytes |
| s      | text, in UTF-8                     | length, 4 bytes  |
| b      | bytes                              | length, 4 bytes  |
| N, D, T, S, Z, U, J, O | text, and what it is in its database: a number, a date, a time, a timestamp, one with time zone, a UUID,
JSON, something else; length, 4 bytes |
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

Values = tuple[Any, ...]

NUMBER_BYTES: Final = 9
"""The letter of a payload and the number of its row. Compared as bytes, they are in the order of the numbers."""

PLANS_MAX: Final = 4_096
"""Shapes of rows that are remembered. Beyond that all are forgotten: real tables have a few."""

ALIKE_MIN: Final = 8
"""Rows of one shape from which on it pays to pack them together."""

DIGITS_MAX: Final = 4_000
"""Of an integer beyond 64 bits: below what Python refuses to read."""

NOTES: Final = "NDTSZUJO"
"""The letters of texts that are something else in their database."""

_ROW: Final = b"R"
_REFUSED: Final = b"X"
_COUNT: Final = struct.Struct("<H")
_LENGTH: Final = struct.Struct("<I")
_FIXED: Final = {
    "n": "",
    "t": "",
    "f": "",
    "i": "q",
    "r": "d",
    "I": "I",
    "s": "I",
    "b": "I",
    **dict.fromkeys(NOTES, "I"),
}
_CONSTANT: Final = {"n": None, "t": True, "f": False}
_INTEGER_BITS: Final = 63


class RowError(ValueError):
    """Bytes that are no row, or a value that no row can have. The text says why."""


@dataclass(frozen=True, slots=True)
class _Packing:
    """How rows of one shape are packed."""

    head: bytes
    struct: struct.Struct
    kept: tuple[int, ...] | None
    """Places of values that have a fixed part; None: all."""
    texts: tuple[int, ...]
    tail: tuple[int, ...]
    """Places of texts and bytes."""


class Encoder:
    """Packs rows whose texts mean what `notes` says: for each column a letter of NOTES, or "s"."""

    def __init__(self, notes: str) -> None:
        self._notes = notes
        self._plans: dict[tuple[object, ...], _Packing] = {}

    def encode(self, row: Values) -> bytes:
        """The values of a row. Raises RowError for what no row can have."""
        shape: tuple[object, ...] = tuple(map(type, row))
        if bool in shape:
            shape = tuple(value if type(value) is bool else type(value) for value in row)
        plan = self._plans.get(shape)
        if plan is None:
            if len(self._plans) >= PLANS_MAX:
                self._plans.clear()
            plan = self._plans[shape] = _packing(_letters(row, self._notes, narrow=True))
        return _packed(plan, row, self._notes)

    def encode_all(self, rows: Sequence[Values]) -> list[bytes | RowError]:
        """The values of each row, or why it has none. Rows of one shape are packed together, by columns: a third of the work."""
        packed: list[bytes | RowError] = [b""] * len(rows)
        places: dict[tuple[type, ...], list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(tuple(map(type, row)), []).append(place)
        for shape, mine in places.items():
            alike = rows if len(mine) == len(rows) else [rows[place] for place in mine]
            together = self._together(shape, alike)
            if together is None:
                together = [self._encode_or_tell(row) for row in alike]
            for place, data in zip(mine, together, strict=True):
                packed[place] = data
        return packed

    def _together(self, shape: tuple[type, ...], rows: Sequence[Values]) -> Sequence[bytes | RowError] | None:
        """Rows of one shape; None where they must be looked at one by one."""
        if len(rows) < ALIKE_MIN or not shape or bool in shape:
            return None
        try:
            plan = _packing(_letters(rows[0], self._notes, narrow=True))
            columns: list[Sequence[Any]] = list(zip(*rows, strict=True))
            for place in plan.texts:
                columns[place] = list(map(str.encode, columns[place]))
            tails = [columns[place] for place in plan.tail]
            for place in plan.tail:
                columns[place] = list(map(len, columns[place]))
            kept = columns if plan.kept is None else [columns[place] for place in plan.kept]
            fixed = map(plan.struct.pack, *kept) if kept else [b""] * len(rows)
            return list(map(b"".join, zip([plan.head] * len(rows), fixed, *tails, strict=True)))
        except (struct.error, UnicodeEncodeError, RowError):
            return None

    def _encode_or_tell(self, row: Values) -> bytes | RowError:
        try:
            return self.encode(row)
        except RowError as error:
            return error


def _packed(plan: _Packing, row: Values, notes: str) -> bytes:
    values = list(row)
    try:
        for place in plan.texts:
            values[place] = values[place].encode()
    except UnicodeEncodeError as error:
        raise RowError(f"a text has characters that are no text: {error.reason}") from error
    tail = [values[place] for place in plan.tail]
    for place in plan.tail:
        values[place] = len(values[place])
    try:
        fixed = plan.struct.pack(*(values if plan.kept is None else [values[place] for place in plan.kept]))
    except struct.error:
        large = _letters(row, notes)
        if "I" not in large or len(plan.head) != _COUNT.size + len(large):
            raise RowError("a value is too large for a row") from None
        digits = tuple(
            str(value) if letter == "I" else value for letter, value in zip(large, row, strict=True)
        )
        return _packed(_packing(large), digits, "")
    return b"".join((plan.head, fixed, *tail))


def _packing(letters: str) -> _Packing:
    kept = tuple(place for place, letter in enumerate(letters) if _FIXED[letter])
    tail = tuple(place for place, letter in enumerate(letters) if _FIXED[letter] == "I")
    return _Packing(
        head=_COUNT.pack(len(letters)) + letters.encode(),
        struct=struct.Struct("<" + "".join(_FIXED[letter] for letter in letters)),
        kept=None if len(kept) == len(letters) else kept,
        texts=tuple(place for place in tail if letters[place] != "b"),
        tail=tail,
    )


def _letters(row: Values, notes: str, *, narrow: bool = False) -> str:
    """The letters of a row. `narrow`: integers are taken for small ones, which packing them shows."""
    return "".join(
        _letter(value, notes[place] if notes else "s", narrow=narrow) for place, value in enumerate(row)
    )


def _letter(value: Any, note: str, *, narrow: bool) -> str:
    kind = type(value)
    if value is None:
        return "n"
    if kind is bool:
        return "t" if value else "f"
    if kind is int:
        if narrow or -(1 << _INTEGER_BITS) <= value < 1 << _INTEGER_BITS:
            return "i"
        if value.bit_length() > 3 * DIGITS_MAX:
            raise RowError("an integer has too many digits")
        return "I"
    if kind is float:
        return "r"
    if kind is str:
        return note
    if kind is bytes:
        return "b"
    raise RowError(f"{value!r} is no value of a row")


# --- back ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Unpacking:
    """How values with the same letters are unpacked."""

    struct: struct.Struct
    template: tuple[Any, ...]
    """None, True and False where they stand."""
    kept: tuple[int, ...] | None
    tail: tuple[tuple[int, str], ...]


class Decoder:
    """Unpacks rows of `count` values. Safe from one thread at a time."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._head = _COUNT.pack(count)
        self._plans: dict[bytes, _Unpacking] = {}

    def decode(self, data: bytes, offset: int = 0) -> Values:
        """The values. Raises RowError."""
        start = offset + _COUNT.size
        if data[offset:start] != self._head:
            raise RowError(f"it is no row of {self._count} values")
        at = start + self._count
        letters = data[start:at]
        plan = self._plans.get(letters)
        if plan is None:
            if len(letters) != self._count:
                raise RowError("it is cut off")
            if len(self._plans) >= PLANS_MAX:
                self._plans.clear()
            plan = self._plans[letters] = _unpacking(letters)
        try:
            fixed = plan.struct.unpack_from(data, at)
        except struct.error:
            raise RowError("it is cut off") from None
        if plan.kept is None:
            values = list(fixed)
        else:
            values = list(plan.template)
            for place, value in zip(plan.kept, fixed, strict=True):
                values[place] = value
        at += plan.struct.size
        for place, letter in plan.tail:
            end = at + values[place]
            values[place] = _tail_value(data[at:end], letter) if end <= len(data) else _cut_off()
            at = end
        if at != len(data):
            raise RowError(f"it has {len(data) - at:,} bytes too many")
        return tuple(values)


def _cut_off() -> Any:
    raise RowError("it is cut off")


def _tail_value(data: bytes, letter: str) -> Any:
    if letter == "b":
        return data
    if letter == "I":
        if len(data) > DIGITS_MAX or not data.removeprefix(b"-").isdigit():
            raise RowError("an integer has other characters than digits, or too many")
        return int(data)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RowError(f"a text is not UTF-8: {error.reason}") from None


def _unpacking(letters: bytes) -> _Unpacking:
    names = letters.decode("latin-1")
    unknown = sorted(set(names) - _FIXED.keys())
    if unknown:
        raise RowError(f"{unknown[0]!r} is the letter of no type")
    kept = tuple(place for place, letter in enumerate(names) if _FIXED[letter])
    return _Unpacking(
        struct=struct.Struct("<" + "".join(_FIXED[letter] for letter in names)),
        template=tuple(_CONSTANT.get(letter) for letter in names),
        kept=None if len(kept) == len(names) else kept,
        tail=tuple((place, letter) for place, letter in enumerate(names) if _FIXED[letter] == "I"),
    )


# --- payloads -----------------------------------------------------------------------------------------------------


def row_payload(number: int, values: bytes) -> bytes:
    """The payload of a row that was read."""
    return b"R%b%b" % (number.to_bytes(8), values)


def refused_payload(number: int, key: bytes, reason: str) -> bytes:
    """The payload of a row that could be read, and not be made an operation of: it keeps its place, and says why."""
    return b"".join(
        (_REFUSED, number.to_bytes(8), _LENGTH.pack(len(key)), key, reason.encode("utf-8", "replace"))
    )


def number_of(payload: bytes) -> int:
    """The number of a payload's row; 0 where it is no payload of ours."""
    return int.from_bytes(payload[1:NUMBER_BYTES]) if len(payload) >= NUMBER_BYTES else 0


def refusal_of(payload: bytes) -> str | None:
    """Why there is no row in a payload; None where there may be one."""
    if payload[:1] == _ROW and len(payload) >= NUMBER_BYTES:
        return None
    if payload[:1] == _REFUSED and len(payload) >= NUMBER_BYTES + _LENGTH.size:
        (length,) = _LENGTH.unpack_from(payload, NUMBER_BYTES)
        return payload[NUMBER_BYTES + _LENGTH.size + length :].decode("utf-8", "replace")
    return "it is no row"


def key_of(key: bytes, payload: bytes) -> bytes:
    """The values of an operation's key columns, packed: the whole of them also where they are longer than a key may be."""
    if payload[:1] == _REFUSED and len(payload) >= NUMBER_BYTES + _LENGTH.size:
        start = NUMBER_BYTES + _LENGTH.size
        (length,) = _LENGTH.unpack_from(payload, NUMBER_BYTES)
        return payload[start : start + length]
    return key


def latest(payloads: Sequence[bytes]) -> int:
    """The place of the payload with the highest number."""
    numbers = [payload[1:NUMBER_BYTES] for payload in payloads]
    return numbers.index(max(numbers))
