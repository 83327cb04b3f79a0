"""Power cuts on real file systems, the controls that show that they can find something, and the check of the model."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools.modes import powercut
from tools.modes.judge import Judge
from tools.modes.modelcheck import Model
from tools.modes.tally import Job, Tally
from tools.modes.worker import Task

KINDS = tuple(powercut.KINDS)


def cut(scratch: Path, kind: str, **arguments: Any) -> Tally:
    tally = powercut.run(
        Job(seed=3, count=arguments.pop("count"), scratch=scratch), lambda _: None, kinds=[kind], **arguments
    )
    if tally.skipped:
        pytest.skip(tally.skipped)
    return tally


@pytest.mark.parametrize("kind", KINDS)
def test_no_power_cut_breaks_a_guarantee_or_leaves_what_the_model_forbids(tmp_path: Path, kind: str) -> None:
    tally = cut(tmp_path, kind, count=8)
    assert not tally.failures, tally.failures[0]
    assert tally.figures["power cuts"] == 8
    assert tally.figures["full checks"] == 1
    assert tally.figures[f"{kind}: states compared"] == 8


@pytest.mark.parametrize("kind", ["ext4", "xfs_cached"])
@pytest.mark.parametrize("skips", ["datasync", "sync_directory"])
def test_an_engine_that_leaves_out_a_sync_is_caught(tmp_path: Path, kind: str, skips: str) -> None:
    tally = cut(tmp_path, kind, count=200, skips=skips, records=False, failures_max=1)
    assert tally.failures


def test_an_engine_whose_interval_sync_is_dropped_is_caught_by_late_cuts(tmp_path: Path) -> None:
    tally = cut(
        tmp_path,
        "ext4",
        count=48,
        skips=powercut.INTERVAL_SYNC,
        records=False,
        late_share=1.0,
        failures_max=1,
    )
    assert "LOST from lane" in tally.failures[0].problem


def test_late_cuts_find_what_lanes_with_an_interval_acknowledged_before(tmp_path: Path) -> None:
    tally = cut(tmp_path, "ext4", count=6, late_share=1.0)
    assert not tally.failures, tally.failures[0]
    assert tally.figures["cuts later than every interval"] == 6


@pytest.mark.parametrize("skips", ["datasync", "sync_directory"])
def test_a_promise_that_the_disk_does_not_keep_is_called_forbidden(tmp_path: Path, skips: str) -> None:
    tally = cut(tmp_path, "ext4", count=200, skips=skips, failures_max=1)
    assert "the model forbids" in tally.failures[0].problem


# --- the check of the model, without a disk -------------------------------------------------------------------------------

Said = tuple[list[Any], bytes]


def call(number: int, *fields: object, raw: bytes = b"") -> list[Said]:
    """A call that has returned."""
    return [(["call", number, *fields], raw), (["done", number, True, 0.0], b"")]


def leave(*names: str) -> Callable[[Path], None]:
    """A disk with these files, each of 1,024 bytes of its first letter."""

    def make(place: Path) -> None:
        for name in names:
            (place / name).write_bytes(name[0].encode() * 1024)

    return make


CREATE = call(1, "create", "/a", 100)
WRITE = call(2, "write", 100, 0, raw=b"a" * 1024)
SYNC = call(3, "datasync", 100)
SYNC_NAMES = call(4, "sync_directory", "/")
AGAIN = call(7, "write", 100, 512, raw=b"b" * 512)
RENAME = call(5, "rename", "/a", "/b")


def half(place: Path) -> None:
    (place / "a").write_bytes(b"a" * 512)


def zeros(place: Path) -> None:
    (place / "a").write_bytes(bytes(1024))


def noise(place: Path) -> None:
    (place / "a").write_bytes(b"a" * 512 + b"?" * 512)


def mixed(place: Path) -> None:
    (place / "a").write_bytes(b"a" * 512 + b"b" * 100 + b"a" * 412)


def mixed_the_wrong_way(place: Path) -> None:
    (place / "a").write_bytes(b"a" * 512 + b"a" * 100 + b"b" * 412)


def short(place: Path) -> None:
    (place / "a").write_bytes(b"a" * 700)


def renamed(place: Path) -> None:
    (place / "b").write_bytes(b"a" * 1024)


@pytest.mark.parametrize(
    ("said", "left", "allowed"),
    [
        (CREATE + WRITE, leave(), True),
        (CREATE + WRITE, zeros, True),
        (CREATE + WRITE + SYNC, leave(), True),
        (CREATE + WRITE + SYNC, zeros, False),
        (CREATE + WRITE + SYNC, half, False),
        (CREATE + WRITE + SYNC, noise, False),
        (CREATE + WRITE + SYNC + SYNC_NAMES, leave(), False),
        (CREATE + WRITE + SYNC + SYNC_NAMES, leave("a"), True),
        (CREATE + WRITE + SYNC + SYNC_NAMES, leave("a", "c"), False),
        (CREATE + WRITE + SYNC + SYNC_NAMES + RENAME, renamed, True),
        (CREATE + WRITE + SYNC + SYNC_NAMES + RENAME, leave("a"), True),
        (CREATE + WRITE + SYNC + SYNC_NAMES + RENAME, leave(), False),
        # Noise may stand where nothing durable stood, not on the way from one content to another; so may a mixture.
        (CREATE + WRITE, noise, True),
        (CREATE + WRITE + SYNC + AGAIN, noise, False),
        (CREATE + WRITE + SYNC + AGAIN, mixed, True),
        (CREATE + WRITE + SYNC + AGAIN, mixed_the_wrong_way, False),
        # A size between two others is one that the file never had.
        (CREATE + WRITE, short, False),
        (CREATE + WRITE, half, False),
        (CREATE + WRITE[:1] + call(8, "resize", 100, 512) + AGAIN, half, True),
        # A sync that has not returned, or that a write overlapped, promises nothing.
        (CREATE + WRITE + SYNC[:1], zeros, True),
        (CREATE + WRITE + SYNC[:1] + call(6, "write", 100, 0, raw=b"a" * 1024) + SYNC[1:], zeros, True),
    ],
)  # fmt: skip
def test_a_state_is_forbidden_if_it_lacks_what_was_durable(
    tmp_path: Path, said: list[Said], left: Callable[[Path], None], allowed: bool
) -> None:
    model = Model()
    for fields, raw in said:
        model.hear(fields, raw)
    left(tmp_path)
    problems = model.check(tmp_path)
    assert (not problems) == allowed, problems


# --- promises and when they were given ------------------------------------------------------------------------------------


class SaidLate:
    """A worker whose last words were still in the pipe when it was killed."""

    def __init__(self, *said: list[Any]) -> None:
        self._said = said

    def end(self) -> list[Said]:
        return [(fields, b"") for fields in self._said]


@pytest.mark.parametrize(("given_at", "counts"), [(9.0, True), (10.0, False), (11.0, False)])
def test_a_promise_counts_if_it_was_given_before_the_cut_however_late_it_is_heard(
    tmp_path: Path, given_at: float, counts: bool
) -> None:
    judge = Judge(durability={"once": "sync", "least": "sync"})
    tally = Tally(mode=powercut.MODE)
    # Neither a disk nor a server is used: the worker has ended.
    nothing: Any = None
    one = powercut.Round(
        bench=powercut.Bench(folder=tmp_path, server=nothing, tally=tally), kind="ext4", disk=nothing,
        task=Task(directory="", cycle=0), chance=random.Random(0), judge=judge,
    )  # fmt: skip
    worker: Any = SaidLate(["submit", "once", 0, 0, 1], ["ack", "once", 0, 0, 1, 1, given_at])
    one._end(worker, power=True, at=10.0)
    assert any("LOST" in problem for problem in judge.check([])) == counts
    assert tally.figures["promises given before the cut, heard after it"] == counts
    assert tally.figures["promises given after the cut had begun"] == (not counts)


def test_after_a_kill_the_model_sees_what_a_reader_sees(tmp_path: Path) -> None:
    model = Model()
    for fields, raw in CREATE + WRITE[:1]:
        model.hear(fields, raw)
    half(tmp_path)
    model.killed(tmp_path)
    assert model.fs.open_read("/a").read(4096, 0) == b"a" * 512


def test_after_a_restart_everything_there_is_durable(tmp_path: Path) -> None:
    leave("a")(tmp_path)
    model = Model()
    model.restart(tmp_path)
    assert model.check(tmp_path) == []
    (tmp_path / "a").write_bytes(b"")
    assert model.check(tmp_path)
