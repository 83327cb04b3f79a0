"""Lanes from the command line and from what the store remembers."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from walbatch.backends.urls import open_backend, url_of
from walbatch.config import Lane
from walbatch.errors import ConfigError
from walbatch.inspection import look, remembered_lanes
from walbatch.types import LaneMemory

Named = Mapping[str, str | None]
"""What the command line names: the URL of a lane's backend; None for a lane that is to be held."""


def parse_lanes(options: Iterable[str]) -> dict[str, str | None]:
    """`KIND=URL` options, and `KIND` for a lane without a backend, as a mapping."""
    lanes: dict[str, str | None] = {}
    for option in options:
        kind, separator, url = option.partition("=")
        if not kind or (separator and not url):
            raise ConfigError(
                f"--lane {option!r} must be KIND=URL, for example put=lmdb:///var/lib/app/blocks, or KIND to hold it"
            )
        if kind in lanes:
            raise ConfigError(f"--lane names {kind!r} twice: name it once")
        lanes[kind] = url or None
    return lanes


def check_known(kinds: Iterable[str], *, known: Collection[str]) -> None:
    """Raise ConfigError for a lane that the store does not know: opened once, it would be remembered for ever."""
    if unknown := sorted(set(kinds) - set(known)):
        names = ", ".join(map(repr, sorted(known)))
        has = f"its {'lane is' if len(known) == 1 else 'lanes are'} {names}" if known else "it has none yet"
        raise ConfigError(f"the store has no lane {unknown[0]!r}: {has}; correct --lane")


def check_lane(store: str, kind: str | None, *, seen: Collection[str]) -> None:
    """Raise ConfigError for a lane to show that the store does not know, `seen` ones aside. Reads the log where it has to."""
    if kind is None or kind in seen or kind in remembered_lanes(store):
        return
    found = look(store, full=True).store
    if found.refusal is None:  # else nobody can tell
        check_known([kind], known={*found.kinds, *seen})


def check_shards(shards: int | None, *, named: Named, remembered: Mapping[str, LaneMemory]) -> None:
    """Raise ConfigError where the number of shards is for no lane, and is not what the lanes have."""
    memories = [remembered.get(kind) for kind in (named or remembered)]
    if (
        shards is None
        or not memories
        or any(memory is None or memory.shards == shards for memory in memories)
    ):
        return
    has = ", ".join(f"{kind!r} {memory.shards:,}" for kind, memory in sorted(remembered.items()))
    raise ConfigError(
        f"--shards {shards} is for a lane whose shards the store does not remember; here they are fixed: {has}. Leave it out"
    )


def name_one(to: str, *, known: Iterable[str], named: Named) -> dict[str, str | None]:
    """The lanes that are named, with `to` for the one of the store that is not."""
    unnamed = sorted(set(known) - set(named))
    if len(unnamed) != 1:
        kinds = ", ".join(unnamed) or "none"
        raise ConfigError(
            f"--to is for a store with one lane, but this one has: {kinds}. Use --lane KIND=URL"
        )
    return {**named, unnamed[0]: to}


def build_lanes(
    remembered: Mapping[str, LaneMemory], *, named: Named, shards: int | None = None
) -> dict[str, Lane]:
    """The lanes to open: what is named, else what is remembered. A lane whose backend is not known is held.

    A remembered `python:` target is not opened: code runs only when it is named. `shards` is for lanes that the
    store does not remember.
    """
    lanes: dict[str, Lane] = {}
    for kind in sorted({*remembered, *named}):
        memory = remembered.get(kind)
        count = memory.shards if memory else shards or 1
        # Whoever names another backend than the one that is remembered means it.
        left = memory.url if memory and kind in named else None
        lanes[kind] = Lane(_backend(kind, named, memory), shards=count, moved_from=left)
    return lanes


def moves(lanes: Mapping[str, Lane], remembered: Mapping[str, LaneMemory]) -> dict[str, tuple[str, str]]:
    """The URL that is remembered and the one that was named instead, for each lane where these are two places."""
    found = {}
    for kind, lane in lanes.items():
        url, memory = url_of(lane.backend), remembered.get(kind)
        if (
            url is not None
            and memory is not None
            and memory.url not in {None, url}
            and not str(memory.url).startswith("python:")
        ):
            found[kind] = (str(memory.url), url)
    return found


def _backend(kind: str, named: Named, memory: LaneMemory | None) -> Any:
    if kind in named:
        url = named[kind]
        if url is None:
            return None
        if os.getcwd() not in sys.path:
            # As `python -m` does, so that python:module:function finds the user's module.
            sys.path.insert(0, os.getcwd())
        try:
            return open_backend(url, allow_python=True)
        except SystemExit as end:
            raise ConfigError(
                f"{url!r} ends the program when it is imported ({end}): name a module, not a script"
            ) from end
    if memory is None or memory.url is None or memory.url.startswith("python:"):
        return None
    return open_backend(memory.url, allow_python=False)
