"""Who waits for which operation: the promises of tickets that somebody still keeps.

The idea needed to read it: promises are held weakly. A ticket that nobody keeps costs nothing, and its operation goes on.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import Any, Final

from walbatch.errors import WalbatchError
from walbatch.runtime.ticket import Promise

LOGGED: Final = -1
"""The scope of every operation with an LSN; those without have their lane's."""


class Promises:
    """Promises by (scope, LSN or sequence number). Safe from any thread."""

    def __init__(self) -> None:
        # Held while a promise is registered. All else is one step of a dictionary.
        self._guard = threading.RLock()
        self._waiting: weakref.WeakValueDictionary[tuple[int, int], Promise] = weakref.WeakValueDictionary()

    def __repr__(self) -> str:
        return f"<Promises {len(self._waiting)} waiting>"

    def register(self, scope: int, number: int, promise: Promise) -> None:
        """Whoever settles the operation resolves `promise`, as long as somebody keeps it. The operation is new."""
        first = self.register_or_get(scope, number, promise)
        assert first is promise, "two promises of one operation: one would never be resolved"

    def register_or_get(self, scope: int, number: int, promise: Promise) -> Promise:
        """As `register`, unless somebody keeps a promise of the operation already: then that one is returned."""
        with self._guard:
            first = self._waiting.get((scope, number))
            if first is None:
                self._waiting[scope, number] = first = promise
            return first

    def resolve(self, scope: int, number: int, value: Any = None, error: WalbatchError | None = None) -> None:
        """The operation is settled."""
        promise = self._waiting.pop((scope, number), None) if self._waiting else None
        if promise is not None:
            promise.resolve(value, error)

    def resolve_many(self, scope: int, results: Iterable[tuple[int, Any]]) -> None:
        """Many operations were applied, with these results."""
        if self._waiting:
            for number, result in results:
                self.resolve(scope, number, result)

    def resolve_all(self, error: WalbatchError) -> None:
        """Nobody will settle anything any more."""
        for reference in self._waiting.valuerefs():  # a list made in one step: other threads may register
            promise = reference()
            if promise is not None:
                promise.resolve(error=error)
        self._waiting.clear()
