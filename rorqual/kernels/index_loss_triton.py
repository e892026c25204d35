"""The indexer's loss in Triton, forward and backward in tiles, with the main attention's target computed inside.

Dense warm-up: for a chunk of queries (LOSS_BYTES bounds it) the index scores and the attention's head-summed mass are written to
two buffers [t, S], each a matrix product whose last step sums over the heads within a thread's own columns. One pass over each
row then gives the loss; in the backward the scores' buffer becomes their gradient, from which two products give the gradients of
queries and keys, every program owning its rows, so that nothing is added atomically and two runs agree bit for bit.

Restricted: the same per query over its selected rows; the gradients of the index keys are summed by key as in sparse attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from rorqual.kernels.dense_attention_triton import dense_attention
from rorqual.kernels.index_loss import SelectionQuality, index_loss_plain, selection_quality_plain
from rorqual.kernels.select_tokens_triton import Keys, write_scores
from rorqual.kernels.selection import row_ranges
from rorqual.kernels.sparse_attention_triton import LOG2E, _shared_memory, add_by_key, attend

LOSS_BYTES = 256 << 20
"""Each of the two buffers of one chunk of queries."""
DENSE_DIMS = 320
"""Entries up to this wide take the dense kernel for their sums; the released one has a faster form over listed keys."""
SUPPORTED = (torch.bfloat16, torch.float16, torch.float32)


def index_loss(
    query: Tensor,
    key: Tensor,
    weight: Tensor,
    q: Tensor,
    kv: Tensor,
    scale: float,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    indices: Tensor | None = None,
    *,
    lse: Tensor | None = None,
) -> Tensor:
    """The contract is that of `rorqual.kernels.index_loss`; bfloat16, float16 and float32, others run the plain form.

    Pass lse where the main attention has run: without it the attention runs once more, for its sums alone.
    """
    same = query.dtype == key.dtype and q.dtype == kv.dtype
    if not same or query.dtype not in SUPPORTED or q.dtype not in SUPPORTED or weight.dtype == torch.float64:
        return index_loss_plain(query, key, weight, q, kv, scale, starts, ends, indices, lse=lse)
    q, kv = q.detach().contiguous(), kv.detach().contiguous()
    if indices is not None:
        indices = indices.to(torch.int32).contiguous()
        return _RestrictedLoss.apply(query, key, weight, q, kv, scale, indices, lse)  # type: ignore[return-value]
    starts, ends = (bound.to(torch.int32) for bound in row_ranges(len(q), len(key), starts, ends, q.device))
    return _DenseLoss.apply(query, key, weight, q, kv, scale, starts, ends, lse)  # type: ignore[return-value]


class _DenseLoss(torch.autograd.Function):
    """Recomputes scores and mass in the backward: nothing of [T, S] is kept."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, weight: Tensor, q: Tensor, kv: Tensor, scale: float, starts: Tensor, ends: Tensor,
        lse: Tensor | None,
    ) -> Tensor:  # fmt: skip
        query, key, weights = query.contiguous(), key.contiguous(), weight.float().contiguous()
        lse = dense_sums(q, kv, scale, starts, ends) if lse is None else lse.float().contiguous()
        sums = torch.zeros(3, len(q), dtype=torch.float32, device=q.device)  # loss, log-sum of scores, mass
        for rows in chunks(len(q), len(key)):
            scores, mass = chunk_tiles(query, key, weights, q, kv, scale, starts, ends, lse, rows)
            write_losses(scores, mass, starts[rows], ends[rows], sums[:, rows])
        ctx.save_for_backward(query, key, weight, q, kv, starts, ends, lse, sums)
        ctx.scale = scale
        return sums[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, weight, q, kv, starts, ends, lse, sums = ctx.saved_tensors
        weights, grad = weight.float().contiguous(), grad.float().contiguous()
        grad_query, grad_weight = torch.zeros_like(query), torch.zeros_like(weights)
        grad_key = torch.zeros(key.shape, dtype=torch.float32, device=key.device)
        for rows in chunks(len(q), len(key)):
            scores, mass = chunk_tiles(query, key, weights, q, kv, ctx.scale, starts, ends, lse, rows)
            turn_into_gradient(scores, mass, starts[rows], ends[rows], sums[:, rows], grad[rows])
            through_scores(query, key, weights, scores, starts, ends, rows, grad_query, grad_key, grad_weight)
        return grad_query, grad_key.to(key.dtype), grad_weight.to(weight.dtype), None, None, None, None, None, None


class _RestrictedLoss(torch.autograd.Function):
    """Keeps the target [T, K], which is the size of the selection itself."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, weight: Tensor, q: Tensor, kv: Tensor, scale: float, indices: Tensor,
        lse: Tensor | None,
    ) -> Tensor:  # fmt: skip
        query, key, weights = query.contiguous(), key.contiguous(), weight.float().contiguous()
        if lse is None:
            lse = attend(q, kv, indices, scale, _value_dim(q))[1]
        target = selected_mass(q, kv, indices, scale, lse.float().contiguous())
        sums = torch.zeros(3, len(q), dtype=torch.float32, device=q.device)
        if indices.numel() and len(key):
            _launch_selected(query, key, weights, indices, target, sums, None, None, None, None, slice(0, len(q)))
        ctx.save_for_backward(query, key, weight, indices, target, sums)
        return sums[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, weight, indices, target, sums = ctx.saved_tensors
        weights, grad = weight.float().contiguous(), grad.float().contiguous()
        grad_query, grad_weight = torch.zeros_like(query), torch.zeros_like(weights)
        grad_key = torch.zeros(key.shape, dtype=torch.float32, device=key.device)
        K, C = indices.shape[1], key.shape[1]
        for rows in chunks(len(query), K * C) if K and len(key) else ():
            by_row = torch.empty(rows.stop - rows.start, K, C, dtype=key.dtype, device=key.device)
            _launch_selected(query, key, weights, indices, target, sums, grad, grad_query, grad_weight, by_row, rows)
            add_by_key(grad_key, indices[rows], by_row, C // 2)
        return grad_query, grad_key.to(key.dtype), grad_weight.to(weight.dtype), None, None, None, None, None


def chunks(T: int, row: int) -> Iterator[slice]:
    """Slices of queries whose buffers of `row` float32 numbers each keep within LOSS_BYTES."""
    size = max(1, LOSS_BYTES // (4 * max(row, 1)))
    size = size // 16 * 16 or size
    for low in range(0, T, size):
        yield slice(low, min(low + size, T))


def _value_dim(q: Tensor) -> int:
    """Where to split an entry when only the sums matter: the released split, for which a faster form exists, or any."""
    return 512 if q.shape[-1] == 576 else q.shape[-1] // 2


def dense_sums(q: Tensor, kv: Tensor, scale: float, starts: Tensor, ends: Tensor) -> Tensor:
    """The main attention's log-sums [T, H] over each row's range."""
    if q.shape[-1] <= DENSE_DIMS:
        return dense_attention(q, kv[:, None], kv[:, None, :16], scale, starts, ends)[1].detach()
    columns = torch.arange(len(kv), dtype=torch.int32, device=q.device)
    parts = []
    for rows in chunks(len(q), len(kv)):
        eligible = (columns >= starts[rows, None]) & (columns < ends[rows, None])
        parts.append(attend(q[rows], kv, torch.where(eligible, columns, -1), scale, _value_dim(q))[1])
    return torch.cat(parts) if parts else q.new_zeros(0, q.shape[1], dtype=torch.float32)


def chunk_tiles(
    query: Tensor, key: Tensor, weight: Tensor, q: Tensor, kv: Tensor, scale: float, starts: Tensor, ends: Tensor, lse: Tensor,
    rows: slice,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Index scores and attention mass of some rows, float32 [t, >= S] each; undefined outside a row's range."""
    shape = (rows.stop - rows.start, triton.cdiv(len(key), 16) * 16)
    scores, mass = torch.empty(2, *shape, dtype=torch.float32, device=q.device)
    write_scores(query[rows], Keys(key, len(key)), weight[rows], starts[rows], ends[rows], scores)
    write_mass(q[rows], kv, scale, lse[rows], starts[rows], ends[rows], mass)
    return scores, mass


def write_mass(
    q: Tensor, kv: Tensor, scale: float, lse: Tensor, starts: Tensor, ends: Tensor, out: Tensor, **tuning: int
) -> None:
    """sum_h exp(q_h . kv scale - lse_h) into out [t, >= S] for each row's keys: the main attention's mass, not yet normalised."""
    t, H, D = q.shape
    S = len(kv)
    heads = min(tuning.get("columns", 128), max(16, triton.next_power_of_2(H)))
    block, depth = tuning.get("block", 128), min(tuning.get("depth", 64), triton.next_power_of_2(D))
    queries = max(1, min(128 // heads, triton.next_power_of_2(t)))
    mass_kernel[(triton.cdiv(S, block), triton.cdiv(t, queries))](
        q, kv, lse, starts, ends, out, t, S, out.stride(0), scale * LOG2E, H=H, D=D, BH=heads, BQ=queries, BS=block,
        BD=max(16, depth),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=tuning.get("warps", 8 if block * heads * queries >= 128 * 128 else 4), num_stages=tuning.get("stages", 3),
    )  # fmt: skip


@triton.jit
def mass_kernel(
    Q, KV, LSE, STARTS, ENDS, OUT, T, S, stride, scale_log2,
    H: tl.constexpr, D: tl.constexpr, BH: tl.constexpr, BQ: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (key blocks, blocks of BQ queries). Keys are the rows of the product and (query, head) pairs its columns, so that a
    thread sums over heads."""
    t = tl.program_id(1) * BQ + tl.arange(0, BQ)
    start, end = tl.load(STARTS + t, mask=t < T, other=2147483647), tl.load(ENDS + t, mask=t < T, other=0)
    first = tl.program_id(0) * BS
    if (first < tl.max(end, 0)) & (first + BS > tl.min(start, 0)):
        s = first + tl.arange(0, BS)
        d, pair = tl.arange(0, BD), tl.arange(0, BQ * BH)
        row = tl.program_id(1) * BQ + pair // BH
        mass = tl.zeros([BS, BQ], tl.float32)
        for group in tl.static_range(0, H, BH):
            head = group + pair % BH
            real = (row < T) & (head < H)
            place = row.to(tl.int64) * H + head
            x = tl.zeros([BS, BQ * BH], tl.float32)
            for low in range(0, D, BD):
                at = low + d
                k = tl.load(KV + s.to(tl.int64)[:, None] * D + at[None, :], mask=(s < S)[:, None] & (at < D)[None, :], other=0.0)
                q = tl.load(Q + place[None, :] * D + at[:, None], mask=real[None, :] & (at < D)[:, None], other=0.0)
                x = tl.dot(k, q, x, input_precision=PRECISION)
            lse = tl.load(LSE + place, mask=real, other=float("inf")) * 1.4426950408889634
            # A row without keys has -inf: nothing of it is stored.
            p = tl.where(real[None, :], tl.exp2(x * scale_log2 - lse[None, :]), 0.0)
            mass += tl.sum(tl.reshape(p, [BS, BQ, BH]), 2)
        eligible = (s[:, None] >= start[None, :]) & (s[:, None] < end[None, :])
        tl.store(OUT + t.to(tl.int64)[None, :] * stride + s[:, None], mass, mask=eligible & (t < T)[None, :])


@torch.no_grad()
def selection_quality(
    q: Tensor, kv: Tensor, scale: float, indices: Tensor, starts: Tensor | None = None, ends: Tensor | None = None
) -> SelectionQuality:
    """The contract is that of `rorqual.kernels.index_loss.selection_quality`; among equal masses any key may be the best."""
    if q.dtype != kv.dtype or q.dtype not in SUPPORTED:
        return selection_quality_plain(q, kv, scale, indices, starts, ends)
    q, kv = q.contiguous(), kv.contiguous()
    starts, ends = (bound.to(torch.int32) for bound in row_ranges(len(q), len(kv), starts, ends, q.device))
    lse, quality = dense_sums(q, kv, scale, starts, ends), torch.full((3, len(q)), torch.nan, device=q.device)
    for rows in chunks(len(q), len(kv)):
        mass = torch.zeros(rows.stop - rows.start, triton.cdiv(len(kv), 16) * 16, device=q.device)
        write_mass(q[rows], kv, scale, lse[rows], starts[rows], ends[rows], mass)
        mass /= mass.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        present = indices[rows] >= 0
        counts = present.sum(1, keepdim=True)
        values, best = mass.topk(min(indices.shape[1], mass.shape[1]), dim=1)  # the heaviest first
        ranked = torch.arange(best.shape[1], device=q.device) < counts
        chosen = torch.zeros_like(mass, dtype=torch.int32).scatter_add_(1, indices[rows].long().clamp_min(0), present.int()) > 0
        hits = (chosen.gather(1, best) & ranked).sum(1)
        found = torch.stack([(mass * chosen).sum(1), (values * ranked).sum(1), hits / counts[:, 0]])
        quality[:, rows] = found.masked_fill(counts[:, 0] == 0, torch.nan)
    return SelectionQuality(*quality)


def write_losses(scores: Tensor, mass: Tensor, starts: Tensor, ends: Tensor, sums: Tensor) -> None:
    """sums [3, t]: the divergence of each row, the log-sum-exp of its scores, its mass."""
    loss_kernel[(len(scores),)](scores, mass, starts, ends, sums, scores.stride(0), sums.stride(0), B=2048, num_warps=4)


@triton.jit
def _loss(scores_log_sum, mass, entropy, cross):
    """KL(p || softmax(I)) with p = mass / Z: sum p log p - sum p I + log sum exp I, from the sums of mass log mass and mass I."""
    safe = tl.where(mass > 0, mass, 1.0)
    return tl.where(mass > 0, entropy / safe - tl.log(safe) - cross / safe + scores_log_sum, 0.0)


@triton.jit
def _running(x, p, top, total, mass, entropy, cross):
    """One more block of scores x (-inf: none) and masses p (0: none) into the running sums of a row."""
    larger = tl.maximum(top, tl.max(x, 0))
    shift = tl.where(larger == float("-inf"), 0.0, larger)
    total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift), 0)
    mass += tl.sum(p, 0)
    entropy += tl.sum(tl.where(p > 0, p * tl.log(tl.where(p > 0, p, 1.0)), 0.0), 0)
    cross += tl.sum(tl.where(p > 0, p * x, 0.0), 0)
    return larger, total, mass, entropy, cross


@triton.jit
def loss_kernel(SCORES, MASS, STARTS, ENDS, SUMS, stride, sums_stride, B: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    start, end = tl.load(STARTS + t), tl.load(ENDS + t)
    top = float("-inf")
    total, mass, entropy, cross = 0.0, 0.0, 0.0, 0.0
    lane = tl.arange(0, B)
    for low in range(start // 16 * 16, end, B):
        s = low + lane
        there = (s >= start) & (s < end)
        x = tl.load(SCORES + t * stride + s, mask=there, other=float("-inf"))
        p = tl.load(MASS + t * stride + s, mask=there, other=0.0)
        top, total, mass, entropy, cross = _running(x, p, top, total, mass, entropy, cross)
    log_sum = tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), 0.0)
    tl.store(SUMS + t, _loss(log_sum, mass, entropy, cross))
    tl.store(SUMS + sums_stride + t, log_sum)
    tl.store(SUMS + 2 * sums_stride + t, mass)


def turn_into_gradient(scores: Tensor, mass: Tensor, starts: Tensor, ends: Tensor, sums: Tensor, grad: Tensor) -> None:
    """In place: the scores' buffer becomes grad (softmax(I) - p), and 0 outside a row's range."""
    t, width = scores.shape
    gradient_kernel[(triton.cdiv(width, 4096), t)](
        scores, mass, starts, ends, sums, grad, scores.stride(0), sums.stride(0), width, B=4096, num_warps=8
    )


@triton.jit
def gradient_kernel(SCORES, MASS, STARTS, ENDS, SUMS, GRAD, stride, sums_stride, width, B: tl.constexpr):
    t = tl.program_id(1).to(tl.int64)
    s = tl.program_id(0) * B + tl.arange(0, B)
    there = (s >= tl.load(STARTS + t)) & (s < tl.load(ENDS + t))
    log_sum, mass = tl.load(SUMS + sums_stride + t), tl.load(SUMS + 2 * sums_stride + t)
    x = tl.load(SCORES + t * stride + s, mask=there, other=0.0)
    p = tl.load(MASS + t * stride + s, mask=there, other=0.0)
    grad = tl.where(mass > 0, tl.load(GRAD + t), 0.0)
    g = grad * (tl.exp(x - log_sum) - p / tl.where(mass > 0, mass, 1.0))
    tl.store(SCORES + t * stride + s, tl.where(there, g, 0.0), mask=s < width)


def through_scores(
    query: Tensor, key: Tensor, weight: Tensor, grad: Tensor, starts: Tensor, ends: Tensor, rows: slice,
    grad_query: Tensor, grad_key: Tensor, grad_weight: Tensor,
) -> None:  # fmt: skip
    """The gradients of index queries, keys and weights from that of the scores, grad [t, >= S]; those of the keys are added.

    Both kernels keep the first product's result in the registers of the second's left operand, as attention does.
    """
    _, I, C = query.shape
    t, S = rows.stop - rows.start, len(key)
    narrow = query.dtype == torch.float32
    sizes: dict[str, Any] = {
        "I": I, "C": C, "IP": max(16, triton.next_power_of_2(I)), "CP": max(16, triton.next_power_of_2(C)),
        "PRECISION": "ieee" if narrow else "tf32",
    }  # fmt: skip
    query_block = 32 if narrow else 128 if _shared_memory(query.device) >= 160 << 10 else 64
    key_block = 32 if narrow else 64
    tuning = {"num_warps": 4, "num_stages": 2 if narrow else 3}
    query_kernel[(t,)](
        query[rows], key, weight[rows], grad, starts[rows], ends[rows], grad_query[rows], grad_weight[rows], grad.stride(0),
        **sizes, BS=query_block, **tuning,
    )  # fmt: skip
    key_kernel[(triton.cdiv(S, key_block),)](
        query[rows], key, weight[rows], grad, starts[rows], ends[rows], grad_key, t, S, grad.stride(0),
        **sizes, BS=key_block, **tuning,
    )  # fmt: skip


@triton.jit
def _pairs(Q, W, first, T, I: tl.constexpr, C: tl.constexpr, IP: tl.constexpr, CP: tl.constexpr, BQ: tl.constexpr):
    """The (query, head) pairs of BQ queries: q [BQ IP, CP], w [BQ IP], offsets and which are real."""
    pair, c = tl.arange(0, BQ * IP), tl.arange(0, CP)
    row, head = first + pair // IP, pair % IP
    real = (row < T) & (head < I)
    at = row.to(tl.int64) * I + head
    q = tl.load(Q + at[:, None] * C + c[None, :], mask=real[:, None] & (c < C)[None, :], other=0.0)
    return q, tl.load(W + at, mask=real, other=0.0), at, real


@triton.jit
def query_kernel(
    Q, K, W, GRAD, STARTS, ENDS, DQ, DW, stride,
    I: tl.constexpr, C: tl.constexpr, IP: tl.constexpr, CP: tl.constexpr, BS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (queries): gradients of a query's heads and weights, over its keys in order; heads are the rows of both products."""
    t = tl.program_id(0).to(tl.int64)
    start, end = tl.load(STARTS + t), tl.load(ENDS + t)
    head, c, lane = tl.arange(0, IP), tl.arange(0, CP), tl.arange(0, BS)
    real = (head < I)[:, None] & (c < C)[None, :]
    at = (t * I + head)[:, None] * C + c[None, :]
    q = tl.load(Q + at, mask=real, other=0.0)
    w = tl.load(W + t * I + head, mask=head < I, other=0.0)
    dq = tl.zeros([IP, CP], tl.float32)
    dw = tl.zeros([IP], tl.float32)
    GRAD += t * stride
    low = start // BS * BS
    for first in range(low, end, BS):
        s = first + lane
        g = tl.load(GRAD + s, mask=s < end, other=0.0)
        k = tl.load(K + s[:, None] * C + c[None, :], mask=((s >= start) & (s < end))[:, None] & (c < C)[None, :], other=0.0)
        x = tl.dot(q, k.T, input_precision=PRECISION)  # [IP, BS]
        dw += tl.sum(tl.maximum(x, 0.0) * g[None, :], 1)
        dx = tl.where(x > 0, w[:, None] * g[None, :], 0.0).to(k.dtype)
        dq = tl.dot(dx, k, dq, input_precision=PRECISION)
    tl.store(DQ + at, dq.to(DQ.dtype.element_ty), mask=real)
    tl.store(DW + t * I + head, dw, mask=head < I)


@triton.jit
def key_kernel(
    Q, K, W, GRAD, STARTS, ENDS, DK, T, S, stride,
    I: tl.constexpr, C: tl.constexpr, IP: tl.constexpr, CP: tl.constexpr, BS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of BS keys): adds the gradient of their index keys over the chunk's queries, in order."""
    s, c, head = tl.program_id(0) * BS + tl.arange(0, BS), tl.arange(0, CP), tl.arange(0, IP)
    inside = (s < S)[:, None] & (c < C)[None, :]
    at = s[:, None] * C + c[None, :]
    k = tl.load(K + at, mask=inside, other=0.0)
    dk = tl.load(DK + at, mask=inside, other=0.0)
    real = (head < I)[:, None] & (c < C)[None, :]
    first, last = T, T * 0
    for block in range(0, T, 256):  # the queries that see any of these keys
        t = block + tl.arange(0, 256)
        starts = tl.load(STARTS + t, mask=t < T, other=2147483647)
        ends = tl.load(ENDS + t, mask=t < T, other=0)
        sees = (starts < tl.program_id(0) * BS + BS) & (ends > tl.program_id(0) * BS)
        first = tl.minimum(first, tl.min(tl.where(sees, t, T), 0))
        last = tl.maximum(last, tl.max(tl.where(sees, t + 1, 0), 0))
    GRAD += s
    g = tl.load(GRAD + tl.minimum(first, T - 1).to(tl.int64) * stride, mask=s < S, other=0.0)
    for t in range(first, last):
        coming = tl.load(GRAD + tl.minimum(t + 1, T - 1).to(tl.int64) * stride, mask=s < S, other=0.0)
        q = tl.load(Q + (t * I + head)[:, None] * C + c[None, :], mask=real, other=0.0)
        w = tl.load(W + t * I + head, mask=head < I, other=0.0)
        x = tl.dot(k, q.T, input_precision=PRECISION)  # [BS, IP]
        dx = tl.where(x > 0, g[:, None] * w[None, :], 0.0).to(k.dtype)
        dk = tl.dot(dx, q, dk, input_precision=PRECISION)
        g = coming
    tl.store(DK + at, dk, mask=inside)


def selected_mass(q: Tensor, kv: Tensor, indices: Tensor, scale: float, lse: Tensor) -> Tensor:
    """The main attention's mass of each selected key, [T, K] float32, 0 where the index is negative."""
    T, H, D = q.shape
    K = indices.shape[1]
    out = torch.zeros(T, K, dtype=torch.float32, device=q.device)
    if out.numel() and len(kv):
        heads = min(128, max(16, triton.next_power_of_2(H)))
        selected_mass_kernel[(triton.cdiv(K, 64), T)](
            q, kv, lse, indices, out, K, scale * LOG2E, H=H, D=D, BH=heads, BS=64, BD=max(16, min(64, triton.next_power_of_2(D))),
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=4, num_stages=3,
        )  # fmt: skip
    return out


@triton.jit
def selected_mass_kernel(
    Q, KV, LSE, INDICES, OUT, K, scale_log2,
    H: tl.constexpr, D: tl.constexpr, BH: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As mass_kernel, over the rows that query t selected. Grid (key blocks, T)."""
    t = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BS + tl.arange(0, BS)
    index = tl.load(INDICES + t * K + n, mask=n < K, other=-1)
    row = tl.maximum(index, 0).to(tl.int64)
    d = tl.arange(0, BD)
    mass = tl.zeros([BS], tl.float32)
    for group in tl.static_range(0, H, BH):
        head = group + tl.arange(0, BH)
        x = tl.zeros([BS, BH], tl.float32)
        for low in range(0, D, BD):
            at = low + d
            k = tl.load(KV + row[:, None] * D + at[None, :], mask=(index >= 0)[:, None] & (at < D)[None, :], other=0.0)
            q = tl.load(Q + (t * H + head)[None, :] * D + at[:, None], mask=(head < H)[None, :] & (at < D)[:, None], other=0.0)
            x = tl.dot(k, q, x, input_precision=PRECISION)
        lse = tl.load(LSE + t * H + head, mask=head < H, other=float("inf")) * 1.4426950408889634
        mass += tl.sum(tl.exp2(x * scale_log2 - lse[None, :]), 1)
    tl.store(OUT + t * K + n, tl.where(index >= 0, mass, 0.0), mask=n < K)


def _launch_selected(
    query: Tensor, key: Tensor, weight: Tensor, indices: Tensor, target: Tensor, sums: Tensor, grad: Tensor | None,
    grad_query: Tensor | None, grad_weight: Tensor | None, by_row: Tensor | None, rows: slice,
) -> None:  # fmt: skip
    """The forward where grad is None (fills sums), else the backward of some rows (fills the three gradients)."""
    _, I, C = query.shape
    backward = grad is not None
    selected_kernel[(rows.stop - rows.start,)](
        query, key, weight, indices, target, sums, grad if backward else sums, grad_query if backward else query,
        grad_weight if backward else weight, by_row if backward else key, rows.start, indices.shape[1], len(query),
        I=I, C=C, IP=max(16, triton.next_power_of_2(I)), CP=max(16, triton.next_power_of_2(C)), BS=64, BACKWARD=backward,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=4, num_stages=2,
    )  # fmt: skip


@triton.jit
def selected_kernel(
    Q, KEY, W, INDICES, TARGET, SUMS, GRAD, DQ, DW, BY_ROW, first_query, K, T,
    I: tl.constexpr, C: tl.constexpr, IP: tl.constexpr, CP: tl.constexpr, BS: tl.constexpr, BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (queries): the restricted loss of one query, or its gradients: of q and w, and of each selected key into BY_ROW."""
    place = tl.program_id(0).to(tl.int64)
    t = place + first_query
    c = tl.arange(0, CP)
    q, w, pair, real = _pairs(Q, W, t, T, I, C, IP, CP, 1)
    top = float("-inf")
    total, mass, entropy, cross = 0.0, 0.0, 0.0, 0.0
    if BACKWARD:
        log_sum, whole = tl.load(SUMS + T + t), tl.load(SUMS + 2 * T + t)
        grad = tl.where(whole > 0, tl.load(GRAD + t), 0.0)
        dq = tl.zeros([IP, CP], tl.float32)
        dw = tl.zeros([IP], tl.float32)
    for start in range(0, K, BS):
        n = start + tl.arange(0, BS)
        index = tl.load(INDICES + t * K + n, mask=n < K, other=-1)
        p = tl.load(TARGET + t * K + n, mask=n < K, other=0.0)
        row = KEY + tl.maximum(index, 0).to(tl.int64)[:, None] * C + c[None, :]
        k = tl.load(row, mask=(index >= 0)[:, None] & (c < C)[None, :], other=0.0)
        x = tl.dot(k, q.T, input_precision=PRECISION)  # [BS, I]
        scores = tl.where(index >= 0, tl.sum(tl.maximum(x, 0.0) * w[None, :], 1), float("-inf"))
        if BACKWARD:
            g = grad * (tl.exp(scores - log_sum) - p / tl.where(whole > 0, whole, 1.0))
            g = tl.where(index >= 0, g, 0.0)
            dw += tl.sum(tl.maximum(x, 0.0) * g[:, None], 0)
            dx = tl.where(x > 0, g[:, None] * w[None, :], 0.0).to(k.dtype)
            dq = tl.dot(dx.T, k, dq, input_precision=PRECISION)
            dk = tl.dot(dx, q, input_precision=PRECISION)
            at = BY_ROW + (place * K + n)[:, None] * C + c[None, :]
            tl.store(at, dk.to(BY_ROW.dtype.element_ty), mask=(n < K)[:, None] & (c < C)[None, :])
        else:
            top, total, mass, entropy, cross = _running(scores, p, top, total, mass, entropy, cross)
    if BACKWARD:
        tl.store(DQ + pair[:, None] * C + c[None, :], dq.to(DQ.dtype.element_ty), mask=real[:, None] & (c < C)[None, :])
        tl.store(DW + pair, dw, mask=real)
    else:
        log_sum = tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), 0.0)
        tl.store(SUMS + t, _loss(log_sum, mass, entropy, cross))
        tl.store(SUMS + T + t, log_sum)
        tl.store(SUMS + 2 * T + t, mass)
