"""Keys of Redis as the place of operations: which key an operation's becomes, and which commands its payload.

What is not here: how commands are sent, and what Redis makes of them.

The idea needed to read it: an operation becomes a few commands, bytes only. What cannot be read (a payload that is no JSON
object) is a fault of that operation alone, found before Redis sees it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from walbatch.backends.sql.table import UnreadableError
from walbatch.errors import ConfigError

Command = tuple[bytes, ...]
"""A command's name and its arguments."""

TYPES: Final = ("string", "hash", "list", "stream")

OWN_PREFIX: Final = b"walbatch:"
"""Keys that begin like this are the backend's: the marks stand there."""

PREFIX_BYTES_MAX: Final = 1024
LENGTH_MAX: Final = 2**62
SHOWN_BYTES_MAX: Final = 60


@dataclass(frozen=True, slots=True)
class RedisKeys:
    """Keys that begin with `prefix`, and what stands there.

    - `type` "string": the payload as it is (SET); "hash": a JSON object whose fields are set (HSET), null ones removed, others left
      alone; "list": the payload behind those that are there (RPUSH); "stream": an entry with the field `payload` (XADD).
    - `empty_deletes`: an empty payload deletes the key. Unless said otherwise it does so with "hash", and not with "string";
      lists and
      streams are only added to.
    - `length_max`: a list keeps so many of its newest payloads, a stream about so many entries, never fewer. None: all.

    Raises ConfigError with every problem.
    """

    prefix: str | bytes = b""
    type: str = "string"
    empty_deletes: bool | None = None
    length_max: int | None = None

    def __post_init__(self) -> None:
        """Check all of it, and make bytes of the prefix."""
        problems = []
        if self.type not in TYPES:
            problems.append(f"type is {self.type!r}, but must be one of {', '.join(TYPES)}")
        if isinstance(self.prefix, str):
            object.__setattr__(self, "prefix", self.prefix.encode())
        if not isinstance(self.prefix, bytes) or len(self.prefix) > PREFIX_BYTES_MAX:
            problems.append(f"prefix must be text or bytes, {PREFIX_BYTES_MAX:,} of them at most")
        elif self.prefix.startswith(OWN_PREFIX):
            problems.append(f"prefix must not begin with {OWN_PREFIX.decode()!r}: the marks stand there")
        if self.adds and self.empty_deletes:
            problems.append(f"a {self.type} is only added to: empty_deletes is for string and hash")
        if self.length_max is not None:
            if not self.adds:
                problems.append("length_max is for list and stream")
            if (
                isinstance(self.length_max, bool)
                or not isinstance(self.length_max, int)
                or not 0 < self.length_max <= LENGTH_MAX
            ):
                problems.append(f"length_max is {self.length_max!r}, but must be a number from 1")
        if problems:
            raise ConfigError(*problems)
        if self.empty_deletes is None:
            object.__setattr__(self, "empty_deletes", self.type == "hash")

    @property
    def adds(self) -> bool:
        """Whether every operation adds to what is there, instead of replacing it."""
        return self.type in {"list", "stream"}

    @property
    def is_plain(self) -> bool:
        """Whether each operation is one SET, of its payload as it is, with any key."""
        return self.type == "string" and not self.empty_deletes and not self.may_collide

    @property
    def may_collide(self) -> bool:
        """Whether some key of an operation becomes one of the backend's own."""
        return OWN_PREFIX.startswith(self.prefix)  # type: ignore[arg-type]  # bytes since it was made

    def commands(self, key: bytes, payload: bytes) -> Sequence[Command]:
        """What an operation becomes. Raises UnreadableError."""
        assert isinstance(self.prefix, bytes)
        name = self.prefix + key
        if name.startswith(OWN_PREFIX):
            raise UnreadableError(f"the key {_shown(name)} is the backend's own: choose a prefix")
        if not payload and self.empty_deletes:
            return ((b"DEL", name),)
        if self.type == "string":
            return ((b"SET", name, payload),)
        if self.type == "hash":
            return _hash_commands(name, payload)
        if self.type == "list":
            push = (b"RPUSH", name, payload)
            return (*_make_room(name, self.length_max), push) if self.length_max else (push,)
        bound = (b"MAXLEN", b"~", b"%d" % self.length_max) if self.length_max else ()
        return ((b"XADD", name, *bound, b"*", b"payload", payload),)


def _make_room(name: bytes, length_max: int) -> Sequence[Command]:
    """Shorten a list before it is added to. Where Redis allows only that, it may come again; what is added must not."""
    if length_max == 1:
        return ((b"LTRIM", name, b"1", b"0"),)
    return ((b"LTRIM", name, b"-%d" % (length_max - 1), b"-1"),)


def _hash_commands(name: bytes, payload: bytes) -> Sequence[Command]:
    try:
        fields = json.loads(payload, parse_constant=_no_constant, object_pairs_hook=_unique)
        if not isinstance(fields, dict):
            raise TypeError(f"expected a JSON object, not {type(fields).__name__}")
        put = [
            part for field, value in fields.items() if value is not None for part in (field.encode(), _flat(value))
        ]  # fmt: skip
        gone = [field.encode() for field, value in fields.items() if value is None]
    except Exception as error:
        raise UnreadableError(
            f"the payload {_shown(payload)} cannot be read: {str(error) or type(error).__name__}"
        ) from error
    commands: list[Command] = []
    if put:
        commands.append((b"HSET", name, *put))
    if gone:
        commands.append((b"HDEL", name, *gone))
    return commands


def _flat(value: Any) -> bytes:
    """A value as a field of a hash: texts as they are, all others as JSON."""
    return (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a field stands there twice")
    return fields


def _shown(data: bytes) -> str:
    return repr(data if len(data) <= SHOWN_BYTES_MAX else data[:SHOWN_BYTES_MAX] + b"...")
