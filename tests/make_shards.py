"""Small shards of all four kinds, made by arithmetic: `make(folder, name, samples)`."""

import io
import struct
import tarfile
import wave
from pathlib import Path


def png(number: int) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (6, 4), (number % 256, 10, 20)).save(out, "PNG")
    return out.getvalue()


def wav(number: int) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(struct.pack("<16h", *[number] * 16))
    return out.getvalue()


def y4m(number: int) -> bytes:
    frame = b"FRAME\n" + bytes([number % 256]) * (8 * 6) + bytes([128]) * (2 * 4 * 3)
    return b"YUV4MPEG2 W8 H6 F25:1 C420\n" + frame * 3


def make(folder: Path, name: str, samples: int, first: int = 0, broken: tuple[int, ...] = ()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.tar"
    with tarfile.open(path, "w") as file:
        for number in range(first, first + samples):
            parts = {
                "txt": f"sample {number}".encode(), "png": png(number), "wav": wav(number), "y4m": y4m(number)[: 40 if number in broken else None],
            }  # fmt: skip
            for extension, body in parts.items():
                member = tarfile.TarInfo(f"{name}-{number:06d}.{extension}")
                member.size = len(body)
                file.addfile(member, io.BytesIO(body))
    return path
