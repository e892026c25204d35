"""Dense and masked multi-head attention on a GPU: one Triton forward for row ranges and for selections as bits.

A selection becomes one bit a (row, key) pair, T S / 8 bytes, read once a head; key tiles that no row of a query tile may see are
skipped, so a causal selection costs what causal attention does. Where a whole causal square is asked for, cuDNN's attention is
the faster one and is taken. Gradients over ranges are those of range_gradients_triton.py; those under a selection are the plain
form's, tile by tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from rorqual.kernels.dense_attention import backward_by_tiles, dense_attention_plain, masked_attention_plain, selection_ranges
from rorqual.kernels.dispatch import capability
from rorqual.kernels.range_gradients_triton import range_gradients
from rorqual.kernels.selection import row_ranges
from rorqual.kernels.sparse_attention_triton import attend as sparse_attend

LISTED = 1 << 26
"""Indices listed at once for the absorbed form: 256 MiB."""
LOG2E = 1.4426950408889634
KEYS = 64
"""Keys of a tile: two words of bits a row."""


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None = None, ends: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The contract is that of `rorqual.kernels.dense_attention`. Heads of at most 256 dims, and the absorbed form, in which the
    values are the keys' first dims, run in Triton; other shapes and float64 run the plain form."""
    if not (takes(q, k, v) or is_absorbed(q, k, v)):
        return dense_attention_plain(q, k, v, scale, starts, ends)
    starts, ends = row_ranges(q.shape[0], k.shape[0], starts, ends, q.device)
    return _Attention.apply(q, k, v, scale, starts, ends, None)  # type: ignore[return-value]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, indices: Tensor) -> Tensor:
    """The contract is that of `rorqual.kernels.masked_attention`."""
    if not takes(q, k, v):
        return masked_attention_plain(q, k, v, scale, indices)
    starts, ends = selection_ranges(indices, k.shape[0])
    return _Attention.apply(q, k, v, scale, starts, ends, indices)[0]  # type: ignore[index]


def is_absorbed(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether all heads share keys [latent | rope] whose latents are the values, as the sparse kernel takes them."""
    shared = k.shape[1] == 1 and k.data_ptr() == v.data_ptr() and k.stride() == v.stride() and v.shape[2] < k.shape[2]
    return shared and q.dtype == k.dtype and q.dtype != torch.float64 and q.numel() > 0 and k.numel() > 0


def absorbed_attend(q: Tensor, kv: Tensor, value_dim: int, scale: float, starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """The absorbed form by the sparse kernel, each row's range listed, LISTED indices at a time.

    q [T, H, L + R], kv [S, L + R] -> out [T, H, L], lse [T, H]."""
    T, S = len(q), len(kv)
    tile = max(1, LISTED // S)
    if tile >= T:  # a decode, perhaps inside a graph: nothing is read back to the host
        return sparse_attend(q, kv, listed(starts, ends, S), scale, value_dim)
    parts = []
    for low in range(0, T, tile):
        some = slice(low, low + tile)
        width = max(int((ends[some] - starts[some]).max()), 1)
        parts.append(sparse_attend(q[some], kv, listed(starts[some], ends[some], width), scale, value_dim))
    outs, sums = zip(*parts, strict=True)
    return torch.cat(outs), torch.cat(sums)


def listed(starts: Tensor, ends: Tensor, width: int) -> Tensor:
    """The positions [starts[t], ends[t]) of each row, int32 [T, width], -1 beyond."""
    at = starts[:, None] + torch.arange(width, device=starts.device)
    return torch.where(at < ends[:, None], at, -1).to(torch.int32)


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    same = q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return same and max(q.shape[-1], v.shape[-1]) <= 256 and q.numel() > 0 and k.numel() > 0 and v.numel() > 0


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor, ends: Tensor, indices: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if takes(q, k, v):
            out, lse = attend(q, k, v, scale, starts, ends, None if indices is None else selection_bits(indices, k.shape[0]))
        else:
            out, lse = absorbed_attend(q.contiguous(), k[:, 0].contiguous(), v.shape[2], scale, starts, ends)
        ctx.save_for_backward(q, k, v, starts, ends, indices, out, lse)
        ctx.scale = scale
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, starts, ends, indices, out, lse = ctx.saved_tensors
        if indices is None:
            grads = range_gradients(q, k, v, ctx.scale, starts, ends, out, lse, grad_out, grad_lse)
            return *grads, None, None, None, None
        grads = backward_by_tiles(q, k, v, ctx.scale, starts, ends, indices, out.float(), lse, grad_out, grad_lse)
        return *grads, None, None, None, None


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The contract is that of `rorqual.kernels.dense_attention.causal_attention`: by cuDNN where it takes the inputs and no
    gradient is wanted (its backward is not repeatable), else by `dense_attention`."""
    form = cudnn_causal_attention if cudnn_takes(q, k, v) else lambda *inputs: dense_attention(*inputs)[0]
    return form(q, k, v, scale)


def cudnn_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether cuDNN's attention takes this: Hopper, a head of keys for each of queries, 16 bits, whole 16-byte rows."""
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    aligned = q.shape[2] % 8 == 0 and v.shape[2] % 8 == 0 and max(q.shape[2], v.shape[2]) <= 256
    shaped = len(q) == len(k) and q.shape[1] == k.shape[1] and q.dtype == k.dtype and q.dtype.itemsize == 2 and aligned
    return q.is_cuda and shaped and not wants_gradient and capability(q.device) == (9, 0) and len(q) > 0


def cudnn_causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of a whole prompt, T = S, by cuDNN: q [T, H, D], k [T, H, D], v [T, H, L] -> [T, H, L]."""
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, scale=scale)
    return out[0].transpose(0, 1)


def selection_bits(indices: Tensor, S: int) -> Tensor:
    """int32 [T, 2 ceil(S / 64)]: bit s % 32 of word s / 32 says whether row t selects key s."""
    T, K = indices.shape
    bits = torch.zeros(T, 2 * triton.cdiv(S, KEYS), dtype=torch.int32, device=indices.device)
    if T and K:
        chosen = indices.to(torch.int32).contiguous()
        bits_kernel[(triton.cdiv(K, 1024), T)](chosen, bits, K, bits.shape[1], B=1024)
    return bits


@triton.jit
def bits_kernel(INDICES, BITS, K, words, B: tl.constexpr):
    t = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * B + tl.arange(0, B)
    index = tl.load(INDICES + t * K + at, mask=at < K, other=-1)
    one = tl.full([B], 1, tl.int32)
    tl.atomic_or(BITS + t * words + tl.maximum(index, 0) // 32, one << (index & 31), mask=index >= 0, sem="relaxed")


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor, ends: Tensor, bits: Tensor | None, **tuning: int
) -> tuple[Tensor, Tensor]:
    """The forward: row t over the keys [starts[t], ends[t]), and of those only the ones whose bit is set where bits are given."""
    (T, H, D), (_, G, L) = q.shape, v.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out, lse = torch.empty(T, H, L, dtype=q.dtype, device=q.device), torch.empty(T, H, dtype=torch.float32, device=q.device)
    first = max(16, 1 << (D.bit_length() - 1))
    large = q.is_cuda and capability(q.device) >= (9, 0) and q.dtype != torch.float32
    rows, warps, stages = (
        tuning.get("rows", 128 if large else 32),
        tuning.get("warps", 8 if large else 4),
        tuning.get("stages", 2),
    )
    forward_kernel[(triton.cdiv(T, rows), H)](
        q, k, v, bits if bits is not None else q, starts.to(torch.int32), ends.to(torch.int32), out, lse, scale * LOG2E,
        T, q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), 0 if bits is None else bits.shape[1],
        H=H, GROUP=H // G, D=D, D1=first, D2=0 if first >= D else max(16, triton.next_power_of_2(D - first)), L=L,
        LP=max(16, triton.next_power_of_2(L)), ROWS=rows, KEYS=KEYS, BITS=bits is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, lse


@triton.jit
def _block(X, row, there, stride, FIRST: tl.constexpr, LAST: tl.constexpr, WIDTH: tl.constexpr, CHECKED: tl.constexpr):
    """Columns FIRST .. LAST - 1 of some rows, [rows, WIDTH], zeros elsewhere; all rows are there unless CHECKED."""
    column = FIRST + tl.arange(0, WIDTH)
    at = X + row.to(tl.int64)[:, None] * stride + column[None, :]
    if CHECKED or LAST - FIRST < WIDTH:
        return tl.load(at, mask=there[:, None] & (column < LAST)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _seen_tiles(
    acc, m, total, q1, q2, K, V, BITS_, row, low, high, start, end, S, k_row, v_row, words, scale_log2,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, L: tl.constexpr, LP: tl.constexpr, KEYS: tl.constexpr,
    BITS: tl.constexpr, RANGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The online softmax over the key tiles of [low, high), both multiples of KEYS."""
    lane = tl.arange(0, KEYS)
    for first in range(low, high, KEYS):
        key = first + lane
        there = key < S
        x = tl.dot(q1, _block(K, key, there, k_row, 0, D if D < D1 else D1, D1, RANGES).T, input_precision=PRECISION)
        if D2 > 0:
            x = tl.dot(q2, _block(K, key, there, k_row, D1, D, D2, RANGES).T, x, input_precision=PRECISION)
        x *= scale_log2
        if RANGES:
            x = tl.where((key[None, :] >= start[:, None]) & (key[None, :] < end[:, None]), x, float("-inf"))
        if BITS:
            word = BITS_ + row.to(tl.int64) * words + first // 32
            both = tl.where((lane < 32)[None, :], tl.load(word)[:, None], tl.load(word + 1)[:, None])
            x = tl.where(((both >> (lane & 31)[None, :]) & 1) != 0, x, float("-inf"))
        larger = tl.maximum(m, tl.max(x, 1))
        p = tl.exp2(x - larger[:, None])
        shrink = tl.exp2(m - larger)
        total = total * shrink + tl.sum(p, 1)
        value = _block(V, key, there, v_row, 0, L, LP, RANGES)
        acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
        m = larger
    return acc, m, total


@triton.jit
def forward_kernel(
    Q, K, V, BITS_, STARTS, ENDS, OUT, LSE, scale_log2, T, q_row, q_head, k_row, k_head, v_row, v_head, words,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, L: tl.constexpr, LP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, H); the longest rows, at the end of a causal range, run first."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = row < T
    start = tl.load(STARTS + row, mask=inside, other=0)
    end = tl.load(ENDS + row, mask=inside, other=0)
    seen = start < end
    BIG: tl.constexpr = 1 << 30
    low = tl.min(tl.where(seen, start, BIG), 0) // KEYS * KEYS
    S = tl.max(tl.where(seen, end, 0), 0)
    high = tl.cdiv(S, KEYS) * KEYS
    # Every row of the tile sees all of [whole_low, whole_high); rows beyond T or without keys are masked out by their ranges.
    whole_low = tl.cdiv(tl.max(tl.where(inside, start, 0), 0), KEYS) * KEYS
    whole_high = tl.min(tl.where(inside, end, BIG), 0) // KEYS * KEYS
    whole_high = tl.minimum(whole_high, high)
    none = whole_low >= whole_high
    whole_low = tl.minimum(tl.where(none, high, whole_low), high)
    whole_high = tl.where(none, high, whole_high)
    safe = tl.minimum(row, T - 1)
    q = Q + head.to(tl.int64) * q_head
    q1 = _block(q, safe, inside, q_row, 0, D if D < D1 else D1, D1, True)
    q2 = q1
    if D2 > 0:
        q2 = _block(q, safe, inside, q_row, D1, D, D2, True)
    k = K + (head // GROUP).to(tl.int64) * k_head
    v = V + (head // GROUP).to(tl.int64) * v_head
    acc = tl.zeros([ROWS, LP], tl.float32)
    m = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc, m, total = _seen_tiles(
        acc, m, total, q1, q2, k, v, BITS_, safe, low, whole_low, start, end, S, k_row, v_row, words, scale_log2,
        D, D1, D2, L, LP, KEYS, BITS, True, PRECISION,
    )  # fmt: skip
    acc, m, total = _seen_tiles(
        acc, m, total, q1, q2, k, v, BITS_, safe, whole_low, whole_high, start, end, S, k_row, v_row, words, scale_log2,
        D, D1, D2, L, LP, KEYS, BITS, False, PRECISION,
    )  # fmt: skip
    acc, m, total = _seen_tiles(
        acc, m, total, q1, q2, k, v, BITS_, safe, whole_high, high, start, end, S, k_row, v_row, words, scale_log2,
        D, D1, D2, L, LP, KEYS, BITS, True, PRECISION,
    )  # fmt: skip
    at = row.to(tl.int64) * H + head
    lse = tl.where(total > 0, (m + tl.log2(tl.where(total > 0, total, 1.0))) * 0.6931471805599453, float("-inf"))
    tl.store(LSE + at, lse, mask=inside)
    column = tl.arange(0, LP)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(OUT + at[:, None] * L + column[None, :], acc.to(OUT.dtype.element_ty), mask=inside[:, None] & (column < L)[None, :])
