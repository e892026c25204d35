"""Norms, rotary turns and SwiGLU's product in Triton with their gradients: one pass over memory each, for training on a GPU.

Repeatable: a norm's weight gets its gradient from partial sums that programs keep of rows of their own, added in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from rorqual.kernels.experts_triton import swiglu, swiglu_gradient

PROGRAMS = 1024
"""Of a norm's backward at most: so many partial sums of the weight's gradient."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The contract is that of `rorqual.kernels.rowwise.rms_norm`, for what its `fused_form` lets through."""
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[return-value]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = _rows(x)
        out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
        N, D = rows.shape
        block, height = triton.next_power_of_2(D), _height(D)
        norm_kernel[(triton.cdiv(N, height),)](rows, weight, out, N, rows.stride(0), eps, D=D, B=block, R=height, num_warps=4)
        ctx.save_for_backward(rows, weight)
        ctx.eps = eps
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        N, D = rows.shape
        block, height = triton.next_power_of_2(D), _height(D)
        each = max(1, triton.cdiv(triton.cdiv(N, height), PROGRAMS))  # blocks of rows of one program
        programs = triton.cdiv(N, height * each)
        out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        partial = torch.empty(programs, D, dtype=torch.float32, device=rows.device)
        norm_gradient_kernel[(programs,)](
            rows, weight, grad.contiguous(), out, partial, N, rows.stride(0), ctx.eps, each, D=D, B=block, R=height, num_warps=4
        )
        return out.view(grad.shape), partial.sum(0).to(weight.dtype), None


def _rows(x: Tensor) -> Tensor:
    """x [..., D] as [N, D], a view where its rows stand at one distance."""
    return x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, x.shape[-1]).contiguous()


def _height(D: int) -> int:
    """Rows of one block: about 2,048 numbers."""
    return max(1, 2048 // triton.next_power_of_2(D))


@triton.jit
def norm_kernel(X, W, OUT, N, stride, eps, D: tl.constexpr, B: tl.constexpr, R: tl.constexpr):
    n, d = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, B)
    mask = (n < N)[:, None] & (d < D)[None, :]
    x = tl.load(X + n.to(tl.int64)[:, None] * stride + d[None, :], mask=mask, other=0.0).to(tl.float32)
    w = tl.load(W + d, mask=d < D, other=0.0).to(tl.float32)
    y = x / tl.sqrt(tl.sum(x * x, 1) / D + eps)[:, None] * w[None, :]
    tl.store(OUT + n.to(tl.int64)[:, None] * D + d[None, :], y.to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def norm_gradient_kernel(X, W, GRAD, DX, DW, N, stride, eps, each, D: tl.constexpr, B: tl.constexpr, R: tl.constexpr):
    """Grid (programs): the gradients of `each` blocks of rows, and the sum of what they give to the weight."""
    d = tl.arange(0, B)
    w = tl.load(W + d, mask=d < D, other=0.0).to(tl.float32)
    total = tl.zeros([B], tl.float32)
    for i in range(0, each):
        n = (tl.program_id(0) * each + i) * R + tl.arange(0, R)
        mask = (n < N)[:, None] & (d < D)[None, :]
        at = n.to(tl.int64)[:, None]
        x = tl.load(X + at * stride + d[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(GRAD + at * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        inverse = 1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        y = x * inverse
        total += tl.sum(grad * y, 0)
        scaled = grad * w[None, :]
        dx = inverse * (scaled - y * (tl.sum(scaled * y, 1) / D)[:, None])
        tl.store(DX + at * D + d[None, :], dx.to(DX.dtype.element_ty), mask=mask)
    tl.store(DW + tl.program_id(0) * D + d, total, mask=d < D)


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """`turn_interleaved` or `turn_half_split` of `rorqual.kernels.rowwise`: x [N, ..., R], cos and sin float32 [N, R/2]."""
    return _Turn.apply(x, cos, sin, interleaved)  # type: ignore[return-value]


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return turned(x, cos, sin, interleaved, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return turned(grad, cos, sin, ctx.interleaved, -1.0), None, None, None


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, direction: float) -> Tensor:
    """x turned by the angles times `direction` (1 or -1)."""
    N, R = x.shape[0], x.shape[-1]
    heads = x.reshape(N, -1, R)
    heads = heads if heads.stride(-1) == 1 else heads.contiguous()
    out = torch.empty(heads.shape, dtype=x.dtype, device=x.device)
    H, half = heads.shape[1], R // 2
    width = triton.next_power_of_2(max(half, 1))
    height = max(1, 1024 // width)
    turn_kernel[(triton.cdiv(N * H, height),)](
        heads, cos, sin, out, N * H, heads.stride(0), heads.stride(1), direction, H=H, HALF=half, B=width, RB=height,
        STEP=2 if interleaved else 1, GAP=1 if interleaved else half, num_warps=4,
    )  # fmt: skip
    return out.view(x.shape)


@triton.jit
def turn_kernel(
    X, COS, SIN, OUT, count, row, head, direction, H: tl.constexpr, HALF: tl.constexpr, B: tl.constexpr, RB: tl.constexpr,
    STEP: tl.constexpr, GAP: tl.constexpr,
):  # fmt: skip
    """Pair i is (x[STEP i], x[STEP i + GAP])."""
    pair, i = tl.program_id(0) * RB + tl.arange(0, RB), tl.arange(0, B)
    mask = (pair < count)[:, None] & (i < HALF)[None, :]
    n = (pair // H).to(tl.int64)
    at = (n * row + (pair % H) * head)[:, None] + (i * STEP)[None, :]
    a = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(X + at + GAP, mask=mask, other=0.0).to(tl.float32)
    angle = n[:, None] * HALF + i[None, :]
    c, s = tl.load(COS + angle, mask=mask, other=0.0), tl.load(SIN + angle, mask=mask, other=0.0) * direction
    to = OUT + pair.to(tl.int64)[:, None] * (2 * HALF) + (i * STEP)[None, :]
    tl.store(to, (a * c - b * s).to(OUT.dtype.element_ty), mask=mask)
    tl.store(to + GAP, (b * c + a * s).to(OUT.dtype.element_ty), mask=mask)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """The contract is that of `rorqual.kernels.rowwise.silu_product`."""
    return _SiluProduct.apply(gate, up)  # type: ignore[return-value]


class _SiluProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return swiglu_gradient(*ctx.saved_tensors, grad.contiguous())[1:]
