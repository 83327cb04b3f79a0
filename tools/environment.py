"""Makes `.venv` at the top of the checkout: what `test.py` and `quickstart.py` share. Standard library only."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - said in a line here, before the imports below fail with a traceback
    sys.exit(f"walbatch needs Python 3.11 or newer; this is {sys.version.split()[0]}")

import hashlib
import importlib.util
import os
import shutil
import subprocess
import time
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = ROOT / "pyproject.toml"
VENV = ROOT / ".venv"
STAMP = VENV / "installed-for.txt"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def install(*, development: bool) -> None:
    """Make `.venv` hold the package, and its development tools if asked, unless it does already."""
    wanted = fingerprint()
    present = STAMP.read_text(encoding="utf-8") if PYTHON.exists() and STAMP.exists() else ""
    if present == f"{wanted}\ndevelopment" or (not development and present.startswith(wanted)):
        print("== install: .venv is up to date", flush=True)
        return
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        fail(
            f"this Python ({sys.executable}) comes without {' and '.join(missing)}, so it cannot make .venv: "
            "install it (on Debian and Ubuntu the package python3-venv) or use another Python 3.11 or newer"
        )
    # The stamp is written last: an interrupted installation is started over.
    print("== install: making .venv", flush=True)
    shutil.rmtree(VENV, ignore_errors=True)
    try:
        venv.create(VENV, with_pip=True, symlinks=os.name != "nt")
    except (OSError, subprocess.CalledProcessError) as error:
        fail(f"could not make {VENV}: {error}")
    requirements = dev_requirements() if development else []
    pip_install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--use-pep517"]
    step("install", [*pip_install, "--editable", str(ROOT), *requirements], dict(os.environ))
    STAMP.write_text(f"{wanted}\n{'development' if development else 'use'}", encoding="utf-8")


def fingerprint() -> str:
    """What an installation depends on: settings, interpreter, and the place that an editable install points to."""
    facts = (hashlib.sha256(PYPROJECT.read_bytes()).hexdigest(), sys.version, sys.base_prefix, str(ROOT))
    return "\n".join(facts)


def dev_requirements() -> list[str]:
    """The `dev` dependency group, read here because pip understands `--group` only since 25.1."""
    groups = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["dependency-groups"]
    return [str(requirement) for requirement in groups["dev"]]


def step(name: str, arguments: Sequence[str], environment: dict[str, str]) -> None:
    """Run the environment's Python with these arguments; end the whole run if it fails."""
    print(f"== {name}", flush=True)
    started = time.monotonic()
    try:
        code = subprocess.run([PYTHON, *arguments], env=environment, check=False).returncode
    except KeyboardInterrupt:
        fail(f"{name} was interrupted")
    elapsed = f"{time.monotonic() - started:.1f} s"
    if code != 0:
        fail(f"{name} failed after {elapsed} (exit code {code})")
    print(f"== {name}: passed in {elapsed}", flush=True)


def fail(message: str) -> NoReturn:
    # To the same stream as the steps, so that it stands after what it is about.
    print(f"== FAILED: {message}", flush=True)
    sys.exit(1)
