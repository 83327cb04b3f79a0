"""What becomes of dead letters in damaged files, each looked at in a child process, since a damaged file can kill its reader.

Run as `python -m tests.storage.letter_probe FOLDER KIND SEED COUNT`; prints how often each outcome was seen, as JSON:

- sound: everything is there, nothing was found wrong;
- reported: something is missing, or may be, and was reported;
- stale: everything is as it was before the last commit (which the log would make good);
- anything else is a bug.
"""

from __future__ import annotations

import collections
import json
import random
import sys
from pathlib import Path

from tests.storage import state_probe
from tests.storage.states import letter, opened, read_only, use
from walbatch.types import DeadLetter

COUNT = 150
REMOVED = range(1, COUNT, 5)
LAST = COUNT + 1


def make(path: Path) -> None:
    """A state with letters in pages of their own and in shared ones, some of them removed, and keys."""
    state = opened(path)
    for lsn in range(1, COUNT + 1):
        state.bury([made(lsn)])
        state.save_keys([use(lsn)], up_to_lsn=lsn, oldest_wall_ns=0)
    state.unbury([*REMOVED])
    state.cancel(range(1_000, 1_100))
    state.bury([made(LAST)])
    state.close()


def made(lsn: int) -> DeadLetter:
    """A letter that says which it is."""
    return letter(lsn, payload=b"%d." % lsn * (lsn * 37 % 900))


def look(path: Path) -> str:
    """The outcome for one damaged file."""
    reader = read_only(path)
    predicted = reader.load_letters(), reader.load_given_up(), reader.load_keys()
    findings = [*reader.load_checkpoint()[1], *(finding for found in predicted for finding in found[-1])]
    reader.close()
    state = opened(path)
    letters, _ = state.load_letters()
    given_up, _ = state.load_given_up()
    uses, up_to_lsn, _ = state.load_keys()
    following = made(LAST + 1)
    state.bury([following])
    state.cancel([5_000])
    state.save_keys([use(LAST + 1)], up_to_lsn=LAST + 1, oldest_wall_ns=0)
    if following not in state.load_letters()[0] or not {following.lsn, 5_000} <= state.load_given_up()[0]:
        return "what was saved is not there"
    state.close()
    if any(found != made(found.lsn) for found in letters) or any(found != use(found.lsn) for found in uses):
        return "invented"
    if (letters, given_up, uses, up_to_lsn) != (predicted[0][0], predicted[1][0], *predicted[2][:2]):
        return "the reader predicts otherwise"
    expected = [made(lsn) for lsn in range(1, LAST + 1) if lsn not in REMOVED]
    dead = {*range(1, LAST + 1), *range(1_000, 1_100)}
    if findings:
        return "reported"
    for label, missing in (("sound", 0), ("stale", 1)):
        if (
            letters == expected[: len(expected) - missing]
            and given_up == (dead if not missing else dead - {LAST})
            and (len(uses), up_to_lsn) == (COUNT, COUNT)
        ):
            return label
    return "silent"


def main(folder: str, kind: str, seed: str, count: str) -> None:
    root = Path(folder)
    make(root / "sound" / "state")
    data = (root / "sound" / "state" / "data.mdb").read_bytes()
    outcomes: collections.Counter[str] = collections.Counter()
    for copy in state_probe.damaged(data, kind, random.Random(int(seed)), int(count)):
        outcomes[state_probe.outcome(root / "damaged", copy, look)] += 1
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
