"""What a value becomes in a column of another database: exactly what it was, or a refusal that says why.

What is not here: which kinds may become which (`shapes`).

The idea needed to read it: a converter is a function of one value, chosen once for a pair of columns; None where values stay as
they are. NULL needs none. What would be rounded, cut off or taken for something else is refused: a database does that silently.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import re
import struct
import uuid
from collections.abc import Callable, Sequence
from decimal import Context, InvalidOperation
from typing import Any, Final

from walbatch.copying.rows import RowError
from walbatch.copying.shapes import Column, Dialect, Kind, Route

Converter = Callable[[Any], Any]

_EXACT: Final = Context(prec=200_000, Emax=999_999_999, Emin=-999_999_999, traps=[InvalidOperation])
"""More digits than PostgreSQL's numeric has."""

_NUMBER: Final = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
_SPECIAL: Final = frozenset({"nan", "infinity", "-infinity", "inf", "-inf"})
_NARROW: Final = struct.Struct("<f")
_INTEGER_MAX: Final = 1 << 63

_DATE: Final = re.compile(r"\d{4,7}-\d\d-\d\d( BC)?|-?infinity")
_TIME: Final = re.compile(r"(\d\d:\d\d)(:\d\d)?(\.\d{1,9})?")
_STAMP: Final = re.compile(
    r"(\d{4,7}-\d\d-\d\d)(?:[ T](\d\d:\d\d)(:\d\d)?(\.\d{1,9})?)?(Z|[+-]\d\d(?::?\d\d)?(?::\d\d)?)?( BC)?|(-?infinity)"
)
_SHOWN_CHARACTERS: Final = 40


def converters(route: Route) -> tuple[Converter | None, ...]:
    """One for each pair of columns."""
    source, target = route.source.dialect, route.target.dialect
    if source is target is Dialect.SQLITE:
        return (None,) * len(route.pairs)
    if target is Dialect.SQLITE:
        return tuple(_to_sqlite(one, other) for one, other in route.pairs)
    if source is Dialect.SQLITE:
        return tuple(_to_postgres(other) for _, other in route.pairs)
    return tuple(None if one.type == other.type else _to_postgres(other) for one, other in route.pairs)


def convert(values: Sequence[Any], by: Sequence[Converter | None], names: Sequence[str]) -> tuple[Any, ...]:
    """Values as their columns take them. Raises RowError, with the column's name."""
    converted = list(values)
    for place, converter in enumerate(by):
        if converter is not None and (value := converted[place]) is not None:
            try:
                converted[place] = converter(value)
            except RowError as error:
                raise RowError(f"column {names[place]!r}: {error}") from None
    return tuple(converted)


_WORDS: Final = frozenset({Kind.TEXT, Kind.JSON, Kind.OTHER})
"""Kinds whose texts may look like a number."""


# --- to SQLite ----------------------------------------------------------------------------------------------------


def _to_sqlite(column: Column, other: Column) -> Converter | None:
    if column.kind is Kind.REAL:
        return _no_nan
    if column.kind is Kind.INTEGER and other.affinity == "REAL":
        return _real_of_integer
    if column.kind is Kind.NUMERIC and other.affinity not in {"TEXT", "BLOB"}:
        return _number_for_sqlite
    if column.kind in _WORDS and other.affinity not in {"TEXT", "BLOB"}:
        return _no_number
    return None


def _no_nan(value: float) -> float:
    if math.isnan(value):
        raise RowError("SQLite keeps no NaN: it would become NULL")
    return value


def _real_of_integer(value: int) -> float:
    if int(float(value)) != value:
        raise RowError(f"{value} cannot be kept exactly as a floating-point number")
    return float(value)


def _number_for_sqlite(value: str) -> int | float:
    if _NUMBER.fullmatch(value) is None:
        raise RowError(f"{_shown(value)} is no number for SQLite: let the column be TEXT")
    number = _EXACT.create_decimal(value)
    if number == number.to_integral_value(context=_EXACT) and abs(number) < _INTEGER_MAX:
        return int(number)
    real = float(number)
    if math.isinf(real) or _EXACT.create_decimal(repr(real)) != number:
        raise RowError(
            f"{_shown(value)} has more digits than SQLite keeps of a number: let the column be TEXT"
        )
    return real


def _no_number(value: str) -> str:
    if _NUMBER.fullmatch(value) is not None:
        raise RowError(
            f"{_shown(value)} would become a number in SQLite: let the column be TEXT, or JSON TEXT"
        )
    return value


# --- to PostgreSQL ------------------------------------------------------------------------------------------------


def _to_postgres(column: Column) -> Converter | None:
    if column.kind is Kind.NUMERIC and column.scale is not None:
        return lambda value: _scaled(_numeric(value), column)
    if column.kind in {Kind.TIME, Kind.TIMESTAMP, Kind.TIMESTAMPTZ} and column.scale is not None:
        plain = _TO_POSTGRES[column.kind]
        assert plain is not None
        return lambda value: _timed(plain(value), column)
    if column.kind is Kind.TEXT and column.length is not None:
        return lambda value: _fitting(_text(value), column)
    if column.kind is Kind.REAL and column.is_narrow:
        return _narrow
    return _TO_POSTGRES[column.kind]


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise RowError(f"{_shown(value)} is no integer")
    return value


def _real(value: Any) -> float:
    if type(value) is int:
        return _real_of_integer(value)
    if type(value) is not float:
        raise RowError(f"{_shown(value)} is no number")
    return value


def _narrow(value: Any) -> float:
    """A number that 32 bits keep, as PostgreSQL writes it: with the fewest digits that mean the same 32 bits."""
    real = _real(value)
    if math.isnan(real) or math.isinf(real):
        return real
    try:
        bits = _NARROW.pack(real)
    except OverflowError:
        raise _not_narrow(value) from None
    (kept,) = _NARROW.unpack(bits)
    written = next(
        number for digits in range(1, 18) if _same_bits(number := float(f"{kept:.{digits}g}"), bits)
    )
    if real not in {kept, written}:
        raise _not_narrow(value)
    return written


def _same_bits(number: float, bits: bytes) -> bool:
    try:
        return _NARROW.pack(number) == bits
    except OverflowError:
        return False


def _not_narrow(value: Any) -> RowError:
    return RowError(f"{_shown(value)} cannot be kept exactly in 32 bits (real)")


def _numeric(value: Any) -> Any:
    if type(value) in {int, float}:
        return value
    if type(value) is not str or (_NUMBER.fullmatch(value) is None and value.lower() not in _SPECIAL):
        raise RowError(f"{_shown(value)} is no number")
    return value


def _scaled(value: Any, column: Column) -> Any:
    text = str(value)
    if text.strip().lower() in _SPECIAL:
        return value
    exponent = _EXACT.create_decimal(text).normalize(_EXACT).as_tuple().exponent
    if isinstance(exponent, int) and -exponent > (column.scale or 0):
        raise RowError(f"{_shown(value)} would be rounded: the column is {column.type}")
    return value


def _boolean(value: Any) -> bool:
    if value not in {0, 1} or type(value) not in {int, bool}:
        raise RowError(f"{_shown(value)} is neither true (1) nor false (0)")
    return bool(value)


def _text(value: Any) -> str:
    if type(value) is not str:
        raise RowError(f"{_shown(value)} is no text")
    return value


def _fitting(value: str, column: Column) -> str:
    """PostgreSQL cuts blanks off where they are too many, and a `name` wherever it is too long."""
    assert column.length is not None
    size = len(value.encode()) if column.type == "name" else len(value)
    if size > column.length:
        raise RowError(f"{_shown(value)} is longer than {column.length}: the column is {column.type}")
    return value


def _bytes(value: Any) -> bytes:
    if type(value) is not bytes:
        raise RowError(f"{_shown(value)} is no bytes")
    return value


def _date(value: Any) -> str:
    if _DATE.fullmatch(_text(value)) is None:
        raise RowError(f"{_shown(value)} is no date (YYYY-MM-DD)")
    return str(value)


def _time(value: Any) -> str:
    match = _TIME.fullmatch(_text(value))
    if match is None:
        raise RowError(f"{_shown(value)} is no time (HH:MM:SS)")
    return f"{match[1]}{match[2] or ':00'}{_fraction(match[3])}"


def _timestamp(value: Any) -> str:
    """As PostgreSQL writes it."""
    match = _STAMP.fullmatch(_text(value))
    if match is None or match[5]:
        raise RowError(f"{_shown(value)} is no timestamp (YYYY-MM-DD HH:MM:SS, without time zone)")
    if match[7]:
        return match[7]
    return f"{match[1]} {match[2] or '00:00'}{match[3] or ':00'}{_fraction(match[4])}{match[6] or ''}"


def _timestamptz(value: Any) -> str:
    match = _STAMP.fullmatch(_text(value))
    if match is None or not (match[5] or match[7]):
        raise RowError(f"{_shown(value)} is no timestamp with time zone (YYYY-MM-DD HH:MM:SS+00)")
    if match[7]:
        return match[7]
    text = f"{match[1]} {match[2] or '00:00'}{match[3] or ':00'}{_fraction(match[4])}"
    if not match[5].strip("Z+-:0"):
        return f"{text}+00{match[6] or ''}"
    if match[6]:
        raise RowError(f"{_shown(value)} is before our era, and not in UTC: write it with +00")
    try:
        moment = dt.datetime.fromisoformat(f"{text}{match[5]}").astimezone(dt.UTC)
    except (ValueError, OverflowError) as error:
        raise RowError(f"{_shown(value)} is no timestamp: {error}") from None
    return f"{moment.year:04}-{moment:%m-%d %H:%M:%S}{_fraction(f'.{moment.microsecond:06d}')}+00"


def _fraction(text: str | None) -> str:
    digits = (text or "").rstrip("0").rstrip(".")
    if len(digits) > len(".123456"):
        raise RowError(f"a fraction of a second has more than six digits: {text}")
    return digits


def _timed(value: str, column: Column) -> str:
    fraction = re.search(r"\.(\d+)", value)
    if fraction is not None and len(fraction[1]) > (column.scale or 0):
        raise RowError(f"{_shown(value)} would be rounded: the column is {column.type}")
    return value


def _uuid(value: Any) -> str:
    try:
        return str(uuid.UUID(_text(value)))
    except ValueError:
        raise RowError(f"{_shown(value)} is no UUID") from None


_TO_POSTGRES: Final[dict[Kind, Converter | None]] = {
    Kind.INTEGER: _integer, Kind.REAL: _real, Kind.NUMERIC: _numeric, Kind.BOOLEAN: _boolean, Kind.TEXT: _text,
    Kind.BYTES: _bytes, Kind.DATE: _date, Kind.TIME: _time, Kind.TIMESTAMP: _timestamp, Kind.TIMESTAMPTZ: _timestamptz,
    Kind.UUID: _uuid, Kind.JSON: _text, Kind.OTHER: _text,
}  # fmt: skip


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


# --- comparing ----------------------------------------------------------------------------------------------------


def canonical(pairs: Sequence[tuple[Column, Column]]) -> tuple[Callable[[Any], bytes], ...]:
    """For each pair of columns a function that makes the same bytes of values that are equal in both databases."""
    return tuple(_canonical(one, other) for one, other in pairs)


_NUMBERS: Final = frozenset({Kind.INTEGER, Kind.REAL, Kind.NUMERIC, Kind.BOOLEAN})


def _canonical(column: Column, other: Column) -> Callable[[Any], bytes]:
    kinds = {column.kind, other.kind}
    if kinds & {Kind.NUMERIC} or (kinds & _NUMBERS and kinds - _NUMBERS):
        return _canonical_number
    if Kind.JSON in kinds and "jsonb" in {column.type, other.type}:
        return _canonical_json
    return _canonical_value


def _canonical_value(value: object) -> bytes:
    if value is None:
        return b"n"
    if isinstance(value, int):
        return b"%d" % value
    if isinstance(value, str):
        return b"s" + value.encode("utf-8", "surrogatepass")
    if isinstance(value, bytes):
        return b"b" + value
    if isinstance(value, float) and value.is_integer():
        return b"%d" % value
    return repr(value).encode()


def _canonical_number(value: Any) -> bytes:
    if type(value) is str and _NUMBER.fullmatch(value):
        number = _EXACT.create_decimal(value.strip()).normalize(_EXACT)
    elif type(value) is float and math.isfinite(value):
        number = _EXACT.create_decimal(repr(value)).normalize(_EXACT)
    elif type(value) is int:
        number = _EXACT.create_decimal(value).normalize(_EXACT)
    else:
        return _canonical_value(value)
    return b"0" if not number else str(number).encode()


def _canonical_json(value: Any) -> bytes:
    if type(value) is not str:
        return _canonical_value(value)
    try:
        read = json.loads(value, parse_float=_tagged, parse_int=_tagged)
        return b"j" + json.dumps(read, sort_keys=True).encode()
    except (ValueError, ArithmeticError, RecursionError):
        return _canonical_value(value)


def _tagged(text: str) -> dict[str, str]:
    """A number as what no text is, and no object of jsonb: its names have no NUL."""
    return {"\0": _canonical_number(text).decode()}
