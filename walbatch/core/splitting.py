"""The search for the operations that make a batch fail: which part to try next.

What is not here: the operations, which the queue keeps, and what else may go meanwhile.

The idea needed to read it: every part is a beginning of what is left, so that nothing overtakes an operation that is still being
looked for, and what is sound is applied on the way, once. Of a part that failed, the left half comes next; where
that passes, the culprit is in the right half, and that is split without being tried as a whole. A single
operation is always tried alone before it is blamed, so a wrong guess costs a call and nothing else.

The bound: among n operations of which k fail whatever they are in, at most k (log2(n/k) + 2) calls fail after the first:
those are the extra ones, for all others apply something. With the calls that apply there are at most k (log2(n/k) + 5) after
the first. Up to three more for each culprit is what it costs that k is not known, that parts keep the order, and that nobody is
blamed without failing alone. (Both are tested: all places of culprits among up to 12, and at random among up to 4,096.)
"""

from __future__ import annotations

from typing import Final

SHRINK: Final = 3
"""A part after a culprit is that much smaller than the one in which it was."""


class Search:
    """A search in a batch of `size` operations that failed as a whole. The owner keeps what is left of it, in order.

    After a culprit, the next part is a third of the last one that was not known to hold any, and it doubles as long as parts pass:
    with half, culprits at distances that grow once cost more than the bound. Source: D. Du, G. Xue, S. Sun, S. Cheng,
    "Modifications of Competitive Group Testing", 1994 (zig-zag).
    """

    __slots__ = ("_group", "_size", "_suspected", "_tried", "found")

    def __init__(self, size: int) -> None:
        assert size > 1, "what fails alone needs no search"
        self._size = size
        # That many from the front hold at least one culprit, as far as is known; 0: nothing is known.
        self._suspected = size
        # The last part that failed while nothing was known, and the next one of that kind.
        self._tried = size
        self._group = size
        self.found = 0

    def __repr__(self) -> str:
        return f"<Search in {self._size}, {self.found} found, one among the next {self._suspected}>"

    def part(self, left: int) -> int:
        """How many of the `left` remaining operations to try next."""
        return min(left, max(1, self._suspected // 2) if self._suspected else self._group)

    def passed(self, count: int) -> None:
        """The first `count` are answered for: applied, or failed each for a stated reason."""
        if self._suspected:
            self._suspected = max(0, self._suspected - count)
        else:
            self._group *= 2

    def failed(self, count: int) -> None:
        """The first `count`, at least two, failed together, and are still there."""
        if not self._suspected:
            self._tried = count
        self._suspected = count

    def isolated(self) -> None:
        """The first one failed alone, and is taken out."""
        if not self._suspected:
            self._tried = 1
        self._suspected = 0
        self._group = -(-self._tried // SHRINK)
        self.found += 1

    def removed(self, index: int) -> None:
        """The operation at this place of what is left was taken out for another reason."""
        if index < self._suspected:
            self._suspected -= 1
