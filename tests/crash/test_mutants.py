"""The mutants still fit the code, the harness finds cheap ones of them, and finds nothing in the code as it is."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from tools.modes import mutants
from tools.modes.tally import Job, Tally
from tools.mutants.catalogue import CHAPTERS, MUTANTS, mutant_named
from tools.mutants.mutant import ROOT, UNHARMED, Edit, Mutant

CHEAP = (
    "a_commit_group_is_acknowledged_without_any_sync",
    "the_copy_in_quarantine_is_not_synced",
    "a_segment_of_another_store_is_taken_for_this_ones",
)
MUTANTS_MIN = 60


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.word)
def test_a_mutant_fits_the_code_as_it_is_and_compiles(mutant: Mutant) -> None:
    unharmed = {file: (ROOT / file).read_text() for file in mutant.sources()}
    assert mutant.sources() != unharmed
    assert mutant.compiled()
    assert mutant.row
    assert ":" in mutant.hint


def test_each_chapter_of_the_checklist_has_mutants_and_no_two_have_one_name() -> None:
    assert len(MUTANTS) >= MUTANTS_MIN
    assert all(CHAPTERS.values())
    assert len({mutant.word for mutant in MUTANTS}) == len(MUTANTS)
    assert mutant_named(UNHARMED.word) is UNHARMED


def test_a_mutant_that_no_longer_fits_says_so() -> None:
    gone = Mutant(
        name="gone", row="none", hint="", edits=(Edit("walbatch/limits.py", "nobody ever wrote this", ""),)
    )
    with pytest.raises(ValueError, match=r"gone: walbatch/limits.py has this 0 times"):
        gone.sources()


def test_the_working_tree_is_not_touched_by_a_copy(tmp_path: Path) -> None:
    mutant = mutant_named(CHEAP[0])
    before = (ROOT / mutant.edits[0].file).read_bytes()
    mutant.copy_to(tmp_path)
    assert (ROOT / mutant.edits[0].file).read_bytes() == before
    assert (tmp_path / mutant.edits[0].file).read_text() == mutant.sources()[mutant.edits[0].file]


def test_a_process_imports_the_mutated_module_and_everything_else_as_it_is() -> None:
    program = (
        "from tools.mutants.mutant import Edit, Mutant\n"
        "edit = Edit('walbatch/limits.py', 'KIND_BYTES_MAX: Final = 64', 'KIND_BYTES_MAX: Final = 63')\n"
        "Mutant(name='short names', row='none', hint='', edits=(edit,)).install()\n"
        "from walbatch import limits\n"
        "print(limits.KIND_BYTES_MAX, limits.KINDS_MAX)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["63", "64"]


def test_a_mutant_is_not_put_into_a_process_that_has_imported_the_package() -> None:
    importlib.import_module("walbatch.limits")
    with pytest.raises(RuntimeError, match="imported already"):
        mutant_named(CHEAP[0]).install()


@pytest.mark.parametrize("word", CHEAP)
def test_the_harness_finds_a_mutant(word: str, tmp_path: Path) -> None:
    assert mutants.replay(f"mutants mutant={word}", tmp_path) == []


@pytest.mark.parametrize("word", CHEAP)
def test_what_finds_a_mutant_finds_nothing_in_the_code_as_it_is(word: str, tmp_path: Path) -> None:
    line = f"mutants mutant={UNHARMED.word} probe={mutant_named(word).hint}"
    assert mutants.replay(line, tmp_path) == []


def test_a_probe_that_does_not_find_a_mutant_lets_it_survive(tmp_path: Path) -> None:
    line = "mutants mutant=the_copy_in_quarantine_is_not_synced probe=conformance:backend"
    assert mutants.replay(line, tmp_path) == ["the mutant survives: the copy in quarantine is not synced"]


def test_a_part_counts_its_mutants_and_writes_the_kill_table(tmp_path: Path) -> None:
    seen: list[int] = []

    def progress(tally: Tally) -> None:
        seen.append(tally.figures["mutants"])

    tally = mutants.run(Job(seed=1, part=0, parts=40, count=2, scratch=tmp_path), progress)
    assert not tally.failures
    assert tally.figures["mutants"] == tally.figures["killed"] == 2
    assert not tally.complete
    assert seen[:2] == [1, 2]
    assert f"| {MUTANTS[0].name} | {MUTANTS[0].row} | images (single) |" in mutants.table(tally)
