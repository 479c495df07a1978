"""A disk without room: known by what the system or a database says of it, and waited for until it has room again."""

import errno
import os
import shutil
import sqlite3
from pathlib import Path

from qipan.errors import DiskFull

ROOM_BYTES = 4 << 20  # a board begins only where so much is free
FILE_BYTES = 1 << 16
FULL = (errno.ENOSPC, errno.EDQUOT)


def is_full(error: BaseException | None) -> bool:
    """Whether this error, or one that it came from, is a full disk's."""
    while error is not None:
        if isinstance(error, DiskFull):
            return True
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if isinstance(error, sqlite3.Error) and _code(error) == sqlite3.SQLITE_FULL:
            return True
        error = error.__cause__
    return False


def says_full(text: str) -> bool:
    """Where the number of the system's error was lost on the way."""
    return any(os.strerror(number) in text for number in FULL)


def full(path: Path, error: sqlite3.Error) -> DiskFull | None:
    """What SQLite means; beside its own word for it a disk without room shows as an input-output error of some file."""
    if is_full(error) or (_code(error) == sqlite3.SQLITE_IOERR and not takes_a_file(path.parent)):
        return DiskFull(f"nothing can be stored in {path}: {told(path.parent)}")
    return None


def has_room(folder: Path) -> bool:
    return shutil.disk_usage(folder).free >= ROOM_BYTES


def takes_a_file(folder: Path) -> bool:
    """Whether there is room, and a small file finds it: a quota or a lack of inodes shows in no figure of the disk."""
    probe = folder / f"room.{os.getpid()}.probe"
    try:
        with probe.open("wb") as file:
            file.write(bytes(FILE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return not is_full(error)  # what else is wrong will be said by whoever needs the folder
    finally:
        probe.unlink(missing_ok=True)
    return has_room(folder)


def told(folder: Path) -> str:
    """For people, after something found no room: whether the disk is full, or something smaller than the disk."""
    use = shutil.disk_usage(folder)
    free = f"{use.free:,} of {use.total:,} bytes"
    if use.free < ROOM_BYTES:
        return f"its disk is full, {free} are free and {ROOM_BYTES:,} are needed; make room, it goes on by itself"
    return f"no room was left, though {free} of its disk are free now: it needs more, or a quota, a number of files or a size limit is reached; make room, it goes on by itself"


def _code(error: sqlite3.Error) -> int:
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF  # without the part that tells where
