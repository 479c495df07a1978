"""Data between sites, decided purely: what a folder holds by content, which bytes of it are missing where, how fast a link may
be used, and what a storage may let go.  Chunks are named by the BLAKE3 of their bytes; `transfer` moves them.
"""

import re
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, NewType, TypeVar

from qipan.errors import InvalidInput

ChunkId = NewType("ChunkId", str)  # 64 hex digits
CHUNK_BYTES = 8 * 2**20
UNNAMED_S = 3600.0  # a chunk that no manifest names is kept so long: its manifest may be on the way
PART = re.compile(r"[^/\\\0\ud800-\udfff]{1,255}")  # surrogates: a name that is not UTF-8
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class StagedFile:
    """`path` is relative, its parts divided by "/".  Every chunk has the manifest's `chunk_bytes`, the last one the rest."""

    path: str
    size_bytes: int
    chunks: tuple[ChunkId, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a folder held.  `attempt` and `saved_s` are those of the task that wrote it: of two, the later is that which has more."""

    name: str
    attempt: int
    saved_s: float
    written_s: float
    chunk_bytes: int
    files: tuple[StagedFile, ...]

    @property
    def order(self) -> tuple[int, float, float]:
        return self.attempt, self.saved_s, self.written_s

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    def placed(self) -> "set[tuple[Place, ChunkId]]":
        return {
            (Place(file.path, number * self.chunk_bytes), chunk)
            for file in self.files
            for number, chunk in enumerate(file.chunks)
        }


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes of a file: from `offset`, the chunk's length."""

    path: str
    offset: int


@dataclass(frozen=True, slots=True)
class Work(Generic[Found]):
    """One chunk that is not yet everywhere it should be.  `found`: where its bytes already are on this side; None: they come
    over the link."""

    chunk: ChunkId
    length: int
    to: tuple[Place, ...]
    found: Found | None


def checked(manifest: Manifest) -> Manifest:
    """A manifest comes from another site: it may write below its folder only.  Raises InvalidInput."""
    if manifest.chunk_bytes <= 0:
        raise InvalidInput(f"manifest {manifest.name[:80]!r}: chunk_bytes is {manifest.chunk_bytes}")
    for file in manifest.files:
        parts = file.path.split("/")
        if any(not PART.fullmatch(part) or part in (".", "..") for part in parts):
            raise InvalidInput(
                f"manifest {manifest.name[:80]!r}: {file.path[:200]!r} is no path below a folder"
            )
        if file.size_bytes < 0 or len(file.chunks) != -(-file.size_bytes // manifest.chunk_bytes):
            raise InvalidInput(
                f"manifest {manifest.name[:80]!r}: {file.path[:200]!r} has {len(file.chunks)} chunks for {file.size_bytes} bytes"
            )
        if any(not re.fullmatch("[0-9a-f]{64}", chunk) for chunk in file.chunks):
            raise InvalidInput(
                f"manifest {manifest.name[:80]!r}: a chunk of {file.path[:200]!r} has no BLAKE3 name"
            )
    return manifest


def plan(
    manifest: Manifest, placed: Collection[tuple[Place, ChunkId]], found: Mapping[ChunkId, Found]
) -> list[Work[Found]]:
    """What is missing, in the order of the files; each chunk once, however often it stands in them.  `placed`: what already
    lies where it should; `found`: chunks whose bytes lie elsewhere on this side."""
    to: dict[ChunkId, list[Place]] = {}
    lengths: dict[ChunkId, int] = {}
    for file in manifest.files:
        for number, chunk in enumerate(file.chunks):
            place = Place(file.path, number * manifest.chunk_bytes)
            lengths[chunk] = min(manifest.chunk_bytes, file.size_bytes - place.offset)
            if (place, chunk) not in placed:
                to.setdefault(chunk, []).append(place)
    return [Work(chunk, lengths[chunk], tuple(places), found.get(chunk)) for chunk, places in to.items()]


class Bucket:
    """A token bucket: `rate_bytes_per_s` on average, at most `burst_bytes` at once."""

    def __init__(self, rate_bytes_per_s: float, burst_bytes: float, now_s: float) -> None:
        self._rate, self._burst, self._level, self._at_s = rate_bytes_per_s, burst_bytes, burst_bytes, now_s

    def take(self, size_bytes: int, now_s: float) -> float:
        """Seconds to wait before these bytes may be sent; they are taken at once, so that those who come later wait longer."""
        passed_s = max(0.0, now_s - self._at_s)
        self._level = min(self._burst, self._level + passed_s * self._rate) - size_bytes
        self._at_s = max(self._at_s, now_s)
        return max(0.0, -self._level / self._rate)


def newest(found: Iterable[tuple[Hashable, Manifest]]) -> tuple[Hashable, Manifest] | None:
    """(where, manifest) of the one with most work in it; of equal ones the first."""
    best: tuple[Hashable, Manifest] | None = None
    for where, manifest in found:
        if best is None or manifest.order > best[1].order:
            best = where, manifest
    return best


def outdated(manifests: Mapping[str, float], now_s: float, keep_s: float) -> list[str]:
    """Names of manifests that may go.  `manifests`: name -> when it was written.  There is one for each task, its newest."""
    return sorted(name for name, written_s in manifests.items() if written_s < now_s - keep_s)


def unnamed(chunks: Mapping[ChunkId, float], named: Collection[ChunkId], now_s: float) -> list[ChunkId]:
    """Chunks that no manifest names and that were written (when: `chunks`) long enough ago."""
    return sorted(
        chunk for chunk, written_s in chunks.items() if chunk not in named and written_s < now_s - UNNAMED_S
    )
