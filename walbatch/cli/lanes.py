"""Lanes from the command line and from what the store remembers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from walbatch.backends.urls import open_backend
from walbatch.config import Lane
from walbatch.errors import ConfigError
from walbatch.types import LaneMemory


def parse_lanes(options: Iterable[str]) -> dict[str, str]:
    """`kind=URL` options as a mapping."""
    lanes: dict[str, str] = {}
    for option in options:
        kind, separator, url = option.partition("=")
        if not separator or not kind or not url:
            raise ConfigError(
                f"--lane {option!r} must be KIND=URL, for example put=lmdb:///var/lib/app/blocks"
            )
        if kind in lanes:
            raise ConfigError(f"--lane names {kind!r} twice")
        lanes[kind] = url
    return lanes


def build_lanes(
    remembered: Mapping[str, LaneMemory],
    *,
    named: Mapping[str, str],
    to: str | None = None,
    shards: int | None = None,
) -> dict[str, Lane]:
    """The lanes to open: what was named, else what is remembered, else held.

    A remembered `python:` target is not opened: code runs only when it is named.
    """
    named = dict(named)
    if to is not None:
        unnamed = sorted(set(remembered) - set(named))
        if len(unnamed) != 1:
            kinds = ", ".join(unnamed) or "none"
            raise ConfigError(
                f"--to needs exactly one lane, but the store remembers: {kinds}. Use --lane KIND=URL for each"
            )
        named[unnamed[0]] = to
    lanes: dict[str, Lane] = {}
    for kind in sorted({*remembered, *named}):
        memory = remembered.get(kind)
        count = memory.shards if memory else shards or 1
        lanes[kind] = Lane(_backend(kind, named, memory), shards=count)
    return lanes


def _backend(kind: str, named: Mapping[str, str], memory: LaneMemory | None) -> Any:
    if kind in named:
        if os.getcwd() not in sys.path:
            sys.path.insert(
                0, os.getcwd()
            )  # as `python -m` does, so that python:module:function finds the user's module
        return open_backend(named[kind], allow_python=True)
    if memory is None or memory.url is None or memory.url.startswith("python:"):
        return None
    return open_backend(memory.url, allow_python=False)
