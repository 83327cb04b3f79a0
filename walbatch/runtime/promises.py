"""Who waits for which operation: the fates that somebody still keeps a ticket of.

The idea needed to read it: fates are held weakly, one for each commit group. A ticket that nobody keeps costs nothing, and its
operation goes on.
"""

from __future__ import annotations

import threading
import weakref
from bisect import bisect_right, insort
from collections.abc import Sequence
from typing import Any, Final

from walbatch.errors import WalbatchError
from walbatch.runtime.ticket import APPLIED, Fate

LOGGED: Final = -1
"""The scope of every operation with an LSN; those without have their lane's."""

STALE_MAX: Final = 64
"""Fates whose place is kept although nobody keeps them any more, beside as many as are kept: so forgetting one is cheap."""


_forgetting = threading.RLock()
"""Guards who stands under a number, for a look and an assignment. Re-entrant, because a fate may be forgotten at any step of
a thread that holds it."""


class _Reference(weakref.ref[Fate]):
    """A fate that is taken out of its scope when nobody keeps it."""

    __slots__ = ("first", "scope")
    first: int
    scope: _Scope


def _forget(reference: weakref.ref[Fate]) -> None:
    assert isinstance(reference, _Reference)
    with _forgetting:
        fates = reference.scope.fates
        if fates.get(reference.first) is reference:  # and not a later one of the same number
            fates.pop(reference.first, None)


class _Scope:
    """The fates of one scope, by the number of their first operation, and those numbers in order. Some of these are stale."""

    __slots__ = ("fates", "firsts")

    def __init__(self) -> None:
        self.fates: dict[int, _Reference] = {}
        self.firsts: list[int] = []

    def find(self, number: int) -> Fate | None:
        """The fate of an operation, if somebody keeps it."""
        firsts = self.firsts
        at = bisect_right(firsts, number)
        reference = self.fates.get(firsts[at - 1]) if at else None
        fate = None if reference is None else reference()
        return fate if fate is not None and number <= fate.last else None

    def drop(self, fate: Fate) -> None:
        """All of a fate is settled."""
        with _forgetting:
            reference = self.fates.get(fate.first)
            if reference is not None and reference() is fate:  # and not a later one of the same number
                self.fates.pop(fate.first, None)

    def add(self, fate: Fate) -> None:
        """Called by one thread at a time."""
        reference = _Reference(fate, _forget)
        reference.first = first = fate.first
        reference.scope = self
        with _forgetting:
            self.fates[first] = reference
        if not self.firsts or first > self.firsts[-1]:
            self.firsts.append(first)
        else:
            firsts = self.firsts.copy()  # whoever searches at the same time goes on in the old one
            insort(firsts, first)
            self.firsts = firsts
        if len(self.firsts) > 2 * len(self.fates) + STALE_MAX:
            for left in list(self.fates.values()):  # a list made in one step: others may go meanwhile
                if left() is None:  # a signal handler's exception has cut off who forgot it
                    _forget(left)
            self.firsts = sorted(list(self.fates))  # noqa: C414 - as above


class Promises:
    """Fates by scope and number. Safe from any thread."""

    def __init__(self) -> None:
        # Held while a fate is added. All else is one step of a dictionary or a list.
        self._guard = threading.RLock()
        self._scopes: dict[int, _Scope] = {LOGGED: _Scope()}

    def __repr__(self) -> str:
        return f"<Promises of {sum(len(scope.fates) for scope in list(self._scopes.values()))} fates>"

    def add(self, scope: int, fate: Fate) -> None:
        """Whoever settles an operation of it tells `fate`, as long as somebody keeps it. Its operations are new."""
        with self._guard:
            place = self._scopes.get(scope)
            if place is None:
                place = self._scopes[scope] = _Scope()
            place.add(fate)

    def find_or_add(self, scope: int, fate: Fate) -> Fate:
        """As `add` for the fate of one earlier operation, unless somebody keeps one of it: then that is returned."""
        with self._guard:
            first = self._scopes[scope].find(fate.first)
            if first is None:
                self.add(scope, fate)
            return first or fate

    def resolve(self, scope: int, number: int, value: Any = None, error: WalbatchError | None = None) -> None:
        """The operation is settled."""
        place = self._scopes.get(scope)
        if place is None or not place.fates:
            return
        fate = place.find(number)
        if fate is not None:
            fate.settle(number, (value, error))
            if fate.is_whole:
                place.drop(fate)

    def resolve_applied(self, scope: int, numbers: Sequence[int], results: Sequence[object] | None) -> None:
        """Many operations were applied, with these results; None: all of them with None. Free where nobody keeps a ticket."""
        place = self._scopes.get(scope)
        if place is None or not place.fates:
            return
        fate: Fate | None = None
        for index, number in enumerate(numbers):
            if fate is None or not fate.first <= number <= fate.last:
                fate = place.find(number)
                if fate is None:
                    continue
            fate.settle(number, APPLIED if results is None else (results[index], None))
            if fate.is_whole:
                place.drop(fate)

    def resolve_all(self, error: WalbatchError) -> None:
        """Nobody will settle anything any more."""
        for place in list(self._scopes.values()):
            for reference in list(place.fates.values()):  # a list made in one step: other threads may add
                fate = reference()
                if fate is not None:
                    fate.end(error)
