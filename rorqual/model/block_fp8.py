"""Block FP8 of the released checkpoints: e4m3 values, and one power-of-two float32 scale for each block of 128 x 128."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
LARGEST = 448.0
"""The largest e4m3 value."""


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of `weight_scale_inv` beside a weight of `shape` [..., out, in]: edge blocks count whole."""
    return (*shape[:-2], -(-shape[-2] // BLOCK), -(-shape[-1] // BLOCK))


def dequantise(values: Tensor, scales: Tensor) -> Tensor:
    """values e4m3 [out, in], scales [ceil(out / 128), ceil(in / 128)] -> float32 [out, in]."""
    rows, columns = values.shape
    wide = scales.float().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return values.float() * wide


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float [out, in] -> e4m3 values [out, in] and float32 scales, amax / 448 rounded up to a power of two in each block."""
    rows, columns = weight.shape
    height, width = scale_shape((rows, columns))
    padded = torch.zeros(height * BLOCK, width * BLOCK)
    padded[:rows, :columns] = weight.float()
    blocks = padded.view(height, BLOCK, width, BLOCK)
    scales = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax((1, 3)).clamp(min=1e-4) / LARGEST)))
    values = (blocks / scales[:, None, :, None]).clamp(-LARGEST, LARGEST).view_as(padded)[:rows, :columns]
    return values.to(torch.float8_e4m3fn), scales
