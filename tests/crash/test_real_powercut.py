"""Power cuts on real file systems, the controls that show that they can find something, and the check of the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools.modes import powercut
from tools.modes.modelcheck import Model
from tools.modes.tally import Job, Tally

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


@pytest.mark.parametrize("skips", ["datasync", "sync_directory"])
def test_a_promise_that_the_disk_does_not_keep_is_called_forbidden(tmp_path: Path, skips: str) -> None:
    tally = cut(tmp_path, "ext4", count=200, skips=skips, failures_max=1)
    assert "the model forbids" in tally.failures[0].problem


# --- the check of the model, without a disk -------------------------------------------------------------------------------

Said = tuple[list[Any], bytes]


def call(number: int, *fields: object, raw: bytes = b"") -> list[Said]:
    """A call that has returned."""
    return [(["call", number, *fields], raw), (["done", number, True], b"")]


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
RENAME = call(5, "rename", "/a", "/b")


def half(place: Path) -> None:
    (place / "a").write_bytes(b"a" * 512)


def zeros(place: Path) -> None:
    (place / "a").write_bytes(bytes(1024))


def noise(place: Path) -> None:
    (place / "a").write_bytes(b"a" * 512 + b"?" * 512)


def renamed(place: Path) -> None:
    (place / "b").write_bytes(b"a" * 1024)


@pytest.mark.parametrize(
    ("said", "left", "allowed"),
    [
        (CREATE + WRITE, leave(), True),
        (CREATE + WRITE, zeros, True),
        (CREATE + WRITE, half, True),
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
