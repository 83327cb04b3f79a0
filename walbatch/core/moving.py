"""Whether a lane's backend may be another one than before, while operations of the lane are pending.

What is not here: finding out the facts, and saying what to do (`engine.moving`).

The idea needed to read it: what tells a place is what it holds, not how it is called. A database that was renamed, moved, or is
reached in another way holds the store's marks, up to what the store counts as settled; an empty one does not, nor does one that
was left for another, and what was applied elsewhere would be applied there again.

| case | the lane's backend                                                          | decision                          |
|------|-----------------------------------------------------------------------------|-----------------------------------|
| M1   | is none: the lane is held                                                   | go on; the old one is remembered  |
| M2   | was never remembered (the lane is new, or had a backend without a URL), and | go on                             |
|      | no settled operation is missing in it, or nothing of the lane is pending    |                                   |
| M3   | has the URL that is remembered                                              | go on                             |
| M4   | was code (`python:`), which has a name and no place                         | go on                             |
| M5   | is another one, and nothing of the lane is pending                          | go on                             |
| M6   | is another one, and the program says from where it moved                    | go on, and say so                 |
| M7   | holds marks of this store, and no settled operation is missing in them: the | go on, and say so                 |
|      | same data elsewhere                                                         |                                   |
| M8   | is transactional, and holds no mark of this store, or older ones            | refuse                            |
| M9   | is not transactional: it promises no more than that nothing is lost         | go on, and say so                 |
| M10  | was never remembered, and settled operations are missing in it: another     | go on, and say so                 |
|      | place, or the same where operations were given up, which is forgotten       |                                   |
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

CODE: Final = "python:"


class Move(enum.Enum):
    """What to do."""

    GO_ON = "go on"
    SAY_SO = "go on, and say so"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveFacts:
    """What is known of a lane's backend before and now. URLs have no passwords."""

    has_backend: bool
    remembered: str | None
    """The URL that the store remembers."""
    present: str | None
    """The URL now; None where the backend has none."""
    moved_from: str | None
    """What the program says was the URL before."""
    pending: int
    """Operations of the lane. More than there are is no harm: the true number is asked for where it decides."""
    is_transactional: bool
    holds_marks: bool
    """The backend holds marks of this store and lane."""
    is_behind: bool
    """The checkpoint counts operations of the lane as settled that are neither in those marks nor given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveDecision:
    """What to do, and by which row of the table."""

    case: str
    move: Move


def decide_move(facts: MoveFacts) -> MoveDecision:
    """The first row of the table that holds."""
    if not facts.has_backend:
        return MoveDecision(case="M1", move=Move.GO_ON)
    remembered = facts.remembered
    if remembered is None:
        if facts.is_behind and facts.pending:
            return MoveDecision(case="M10", move=Move.SAY_SO)
        return MoveDecision(case="M2", move=Move.GO_ON)
    if facts.present == remembered:
        return MoveDecision(case="M3", move=Move.GO_ON)
    if remembered.startswith(CODE):
        return MoveDecision(case="M4", move=Move.GO_ON)
    if not facts.pending:
        return MoveDecision(case="M5", move=Move.GO_ON)
    if facts.moved_from == remembered:
        return MoveDecision(case="M6", move=Move.SAY_SO)
    if facts.holds_marks and not facts.is_behind:
        return MoveDecision(case="M7", move=Move.SAY_SO)
    if facts.is_transactional:
        return MoveDecision(case="M8", move=Move.REFUSE)
    return MoveDecision(case="M9", move=Move.SAY_SO)
