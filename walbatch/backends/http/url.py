"""The address of an HTTP API, and the options of the backend behind it: `https://host/objects/{key}?v=1#method=PUT&conflict=applied`.

What is not here: requests.

The idea needed to read it: a fragment never reaches a server, so it is free for options, and the query is the target's alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote, unquote, urlsplit

from walbatch.errors import ConfigError

KEY: Final = "{key}"

TEXTS: Final = ("method", "content_type", "conflict", "order", "bearer", "ca_file")
NUMBERS: Final = ("concurrency", "result_bytes_max")
FLAGS: Final = ("batch", "empty_deletes", "netrc")
_TRUTH: Final = {"true": True, "1": True, "false": False, "0": False}
_SECRET: Final = re.compile(
    r"passw|pwd|secret|token|signature|credential|authori[sz]|oauth|apikey|accesskey|jwt"
    r"|(^|[^a-z])(sig|auth|pass|sas)([^a-z]|$)|key$"
)
"""Of a query field's name in small letters: it looks like something that must not be remembered."""

_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def check_target(target: str, *, batch: bool) -> list[str]:
    """What is wrong with an address. No sentence repeats what may be a secret."""
    try:
        parts = urlsplit(target)
        host, has_user = parts.hostname, parts.username is not None
        parts.port  # noqa: B018 - it raises for one that is no number
    except (ValueError, AttributeError, TypeError):
        return ["the URL of an HttpBackend must be https://host/path/{key}, or http://..."]
    problems = []
    if parts.scheme not in {"http", "https"} or not host:
        problems.append("the URL of an HttpBackend must be https://host/path/{key}, or http://...")
    if parts.fragment or "#" in target:
        problems.append("the URL of an HttpBackend has a #: its options are arguments here")
    if has_user or ("@" in parts.query and not parts.path):
        problems.append(
            "the URL of an HttpBackend holds a user or password: it would be remembered; use bearer= or netrc="
        )
    if any(map(_is_secret, re.split("[&;]", parts.query))):
        problems.append(
            "the URL of an HttpBackend has a query field that looks like a token, a key or a signature, and would be remembered: "
            "use bearer=, netrc=, headers= or request="
        )
    if KEY in parts.netloc:
        problems.append(f"{KEY} must stand in the path or the query of the URL, not in its host")
    if batch and KEY in target:
        problems.append(f"a request for a whole batch has no key: take {KEY} out of the URL")
    if "{" in target.replace(KEY, ""):
        problems.append(f"the URL of an HttpBackend may hold {KEY} only; write %7B for a brace")
    return problems


def check_variable(name: str) -> list[str]:
    """What is wrong with the name of an environment variable, which may be a token in the wrong place."""
    if isinstance(name, str) and _VARIABLE.fullmatch(name):
        return []
    return ["bearer must be the name of an environment variable that holds the token, not the token"]


def _is_secret(field: str) -> bool:
    name, _, value = field.partition("=")
    return value != KEY and _SECRET.search(unquote(name).lower()) is not None


def fill(target: str, key: bytes) -> str:
    """The address for a key, all of whose bytes but letters, digits and `-._~` are escaped.

    Raises ValueError where it would become another path.
    """
    path, question, query = target.partition("?")
    escaped = quote(key, safe="")
    path, query = path.replace(KEY, escaped), query.replace(KEY, escaped)
    if any(segment in {".", ".."} for segment in path.split("/")[3:]):
        raise ValueError(f"the key {key!r} would name another path")
    return f"{path}{question}{query}"


def options_of(url: str) -> tuple[str, dict[str, Any]]:
    """The address in a URL, and what its fragment says, as arguments of `HttpBackend`. Raises ConfigError."""
    target, _, fragment = url.partition("#")
    options: dict[str, Any] = {}
    for field in filter(None, fragment.split("&")):
        name, equals, value = field.partition("=")
        value = unquote(value)
        if not equals or name in options:
            # What stands there may be the rest of a password with a # in it: nothing of it is named.
            raise ConfigError(
                "the URL of an HttpBackend: each option must stand behind its # once, as NAME=VALUE"
            )
        if name in TEXTS:
            options[name] = value
        elif name in NUMBERS and value.isascii() and value.isdigit():
            options[name] = int(value)
        elif name in FLAGS and value.lower() in _TRUTH:
            options[name] = _TRUTH[value.lower()]
        else:
            known = ", ".join((*TEXTS, *NUMBERS, *FLAGS))
            raise ConfigError(
                f"the URL of an HttpBackend: an option behind its # is not known, or cannot have this value; known: {known}"
            )
    return target, options


def url_with(target: str, options: Mapping[str, Any]) -> str:
    """The URL that `options_of` takes apart again. Options that are None are left out."""
    fields = [
        f"{name}={quote(str(value).lower() if isinstance(value, bool) else str(value), safe='/')}"
        for name, value in options.items()
        if value is not None
    ]
    return f"{target}{'#' if fields else ''}{'&'.join(fields)}"
