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

MARKER = "made-by-walbatch-quickstart"
"""The file in a work folder that tells it from a folder with files of the user's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--fraction",
        type=float,
        default=DEFAULT_FRACTION,
        help="part of the trace to replay, 0 to 1 (default %(default)s)",
    )
    parser.add_argument(
        "--dir",
        default=str(ROOT / "quickstart"),
        help="work folder: new, empty, or made by this program before (default ./quickstart)",
    )
    parser.add_argument("--shards", type=int, default=4, help="LMDB shards (default %(default)s)")
    arguments = parser.parse_args()
    if not 0 < arguments.fraction <= 1:
        parser.error("--fraction must be above 0 and at most 1")
    if not 1 <= arguments.shards <= 256:
        parser.error("--shards must be from 1 to 256")
    work = claim(Path(arguments.dir).resolve())
    install(development=False)
    replay = [str(PYTHON), str(ROOT / "tools" / "replay.py"), "show"]
    options = [
        "--fraction",
        str(arguments.fraction),
        "--dir",
        str(work),
        "--shards",
        str(arguments.shards),
    ]
    try:
        code = subprocess.run([*replay, *options], check=False).returncode
    except KeyboardInterrupt:
        fail("interrupted")
    if code != 0:
        fail(f"the replay ended with exit code {code}")


def claim(folder: Path) -> Path:
    """Where to work in `folder`: what stands there is deleted, and nothing else. Refuses a folder that is the user's own."""
    marker = folder / MARKER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not marker.exists():
            if any(folder.iterdir()):
                fail(
                    f"{folder} is not empty, and this program did not make it: nothing was changed; name a new folder with --dir"
                )
            marker.write_text("tools/quickstart.py works in run/ beside this file, and deletes it first.\n")
    except OSError as error:
        fail(f"{folder} cannot be the work folder ({error.strerror}): name another one with --dir")
    return folder / "run"


if __name__ == "__main__":
    main()
