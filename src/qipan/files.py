"""A small file that is there whole or not at all, whatever is killed or full meanwhile; secrets that are made once; and the text of
a file that a person named."""

import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from qipan.errors import InvalidInput, NotFound

BYTES_MAX = 16 << 20
_making = threading.Lock()


def write_whole(path: Path, body: bytes, mode: int = 0o600) -> None:
    """In place of what `path` held, for readers at any moment and after a crash of the machine: it is on the disk before it
    takes the name.  Raises OSError; `path` is whole then, too."""
    number, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".part", dir=path.parent)
    try:
        with open(number, "wb") as file:
            os.fchmod(number, mode)
            file.write(body)
            file.flush()
            os.fsync(number)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name, too
    finally:
        os.close(folder)


def secret_in(path: Path, make: Callable[[], bytes]) -> bytes:
    """What `path` holds; made once, for threads that ask at the same time, too.  An empty file, left by a release that could stop half
    way, counts as none.  Raises OSError."""
    with _making:
        body = path.read_bytes() if path.exists() else b""
        if not body.strip():
            body = make()
            write_whole(path, body)
        return body


def text_in(path: Path, missing: str, bytes_max: int = BYTES_MAX) -> str:
    """Of a file that a person named; `missing` says what to do where there is none.  Raises NotFound, InvalidInput."""
    try:
        if path.is_file():
            if (size := path.stat().st_size) > bytes_max:
                raise InvalidInput(f"is {size} bytes; a file may have {bytes_max}", str(path))
            return path.read_text(encoding="utf-8")
    except (ValueError, OSError) as error:
        # a zero byte in the name, a name too long, bytes that are no UTF-8
        raise InvalidInput(f"cannot be read as UTF-8 text: {error}", str(path)) from None
    raise NotFound(f"{path}: {missing}")
