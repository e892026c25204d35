"""The routed experts on a GPU: one grouped product per weight (torch._grouped_mm), the routing and SwiGLU in Triton.

Pairs (token, expert) are sorted by expert; rows are gathered once, and the gated sum over a token's experts is one kernel that
reads each pair's row once, in the order of `chosen`. Nothing waits for the host: the experts' shares stay on the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from rorqual.kernels.experts import experts_plain
from rorqual.kernels.routing_triton import few_pairs, order_pairs

MOST_WASTED = 1 << 26
"""Numbers of all experts held at once where a dtype has no grouped product."""


def experts(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
    """The contract is that of `rorqual.kernels.experts`. Grouped products take bfloat16 and widths in multiples of 8."""
    if not supported(x, w1, w2, w3):
        few = len(x) * max(w1.shape[1:]) * len(w1) <= MOST_WASTED
        return (all_experts if few and not torch.is_grad_enabled() else experts_plain)(x, w1, w2, w3, chosen, gates)
    return _Experts.apply(x, w1, w2, w3, chosen, gates)  # type: ignore[return-value]


def all_experts(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
    """Every expert for every row, most of it times 0: for few rows of a dtype that has no grouped product. Nothing waits for the
    host, so that a step of decoding in float32 can be captured too."""
    share = gates.new_zeros(len(x), len(w1) + 1).scatter_add_(1, torch.where(chosen < 0, len(w1), chosen).long(), gates)
    hidden = swiglu(x @ w1.transpose(1, 2), x @ w3.transpose(1, 2))  # [E, N, F]
    return torch.einsum("end,ne->nd", (hidden @ w2.transpose(1, 2)).float(), share[:, :-1].float()).to(x.dtype)


def supported(x: Tensor, *weights: Tensor) -> bool:
    """Whether the grouped products take this: an NVIDIA GPU from Hopper on, bfloat16, rows of a multiple of 16 bytes."""
    if not x.is_cuda or torch.cuda.get_device_capability(x.device) < (9, 0) or not hasattr(torch, "_grouped_mm") or not x.numel():
        return False
    aligned = all(weight.shape[-1] % 8 == 0 and weight.shape[-2] % 8 == 0 for weight in weights)
    return aligned and all(tensor.dtype == torch.bfloat16 for tensor in (x, *weights))


class Plan(NamedTuple):
    """(token, slot) pairs sorted by expert, stable; those without an expert stand last and belong to no group."""

    order: Tensor
    """int64 [N K]: the pair at each place."""
    place: Tensor
    """int32 [N, K]: where a (token, slot) stands."""
    ends: Tensor
    """int32 [E]: where each expert's pairs end."""


def plan(chosen: Tensor, E: int) -> Plan:
    if few_pairs(chosen, E):
        return Plan(*order_pairs(chosen, E))
    N, K = chosen.shape
    flat = chosen.reshape(-1).long()
    flat, order = torch.where(flat < 0, E, flat).sort(stable=True)
    place = torch.empty(N * K, dtype=torch.int32, device=chosen.device)
    place[order] = torch.arange(N * K, dtype=torch.int32, device=chosen.device)
    ends = torch.searchsorted(flat, torch.arange(1, E + 1, device=chosen.device), out_int32=True)
    return Plan(order, place.view(N, K), ends)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        routed = plan(chosen, len(w1))
        rows = x[routed.order // chosen.shape[1]]
        first, third = grouped(rows, w1.transpose(1, 2), routed), grouped(rows, w3.transpose(1, 2), routed)
        y = grouped(swiglu(first, third), w2.transpose(1, 2), routed)
        ctx.save_for_backward(x, w1, w2, w3, chosen, gates, first, third, y, *routed)
        return combined(y, routed, chosen, gates)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w2, w3, chosen, gates, first, third, y, *parts = ctx.saved_tensors
        routed, K, grad = Plan(*parts), chosen.shape[1], grad.contiguous()
        token = routed.order // K
        gate = torch.where(chosen < 0, 0.0, gates.float()).reshape(-1)[routed.order]
        grad_y = (grad[token].float() * gate[:, None]).to(x.dtype)
        grad_gates = (y[routed.place.long()].float() * grad[:, None].float()).sum(-1).masked_fill_(chosen < 0, 0)
        grad_hidden = grouped(grad_y, w2, routed)
        hidden, grad_first, grad_third = swiglu_gradient(first, third, grad_hidden)
        rows = x[token]
        grad_w1, grad_w3 = grouped_outer(grad_first, rows, routed), grouped_outer(grad_third, rows, routed)
        grad_w2 = grouped_outer(grad_y, hidden, routed)
        grad_rows = grouped(grad_first, w1, routed).float() + grouped(grad_third, w3, routed).float()
        grad_x = combined(grad_rows, routed, chosen, torch.ones_like(gates)).to(x.dtype)
        return grad_x, grad_w1, grad_w2, grad_w3, None, grad_gates.to(gates.dtype)


def grouped(rows: Tensor, weights: Tensor, routed: Plan) -> Tensor:
    """rows [M, A] of each expert times its weights [E, A, B] -> [M, B]; rows without an expert come out undefined."""
    return torch._grouped_mm(rows, weights, offs=routed.ends)


def grouped_outer(left: Tensor, right: Tensor, routed: Plan) -> Tensor:
    """left [M, A], right [M, B] -> [E, A, B]: the sum of outer products over each expert's rows."""
    return torch._grouped_mm(left.t(), right, offs=routed.ends)


def swiglu(first: Tensor, third: Tensor) -> Tensor:
    """silu(first) third, the product in float32."""
    out = torch.empty_like(first)
    swiglu_kernel[(triton.cdiv(first.numel(), 2048),)](first, third, out, first.numel(), B=2048)
    return out


@triton.jit
def swiglu_kernel(A, B_, OUT, count, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    a = tl.load(A + at, mask=at < count, other=0.0).to(tl.float32)
    b = tl.load(B_ + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(OUT + at, (a * (1 / (1 + tl.exp(-a))) * b).to(OUT.dtype.element_ty), mask=at < count)


def swiglu_gradient(first: Tensor, third: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The product again, and the gradients of its two factors."""
    out = torch.empty_like(first), torch.empty_like(first), torch.empty_like(first)
    swiglu_gradient_kernel[(triton.cdiv(first.numel(), 2048),)](first, third, grad, *out, first.numel(), B=2048)
    return out


@triton.jit
def swiglu_gradient_kernel(A, B_, GRAD, HIDDEN, DA, DB, count, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    a = tl.load(A + at, mask=at < count, other=0.0).to(tl.float32)
    b = tl.load(B_ + at, mask=at < count, other=0.0).to(tl.float32)
    g = tl.load(GRAD + at, mask=at < count, other=0.0).to(tl.float32)
    gate = 1 / (1 + tl.exp(-a))
    tl.store(HIDDEN + at, (a * gate * b).to(HIDDEN.dtype.element_ty), mask=at < count)
    tl.store(DA + at, (g * b * gate * (1 + a * (1 - gate))).to(DA.dtype.element_ty), mask=at < count)
    tl.store(DB + at, (g * a * gate).to(DB.dtype.element_ty), mask=at < count)


def combined(y: Tensor, routed: Plan, chosen: Tensor, gates: Tensor) -> Tensor:
    """sum_k gates[:, k] y[place of (token, k)] in float32, slot by slot: [N, D] of y's dtype."""
    N, K = chosen.shape
    out = torch.empty(N, y.shape[1], dtype=y.dtype, device=y.device)
    combine_kernel[(N, triton.cdiv(y.shape[1], 1024))](
        y, routed.place, chosen.int(), gates.float().contiguous(), out, y.shape[1], K=K, B=1024
    )
    return out


@triton.jit
def combine_kernel(Y, PLACE, CHOSEN, GATES, OUT, D, K: tl.constexpr, B: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * B + tl.arange(0, B)
    total = tl.zeros([B], tl.float32)
    for k in tl.static_range(K):
        routed = tl.load(CHOSEN + n * K + k) >= 0
        row = tl.load(PLACE + n * K + k).to(tl.int64)
        y = tl.load(Y + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        total += tl.where(routed, tl.load(GATES + n * K + k) * y, 0.0)  # a row without an expert may hold NaN
    tl.store(OUT + n * D + d, total.to(OUT.dtype.element_ty), mask=d < D)
