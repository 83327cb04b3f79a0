"""Where a Redis is, as a URL, both ways: `redis://user@host:6379/0?prefix=page:&type=hash`.

What is not here: connections.

The idea needed to read it: a password may stand in the URL that a program gives, and never in one that is made here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import quote, quote_from_bytes, unquote, unquote_to_bytes, urlsplit

from walbatch.backends.redis.keys import TYPES, RedisKeys
from walbatch.errors import ConfigError

PORT: Final = 6379
PERSISTENCES: Final = ("synced", "any")
_SCHEMES: Final = ("redis", "rediss", "redis+unix")
_TLS_FIELDS: Final[tuple[str, ...]] = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_KEYS_FIELDS: Final[tuple[str, ...]] = ("prefix", "type", "empty_deletes", "length_max")
_TRUTH: Final = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """A database of a server. `path` is a unix socket's; there are no host and port then."""

    scheme: str
    host: str = ""
    port: int = PORT
    path: str = ""
    database: int = 0
    user: str = ""
    password: str = field(default="", repr=False)
    tls: Mapping[str, str] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """The URL without user, password and options."""
        if self.path:
            return f"{self.scheme}://{quote(self.path)}?db={self.database}"
        return f"{self.scheme}://{_bracketed(self.host)}:{self.port}/{self.database}"

    def url(self, keys: RedisKeys, persistence: str) -> str:
        """The URL that `parse` takes apart again, without the password."""
        fields = [(name, quote(value, safe="")) for name, value in sorted(self.tls.items())]
        if self.path:
            fields.insert(0, ("db", str(self.database)))
        usual = RedisKeys(type=keys.type)
        if keys.prefix != usual.prefix:
            assert isinstance(keys.prefix, bytes)
            fields.append(("prefix", quote_from_bytes(keys.prefix, safe=":")))
        if keys.type != RedisKeys().type:
            fields.append(("type", keys.type))
        if keys.empty_deletes != usual.empty_deletes:
            fields.append(("empty_deletes", str(keys.empty_deletes).lower()))
        if keys.length_max is not None:
            fields.append(("length_max", str(keys.length_max)))
        if persistence != "synced":
            fields.append(("persistence", persistence))
        query = "&".join(f"{name}={value}" for name, value in fields)
        user = f"{quote(self.user, safe='')}@" if self.user else ""
        where = quote(self.path) if self.path else f"{_bracketed(self.host)}:{self.port}/{self.database}"
        return f"{self.scheme}://{user}{where}{'?' if query else ''}{query}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """What a URL says. `keys` and `persistence` are None where it says nothing of them."""

    address: Address
    keys: RedisKeys | None
    persistence: str | None


def parse(url: str) -> Parsed:
    """Take a URL apart. Raises ConfigError, without any part of the URL that may hold a password."""
    expected = "expected redis://host:6379/0, rediss://host:6379/0 or redis+unix:///path/of/socket"
    try:
        parts = urlsplit(url)
        scheme = "redis+unix" if parts.scheme == "unix" else parts.scheme
        port, host = parts.port or PORT, parts.hostname or ""
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
    except (ValueError, TypeError, AttributeError):
        # What it says repeats parts of the URL, and there may be a password in them.
        raise ConfigError(f"what RedisBackend was given is no URL of a Redis: {expected}") from None
    if scheme not in _SCHEMES or parts.fragment:
        raise ConfigError(f"what RedisBackend was given is no URL of a Redis: {expected}")
    if "@" in parts.query:
        raise ConfigError(
            "the URL of a Redis has an @ behind its ?: in a password and a prefix ? # / @ must be percent-escaped (%40 is @)"
        )
    fields = _fields(parts.query)
    is_socket = scheme == "redis+unix"
    if is_socket == bool(host) or (is_socket and not parts.path.strip("/")):
        raise ConfigError(f"the URL of a Redis names no {'socket' if is_socket else 'host'}: {expected}")
    database = fields.pop("db", "0") if is_socket else parts.path.removeprefix("/") or "0"
    if not (database.isascii() and database.isdigit()):
        raise ConfigError(f"the URL of a Redis names no database by its number: {expected}")
    tls = {name: unquote(fields.pop(name)) for name in _TLS_FIELDS if name in fields}
    if tls and scheme != "rediss":
        raise ConfigError(f"{', '.join(tls)} is for rediss://, which is encrypted")
    ours = {name: fields.pop(name) for name in _KEYS_FIELDS if name in fields}
    persistence = fields.pop("persistence", None)
    if fields:
        known = ", ".join((*_KEYS_FIELDS, "persistence", *_TLS_FIELDS))
        # Not even their names: an unescaped password may have become one.
        raise ConfigError(f"the URL of a Redis has fields that are not known; known: {known}")
    if persistence not in (None, *PERSISTENCES):
        raise ConfigError(f"the URL of a Redis: persistence must be one of {', '.join(PERSISTENCES)}")
    address = Address(
        scheme=scheme, host=host, port=port, path=unquote(parts.path) if is_socket else "", database=int(database),
        user=user, password=password, tls=tls,
    )  # fmt: skip
    return Parsed(address=address, keys=_keys(ours) if ours else None, persistence=persistence)


def _fields(query: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        name, equals, value = part.partition("=")
        if not equals or name in fields:
            raise ConfigError("the URL of a Redis: each field must stand there once, as NAME=VALUE")
        fields[name] = value
    return fields


def _keys(fields: Mapping[str, str]) -> RedisKeys:
    if fields.get("type", TYPES[0]) not in TYPES:
        raise ConfigError(f"the URL of a Redis: type must be one of {', '.join(TYPES)}")
    empty_deletes, length_max = fields.get("empty_deletes"), fields.get("length_max")
    if empty_deletes is not None and empty_deletes.lower() not in _TRUTH:
        raise ConfigError("the URL of a Redis: empty_deletes must be true or false")
    if length_max is not None and not (length_max.isascii() and length_max.isdigit()):
        raise ConfigError("the URL of a Redis: length_max must be a number")
    return RedisKeys(
        unquote_to_bytes(fields.get("prefix", "")),
        type=fields.get("type", "string"),
        empty_deletes=None if empty_deletes is None else _TRUTH[empty_deletes.lower()],
        length_max=None if length_max is None else int(length_max),
    )


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
