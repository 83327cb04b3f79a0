"""The golden values of state/ that version 1 has got later: whatever the code becomes, it reads and writes the same bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

import lmdb
import pytest

from tools import make_golden_state
from tools.make_golden import STORE
from tools.make_golden_state import plain
from walbatch.storage.checkpoint import LmdbState

GOLDEN: Final = Path(__file__).resolve().parents[2] / "fixtures" / "golden" / "v1-state"
EXPECTED: Final[dict[str, Any]] = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
TABLES: Final = {
    "letter": "letters", "plain-letter": "letters", "given-up": "given_up", "keys": "keys", "keys-position": "keys",
    "controller": "controllers",
}  # fmt: skip


def test_no_golden_file_has_changed() -> None:
    files = {path.name: path for path in GOLDEN.iterdir() if path.name != "expected.json"}
    sums = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    assert sums == {name: digest for name, (_, digest) in EXPECTED["files"].items()}


def test_the_same_bytes_are_written_today() -> None:
    assert make_golden_state.expected() == EXPECTED
    for name, (_, value) in make_golden_state.values().items():
        assert value == (GOLDEN / name).read_bytes(), name


def test_a_state_of_these_values_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.mkdir()
    with lmdb.open(str(path), max_dbs=8) as env:
        for name, table in TABLES.items():
            key, _ = EXPECTED["files"][name]
            with env.begin(db=env.open_db(table.encode()), write=True) as txn:
                txn.put(bytes.fromhex(key), (GOLDEN / name).read_bytes())
    state = LmdbState.open(str(path), STORE)
    letters, letter_findings = state.load_letters()
    given_up, given_up_findings = state.load_given_up()
    uses, up_to_lsn, key_findings = state.load_keys()
    snapshots, controller_findings = state.load_controllers()
    state.close()
    assert [*letter_findings, *given_up_findings, *key_findings, *controller_findings] == []
    assert [plain(letter) for letter in letters] == [EXPECTED["plain-letter"], EXPECTED["letter"]]
    assert sorted(given_up) == sorted([*EXPECTED["given-up"], *(letter.lsn for letter in letters)])
    assert [plain(use) for use in uses] == EXPECTED["keys"]
    assert up_to_lsn == EXPECTED["keys-position"]
    lane, shard, snapshot = EXPECTED["controller"]
    assert snapshots == {(lane, shard): bytes.fromhex(snapshot)}


def test_golden_files_are_never_written_again(tmp_path: Path) -> None:
    folder = tmp_path / "v1-state"
    make_golden_state.main([str(folder)])
    assert {path.name for path in folder.iterdir()} == {path.name for path in GOLDEN.iterdir()}
    with pytest.raises(SystemExit, match="never written again"):
        make_golden_state.main([str(folder)])
