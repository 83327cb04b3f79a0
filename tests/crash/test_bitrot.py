"""The bit-rot mode: it finds nothing in the shipped recovery, and finds what a recovery that believes too much would do."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools.bitrot import memory, state
from tools.bitrot.damages import ENDINGS, Catalogue, Damage
from tools.bitrot.store import ROOT, STORE_BYTES, Store, Stores, make_stores
from tools.bitrot.verdict import Bench, Changes, Opened, Outcome
from tools.modes import bitrot
from tools.modes.tally import Job, Tally
from walbatch import limits
from walbatch.core import columns as columns_module
from walbatch.core import frame as frame_module
from walbatch.core import scanner
from walbatch.core.frame import FrameType
from walbatch.errors import CorruptionError, StorageError, StoreLocked, WalbatchError
from walbatch.storage import opening

DAMAGES = 4_000


@pytest.fixture(scope="module")
def stores() -> Stores:
    return make_stores(0)


def run(path: Path, count: int, *, part: int = 0, parts: int = 1, seed: int = 0) -> Tally:
    return bitrot.run(Job(seed=seed, part=part, parts=parts, count=count, scratch=path), lambda tally: None)


# --- the stores ---


def test_the_closed_store_has_at_least_half_a_million_bits(stores: Stores) -> None:
    store = stores.closed
    assert sum(len(store.files[name]) for name in store.segments) >= STORE_BYTES
    assert 8 * STORE_BYTES >= 524_288


def test_the_stores_have_everything_that_can_be_damaged(stores: Stores) -> None:
    for ending in ENDINGS:
        store = stores.get(ending)
        types = {placed.header.type for placed in store.frames}
        assert types == {FrameType.OPERATIONS, FrameType.STAMP, FrameType.SEAL, FrameType.VOID}
        assert {placed.header.codec for placed in store.frames if placed.header.count} == {0, 1}
        assert len({header.epoch for header in store.headers.values()}) == 2
        assert 0 < len(store.unsettled) < len(store.rows)
        assert any(store.older[name] for name in store.segments)
    assert stores.fork.headers.keys() & stores.closed.headers.keys()
    assert len(stores.killed.segments) == len(stores.stamped.segments) + 1, "a trimmed segment has come back"


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("remember", [True, False], ids=["with the shortcut", "without"])
def test_an_undamaged_store_is_recovered_whole(stores: Stores, ending: str, remember: bool) -> None:
    store = stores.get(ending)
    bench = Bench(store)
    opened = bench.open({}, store.checkpoint, remember=remember)
    assert bench.judge({}, store.checkpoint, opened).outcome is Outcome.HARMLESS
    assert opened.rows.keys() >= store.unsettled
    assert (
        bench.judge({}, store.checkpoint, bench.open_by_engine({}, store.checkpoint)).outcome
        is Outcome.HARMLESS
    )


# --- the catalogue ---


def test_the_parts_of_a_catalogue_are_all_of_it_once(stores: Stores) -> None:
    store = stores.closed
    smallest = min(store.segments, key=lambda name: len(store.files[name]))
    whole = Catalogue.of(stores, 0)
    bits = {name: 8 * len(store.files[name]) for name in store.files}
    small = Catalogue(
        stores,
        whole.few[:50],
        ((bits[smallest], lambda at: Damage(store="closed", kind="bit", file=smallest, at=at)),),
    )
    found = [damage for part in range(3) for damage in small.part(part, 3)]
    assert len(found) == len(set(found)) == len(small) == 50 + bits[smallest]
    assert len(whole) > sum(bits.values())


def test_a_damage_is_what_its_line_says(stores: Stores) -> None:
    for number, damage in zip(range(3_000), Catalogue.of(stores, 0).part(0, 300), strict=False):
        words = dict(word.partition("=")[::2] for word in str(damage).split())
        assert Damage.parse(words) == damage, number


def test_a_damage_changes_something(stores: Stores) -> None:
    for damage in Catalogue.of(stores, 0).part(0, 1_999):
        if damage.kind in {"bit", "cut"}:
            (name,) = changes = damage.changes(stores)
            assert changes[name] != stores.get(damage.store).files[name]


# --- the run ---


def test_no_damage_is_silent(tmp_path: Path) -> None:
    tally = run(tmp_path, DAMAGES)
    assert not tally.failures, tally.failures[0]
    figures = tally.figures
    assert figures["damages"] == DAMAGES + figures["bits of state/ flipped"]
    for outcome in (Outcome.DETECTED, Outcome.HARMLESS, Outcome.REPORTED, Outcome.BEYOND_PROOF):
        assert figures[outcome] > 0, outcome
    assert figures[Outcome.SILENT] == 0
    assert figures["done again without the shortcut"] >= 20
    assert tally.complete


def test_the_same_seed_and_part_do_the_same(tmp_path: Path) -> None:
    one, two = (run(tmp_path, 300, part=1, parts=7) for _ in range(2))
    assert {k: v for k, v in one.cells.items() if "state" not in k} == {
        k: v for k, v in two.cells.items() if "state" not in k
    }
    assert one.figures["bits of state/ flipped"] == two.figures["bits of state/ flipped"] == 6


# --- what it finds ---


def believe_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recovery that does not check what frames hold."""
    for module in (columns_module, frame_module, scanner, opening):
        monkeypatch.setattr(module, "check_body", lambda header, padded: None)


def call_everything_torn(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that looks for no evidence behind damage."""
    look = scanner._look_behind

    def blind(*arguments: Any, **named: Any) -> Any:
        found = look(*arguments, **named)
        return found and scanner.Damage(
            offset=found.offset, end=found.end, reason=found.reason, evidence_lsn=0, seen_lsn=0, resume_lsn=0
        )

    monkeypatch.setattr(scanner, "_look_behind", blind)


@pytest.mark.parametrize(
    "mistake", [believe_bodies, call_everything_torn], ids=lambda mistake: mistake.__name__
)
def test_a_recovery_that_believes_too_much_is_found_and_its_failure_replays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: Callable[[pytest.MonkeyPatch], None]
) -> None:
    memory.forget()
    mistake(monkeypatch)
    store = make_stores(0).stamped
    # The checkpoint vouches for all that is older than it: without it, only the evidence behind the damage does.
    last = max(
        store.frames, key=lambda placed: (placed.name, placed.offset) if placed.header.count else ("", 0)
    )
    tally = Tally(mode="bitrot")
    catalogue = Catalogue(make_stores(0), (), ())
    bench = Bench(store)
    for at in range(8 * (last.offset + limits.FRAME_HEADER_BYTES), 8 * (last.offset + 200), 5):
        damage = Damage(store="stamped", kind="bit", file=last.name, at=at, stateless=1)
        bitrot._do(tally, bench, damage, catalogue, seed=0, number=1)
    memory.forget()
    assert tally.figures[Outcome.SILENT]
    assert bitrot.replay(tally.failures[0].replay, tmp_path)
    monkeypatch.undo()
    memory.forget()
    assert not bitrot.replay(tally.failures[0].replay, tmp_path)


def blamed(store: Store, path: str, changes: Changes) -> str:
    """What the verdict has against an error that names this path, after these changes."""
    error = CorruptionError("damaged", path=path, expected="a valid frame")
    opened = Opened(error=error, rows={})
    return Bench(store).judge(changes, store.checkpoint, opened).problem


def test_an_error_that_blames_another_file_than_the_damaged_one_is_a_failure(stores: Stores) -> None:
    store = stores.closed
    first, second, third, *_, last = store.segments
    flipped: Changes = {second: b"?" + store.files[second][1:]}
    lost: Changes = {second: None}
    for name in (first, second, third):
        assert not blamed(store, f"{ROOT}/{name}", flipped), name
    for path in (f"{ROOT}/{last}", ROOT, f"{ROOT}/identity", f"{ROOT}/state"):
        assert "blames another file" in blamed(store, path, flipped), path
    assert not blamed(store, ROOT, lost)
    assert "blames another file" in blamed(store, f"{ROOT}/{last}", lost)
    foreign: Changes = {"identity": stores.other.files["identity"]}
    assert not blamed(store, f"{ROOT}/{first}", foreign)
    assert "blames another file" in blamed(store, f"{ROOT}/state", foreign)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (CorruptionError("damaged", path="{copy}/state"), "detected"),
        (CorruptionError("damaged", path="{copy}/wal/0000000000000000001.seg"), "silent"),
        (StoreLocked("store", pid=None, host=None), "silent"),
        (StorageError("no room", path="{copy}/state"), "silent"),
    ],
    ids=["state", "another file", "locked", "full disk"],
)  # fmt: skip
def test_only_an_error_about_state_detects_a_flip_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: WalbatchError, outcome: str
) -> None:
    def refuse(_fs: object, root: str, **_: object) -> None:
        if isinstance(error, StorageError):
            error.path = error.path.replace("{copy}", root)
        raise error

    made = state._make(tmp_path / "made")
    monkeypatch.setattr(state, "open_store", refuse)
    found, problem = state._flip(tmp_path / "copy", made, 0)
    assert found == outcome
    assert bool(problem) == (outcome == "silent")


def test_a_process_that_dies_of_a_flip_is_a_failure_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flip(copy: Path, made: state.Made, bit: int) -> tuple[str, str]:
        if bit == seen[2]:
            os.kill(os.getpid(), signal.SIGKILL)
        return "harmless", ""

    seen = [bit for bit, _, _ in state.flips(tmp_path / "bitrot", seed=0, part=0, count=5)]
    monkeypatch.setattr(state, "_flip", flip)
    found = list(state.flips(tmp_path / "bitrot", seed=0, part=0, count=5))
    assert [bit for bit, _, _ in found] == seen
    assert [outcome for _, outcome, _ in found] == ["harmless", "harmless", "silent", "harmless", "harmless"]
    assert "SIGKILL" in found[2][2]
