"""Values of the model on the wire, in blocks of BLOCK values, in plain torch operations."""

import torch
from torch import Tensor

from qipan.strategy import CODEC_BLOCK, CODEC_BYTES

BLOCK, BYTES = CODEC_BLOCK, CODEC_BYTES


def encode(values: Tensor, codec: str) -> Tensor:
    """(blocks, BLOCK) fp32 -> (blocks, BYTES[codec]) uint8.  int8: one fp32 scale a block, the largest value / 127."""
    values = values.cpu()
    if not len(values):
        return torch.empty((0, BYTES[codec]), dtype=torch.uint8)
    if codec == "fp32":
        return values.contiguous().view(-1).view(torch.uint8).view(len(values), -1)
    if codec == "bf16":
        return values.bfloat16().contiguous().view(-1).view(torch.uint8).view(len(values), -1)
    scale = values.abs().amax(dim=1, keepdim=True) / 127
    steps = (
        torch.where(scale > 0, values / scale.clamp_min(1e-38), 0.0).round().clamp(-127, 127).to(torch.int8)
    )
    return torch.cat((steps.view(torch.uint8), scale.view(-1).view(torch.uint8).view(-1, 4)), dim=1)


def decode(data: Tensor, codec: str) -> Tensor:
    """The inverse of `encode`, on the CPU: every site decodes alike, its own part too."""
    if not len(data):
        return torch.empty((0, BLOCK))
    if codec == "fp32":
        return _laid_out(data).view(torch.float32).view(-1, BLOCK)
    if codec == "bf16":
        return _laid_out(data).view(torch.bfloat16).view(-1, BLOCK).float()
    steps = data[:, :BLOCK].view(torch.int8)
    scale = _laid_out(data[:, BLOCK:]).view(torch.float32)
    return steps.float() * scale


def _laid_out(data: Tensor) -> Tensor:
    """A copy whose bytes may be viewed as other types: in a frame they lie unaligned."""
    return torch.empty(data.shape, dtype=torch.uint8).copy_(data)


def checksum(values: Tensor, first: Tensor) -> int:
    """A sum over blocks of a hash of (block number, bits), modulo 2**64: the same however blocks lie on ranks.
    values: (blocks, BLOCK) fp32; first: (blocks,) block numbers."""
    bits = values.cpu().contiguous().view(torch.int32).long()
    place = torch.arange(1, BLOCK + 1) * 0x1E3779B97F4A7C15 | 1
    blocks = (bits * place).sum(dim=1)
    mixed = (blocks ^ (blocks >> 29)) * 0x3F58476D1CE4E5B9 + (first.cpu() + 1) * 0x14D049BB133111EB
    return int((mixed ^ (mixed >> 31)).sum())
