"""Everything that can go wrong, again and again: `python3 tools/torture.py --profile quick|full|soak`.

Needs Linux, Python 3.11 or newer and access to a package index: it makes `.venv` as `tools/test.py` does. It runs the modes of
tools/modes (crash images, failing calls, random runs, thread schedules, bit rot; and on real disks kill -9, power cuts, full disks,
failing system calls; then mutants of the code), prints a table of figures, and with --write puts it into docs/testing.md.

Each failure prints a line that replays it, and is added to fixtures/failures.txt, which all later runs replay first.
The exit codes stand in EPILOG.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.environment import PYTHON, ROOT, install

DOCUMENT = ROOT / "docs" / "testing.md"
EPILOG = """\
modes:
  corpus     failures of earlier runs (fixtures/failures.txt), done again
  kill       kill -9 of real processes
  powercut   power cuts of real file systems
  fulldisk   full disks
  syscalls   failing system calls, by a preloaded library
  mutants    mistakes put into the code on purpose: each must be found
  bitrot     changed and cut bytes of a store
  faults     failing calls on the simulated machine
  schedules  threads that take turns in other orders
  seeded     random runs on the simulated machine
  images     every state of the disk that a crash may leave

profiles:
  quick      what continuous integration runs: some minutes
  full       every mode to its minimum (tools/modes/profiles.py), and at least 62 minutes
  soak       as full, and at least 8 hours

--write replaces the figures between the two marks in docs/testing.md by those of this run, and changes nothing else there.
Each new failure is added to fixtures/failures.txt, with --write or without.

Exit codes: 0 nothing was found, 1 a failure (or a profile other than quick could not do all it has to), 2 usage: an unknown
mode or no replay line.
"""


def main() -> None:
    arguments = parse_arguments()
    if os.environ.get("WALBATCH_TORTURE") != "inside":
        install(development=True)
        os.chdir(ROOT)
        os.environ["WALBATCH_TORTURE"] = "inside"
        os.execv(PYTHON, [str(PYTHON), __file__, *sys.argv[1:]])  # noqa: S606 - the same script, in the environment
    sys.exit(run(arguments))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0], epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    parser.add_argument("--profile", choices=["quick", "full", "soak"], default="quick")
    parser.add_argument(
        "--seed", type=int, default=1, help="other seeds try other things (default %(default)s)"
    )
    parser.add_argument("--minutes", type=float, help="go on for at least so long")
    parser.add_argument("--modes", help="only these, in this order, with commas between")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="do this part of each count (default %(default)s)"
    )
    parser.add_argument(
        "--replay", metavar="LINE", help="do one failure again: a line as a failure prints it"
    )
    parser.add_argument("--write", action="store_true", help="put the figures into docs/testing.md")
    parser.add_argument(
        "--add",
        type=Path,
        action="append",
        help="count the tallies of an earlier --json in (legs of one run)",
    )
    parser.add_argument("--json", type=Path, help="write the tallies here, a line for each mode")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> int:
    # Imported here: only the environment has what they import.
    import dataclasses  # noqa: PLC0415
    import platform  # noqa: PLC0415
    import shlex  # noqa: PLC0415
    import tempfile  # noqa: PLC0415

    from tools.modes import corpus, report  # noqa: PLC0415
    from tools.modes.profiles import PROFILES  # noqa: PLC0415
    from tools.modes.runner import Run  # noqa: PLC0415
    from tools.modes.tally import Tally  # noqa: PLC0415

    if arguments.replay is not None:
        with tempfile.TemporaryDirectory(prefix="walbatch-replay-") as scratch:
            try:
                problems = corpus.replay(arguments.replay, Path(scratch))
            except corpus.NoReplayLineError as error:
                print(error, file=sys.stderr)
                return 2
        print("\n".join(problems) or "nothing is wrong")
        return 1 if problems else 0
    profile = PROFILES[arguments.profile]
    if arguments.minutes is not None:
        profile = dataclasses.replace(profile, minutes=arguments.minutes)
    modes = arguments.modes.split(",") if arguments.modes else list(profile.shares)
    unknown = [mode for mode in modes if mode not in profile.shares]
    if unknown:
        print(f"no mode {', '.join(unknown)}; there are {', '.join(profile.shares)}", file=sys.stderr)
        return 2
    work = Run(profile, arguments.seed, modes, scale=arguments.scale)
    try:
        work.run()
    except KeyboardInterrupt:
        print("interrupted")
    for path in arguments.add or ():
        for line in path.read_text().splitlines():
            earlier = Tally.from_json(line)
            work.tallies.setdefault(earlier.mode, Tally(mode=earlier.mode)).add(earlier)
    failures = [failure for tally in work.tallies.values() for failure in tally.failures]
    print(report.text(work.tallies, work.seconds))
    if failures:
        print(f"{corpus.keep(failures)} new lines in {corpus.CORPUS.relative_to(ROOT)}")
    if arguments.json:
        arguments.json.write_text("".join(f"{tally.to_json()}\n" for tally in work.tallies.values()))
    if arguments.write:
        command = f"python3 tools/torture.py {shlex.join(sys.argv[1:])}"
        where = f"{os.cpu_count()} shared cores, Linux {platform.release().split('-')[0]}, Python {platform.python_version()}"
        section = report.markdown(work.tallies, command=command, seconds=work.seconds, where=where)
        report.write(DOCUMENT, section)
    short = [
        mode for mode, tally in work.tallies.items() if not tally.complete and arguments.profile != "quick"
    ]
    if short:
        print(f"not all was done of {', '.join(short)}")
    return 1 if failures or short else 0


if __name__ == "__main__":
    main()
