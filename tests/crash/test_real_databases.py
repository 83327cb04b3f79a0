"""Engines and servers that are killed in the middle of batches, again and again: each operation takes effect exactly once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.database_kills import attack
from tools.postgres import NoPostgresError, binaries

KILLS = 4
"""Of a test; `tools/database_kills.py` does as many as it is told."""


@pytest.mark.parametrize("kind", ["sqlite", "postgres", "lmdb"])
def test_no_kill_in_the_middle_of_batches_loses_or_repeats_an_effect(kind: str, tmp_path: Path) -> None:
    if kind == "postgres":
        pytest.importorskip("psycopg")
        try:
            binaries()
        except NoPostgresError as error:
            pytest.skip(str(error))
    run = attack(kind, 2 * KILLS if kind == "postgres" else KILLS, 7, tmp_path)
    assert run.problems == []
    assert run.figures["took effect"] >= run.figures["acknowledged"] - run.figures["dead letters"]
    assert run.figures["acknowledged"] > 50


def test_a_backend_that_stores_no_mark_is_found_out(tmp_path: Path) -> None:
    run = attack("careless", 2 * KILLS, 7, tmp_path)
    assert any("took effect more than once" in problem for problem in run.problems)
