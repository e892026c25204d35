"""The routed experts as one grouped product: y = sum_k g_k E_k(x), E(x) = W2 (silu(W1 x) * W3 x) (DeepSeek-V3, 2.1.2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rorqual.kernels.dispatch import triton_form
from rorqual.kernels.linear import MIN_ROWS, accumulator, row_product


def experts(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
    """x [N, D], w1 and w3 [E, F, D], w2 [E, D, F], chosen integer [N, K] of experts, gates [N, K] -> [N, D] of x's dtype.

    The SwiGLU product and the gated sum are float32 (float64 for float64 inputs), and the sum runs in the order of `chosen`.
    Differentiable with respect to x, the weights and the gates. On CPU a row is bitwise the same in any batch: each expert
    multiplies at least 16 rows. A negative entry of `chosen` is no expert: it costs nothing and adds nothing.
    """
    return (triton_form("experts", x, w1, w2, w3, chosen, gates) or experts_plain)(x, w1, w2, w3, chosen, gates)


def experts_plain(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
    return _Experts.apply(x, w1, w2, w3, chosen, gates)  # type: ignore[return-value]


@dataclass(frozen=True)
class Dispatch:
    """(token, slot) pairs in the order of their experts, stable, those without an expert left out."""

    token: Tensor
    """int64 [M]: the row of x of each pair."""
    place: Tensor
    """int64 [N, K]: where a (token, slot) stands among the pairs; M (a row of zeros) where it has no expert."""
    counts: list[int]
    """Pairs of each expert."""

    def segments(self) -> Iterator[tuple[int, int, int]]:
        """(expert, low, high) of each expert that has pairs."""
        low = 0
        for expert, count in enumerate(self.counts):
            if count:
                yield expert, low, low + count
            low += count


def dispatch(chosen: Tensor, E: int) -> Dispatch:
    N, K = chosen.shape
    flat = chosen.reshape(-1).long()
    flat = torch.where(flat < 0, E, flat)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=E + 1)[:E].tolist()
    M = sum(counts)
    place = torch.empty_like(order)
    place[order] = torch.arange(N * K, device=chosen.device)
    return Dispatch(order[:M] // K, place.clamp_max(M).view(N, K), counts)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        plan, dtype = dispatch(chosen, w1.shape[0]), accumulator(x, w1)
        M = len(plan.token)
        rows = padded_rows(x, plan)  # [M + MIN_ROWS, D]
        first, third = x.new_empty(M, w1.shape[1]), x.new_empty(M, w1.shape[1])
        y = x.new_zeros(M + 1, x.shape[1])  # the last row is that of pairs without an expert
        for expert, low, high in plan.segments():
            some = rows[low : max(high, low + MIN_ROWS)]
            a, b = row_product(some, w1[expert]), row_product(some, w3[expert])  # [m, F]
            hidden = (silu(a.to(dtype)) * b.to(dtype)).to(x.dtype)
            y[low:high] = row_product(hidden, w2[expert])[: high - low]
            first[low:high], third[low:high] = a[: high - low], b[: high - low]
        ctx.plan, ctx.dtype = plan, dtype
        ctx.save_for_backward(x, w1, w2, w3, gates, first, third, y)
        return combine(y, plan, gates.to(dtype)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w2, w3, gates, first, third, y = ctx.saved_tensors
        plan, dtype, M = ctx.plan, ctx.dtype, len(ctx.plan.token)
        grad = grad.to(dtype)
        grad_gates = torch.stack([(y[place].to(dtype) * grad).sum(-1) for place in plan.place.unbind(1)], 1)
        grad_y = grad[plan.token] * pair_gates(plan, gates, M).to(dtype).unsqueeze(-1)  # [M, D]
        rows, grad_rows = x[plan.token], x.new_zeros(M + 1, x.shape[1])
        grads = [torch.zeros_like(w) for w in (w1, w2, w3)]
        for expert, low, high in plan.segments():
            part = slice(low, high)
            a, b, grad_part = first[part].to(dtype), third[part].to(dtype), grad_y[part].to(x.dtype)
            gate = torch.sigmoid(a)
            grads[1][expert] = grad_part.t() @ (a * gate * b).to(x.dtype)
            grad_hidden = (grad_part @ w2[expert]).to(dtype)
            grad_a = (grad_hidden * b * gate * (1 + a * (1 - gate))).to(x.dtype)
            grad_b = (grad_hidden * a * gate).to(x.dtype)
            grads[0][expert], grads[2][expert] = grad_a.t() @ rows[part], grad_b.t() @ rows[part]
            grad_rows[part] = grad_a @ w1[expert] + grad_b @ w3[expert]
        grad_x = combine(grad_rows, plan, torch.ones_like(gates, dtype=dtype)).to(x.dtype)
        return grad_x, grads[0], grads[1], grads[2], None, grad_gates.to(gates.dtype)


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x). torch's own silu (and sigmoid, rsqrt) gives other bits to the last elements of a tensor on CPU."""
    return x / (1 + (-x).exp())


def padded_rows(x: Tensor, plan: Dispatch) -> Tensor:
    """x's rows in the order of the pairs and MIN_ROWS rows of zeros, so that every segment can be read MIN_ROWS long."""
    return torch.cat([x[plan.token], x.new_zeros(MIN_ROWS, x.shape[1])])


def pair_gates(plan: Dispatch, gates: Tensor, M: int) -> Tensor:
    """The gate of each pair, [M]."""
    by_pair = gates.new_zeros(M + 1)
    by_pair[plan.place.view(-1)] = gates.reshape(-1)
    return by_pair[:M]


def combine(y: Tensor, plan: Dispatch, gates: Tensor) -> Tensor:
    """sum_k gates[:, k] y[place of (token, k)], slot by slot: [N, D] in the gates' dtype."""
    out = y.new_zeros(len(gates), y.shape[1], dtype=gates.dtype)
    for k, place in enumerate(plan.place.unbind(1)):
        out.addcmul_(y[place].to(gates.dtype), gates[:, k : k + 1])
    return out
