"""Backends by URL: what a store remembers of them, and what the command line takes.

What is not here: where URLs are remembered, and the backends themselves.

| URL                          | backend                                                               |
|------------------------------|-----------------------------------------------------------------------|
| `lmdb:///var/data/blocks`    | `LmdbBackend("/var/data/blocks")`; `%` escapes as in any URL          |
| `lmdb:blocks`                | the same, relative to the working directory                           |
| `sqlite:///app.db?table=t`   | `SqliteBackend("/app.db", "t")`; also `sqlite:app.db?table=t`; what   |
|                              | else a table has stands in `backends.sql.fields`                      |
| `postgresql://db/app?table=t`| `PostgresBackend("postgresql://db/app", "t")`; other fields are       |
|                              | libpq's; a password belongs into PGPASSWORD or a password file        |
| `jsonl:///folder?line=json`  | `JsonLinesBackend("/folder", line="json")`; also `compress`, `level`  |
| `parquet:///folder?columns=` | `ParquetBackend("/folder", {...})`: `columns=id:int64,name:string`;   |
|                              | also `compression`                                                    |
| `redis://host/0?prefix=a:`   | `RedisBackend("redis://host/0", "a:")`; also `rediss:` (encrypted)    |
|                              | and `redis+unix:///path?db=0`; the password stands in REDISCLI_AUTH   |
| `https://host/{key}#method=` | `HttpBackend("https://host/{key}", method=...)`, also `http:`; the    |
|                              | query is the target's, what stands behind # is ours                   |
| `python:package.module:name` | a function of a batch, or a backend object: only where the user named |
|                              | it, since importing a module runs it                                  |
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Collection
from typing import Final
from urllib.parse import quote, unquote, unquote_to_bytes

from walbatch.backends.function import FunctionBackend, as_backend
from walbatch.errors import BackendError, ConfigError
from walbatch.ports import Backend

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(.*)", re.DOTALL)
_HOST: Final = re.compile(r"([^:\[\]]*|\[[^\[\]]*\])(:\d*)?")
_SECRET: Final = re.compile(r"passw|pwd|secret|token|api_?key", re.IGNORECASE)


def open_backend(url: str, *, allow_python: bool) -> Backend:
    """A backend for `url`, not opened yet. `allow_python` only for a URL that the user named in this very call.

    Raises ConfigError for a URL that cannot be right, BackendError for a Python name that cannot be imported.
    """
    match = _SCHEME.fullmatch(url)
    scheme, rest = (match[1].lower(), match[2]) if match else ("", "")
    scheme = "postgresql" if scheme == "postgres" else scheme  # libpq takes both
    openers: dict[str, Callable[[str, str], Backend]] = {
        "http": _open_http, "https": _open_http, "jsonl": _open_jsonlines, "lmdb": _open_lmdb, "parquet": _open_parquet,
        "postgresql": _open_postgres, "python": _open_python, "redis": _open_redis, "redis+unix": _open_redis,
        "rediss": _open_redis, "sqlite": _open_sqlite,
    }  # fmt: skip
    if scheme not in openers:
        known = ", ".join(f"{name}:" for name in openers)
        raise ConfigError(
            f"{strip_password(url)!r} is not the URL of a backend: it must start with one of {known}"
        )
    if scheme == "python" and not allow_python:
        raise ConfigError(
            f"{url!r} is remembered in the store, and importing it would run code that the store names: "
            "if you trust it, name it yourself on the command line"
        )
    return openers[scheme](url, rest)


def url_of(backend: object) -> str | None:
    """The URL from which `open_backend` makes a backend again, without its password; None where it has none."""
    url = getattr(backend, "url", None)
    return strip_password(url) if isinstance(url, str) else None


def strip_password(url: str) -> str:
    """`url` without its password, and without query fields that look like one. In doubt too much is taken.

    >>> strip_password("postgresql://app:secret@db/queue?sslpassword=x&sslmode=require")
    'postgresql://app@db/queue?sslmode=require'
    """
    match = _SCHEME.fullmatch(url)
    if match is None or match[1].lower() in {"lmdb", "python"}:
        return url
    rest = match[2]
    if rest.startswith("//"):
        rest = f"//{_strip_userinfo(rest[2:], match[1].lower())}"
    rest, question, query = rest.partition("?")
    if question:
        fields = [field for field in query.split("&") if not _SECRET.search(field.partition("=")[0])]
        question, query = ("?", "&".join(fields)) if fields else ("", "")
    return f"{match[1]}:{rest}{question}{query}"


def _strip_userinfo(rest: str, scheme: str) -> str:
    """`user:password@host/path` without the password, also where that holds an unescaped `/`, `?` or `@`."""
    authority = rest.partition("/")[0]
    head, question, _ = authority.partition("?")
    if question and scheme in {"http", "https"} and "@" not in head and _HOST.fullmatch(head):
        return rest  # a query without a path
    # A slash inside the password cuts the authority short: then what follows its colon is no port.
    cut_short = "@" not in authority and ":" in authority and not _HOST.fullmatch(authority.partition("?")[0])
    head, at, host = (rest if cut_short else authority).rpartition("@")
    if not at:
        return rest
    tail = "" if cut_short else rest[len(authority) :]
    return f"{head.partition(':')[0]}@{host}{tail}"


def _open_lmdb(url: str, rest: str) -> Backend:
    from walbatch.backends.lmdb import LmdbBackend  # noqa: PLC0415 - only who uses LMDB needs it

    if any(mark in rest for mark in "?#"):
        raise ConfigError(
            f"{url!r} has a ? or #, but no options are known: write %3F or %23 if the path has it"
        )
    return LmdbBackend(_path("lmdb", url, rest, "directory"))


def _open_sqlite(url: str, rest: str) -> Backend:
    from walbatch.backends.sql.fields import take_table  # noqa: PLC0415 - only who uses a database needs them
    from walbatch.backends.sqlite import SqliteBackend  # noqa: PLC0415

    if "#" in rest:
        raise ConfigError(f"{url!r} has a #: write %23 if the path has it")
    rest, _, query = rest.partition("?")
    path = _path("sqlite", url, rest, "file")
    table, others = take_table(query, url)
    if others:
        raise ConfigError(f"{url!r}: {', '.join(sorted(others))} is not known")
    return SqliteBackend(path, table)


def _open_postgres(url: str, rest: str) -> Backend:
    from walbatch.backends.sql.fields import take_table  # noqa: PLC0415 - only who uses a database needs them

    try:
        from walbatch.backends.postgres import PostgresBackend  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(str(error)) from error
    if not rest.startswith("//"):
        raise ConfigError(f"{strip_password(url)!r} must begin with postgresql://")
    # As libpq sees it: up to the first @ before any slash there are a user and a password, whatever is in them.
    user, at, behind = rest.partition("@")
    if "/" in user[2:]:
        authority, stripped = rest[2:].partition("/")[0], strip_password(f"postgresql:{rest}")
        if not f"{stripped}/".startswith((f"postgresql://{authority}/", f"postgresql://{authority}?")):
            raise ConfigError(f"{strip_password(url)!r}: write a / in user or password as %2F")
        user, at, behind = "", "", rest
    rest, _, query = behind.partition("?")
    rest = f"{user}{at}{rest}"
    table, others = take_table(query, strip_password(url))
    fields = "&".join(f"{name}={quote(value, safe='')}" for name, value in others.items())
    return PostgresBackend(f"postgresql:{rest}{'?' if fields else ''}{fields}", table)


def _open_jsonlines(url: str, rest: str) -> Backend:
    from walbatch.backends.files.jsonlines import JsonLinesBackend  # noqa: PLC0415 - only who writes files needs them

    path, fields = _folder("jsonl", url, rest, {"line", "compress", "level"})
    level = fields.get("level", "3")
    if not level.isdecimal():
        raise ConfigError(f"{url!r}: level must be a number")
    return JsonLinesBackend(
        path, line=fields.get("line", "text"), compress=fields.get("compress"), level=int(level)
    )


def _open_parquet(url: str, rest: str) -> Backend:
    try:
        from walbatch.backends.files.parquet import ParquetBackend, take_columns  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(str(error)) from error
    path, fields = _folder("parquet", url, rest, {"columns", "compression"})
    columns = take_columns(fields["columns"]) if "columns" in fields else None
    return ParquetBackend(path, columns, compression=fields.get("compression", "zstd"))


def _folder(scheme: str, url: str, rest: str, known: Collection[str]) -> tuple[str, dict[str, str]]:
    """The folder that a URL names, and its other fields, unescaped."""
    if "#" in rest:
        raise ConfigError(f"{url!r} has a #: write %23 if the path has it")
    rest, _, query = rest.partition("?")
    fields: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        name, equals, value = part.partition("=")
        if not equals or name in fields or name not in known:
            raise ConfigError(
                f"{url!r}: {name!r} is not known, or stands there twice; known: {', '.join(sorted(known))}"
            )
        fields[name] = unquote(value)
    return _path(scheme, url, rest, "folder"), fields


def _open_redis(url: str, _rest: str) -> Backend:
    try:
        from walbatch.backends.redis import RedisBackend  # noqa: PLC0415 - only who uses it needs it
    except ImportError as error:
        raise ConfigError(str(error)) from error
    return RedisBackend(url)


def _open_http(url: str, _rest: str) -> Backend:
    try:
        from walbatch.backends.http import HttpBackend  # noqa: PLC0415 - only who uses it needs it
        from walbatch.backends.http.url import options_of  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(str(error)) from error
    target, options = options_of(url)
    return HttpBackend(target, **options)


def _path(scheme: str, url: str, rest: str, kind: str) -> str:
    """The path that a URL names."""
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        if host:
            raise ConfigError(
                f"{url!r} names a host, {host!r}: write {scheme}:{host}{slash}{path}, or {scheme}:/// and a path"
            )
        rest = f"/{path}"
    path = os.fsdecode(unquote_to_bytes(rest))
    if not path.strip("/") or "\0" in path:
        raise ConfigError(f"{url!r} names no {kind}: write {scheme}:///path/of/it")
    return path


def _open_python(url: str, rest: str) -> Backend:
    module_name, _, name = rest.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *name.split("."))):
        raise ConfigError(f"{url!r} must be python:module:name, for example python:myapp.delivery:apply")
    try:
        target: object = importlib.import_module(module_name)
        for part in name.split("."):
            target = getattr(target, part)
    except Exception as error:
        raise BackendError(f"{url!r} cannot be imported: {type(error).__name__}: {error}") from error
    backend = as_backend(target)
    if isinstance(backend, FunctionBackend) and backend.url is None:
        backend.url = url
    return backend
