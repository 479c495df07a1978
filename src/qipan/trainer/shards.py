"""Samples of text, image, audio and video in tar files with a sidecar index, from one or many sources.

A shard is `NAME.tar` beside `NAME.index.json`; the files `KEY.EXT` of one KEY are one sample (the naming of WebDataset). Which sample stands
at a position is a function of (seed, epoch, position) alone, so any number of ranks and any restart see one order.
"""

import hashlib
import io
import json
import tarfile
import threading
import wave
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qipan.errors import InvalidInput

KINDS = {
    "txt": "text", "json": "text", "png": "image", "jpg": "image", "jpeg": "image", "ppm": "image", "wav": "audio", "y4m": "video",
}  # fmt: skip
ROUNDS = 4  # of the Feistel network
PREFETCH_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Sample:
    """Where one sample lies: extension -> (offset, size) in its tar."""

    tar: Path
    key: str
    parts: tuple[tuple[str, int, int], ...]

    @property
    def size(self) -> int:
        return sum(size for _, _, size in self.parts)


def write_index(tar: Path) -> Path:
    """Scan a tar once and write its sidecar.  Raises InvalidInput."""
    found: dict[str, list[tuple[str, int, int]]] = {}
    try:
        with tarfile.open(tar, "r:") as file:
            for member in file:
                if member.isfile():
                    key, _, extension = member.name.partition(".")
                    found.setdefault(key, []).append((extension.lower(), member.offset_data, member.size))
    except (OSError, tarfile.TarError) as error:
        raise InvalidInput(f"{tar}: is no plain tar file: {error}") from None
    path = tar.with_suffix(".index.json")
    samples = [{"key": key, "parts": parts} for key, parts in found.items()]
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"bytes": tar.stat().st_size, "samples": samples}))
    part.rename(path)
    return path


def read_source(folder: Path) -> list[Sample]:
    """Every sample of a folder's shards, in the order of names.  Raises InvalidInput."""
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise InvalidInput(f"{folder}: has no .tar; make shards of KEY.txt, KEY.png, KEY.wav, KEY.y4m")
    return [sample for tar in tars for sample in read_index(tar)]


def read_index(tar: Path) -> list[Sample]:
    path = tar.with_suffix(".index.json")
    if not path.exists():
        write_index(tar)
    try:
        index = json.loads(path.read_text())
        if index["bytes"] != tar.stat().st_size:
            raise InvalidInput(f"{path}: is of another {tar.name}; delete it, it is made anew")
        return [
            Sample(tar, one["key"], tuple((name, int(at), int(size)) for name, at, size in one["parts"]))
            for one in index["samples"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{path}: is no index: {error!r}; delete it, it is made anew") from None


def place(count: int, seed: int, epoch: int, position: int) -> int:
    """The sample at a position: a permutation of range(count) for each (seed, epoch), in constant memory.  A Feistel
    network over the next even number of bits, walked until it falls inside (Black and Rogaway 2002)."""
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    value = position
    while True:
        left, right = value >> half, value & mask
        for turn in range(ROUNDS):
            word = f"{seed}/{epoch}/{turn}/{right}".encode()
            left, right = (
                right,
                left ^ (int.from_bytes(hashlib.blake2b(word, digest_size=8).digest(), "big") & mask),
            )
        value = left << half | right
        if value < count:
            return value


@dataclass(slots=True)
class Reader:
    """Decoded samples by position.  `bad_share`: so much of what was read may be broken; a broken sample is replaced by the
    one at the next position, alike on every rank.  Sources are joined; give one twice to weigh it double."""

    samples: list[Sample]
    seed: int = 0
    bad_share: float = 0.01
    bad_least: int = 3  # broken samples that are always forgiven
    prefetch_bytes: int = PREFETCH_BYTES
    read: int = 0
    bad: list[str] = field(default_factory=list)

    @staticmethod
    def of(folders: Sequence[Path], seed: int = 0, **more: Any) -> "Reader":
        return Reader([sample for folder in folders for sample in read_source(folder)], seed, **more)

    def at(self, position: int) -> Sample:
        epoch, within = divmod(position, len(self.samples))
        return self.samples[place(len(self.samples), self.seed, epoch, within)]

    def rows(self, positions: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The samples at these positions, read ahead up to `prefetch_bytes`.  Raises InvalidInput over the budget."""
        ahead = _Ahead([self.at(position) for position in positions], self.prefetch_bytes)
        try:
            for number, position in enumerate(positions):
                yield self._decoded(ahead.take(number), position)
        finally:
            ahead.close()

    def _decoded(self, data: "dict[str, bytes] | OSError", position: int) -> dict[str, Any]:
        for further in range(len(self.samples)):
            sample = self.at(position + further)
            self.read += 1
            try:
                if further:
                    data = bytes_of(sample)
                if isinstance(data, OSError):
                    raise data
                return {"key": sample.key, **{KINDS[name]: decode(name, body) for name, body in data.items()}}
            except (OSError, ValueError, KeyError, EOFError, wave.Error) as error:
                self.bad.append(f"{sample.tar.name}:{sample.key}: {error!r}"[:200])
                if len(self.bad) > max(self.bad_least, self.bad_share * self.read):
                    raise InvalidInput(
                        f"{len(self.bad)} of {self.read} samples are broken, {self.bad_share:.1%} are allowed; "
                        f"the last: {self.bad[-1]}"
                    ) from None
        raise InvalidInput("every sample is broken")


def decode(extension: str, body: bytes) -> Any:
    """text: str; image: (height, width, 3) uint8; audio: (frames, channels) float32; video: (frames, height, width)
    uint8 of luma.  Raises ValueError, KeyError for an unknown extension."""
    return DECODERS[KINDS[extension]](body)


def _text(body: bytes) -> str:
    return body.decode("utf-8")


def _image(body: bytes) -> Any:
    if body[:2] == b"P6":
        fields = body.split(maxsplit=4)
        width, height = int(fields[1]), int(fields[2])
        pixels = body[-width * height * 3 :]
        return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)
    from PIL import Image  # only for PNG and JPEG

    with Image.open(io.BytesIO(body)) as image:
        return np.asarray(image.convert("RGB"))


def _audio(body: bytes) -> Any:
    with wave.open(io.BytesIO(body)) as file:
        if file.getsampwidth() != 2:
            raise ValueError(f"{8 * file.getsampwidth()} bits a value; 16 are read")
        values = np.frombuffer(file.readframes(file.getnframes()), np.int16)
        return values.reshape(-1, file.getnchannels()).astype(np.float32) / 32768


def _video(body: bytes) -> Any:
    """YUV4MPEG2 with 4:2:0 colour or none: luma only."""
    head, _, rest = body.partition(b"\n")
    words = head.decode("ascii").split()
    if words[:1] != ["YUV4MPEG2"]:
        raise ValueError("is no YUV4MPEG2 stream")
    told = {word[0]: word[1:] for word in words[1:]}
    width, height = int(told["W"]), int(told["H"])
    colour = 0 if told.get("C", "420").startswith("mono") else 2 * ((width + 1) // 2) * ((height + 1) // 2)
    frames = []
    while rest:
        mark, _, rest = rest.partition(b"\n")
        if not mark.startswith(b"FRAME") or len(rest) < width * height + colour:
            raise ValueError("is cut within a frame")
        frames.append(np.frombuffer(rest[: width * height], np.uint8).reshape(height, width))
        rest = rest[width * height + colour :]
    return np.stack(frames)


DECODERS: dict[str, Callable[[bytes], Any]] = {
    "text": _text,
    "image": _image,
    "audio": _audio,
    "video": _video,
}


def bytes_of(sample: Sample) -> dict[str, bytes]:
    with sample.tar.open("rb") as file:
        found = {}
        for name, at, size in sample.parts:
            file.seek(at)
            body = file.read(size)
            if len(body) < size:
                raise OSError(f"{sample.tar}: ends before {sample.key}.{name}")
            found[name] = body
        return found


class _Ahead:
    """Reads samples in order in a thread, while no more than so many bytes wait to be taken (one sample always may)."""

    def __init__(self, samples: Sequence[Sample], limit_bytes: int) -> None:
        self._samples, self._limit = samples, limit_bytes
        self._ready: OrderedDict[int, dict[str, bytes] | OSError] = OrderedDict()
        self._waiting = 0  # bytes
        self.most_bytes = 0
        self._closed = False
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def take(self, number: int) -> "dict[str, bytes] | OSError":
        with self._changed:
            self._changed.wait_for(lambda: number in self._ready)
            data = self._ready.pop(number)
            self._waiting -= self._samples[number].size
            self._changed.notify_all()
            return data

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        for number, sample in enumerate(self._samples):
            with self._changed:
                while not self._closed and self._ready and self._waiting + sample.size > self._limit:
                    self._changed.wait()
                if self._closed:
                    return
            data: dict[str, bytes] | OSError
            try:
                data = bytes_of(sample)
            except OSError as error:
                data = error
            with self._changed:
                self._ready[number] = data
                self._waiting += sample.size
                self.most_bytes = max(self.most_bytes, self._waiting)
                self._changed.notify_all()
