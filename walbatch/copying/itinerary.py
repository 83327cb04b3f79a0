"""What is checked before the first row: tables, keys, columns and names, with every problem at once.

What is not here: values, which are looked at one by one when they arrive (`values`).

The idea needed to read it: nothing is changed in the target before everything fits; then tables that are missing are made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from walbatch import limits
from walbatch.copying.databases import Database
from walbatch.copying.shapes import Dialect, Route, Shape, creation_types, in_order, problems_of, route
from walbatch.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Itinerary:
    """Which rows go where, in the order in which tables are to be copied."""

    routes: tuple[Route, ...]
    created: frozenset[str]
    """Tables of the target that were made for it."""


def make_itinerary(here: Database, there: Database, names: Mapping[str, str], *, create: bool) -> Itinerary:
    """The plan for tables of `here`, by name, with their names in `there` (empty: as usual). Makes tables that are missing.

    Raises ConfigError with every problem; nothing was made then.
    """
    targets = target_names(there, names)
    problems = [*_name_problems(here, there, targets)]
    routes: dict[str, Route] = {}
    missing: dict[str, tuple[Shape, dict[str, str]]] = {}
    for name, target in targets.items():
        source, why_not = _source(here, name)
        problems += why_not
        if source is None:
            continue
        found = there.shape(target)
        if found is not None:
            way, why_not = route(source, found)
            problems += why_not
            if way is not None:
                routes[target] = way
        elif create:
            types, why_not = creation_types(source, there.dialect)
            problems += why_not
            missing[target] = (source, types)
        else:
            problems.append(f"the target has no table {target!r}: make it, or let it be made (--create)")
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    for target, (source, types) in missing.items():
        routes[target] = _made(there, source, target, types)
    ordered = in_order({target: way.target for target, way in routes.items()})
    return Itinerary(routes=tuple(routes[target] for target in ordered), created=frozenset(missing))


def target_names(there: Database, names: Mapping[str, str]) -> dict[str, str]:
    """The names of tables, with those in the target."""
    return {name: target or _usual_name(name, there) for name, target in names.items()}


def _name_problems(here: Database, there: Database, targets: Mapping[str, str]) -> Iterable[str]:
    if not targets:
        yield f"name the tables to copy (--table NAME); the source has {_listed(here)}"
    if len(targets) > limits.KINDS_MAX:
        yield f"{len(targets)} tables are more than one copy takes ({limits.KINDS_MAX}): copy them in parts"
    for target, count in Counter(targets.values()).items():
        if count > 1:
            yield f"{count} tables would come to {target!r} of the target: give each a name of its own"
        if len(target.encode()) > limits.KIND_BYTES_MAX:
            yield f"the name {target!r} is longer than {limits.KIND_BYTES_MAX} bytes"
    for name, target in targets.items():
        if here.shown == there.shown and name == target:
            yield f"table {name!r} of the source is that of the target"


def _source(here: Database, name: str) -> tuple[Shape | None, list[str]]:
    """A table that can be read, or why it cannot."""
    shape = here.shape(name)
    if shape is None:
        return None, [f"the source has no table {name!r}; it has {_listed(here)}"]
    problems = problems_of(shape)
    if not problems and (problem := here.key_problem(shape)):
        problems.append(problem)
    return None if problems else shape, problems


def _made(there: Database, source: Shape, target: str, types: Mapping[str, str]) -> Route:
    """The route to a table that is made now. Crash story: the next call finds it, and goes on with it."""
    there.create(source, target, types)
    shape = there.shape(target)
    assert shape is not None
    way, problems = route(source, shape)
    if way is None:
        raise ConfigError(*problems)
    return way


def _listed(database: Database) -> str:
    return ", ".join(database.tables()) or "none"


def _usual_name(name: str, there: Database) -> str:
    """The name in the target where none is given: SQLite has no schemas to speak of."""
    return name.rpartition(".")[2] if there.dialect is Dialect.SQLITE else name
