"""What pytest loads for walbatch: options, and fixtures that import the rest when a test asks for them.

What is not here: what the fixtures do (`walbatch.testing.plugin`).

The idea needed to read it: pytest loads this in every run of everybody who has walbatch installed. What does the work
below `walbatch` imports the engine with its libraries, so this stands beside the package and imports nothing of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from walbatch.testing.plugin import CrashPoints


LEFT_OUT = "walbatch_left_out"
"""The user property of a test that says which crashes it has left out."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of the crash tests."""
    group = parser.getgroup("walbatch", "walbatch: crash tests of applications")
    group.addoption(
        "--walbatch-seed", type=int, default=0, metavar="N",
        help="seed of thread schedules and of sampled crash images (default: 0)",
    )  # fmt: skip
    group.addoption(
        "--walbatch-crash-states", default=None, metavar="N",
        help="crash states that each test checks at most, about; 'all': every one that the simulation knows (default: 2000)",
    )  # fmt: skip
    group.addoption(
        "--walbatch-replay", default="", metavar="LINE",
        help="do nothing but the one crash that a failure's line names; select its test as well",
    )  # fmt: skip


def pytest_configure() -> None:
    """Let the assertions of the conformance suites show their values."""
    pytest.register_assert_rewrite("walbatch.testing.contracts")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which tests have left crashes out: they are green, and have not checked everything."""
    lines = [
        f"{report.nodeid}: {text}"
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, ())
        if getattr(report, "when", "") == "call"
        for name, text in report.user_properties
        if name == LEFT_OUT
    ]
    if lines:
        terminalreporter.section("walbatch: crashes left out (more with --walbatch-crash-states)")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture
def crash_points(request: pytest.FixtureRequest) -> CrashPoints:
    """Crash an application at every point: `crash_points(use, check)`. See docs/crash-testing.md."""
    try:
        from walbatch.testing.plugin import crash_points_of  # noqa: PLC0415 - see the module's docstring
    except ModuleNotFoundError as error:
        raise pytest.UsageError(
            f"the fixture crash_points needs {error.name}: install walbatch[testing]"
        ) from error
    return crash_points_of(request)
