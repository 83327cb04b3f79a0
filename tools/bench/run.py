"""Makes the published figures: `python3 tools/bench/run.py`, with all peers, on this machine.

Makes `.venv` with the package and whatever peers can be installed, and runs `walbatch bench` there. What it writes goes to
`bench-results/`: the JSON document, and the picture as PNG and SVG. `tools/bench/report.py` makes tables of the JSON. Options that
are not its own (--quick, --full, --only w1,w3, --dir, ...) are those of `walbatch bench`. Redis and NATS are measured where
`redis-server` and `nats-server` are on the PATH.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tomllib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.environment import PYPROJECT, PYTHON, ROOT, fail, install

OUT = ROOT / "bench-results"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--out", type=Path, default=OUT, help="where the figures go (default ./bench-results)"
    )
    arguments, passed_on = parser.parse_known_args()
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    install(development=False)
    install_peers()
    command = [
        str(PYTHON),
        "-m",
        "walbatch",
        "bench",
        "--json-file",
        str(out / "bench.json"),
        "--plots",
        str(out),
    ]
    try:
        code = subprocess.run([*command, *passed_on], check=False).returncode
    except KeyboardInterrupt:
        fail("interrupted")
    if code:
        fail(f"the benchmark ended with exit code {code}")
    print(f"== written to {out}; as tables: {PYTHON} tools/bench/report.py {out / 'bench.json'}", flush=True)


def install_peers() -> None:
    """Install the extra `bench`, each of it by itself: one that cannot be installed here is left out of the comparison."""
    requirements = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"][
        "bench"
    ]
    for requirement in requirements:
        pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement]
        if subprocess.run(pip, check=False).returncode:
            print(f"== {requirement} could not be installed: measured without it", flush=True)


if __name__ == "__main__":
    main()
