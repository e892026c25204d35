"""Selection and dense attention for queries that each have keys of their own, as in a decode step of many requests: one batched
product where `select_tokens` and `dense_attention` would be called once for each request. A query's result is theirs, bit for
bit on a CPU, whatever stands in the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels.dense_attention import KEY_TILE
from rorqual.kernels.index_score import sum_heads
from rorqual.kernels.linear import MIN_ROWS, accumulator
from rorqual.kernels.selection import TILE_DOTS, exclude_outside, top_columns


@torch.no_grad()
def select_own_tokens(q: Tensor, k: Tensor, w: Tensor, topk: int, lengths: Tensor) -> Tensor:
    """As `select_tokens`: query b chooses among the first lengths[b] of its own keys k[b].

    q [B, I, C], k [B, S, C], w [B, I], lengths integer [B] in [0, S], S > topk -> int32 [B, topk], ascending, -1 last.
    What k holds beyond a query's length is never chosen, whatever it is.
    """
    dtype = accumulator(q, k, w)
    chosen = torch.empty(len(q), topk, dtype=torch.int32, device=q.device)
    tile = max(1, TILE_DOTS // (max(q.shape[1], MIN_ROWS) * k.shape[1]))
    for low in range(0, len(q), tile):
        rows = slice(low, low + tile)
        scores = own_scores(q[rows].to(dtype), k[rows].to(dtype), w[rows].to(dtype))  # [b, S]
        exclude_outside(scores, torch.zeros_like(lengths[rows]), lengths[rows])
        chosen[rows] = top_columns(scores, topk)
    return torch.where(chosen < lengths[:, None], chosen, -1)


def own_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """The index scores of each query against its own keys: q [b, I, C], k [b, S, C], w [b, I] -> [b, S]."""
    I = q.shape[1]
    dots = torch.bmm(pad_heads(q), k.transpose(1, 2))[:, :I]  # [b, I, S]
    return sum_heads(torch.relu_(dots).mul_(w.unsqueeze(-1)))


def attend_own_keys(q: Tensor, kv: Tensor, scale: float, value_dim: int, lengths: Tensor) -> Tensor:
    """As `dense_attention` in MLA's absorbed form: query b attends to the first lengths[b] of its own entries kv[b].

    q [B, H, L+R], kv [B, S, L+R], value_dim = L, lengths integer [B] in [1, S] -> [B, H, L] of q's dtype. Sums are float32
    (float64 for float64 inputs). What kv holds beyond a query's length makes no difference, whatever it is.
    """
    H, dtype = q.shape[1], accumulator(q, kv)
    rows = pad_heads(q.to(dtype) * scale)  # [B, M, D]
    top = rows.new_full((*rows.shape[:2], 1), -torch.inf)
    total, out = torch.zeros_like(top), rows.new_zeros(*rows.shape[:2], value_dim)
    for low in range(0, kv.shape[1], KEY_TILE):
        keys, hidden = own_tile(kv, low, lengths, dtype)
        scores = (rows @ keys.transpose(1, 2)).masked_fill_(hidden.unsqueeze(1), -torch.inf)  # [B, M, KEY_TILE]
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        weights, fade = scores.sub_(new_top).exp_(), (top - new_top).exp_()
        total = total.mul_(fade).add_(weights.sum(-1, keepdim=True))
        out = out.mul_(fade).add_(weights @ keys[..., :value_dim])
        top = new_top
    return out.div_(total)[:, :H].to(q.dtype)


def own_tile(kv: Tensor, low: int, lengths: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Entries [low, low + KEY_TILE) of each query, zero beyond its length: [B, KEY_TILE, D]; and which those are."""
    keys = kv[:, low : low + KEY_TILE].to(dtype)
    keys = F.pad(keys, (0, 0, 0, KEY_TILE - keys.shape[1]))
    hidden = torch.arange(low, low + KEY_TILE, device=kv.device) >= lengths[:, None]
    return keys.masked_fill(hidden.unsqueeze(-1), 0), hidden


def pad_heads(q: Tensor) -> Tensor:
    """q [B, H, D] with zero heads below, up to the least number of rows whose product keeps its bits."""
    return q if q.shape[1] >= MIN_ROWS else F.pad(q, (0, 0, 0, MIN_ROWS - q.shape[1]))
