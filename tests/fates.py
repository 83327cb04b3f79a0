"""Stores that were killed when some of their operations were dead or cancelled and no checkpoint knew of it."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import walbatch as wb
from tests.stores import TINY
from tests.support import FAST

SELDOM = replace(TINY, checkpoint_ms=3_600_000)
"""The only checkpoint is that of the opening."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fates:
    """A store that nobody has open: operations of lane put that a backend has, and of lane log, which is held."""

    path: Path
    dead: frozenset[int]
    cancelled: frozenset[int]
    pending: frozenset[int]
    """What the next opening delivers, or would with a backend: what was applied, too, since no checkpoint says so."""


def make_fates(path: Path, *, count: int = 12, dead: Collection[int] = (2, 5), cancelled: int = 3) -> Fates:
    """`count` operations of each lane, LSN by LSN; of log, the first `cancelled` are cancelled."""
    work = path.with_name(f"{path.name}.work")

    def apply(batch: wb.Batch) -> list[wb.Applied | wb.Rejected]:
        return [wb.Rejected("no") if lsn in dead else wb.Applied() for lsn in batch.lsns]

    lanes = {"put": wb.Lane(apply, shards=2, trigger=FAST), "log": wb.Lane(None, shards=2)}
    engine = wb.Engine.open(work, lanes=lanes, settings=SELDOM)
    for number in range(count):
        engine.submit("put", key=b"k%d" % number, payload=b"put-%d" % number)
    engine.flush("put", timeout=30)
    logged = [
        engine.submit("log", key=b"k%d" % number, payload=b"log-%d" % number).lsn for number in range(count)
    ]
    taken_back = {lsn for lsn in logged[:cancelled] if lsn is not None and engine.cancel(lsn)}
    shutil.copytree(work, path)
    engine.close(drain=False)
    shutil.rmtree(work)
    assert len(taken_back) == cancelled
    left = set(range(1, 2 * count + 1)) - set(dead) - taken_back
    return Fates(path=path, dead=frozenset(dead), cancelled=frozenset(taken_back), pending=frozenset(left))


def requeue_half(path: Path, lsn: int, *, work: Path) -> None:
    """Leave the store at `path` as a kill does between the two steps of requeueing a letter: it is submitted, and still there."""
    engine = wb.Engine.open(
        work, lanes={"put": wb.Lane(None, shards=2), "log": wb.Lane(None, shards=2)}, settings=SELDOM
    )
    try:
        letters = engine._letters

        def die(lsn: int) -> None:
            shutil.copytree(work, path)

        letters.remove_claimed = die  # type: ignore[method-assign]
        assert engine.requeue([lsn]) == 1
    finally:
        engine.close(drain=False)
