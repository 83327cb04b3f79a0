"""docs/configuration.md says what the code does: every field, its default, both ends of its range; and its examples run."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Final

import pytest

import walbatch as wb
from tests.pages import amount, plain, read, shown, tables
from walbatch.config import Adaptive, Aimd, Cost, Fixed, Lane, RetryPolicy, Settings, Trigger

ROOT: Final = Path(__file__).resolve().parent.parent
PAGE: Final = read("configuration.md")
COLUMNS: Final = ["unit", "default", "range", "what it does", "what grows with it"]
CLASSES: Final[dict[str, type]] = {
    kind.__name__: kind for kind in (Settings, Lane, Trigger, Fixed, Aimd, Adaptive, RetryPolicy, Cost)
}


@dataclass(frozen=True, slots=True)
class Row:
    """One setting as the page tells it."""

    owner: str
    name: str
    cells: dict[str, str]

    def __str__(self) -> str:
        return f"{self.owner}.{self.name}"

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Both ends of the range, where it has numbers."""
        found = re.fullmatch(r"([\d.,^]+(?: [KMG]iB)?) to ([\d.,^]+?(?: [KMG]iB)?)(?:, or none)?", self.range)
        return None if found is None else (amount(found[1]), amount(found[2]))

    @property
    def range(self) -> str:
        return plain(self.cells["range"])


def rows_of(owner: str) -> list[Row]:
    (found,) = [rows for rows in tables("configuration.md") if f"`{owner}`" in rows[0]]
    return [Row(owner, plain(row[f"`{owner}`"]), row) for row in found]


ROWS: Final = [row for owner in CLASSES for row in rows_of(owner)]
NUMBERS: Final = [row for row in ROWS if row.bounds is not None]


def defaults(kind: Any) -> Iterator[tuple[str, object]]:
    for field in fields(kind):
        if field.default_factory is not MISSING:
            yield field.name, field.default_factory()
        else:
            yield field.name, field.default


def out_of_range(row: Row, value: object) -> bool:
    """Whether the code says that this value of the setting is not in its range; other problems do not count."""
    try:
        CLASSES[row.owner](**{row.name: value})
    except wb.ConfigError as error:
        return any(
            re.match(rf"({row.owner}\.)?{row.name} is .* must be from ", problem)
            for problem in error.problems
        )
    return False


# --- the tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", CLASSES)
def test_every_field_is_there_with_its_default(owner: str) -> None:
    documented = {row.name: plain(row.cells["default"]) for row in rows_of(owner)}
    assert documented == {name: shown(name, value) for name, value in defaults(CLASSES[owner])}


@pytest.mark.parametrize("owner", CLASSES)
def test_every_table_has_the_same_columns_and_says_what_each_setting_does(owner: str) -> None:
    for row in rows_of(owner):
        assert [*row.cells][1:] == COLUMNS
        assert row.cells["range"]
        assert row.cells["what it does"]


@pytest.mark.parametrize("row", NUMBERS, ids=str)
def test_both_ends_of_a_range_are_allowed_and_nothing_beyond(row: Row) -> None:
    assert row.bounds is not None
    low, high = row.bounds
    (kind,) = [str(field.type) for field in fields(CLASSES[row.owner]) if field.name == row.name]
    whole = "int" in kind
    step_low, step_high = (1, 1) if whole else (max(low, 1e-3) * 1e-3, high * 1e-3)
    cast: Callable[[float], float] = int if whole else float
    assert not out_of_range(row, cast(low))
    assert not out_of_range(row, cast(high))
    assert out_of_range(row, cast(low - step_low))
    assert out_of_range(row, cast(high + step_high))


def test_every_setting_that_is_a_number_has_a_range_of_numbers() -> None:
    """So that the test above leaves none of them out."""
    with_numbers = {str(row) for row in NUMBERS}
    for owner, kind in CLASSES.items():
        for field in fields(kind):
            if re.search(r"\b(int|float)\b", str(field.type)):
                assert f"{owner}.{field.name}" in with_numbers


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_none_is_allowed_where_the_page_says_so(row: Row) -> None:
    (kind,) = [str(field.type) for field in fields(CLASSES[row.owner]) if field.name == row.name]
    said = row.range.endswith("or none")
    assert said == ("None" in kind or kind == "Any")
    if said:
        CLASSES[row.owner](**{row.name: None})


@pytest.mark.parametrize("row", [row for row in ROWS if row.range.startswith('"')], ids=str)
def test_the_choices_are_those_of_the_code(row: Row) -> None:
    with pytest.raises(wb.ConfigError) as caught:
        CLASSES[row.owner](**{row.name: "no such choice"})
    (problem,) = caught.value.problems
    assert re.findall(r'"(\w+)"', row.range) == re.findall(r"'(\w+)'", problem.partition("one of")[2])


def test_the_settings_of_vectorized_are_those_of_the_code() -> None:
    parameters = inspect.signature(wb.vectorized).parameters.values()
    expected = {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}
    rows = {row.name: plain(row.cells["default"]) for row in rows_of("vectorized")}
    assert rows == {name: shown(name, value) for name, value in expected.items()}
    for row in rows_of("vectorized"):
        if row.bounds is not None:
            low, high = map(int, row.bounds)
            for value, refused in [(low - 1, True), (low, False), (high, False), (high + 1, True)]:
                try:
                    wb.vectorized(lambda array: array, **{row.name: value})  # type: ignore[arg-type]
                except wb.ConfigError:
                    assert refused
                else:
                    assert not refused


def test_the_presets_are_those_of_the_code() -> None:
    (sentence,) = re.findall(r"`Trigger\.preset\(.*?\n\n", PAGE, re.DOTALL)
    told: dict[str, int] = {}
    for names, share in re.findall(r'((?:"\w+"(?: and )?)+) (\d+) %', sentence):
        told |= dict.fromkeys(re.findall(r'"(\w+)"', names), int(share))
    for name in re.findall(r'"(\w+)"', sentence):
        assert Trigger.preset(name, batch_max=1_000).count == max(1, told.get(name, 0) * 10)
    with pytest.raises(wb.ConfigError) as caught:
        Trigger.preset("no such kind")
    assert set(re.findall(r'"(\w+)"', sentence)) == set(
        re.findall(r"'(\w+)'", str(caught.value).partition("there are")[2])
    )


# --- the examples -------------------------------------------------------------------------------------------------

EXAMPLES: Final = dict(re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))


def test_there_are_three_configurations() -> None:
    assert [*EXAMPLES] == ["throughput.py", "latency.py", "memory.py"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_configuration_runs_as_it_stands(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(EXAMPLES[name], encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", name], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    reader = wb.LmdbBackend(str(tmp_path / "blocks"))
    try:
        assert sum(1 for _ in reader.items()) == (1 if name == "latency.py" else 1_000)
    finally:
        reader.close()
