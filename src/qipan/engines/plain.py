"""Files in a folder that a task may write too: a link or a pipe that it put in a file's place is neither read nor written
through, for it may lead anywhere, or hold up whoever opens it.  The supervisor needs it, so it imports little."""

import errno
import io
import os
import stat

PLAIN = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
Path = str | os.PathLike[str]


def opened(path: Path) -> io.BufferedReader:
    """For reading.  Raises OSError, also where it is no plain file."""
    number = os.open(path, os.O_RDONLY | PLAIN)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "no plain file", str(path))
    return os.fdopen(number, "rb")


def read_text(path: Path, bytes_max: int = -1) -> str:
    """Its first `bytes_max`.  Raises OSError."""
    with opened(path) as file:
        return file.read(bytes_max).decode(errors="replace")


def read_piece(path: Path, first: int, most: int) -> bytes:
    """At most `most` bytes from byte `first` on; nothing before them is read.  Raises OSError."""
    with opened(path) as file:
        file.seek(first)
        return file.read(most)


def size_of(path: Path) -> int:
    """0 where there is no plain file."""
    try:
        found = os.lstat(path)
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def write_text(path: Path, text: str) -> None:
    """What is no plain file there goes first.  Raises OSError."""
    if os.path.islink(path) or (os.path.exists(path) and not os.path.isfile(path)):
        os.unlink(path)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | PLAIN, 0o644), "w") as file:
        file.write(text)
