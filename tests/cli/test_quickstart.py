"""The work folder of `tools/quickstart.py`: it deletes nothing that it has not made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.program import ROOT
from tools import quickstart
from tools.quickstart import MARKER, claim


def test_a_folder_with_files_of_the_users_is_refused_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit):
        claim(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert "--dir" in capsys.readouterr().out


def test_the_program_refuses_it_before_it_does_anything(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "identity").write_text("of another program")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "quickstart.py"), "--dir", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "is not empty" in done.stdout + done.stderr
    assert "install" not in done.stdout
    assert (tmp_path / "store" / "identity").read_text() == "of another program"


@pytest.mark.parametrize("made", [False, True], ids=["new", "empty"])
def test_a_new_or_empty_folder_is_used_and_can_be_used_again(tmp_path: Path, made: bool) -> None:
    folder = tmp_path / "a" / "b"
    if made:
        folder.mkdir(parents=True)
    work = claim(folder)
    work.mkdir()
    (work / "store").write_text("of the last run")
    (folder / "notes.txt").write_text("the user's")
    assert claim(folder) == work
    assert (folder / MARKER).exists()


def test_only_what_stands_in_its_own_part_of_the_folder_is_handed_on_to_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    def run(command: list[str], *, check: bool) -> subprocess.CompletedProcess[bytes]:
        assert not check
        started.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--dir", str(tmp_path / "w")])
    monkeypatch.setattr(quickstart, "install", lambda *, development: None)
    monkeypatch.setattr(subprocess, "run", run)
    quickstart.main()
    (command,) = started
    assert command[command.index("--dir") + 1] == str(tmp_path / "w" / "run")


def test_a_file_in_the_place_of_the_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(SystemExit):
        claim(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "text"
    assert "cannot be the work folder" in capsys.readouterr().out
