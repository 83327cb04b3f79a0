"""Every check of the project in one command: `python3 tools/test.py`.

Needs Linux, Python 3.11 or newer and access to a package index. It makes `.venv` at the top of the checkout (and makes it anew when
pyproject.toml, the interpreter or the place of the checkout changed), installs the package editable with its
development tools, and runs ruff, mypy, pytest with the coverage gate, and the quick profile of tools/torture.py, stopping at
the first that fails.

Arguments go to pytest: `python3 tools/test.py tests/core -k frame`. Then only pytest runs, after ruff and mypy.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.environment import ROOT, install, step

CORE_COVERAGE_MIN = 100
"""Percent of the branches of walbatch/core: it is pure, so there is no branch that a test cannot reach."""


def main() -> None:
    pytest_args = parse_arguments()
    os.chdir(ROOT)
    environment = dict(os.environ)
    if environment.get("CI"):
        environment.setdefault("HYPOTHESIS_PROFILE", "ci")
    started = time.monotonic()

    install(development=True)
    step("ruff check", ["-m", "ruff", "check", "."], environment)
    step("ruff format", ["-m", "ruff", "format", "--check", "."], environment)
    step("mypy", ["-m", "mypy"], environment)
    if pytest_args:
        step("pytest", ["-m", "pytest", *pytest_args], environment)
        print("== coverage gate and torture: left out, only some tests may have run", flush=True)
    else:
        # The core is pure: its own tests reach every branch, and tracing would slow all others down.
        step("pytest tests/core", ["-m", "coverage", "run", "-m", "pytest", "tests/core"], environment)
        gate = ["--include=walbatch/core/*", f"--fail-under={CORE_COVERAGE_MIN}"]
        step(
            f"coverage of walbatch/core >= {CORE_COVERAGE_MIN} %",
            ["-m", "coverage", "report", *gate],
            environment,
        )
        parallel = ["-n", "auto", "--dist", "worksteal"]
        step("pytest, the rest", ["-m", "pytest", *parallel, "tests", "--ignore=tests/core"], environment)
        step("torture, quick", ["tools/torture.py", "--profile", "quick"], environment)
    print(f"== all checks passed in {time.monotonic() - started:.1f} s", flush=True)


def parse_arguments() -> list[str]:
    """Return what is meant for pytest, which is all but --help."""
    parser = argparse.ArgumentParser(
        description="Run every check of the project: ruff, mypy, pytest, coverage of walbatch/core, torture.",
        epilog="All other arguments go to pytest; coverage and torture are left out then.",
        usage="python3 tools/test.py [-h] [PYTEST ARGUMENT ...]",
        allow_abbrev=False,
    )
    return parser.parse_known_args()[1]


if __name__ == "__main__":
    main()
