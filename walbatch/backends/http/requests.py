"""Operations as requests: the address, the body, and the header that names an operation for ever.

What is not here: sending them.

The idea needed to read it: `Idempotency-Key` is the store's UUID and the operation's first LSN. It is the same whenever, and in
whatever batch, the operation comes again, so that a server which remembers it applies it once.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import httpx

from walbatch.backends.http.url import fill
from walbatch.types import Operation

IDEMPOTENCY_KEY: Final = "Idempotency-Key"

_NAME: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_VALUE: Final = re.compile(r"([!-~]([ \t!-~]*[!-~])?)?")
_TOKEN: Final = re.compile(r"[!-~]+")
_FRAMING: Final = frozenset({"content-length", "transfer-encoding"})

Build = Callable[[Any], httpx.Request]
"""What a user makes of an operation, or of a list of them: a request."""


def check_headers(headers: Mapping[str, str]) -> list[str]:
    """What is wrong with headers. No sentence repeats any of them: there may be secrets in them."""
    for name, value in headers.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            return ["a header's name must be letters, digits and hyphens"]
        if not isinstance(value, str) or not _VALUE.fullmatch(value):
            return [
                "a header's value must be text in visible ASCII, without line ends, or spaces at its ends"
            ]
        if name.lower() in _FRAMING:
            return ["the headers must not say how long a body is: that is found out for each request"]
    return []


def token_of(text: str) -> str | None:
    """The token in what an environment variable holds, as files and shells leave it there; None where no header can hold it."""
    token = text.strip()
    return token if _TOKEN.fullmatch(token) else None


class UnbuildableError(ValueError):
    """No request can be made of an operation. The text is what its dead letter says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """How requests are made. `build`, if given, makes them; all have `headers`, where they have no other such ones."""

    target: str
    method: str
    headers: Mapping[str, str]
    empty_deletes: bool
    build: Build | None

    def one(self, operation: Operation, store: bytes) -> httpx.Request:
        """A request for an operation. Raises UnbuildableError, and what `build` raises."""
        if self.build is not None:
            request = self._built(operation)
        else:
            is_delete = self.empty_deletes and not operation.payload
            method = "DELETE" if is_delete else self.method
            content = None if is_delete or method == "DELETE" else operation.payload
            try:
                request = httpx.Request(
                    method, fill(self.target, operation.key), content=content, headers=dict(self.headers)
                )
            except (ValueError, httpx.InvalidURL) as error:
                raise UnbuildableError(str(error)) from error
        name = identity(operation, store)
        if name is not None and IDEMPOTENCY_KEY not in request.headers:
            request.headers[IDEMPOTENCY_KEY] = name
        return request

    def whole(self, operations: Sequence[Operation], store: bytes) -> httpx.Request:
        """A request for all of them: JSON lines, unless `build` makes it."""
        if self.build is not None:
            return self._built(operations)
        lines = [json.dumps(_line(operation, store), ensure_ascii=False) for operation in operations]
        body = "".join(f"{line}\n" for line in lines).encode()
        return httpx.Request(self.method, self.target, content=body, headers=dict(self.headers))

    def _built(self, what: Any) -> httpx.Request:
        assert self.build is not None
        request = self.build(what)
        if not isinstance(request, httpx.Request):
            raise TypeError(f"the request function returned {type(request).__name__}, not an httpx.Request")
        for name, value in self.headers.items():
            request.headers.setdefault(name, value)
        return request


def identity(operation: Operation, store: bytes) -> str | None:
    """What names an operation for ever, on every server; None for one that was not logged."""
    return None if operation.identity is None else f"{UUID(bytes=store)}-{operation.identity}"


def _line(operation: Operation, store: bytes) -> dict[str, Any]:
    name = identity(operation, store)
    return {
        **({} if name is None else {"id": name}), **_field("key", operation.key), **_field("payload", operation.payload),
    }  # fmt: skip


def _field(name: str, value: bytes) -> dict[str, str]:
    """Bytes as text where they are UTF-8, else as `<name>_base64`, as everywhere on the command line."""
    try:
        return {name: value.decode()}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(value).decode()}
