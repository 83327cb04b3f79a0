"""Opening a store: recover it, find out what its lanes have done, and put the parts together.

What is not here: recovery itself (`storage.store`, `core.recovery`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Mapping

from walbatch import limits
from walbatch.config import NS_PER_S, Lane, Settings
from walbatch.core.history import HISTORY, History
from walbatch.engine.assembly import Assembly, Environment
from walbatch.engine.moving import check_moves
from walbatch.engine.requeueing import without_requeued
from walbatch.lanes import (
    check_remembered,
    check_settings,
    close_backends,
    kinds_in_log,
    lane_memory,
    set_up,
)
from walbatch.ports import Backend, StateStore
from walbatch.runtime.identities import KeyIndex
from walbatch.storage.dropped import noted_lanes
from walbatch.storage.layout import Layout
from walbatch.storage.log import Log, LogSettings
from walbatch.storage.store import OpenStore, open_store, storage_errors
from walbatch.storage.survey import Progress, segment_numbers
from walbatch.types import Durability, Position

_logger = logging.getLogger("walbatch")


def open_assembly(
    path: str | os.PathLike[str], lanes: Mapping[str, Lane], *, settings: Settings, environment: Environment, verify: bool,
    progress: Progress | None,
) -> Assembly:  # fmt: skip
    """Open a store as `Engine.open` says; its parts are running. If anything fails, all is given back."""
    check_settings(lanes, settings)
    fs = environment.fs
    root = os.path.realpath(os.fspath(path))
    layout = Layout(root)

    def open_state(path: str, uuid: bytes) -> StateStore:
        # Without a log, a damaged state is the last that tells of it: moved aside, it would make the store look new.
        quarantine = layout.quarantine if segment_numbers(fs, layout) else ""
        return environment.open_state(path, uuid, quarantine)

    store = open_store(
        fs, root, clock=environment.clock, entropy=environment.entropy, note={"pid": os.getpid(), "host": socket.gethostname()},
        open_state=open_state, full=verify, progress=progress,
    )  # fmt: skip
    opened: list[Backend] = []
    try:
        assembly, findings = _put_together(store, lanes, settings, environment, opened)
    except BaseException:
        try:
            close_backends(opened)
            store.state.close()
        finally:
            store.lock.release()
        raise
    for finding in findings:
        _logger.warning("%s: %s", root, finding)
    for case in store.plan.cases:
        if case.is_noteworthy:
            _logger.warning(
                "%s: %s: %s (segment %s, offset %d)",
                root,
                case.label,
                case.message,
                case.segment,
                case.offset,
            )
    return assembly


def _put_together(
    store: OpenStore,
    lanes: Mapping[str, Lane],
    settings: Settings,
    environment: Environment,
    opened: list[Backend],
) -> tuple[Assembly, list[str]]:
    """The parts, running, and what was found in state/ that users should hear of. `opened`: backends to be closed."""
    state = store.state
    remembered, lane_findings = state.load_lanes()
    state_is_whole = store.facts.checkpoint is not None and not lane_findings
    kinds = frozenset() if state_is_whole or not store.facts.segments else kinds_in_log(environment.fs, store)
    check_remembered(lanes, remembered, kinds, noted_lanes(store.facts.dropped))
    snapshots, controller_findings = state.load_controllers()
    setups = set_up(store, lanes, remembered, kinds, opened, snapshots)
    letters, letter_findings = state.load_letters()
    given_up, given_up_findings = state.load_given_up()
    uses, keys_lsn, key_findings = state.load_keys()
    moves = check_moves(environment.fs, store, lanes, remembered, setups, given_up)
    # Lanes are remembered before the first of their operations can be logged, backends before the first batch can go there.
    state.save_lanes(
        {
            name: lane_memory(name, lane, remembered.get(name))
            for name, lane in lanes.items() if lane.durability is not Durability.NONE
        }
    )  # fmt: skip
    with storage_errors(store.layout.root):
        log = Log.open(
            environment.fs, store.layout, environment.clock, environment.entropy, environment.threads,
            LogSettings(
                segment_bytes=settings.segment_bytes, compress_bytes_min=settings.compress_bytes_min,
                compress_level=settings.compress_level,
            ),
            facts=store.facts, plan=store.plan,
        )  # fmt: skip
        try:
            keys = KeyIndex(
                threads=environment.threads, clock=environment.clock, age_ns=int(settings.idempotency_window_s * NS_PER_S),
                uses=uses, saved_lsn=keys_lsn,
            )  # fmt: skip
            keys.read_log(log, Position(store.plan.first_segment, limits.SECTOR_BYTES))
            assembly = Assembly(
                store=store, log=log, environment=environment, lanes=lanes, setups=setups, settings=settings,
                letters=without_requeued(state, letters, keys), given_up=given_up, keys=keys,
                history=_decode_history(snapshots.get(HISTORY)),
            )  # fmt: skip
            assembly.start()
        except BaseException:
            log.close(next_lsn=None)
            raise
    return assembly, [*moves, *controller_findings, *letter_findings, *given_up_findings, *key_findings]


def _decode_history(data: bytes | None) -> History:
    """The history that was kept; a new one where there is none, or where it says nothing."""
    with contextlib.suppress(ValueError):
        if data is not None:
            return History.decode(data)
    return History()
