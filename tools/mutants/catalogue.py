"""All mutants, in the order of the checklist of FAULTS.md."""

from __future__ import annotations

from typing import Final

from tools.mutants import (
    acknowledgement,
    checkpoint,
    compaction,
    delivery,
    fates,
    files,
    framing,
    names,
    numbers,
    process,
    recovery,
)
from tools.mutants.mutant import UNHARMED, Mutant

CHAPTERS: Final[dict[str, tuple[Mutant, ...]]] = {
    "Acknowledgement": acknowledgement.MUTANTS,
    "Names": names.MUTANTS,
    "Framing": framing.MUTANTS,
    "Recovery": recovery.MUTANTS,
    "Numbers": numbers.MUTANTS,
    "Checkpoint and LMDB": checkpoint.MUTANTS,
    "Compaction": compaction.MUTANTS,
    "Delivery": delivery.MUTANTS,
    "What is given up, and what waits": fates.MUTANTS,
    "Process": process.MUTANTS,
    "The real file system": files.MUTANTS,
}
MUTANTS: Final = tuple(mutant for mutants in CHAPTERS.values() for mutant in mutants)


def mutant_named(word: str) -> Mutant:
    """The mutant of this name, blanks as underscores; the control for UNHARMED's. Raises KeyError."""
    by_word = {mutant.word: mutant for mutant in (*MUTANTS, UNHARMED)}
    return by_word[word]
