"""A few kills of `tools/copy_kills.py` each way, and the mistake that it must find."""

from pathlib import Path

import pytest

pytest.importorskip("psycopg", reason="copying from and to PostgreSQL needs psycopg")

from tests.backends.servers import needed
from tools.copy_kills import attack


@pytest.mark.parametrize("direction", ["sqlite-postgres", "postgres-sqlite"])
def test_a_copy_that_is_killed_goes_on_until_both_tables_are_equal_and_writes_each_row_once(
    direction: str, tmp_path: Path
) -> None:
    needed()
    run = attack(direction, 4, 5, tmp_path, row_count=12_000)
    assert run.problems == []
    assert run.figures["kills"] == 4
    assert run.figures["rows"] == 12_000 * run.figures["copies"]


def test_a_target_without_marks_is_found_out(tmp_path: Path) -> None:
    for seed in range(5):
        folder = tmp_path / str(seed)
        folder.mkdir()
        run = attack("careless", 6, seed, folder, row_count=12_000)
        if run.problems:
            assert "written more than once" in run.problems[0]
            return
    raise AssertionError("no row was written twice, although nothing prevented it")
