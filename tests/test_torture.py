"""The torture command: its parts run in processes, its figures add up, and what breaks is told."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tools.modes import corpus, report, seeded
from tools.modes.profiles import PROFILES, Profile, Share
from tools.modes.runner import Run
from tools.modes.tally import FAILURES_MAX, Failure, Job, Tally
from walbatch.core.mark import decode_mark

ROOT = Path(__file__).resolve().parent.parent


def run_of(**shares: Share) -> Run:
    said: list[str] = []
    return Run(Profile(minutes=0, shares=shares), 1, list(shares), show=said.append)


def test_a_tally_survives_its_journey() -> None:
    tally = Tally(
        mode="images", figures=Counter(states=3), cells=Counter({"a|EIO": 2}), skipped="no root", seconds=1.5
    )
    tally.fail("lost", "images seed=1")
    assert Tally.from_json(tally.to_json()) == tally


def test_tallies_add_up_and_keep_each_failure_once() -> None:
    one, other = Tally(mode="x", figures=Counter(n=1)), Tally(mode="x", figures=Counter(n=2), complete=False)
    one.fail("lost", "x 1")
    other.fail("lost", "x 1")
    one.add(other)
    assert (one.figures["n"], one.figures["failures"], one.complete) == (3, 2, False)
    assert one.failures == [Failure(problem="lost", replay="x 1")]


def test_a_tally_is_full_before_it_is_endless() -> None:
    tally = Tally(mode="x")
    for number in range(2 * FAILURES_MAX):
        tally.fail(f"problem {number}", "x")
    assert tally.is_full
    assert len(tally.failures) == FAILURES_MAX
    assert tally.figures["failures"] == 2 * FAILURES_MAX


def test_parts_share_the_work_and_the_figures_add_up() -> None:
    run = run_of(images=Share(count=600, parts=2), schedules=Share(count=30))
    run.run()
    assert not any(tally.failures for tally in run.tallies.values())
    assert run.tallies["images"].figures["crash states"] >= 600
    assert run.tallies["schedules"].figures["schedules"] >= 30
    assert "0 failures" in report.text(run.tallies, run.seconds)


def test_a_scale_does_a_part_of_each_count() -> None:
    run = run_of(schedules=Share(count=200))
    run.scale = 0.1
    run.run()
    assert 0 < run.tallies["schedules"].figures["schedules"] <= 20


def test_a_mode_that_does_not_exist_is_a_failure_and_no_silence() -> None:
    run = run_of(nonsense=Share())
    run.run()
    (failure,) = run.tallies["nonsense"].failures
    assert "No module named" in failure.problem


def test_a_part_that_cannot_be_run_is_a_failure_and_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(28, "no room for a folder")

    monkeypatch.setattr("tools.modes.runner.tempfile.mkdtemp", refuse)
    run = run_of(images=Share(count=10))
    run.run()
    (failure,) = run.tallies["images"].failures
    assert "no room" in failure.problem
    assert not run.tallies["images"].complete


def test_the_same_job_does_the_same(tmp_path: Path) -> None:
    from tools.modes import images  # noqa: PLC0415 - here, so that a broken mode fails its own tests only

    def figures() -> Counter[str]:
        return images.run(
            Job(seed=5, part=1, parts=7, count=300, scratch=tmp_path), lambda tally: None
        ).figures

    assert figures() == figures()


def test_every_line_of_the_corpus_is_right_by_now(tmp_path: Path) -> None:
    for number, line in enumerate(corpus.lines()):
        assert corpus.replay(line, tmp_path / str(number)) == [], line


def test_new_failures_enter_the_corpus_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "CORPUS", tmp_path / "failures.txt")
    failure = Failure(problem="lost\na line", replay="images seed=1")
    assert corpus.keep([failure]) == 1
    assert corpus.keep([failure]) == 0
    assert corpus.lines() == ["images seed=1"]
    assert (tmp_path / "failures.txt").read_text() == "images seed=1  # lost a line\n"


def test_the_corpus_explains_itself() -> None:
    head = corpus.CORPUS.read_text(encoding="utf-8").splitlines()[0]
    assert head.startswith("# ")
    assert corpus.lines() == [line for line in corpus.lines() if not line.startswith("#")]


@pytest.mark.parametrize(
    "line",
    [
        "", "x", "judge seed=1", "corpus seed=1", "images", "images seed=1", "images workload=nothing seed=1", "seeded seed=one",
        "faults scenario=one call=write number=1 errno=NOTHING forever=1", "syscalls begin=open kind=nothing",
    ],
)  # fmt: skip
def test_what_is_no_replay_line_is_told_so(tmp_path: Path, line: str) -> None:
    with pytest.raises(corpus.NoReplayLineError, match=r"not a replay line: .*; copy one from a failure"):
        corpus.replay(line, tmp_path)


def test_a_mistake_below_a_replay_is_not_taken_for_a_wrong_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seeded, "tell", lambda seed: decode_mark(b"damaged"))
    with pytest.raises(ValueError, match="a mark has"):
        corpus.replay("seeded seed=1", tmp_path)


def test_the_help_of_the_command_names_its_modes_and_exit_codes() -> None:
    done = subprocess.run(
        [sys.executable, "tools/torture.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for mode in report.TITLES:
        assert re.search(rf"^  {mode} +\S", done.stdout, re.MULTILINE), mode
    for words in ("quick ", "full ", "soak ", "docs/testing.md", "Exit codes: 0"):
        assert words in done.stdout


@pytest.mark.parametrize("line", ["x", "images seed=1"])
def test_the_command_says_in_one_line_what_is_no_replay_line(line: str) -> None:
    done = subprocess.run(
        [sys.executable, "tools/torture.py", "--replay", line],
        cwd=ROOT, env=os.environ | {"WALBATCH_TORTURE": "inside"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("not a replay line: ")


def test_the_figures_replace_those_before_them(tmp_path: Path) -> None:
    document = tmp_path / "testing.md"
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    tally = Tally(mode="kill", figures=Counter(cycles=20_000))
    section = report.markdown({"kill": tally}, command="torture", seconds=3600, where="here")
    report.write(document, section)
    text = document.read_text()
    assert "| kill -9 | cycles | 20,000 |" in text
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")


def test_a_document_without_a_place_for_figures_is_left_alone(tmp_path: Path) -> None:
    document = tmp_path / "testing.md"
    document.write_text("nothing\n")
    with pytest.raises(SystemExit, match="no place"):
        report.write(document, "section")
    assert document.read_text() == "nothing\n"


def test_every_profile_runs_every_mode() -> None:
    assert {frozenset(profile.shares) for profile in PROFILES.values()} == {frozenset(report.TITLES)}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_nothing_is_left_running() -> None:
    run = run_of(images=Share(count=100))
    run.run()
    children = Path(f"/proc/self/task/{__import__('os').getpid()}/children").read_text()
    assert children.strip() == ""
