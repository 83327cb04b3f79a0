"""A table as the place of operations: which column an operation's key goes to, which ones its payload, and what deletes a row.

What is not here: SQL. The databases make statements of it (`statements` of each).

The idea needed to read it: an operation with the key of another one replaces that one's row, or deletes it. What cannot be read (a
payload that is no JSON, an unknown field) is a fault of that operation alone, found before the database sees it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from walbatch.errors import ConfigError

Row = tuple[Any, ...]
"""Values of columns. None is NULL."""

Columns = tuple[tuple[Any, ...], ...]
"""Rows by column; empty where there are none."""

Step = tuple[list[Row], Columns]
"""Keys to delete, and then rows to put."""

Types = frozenset[type]

Apart = Sequence[Collection[type]]
"""For each key column the types of which it keeps any two values apart, as a text column does with texts, and one that takes
capitals for small letters does not."""

KeyCodec = Callable[[bytes], Sequence[Any]]
Codec = Callable[[bytes], Mapping[str, Any] | None]

NAME_CHARACTERS_MAX: Final = 63
"""What PostgreSQL keeps of a name; it cuts off the rest without a word."""

INTEGER_BYTES_MAX: Final = 20
"""The digits of a 64-bit number, and its sign."""


class UnreadableError(ValueError):
    """An operation is not what its table asks for. The text is what its dead letter says."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table, by name (`pages`, or `schema.pages`), and how operations become its rows.

    - `key`: the key columns. They must be its primary key, or have a unique index.
    - `columns`: where the payload goes. Columns that are not named keep what they have, or get their default.
    - `key_codec` makes one value for each key column: "bytes" (as it is), "text" (UTF-8), "integer" (decimal digits), "json" (an
      array), or a function of the key that returns a sequence.
    - `codec` makes the columns: "bytes" and "text" for exactly one column; "json", an object with a field for each column (one
      that is missing is NULL, one that is unknown is an error; lists and objects are stored as JSON text); or a function of the
      payload that returns a mapping, or None to delete the row.
    - `empty_deletes`: an empty payload deletes the row. Unless said otherwise it does so with "json", of which it is no value,
      and not with "bytes" and "text", of which it is one; nor with a function, which says so itself.
    - `create` makes the table where it is missing, if the codecs say what types it has: neither "json" nor a function.

    Raises ConfigError with every problem.
    """

    name: str
    key: str | Sequence[str] = "key"
    columns: str | Sequence[str] = "payload"
    key_codec: str | KeyCodec = "bytes"
    codec: str | Codec = "bytes"
    empty_deletes: bool | None = None
    create: bool = True

    def __post_init__(self) -> None:
        """Check all of it, and make tuples of the names."""
        for field in ("key", "columns"):
            names = getattr(self, field)
            object.__setattr__(self, field, (names,) if isinstance(names, str) else tuple(names))
        problems = [*self._name_problems(), *self._codec_problems()]
        if problems:
            raise ConfigError(*problems)
        if self.empty_deletes is None:
            object.__setattr__(self, "empty_deletes", self.codec == "json")

    def _name_problems(self) -> list[str]:
        names = [*self.path, *self.key, *self.columns]
        problems = [
            f"{name!r} is no name of a table or column: 1 to {NAME_CHARACTERS_MAX} printable characters"
            for name in names
            if not isinstance(name, str) or not 0 < len(name.encode("utf-8", "replace")) <= NAME_CHARACTERS_MAX
            or not name.isprintable()
        ]  # fmt: skip
        if not self.key:
            problems.append(f"table {self.name!r} has no key columns: by what is a row found?")
        twice = {name for name in (*self.key, *self.columns) if (*self.key, *self.columns).count(name) > 1}
        problems += [f"column {name!r} of table {self.name!r} is named twice" for name in sorted(twice)]
        return problems

    def _codec_problems(self) -> list[str]:
        problems = []
        if not callable(self.key_codec) and self.key_codec not in _KEY_CODECS:
            problems.append(
                f"key_codec is {self.key_codec!r}, but must be one of {', '.join(_KEY_CODECS)}, or a function"
            )
        if not callable(self.codec) and self.codec not in _CODECS:
            problems.append(
                f"codec is {self.codec!r}, but must be one of {', '.join(_CODECS)}, or a function"
            )
        if self.key_codec in _TYPES and len(self.key) != 1:
            problems.append(
                f'key_codec "{self.key_codec}" makes one value, but there are {len(self.key)} key columns: use "json"'
            )
        if self.codec in _TYPES and len(self.columns) != 1:
            problems.append(
                f'codec "{self.codec}" makes one value, but there are {len(self.columns)} columns: use "json"'
            )
        return problems

    @property
    def path(self) -> tuple[str, ...]:
        """The name in its parts: schema and table, or table."""
        return tuple(self.name.split(".")) if isinstance(self.name, str) else ("",)

    @property
    def all_columns(self) -> tuple[str, ...]:
        """Key columns, then the others: the order of a row's values."""
        return (*self.key, *self.columns)

    @property
    def types(self) -> tuple[str, ...] | None:
        """For each column "bytes", "text" or "integer"; None where the codecs do not say."""
        if self.key_codec in _TYPES and self.codec in _TYPES:
            return (str(self.key_codec), str(self.codec))
        return None

    @property
    def is_plain(self) -> bool:
        """Whether key and payload are the row as they are."""
        return self.key_codec == "bytes" and self.codec == "bytes" and not self.empty_deletes

    @property
    def is_nameable(self) -> bool:
        """Whether a URL can name it: it has no functions."""
        return isinstance(self.key_codec, str) and isinstance(self.codec, str)

    def read_key(self, key: bytes) -> Row:
        """The values of the key columns. Raises UnreadableError."""
        codec = _KEY_CODECS[self.key_codec] if isinstance(self.key_codec, str) else self.key_codec
        try:
            values = tuple(codec(key))
            hash(values)
        except Exception as error:
            raise UnreadableError(f"the key {_shown(key)} cannot be read: {_said(error)}") from error
        if len(values) != len(self.key):
            raise UnreadableError(
                f"the key {_shown(key)} has {len(values)} values, but table {self.name!r} has {len(self.key)} key columns"
            )
        return values

    def read_payload(self, payload: bytes) -> Row | None:
        """The values of the other columns; None where the row is to be deleted. Raises UnreadableError."""
        if not payload and self.empty_deletes:
            return None
        if self.codec in _TYPES:
            try:
                return (payload if self.codec == "bytes" else payload.decode(),)
            except UnicodeDecodeError as error:
                raise UnreadableError(
                    f"the payload {_shown(payload)} cannot be read: {_said(error)}"
                ) from error
        codec = _CODECS[self.codec] if isinstance(self.codec, str) else self.codec
        try:
            fields = codec(payload)
        except Exception as error:
            raise UnreadableError(f"the payload {_shown(payload)} cannot be read: {_said(error)}") from error
        if fields is None and callable(self.codec):
            return None
        if not isinstance(fields, Mapping):
            raise UnreadableError(
                f"the payload {_shown(payload)} is no object with a field for each column, but {type(fields).__name__}"
            )
        if not fields.keys() <= set(self.columns):
            unknown = ", ".join(sorted(str(name) for name in fields.keys() - set(self.columns)))
            raise UnreadableError(
                f"the payload has fields which table {self.name!r} is not mapped to: {unknown}; mapped: {', '.join(self.columns)}"
            )
        return tuple(_flat(fields.get(name)) for name in self.columns)


# --- codecs -------------------------------------------------------------------------------------------------------


def _as_it_is(key: bytes) -> Row:
    return (key,)


def _as_text(key: bytes) -> Row:
    return (key.decode(),)


def _as_integer(key: bytes) -> Row:
    if len(key) > INTEGER_BYTES_MAX or not key.removeprefix(b"-").isdigit():
        raise ValueError("expected decimal digits")
    return (int(key),)


def _as_json_array(key: bytes) -> Row:
    values = _parse(key)
    if not isinstance(values, list):
        raise TypeError("expected a JSON array")
    if any(isinstance(value, (list, dict)) or value is None for value in values):
        raise ValueError("expected an array of texts and numbers")
    return tuple(values)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a field stands there twice")
    return fields


def _parse(data: bytes) -> Any:
    return json.loads(data, parse_constant=_no_constant, object_pairs_hook=_unique)


def _flat(value: Any) -> Any:
    """A value as a column takes it."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value


_KEY_CODECS: Final[Mapping[str, KeyCodec]] = {
    "bytes": _as_it_is, "text": _as_text, "integer": _as_integer, "json": _as_json_array,
}  # fmt: skip
_CODECS: Final[Mapping[str, Codec]] = dict.fromkeys(("bytes", "text", "json"), _parse)
_TYPES: Final = frozenset({"bytes", "text", "integer"})
"""Codecs that make exactly one value, of a known type."""

SHOWN_BYTES_MAX: Final = 60


def _shown(data: bytes) -> str:
    return repr(data if len(data) <= SHOWN_BYTES_MAX else data[:SHOWN_BYTES_MAX] + b"...")


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


# --- operations as changes ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What some operations of a batch change, in their order: parallel, `indexes` are places in the batch.

    `values` has None for a delete. With `is_plain`, keys and values are bytes instead of tuples. `marks` are equal where keys are
    certain to be one: 1, 1.0 and true are one to Python, and three to a column of texts.
    """

    indexes: Sequence[int]
    keys: Sequence[Any]
    marks: Sequence[Any]
    values: Sequence[Any]
    is_plain: bool = False

    @property
    def has_deletes(self) -> bool:
        """Whether any row goes."""
        return not self.is_plain and None in self.values

    def puts(self, start: int, end: int) -> Columns:
        """What is left to put of `[start:end]`, of which nothing is a delete: the last of each key, in the order of those.

        In this order the last one wins also where the database takes for one what are two keys here.
        """
        keys, values, marks = self.keys[start:end], self.values[start:end], self.marks[start:end]
        last = dict(zip(marks, range(len(marks)), strict=True))
        if len(last) < len(marks):
            places = sorted(last.values())
            keys, values = [keys[place] for place in places], [values[place] for place in places]
        if self.is_plain:
            return (tuple(keys), tuple(values)) if keys else ()
        return tuple(zip(*((*key, *row) for key, row in zip(keys, values, strict=True)), strict=True))

    def fold(self, start: int, end: int, apart: Apart | None) -> list[Step]:
        """What is left to do for `[start:end]`, step by step: the last put of a key wins.

        If deletes may go before puts of other keys, it is one step. A put that comes behind a delete of its key finds no row, so
        that columns which are not mapped get their defaults. Deletes may not go first where `apart` is None, or the database could
        take the keys of two operations for one: then runs of deletes and of puts keep their order.
        """
        if self.is_plain or None not in self.values[start:end]:
            return [([], self.puts(start, end))] if start < end else []
        if apart is None or not self._are_apart(start, end, apart):
            return self._runs(start, end)
        last = dict(zip(self.marks[start:end], range(start, end), strict=True))
        deletes = {
            self.marks[place]: self.keys[place] for place in range(start, end) if self.values[place] is None
        }
        left = (place for place in sorted(last.values()) if self.values[place] is not None)
        rows = ((*self.keys[place], *self.values[place]) for place in left)
        return [(list(deletes.values()), tuple(zip(*rows, strict=True)))]

    def _are_apart(self, start: int, end: int, apart: Apart) -> bool:
        """Whether the database is certain to tell these keys from each other: values of one type in each column."""
        for values, types in zip(zip(*self.keys[start:end], strict=True), apart, strict=True):
            found = set(map(type, values))
            if len(found) > 1 or not found <= set(types):
                return False
        return True

    def _runs(self, start: int, end: int) -> list[Step]:
        steps: list[Step] = []
        while start < end:
            first_put = start
            while first_put < end and self.values[first_put] is None:
                first_put += 1
            deletes = dict(zip(self.marks[start:first_put], self.keys[start:first_put], strict=True))
            start = first_put
            while start < end and self.values[start] is not None:
                start += 1
            steps.append((list(deletes.values()), self.puts(first_put, start)))
        return steps

    def __len__(self) -> int:
        return len(self.indexes)


def read(
    table: Table, keys: Sequence[bytes], payloads: Sequence[bytes], wanted: Sequence[int] | None
) -> tuple[Changes, dict[int, str]]:
    """What operations change (`wanted`: only those at these places), and why some can change nothing, by place."""
    indexes: Sequence[int] = range(len(keys)) if wanted is None else wanted
    if table.is_plain:
        if wanted is not None:
            keys, payloads = [keys[index] for index in wanted], [payloads[index] for index in wanted]
        return Changes(indexes=indexes, keys=keys, marks=keys, values=payloads, is_plain=True), {}
    good: list[int] = []
    refused: dict[int, str] = {}
    read_keys: list[Row] = []
    values: list[Row | None] = []
    for index in indexes:
        try:
            key, row = table.read_key(keys[index]), table.read_payload(payloads[index])
        except UnreadableError as error:
            refused[index] = str(error)
            continue
        good.append(index)
        read_keys.append(key)
        values.append(row)
    return Changes(indexes=good, keys=read_keys, marks=[*map(_marked, read_keys)], values=values), refused


_TOLD_APART: Final = frozenset({bytes, str, int})
"""Types of which values are equal only where they are the same: neither bool, a kind of int, nor float with its two zeros."""


def _marked(key: Row) -> Any:
    """What is equal only for keys that are the same to any database."""
    if _TOLD_APART.issuperset(map(type, key)):
        return key
    return tuple((type(value), repr(value)) for value in key)
