"""Real file systems that can lose their power: ext4 and XFS on loop devices, mounted where nobody else sees it.

What is not here: what is written there, and what a cut must leave (`powercut`, `modelcheck`).

The idea needed to read it: `shut_down` asks the file system to stop at once (an ioctl that its developers made for such
tests). What it had not given to its device by then is lost: dirty pages of files, and the journal's unwritten part. What
the device had taken stays, although a real disk may lose from its own cache what was not flushed. A `NestedDisk` loses
that too: its image is a file on a second file system, and it is that one that is shut down.

Everything stands in a mount namespace of this process, and loop devices detach themselves, so that nothing is left behind
however the process ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import random
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

MIB: Final = 1 << 20
IMAGE_BYTES: Final = {"ext4": 48 * MIB, "xfs": 300 * MIB}
"""XFS refuses to be smaller; its image is sparse."""

OUTER_SLACK_BYTES: Final = 24 * MIB

MEMORY: Final = Path("/dev/shm")  # noqa: S108 - a place, not a name
"""Where images stand, if it can be: what is lost does not depend on it, and a cut takes a tenth of the time."""

BUSY_S: Final = 20.0
ATTACH_TRIES: Final = 100

CLONE_NEWNS: Final = 0x00020000
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 1 << 18
IOC_SHUTDOWN: Final = 0x8004587D
"""EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN are the same number, and so are their flags."""
FLUSH_LOG: Final = 1
"""The journal is written, the files are not."""
LOSE_LOG: Final = 2
"""Nothing is written any more."""

LOOP_CTL_GET_FREE: Final = 0x4C82
LOOP_SET_FD: Final = 0x4C00
LOOP_SET_STATUS64: Final = 0x4C04
LO_FLAGS_AUTOCLEAR: Final = 4
LOOP_FLAGS_OFFSET: Final = 5 * 8 + 4 + 4 + 4
LOOP_INFO64_BYTES: Final = 232
SYNC_FILE_RANGE_WRITE_AND_WAIT: Final = 1 | 2 | 4

_libc = ctypes.CDLL(None, use_errno=True)


class Unable(Exception):
    """This machine cannot do it; the message says why, as a sentence."""


# --- calls that Python has no names for ---------------------------------------------------------------------------------


def _check(answer: int, what: str) -> None:
    if answer != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def mount(device: str, place: Path, kind: str, options: str = "") -> None:
    """mount(2)."""
    _check(
        _libc.mount(device.encode(), bytes(place), kind.encode(), ctypes.c_ulong(0), options.encode()),
        f"mount of {kind} at {place}",
    )


def unmount(place: Path) -> None:
    """umount2(2); a file system that is just being left is waited for."""
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            _check(_libc.umount2(bytes(place), 0), f"unmounting {place}")
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.001)
        else:
            return


_unshared: list[int] = []
"""The process that has a mount namespace of its own: this one, after the first call of `unshare_mounts`."""


def unshare_mounts() -> None:
    """A mount namespace for this process (and its children). Raises Unable."""
    if os.getpid() in _unshared:
        return
    if os.geteuid() != 0:
        raise Unable("Mounting file systems takes root, which this process is not.")
    try:
        _check(_libc.unshare(CLONE_NEWNS), "unshare")
        _check(_libc.mount(None, b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None), "private mounts")
    except OSError as error:
        raise Unable(f"This root may not mount file systems: {error}.") from error
    _unshared.append(os.getpid())


def check_kind(kind: str) -> str:
    """The command that makes such a file system. Raises Unable."""
    if kind not in Path("/proc/filesystems").read_text().split():
        raise Unable(f"This kernel has no {kind}.")
    command = shutil.which(f"mkfs.{kind}", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if command is None:
        raise Unable(f"mkfs.{kind} is not installed.")
    return command


def make(kind: str, image: Path, size: int) -> None:
    """A new file system in an image file. Raises Unable."""
    command = check_kind(kind)
    with image.open("wb") as file:
        file.truncate(size)
    quick = ["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"] if kind == "ext4" else ["-q", "-f"]
    subprocess.run([command, *quick, str(image)], check=True, capture_output=True)


def mount_image(file: int, place: Path, kind: str) -> None:
    """Mount an open image. Its loop device ends with the mount, and with it the device's page cache. Raises Unable, OSError.

    A device that outlived the mount would show the next one blocks from its cache that were never written: ext4 took them
    for damage.
    """
    path, device = _attach(file)
    try:
        mount(path, place, kind)
    finally:
        os.close(device)


def _attach(file: int) -> tuple[str, int]:
    """A loop device for `file`, which detaches itself when its last user closes it: this descriptor, or a mount. Raises Unable."""
    try:
        for _ in range(ATTACH_TRIES):
            control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
            try:
                number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
            finally:
                os.close(control)
            path = f"/dev/loop{number}"
            device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, LOOP_SET_FD, file)
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:  # somebody else was quicker
                    raise
            else:
                status = bytearray(LOOP_INFO64_BYTES)
                struct.pack_into("<I", status, LOOP_FLAGS_OFFSET, LO_FLAGS_AUTOCLEAR)
                fcntl.ioctl(device, LOOP_SET_STATUS64, bytes(status))
                return path, device
    except OSError as error:
        raise Unable(f"This machine has no loop devices to use: {error}.") from error
    raise Unable("All loop devices are in use.")


def shut_down(place: Path, flags: int) -> None:
    """The file system at `place` stops now."""
    directory = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(directory, IOC_SHUTDOWN, struct.pack("I", flags))
    finally:
        os.close(directory)


# --- disks ----------------------------------------------------------------------------------------------------------------


class Disk:
    """A file system of `kind` in an image of its own below `folder`, mounted at `place`."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.place = folder / f"{kind}-mount"
        self.place.mkdir()
        self._image = _opened_image(kind, folder / f"{kind}-image", IMAGE_BYTES[kind])
        try:
            mount_image(self._image, self.place, kind)
        except OSError as error:
            raise Unable(f"{kind} cannot be mounted here: {error}.") from error

    def cut(self, chance: random.Random) -> None:
        """The power fails. Mostly the journal's unwritten part is lost too."""
        shut_down(self.place, LOSE_LOG if chance.random() < 0.8 else FLUSH_LOG)

    def restart(self) -> None:
        """The power is back, and the journal is replayed. Nobody may have a file open."""
        unmount(self.place)
        mount_image(self._image, self.place, self.kind)

    def close(self) -> None:
        """Gone."""
        with contextlib.suppress(OSError):
            unmount(self.place)
        os.close(self._image)


class NestedDisk:
    """A file system of `kind` whose device also forgets what it was not told to flush, but for parts chosen by chance."""

    def __init__(self, kind: str, folder: Path, outer: str = "ext4") -> None:
        self.kind = kind
        self.place = folder / f"{kind}-mount"
        self._below = folder / f"{kind}-platter"
        self._outer = outer
        self._size = IMAGE_BYTES[kind]
        for place in (self.place, self._below):
            place.mkdir()
        self._platter = _opened_image(
            outer, folder / f"{kind}-platter-image", self._size + self._size // 16 + OUTER_SLACK_BYTES
        )
        self._path = self._below / "image"
        try:
            mount_image(self._platter, self._below, outer)
            make(kind, self._path, self._size)
            _write_holes(self._path)
            self._start()
        except OSError as error:
            self.close()
            raise Unable(f"{kind} on {outer} cannot be mounted here: {error}.") from error

    def _start(self) -> None:
        image = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        try:
            mount_image(image, self.place, self.kind)
        finally:
            os.close(image)

    def cut(self, chance: random.Random) -> None:
        """The power fails. Of what was not flushed, parts were on the platter already."""
        if chance.random() < 0.7:
            self._write_back(chance)
        shut_down(self._below, LOSE_LOG)

    def _write_back(self, chance: random.Random) -> None:
        """Some stretches of the image reach the platter unasked, as they do in a disk's cache."""
        file = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        step = chance.choice([4096, 65536, MIB])
        kept = chance.choice([0.2, 0.5, 0.9])
        try:
            for offset in range(0, min(self._size, 1024 * step), step):
                if chance.random() < kept:
                    _libc.sync_file_range(
                        file,
                        ctypes.c_longlong(offset),
                        ctypes.c_longlong(step),
                        SYNC_FILE_RANGE_WRITE_AND_WAIT,
                    )
        finally:
            os.close(file)

    def restart(self) -> None:
        """The power is back: both journals are replayed."""
        unmount(self.place)
        unmount(self._below)
        mount_image(self._platter, self._below, self._outer)
        self._start()

    def close(self) -> None:
        """Gone."""
        for place in (self.place, self._below):
            with contextlib.suppress(OSError):
                unmount(place)
        os.close(self._platter)


def _opened_image(kind: str, path: Path, size: int) -> int:
    """A new file system in an image that has no name any more: it ends with the descriptor. Raises Unable."""
    make(kind, path, size)
    image = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    path.unlink()
    return image


def _write_holes(image: Path) -> None:
    """Give every block of a sparse file its place, so that writing it later changes no metadata below."""
    with image.open("r+b") as file:
        zeros = bytes(MIB)
        size = image.stat().st_size
        at = 0
        while at < size:
            data = file.read(MIB)
            file.seek(at)
            file.write(data or zeros)
            at += len(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def images_folder(scratch: Path) -> Iterator[Path]:
    """A folder for images and mount points, in memory where that is possible."""
    base = MEMORY if os.access(MEMORY, os.W_OK) else scratch
    folder = base / f"walbatch-disks-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
