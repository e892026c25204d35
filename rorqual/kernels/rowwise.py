"""Functions of single rows that the model and the cache writers share: norms, rotary turns, the Hadamard transform.

All compute in float32 and go back to x's dtype, so that a kernel that fuses several of them rounds where the model does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels.dispatch import triton_form

FUSED_DTYPES, FUSED_WIDTH = (torch.bfloat16, torch.float16, torch.float32), 1 << 14
"""What the Triton forms take: the rows of one program's registers."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight x / sqrt(mean(x^2) + eps) over the last dim: x [..., D], weight [D]."""
    if form := fused_form("rms_norm", x, weight):
        return form(x, weight, eps)
    y = x.float()
    # Square root and division are exact roundings; torch.rsqrt gives other bits at the end of a tensor on CPU.
    y = y / (y.square().mean(-1, keepdim=True) + eps).sqrt()
    return (y * weight.float()).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """weight (x - mean) / sqrt(variance + eps) + bias over the last dim: x [..., D], weight and bias [D]."""
    return F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps).to(x.dtype)


def turn_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x0, x1), (x2, x3), ... of x [N, ..., R] by each row's angles, cos and sin float32 [N, R/2]."""
    if form := fused_form("turn", x, cos, sin):
        return form(x, cos, sin, True)
    pairs = x.float().unflatten(-1, (-1, 2))
    return _turn(pairs[..., 0], pairs[..., 1], cos, sin, dim=-1).flatten(-2).to(x.dtype)


def turn_half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + R/2}) of x [N, ..., R] by each row's angles, cos and sin float32 [N, R/2]."""
    if form := fused_form("turn", x, cos, sin):
        return form(x, cos, sin, False)
    halves = x.float().unflatten(-1, (2, -1))
    return _turn(halves[..., 0, :], halves[..., 1, :], cos, sin, dim=-2).flatten(-2).to(x.dtype)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, both of one shape."""
    if form := fused_form("silu_product", gate, up):
        return form(gate, up)
    wide = gate.float()
    # torch.sigmoid and silu give other bits at the end of a tensor on CPU; exp and division do not.
    if torch.is_grad_enabled():
        return (wide / (1 + (-wide).exp()) * up.float()).to(gate.dtype)
    return torch.div(wide, wide.neg().exp_().add_(1)).mul_(up.float()).to(gate.dtype)


def fused_form(op: str, x: Tensor, *others: Tensor) -> Callable | None:
    """The function of rowwise_triton.py where it can take x, on a GPU; else None."""
    form = triton_form(op, x, *others, file="rowwise")
    return form if form and x.dtype in FUSED_DTYPES and 0 < x.shape[-1] <= FUSED_WIDTH and x.numel() else None


def _turn(a: Tensor, b: Tensor, cos: Tensor, sin: Tensor, dim: int) -> Tensor:
    """(a, b) turned by each row's angles and stacked on `dim`; a and b [N, ..., R/2]."""
    shape = (a.shape[0], *(1,) * (a.dim() - 2), a.shape[-1])
    cos, sin = cos.view(shape), sin.view(shape)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim)


def hadamard_transform(x: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of the last dim, whose size is a power of two; in float32, back to x's dtype."""
    size = x.shape[-1]
    y = x.float()
    width = 1
    while width < size:
        a, b = y.unflatten(-1, (-1, 2, width)).unbind(-2)
        y = torch.stack([a + b, a - b], -2).flatten(-3)
        width *= 2
    return (y * size**-0.5).to(x.dtype)
