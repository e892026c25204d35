"""Sparse attention in Triton, forward and backward, on any GPU that Triton serves; Hopper has its own in sparse_attention_gluon.

Forward: one program holds some heads of one query and runs the online softmax over its selected rows. Where a batch has fewer
programs than the GPU has processors (decode), the keys of a query are shared among several programs and the shares are merged.

Backward, deterministic: no atomic adds. For a chunk of queries a first kernel recomputes each selected key's probabilities and
score gradients; one batched matrix product turns them into the gradient of every selected row, summed over the heads; then the
rows are summed by key in a fixed order, that of the queries (or, where asked, by atomic additions in any order). Memory is
bounded by the chunk (BACKWARD_BYTES), whatever T and S.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from rorqual.kernels.dispatch import capability
from rorqual.kernels.fp8_triton import from_e4m3
from rorqual.kernels.sparse_attention import sparse_attention_plain

LOG2E = 1.4426950408889634
BACKWARD_BYTES = 1 << 32
"""The buffers of one backward chunk: probabilities, score gradients and row gradients of its queries."""
HEAD_GROUP = 64
"""Heads of one program of the Hopper forms."""


def sparse_attention(
    q: Tensor, kv: Tensor, indices: Tensor, scale: float, value_dim: int, *, atomic_backward: bool = False
) -> tuple[Tensor, Tensor]:
    """The contract is that of `rorqual.kernels.sparse_attention`; bfloat16, float16 and float32, others run the plain form.

    For a paged cache pass the flat view [blocks * page, L + R] as kv, and physical slots as indices. Results are repeatable; a
    query's bits may depend on how many queries stand beside it where their keys are shared (`share_count`).
    """
    if kv.dtype == torch.uint8 and q.dtype != torch.float64:
        return packed_attention(q, kv, indices, scale, value_dim)
    if q.dtype != kv.dtype or q.dtype not in (torch.bfloat16, torch.float16, torch.float32) or q.shape[-1] == value_dim:
        return sparse_attention_plain(q, kv, indices, scale, value_dim, atomic_backward=atomic_backward)
    return _SparseAttention.apply(q, kv, indices, scale, value_dim, atomic_backward)  # type: ignore[return-value]


@torch.no_grad()
def packed_attention(q: Tensor, kv: Tensor, indices: Tensor, scale: float, value_dim: int) -> tuple[Tensor, Tensor]:
    """Attention over an FP8 cache, uint8 [S, L + 4 L / 128 + 2 R]: entries are widened where they are used."""
    return attend(q.contiguous(), kv.contiguous(), indices.to(torch.int32).contiguous(), scale, value_dim)


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, indices: Tensor, scale: float, value_dim: int, atomic: bool
    ) -> tuple[Tensor, Tensor]:
        q, kv, indices = q.contiguous(), kv.contiguous(), indices.to(torch.int32).contiguous()
        out, lse = attend(q, kv, indices, scale, value_dim)
        ctx.save_for_backward(q, kv, indices, out, lse)
        ctx.scale, ctx.atomic = scale, atomic
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, indices, out, lse = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        grad_q, grad_kv = attend_backward(q, kv, indices, ctx.scale, out, lse, grad_out, grad_lse, atomic=ctx.atomic)
        return grad_q, grad_kv, None, None, None, None


def attend(
    q: Tensor, kv: Tensor, indices: Tensor, scale: float, value_dim: int, shares: int | None = None, portable: bool = False
) -> tuple[Tensor, Tensor]:
    """The forward. shares: programs among which a query's keys are divided, chosen by `share_count` where None."""
    T, H, _ = q.shape
    K = indices.shape[1]
    if not T or not K or not len(kv):
        return q.new_zeros(T, H, value_dim), q.new_full((T, H), -torch.inf, dtype=torch.float32)
    is_packed = kv.dtype == torch.uint8
    hopper = not portable and runs_on_hopper(q, value_dim) and not (is_packed and q.dtype != torch.bfloat16)
    heads = HEAD_GROUP if hopper else _head_block(q, value_dim)
    blocks = triton.cdiv(K, 128)
    shares = share_count(T * triton.cdiv(H, heads), blocks, _processors(q.device)) if shares is None else min(shares, blocks)
    per_share = triton.cdiv(blocks, shares)
    shares = triton.cdiv(blocks, per_share)
    out = torch.empty(shares, T, H, value_dim, dtype=q.dtype if shares == 1 else torch.float32, device=q.device)
    lse = torch.empty(shares, T, H, dtype=torch.float32, device=q.device)
    launch = (_attend_packed_hopper if is_packed else _attend_hopper) if hopper else _attend_portable
    launch(q, kv, indices, out, lse, scale, per_share, heads)
    return (out[0], lse[0]) if shares == 1 else merge_shares(out, lse, q.dtype)


@functools.cache
def share_count(programs: int, blocks: int, processors: int) -> int:
    """Into how many shares to divide a query's blocks of keys: the fewest that give the shortest schedule of whole waves.

    A share costs about two blocks of time beside its own blocks (its start, its output and its part of the merge).
    """
    if programs >= 8 * processors:
        return 1
    costs = {n: triton.cdiv(programs * n, processors) * (triton.cdiv(blocks, n) + 2) for n in range(1, blocks + 1)}
    return min(costs, key=lambda n: (costs[n], n))


def runs_on_hopper(q: Tensor, value_dim: int) -> bool:
    """Whether the Gluon forms take this: a Hopper GPU, latent 512 and rope 64, heads in groups of 64, a 16-bit dtype."""
    released = value_dim == 512 and q.shape[-1] == 576 and q.shape[1] % HEAD_GROUP == 0
    return q.is_cuda and released and q.dtype.itemsize == 2 and capability(q.device) == (9, 0)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may hold."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 1 << 16


def _head_block(q: Tensor, value_dim: int) -> int:
    """Heads of one portable program: at most 64, so few that its queries and two tiles of keys fit in shared memory."""
    wanted = max(16, min(64, triton.next_power_of_2(q.shape[1])))
    row = (triton.next_power_of_2(value_dim) + triton.next_power_of_2(q.shape[2] - value_dim)) * q.dtype.itemsize
    while wanted > 16 and wanted * 3 * row > _shared_memory(q.device):
        wanted //= 2
    return wanted


def _key_block(q: Tensor, value_dim: int, heads: int) -> int:
    """Keys of one step of a portable program: as many as heads, or 64 where 16 heads leave room for them."""
    row = (triton.next_power_of_2(value_dim) + triton.next_power_of_2(q.shape[2] - value_dim)) * q.dtype.itemsize
    return 64 if (heads + 64) * row <= _shared_memory(q.device) and heads < 32 else heads


def _dims(q: Tensor, value_dim: int) -> dict[str, Any]:
    """The compile-time sizes that every portable kernel takes, padded to powers of two and at least 16 (a matrix unit's tile)."""
    rope = q.shape[2] - value_dim
    pad = lambda n: max(16, triton.next_power_of_2(n))  # noqa: E731
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    return {"H": q.shape[1], "L": value_dim, "R": rope, "LP": pad(value_dim), "RP": pad(rope), "PRECISION": precision}


def _attend_hopper(
    q: Tensor, kv: Tensor, indices: Tensor, out: Tensor, lse: Tensor, scale: float, per_share: int, heads: int
) -> None:
    from rorqual.kernels.sparse_attention_gluon import forward_kernel

    shares, T, H, _ = out.shape
    grid = (H // heads, T, shares)
    K = indices.shape[1]
    forward_kernel[grid](
        q, kv, indices, out, lse, scale * LOG2E, 0, K, per_share, H, out.dtype == torch.float32, 216, num_warps=4
    )


def _attend_packed_hopper(
    q: Tensor, kv: Tensor, indices: Tensor, out: Tensor, lse: Tensor, scale: float, per_share: int, heads: int
) -> None:
    from rorqual.kernels.packed_attention_gluon import packed_forward_kernel

    shares, T, H, _ = out.shape
    views = (kv.view(dtype) for dtype in (torch.int32, torch.float32, torch.bfloat16))
    packed_forward_kernel[(H // heads, T, shares)](
        q, *views, indices, out, lse, scale * LOG2E, 0, indices.shape[1], per_share, H, out.dtype == torch.float32, 200,
        num_warps=4,
    )  # fmt: skip


def _attend_portable(
    q: Tensor, kv: Tensor, indices: Tensor, out: Tensor, lse: Tensor, scale: float, per_share: int, heads: int
) -> None:
    shares, T, H, L = out.shape
    grid = (triton.cdiv(H, heads), T, shares)
    packed = kv.dtype == torch.uint8
    block = 32 if packed else _key_block(q, L, heads)
    # Widened entries take registers: a second stage helps few heads (85 KB of shared memory) and makes many spill.
    stages = 2 if not packed or (heads == 16 and _shared_memory(q.device) >= 96 << 10) else 1
    warps = 8 if max(heads, block) == 64 else 4
    attend_kernel[grid](
        q, kv, indices, out, lse, scale * LOG2E, indices.shape[1], per_share * 128,
        BH=heads, BN=block, PACKED=packed, **_dims(q, L), num_warps=warps, num_stages=stages,
    )  # fmt: skip


@triton.jit
def _entries(KV, index, L: tl.constexpr, R: tl.constexpr, LP: tl.constexpr, RP: tl.constexpr):
    """The selected rows [BN, LP] and [BN, RP]; zeros where the index is negative, so that no foreign row is ever read."""
    row = KV + tl.maximum(index, 0).to(tl.int64)[:, None] * (L + R)
    l, r = tl.arange(0, LP), tl.arange(0, RP)
    there = (index >= 0)[:, None]
    latent = tl.load(row + l[None, :], mask=there & (l < L)[None, :], other=0.0)
    rope = tl.load(row + L + r[None, :], mask=there & (r < R)[None, :], other=0.0)
    return latent, rope


@triton.jit
def _packed_entries(KV, index, DTYPE: tl.constexpr, L: tl.constexpr, R: tl.constexpr, LP: tl.constexpr, RP: tl.constexpr):
    """As _entries, from rows of L e4m3 codes, L / 128 float32 scales and R bfloat16, in DTYPE."""
    row = KV + tl.maximum(index, 0).to(tl.int64)[:, None] * (L + L // 32 + 2 * R)
    l, r = tl.arange(0, LP), tl.arange(0, RP)
    there = (index >= 0)[:, None]
    codes = tl.load(row + l[None, :], mask=there & (l < L)[None, :], other=0)
    BLOCKS: tl.constexpr = LP // 128
    block = tl.arange(0, BLOCKS)
    scales = (row + (L + 4 * block)[None, :]).to(tl.pointer_type(tl.float32))
    scale = tl.load(scales, mask=there & (block < L // 128)[None, :], other=0.0)
    blocks = tl.reshape(from_e4m3(codes), [codes.shape[0], BLOCKS, 128]) * scale[:, :, None]
    latent = tl.reshape(blocks, [codes.shape[0], LP])
    rope = (row + (L + L // 32 + 2 * r)[None, :]).to(tl.pointer_type(tl.bfloat16))
    return latent.to(DTYPE), tl.load(rope, mask=there & (r < R)[None, :], other=0.0).to(DTYPE)


@triton.jit
def _rows(X, head, H: tl.constexpr, L: tl.constexpr, WIDTH: tl.constexpr, LP: tl.constexpr, FIRST: tl.constexpr):
    """X [H, WIDTH] columns FIRST..FIRST+L-1 of the given heads, padded with zeros to [BH, LP]."""
    column = tl.arange(0, LP)
    mask = (head < H)[:, None] & (column < L)[None, :]
    return tl.load(X + head[:, None] * WIDTH + FIRST + column[None, :], mask=mask, other=0.0)


@triton.jit
def attend_kernel(
    Q, KV, INDICES, OUT, LSE, scale_log2, K, per_share,
    H: tl.constexpr, L: tl.constexpr, R: tl.constexpr, LP: tl.constexpr, RP: tl.constexpr, PRECISION: tl.constexpr,
    BH: tl.constexpr, BN: tl.constexpr, PACKED: tl.constexpr = False,
):  # fmt: skip
    """Grid (head blocks, T, shares): OUT [shares, T, H, L], LSE [shares, T, H]."""
    head = tl.program_id(0) * BH + tl.arange(0, BH)
    t = tl.program_id(1).to(tl.int64)
    q = Q + t * H * (L + R)
    q_latent = _rows(q, head, H, L, L + R, LP, 0)
    q_rope = _rows(q, head, H, R, L + R, RP, L)
    m = tl.full([BH], -1e30, tl.float32)  # finite, so that a row without keys meets no inf - inf
    total = tl.zeros([BH], tl.float32)
    acc = tl.zeros([BH, LP], tl.float32)
    first = tl.program_id(2) * per_share
    lane = tl.arange(0, BN)
    for start in range(first, tl.minimum(first + per_share, K), BN):
        index = tl.load(INDICES + t * K + start + lane, mask=start + lane < K, other=-1)
        if PACKED:
            latent, rope = _packed_entries(KV, index, Q.dtype.element_ty, L, R, LP, RP)
        else:
            latent, rope = _entries(KV, index, L, R, LP, RP)
        x = tl.dot(q_latent, latent.T, input_precision=PRECISION)
        x = tl.dot(q_rope, rope.T, x, input_precision=PRECISION)
        x = tl.where((index >= 0)[None, :], x * scale_log2, float("-inf"))
        larger = tl.maximum(m, tl.max(x, 1))
        p = tl.exp2(x - larger[:, None])
        shrink = tl.exp2(m - larger)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(latent.dtype), latent, acc * shrink[:, None], input_precision=PRECISION)
        m = larger
    row = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + t) * H + head
    lse = tl.where(total > 0, (m + tl.log2(tl.where(total > 0, total, 1.0))) * 0.6931471805599453, float("-inf"))
    tl.store(LSE + row, lse, mask=head < H)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    column = tl.arange(0, LP)
    mask = (head < H)[:, None] & (column < L)[None, :]
    tl.store(OUT + row[:, None] * L + column[None, :], acc.to(OUT.dtype.element_ty), mask=mask)


def merge_shares(out: Tensor, lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint shares of the keys: out [shares, T, H, L] float32, lse [shares, T, H] -> out, lse."""
    shares, T, H, L = out.shape
    merged = torch.empty(T, H, L, dtype=dtype, device=out.device)
    total = torch.empty(T, H, dtype=torch.float32, device=out.device)
    merge_kernel[(T * H,)](
        out, lse, merged, total, shares, T * H, L, LP=triton.next_power_of_2(L), SP=triton.next_power_of_2(shares), num_warps=2
    )
    return merged, total


@triton.jit
def merge_kernel(PARTS, PART_LSE, OUT, LSE, shares, rows, L: tl.constexpr, LP: tl.constexpr, SP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    share = tl.arange(0, SP)
    lse = tl.load(PART_LSE + share.to(tl.int64) * rows + row, mask=share < shares, other=float("-inf"))
    top = tl.max(lse, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(lse - top), 0)
    column = tl.arange(0, LP)
    acc = tl.zeros([LP], tl.float32)
    at = row
    for _ in range(shares):  # in order: the bits do not depend on which share ended first
        weight = tl.exp(tl.load(PART_LSE + at) - top)
        acc += weight * tl.load(PARTS + at * L + column, mask=column < L, other=0.0)
        at += rows
    safe = tl.where(total > 0, total, 1.0)
    tl.store(OUT + row * L + column, (acc / safe).to(OUT.dtype.element_ty), mask=column < L)
    tl.store(LSE + row, tl.where(total > 0, top + tl.log(safe), float("-inf")))


def attend_backward(
    q: Tensor, kv: Tensor, indices: Tensor, scale: float, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None,
    portable: bool = False, atomic: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of q and kv, bitwise repeatable unless atomic (that of kv is then summed by atomic additions, in any order).

    lse is the natural logarithm that the forward returned."""
    T, H, D = q.shape
    S, K = len(kv), indices.shape[1]
    grad_q, grad_kv = torch.zeros_like(q), torch.zeros(S, D, dtype=torch.float32, device=q.device)
    if T and K and S:
        grad_out = grad_out.to(q.dtype)
        drift = mean_gradient(out, grad_out, grad_lse)
        chunk = max(1, min(T, BACKWARD_BYTES // ((2 * H * (K + D) + K * D) * q.element_size())))
        for first in range(0, T, chunk):
            queries = slice(first, min(first + chunk, T))
            rows = row_gradients(q, kv, indices, scale, grad_out, lse, drift, grad_q, queries, portable)
            (add_atomically if atomic else add_by_key)(grad_kv, indices[queries], rows, out.shape[-1])
            del rows
    return grad_q, grad_kv.to(kv.dtype)


def mean_gradient(out: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Tensor:
    """sum(out x grad_out) - grad_lse [T, H] float32: what every probability's gradient is measured from."""
    T, H, L = out.shape
    drift = torch.empty(T, H, dtype=torch.float32, device=out.device)
    block = 16
    dot_kernel[(triton.cdiv(T * H, block),)](out, grad_out, drift, T * H, L, LP=triton.next_power_of_2(L), B=block)
    return drift if grad_lse is None else drift.sub_(grad_lse)


@triton.jit
def dot_kernel(X, Y, OUT, rows, L: tl.constexpr, LP: tl.constexpr, B: tl.constexpr):
    """OUT[i] = X[i] . Y[i] in float32."""
    row = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    column = tl.arange(0, LP)
    mask = (row < rows)[:, None] & (column < L)[None, :]
    x = tl.load(X + row[:, None] * L + column[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(Y + row[:, None] * L + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(OUT + row, tl.sum(x * y, 1), mask=row < rows)


def row_gradients(
    q: Tensor, kv: Tensor, indices: Tensor, scale: float, grad_out: Tensor, lse: Tensor, drift: Tensor, grad_q: Tensor,
    queries: slice, portable: bool = False,
) -> Tensor:  # fmt: skip
    """The gradient of every row that the chunk's queries selected, [t, K, L + R] in q's dtype; fills grad_q for the chunk.

    With P the probabilities and dS the score gradients of one query ([H, K] each), the rows are P^T dO (value columns) + dS^T q:
    one product of [P; dS]^T with [dO, 0; q], which the library's batched product does at full rate.
    """
    _T, H, D = q.shape
    L, K, t = grad_out.shape[-1], indices.shape[1], queries.stop - queries.start
    weights = torch.empty(t, 2 * H, K, dtype=q.dtype, device=q.device)  # [P; dS]
    if not portable and runs_on_hopper(q, L):
        from rorqual.kernels.sparse_attention_gluon import backward_kernel

        backward_kernel[(H // HEAD_GROUP, t)](
            q, kv, indices, grad_out, lse, drift, weights, grad_q, queries.start, K, scale, scale * LOG2E, 0, H, 232, num_warps=4
        )
    else:
        _score_gradients_portable(q, kv, indices, grad_out, lse, drift, weights, grad_q, queries, scale)
    sources = torch.empty(t, 2 * H, D, dtype=q.dtype, device=q.device)  # [dO, 0; q]
    stack_kernel[(triton.cdiv(2 * H, 32), t)](
        q, grad_out, sources, queries.start, H, L, D, DP=triton.next_power_of_2(D), B=32, num_warps=8
    )
    return torch.bmm(weights.transpose(1, 2), sources)


@triton.jit
def stack_kernel(Q, DO, OUT, first_query, H: tl.constexpr, L: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, B: tl.constexpr):
    """OUT [t, 2 H, D] = [dO padded with zeros; q] of each query."""
    place = tl.program_id(1).to(tl.int64)
    t = place + first_query
    row, column = tl.program_id(0) * B + tl.arange(0, B), tl.arange(0, DP)
    upper = (row < H)[:, None] & (column < L)[None, :]
    lower = ((row >= H) & (row < 2 * H))[:, None] & (column < D)[None, :]
    x = tl.load(DO + (t * H + row)[:, None] * L + column[None, :], mask=upper, other=0.0)
    x += tl.load(Q + (t * H + row - H)[:, None] * D + column[None, :], mask=lower, other=0.0)
    at = OUT + (place * 2 * H + row)[:, None] * D + column[None, :]
    tl.store(at, x, mask=(row < 2 * H)[:, None] & (column < D)[None, :])


def _score_gradients_portable(
    q: Tensor, kv: Tensor, indices: Tensor, grad_out: Tensor, lse: Tensor, drift: Tensor, weights: Tensor, grad_q: Tensor,
    queries: slice, scale: float,
) -> None:  # fmt: skip
    t, H, L, K = len(weights), q.shape[1], grad_out.shape[-1], indices.shape[1]
    heads = max(16, _head_block(q, L) // 2)
    dims = _dims(q, L)
    score_gradient_kernel[(triton.cdiv(H, heads), t)](
        q, kv, indices, grad_out, lse, drift, weights, queries.start, K, scale, scale * LOG2E,
        BH=heads, BN=32, **dims, num_warps=4, num_stages=1,
    )  # fmt: skip
    width = min(128, dims["LP"])
    query_gradient_kernel[(triton.cdiv(q.shape[2], width), triton.cdiv(H, heads), t)](
        kv, indices, weights, grad_q, queries.start, K, H=H, D=q.shape[2], BH=heads, BN=32, BD=width,
        PRECISION=dims["PRECISION"], num_warps=4, num_stages=2,
    )  # fmt: skip


@triton.jit
def score_gradient_kernel(
    Q, KV, INDICES, DO, LSE, DRIFT, WEIGHTS, first_query, K, scale, scale_log2,
    H: tl.constexpr, L: tl.constexpr, R: tl.constexpr, LP: tl.constexpr, RP: tl.constexpr, PRECISION: tl.constexpr,
    BH: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid (head blocks, t): WEIGHTS [t, 2 H, K] = the probabilities, then the gradients of the scores."""
    head = tl.program_id(0) * BH + tl.arange(0, BH)
    place = tl.program_id(1).to(tl.int64)
    t = place + first_query
    q_latent = _rows(Q + t * H * (L + R), head, H, L, L + R, LP, 0)
    q_rope = _rows(Q + t * H * (L + R), head, H, R, L + R, RP, L)
    grad = _rows(DO + t * H * L, head, H, L, L, LP, 0)
    lse = tl.load(LSE + t * H + head, mask=head < H, other=0.0) * 1.4426950408889634
    drift = tl.load(DRIFT + t * H + head, mask=head < H, other=0.0)
    out = WEIGHTS + (place * 2 * H + head)[:, None] * K
    lane = tl.arange(0, BN)
    for start in range(0, K, BN):
        index = tl.load(INDICES + t * K + start + lane, mask=start + lane < K, other=-1)
        latent, rope = _entries(KV, index, L, R, LP, RP)
        x = tl.dot(q_latent, latent.T, input_precision=PRECISION)
        x = tl.dot(q_rope, rope.T, x, input_precision=PRECISION)
        p = tl.where((index >= 0)[None, :], tl.exp2(x * scale_log2 - lse[:, None]), 0.0)
        dp = tl.dot(grad, latent.T, input_precision=PRECISION)
        ds = p * (dp - drift[:, None]) * scale
        at = out + (start + lane)[None, :]
        mask = (head < H)[:, None] & (start + lane < K)[None, :]
        tl.store(at, p.to(WEIGHTS.dtype.element_ty), mask=mask)
        tl.store(at + H * K, ds.to(WEIGHTS.dtype.element_ty), mask=mask)


@triton.jit
def query_gradient_kernel(
    KV, INDICES, WEIGHTS, DQ, first_query, K,
    H: tl.constexpr, D: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (column blocks, head blocks, t): DQ [T, H, D] = score gradients times the selected rows."""
    column = tl.program_id(0) * BD + tl.arange(0, BD)
    head = tl.program_id(1) * BH + tl.arange(0, BH)
    place = tl.program_id(2).to(tl.int64)
    t = place + first_query
    lane = tl.arange(0, BN)
    ds_rows = WEIGHTS + (place * 2 * H + H + head)[:, None] * K
    acc = tl.zeros([BH, BD], tl.float32)
    for start in range(0, K, BN):
        index = tl.load(INDICES + t * K + start + lane, mask=start + lane < K, other=-1)
        mask = (index >= 0)[:, None] & (column < D)[None, :]
        entries = tl.load(KV + tl.maximum(index, 0).to(tl.int64)[:, None] * D + column[None, :], mask=mask, other=0.0)
        mask = (head < H)[:, None] & (start + lane < K)[None, :]
        ds = tl.load(ds_rows + (start + lane)[None, :], mask=mask, other=0.0)
        acc = tl.dot(ds, entries, acc, input_precision=PRECISION)
    mask = (head < H)[:, None] & (column < D)[None, :]
    tl.store(DQ + (t * H + head)[:, None] * D + column[None, :], acc.to(DQ.dtype.element_ty), mask=mask)


def add_by_key(total: Tensor, indices: Tensor, rows: Tensor, value_dim: int) -> None:
    """total[indices[t, k]] += rows[t, k] (float32 [S, D]; negative indices: none), each key's rows in order of (t, k)."""
    S, D = total.shape
    keys, order = indices.flatten().sort(stable=True)
    bounds = torch.searchsorted(keys, torch.arange(S + 1, dtype=keys.dtype, device=keys.device))
    add_rows_kernel[(S,)](rows, order, bounds, total, **_halves(D, value_dim))


def _halves(width: int, value_dim: int) -> dict[str, int]:
    """How the kernels that add rows take them: latent and rope key apart, eight rows at a time."""
    rope = width - value_dim
    padded = {"LP": triton.next_power_of_2(value_dim), "RP": triton.next_power_of_2(rope)}
    return {"L": value_dim, "R": rope, **padded, "B": 8, "num_warps": 4}


@triton.jit
def add_rows_kernel(
    ROWS, ORDER, BOUNDS, TOTAL, L: tl.constexpr, R: tl.constexpr, LP: tl.constexpr, RP: tl.constexpr, B: tl.constexpr
):
    """One program per key: adds the rows ORDER[BOUNDS[key] .. BOUNDS[key + 1]] to TOTAL[key], B at a time."""
    key = tl.program_id(0).to(tl.int64)
    first = tl.load(BOUNDS + key)
    last = tl.load(BOUNDS + key + 1)
    if first < last:
        lane = tl.arange(0, B)
        l, r = tl.arange(0, LP), tl.arange(0, RP)
        left = tl.zeros([B, LP], tl.float32)
        right = tl.zeros([B, RP], tl.float32)
        for start in range(first, last, B):
            there = start + lane < last
            row = ROWS + tl.load(ORDER + start + lane, mask=there, other=0)[:, None] * (L + R)
            left += tl.load(row + l[None, :], mask=there[:, None] & (l < L)[None, :], other=0.0).to(tl.float32)
            right += tl.load(row + L + r[None, :], mask=there[:, None] & (r < R)[None, :], other=0.0).to(tl.float32)
        at = TOTAL + key * (L + R)
        tl.store(at + l, tl.load(at + l, mask=l < L) + tl.sum(left, 0), mask=l < L)
        tl.store(at + L + r, tl.load(at + L + r, mask=r < R) + tl.sum(right, 0), mask=r < R)


def add_atomically(total: Tensor, indices: Tensor, rows: Tensor, value_dim: int) -> None:
    """As add_by_key, by atomic additions: no sort and no second pass, but sums in any order."""
    count, sizes = indices.numel(), _halves(total.shape[1], value_dim)
    add_atomically_kernel[(triton.cdiv(count, sizes["B"]),)](rows, indices, total, count, **sizes)


@triton.jit
def add_atomically_kernel(
    ROWS, INDICES, TOTAL, count, L: tl.constexpr, R: tl.constexpr, LP: tl.constexpr, RP: tl.constexpr, B: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    index = tl.load(INDICES + at, mask=at < count, other=-1)
    row, key = at * (L + R), tl.maximum(index, 0).to(tl.int64) * (L + R)
    l, r = tl.arange(0, LP)[None, :], tl.arange(0, RP)[None, :]
    left, right = (index >= 0)[:, None] & (l < L), (index >= 0)[:, None] & (r < R)
    latent = tl.load(ROWS + row[:, None] + l, mask=left, other=0.0).to(tl.float32)
    tl.atomic_add(TOTAL + key[:, None] + l, latent, mask=left, sem="relaxed")
    rope = tl.load(ROWS + row[:, None] + L + r, mask=right, other=0.0).to(tl.float32)
    tl.atomic_add(TOTAL + key[:, None] + L + r, rope, mask=right, sem="relaxed")
