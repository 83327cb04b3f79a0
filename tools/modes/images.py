"""Crash images: every workload, cut off at every change of the disk, in every way that the disk allows, and recovered.

What is not here: the workloads (`workloads`), and the exploration itself (`walbatch.testing.simulation.explore`).

The idea needed to read it: a campaign is one workload under one seed, one schedule and one setting of the disk's knobs. Campaigns
are numbered; the parts of a job share them out. Wider campaigns (more images for each crash, a second crash inside recovery)
follow when the narrow ones are through.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tools.modes.prediction import predict
from tools.modes.tally import Job, Progress, Tally
from tools.modes.workloads import WORKLOADS
from walbatch.core.recovery import make_plan
from walbatch.storage.layout import Layout, read_identity
from walbatch.storage.survey import survey
from walbatch.testing.shipped import open_engine
from walbatch.testing.simulation import Explorer, FailedSync, Machine, Plan, Room, Workload
from walbatch.testing.simulation.commits import newest_checkpoint
from walbatch.testing.simulation.directory import Directory
from walbatch.testing.simulation.explore import word
from walbatch.testing.simulation.looks import STORE
from walbatch.testing.simulation.schedules import PrioritySchedule, RandomSchedule

MODE: Final = "images"
LAYOUT: Final = Layout(STORE)
MAKING: Final = ("single", "leftovers", "second_opener")
"""Workloads whose crashes before the first submit are explored: making a new store is the same in all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Campaign:
    """One exploration, as its replay line names it."""

    workload: str
    seed: int
    strict: bool
    priority: bool
    wide: int
    """0: a first pass; 1: thousands of images of each crash; 2: a second crash inside recovery."""

    def __str__(self) -> str:
        return f"workload={word(self.workload)} seed={self.seed} strict={self.strict:d} priority={self.priority:d} wide={self.wide}"

    @property
    def plan(self) -> Plan:
        """How far it goes."""
        # Another seed for each width: the wide pass is to see another schedule than the first one.
        plan = Plan(
            seed=3 * self.seed + self.wide, from_first_submit=self.workload not in MAKING, strict=self.strict,
            schedule=PrioritySchedule if self.priority else RandomSchedule, failures_max=3,
        )  # fmt: skip
        match self.wide:
            case 0:
                return replace(plan, bound=256, samples=64)
            case 1:
                return replace(plan, bound=4096, samples=1024)
            case _:
                return replace(
                    plan,
                    bound=64,
                    samples=16,
                    depth=2,
                    inner_bound=1024,
                    inner_samples=320,
                    states_max=200_000,
                )

    @property
    def scene(self) -> Workload:
        """The workload, with the disk's knobs turned by the seed."""
        workload = WORKLOADS[self.workload]
        room = list(Room)[self.seed % 3]
        # An error told one call late loses what was acknowledged between, whatever an engine does: not promised.
        failed_sync = (FailedSync.DROP, FailedSync.REVERT)[self.seed // 3 % 2]

        def turn(machine: Machine) -> None:
            if workload.prepare is not None:
                workload.prepare(machine)
            machine.fs.room, machine.fs.failed_sync = room, failed_sync

        return replace(workload, prepare=turn, predict=predict if self.wide == 0 else None)


def campaigns(first_seed: int) -> Iterator[Campaign]:
    """All campaigns, in their order, without end."""
    for round_ in itertools.count():
        for wide in (0, 2, 1):
            for workload in WORKLOADS:
                yield Campaign(
                    workload=workload, seed=first_seed + round_, strict=round_ % 2 == 1, priority=round_ % 4 >= 2, wide=wide
                )  # fmt: skip


def run(job: Job, progress: Progress) -> Tally:
    """Campaigns until the count of states is reached."""
    tally = Tally(mode=MODE)
    started = time.monotonic()
    for number, campaign in enumerate(campaigns(job.seed)):
        if number % job.parts != job.part:
            continue
        done = tally.figures["crash states"]
        if job.is_over(done) or tally.is_full:
            tally.complete = job.count is not None and done >= job.count
            break
        plan = replace(campaign.plan, seconds=job.seconds_left)
        if job.count is not None:
            plan = replace(plan, states_max=min(plan.states_max or job.count, max(1, job.count - done)))
        report = Explorer(open_engine, campaign.scene, plan, look=look).run()
        tally.figures["campaigns"] += 1
        tally.figures["crash points"] += report.points
        tally.figures["crash states"] += report.states
        tally.figures["recoveries by the whole engine"] += report.recoveries
        tally.figures["of them comparisons of images that look alike"] += report.rechecks
        tally.figures["images that came twice (not counted)"] += report.repeats
        for call, count in report.calls.items():
            tally.cells[f"cut at {call}"] += count
        for failure in report.failures:
            tally.fail(failure.problem, f"{MODE} {campaign} {failure.replay}")
        tally.seconds = time.monotonic() - started
        progress(tally)
    return tally


def replay(line: str, _scratch: Path) -> list[str]:
    """Crash exactly there again."""
    head, _, rest = line.partition(" wide=")
    wide, _, crashes = rest.partition(" ")
    settings = dict(part.partition("=")[::2] for part in head.split())
    name = next(name for name in WORKLOADS if word(name) == settings["workload"])
    campaign = Campaign(
        workload=name, seed=int(settings["seed"]), strict=settings["strict"] == "1", priority=settings["priority"] == "1",
        wide=int(wide),
    )  # fmt: skip
    _, failures = Explorer(open_engine, campaign.scene, campaign.plan).replay(crashes)
    return [failure.problem for failure in failures]


# --- the look ---


def look(machine: Machine) -> object:
    """What the shipped survey and recovery plan make of a crash image, with all bytes that the plan keeps.

    Two images of the same value differ in bytes that recovery has classed as never acknowledged (a torn tail, room that was never
    written) and will only copy to quarantine. None where the image is not even a store.
    """
    fs = machine.fs
    state = machine.states.get(LAYOUT.state)
    try:
        identity, uuid = read_identity(fs, LAYOUT)
        if uuid is None or state is None or state.findings or state.stale_commits:
            return None
        facts = survey(fs, LAYOUT, identity=identity, store=uuid, checkpoint=newest_checkpoint(state.commits))
        plan = make_plan(facts)
        kept = []
        for segment in facts.segments:
            with_name = LAYOUT.segment(segment.number)
            file = fs.open_read(with_name)
            kept.append((segment.file_bytes, file.read(segment.end_offset, 0)))
            file.close()
    except OSError:
        return None
    return (
        plan, repr(facts.dropped), tuple(kept), _names(fs.root), state.fingerprint(),
        tuple((lane, backend.fingerprint()) for lane, backend in sorted(machine.backends.items())),
    )  # fmt: skip


def _names(directory: Directory, *, sizes: bool = True) -> object:
    """All names, sizes, and the identity: of other files than segments, recovery reads nothing, but what stands in the facts."""
    found: list[object] = []
    for name, node in sorted(directory.view.items()):
        if isinstance(node, Directory):
            found.append((name, _names(node, sizes=name != "quarantine")))
        elif name == "identity":
            found.append((name, node.read(node.size, 0)))
        else:
            found.append((name, node.size if sizes else 0))
    return tuple(found)
