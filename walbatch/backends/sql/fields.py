"""A table as the query of a URL, both ways: `table=users&key=id&key_codec=integer&columns=name,email&codec=json`.

What is not here: the rest of the URL, which is the database's.

The idea needed to read it: only what differs from the defaults is written, and a name with a comma is escaped like anything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final
from urllib.parse import quote, unquote

from walbatch.backends.sql.table import Table
from walbatch.errors import ConfigError

FIELDS: Final[Sequence[str]] = ("table", "key", "columns", "key_codec", "codec", "empty_deletes", "create")
_TRUTH: Final = {"true": True, "1": True, "false": False, "0": False}


def url_query(table: Table) -> str:
    """The query that `take_table` makes `table` of again. It must be nameable: without functions."""
    fields = [("table", _escaped(table.name))]
    usual = Table(table.name)
    for name in ("key", "columns"):
        names = getattr(table, name)
        if names != getattr(usual, name):
            fields.append((name, ",".join(map(_escaped, names))))
    fields += [
        (name, str(getattr(table, name)))
        for name in ("key_codec", "codec")
        if getattr(table, name) != getattr(usual, name)
    ]
    if table.empty_deletes != (table.codec == "json"):
        fields.append(("empty_deletes", str(table.empty_deletes).lower()))
    if not table.create:
        fields.append(("create", "false"))
    return "&".join(f"{name}={value}" for name, value in fields)


def take_table(query: str, shown: str) -> tuple[Table, dict[str, str]]:
    """The table that a query names, and the fields that are not about it, unescaped. `shown` is the URL without its password.

    Raises ConfigError.
    """
    fields: dict[str, str] = {}
    for field in filter(None, query.split("&")):
        name, equals, value = field.partition("=")
        if not equals or name in fields:
            raise ConfigError(f"{shown!r}: {name!r} must stand there once, as {name}=VALUE")
        fields[name] = value
    if "table" not in fields:
        raise ConfigError(f"{shown!r} names no table: add ?table=NAME")
    ours = {name: fields.pop(name) for name in FIELDS if name in fields}
    return _table(ours, shown), {name: unquote(value) for name, value in fields.items()}


def _table(fields: Mapping[str, str], shown: str) -> Table:
    flags: dict[str, bool] = {}
    for name in ("empty_deletes", "create"):
        if name in fields:
            if fields[name].lower() not in _TRUTH:
                raise ConfigError(f"{shown!r}: {name} must be true or false")
            flags[name] = _TRUTH[fields[name].lower()]
    return Table(
        unquote(fields["table"]),
        key=_names(fields.get("key", "key")),
        columns=_names(fields.get("columns", "payload")),
        key_codec=fields.get("key_codec", "bytes"),
        codec=fields.get("codec", "bytes"),
        empty_deletes=flags.get("empty_deletes"),
        create=flags.get("create", True),
    )


def _names(text: str) -> Sequence[str]:
    return [unquote(name) for name in text.split(",")] if text else []


def _escaped(name: str) -> str:
    return quote(name, safe="")
