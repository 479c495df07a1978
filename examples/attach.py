"""A plain torch loop; the four marked lines give it progress, checkpoints, parking and restarts on other numbers of ranks.

Alone: `python examples/attach.py`.  Under Qipan: `qipan submit examples/attach.yaml`."""

import torch

import qipan.trainer  # 1

torch.manual_seed(1)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
run = qipan.trainer.attach(model, optimizer)  # 2
for step in run.steps(300):  # 3: instead of range(300)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(step))
    loss = (model(x)[:, 0] - x.prod(dim=1).sin()).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    run.report(loss)  # 4
print(f"loss {float(loss.detach()):.4f}")
