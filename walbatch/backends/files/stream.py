"""The files of one shard: each is there once, whole, and together with the mark that covers it.

What is not here: what is in a file, and what of a batch belongs into one (`backend`).

The idea needed to read it: what is visible belongs to its readers, who may move or delete it at any moment; so it can prove
nothing. What was committed stands in the mark file, and a file that was committed and not shown yet stands there under a hidden
name. A batch takes three syncs:

1. The next file is there already, empty, under its staged name, and that name is durable. Write it, sync it.
   *Power fails:* the mark file does not know of it. It is thrown away when the shard is opened, and the batch comes again.
2. Write the mark file, with the file's number in it, and sync it: **the commit**.
   *Power fails before it is durable:* as above. A slot that was cut off is invalid, the other one counts. *After it:* opening
   finds a hidden file with the number that is committed, and shows it.
3. Make the next staged file, rename this one to its visible name, sync the directory.
   *Power fails:* any of these changes of names may be gone. The file stands under one name or the other, never under both or
   none; opening shows it, and makes the next one. A reader that has deleted the file before the directory was synced, and lost
   that to the power cut, sees it again: so does whoever deletes any file.

What opening finds says all: a hidden file with the committed number is to be shown; one with the next number is not committed.
None with the committed number means that it was shown, whether it is still there or not. Nothing lists the folder: opening
costs the same with one file in it and with a million.

After an error of the disk nothing is known of what it was about. So the next call opens the shard again, as below: it shows what is
committed, writes the marks anew to another file, and throws the staged file away (its pages may look clean and not be on the
disk). As long as that stands, either slot of the old mark file tells the truth.

**Openings are numbered**, and each writes to names of its own only: the highest mark file counts. An opening, of a new engine or
after an error,

1. claims the next number by creating the file that is to be its mark file, and deletes the claims below: those openings can not
   become valid any more, for that is a rename of the claim. *Killed:* the claim stays, and the next opening deletes it.
2. takes the hidden files of the newest valid opening away, to names of its own (`taken`), looking upwards through the numbers,
   because whoever was cut off may have taken them before. Then it reads that opening's marks, again if they have changed since.
   *Killed:* the next one finds the files here, and the marks where they were.
3. makes its staged file, and syncs the folder: what it took must be found by its number once its marks count.
4. writes the marks to its claim, syncs, and renames the claim: now it is the newest. Syncs the name. *Power fails:* either mark
   file counts, with hidden files that its opening finds.
5. shows what was committed, throws away what was not, deletes the older mark files, and syncs the folder. *Killed:* the next
   opening finds what was committed as `taken`, and nothing is thrown away before step 4 was durable.

**An old engine that wakes up.** Locks keep two engines from one folder; where they do not hold, its chain of staged files does. It
makes the next one before it shows the present one, and can make no other without another opening: when one was taken away, that
was the end of it. What it commits after that goes to marks that do not count; what it committed before was read in step 2. It hears
of it (`Fenced`) where its mark file is gone, or when it shows, and does not open again behind a valid opening of another engine.
This needs a file system on which creating, renaming and deleting a name happen at once, for all that look.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from walbatch.backends.files.markfile import MarkFile, Record, read_marks
from walbatch.errors import BackendBroken, CorruptionError, Fenced, RetryBatch, StorageError
from walbatch.ports import File, FileSystem
from walbatch.types import Mark

TAKE_OVER_MAX: Final = 100
"""How often opening looks again because another engine is at work, before it gives up."""

_MARK_NAME: Final = re.compile(r"(\d{3,})\.(\d{8,})\.mark(\.tmp)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the files of a shard are, and how they are named."""

    folder: str
    prefix: str
    """Lane, stream and shard."""
    suffix: str
    state: str
    """The folder of the mark files."""
    shard: int

    def marks(self, opening: int) -> str:
        """The path of an opening's mark file."""
        return f"{self.state}/{self.shard:03d}.{opening:08d}.mark"

    def claim(self, opening: int) -> str:
        """Its path until it counts."""
        return f"{self.marks(opening)}.tmp"

    def shown(self, sequence: int) -> str:
        """The path of a file that readers see."""
        return f"{self.folder}/{self.prefix}-{sequence:012d}{self.suffix}"

    def staged(self, sequence: int, opening: int) -> str:
        """Its path until then: hidden from `ls`, from patterns, and from tools that pass over names with a dot."""
        return f"{self.folder}/.{self.prefix}-{sequence:012d}{self.suffix}.{opening:08d}.tmp"

    def taken(self, sequence: int, opening: int) -> str:
        """The path of a staged file that this opening took away from an earlier one."""
        return f"{self.folder}/.{self.prefix}-{sequence:012d}{self.suffix}.{opening:08d}.taken.tmp"

    def openings(self, fs: FileSystem) -> tuple[list[int], list[int]]:
        """The numbers of mark files, and of claims."""
        marks: list[int] = []
        claims: list[int] = []
        for name in fs.list_directory(self.state):
            match = _MARK_NAME.fullmatch(name)
            if match and int(match[1]) == self.shard:
                (claims if match[3] else marks).append(int(match[2]))
        return marks, claims


class Stream:
    """The files of one shard, to which batches are added. `lock` is held by the thread that uses anything else of it."""

    def __init__(self, fs: FileSystem, place: Place) -> None:
        self.lock = threading.Lock()
        self.is_wanted = True
        """False from the moment at which its backend is closed: a call that is under way then closes it at its end."""
        self.mark = Mark()
        self.sequence = 0
        self._fs = fs
        self._place = place
        self._opening = 0
        self._own: set[int] = set()
        """Openings of this object, also those that failed: which of them are valid is not known after an error."""
        self._lost: Record | None = None
        """What counted before the newest mark, if its file was deleted before it could be shown."""
        self._marks: MarkFile | None = None
        self._next: File | None = None
        self._is_doubtful = False

    def __repr__(self) -> str:
        state = "closed" if self._marks is None else "in doubt" if self._is_doubtful else "open"
        return f"<Stream {self._place.prefix} {state}, {self.sequence} files>"

    @staticmethod
    def create(fs: FileSystem, place: Place) -> None:
        """Write the first mark file of a new shard, of opening 0. Its name is durable after `sync_directory`."""
        claim = place.claim(0)
        if fs.exists(claim):
            fs.unlink(claim)
        file = fs.create(claim)
        try:
            MarkFile.begin(file, sequence=0, opening=0, mark=Mark())
        finally:
            file.close()
        fs.rename(claim, place.marks(0))

    # --- opening --------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Take the shard over: show what was committed, throw away what was not. What can be read afterwards is durable.

        Raises CorruptionError, UnsupportedFormat, StorageError, BackendBroken, OSError.
        """
        for _ in range(TAKE_OVER_MAX):
            if self._take_over(is_first=True):
                return
        raise self._restless()

    def settle(self) -> None:
        """After an error: bring names and marks into order again. Raises Fenced, BatchFailure, StorageError, OSError."""
        if self._is_doubtful and not self._take_over(is_first=False):
            self._check_newest(self._place.openings(self._fs)[0])
            raise RetryBatch(f"{self._place.state}: another engine is opening shard {self._place.shard}")

    def _take_over(self, *, is_first: bool) -> bool:
        """A new opening, behind the newest valid one. False where a higher one came between. The crash story is above.

        Not the first one: only behind an opening of this object. Raises Fenced otherwise.
        """
        fs, place = self._fs, self._place
        self._close_files()
        marks, claims = place.openings(fs)
        if not is_first:
            self._check_newest(marks)
        mine = max((*marks, *claims), default=0) + 1
        with contextlib.ExitStack() as opened:
            try:
                file = fs.create(place.claim(mine))
            except FileExistsError:
                return False
            opened.callback(file.close)
            owner = self._cut_off(mine, is_first=is_first)
            record = self._take(owner, mine) if owner is not None else None
            if owner is None or record is None:
                return False
            if self._lost is not None and not fs.exists(place.taken(record.sequence, mine)):
                record = self._lost
            staged = self._stage(record.sequence + 1, mine)
            opened.callback(staged.close)
            fs.sync_directory(place.folder)
            marked = MarkFile.begin(file, sequence=record.sequence, opening=mine, mark=record.mark)
            try:
                fs.rename(place.claim(mine), place.marks(mine))
            except FileNotFoundError:
                return False
            fs.sync_directory(place.state)
            opened.pop_all()
        self._marks, self._next, self._opening, self._lost = marked, staged, mine, None
        self.sequence, self.mark = record.sequence, record.mark
        try:
            self._show_taken()
        except FileNotFoundError:
            return False
        self._clear(owner)
        fs.sync_directory(place.folder)
        self._is_doubtful = False
        return True

    def _check_newest(self, marks: Sequence[int]) -> None:
        """Raise Fenced if the newest valid opening is another engine's."""
        newest = max(marks, default=None)
        if newest is not None and newest not in self._own:
            raise Fenced(
                f"{self._place.marks(newest)}: the folder was opened by another engine since (this one is {self._opening}): a "
                "newer one has taken over; close this one"
            )

    def _cut_off(self, mine: int, *, is_first: bool) -> int | None:
        """The newest valid opening, when none between it and this one can become valid any more. None where a higher one came.

        Claims are deleted by higher openings alone: whoever makes a lower one after this look sees a higher name, and gives up.

        Crash story: the own claim is durable before lower ones are deleted. So after a power cut the next number is above each
        that may have taken files; where there was no lower one, it is the same again.
        """
        lower = [claim for claim in self._place.openings(self._fs)[1] if claim < mine]
        if lower:
            self._fs.sync_directory(self._place.state)
        for claim in lower:
            with contextlib.suppress(FileNotFoundError):
                self._fs.unlink(self._place.claim(claim))
        marks, claims = self._place.openings(self._fs)
        if not is_first:
            self._check_newest(marks)
        if not marks:
            path = f"{self._place.state}/{self._place.shard:03d}.*.mark"
            raise CorruptionError(
                f"{path} is gone: which operations are in files cannot be told any more. Restore it from a backup",
                path=path,
                expected="a mark file",
            )
        if mine in marks or max((*marks, *claims)) != mine:
            return None
        owner = max(marks)
        # Only now: whoever computed this number long ago may have claimed it again after another had made it valid.
        self._own = {opening for opening in self._own if opening >= owner} | {mine}
        return owner

    def _take(self, owner: int, mine: int) -> Record | None:
        """The owner's newest record, read when it can show nothing any more. None where a higher opening came between."""
        path = self._place.marks(owner)
        try:
            found = read_marks(self._fs, path)
            for _ in range(TAKE_OVER_MAX):
                record = found.record
                for sequence in (record.sequence, record.sequence + 1):
                    self._take_file(sequence, owner, mine, is_committed=sequence == record.sequence)
                found = read_marks(self._fs, path)
                if found.record != record:
                    continue
                if found.is_damaged and not self._fs.exists(self._place.taken(record.sequence + 1, mine)):
                    # A write that was cut off leaves the staged file behind that it was about. Otherwise it was acknowledged.
                    raise CorruptionError(
                        f"{path} is damaged: its newest mark is gone, and with it which operations are in files. Restore it from a "
                        "backup",
                        path=path,
                        expected="two marks",
                    )
                return record
        except FileNotFoundError:
            if owner in self._place.openings(self._fs)[0]:
                raise
            return None
        raise self._restless()

    def _take_file(self, sequence: int, owner: int, mine: int, *, is_committed: bool) -> None:
        """Rename the owner's file to a name of this opening, wherever openings that failed have brought it: always upwards.

        What the owner itself had taken is its file only while that is committed: otherwise it has thrown that away.
        """
        place = self._place
        sources = [place.taken(sequence, owner)] if is_committed else []
        sources += [place.staged(sequence, owner)]
        sources += [place.taken(sequence, opening) for opening in range(owner + 1, mine)]
        for source in sources:
            with contextlib.suppress(FileNotFoundError):
                if self._fs.exists(source):
                    self._fs.rename(source, place.taken(sequence, mine))

    def _stage(self, sequence: int, opening: int) -> File:
        """The first staged file of an opening."""
        path = self._place.staged(sequence, opening)
        if self._fs.exists(path):
            self._fs.unlink(path)  # of an opening whose claim a power cut took away
        return self._fs.create(path)

    def _show_taken(self) -> None:
        """Give the newest committed file its visible name, unless it has had that."""
        taken = self._place.taken(self.sequence, self._opening)
        if self._fs.exists(taken):
            self._show(taken)

    def _clear(self, owner: int) -> None:
        """Throw away what no opening needs: what was not committed, what failed openings made, and older marks."""
        place, following = self._place, self.sequence + 1
        stale = [place.taken(following, owner), place.taken(following, self._opening)]
        stale += [place.staged(following, opening) for opening in range(owner + 1, self._opening)]
        marks, _ = place.openings(self._fs)
        stale += [place.marks(opening) for opening in marks if opening < self._opening]
        for path in stale:
            with contextlib.suppress(FileNotFoundError):
                if self._fs.exists(path):
                    self._fs.unlink(path)

    def _restless(self) -> StorageError:
        path = self._place.state
        return StorageError(
            f"{path} changes all the time: another engine writes there. Close it, and open again", path=path
        )

    def close(self) -> None:
        """Release the files. Idempotent."""
        self._close_files()

    @property
    def is_open(self) -> bool:
        """Whether batches can be added."""
        return self._marks is not None

    def _close_files(self) -> None:
        marks, self._marks = self._marks, None
        if marks is not None:
            marks.close()
        file, self._next = self._next, None
        if file is not None:
            file.close()

    # --- adding ---------------------------------------------------------------------------------------------------

    def add(self, content: Sequence[bytes], mark: Mark) -> None:
        """One more file, and the mark that covers it: both or neither. Durable and visible when it returns.

        An error leaves open whether it took effect; the next `settle` tells. Raises Fenced, RetryBatch, BackendBroken, OSError.
        """
        self._check_names(self._place.staged(self.sequence + 1, self._opening))
        self._is_doubtful = True
        before = (self.sequence, self.mark)
        try:
            self._commit(content, mark)
        except FileNotFoundError:
            # Deleted at the last moment. By another engine: Fenced. By a person: it was never shown, and is written again.
            self.settle()
            if (self.sequence, self.mark) == before:
                self._is_doubtful = True
                self._commit(content, mark)
        self._fs.sync_directory(self._place.folder)
        self._is_doubtful = False

    def advance(self, mark: Mark) -> None:
        """Another mark, and no file. Durable when it returns. Raises as `add`."""
        if mark == self.mark:
            return
        self._check_names()
        self._is_doubtful = True
        self._store(self.sequence, mark)
        self._is_doubtful = False

    def _check_names(self, *staged: str) -> None:
        """Open again where a name is gone: another engine has taken over, or somebody has cleared the folder of hidden files."""
        assert not self._is_doubtful
        if all(self._fs.exists(path) for path in (*staged, self._place.marks(self._opening))):
            return
        before = self.mark
        self._is_doubtful = True
        self.settle()
        if self.mark != before:
            raise RetryBatch(f"{self._place.marks(self._opening)} was changed")

    def _commit(self, content: Sequence[bytes], mark: Mark) -> None:
        """Write the staged file, commit it, and show it when the next one is there."""
        assert self._next is not None
        staged, before = self._next, (self.sequence, self.mark)
        path = self._place.staged(self.sequence + 1, self._opening)
        staged.write(content, 0)
        staged.datasync()
        self._store(self.sequence + 1, mark)
        self._next = self._fs.create(self._place.staged(self.sequence + 1, self._opening))
        staged.close()
        try:
            self._show(path)
        except FileNotFoundError:
            if not self._fs.exists(self._place.shown(self.sequence)):
                self.sequence, self.mark = before
                self._lost = Record(
                    generation=0, sequence=self.sequence, opening=self._opening, mark=self.mark
                )
            raise

    def _store(self, sequence: int, mark: Mark) -> None:
        assert self._marks is not None
        self._marks.store(sequence, mark)
        self.sequence, self.mark = sequence, mark

    def _show(self, hidden: str) -> None:
        """Rename the newest committed file to its visible name. Never over another one."""
        shown = self._place.shown(self.sequence)
        if self._fs.exists(shown):
            self._check_newest(self._place.openings(self._fs)[0])
            raise BackendBroken(
                f"{shown} exists, and is not from here: move it away. Nothing is written over, and nothing is lost"
            )
        self._fs.rename(hidden, shown)
