"""The gradients of attention over ranges of keys in Triton: training's dense attention on any GPU.

A program's rows are (query, head) pairs of one group of heads, queries outermost, so that heads that share their keys (the
absorbed form) stand in one product as rows do that do not. One kernel by key blocks, one by row blocks, each program owning what
it writes, so that nothing is added atomically and two runs agree bit for bit. Blocks outside each other's ranges are skipped.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

NOWHERE = tl.constexpr(2147483647)


def range_gradients(
    q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor, ends: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor,
    grad_lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of q [T, H, D], k [S, G, D], v [S, G, L] from those of `dense_attention`'s results out [T, H, L] and lse [T, H].

    bfloat16, float16 and float32; row t saw the keys [starts[t], ends[t]).
    """
    q, k, v, out = q.contiguous(), by_rows(k), by_rows(v), out.contiguous()
    starts, ends = starts.to(torch.int32), ends.to(torch.int32)
    grad_q = torch.empty_like(q)
    grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    if not q.numel() or not len(k):
        return grad_q.zero_(), grad_k.zero_(), grad_v.zero_()
    grad_out = grad_out.contiguous()
    drift = torch.empty_like(lse)  # grad_lse - dO . O
    T, H, L = out.shape
    sizes, blocks = _sizes(q, k, v), _blocks(q, v)
    drift_kernel[(triton.cdiv(T * H, 64),)](out, grad_out, grad_lse.contiguous(), drift, T * H, L=L, LP=sizes["LP"], B=64)
    bounds = block_bounds(starts, ends, blocks["BM"] // sizes["HG"] or 1, len(k), blocks["BN"], T)
    strides = k.stride(0), k.stride(1), v.stride(0), v.stride(1)
    common = (q, k, v, starts, ends, lse, drift, grad_out)
    key_kernel[(triton.cdiv(len(k), blocks["BN"]), k.shape[1])](
        *common, bounds, grad_k, grad_v, T, len(k), *strides, scale, **sizes, **blocks
    )
    query_kernel[(triton.cdiv(T * sizes["HG"], blocks["BM"]), k.shape[1])](
        *common, grad_q, T, len(k), *strides, scale, **sizes, **blocks
    )
    return grad_q, grad_k, grad_v


def by_rows(x: Tensor) -> Tensor:
    """x with its last dim in one piece: views of wider rows are taken as they are."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    """Compile-time sizes: D is cut into a power of two and the rest, since a tile's sides are powers of two."""
    H, D = q.shape[1:]
    first = max(16, 1 << (D.bit_length() - 1))
    rest = max(D - first, 0)
    return {
        "H": H, "HG": H // k.shape[1], "D": D, "D1": first, "D2": max(16, triton.next_power_of_2(rest)) if rest else 0,
        "L": v.shape[2], "LP": max(16, triton.next_power_of_2(v.shape[2])),
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }  # fmt: skip


def _blocks(q: Tensor, v: Tensor) -> dict[str, int]:
    widest = max(q.shape[2], v.shape[2])
    if q.dtype == torch.float32 or widest > 320:
        return {"BM": 16, "BN": 32, "num_warps": 4, "num_stages": 1}
    return {"BM": 64, "BN": 64, "num_warps": 4 if widest <= 128 else 8, "num_stages": 2}


def block_bounds(starts: Tensor, ends: Tensor, queries: int, S: int, width: int, T: int) -> Tensor:
    """int32 [2, key blocks]: the first query and the end of the queries that see any key of a block of `width` keys.

    `queries`: how many stand in a block of rows; bounds are those of whole blocks. A block that none sees: (0, 0).
    """
    blocks = triton.cdiv(T, queries)
    low, high = torch.empty(2, blocks, dtype=torch.int32, device=starts.device)
    reach_kernel[(blocks,)](starts, ends, low, high, T, queries, B=triton.next_power_of_2(queries))
    bounds = torch.empty(2, triton.cdiv(S, width), dtype=torch.int32, device=starts.device)
    bounds_kernel[(bounds.shape[1],)](low, high, bounds, blocks, queries, width, bounds.shape[1], T, B=1024)
    return bounds


@triton.jit
def reach_kernel(STARTS, ENDS, LOW, HIGH, T, queries, B: tl.constexpr):
    """Grid (blocks of queries): the first key and the end of the keys that any of them sees."""
    t = tl.program_id(0) * queries + tl.arange(0, B)
    inside = (tl.arange(0, B) < queries) & (t < T)
    start, end = tl.load(STARTS + t, mask=inside, other=0), tl.load(ENDS + t, mask=inside, other=0)
    seen = start < end
    tl.store(LOW + tl.program_id(0), tl.min(tl.where(seen, start, NOWHERE), 0))
    tl.store(HIGH + tl.program_id(0), tl.max(tl.where(seen, end, 0), 0))


@triton.jit
def bounds_kernel(LOW, HIGH, BOUNDS, blocks, queries, width, count, T, B: tl.constexpr):
    """Grid (key blocks)."""
    n = tl.program_id(0) * width
    first, last = NOWHERE, 0
    for base in range(0, blocks, B):
        b = base + tl.arange(0, B)
        low, high = tl.load(LOW + b, mask=b < blocks, other=NOWHERE), tl.load(HIGH + b, mask=b < blocks, other=0)
        seen = (low < n + width) & (high > n)
        first = tl.minimum(first, tl.min(tl.where(seen, b, NOWHERE), 0))
        last = tl.maximum(last, tl.max(tl.where(seen, b + 1, 0), 0))
    first = tl.where(last > 0, first, 0)
    tl.store(BOUNDS + tl.program_id(0), first * queries)
    tl.store(BOUNDS + count + tl.program_id(0), tl.minimum(last * queries, T))


@triton.jit
def drift_kernel(OUT, GRAD, GRAD_LSE, DRIFT, count, L: tl.constexpr, LP: tl.constexpr, B: tl.constexpr):
    row, column = tl.program_id(0) * B + tl.arange(0, B), tl.arange(0, LP)
    at = row.to(tl.int64)[:, None] * L + column[None, :]
    mask = (row < count)[:, None] & (column < L)[None, :]
    out, grad = tl.load(OUT + at, mask=mask, other=0.0), tl.load(GRAD + at, mask=mask, other=0.0)
    both = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(DRIFT + row, tl.load(GRAD_LSE + row, mask=row < count, other=0.0) - both, mask=row < count)


@triton.jit
def _columns(X, at, mask, first: tl.constexpr, width: tl.constexpr, W: tl.constexpr):
    """Columns [first, first + W) of the rows that begin at X + at, zeros beyond `width` columns and where not mask: [.., W]."""
    column = first + tl.arange(0, W)
    return tl.load(X + at[:, None] + column[None, :], mask=mask[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def _keys(K, s, S, stride, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    at = s.to(tl.int64) * stride
    k1 = _columns(K, at, s < S, 0, D, D1)
    k2 = k1
    if D2 > 0:
        k2 = _columns(K, at, s < S, D1, D, D2)
    return k1, k2


@triton.jit
def key_kernel(
    Q, K, V, STARTS, ENDS, LSE, DRIFT, GRAD, BOUNDS, DK, DV, T, S, k_row, k_head, v_row, v_head, scale,
    H: tl.constexpr, HG: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, L: tl.constexpr, LP: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid (key blocks, groups): the gradients of a block of keys and values, over the rows that see any of them, in order."""
    group = tl.program_id(1)
    s = tl.program_id(0) * BN + tl.arange(0, BN)
    k1, k2 = _keys(K + group * k_head, s, S, k_row, D, D1, D2)
    v = _columns(V + group * v_head, s.to(tl.int64) * v_row, s < S, 0, L, LP)
    first = tl.load(BOUNDS + tl.program_id(0)) * HG
    last = tl.load(BOUNDS + tl.num_programs(0) + tl.program_id(0)) * HG
    dk1, dv = tl.zeros([BN, D1], tl.float32), tl.zeros([BN, LP], tl.float32)
    if D2 > 0:
        dk2 = tl.zeros([BN, D2], tl.float32)
    for base in range(first, last, BM):
        row = base + tl.arange(0, BM)
        t, there = row // HG, row < T * HG
        pair = t.to(tl.int64) * H + group * HG + row % HG
        start, end = tl.load(STARTS + t, mask=there, other=0), tl.load(ENDS + t, mask=there, other=0)
        lse = tl.load(LSE + pair, mask=there, other=0.0) * 1.4426950408889634
        drift = tl.load(DRIFT + pair, mask=there, other=0.0)
        at = pair * D
        q1 = _columns(Q, at, there, 0, D, D1)
        x = tl.dot(k1, q1.T, input_precision=PRECISION)  # [BN, BM]
        if D2 > 0:
            q2 = _columns(Q, at, there, D1, D, D2)
            x = tl.dot(k2, q2.T, x, input_precision=PRECISION)
        eligible = (s[:, None] >= start[None, :]) & (s[:, None] < end[None, :])
        p = tl.where(eligible, tl.exp2(x * (scale * 1.4426950408889634) - lse[None, :]), 0.0)
        grad = _columns(GRAD, pair * L, there, 0, L, LP)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dp = tl.dot(v, grad.T, input_precision=PRECISION)
        ds = (p * (dp + drift[None, :])).to(q1.dtype)
        dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
        if D2 > 0:
            dk2 = tl.dot(ds, q2, dk2, input_precision=PRECISION)
    G = H // HG
    at, c1, l = (s.to(tl.int64) * G + group), tl.arange(0, D1), tl.arange(0, LP)
    inside = (s < S)[:, None]
    tl.store(DK + at[:, None] * D + c1[None, :], (dk1 * scale).to(DK.dtype.element_ty), mask=inside & (c1 < D)[None, :])
    if D2 > 0:
        c2 = D1 + tl.arange(0, D2)
        tl.store(DK + at[:, None] * D + c2[None, :], (dk2 * scale).to(DK.dtype.element_ty), mask=inside & (c2 < D)[None, :])
    tl.store(DV + at[:, None] * L + l[None, :], dv.to(DV.dtype.element_ty), mask=inside & (l < L)[None, :])


@triton.jit
def query_kernel(
    Q, K, V, STARTS, ENDS, LSE, DRIFT, GRAD, DQ, T, S, k_row, k_head, v_row, v_head, scale,
    H: tl.constexpr, HG: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, L: tl.constexpr, LP: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, groups): the gradients of a block of queries."""
    group = tl.program_id(1)
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM + tl.arange(0, BM)
    t, there = row // HG, row < T * HG
    pair = t.to(tl.int64) * H + group * HG + row % HG
    start, end = tl.load(STARTS + t, mask=there, other=0), tl.load(ENDS + t, mask=there, other=0)
    seen = start < end
    low, high = tl.min(tl.where(seen, start, NOWHERE), 0), tl.max(tl.where(seen, end, 0), 0)
    q1, q2 = _keys(Q, pair, T * H, D, D, D1, D2)
    grad = _columns(GRAD, pair * L, there, 0, L, LP)
    lse = tl.load(LSE + pair, mask=there, other=0.0) * 1.4426950408889634
    drift = tl.load(DRIFT + pair, mask=there, other=0.0)
    dq1 = tl.zeros([BM, D1], tl.float32)
    if D2 > 0:
        dq2 = tl.zeros([BM, D2], tl.float32)
    for n in range(tl.minimum(low, high) // BN * BN, high, BN):
        s = n + tl.arange(0, BN)
        k1, k2 = _keys(K + group * k_head, s, S, k_row, D, D1, D2)
        x = tl.dot(q1, k1.T, input_precision=PRECISION)
        if D2 > 0:
            x = tl.dot(q2, k2.T, x, input_precision=PRECISION)
        eligible = (s[None, :] >= start[:, None]) & (s[None, :] < end[:, None])
        p = tl.where(eligible, tl.exp2(x * (scale * 1.4426950408889634) - lse[:, None]), 0.0)
        v = _columns(V + group * v_head, s.to(tl.int64) * v_row, s < S, 0, L, LP)
        dp = tl.dot(grad, v.T, input_precision=PRECISION)
        ds = (p * (dp + drift[:, None])).to(k1.dtype)
        dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
        if D2 > 0:
            dq2 = tl.dot(ds, k2, dq2, input_precision=PRECISION)
    c1 = tl.arange(0, D1)
    at = pair[:, None] * D
    tl.store(DQ + at + c1[None, :], (dq1 * scale).to(DQ.dtype.element_ty), mask=there[:, None] & (c1 < D)[None, :])
    if D2 > 0:
        c2 = D1 + tl.arange(0, D2)
        tl.store(DQ + at + c2[None, :], (dq2 * scale).to(DQ.dtype.element_ty), mask=there[:, None] & (c2 < D)[None, :])
