"""A folder as a storage keeps it: what lies here already is not sent again, be it an earlier copy or the part of one that a cut
link ended.  Every chunk is verified when it comes; the folder is exchanged whole, when all of it is here."""

import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qipan.errors import QipanError
from qipan.staging import Bucket, ChunkId, Manifest, Place, Work, plan
from qipan.transfer.parallel import in_parallel
from qipan.transfer.storage import WORKERS, ContentStorage


@dataclass(slots=True)
class Progress:
    """Counted while it goes on: `sent_bytes` came over the link and were verified, `here_bytes` lay on this side."""

    total_bytes: int = 0
    here_bytes: int = 0
    sent_bytes: int = 0
    stop: bool = False


class Pace:
    """One link's share, whoever sends over it."""

    def __init__(
        self,
        bytes_per_s: float,
        burst_bytes: int,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._bucket, self._lock = Bucket(bytes_per_s, burst_bytes, monotonic()), threading.Lock()
        self._monotonic, self._sleep = monotonic, sleep

    def wait(self, size_bytes: int) -> None:
        with self._lock:
            wait_s = self._bucket.take(size_bytes, self._monotonic())
        self._sleep(wait_s)


def fetch(
    source: ContentStorage, manifest: Manifest, folder: Path, progress: Progress, pace: Pace | None = None, workers: int = WORKERS
) -> None:  # fmt: skip
    """`folder` becomes what the manifest says; what else it held goes.  Raises Unreachable, QipanError; called again it goes on."""
    incoming, before = (folder.with_name(f"{folder.name}.qipan-{what}") for what in ("incoming", "before"))
    shutil.rmtree(before, ignore_errors=True)
    old, parts = hashes(folder, manifest.chunk_bytes), hashes(incoming, manifest.chunk_bytes)
    found = {chunk: (folder / place.path, place.offset) for place, chunk in old}
    stays = (
        parts & manifest.placed()
    )  # what lies in its place is never written over, so it may be copied from
    found |= {chunk: (incoming / place.path, place.offset) for place, chunk in stays}
    _shape(incoming, manifest)
    work = plan(manifest, parts, found)
    progress.total_bytes = manifest.size_bytes
    progress.here_bytes = manifest.size_bytes - sum(one.length for one in work if one.found is None)
    files = {file.path: os.open(incoming / file.path, os.O_WRONLY) for file in manifest.files}
    try:
        for one in work:
            if one.found is not None:
                path, offset = one.found
                with path.open("rb") as file:
                    _place(files, one, memoryview(os.pread(file.fileno(), one.length, offset)))
        missing = [one for one in work if one.found is None]
        in_parallel(missing, _getting(source, files, progress, pace), workers)
    finally:
        for number in files.values():
            os.close(number)
    if folder.exists():
        folder.rename(before)
    incoming.rename(folder)
    shutil.rmtree(before, ignore_errors=True)


def _getting(
    source: ContentStorage, files: dict[str, int], progress: Progress, pace: Pace | None
) -> Callable[[Work[tuple[Path, int]]], None]:
    from blake3 import blake3

    counting = threading.Lock()

    def get(one: Work[tuple[Path, int]]) -> None:
        if progress.stop:
            raise QipanError("the copy was given up; ask again and it goes on")
        if pace is not None:
            pace.wait(one.length)
        hashed, at = blake3(), 0
        for piece in source.pieces(one.chunk):
            hashed.update(piece)
            _place(files, one, piece[: one.length - at], at)
            at += len(piece)
        if at != one.length or hashed.hexdigest() != one.chunk:
            raise QipanError(
                f"storage {source.storage_id}: the chunk {one.chunk[:12]} came with other bytes; write the data there anew"
            )
        with counting:
            progress.sent_bytes += at

    return get


def _place(files: dict[str, int], one: Work[tuple[Path, int]], body: memoryview, first: int = 0) -> None:
    for place in one.to:
        at = 0
        while at < len(body):
            at += os.pwrite(files[place.path], body[at:], place.offset + first + at)


def _shape(incoming: Path, manifest: Manifest) -> None:
    """Every file at its length; what is not in the manifest goes."""
    wanted = {file.path for file in manifest.files}
    for path in [Path(above, name) for above, _, names in os.walk(incoming) for name in names]:
        if path.relative_to(incoming).as_posix() not in wanted or path.is_symlink():
            path.unlink()
    incoming.mkdir(parents=True, exist_ok=True)
    for file in manifest.files:
        path = incoming / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as opened:
            opened.truncate(file.size_bytes)


def hashes(folder: Path, chunk_bytes: int) -> set[tuple[Place, ChunkId]]:
    """What the folder's files hold."""
    from blake3 import blake3

    found = set()
    for path in [Path(above, name) for above, _, names in os.walk(folder) for name in names]:
        if path.is_symlink():
            continue
        with path.open("rb") as file:
            at = 0
            while body := file.read(chunk_bytes):
                found.add((Place(path.relative_to(folder).as_posix(), at), ChunkId(blake3(body).hexdigest())))
                at += len(body)
    return found
