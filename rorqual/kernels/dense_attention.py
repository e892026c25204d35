"""Attention over all eligible keys, key tile by key tile with a running maximum: the dense layers, the indexer's warm-up, and the
short prefill that simulates DSA by a mask (DeepSeek-V3.2, 2.3). Never a [T, S] tensor beyond a tile, forward or backward.

Expanded (MHA) keys are [S, H, D]; absorbed (MQA) ones [S, 1, D], shared by all heads. Both are one code: G groups of heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rorqual.kernels.dispatch import triton_form
from rorqual.kernels.linear import MIN_ROWS, accumulator
from rorqual.kernels.selection import row_ranges

KEY_TILE = 256
"""Tiles begin at multiples of this from key 0 and the last is zero-padded, so that a query's sums have one order in any batch."""
TILE_SCORES = 1 << 18
"""Scores held at once (queries x heads x keys): 1 MiB of float32."""


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None = None, ends: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of row t over the keys [starts[t], ends[t]), by default the causal [0, S - T + t + 1).

    q [T, H, D], k [S, G, D], v [S, G, L] where G is H or 1 -> (out [T, H, L] of q's dtype, lse [T, H] float32, natural log).
    A row without keys gives 0 and -inf. Sums are float32 (float64 for float64 inputs). Keys must be finite.
    Differentiable with respect to q, k and v, through out and lse. On CPU a query's result is bitwise the same in any batch or
    chunk whose keys begin at the same key 0. Cost follows the ranges: key tiles outside a query tile's ranges are skipped.
    """
    form = triton_form("dense_attention", q, k, v) or dense_attention_plain
    return form(q, k, v, scale, starts, ends)


def dense_attention_plain(
    q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None = None, ends: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    starts, ends = row_ranges(q.shape[0], k.shape[0], starts, ends, q.device)
    return _DenseAttention.apply(q, k, v, scale, starts, ends, None)  # type: ignore[return-value]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`dense_attention` of a whole document (T = S, each row sees all keys up to its own), its output alone: [T, H, L]."""
    form = triton_form("causal_attention", q, k, v, file="dense_attention")
    return form(q, k, v, scale) if form else dense_attention(q, k, v, scale)[0]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, indices: Tensor) -> Tensor:
    """`dense_attention` in which row t sees only the keys indices[t] (integer [T, K], negative: none) -> out [T, H, L].

    The same function as `sparse_attention` (to rounding), at dense cost: the better form while S is not far above K.
    """
    form = triton_form("masked_attention", q, k, v, indices, file="dense_attention")
    return (form or masked_attention_plain)(q, k, v, scale, indices)


def masked_attention_plain(q: Tensor, k: Tensor, v: Tensor, scale: float, indices: Tensor) -> Tensor:
    starts, ends = selection_ranges(indices, k.shape[0])
    return _DenseAttention.apply(q, k, v, scale, starts, ends, indices)[0]  # type: ignore[index]


def selection_ranges(indices: Tensor, S: int) -> tuple[Tensor, Tensor]:
    """The least range [starts[t], ends[t]) that holds the keys of each row, int64 [T] both."""
    ends = indices.amax(1).long() + 1 if indices.shape[1] else indices.new_zeros(len(indices), dtype=torch.long)
    return torch.where(indices < 0, S, indices).amin(1).long() if indices.shape[1] else torch.zeros_like(ends), ends


class _DenseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor, ends: Tensor, indices: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulator(q, k, v)
        out = torch.empty(*q.shape[:2], v.shape[2], dtype=dtype, device=q.device)
        lse = torch.empty(*q.shape[:2], dtype=dtype, device=q.device)
        for tile in query_tiles(q, k, starts, ends, indices):
            out[tile.rows], lse[tile.rows] = attend(tile, q, k, v, scale, dtype)
        ctx.save_for_backward(q, k, v, starts, ends, indices, out, lse)
        ctx.scale = scale
        return out.to(q.dtype), lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, starts, ends, indices, out, lse = ctx.saved_tensors
        return *backward_by_tiles(q, k, v, ctx.scale, starts, ends, indices, out, lse, grad_out, grad_lse), None, None, None, None


def backward_by_tiles(
    q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor, ends: Tensor, indices: Tensor | None,
    out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v; out [T, H, L] and lse [T, H] as the forward gave them, in the dtype to sum in."""
    grad_q = torch.empty_like(q)
    grad_k, grad_v = torch.zeros_like(k, dtype=out.dtype), torch.zeros_like(v, dtype=out.dtype)
    drift = grad_lse - (grad_out.to(out.dtype) * out).sum(-1)  # [T, H]
    for tile in query_tiles(q, k, starts, ends, indices):
        grad_q[tile.rows] = attend_backward(tile, q, k, v, scale, lse, grad_out, drift, grad_k, grad_v)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


@dataclass(frozen=True)
class QueryTile:
    """Some query rows and the key tiles that they see."""

    rows: slice
    heads: int
    """Heads that share a key: H / G."""
    starts: Tensor
    ends: Tensor
    first: int
    last: int
    """Key tiles cover [first, last): from the tile of the earliest start to the latest end."""
    S: int
    unseen: Tensor | None
    """bool [t, S]: True where a row's own set of keys has none; None: ranges alone decide."""

    def key_tiles(self) -> Iterator[tuple[int, int, Tensor | None]]:
        """(low, high, hidden): hidden is bool [t, KEY_TILE] where some row of the tile may not look, else None."""
        inner_first, inner_last = int(self.starts.max()), int(self.ends.min())
        for low in range(self.first, self.last, KEY_TILE):
            high = min(low + KEY_TILE, self.S)
            whole = inner_first <= low and low + KEY_TILE <= inner_last
            yield low, high, None if whole and self.unseen is None else self._hidden(low, high)

    def _hidden(self, low: int, high: int) -> Tensor:
        columns = torch.arange(low, low + KEY_TILE, device=self.starts.device)
        hidden = (columns < self.starts[:, None]) | (columns >= self.ends[:, None])
        if self.unseen is not None:
            hidden[:, : high - low] |= self.unseen[:, low:high]
        return hidden


def query_tiles(q: Tensor, k: Tensor, starts: Tensor, ends: Tensor, indices: Tensor | None) -> Iterator[QueryTile]:
    T, H, _ = q.shape
    size = max(1, TILE_SCORES // (H * KEY_TILE))
    for low in range(0, T, size):
        rows = slice(low, min(low + size, T))
        seen = starts[rows] < ends[rows]
        last = int(ends[rows][seen].max()) if bool(seen.any()) else 0
        first = int(starts[rows][seen].min()) // KEY_TILE * KEY_TILE if last else 0
        unseen = None
        if indices is not None:
            at = torch.where(indices[rows] < 0, k.shape[0], indices[rows]).long()
            unseen = torch.ones(at.shape[0], k.shape[0] + 1, dtype=torch.bool, device=q.device).scatter_(1, at, False)
        yield QueryTile(rows, H // k.shape[1], starts[rows], ends[rows], first, last, k.shape[0], unseen)


def attend(tile: QueryTile, q: Tensor, k: Tensor, v: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One query tile: out [t, H, L] and lse [t, H]."""
    G, L = k.shape[1], v.shape[2]
    rows = grouped(q[tile.rows].to(dtype) * scale, G)  # [G, M, D]
    top = rows.new_full((G, rows.shape[1], 1), -torch.inf)
    total, out = torch.zeros_like(top), rows.new_zeros(G, rows.shape[1], L)
    for low, high, hidden in tile.key_tiles():
        scores = tile_scores(tile, rows, key_tile(k, low, high, dtype), hidden)  # [G, M, KEY_TILE]
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        shift = new_top.masked_fill(new_top == -torch.inf, 0)  # no key yet: exp(-inf - 0) = 0
        weights, fade = scores.sub_(shift).exp_(), (top - shift).exp_()
        total = total.mul_(fade).add_(weights.sum(-1, keepdim=True))
        out = out.mul_(fade).add_(weights @ key_tile(v, low, high, dtype))
        top = new_top
    out = out.div_(total).masked_fill_(total == 0, 0)
    return ungrouped(out, tile, q), ungrouped(top.add_(total.log_()), tile, q).squeeze(-1)


def attend_backward(
    tile: QueryTile,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    lse: Tensor,
    grad_out: Tensor,
    drift: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
) -> Tensor:
    """One query tile: returns the gradient of its queries, adds those of the keys and values. drift [T, H]: grad_lse - dO . O."""
    dtype, G = lse.dtype, k.shape[1]
    rows, grad_rows = grouped(q[tile.rows].to(dtype) * scale, G), grouped(grad_out[tile.rows].to(dtype), G)
    drift = grouped(drift[tile.rows].unsqueeze(-1), G)
    # A row without keys has lse = -inf and weights exp(-inf - inf) = 0.
    lse = grouped(lse[tile.rows].masked_fill(lse[tile.rows] == -torch.inf, torch.inf).unsqueeze(-1), G)
    grad_q = torch.zeros_like(rows)
    for low, high, hidden in tile.key_tiles():
        keys, values = key_tile(k, low, high, dtype), key_tile(v, low, high, dtype)
        weights = tile_scores(tile, rows, keys, hidden).sub_(lse).exp_()  # [G, M, KEY_TILE]
        grad_scores = (grad_rows @ values.transpose(1, 2)).add_(drift).mul_(weights)
        grad_q.baddbmm_(grad_scores, keys, alpha=scale)
        grad_k[low:high] += (grad_scores.transpose(1, 2) @ rows)[:, : high - low].transpose(0, 1)
        grad_v[low:high] += (weights.transpose(1, 2) @ grad_rows)[:, : high - low].transpose(0, 1)
    return ungrouped(grad_q, tile, q)


def grouped(x: Tensor, G: int) -> Tensor:
    """x [t, H, D] -> [G, M, D] with M = t x H/G rows, zero-padded to the least that gives invariant bits."""
    t, H, D = x.shape
    rows = x.view(t, G, H // G, D).transpose(0, 1).reshape(G, -1, D)
    return rows if rows.shape[1] >= MIN_ROWS else F.pad(rows, (0, 0, 0, MIN_ROWS - rows.shape[1]))


def ungrouped(rows: Tensor, tile: QueryTile, q: Tensor) -> Tensor:
    """The inverse of `grouped`: [G, M, D] -> [t, H, D]."""
    t, heads = len(tile.starts), tile.heads
    return rows[:, : t * heads].unflatten(1, (t, heads)).transpose(0, 1).reshape(t, q.shape[1], -1)


def key_tile(x: Tensor, low: int, high: int, dtype: torch.dtype) -> Tensor:
    """x [S, G, D] at [low, high) -> [G, KEY_TILE, D], zero-padded."""
    rows = x[low:high].to(dtype).transpose(0, 1)
    return rows if high - low == KEY_TILE else F.pad(rows, (0, 0, 0, KEY_TILE - (high - low)))


def tile_scores(tile: QueryTile, rows: Tensor, keys: Tensor, hidden: Tensor | None) -> Tensor:
    """Scores [G, M, KEY_TILE] of grouped rows [G, M, D] against keys [G, KEY_TILE, D], -inf where hidden [t, KEY_TILE]."""
    scores = rows @ keys.transpose(1, 2)
    if hidden is not None:
        t = len(hidden)
        scores[:, : t * tile.heads].unflatten(1, (t, tile.heads)).masked_fill_(hidden[:, None], -torch.inf)
    return scores
