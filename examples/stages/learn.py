"""The fed stage: a plain torch loop over the stream.  Killed, it goes on from its checkpoint and reads from there again."""

import torch
from poem_model import codes, loss_of, make_model

from qipan.trainer import attach, fed

ROWS = 64
torch.set_num_threads(1)
model = make_model()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
with fed("prepare") as stream:
    run = attach(model, optimizer)
    run.reads(stream, ROWS)
    for step in run.steps(stream.samples // ROWS):
        rows = stream.rows(range(step * ROWS, (step + 1) * ROWS))
        loss = loss_of(model, torch.tensor([codes(row["text"]) for row in rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.report(loss)
print(
    f"learn: loss {float(loss.detach()):.3f} nat per character, waited {stream.wait_share():.1%} of its time"
)
