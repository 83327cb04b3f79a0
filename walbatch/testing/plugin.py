"""The pytest fixtures of walbatch, once a test has asked for one.

What is not here: what pytest loads at its start (`_walbatch_pytest`, beside the package), and the crashes (`crashing`).
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from _walbatch_pytest import LEFT_OUT
from walbatch.testing.crashing import STATES_MAX, CrashPlan, CrashReport, CrashRun, Use

ALL_STATES = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class CrashPoints:
    """The fixture `crash_points`: a function of an application's life and of its check."""

    node: pytest.Item
    seed: int
    states: str | None
    """What the command line says."""
    replay: str

    def __call__(self, use: Use, check: Use, *, states: int = STATES_MAX, strict: bool = True) -> CrashReport:
        """Run `use` on a simulated machine, crash it everywhere, and run `check` on what each crash leaves.

        Both get a `SimulatedProcess`. About `states` crash states are checked, unless the command line says how many. `strict`: a
        power cut keeps any subset of the names that were not synced; otherwise a prefix of them, as journals do.

        Raises CrashFailure, with the line that replays the crash, at the first check that raises; what `use` raises passes through.
        """
        __tracebackhide__ = True  # pytest then shows the check that failed, and not how it came to run
        plan = CrashPlan(
            seed=self.seed, states_max=_states_max(self.states, states), strict=strict, replay=self.replay
        )
        report = CrashRun(use, check, plan, failures=(Exception, pytest.fail.Exception)).run()
        self.node.add_report_section("call", "crash points", str(report))
        if report.left_out:
            self.node.user_properties.append((LEFT_OUT, report.left_out))
        return report


def crash_points_of(request: pytest.FixtureRequest) -> CrashPoints:
    """The fixture, as the command line asks for it."""
    option = request.config.getoption
    return CrashPoints(
        node=request.node, seed=option("--walbatch-seed"), states=option("--walbatch-crash-states"),
        replay=option("--walbatch-replay"),
    )  # fmt: skip


def _states_max(asked: str | None, default: int) -> int | None:
    """How many states; None: all."""
    if asked is None:
        return default
    if asked == ALL_STATES:
        return None
    if not asked.isdigit() or not int(asked):
        raise pytest.UsageError(
            f"--walbatch-crash-states is {asked!r}, but must be a number from 1 on, or {ALL_STATES!r}"
        )
    return int(asked)
