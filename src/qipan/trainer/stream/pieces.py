"""What lies in a stream's folder: its shape, the pieces, and how far each rank of the reader is."""

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qipan.errors import InvalidInput
from qipan.trainer.shards import write_index
from qipan.trainer.stream.attempt import with_room

#: extension -> body, of the sample at a position
Prepare = Callable[[int], Mapping[str, bytes]]


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a stream, from its first attempt on.  `piece_bytes`: of the first sample times a piece's, before one was made."""

    samples: int
    per_piece: int
    piece_bytes: int

    @property
    def pieces(self) -> int:
        return -(-self.samples // self.per_piece)

    def pieces_before(self, position: int) -> int:
        """How many pieces lie before it as a whole."""
        return self.pieces if position >= self.samples else position // self.per_piece

    def positions(self, number: int) -> range:
        return range(number * self.per_piece, min(self.samples, (number + 1) * self.per_piece))


@dataclass(frozen=True, slots=True)
class ReaderState:
    """`position`: what it will read next, of several ranks the furthest; `saved`: where it would begin again; `ended`: it reads no more."""

    position: int = 0
    saved: int = 0
    ended: bool = False


def read_shape(folder: Path) -> Shape | None:
    told = read_note(folder / "stream.json")
    return Shape(told["samples"], told["per_piece"], told["piece_bytes"]) if told is not None else None


def read_reader(folder: Path) -> ReaderState:
    """What its ranks said, each in a file of its own."""
    told = [one for path in folder.glob("reader*.json") if (one := read_note(path)) is not None]
    return ReaderState(
        max((one["position"] for one in told), default=0),
        max((one["saved"] for one in told), default=0),
        any(one["ended"] for one in told),
    )


def piece_path(folder: Path, number: int) -> Path:
    return folder / f"piece-{number:09d}.tar"


def write_piece(folder: Path, number: int, positions: Iterable[int], prepare: Prepare) -> int:
    """Prepare and keep one piece.  Made twice it is the same, so a piece that a killed worker had begun is made again.  Returns its bytes.
    Raises InvalidInput for a sample without files, OSError when the disk is full, and what `prepare` raises; then nothing is left of it."""
    part, path = folder / f"piece-{number:09d}.{os.getpid()}.part", piece_path(folder, number)
    try:
        with tarfile.open(part, "w") as file:
            for position in positions:
                files = prepare(position)
                if not files:
                    raise InvalidInput(
                        f"sample {position} has no files; let prepare({position}) give one, such as an empty txt"
                    )
                for extension, body in files.items():
                    member = tarfile.TarInfo(f"{position:012d}.{extension}")
                    member.size = len(body)
                    file.addfile(member, io.BytesIO(body))
        write_index(part).rename(path.with_suffix(".index.json"))
        size = part.stat().st_size
        part.rename(path)
        return size
    except Exception:
        for left in folder.glob(f"{part.stem}.*"):
            left.unlink(missing_ok=True)
        raise


def pieces_in(folder: Path) -> dict[int, int]:
    """Number -> bytes, of the pieces that are whole."""
    found = {}
    for path in folder.glob("piece-*.tar"):
        try:
            found[int(path.stem.removeprefix("piece-"))] = path.stat().st_size
        except FileNotFoundError:
            continue  # the reader dropped it while we looked
    return found


def drop_pieces(folder: Path, below: int) -> None:
    for path in folder.glob("piece-*"):
        if path.suffix != ".part" and int(path.name.removeprefix("piece-").split(".")[0]) < below:
            path.unlink(missing_ok=True)


def read_note(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    except FileNotFoundError:
        return None


def write_note(path: Path, value: dict[str, Any]) -> None:
    part = path.with_suffix(f".{os.getpid()}.part")
    with_room(path.parent, lambda: part.write_text(json.dumps(value)))
    part.rename(path)
