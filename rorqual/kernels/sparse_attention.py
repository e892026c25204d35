"""Attention over selected keys in MLA's absorbed (MQA) form: u = Attn(h, {c_s : s in S_t}) (DeepSeek-V3.2, eq. 2).

All heads of a query share the gathered rows: an entry [c_kv; k_rope] is the key, its first `value_dim` numbers the value.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rorqual.kernels.dispatch import triton_form
from rorqual.kernels.fp8 import unpack_latent
from rorqual.kernels.linear import MIN_ROWS, accumulator

TILE_ELEMENTS = 1 << 20
"""Gathered numbers held at once (queries x selected keys x entry): 4 MiB of float32."""
KEY_BLOCK = 512
"""Selected keys summed at once. Blocks are summed in order, so that an empty one at the end changes no bit and is left out."""


def sparse_attention(
    q: Tensor, kv: Tensor, indices: Tensor, scale: float, value_dim: int, *, atomic_backward: bool = False
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query over its own keys.

    q [T, H, L+R], kv [S, L+R], indices integer [T, K] of positions in kv (negative: none, anywhere; no position twice),
    scale multiplies q . kv, value_dim = L -> (out [T, H, L] of q's dtype, lse [T, H] float32, natural log of the sum of exp).
    An empty row gives 0 and -inf. Sums are float32 (float64 for float64 inputs).

    kv may be an FP8 cache instead: uint8 [S, L + 4 L / 128 + 2 R] in the layout of `fp8.pack_latent` (656 bytes in the release),
    each entry unpacked where it is used; scales are powers of two, on Hopper at most 2^7. No gradient flows then. For a paged
    cache pass the flat view [blocks * page, entry] and physical slots as indices.

    Differentiable with respect to q and kv, through out and lse. Truly sparse: rows are gathered tile by tile, forward and
    backward, and nothing of [T, S] or [T, H, K] is kept. On CPU a query's result is bitwise the same in any batch, chunk or
    tile with the same K, and the gradients are repeatable; what kv holds at positions that are not selected is never used.
    atomic_backward: on a GPU the gradient of kv is summed by atomic additions, whose order, so whose last bits, differ from run
    to run; it needs no sorting. The default sums in a fixed order.
    """
    form = triton_form("sparse_attention", q, kv, indices) or sparse_attention_plain
    return form(q, kv, indices, scale, value_dim, atomic_backward=atomic_backward)


def sparse_attention_plain(
    q: Tensor, kv: Tensor, indices: Tensor, scale: float, value_dim: int, *, atomic_backward: bool = False
) -> tuple[Tensor, Tensor]:
    if kv.dtype == torch.uint8:
        return packed_attention_plain(q, kv, indices, scale, value_dim)
    return _SparseAttention.apply(q, kv, indices, scale, value_dim, atomic_backward)  # type: ignore[return-value]


@torch.no_grad()
def packed_attention_plain(q: Tensor, kv: Tensor, indices: Tensor, scale: float, value_dim: int) -> tuple[Tensor, Tensor]:
    """`sparse_attention` over an FP8 cache: each tile's selected entries are unpacked, then attended to."""
    T, H, _ = q.shape
    dtype = accumulator(q)
    out, lse = q.new_empty(T, H, value_dim, dtype=dtype), q.new_empty(T, H, dtype=dtype)
    for rows in query_tiles(q, indices):
        chosen = block_columns(indices[rows])
        t, K = chosen.shape
        entries = torch.cat(unpack_latent(gather_rows(kv, chosen).view(t * K, -1), value_dim, dtype), -1)
        own = torch.arange(t * K, device=q.device).view(t, K).masked_fill_(chosen < 0, -1)
        out[rows], lse[rows] = attend(q[rows], entries, own, scale, value_dim, dtype)
    return out.to(q.dtype), lse


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, indices: Tensor, scale: float, value_dim: int, atomic: bool
    ) -> tuple[Tensor, Tensor]:
        T, H, _ = q.shape
        dtype = accumulator(q, kv)
        out = torch.empty(T, H, value_dim, dtype=dtype, device=q.device)
        lse = torch.empty(T, H, dtype=dtype, device=q.device)
        is_whole = len(kv) > 0 and not bool((indices < 0).any())
        for rows in query_tiles(q, indices):
            out[rows], lse[rows] = attend(q[rows], kv, indices[rows], scale, value_dim, dtype, is_whole)
        ctx.save_for_backward(q, kv, indices, out, lse)
        ctx.scale, ctx.atomic = scale, atomic
        return out.to(q.dtype), lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, indices, out, lse = ctx.saved_tensors
        grad_q, grad_kv = torch.empty_like(q), torch.zeros_like(kv, dtype=out.dtype)
        for rows in query_tiles(q, indices):
            grad_q[rows] = attend_backward(
                q[rows], kv, indices[rows], ctx.scale, out[rows], lse[rows], grad_out[rows], grad_lse[rows], grad_kv, ctx.atomic
            )
        return grad_q, grad_kv.to(kv.dtype), None, None, None, None


def query_tiles(q: Tensor, indices: Tensor) -> list[slice]:
    """Slices of queries whose gathered rows keep within TILE_ELEMENTS."""
    T, tile = q.shape[0], max(1, TILE_ELEMENTS // max(1, indices.shape[1] * q.shape[2]))
    return [slice(low, min(low + tile, T)) for low in range(0, T, tile)]


def attend(
    q: Tensor, kv: Tensor, indices: Tensor, scale: float, value_dim: int, dtype: torch.dtype, is_whole: bool = False
) -> tuple[Tensor, Tensor]:
    """One tile: q [t, H, D], indices [t, K] -> out [t, H, L], lse [t, H]. is_whole: no index is negative."""
    H = q.shape[1]
    if is_whole and indices.shape[1] >= MIN_ROWS:
        entries = kv.index_select(0, indices.reshape(-1)).view(*indices.shape, -1).to(dtype)  # [t, K, D]
        scores = pad_heads(q.to(dtype) * scale) @ entries.transpose(1, 2)  # [t, H, K]
    else:
        indices = block_columns(indices)
        entries = gather_rows(kv, indices).to(dtype)
        scores = pad_heads(q.to(dtype) * scale) @ entries.transpose(1, 2)
        scores.masked_fill_((indices < 0).unsqueeze(1), -torch.inf)
    top = scores.amax(-1, keepdim=True)
    top.masked_fill_(top == -torch.inf, 0)  # an empty row: exp(-inf - 0) = 0
    weights = scores.sub_(top).exp_()
    values = entries[..., :value_dim]
    out, total = weights[..., :KEY_BLOCK] @ values[:, :KEY_BLOCK], weights[..., :KEY_BLOCK].sum(-1, keepdim=True)
    for low in range(KEY_BLOCK, indices.shape[1], KEY_BLOCK):
        block = weights[..., low : low + KEY_BLOCK]
        out += block @ values[:, low : low + KEY_BLOCK]
        total += block.sum(-1, keepdim=True)
    lse = (top + total.log()).squeeze(-1)
    return out.div_(total).masked_fill_(total == 0, 0)[:, :H], lse[:, :H]


def pad_heads(q: Tensor) -> Tensor:
    """q [t, H, D] with zero heads up to a multiple of 4 on CPU: with other counts the bits were seen to depend on where in
    memory, so in which place of a tile, a query stands (torch 2.13 on AMD: one thread below 4 heads, two threads with 5 to 7)."""
    missing = 0 if q.is_cuda else -q.shape[1] % 4
    return F.pad(q, (0, 0, 0, missing)) if missing else q


def attend_backward(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    grad_kv: Tensor,
    atomic: bool = False,
) -> Tensor:
    """One tile: returns the gradient of q [t, H, D], and adds those of the gathered rows into grad_kv [S, D]."""
    dtype, value_dim = out.dtype, out.shape[-1]
    indices = block_columns(indices)
    q, grad_out = q.to(dtype), grad_out.to(dtype)
    entries = gather_rows(kv, indices).to(dtype)  # [t, K, D]
    scores = (q * scale) @ entries.transpose(1, 2)  # [t, H, K]
    weights = scores.sub_(lse.unsqueeze(-1)).exp_().masked_fill_((indices < 0).unsqueeze(1), 0)
    drift = (grad_lse - (grad_out * out).sum(-1)).unsqueeze(-1)
    grad_scores = (grad_out @ entries[..., :value_dim].transpose(1, 2)).add_(drift).mul_(weights).mul_(scale)
    # As a key an entry gets dS^T q, as a value P^T dO: one product over both, since what it costs is writing [t, K, D].
    grad_values = F.pad(grad_out, (0, q.shape[2] - value_dim))
    rows = torch.cat([grad_scores, weights], 1).transpose(1, 2) @ torch.cat([q, grad_values], 1)
    add_rows(grad_kv, indices, rows, atomic)
    return grad_scores @ entries


def block_columns(indices: Tensor) -> Tensor:
    """indices [t, K] less the trailing blocks of KEY_BLOCK columns where no row has a key; at least MIN_ROWS wide."""
    K = indices.shape[1]
    while K > KEY_BLOCK and not bool((indices[:, (K - 1) // KEY_BLOCK * KEY_BLOCK : K] >= 0).any()):
        K = (K - 1) // KEY_BLOCK * KEY_BLOCK
    return indices[:, :K] if K >= MIN_ROWS else F.pad(indices, (0, MIN_ROWS - K), value=-1)


def present(indices: Tensor) -> Tensor:
    """indices [t, K] as int64, with each -1 replaced by a position of the same row, so that no foreign row is ever read."""
    indices = indices.long()
    return torch.where(indices < 0, indices.amax(1, keepdim=True).clamp_min(0), indices)


def gather_rows(source: Tensor, indices: Tensor) -> Tensor:
    """source [S, D] at indices [t, K] -> [t, K, D]. In place of a -1 stands another row of the same query; a query that selects
    nothing gets zeros."""
    t, K = indices.shape
    if not len(source):
        return source.new_zeros(t, K, source.shape[1])
    rows = source.index_select(0, present(indices).view(-1)).view(t, K, source.shape[1])
    empty = (indices < 0).all(1)
    return rows.masked_fill_(empty[:, None, None], 0) if bool(empty.any()) else rows


def add_rows(target: Tensor, indices: Tensor, rows: Tensor, atomic: bool = False) -> None:
    """target[indices[t, k]] += rows[t, k], in that order unless atomic; rows must be 0 where the index is negative."""
    if not len(target):
        return
    rows, flat = rows.flatten(0, 1), present(indices).view(-1)
    if target.is_cuda and not atomic:  # index_add_ would add atomically
        target.index_put_((flat,), rows, accumulate=True)
    else:
        target.index_add_(0, flat, rows)
