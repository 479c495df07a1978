"""After the training: the loss on poems that no stage before has seen, beside that of counting characters."""

import math
from collections import Counter

import torch
from poem_model import CONTEXT, codes, loss_of, make_model

from qipan.trainer import checkpoint, output_of
from qipan.trainer.data import part_of, read_texts

poems = read_texts("fortunes:tang300")
model = make_model()
checkpoint.load(checkpoint.committed(output_of())[-1].path, model, None)
held_out = [codes(text) for text in poems if part_of(text) == "test" and len(text) > CONTEXT]
seen = Counter(code for text in poems if part_of(text) == "train" for code in codes(text))
total = sum(seen.values())
counted, learned, characters = 0.0, 0.0, 0
with torch.no_grad():
    for poem in held_out:
        targets = poem[CONTEXT:]
        learned += float(loss_of(model, torch.tensor([poem]))) * len(targets)
        counted -= sum(math.log((seen[code] + 1) / (total + len(seen))) for code in targets)
        characters += len(targets)
print(
    f"evaluate: {learned / characters:.3f} nat per character on {len(held_out)} held-out poems; counting: {counted / characters:.3f}"
)
