"""What `walbatch recover --dry-run` would say of a simulated store: a look, for the oracle to compare with the real opening.

The command looks with `walbatch.inspection`, which reads real files and LMDB. Here are the same steps on simulated ones: a full
survey, and the plan that it leads to. What is not here: the comparison (`walbatch.testing.simulation.oracle`).
"""

from __future__ import annotations

from collections.abc import Callable

from walbatch.core.columns import decode_body
from walbatch.core.frame import FrameHeader, FrameType, SegmentHeader
from walbatch.core.recovery import IdentityState, make_plan
from walbatch.errors import WalbatchError
from walbatch.storage.layout import Layout, read_identity
from walbatch.storage.store import refusal_error
from walbatch.storage.survey import survey
from walbatch.testing.simulation import FaultPlan, Machine, SimulatedState
from walbatch.testing.simulation.history import Logged, Predicted
from walbatch.testing.simulation.looks import STORE, case_text
from walbatch.types import Checkpoint


def predict(machine: Machine) -> Predicted | None:
    """Look at the store on `machine`. None where there is none yet. Writes nothing."""
    layout = Layout(STORE)
    fs = machine.fs
    if not fs.is_directory(STORE):
        return None
    identity, uuid = read_identity(fs, layout)
    if identity is not IdentityState.VALID:
        return None  # made, or refused, by rules that come before recovery
    checkpoint, findings = _state(machine, layout)
    logged: list[Logged] = []

    def visit(_number: int, _header: SegmentHeader) -> Callable[[int, FrameHeader, bytes], None]:
        def see(_offset: int, frame: FrameHeader, padded: bytes) -> None:
            if frame.type is FrameType.OPERATIONS:
                columns = decode_body(frame, padded)
                rows = zip(
                    columns.lsns(frame.first_lsn),
                    columns.kind_indexes,
                    columns.keys,
                    columns.payloads,
                    strict=True,
                )
                logged.extend(
                    Logged(lsn=lsn, lane=columns.kinds[kind], key=key, payload=payload)
                    for lsn, kind, key, payload in rows
                )

        return see

    facts = survey(
        fs, layout, identity=identity, store=uuid, checkpoint=checkpoint, state_findings=findings, full=True, visit=visit
    )  # fmt: skip
    plan = make_plan(facts)
    refusal: WalbatchError | None = refusal_error(plan, layout)
    return Predicted(
        refusal=type(refusal).__name__ if refusal else "", cases=tuple(map(case_text, plan.cases)), next_lsn=plan.next_lsn,
        torn_bytes=sum(torn.end - torn.offset for torn in plan.torn), torn_count=len(plan.torn),
        logged=None if refusal else tuple(logged),
    )  # fmt: skip


def _state(machine: Machine, layout: Layout) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """What the state says to a reader that changes nothing."""
    if layout.state not in machine.states or not machine.fs.exists(f"{layout.state}/data.mdb"):
        return None, ()
    state = SimulatedState(
        machine.states[layout.state].clone(), layout.state, faults=FaultPlan(), on_call=lambda _call, _path: None,
        on_save=lambda _checkpoint: None,
    )  # fmt: skip
    checkpoint, findings = state.load_checkpoint()
    return checkpoint, tuple(findings)
