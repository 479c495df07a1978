"""Collectives that gradients pass through, and sums over groups; all of them work on gloo.

Tensors of unlike vendors meet in a gloo group through host memory only: no vendor's library speaks another's.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 25 * 2**20


class _GatherSequence(torch.autograd.Function):
    """Forward all-gather; backward: the sum of all ranks' gradients, own part of it."""

    @staticmethod
    def forward(context: Any, x: Tensor, dim: int, group: Any) -> Tensor:
        context.dim, context.group, context.size = dim, group, x.shape[dim]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim)

    @staticmethod
    def backward(context: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0].contiguous()
        dist.all_reduce(grad, group=context.group)
        return grad.narrow(context.dim, dist.get_rank(context.group) * context.size, context.size), None, None


def gather_sequence(x: Tensor, dim: int, group: Any) -> Tensor:
    """Every rank's part of dimension `dim`, in the order of ranks."""
    return _GatherSequence.apply(x, dim, group)  # type: ignore[no-any-return,no-untyped-call]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, out: list[int], into: list[int], group: Any) -> Tensor:
        context.splits, context.group = (out, into), group
        return _all_to_all(x, out, into, group)

    @staticmethod
    def backward(context: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        received, sent = context.splits
        return _all_to_all(grads[0], sent, received, context.group), None, None, None


def exchange_rows(x: Tensor, received: list[int], sent: list[int], group: Any) -> Tensor:
    """All-to-all of rows: the first `sent[0]` rows go to rank 0, and so on; backward sends gradients back."""
    return _Exchange.apply(x, received, sent, group)  # type: ignore[no-any-return,no-untyped-call]


def _all_to_all(x: Tensor, received: list[int], sent: list[int], group: Any) -> Tensor:
    out = x.new_empty((sum(received), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out


def sum_over(tensors: Iterable[Tensor], groups: Sequence[Any]) -> None:
    """Replace each tensor by its sum over the groups, one group after the other, in buckets."""
    if not groups:
        return
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        bucket.append(tensor)
        size += tensor.numel() * tensor.element_size()
        if size >= BUCKET_BYTES:
            _sum_bucket(bucket, groups)
            bucket, size = [], 0
    if bucket:
        _sum_bucket(bucket, groups)


def _sum_bucket(bucket: list[Tensor], groups: Sequence[Any]) -> None:
    flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
    for group in groups:
        if flat.device.type != "cpu" and dist.get_backend(group) == "gloo":
            host = flat.cpu()
            dist.all_reduce(host, group=group)
            flat.copy_(host)
        else:
            dist.all_reduce(flat, group=group)
    at = 0
    for tensor in bucket:
        tensor.copy_(flat[at : at + tensor.numel()].view_as(tensor))
        at += tensor.numel()
