"""docs/features.md: each feature names tests that exist, and nothing that the code tells of itself is without a line."""

from __future__ import annotations

import ast
import re
from collections import Counter
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Final

import pytest

import walbatch as wb
from tests.pages import TableRow, read, tables
from walbatch.metrics import HealthCheck

ROOT: Final = Path(__file__).resolve().parent.parent
PAGE: Final = "features.md"
ROWS: Final[list[TableRow]] = [row for rows in tables(PAGE) for row in rows]
TEST: Final = re.compile(r"`(tests/[\w/]+\.py)::([\w:]+)`")


@cache
def defined(file: str) -> frozenset[str]:
    """The tests of a module: functions, and methods as `Class::method`."""
    path = ROOT / file
    if not path.is_file():
        return frozenset()
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}::{child.name}" for child in node.body if isinstance(child, ast.FunctionDef)
            }
    return frozenset(name for name in found if name.rpartition("::")[2].startswith("test_"))


def missing(cell: str) -> list[str]:
    """What a cell names that is no test."""
    left = TEST.sub("", cell).replace(",", "").strip()
    absent = [f"{file}::{name}" for file, name in TEST.findall(cell) if name not in defined(file)]
    return [*absent, *([left] if left else [])]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["feature"][:60])
def test_a_feature_has_tests_that_exist(row: TableRow) -> None:
    assert TEST.findall(row["tests"])
    assert missing(row["tests"]) == []


def test_what_is_no_test_would_be_noticed() -> None:
    here = "tests/test_features.py"
    assert missing(f"`{here}::test_what_is_no_test_would_be_noticed`") == []
    assert missing(f"`{here}::test_of_nothing`") == [f"{here}::test_of_nothing"]
    assert missing(f"`{here}::defined`") == [f"{here}::defined"], "a function, and no test"
    assert missing("`tests/nowhere.py::test_a`, by hand") == ["tests/nowhere.py::test_a", "by hand"]


def test_each_feature_stands_there_once() -> None:
    assert len(ROWS) > 50
    assert [name for name, count in Counter(row["feature"] for row in ROWS).items() if count > 1] == []


CHOICES: Final = {
    "cut reasons": [str(reason) for reason in wb.CutReason],
    "trigger modes": [str(mode) for mode in wb.TriggerMode],
    "strategies": [str(strategy) for strategy in wb.Strategy],
    "reasons of death": [str(reason) for reason in wb.DeathReason],
    "what waits for a failed operation": [str(order) for order in wb.FailureOrder],
    "checks of health": [str(check) for check in HealthCheck],
    "statistics": [field.name for field in fields(wb.BatchStats)],
}


@pytest.mark.parametrize("choice", CHOICES)
def test_nothing_that_the_code_tells_of_itself_is_without_a_line(choice: str) -> None:
    named = {name for row in ROWS for name in re.findall(r"`([^`]+)`", row["feature"])}
    assert [name for name in CHOICES[choice] if name not in named] == []


def test_the_page_has_tables_of_features_and_nothing_else() -> None:
    assert all([*row] == ["feature", "tests"] for row in ROWS)
    assert len(re.findall(r"^## ", read(PAGE), re.MULTILINE)) == len(tables(PAGE))
