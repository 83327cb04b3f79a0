"""Parquet files: operations as rows of typed columns.

What is not here: why each stands in exactly one file (`stream`).

The idea needed to read it: columns are built for all rows at once. Only where that fails is each row tried alone, and those that do
not fit their columns are rejected.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

from walbatch.backends.files.backend import Encoded, FilesBackend
from walbatch.errors import BatchTooLarge, ConfigError
from walbatch.ports import FileSystem
from walbatch.types import Batch

try:
    import pyarrow as pa
    from pyarrow import compute as pc
    from pyarrow import parquet as pq
except ImportError as error:
    raise ImportError("ParquetBackend needs pyarrow: install walbatch[parquet]") from error

COMPRESSIONS: Final = ("zstd", "snappy", "gzip", "none")
PLAIN: Final = (("lsn", pa.int64()), ("key", pa.binary()), ("payload", pa.binary()), ("priority", pa.int8()))
OWN: Final = ("lsn", "key")
"""Columns that are there beside those of a payload's fields."""

SHOWN_BYTES_MAX: Final = 60
_SEPARATORS: Final = (",", ":")
_MISFITS: Final = (ValueError, TypeError, OverflowError, pa.ArrowException)
"""What pyarrow raises for values that do not fit a type."""

Columns = Mapping[str, Any]
"""Names of fields, and their types: pyarrow's, or the names of those ("int64", "string", "timestamp[us, tz=UTC]")."""


class ParquetBackend(FilesBackend):
    """A transactional backend that writes each batch as a Parquet file into the folder `path`. Needs the extra `parquet` (pyarrow).

    Without `columns`: `lsn` (int64, null on a lane with durability "none"), `key` and `payload` (binary), `priority` (int8).

    With `columns`, names and types, or a `pyarrow.Schema`: the payload is a JSON object with a field for each column, beside `lsn`
    and `key`. A field that is missing is null; one that is unknown, or does not fit its type, or is null where the schema does not
    allow it, makes the operation a dead letter, and the rest of its batch is written. Objects and lists become JSON text in a
    column of strings.

    `compression`: "zstd", "snappy", "gzip" or "none". `fs` is for crash tests.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        columns: Columns | pa.Schema | None = None,
        *,
        compression: str = "zstd",
        fs: FileSystem | None = None,
    ) -> None:
        if compression not in COMPRESSIONS:
            raise ConfigError(f"compression is {compression!r}, but must be one of {', '.join(COMPRESSIONS)}")
        super().__init__(path, ".parquet", fs)
        self._fields: Final = None if columns is None else _fields_of(columns)
        own = [pa.field(name, type_, nullable=name == "lsn") for name, type_ in PLAIN]
        if self._fields is None:
            self.schema = pa.schema(own)
        else:
            self.schema = pa.schema([*own[: len(OWN)], *self._fields])
        self._is_nameable = isinstance(columns, Mapping) or columns is None
        self._compression = compression

    @property
    def url(self) -> str | None:
        """`parquet:///path?columns=name:type,...`, from which the command line makes it again; None where no URL can say it."""
        fields: dict[str, str] = {}
        if self._fields is not None:
            if not self._is_nameable or not all(_is_alias(field) for field in self._fields):
                return None
            fields["columns"] = ",".join(f"{field.name}:{field.type}" for field in self._fields)
        if self._compression != "zstd":
            fields["compression"] = self._compression
        return self._url("parquet", fields)

    def encode(self, batch: Batch, wanted: Sequence[int]) -> Encoded:
        """A Parquet file of those rows that fit."""
        rejected: dict[int, str] = {}
        good: Sequence[int] = wanted
        arrays: list[Any] = []
        if self._fields is None:
            payloads = pa.array([batch.payloads[index] for index in wanted], pa.binary())
            arrays = [payloads, pa.array([batch.priorities[index] for index in wanted], pa.int8())]
        else:
            good, arrays = _columns_of(self._fields, batch.payloads, wanted, rejected)
        lsns = [batch.lsns[index] for index in good] if batch.lsns else [None] * len(good)
        columns = [
            pa.array(lsns, pa.int64()),
            pa.array([batch.keys[index] for index in good], pa.binary()),
            *arrays,
        ]
        if not good:
            return Encoded(content=(), count=0, rejected=rejected)
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns, schema=self.schema), sink, compression=self._compression)
        return Encoded(content=(sink.getvalue().to_pybytes(),), count=len(good), rejected=rejected)


def take_columns(text: str) -> dict[str, str]:
    """`name:type,name:type` as a mapping. A comma inside of brackets belongs to a type. Raises ConfigError."""
    columns: dict[str, str] = {}
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[(") - (character in ")]")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    for part in parts:
        name, colon, type_ = part.partition(":")
        if not name or not colon or not type_ or name in columns:
            raise ConfigError(
                f"columns: {part!r} must be NAME:TYPE, and each name stand there once, as in id:int64,name:string"
            )
        columns[name] = type_
    return columns


def _fields_of(columns: Any) -> list[Any]:
    """Columns as fields. Raises ConfigError with every problem."""
    fields: list[Any] = []
    problems: list[str] = []
    if isinstance(columns, pa.Schema):
        fields = list(columns)
    elif isinstance(columns, Mapping):
        for name, type_ in columns.items():
            try:
                fields.append(pa.field(name, _type_of(type_)))
            except (ValueError, TypeError) as error:
                problems.append(
                    f"column {name!r}: {type_!r} is no type of pyarrow ({error}): for example int64, string, double"
                )
    else:
        raise ConfigError(
            f"columns must be a mapping of names to types, or a pyarrow.Schema, not {type(columns).__name__}"
        )
    names = [field.name for field in fields]
    problems += [
        f"column {name!r} is there already: call the field otherwise" for name in OWN if name in names
    ]
    problems += [
        f"column {name!r} stands there twice" for name in sorted({n for n in names if names.count(n) > 1})
    ]
    if not fields and not problems:
        problems.append("columns is empty: name at least one, or leave it out")
    if problems:
        raise ConfigError(*problems)
    return fields


def _type_of(type_: Any) -> Any:
    """A type, by itself or by its name."""
    if isinstance(type_, pa.DataType):
        return type_
    if not isinstance(type_, str):
        raise TypeError("expected a name")
    name, bracket, inside = type_.partition("[")
    if bracket and inside.endswith("]") and name == "timestamp":
        unit, comma, zone = inside[:-1].partition(",")
        if comma:
            return pa.timestamp(unit.strip(), tz=zone.strip().removeprefix("tz=").strip())
    return pa.type_for_alias(type_)


def _is_alias(field: Any) -> bool:
    """Whether a field's type is found again by its name."""
    try:
        return bool(_type_of(str(field.type)) == field.type) and field.nullable
    except (ValueError, TypeError):
        return False


def _columns_of(
    fields: Sequence[Any], payloads: Sequence[bytes], wanted: Sequence[int], rejected: dict[int, str]
) -> tuple[list[int], list[Any]]:
    """Which of the payloads fit, and their columns. `rejected` grows by the others.

    Raises BatchTooLarge where rows fit alone, but not together: a dictionary, say, with more values than its index can count.
    """
    names = {field.name for field in fields}
    good: list[int] = []
    rows: list[dict[str, Any]] = []
    for index in wanted:
        try:
            rows.append(_row(payloads[index], names))
        except ValueError as error:
            rejected[index] = str(error)
            continue
        good.append(index)
    while True:  # each round has fewer rows, or is the last
        try:
            return good, [_array(field, [row.get(field.name) for row in rows]) for field in fields]
        except _MISFITS:
            fitting = [_misfit(fields, row) for row in rows]
        rejected.update({index: text for index, text in zip(good, fitting, strict=True) if text is not None})
        if not any(text is not None for text in fitting):
            raise BatchTooLarge(
                f"{len(rows)} rows fit their columns one by one, but not together: cut smaller",
                count=len(rows) // 2,
            )
        rows = [row for row, text in zip(rows, fitting, strict=True) if text is None]
        good = [index for index, text in zip(good, fitting, strict=True) if text is None]


def _row(payload: bytes, names: set[str]) -> dict[str, Any]:
    shown = payload if len(payload) <= SHOWN_BYTES_MAX else payload[:SHOWN_BYTES_MAX] + b"..."
    try:
        row: object = json.loads(payload.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the payload {shown!r} is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"the payload {shown!r} is no object with a field for each column")
    if unknown := row.keys() - names:
        raise ValueError(f"the payload has fields that no column has: {', '.join(sorted(unknown))}")
    return row


def _misfit(fields: Sequence[Any], row: Mapping[str, Any]) -> str | None:
    """What does not fit of a row; None where all of it does."""
    for field in fields:
        try:
            _array(field, [row.get(field.name)])
        except _MISFITS as error:
            return f"the field {field.name!r} does not fit its column ({field.type}): {error}"
    return None


def _array(field: Any, values: list[Any]) -> Any:
    """A column. Raises ValueError, TypeError, OverflowError."""
    type_ = field.type
    if not field.nullable and None in values:
        raise ValueError("null, but the column must have a value")
    if pa.types.is_string(type_) or pa.types.is_large_string(type_):
        values = [_text(value) for value in values]
    elif pa.types.is_decimal(type_):
        texts = [str(value) if isinstance(value, (int, float)) else value for value in values]
        return pa.array(texts, pa.string()).cast(type_)
    elif pa.types.is_temporal(type_) and any(isinstance(value, str) for value in values):
        texts = [value if isinstance(value, str) else None for value in values]
        numbers = [None if isinstance(value, str) else value for value in values]
        return pc.coalesce(pa.array(texts, pa.string()).cast(type_), pa.array(numbers, type_))
    elif pa.types.is_integer(type_) and not {type(value) for value in values} <= {int, type(None)}:
        raise ValueError("not a whole number")
    array = pa.array(values, type_)
    return array if array.type == type_ else array.cast(type_)  # a dictionary's index grows by itself


def _text(value: Any) -> Any:
    return (
        json.dumps(value, ensure_ascii=False, separators=_SEPARATORS)
        if isinstance(value, (list, dict))
        else value
    )
