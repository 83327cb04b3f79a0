"""The table, for people and as Markdown, and the picture."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench.tiny import made
from tools.bench.report import fill
from walbatch.bench.picture import draw
from walbatch.bench.table import markdown, number, text

RATES = {
    "w3": {"walbatch": [80.0, 90.0, 100.0], "raw": [100.0] * 3, "sqlite": [40.0] * 3, "nats": [200.0] * 3}
}


def test_rows_stand_fastest_first_with_their_ratios() -> None:
    lines = list(text(made(RATES)))
    rows = [line.split("  ") for line in lines[2:6]]
    assert [[cell.strip() for cell in row if cell.strip()] for row in rows] == [
        ["NATS JetStream (file) *", "200 [200, 200]", "5,000", "0.45 [0.4, 0.5]"],
        ["raw pwrite + fdatasync", "100 [100, 100]", "10,000", "0.9 [0.8, 1]"],
        ["walbatch", "90 [80, 100]", "11,111"],
        ["SQLite (WAL, synchronous=FULL)", "40 [40, 40]", "25,000", "2.25 [2, 2.5]"],
    ] or [row[0] for row in rows]


def test_a_target_is_told_as_met_or_missed() -> None:
    shown = "\n".join(text(made(RATES)))
    assert "2 met, 0 missed, 0 not measured" in shown
    slow = {"w3": {**RATES["w3"], "walbatch": [10.0] * 3}}
    assert "0 met, 2 missed, 0 not measured" in "\n".join(text(made(slow)))


def test_a_target_that_is_missed_by_little_shows_by_how_much() -> None:
    rates = {"w1": {"walbatch": [99.6], "raw": [100.0], "sqlite": [50.0]}}
    (line,) = (line for line in text(made(rates)) if "p50 latency" in line)
    assert line.split()[-2:] == ["1.004", "MISSED"]


def test_what_is_not_installed_is_named_with_what_to_install() -> None:
    results = made(RATES)
    results.subjects = [
        replace(note, missing="pip install plyvel") if note.name == "leveldb" else note
        for note in results.subjects
    ]
    assert "not installed: LevelDB (plyvel, sync): pip install plyvel" in list(text(results))


def test_problems_are_told() -> None:
    results = made(RATES)
    results.problems.append("w1: redis failed: it was the port")
    assert "! w1: redis failed: it was the port" in list(text(results))


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1234567.8, "1,234,568"), (100.4, "100"), (99.94, "99.9"), (0.5, "0.5"), (0.0123, "0.012"), (0.0, "0")],
)
def test_a_number_has_about_three_digits(value: float, shown: str) -> None:
    assert number(value) == shown


def test_markdown_has_a_table_for_each_workload_and_the_targets() -> None:
    lines = list(markdown(made(RATES)))
    assert lines[0] == "### w3: the title of w3"
    assert lines[2].startswith("| subject | op/s |")
    assert set(lines[3]) <= set("|-:")
    assert "### Targets" in lines
    widths = {line.count("|") for line in lines[2:8]}
    assert len(widths) == 1


def test_a_document_is_filled_between_its_marks_only() -> None:
    page = (
        "before\n<!-- bench: w3 -->\n(figures follow)\n<!-- end of bench -->\nbetween\n"
        "<!-- bench: w4 -->\n(figures follow)\n<!-- end of bench -->\nafter\n"
    )
    filled, names = fill(page, made(RATES))
    assert names == ["w3"]
    assert filled.startswith("before\n<!-- bench: w3 -->\n\n| subject |")
    assert filled.endswith(
        "|\n\n<!-- end of bench -->\nbetween\n<!-- bench: w4 -->\n(figures follow)\n<!-- end of bench -->\nafter\n"
    )
    assert fill(filled, made(RATES))[0] == filled


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_picture_is_drawn_twice_and_shows_no_peer_as_walbatch(tmp_path: Path) -> None:
    png, svg = draw(made({**RATES, "w7": {"walbatch": [5.0], "lmdb": [10.0]}}), tmp_path)
    assert png.read_bytes().startswith(b"\x89PNG")
    shown = svg.read_text()
    for words in ("the title of w3", "the title of w7", "2.25x sqlite", "0.5x lmdb", "90 op/s"):
        assert words in shown


def test_no_picture_is_drawn_of_nothing(tmp_path: Path) -> None:
    assert draw(made({}), tmp_path) == []
