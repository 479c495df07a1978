"""Feed-forward blocks: dense (SwiGLU, Shazeer 2020), and a layer of experts (Shazeer et al. 2017; routing of Mixtral, Jiang et al. 2024): every token goes to its k best
experts, none is dropped.  With expert parallelism a rank holds some experts whole, and tokens travel to them and
back."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from qipan.trainer.collectives import exchange_rows
from qipan.workload.model import Moe


def is_expert_layer(moe: Moe, number: int) -> bool:
    return number >= moe.dense_layers and (number - moe.dense_layers) % moe.every == 0


class Mlp(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, width, bias=False)
        self.up = nn.Linear(hidden, width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class Experts(nn.Module):
    """Weights are (experts, in, out): one tensor a matrix, so that a rank's share is a slice of the first dimension."""

    def __init__(self, hidden: int, moe: Moe) -> None:
        super().__init__()
        self.chosen = moe.experts_per_token
        self.count = moe.experts
        width = moe.expert_ffn_hidden
        self.router = nn.Linear(hidden, moe.experts, bias=False)
        self.gate = nn.Parameter(torch.empty(moe.experts, hidden, width))
        self.up = nn.Parameter(torch.empty(moe.experts, hidden, width))
        self.down = nn.Parameter(torch.empty(moe.experts, width, hidden))
        self.shared = Mlp(hidden, moe.shared_experts * width) if moe.shared_experts else None
        self.group: Any = None  # the ranks that hold the other experts

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, seq, hidden)."""
        rows = x.reshape(-1, x.shape[-1])
        best, expert = functional.softmax(self.router(rows).float(), dim=-1).topk(self.chosen, dim=-1)
        weight = (best / best.sum(dim=-1, keepdim=True)).reshape(-1).type_as(rows)
        order = torch.argsort(expert.reshape(-1), stable=True)
        source = order // self.chosen
        counts = torch.bincount(expert.reshape(-1), minlength=self.count)
        out = self._visit(rows[source], counts) * weight[order, None]
        y = torch.zeros_like(rows).index_add(0, source, out.type_as(rows))
        if self.shared is not None:
            y = y + self.shared(rows)
        return y.view_as(x)

    def _visit(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Rows sorted by expert, `counts` of each; returns what the experts made of them, in the same order."""
        if self.group is None:
            return self._work(rows, counts[None])
        ranks = dist.get_world_size(self.group)
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.group)
        here = arriving.view(ranks, -1)  # [from rank, own expert]
        sent, received = counts.view(ranks, -1).sum(1).tolist(), here.sum(1).tolist()
        out = self._work(exchange_rows(rows, received, sent, self.group), here)
        return exchange_rows(out, sent, received, self.group)

    def _work(self, rows: Tensor, counts: Tensor) -> Tensor:
        """counts: (sources, own experts); rows lie by source, then by expert.  An expert without rows still takes part,
        so that every weight has a gradient on every rank."""
        gate, up, down = (_own(weight) for weight in (self.gate, self.up, self.down))
        experts = torch.arange(counts.shape[1], device=rows.device).repeat(counts.shape[0])
        expert = experts.repeat_interleave(counts.reshape(-1))
        out = torch.zeros_like(rows)
        for i in range(counts.shape[1]):
            at = (expert == i).nonzero()[:, 0]
            mine = rows[at]
            hidden = functional.silu(mine @ gate[i]) * (mine @ up[i])
            out = out.index_copy(0, at, (hidden @ down[i]).type_as(rows))
        return out


def _own(weight: Any) -> Tensor:
    return weight.to_local() if hasattr(weight, "device_mesh") else weight  # type: ignore[no-any-return]
