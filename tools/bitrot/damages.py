"""Every damage that is done to the stores, numbered; each has a line that names it.

What is not here: recovery from it (`verdict`).

The idea needed to read it: a damage is a value (which store, what kind, where), and what it changes follows from it. Kinds with
few members come first, then bits, cut ends and spliced frames in a scattered order: however early a run ends, it has done
some of everything.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Final

from tools.bitrot.store import SECTOR, Store, Stores
from tools.bitrot.verdict import Changes

FAR_SWAPS: Final = 500
"""Pairs of sectors that are no neighbours, swapped in each store."""
STATELESS_STEP: Final = 61
"""Of the bits, every one that is flipped once more with state/ lost. A prime, so that all bits of a byte have their turn."""
ENDINGS: Final = ("closed", "killed", "stamped")


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One damage to the store `store`. What `file`, `at`, `other`, `to` and `source` mean depends on `kind`."""

    store: str
    kind: str
    file: str = ""
    at: int = 0
    other: str = ""
    to: int = 0
    source: str = ""
    stateless: int = 0
    """1: state/ is lost as well."""

    def __str__(self) -> str:
        values = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return " ".join(f"{name}={value}" for name, value in values if value not in {"", 0} or name == "at")

    @classmethod
    def parse(cls, words: dict[str, str]) -> Damage:
        """What `str` wrote."""
        known = {field.name: field.type for field in fields(cls)}
        return cls(**{
            name: int(value) if known[name] == "int" else value for name, value in words.items() if name in known
        })  # type: ignore[arg-type]  # fmt: skip

    def changes(self, stores: Stores) -> Changes:
        """What is different after it."""
        return _CHANGES[self.kind](self, stores.get(self.store), stores)


def _over(store: Store, name: str, at: int, piece: bytes) -> bytes:
    data = store.files[name]
    return data[:at] + piece + data[at + len(piece) :]


def _bit(damage: Damage, store: Store, _stores: Stores) -> Changes:
    byte, bit = divmod(damage.at, 8)
    flipped = store.files[damage.file][byte] ^ 1 << bit
    return {damage.file: _over(store, damage.file, byte, bytes((flipped,)))}


def _fill(damage: Damage, store: Store, _stores: Stores) -> Changes:
    unit = {"zero": b"\0", "ones": b"\xff", "magic": b"\x8eWBF"}[damage.kind]
    size = min(SECTOR, len(store.files[damage.file]) - damage.at)
    return {damage.file: _over(store, damage.file, damage.at, (unit * SECTOR)[:size])}


def _swap(damage: Damage, store: Store, _stores: Stores) -> Changes:
    one = store.files[damage.file][damage.at : damage.at + SECTOR]
    two = store.files[damage.other][damage.to : damage.to + SECTOR]
    first = _over(store, damage.file, damage.at, two)
    if damage.file != damage.other:
        return {damage.file: first, damage.other: _over(store, damage.other, damage.to, one)}
    return {damage.file: first[: damage.to] + one + first[damage.to + SECTOR :]}


def _cut(damage: Damage, store: Store, _stores: Stores) -> Changes:
    return {damage.file: store.files[damage.file][: damage.at]}


def _splice(damage: Damage, store: Store, stores: Stores) -> Changes:
    """The frame that stands at `to` in `other` of the store `source`, over what stands at `at`."""
    source = stores.get(damage.source)
    (frame,) = [frame for frame in source.frames if (frame.name, frame.offset) == (damage.other, damage.to)]
    piece = source.files[frame.name][frame.offset : frame.end]
    return {damage.file: _over(store, damage.file, damage.at, piece)}


def _exchange(damage: Damage, store: Store, _stores: Stores) -> Changes:
    return {damage.file: store.files[damage.other], damage.other: store.files[damage.file]}


def _older(damage: Damage, store: Store, _stores: Stores) -> Changes:
    return {damage.file: store.older[damage.file][damage.at]}


def _foreign(damage: Damage, _store: Store, stores: Stores) -> Changes:
    return {damage.file: stores.get(damage.source).files[damage.other]}


def _lost(damage: Damage, store: Store, _stores: Stores) -> Changes:
    return {name: None for name in store.files if damage.file <= name <= damage.other}


_CHANGES: Final[dict[str, Callable[[Damage, Store, Stores], Changes]]] = {
    "bit": _bit, "zero": _fill, "ones": _fill, "magic": _fill, "swap": _swap, "cut": _cut, "splice": _splice,
    "exchange": _exchange, "older": _older, "foreign": _foreign, "lost": _lost, "state": lambda _damage, _store, _stores: {},
}  # fmt: skip


# --- the catalogue ---


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All damages to the stores, in the order in which they are done."""

    stores: Stores
    few: tuple[Damage, ...]
    many: tuple[tuple[int, Callable[[int], Damage]], ...]
    """Kinds with many members: how many, and the n-th of them."""

    @classmethod
    def of(cls, stores: Stores, seed: int) -> Catalogue:
        """The catalogue of these stores."""
        few: list[Damage] = []
        many: list[tuple[int, Callable[[int], Damage]]] = []
        for ending in ENDINGS:
            store = stores.get(ending)
            few += _sectors(store, random.Random(f"damages {seed} {ending}"))
            few += _files(store, stores)
            # What does not differ from the closed store is damaged there; the rest of these is recovered as often as it counts.
            names = [
                name
                for name in store.files
                if ending == "closed" or store.files[name] != stores.closed.files.get(name)
            ]
            for name in names:
                many += _many(store, name)
            many.append(_splices(store, names, stores))
        return cls(stores, tuple(few), tuple(many))

    def __len__(self) -> int:
        return len(self.few) + sum(count for count, _ in self.many)

    def part(self, part: int, parts: int) -> Iterator[Damage]:
        """Every `parts`-th damage, from the `part`-th on."""
        scattered = len(self) - len(self.few)
        ends = list(itertools.accumulate(count for count, _ in self.many))
        stride = next(
            step for step in itertools.count(int(scattered * 0.618)) if math.gcd(step, scattered) == 1
        )
        for number in range(part, len(self), parts):
            if number < len(self.few):
                yield self.few[number]
                continue
            place = (number - len(self.few)) * stride % scattered
            kind = next(index for index, end in enumerate(ends) if place < end)
            count, nth = self.many[kind]
            yield nth(place - ends[kind] + count)


def _sectors(store: Store, chance: random.Random) -> Iterator[Damage]:
    """Sectors overwritten and swapped."""
    names = store.segments
    sectors = [(name, at) for name in names for at in range(0, len(store.files[name]), SECTOR)]
    for name, at in sectors:
        for kind in ("zero", "ones", "magic"):
            yield Damage(store=store.name, kind=kind, file=name, at=at)
    pairs = [*itertools.pairwise(sectors), *(chance.sample(sectors, 2) for _ in range(FAR_SWAPS))]
    for (name, at), (other, to) in pairs:
        yield Damage(store=store.name, kind="swap", file=name, at=at, other=other, to=to)


def _files(store: Store, stores: Stores) -> Iterator[Damage]:
    """Whole files lost, exchanged, and replaced."""
    names = store.segments
    for first, last in itertools.combinations_with_replacement(names, 2):
        for stateless in (0, 1):
            yield Damage(store=store.name, kind="lost", file=first, other=last, stateless=stateless)
    yield Damage(store=store.name, kind="lost", file="identity", other="identity")
    yield Damage(store=store.name, kind="state", stateless=1)
    for name, other in itertools.combinations(names, 2):
        yield Damage(store=store.name, kind="exchange", file=name, other=other)
    for name, other in itertools.permutations(names, 2):
        yield Damage(store=store.name, kind="foreign", file=name, other=other, source=store.name)
    for source in ("fork", "other"):
        for other in stores.get(source).files:
            yield Damage(store=store.name, kind="foreign", file=other, other=other, source=source)
    for name in names:
        for at in range(len(store.older[name])):
            for stateless in (0, 1):
                yield Damage(store=store.name, kind="older", file=name, at=at, stateless=stateless)


def _many(store: Store, name: str) -> Iterator[tuple[int, Callable[[int], Damage]]]:
    """Every bit of a file, and every end at which it can be cut."""
    size = len(store.files[name])
    yield size * 8, lambda at: Damage(store=store.name, kind="bit", file=name, at=at)
    yield size, lambda at: Damage(store=store.name, kind="cut", file=name, at=at)
    yield (
        size * 8 // STATELESS_STEP,
        lambda n: Damage(store=store.name, kind="bit", file=name, at=n * STATELESS_STEP, stateless=1),
    )


def _splices(store: Store, names: list[str], stores: Stores) -> tuple[int, Callable[[int], Damage]]:
    """Every frame of the store, of its fork and of another store, over every sector of these segments behind the first."""
    places = [
        (name, at)
        for name in names
        if name != "identity"
        for at in range(SECTOR, len(store.files[name]), SECTOR)
    ]
    frames = [
        (source, frame.name, frame.offset)
        for source in (store.name, "fork", "other")
        for frame in stores.get(source).frames
    ]

    def nth(number: int) -> Damage:
        (file, at), (source, other, to) = places[number // len(frames)], frames[number % len(frames)]
        return Damage(store=store.name, kind="splice", file=file, at=at, other=other, to=to, source=source)

    return len(places) * len(frames), nth
