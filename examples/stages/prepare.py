"""The feeding stage: the sample at a position is a window of a poem, a function of (seed, epoch, position) alone."""

import random

from qipan.trainer import feed
from qipan.trainer.data import part_of, read_texts
from qipan.trainer.shards import place

SEED, WINDOW = 7, 24
poems = [text for text in read_texts("fortunes:tang300") if part_of(text) == "train" and len(text) > WINDOW]


def prepare(position: int) -> dict[str, bytes]:
    epoch, within = divmod(position, len(poems))
    poem = poems[place(len(poems), SEED, epoch, within)]
    start = random.Random(f"{SEED}/{position}").randrange(len(poem) - WINDOW)
    return {"txt": poem[start : start + WINDOW + 1].encode()}


feed(prepare)
