"""See walbatch at work in one command: `python3 tools/quickstart.py`.

Needs Linux, Python 3.11 or newer and access to a package index. It makes `.venv`, installs the package, and replays a real
block-I/O trace (fixtures/README.md): each write of the trace is an operation, delivered to sharded LMDB; each
read is checked against what was written. In the middle the process is killed with SIGKILL; `walbatch recover`
brings the store back; the replay goes on; in the end every write is accounted for and every block's content
is compared with the trace.
"""

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.environment import PYTHON, ROOT, fail, install

DEFAULT_FRACTION = 0.1
"""Of the trace: under a minute on two cores."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--fraction",
        type=float,
        default=DEFAULT_FRACTION,
        help="part of the trace to replay, 0 to 1 (default %(default)s)",
    )
    parser.add_argument(
        "--dir", default=str(ROOT / "quickstart"), help="work folder, emptied first (default ./quickstart)"
    )
    parser.add_argument("--shards", type=int, default=4, help="LMDB shards (default %(default)s)")
    arguments = parser.parse_args()
    if not 0 < arguments.fraction <= 1:
        parser.error("--fraction must be above 0 and at most 1")
    if not 1 <= arguments.shards <= 256:
        parser.error("--shards must be from 1 to 256")
    install(development=False)
    replay = [str(PYTHON), str(ROOT / "tools" / "replay.py"), "show"]
    options = [
        "--fraction",
        str(arguments.fraction),
        "--dir",
        str(Path(arguments.dir).resolve()),
        "--shards",
        str(arguments.shards),
    ]
    try:
        code = subprocess.run([*replay, *options], check=False).returncode
    except KeyboardInterrupt:
        fail("interrupted")
    if code != 0:
        fail(f"the replay ended with exit code {code}")


if __name__ == "__main__":
    main()
