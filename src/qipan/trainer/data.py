"""Text as tokens: where it lies, how it is split, and which rows a step takes.

The order of samples is a function of (seed, step, row), never of the rank, so any number of workers sees the same.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qipan.errors import InvalidInput
from qipan.trainer.shards import Reader

FORTUNES = Path("/usr/share/games/fortunes")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
UNKNOWN = 0


@dataclass(frozen=True, slots=True)
class Corpus:
    """Token streams of the three parts; `vocab` counts the tokens, `unknown` (0) among them."""

    train: npt.NDArray[np.int64]
    validation: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]
    vocab: int
    token: Mapping[str, int] = field(default_factory=dict)  # of each character of the training part


def load_corpus(uris: tuple[str, ...]) -> Corpus:
    """One token per character of the training part, plus `unknown`.  Raises InvalidInput."""
    texts = [text for uri in uris for text in read_texts(uri)]
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for text in texts:
        parts[part_of(text)].append(text)
    for name, found in parts.items():
        if not found:
            raise InvalidInput(f"{', '.join(uris)}: {len(texts)} texts leave none for {name}; give more text")
    characters = sorted(set("".join(parts["train"]) + "\n"))
    token = {character: i + 1 for i, character in enumerate(characters)}

    def stream(found: list[str]) -> npt.NDArray[np.int64]:
        return np.array(
            [token.get(character, UNKNOWN) for text in found for character in text + "\n"], dtype=np.int64
        )

    return Corpus(
        stream(parts["train"]), stream(parts["validation"]), stream(parts["test"]), len(characters) + 1, token
    )


def part_of(text: str) -> str:
    """Split by hash: 80 % train, 10 % validation, 10 % test."""
    bucket = hashlib.blake2b(text.encode(), digest_size=2).digest()[0] % 10
    return "validation" if bucket == 0 else "test" if bucket == 1 else "train"


def read_texts(uri: str) -> list[str]:
    """`fortunes:tang300+song100` (Debian's fortunes-zh), `file:PATH` (texts apart by blank lines), or `shards:FOLDER` (the
    text parts of its samples)."""
    scheme, _, rest = uri.partition(":")
    if scheme == "fortunes":
        return [text for name in rest.split("+") for text in _fortunes(name)]
    if scheme == "file":
        path = Path(rest)
        if not path.is_file():
            raise InvalidInput(f"{uri}: no such file; give file:PATH of a UTF-8 text")
        return [text.strip() for text in path.read_text(encoding="utf-8").split("\n\n") if text.strip()]
    if scheme == "shards":
        rows = Reader.of([Path(rest)])
        return [row["text"] for row in rows.rows(range(len(rows.samples))) if row.get("text", "").strip()]
    raise InvalidInput(
        f"{uri}: the built-in trainer reads `fortunes:NAME+NAME`, `file:PATH` and the text of `shards:FOLDER`"
    )


def _fortunes(name: str) -> list[str]:
    path = FORTUNES / name
    if not path.is_file():
        raise InvalidInput(f"fortunes:{name}: {path} is not there; install the Debian package fortunes-zh")
    texts = COLOUR.sub("", path.read_text(encoding="utf-8")).split("\n%")
    return [text.strip("% \n") for text in texts if text.strip("% \n")]


def row_offsets(seed: int, step: int, rows: int, tokens: int, seq: int) -> npt.NDArray[np.int64]:
    """Where each row of a step's global batch begins in the training stream.  Shape (rows,)."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, step], dtype=np.uint64)))
    return generator.integers(0, tokens - seq - 1, size=rows, dtype=np.int64)


def unigram_loss(corpus: Corpus) -> float:
    """Nat per token on the test part of an add-1 (Laplace) unigram of the training part."""
    counts = np.bincount(corpus.train, minlength=corpus.vocab).astype(np.float64) + 1.0
    return float(-np.log(counts / counts.sum())[corpus.test[1:]].mean())
