"""The judge of real crashes: what was acknowledged and applied over all lives of one store, and what that forbids.

What is not here: the crashes. It hears what workers said (`worker`) and is told how each of them ended; at a full check
the store has been drained, so everything that was acknowledged must have taken effect.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from tools.modes.worker import COUNT_PREFIX, INTERVAL_MS, WRONG_KEY, key_at, name_at

SHOWN: Final = 3

EXCUSED_S: Final = 1.0 + INTERVAL_MS / 1000
"""How old an acknowledgement that is synced later may be for a power cut to take it: the lane's interval, and a second more,
a hundred intervals, which is what a loaded machine may need to wake a thread and to sync on a disk in a file."""


@dataclass(slots=True, kw_only=True)
class Judge:
    """The history of one store. `durability` of each lane decides what a power cut may take."""

    durability: Mapping[str, str]
    problems: list[str] = field(default_factory=list)
    figures: Counter[str] = field(default_factory=Counter)
    ready: bool = False
    """Whether the present life has recovered."""
    _submitted: Counter[tuple[int, int]] = field(default_factory=Counter)
    """How many operations each thread of each cycle has begun to submit."""
    _acknowledged: dict[str, dict[str, int]] = field(default_factory=lambda: {"once": {}, "least": {}})
    """LSNs by name."""
    _refused: set[str] = field(default_factory=set)
    _fragile: dict[str, dict[str, float]] = field(default_factory=lambda: {"once": {}, "least": {}})
    """Acknowledged by a lane that syncs later, and when: a power cut may take them for a while."""
    _excused: set[str] = field(default_factory=set)
    _applied: dict[str, int] = field(default_factory=dict)
    """LSNs of what the lane `least` applied, by name."""
    _newest: dict[str, int] = field(default_factory=dict)
    """LSN of the last first application of each key of the lane `least`."""
    _names: dict[int, str] = field(default_factory=dict)
    """What each LSN names, as far as it is known."""

    # --- lives ---

    def begin(self) -> None:
        """A process was started."""
        self.ready = False

    def end(self, *, power: bool, at: float) -> None:
        """It is dead since `at` (monotonic). With `power`, so is everything that was not synced.

        What was acknowledged more than `EXCUSED_S` before must have been synced. After a mere kill what was fragile still is,
        and grows no older: it stands in the page cache, and nobody syncs it until an engine has recovered it.
        """
        for lane, names in self._fragile.items():
            young = [name for name, when in names.items() if when >= at - EXCUSED_S]
            if power:
                self.figures["acknowledged within their interval, lost or not"] += len(young)
                self.figures["acknowledged longer ago than their interval at a cut"] += len(names) - len(
                    young
                )
                self._excused.update(young)
                young = []
            self._fragile[lane] = dict.fromkeys(young, math.inf)

    def hear(self, cycle: int, fields: list[Any]) -> None:
        """Take in a message of a worker."""
        match fields:
            case ["ready", *_]:
                self.ready = True
                # What was recovered is exposed: from here on it must stay.
                for names in self._fragile.values():
                    names.clear()
            case ["submit", _, thread, first, many]:
                self._submitted[cycle, thread] = first + many
            case ["ack", lane, thread, first, many, lsn, when]:
                self._acknowledge(lane, [name_at(cycle, thread, first + n) for n in range(many)], lsn, when)
            case ["refused", _, thread, first, many, _]:
                self.figures["refused operations"] += many
                self._refused |= {name_at(cycle, thread, first + n) for n in range(many)}
            case ["unknown", _, _, _, many, *_]:
                self.figures["operations of unknown fate"] += many
            case ["applied", applied]:
                for lsn, key, name in applied:
                    self._apply(lsn, key, name)
            case ["crash", what]:
                self.problems.append(f"a worker broke: {what}")
            case _:
                pass

    def _acknowledge(self, lane: str, names: list[str], lsn: int, when: float) -> None:
        self.figures["acknowledged operations"] += len(names)
        acknowledged = self._acknowledged[lane]
        for offset, name in enumerate(names):
            acknowledged[name] = lsn + offset
            self._name(lsn + offset, name)
        if self.durability[lane] != "sync":
            self._fragile[lane].update(dict.fromkeys(names, when))

    def _name(self, lsn: int, name: str) -> None:
        other = self._names.setdefault(lsn, name)
        if other != name:
            self.problems.append(f"lsn {lsn} names two operations: {other} and {name}")

    def _apply(self, lsn: int, key: str, name: str) -> None:
        if not self._was_submitted(name) or key_at(name).decode() != key:
            self.problems.append(f"invented: lsn {lsn}, key {key}, {name or 'bytes'} that nobody submitted")
            return
        if name in self._applied:
            if self._applied[name] != lsn:
                self.problems.append(f"{name} has two LSNs: {self._applied[name]} and {lsn}")
            self.figures["applied again (function)"] += 1
            return
        self._applied[name] = lsn
        self._name(lsn, name)
        newest = self._newest.get(key, 0)
        if newest > lsn:
            self.problems.append(f"key {key}: lsn {lsn} was first applied after lsn {newest}")
        self._newest[key] = max(newest, lsn)

    def _was_submitted(self, name: str) -> bool:
        parts = name.split(".")
        return len(parts) == 3 and int(parts[2]) < self._submitted[int(parts[0]), int(parts[1])]

    # --- the full check ---

    def check(self, found: list[tuple[str, str]]) -> list[str]:
        """Everything that is wrong with the drained store. `found`: what stands in LMDB."""
        self.figures["full checks"] += 1
        problems, self.problems = self.problems, []
        once: dict[str, int] = {}
        for key, value in found:
            if key == WRONG_KEY.decode():
                problems.append(f"wrong in LMDB: {value}")
            elif key.startswith(COUNT_PREFIX.decode()):
                name = key.removeprefix(COUNT_PREFIX.decode())
                count, lsn = map(int, value.split())
                once[name] = lsn
                if not self._was_submitted(name):
                    problems.append(f"invented: {name} stands in LMDB, and nobody submitted it")
                if count != 1:
                    problems.append(f"{name} took effect {count} times on LMDB")
                if self._names.setdefault(lsn, name) != name:
                    problems.append(f"lsn {lsn} names two operations: {self._names[lsn]} and {name}")
        for lane, applied in (("once", once), ("least", self._applied)):
            wanted = self._acknowledged[lane]
            lost = [name for name in wanted if name not in applied and name not in self._excused]
            if lost:
                problems.append(f"LOST from lane {lane}: {', '.join(lost[:SHOWN])}, {len(lost)} in all")
            moved = [name for name, lsn in wanted.items() if applied.get(name, lsn) != lsn]
            if moved:
                problems.append(
                    f"lane {lane}: {', '.join(moved[:SHOWN])} applied with other LSNs than acknowledged"
                )
            refused = self._refused & applied.keys()
            if refused:
                problems.append(f"lane {lane}: refused, and applied: {', '.join(sorted(refused)[:SHOWN])}")
        both = once.keys() & self._applied.keys()
        if both:
            problems.append(f"applied by both lanes: {', '.join(sorted(both)[:SHOWN])}")
        return problems
