"""How much of each mode a profile does.

The idea needed to read it: the minimums of the full profile are what docs/testing.md promises; modes without a count do all
there is. When everything is done before the profile's time is over, the open-ended modes go on with new seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One mode's work in a profile. `count` is in the mode's unit, over all parts; None: all there is."""

    count: int | None = None
    parts: int = 1
    seconds: float | None = None
    """Ceiling of real time for each part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """`minutes`: how long it goes on at least; 0 for as long as its shares take."""

    minutes: float
    shares: Mapping[str, Share]
    """In the order in which they start."""


OPEN_ENDED: Final = ("images", "seeded")
"""Modes that fill the rest of a profile's time."""

EXTRA: Final[Mapping[str, Share]] = {
    "images": Share(count=200_000, seconds=300),
    "seeded": Share(count=5_000, seconds=300),
}
"""One helping of the rest."""

QUICK: Final = Profile(
    minutes=0,
    shares={
        "corpus": Share(),
        "kill": Share(count=150, seconds=60),
        "powercut": Share(count=60, seconds=60),
        "fulldisk": Share(count=10, seconds=30),
        "syscalls": Share(seconds=60),
        "mutants": Share(parts=1, seconds=90),
        "bitrot": Share(count=20_000, seconds=60),
        "faults": Share(parts=2, seconds=45),
        "schedules": Share(count=4_000, seconds=30),
        "seeded": Share(count=3_000, seconds=40),
        "images": Share(count=60_000, parts=2, seconds=40),
    },
)

FULL: Final = Profile(
    minutes=62,
    shares={
        "corpus": Share(),
        "kill": Share(count=20_000, parts=8),
        "powercut": Share(count=2_400, parts=4),
        "fulldisk": Share(count=200, parts=2),
        "syscalls": Share(parts=2),
        "bitrot": Share(parts=8),
        "faults": Share(parts=4),
        "schedules": Share(count=60_000, parts=4),
        "seeded": Share(count=200_000, parts=20),
        "images": Share(count=10_000_000, parts=40),
        "mutants": Share(parts=2),
    },
)

SOAK: Final = Profile(minutes=8 * 60, shares=FULL.shares)

PROFILES: Final[Mapping[str, Profile]] = {"quick": QUICK, "full": FULL, "soak": SOAK}
