"""Naive forms behind the signatures of rorqual.kernels, for as long as those are not there."""

from __future__ import annotations

import torch
from torch import Tensor

MIN_ROWS = 16


def invariant_linear(x: Tensor, weight: Tensor) -> Tensor:
    missing = MIN_ROWS - x.shape[0]
    if missing <= 0 or x.is_cuda:
        return x @ weight.t()
    return (torch.cat([x, x.new_zeros(missing, x.shape[1])]) @ weight.t())[: x.shape[0]]


def select_tokens(q, k, w, topk, starts=None, ends=None):
    scores = torch.einsum("tis,ti->ts", torch.einsum("tic,sc->tis", q.float(), k.float()).relu(), w)
    at = torch.arange(k.shape[0], device=k.device)
    scores = scores.masked_fill((at < starts[:, None]) | (at >= ends[:, None]), -torch.inf)
    count = min(topk, k.shape[0])
    top = scores.sort(dim=1, descending=True, stable=True)
    chosen = torch.where(top.values[:, :count] > -torch.inf, top.indices[:, :count], k.shape[0])
    chosen = chosen.sort(1).values
    return torch.where(chosen < k.shape[0], chosen, -1).int()


def sparse_attention(q, kv, indices, scale, value_dim):
    rows = kv[indices.clamp(min=0).long()]  # [T, K, L + R]
    scores = torch.einsum("thc,tkc->thk", q.float(), rows.float()) * scale
    scores = scores.masked_fill(indices[:, None] < 0, -torch.inf)
    lse = scores.logsumexp(-1)
    p = torch.exp(scores - lse[..., None])
    return torch.einsum("thk,tkc->thc", p, rows[..., :value_dim].float()).to(q.dtype), lse


def dense_attention(q, k, v, scale, starts, ends):
    H = q.shape[1]
    k, v = k.expand(-1, H, -1), v.expand(-1, H, -1)
    scores = torch.einsum("thc,shc->hts", q.float(), k.float()) * scale
    at = torch.arange(k.shape[0], device=k.device)
    scores = scores.masked_fill((at < starts[:, None]) | (at >= ends[:, None]), -torch.inf)
    lse = scores.logsumexp(-1)
    return torch.einsum("hts,shc->thc", torch.exp(scores - lse[..., None]), v.float()).to(q.dtype), lse.t()


def experts(x, w1, w2, w3, chosen, gates):
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in range(w1.shape[0]):
        rows, which = (chosen == e).nonzero(as_tuple=True)
        if len(rows):
            a, b = invariant_linear(x[rows], w1[e]).float(), invariant_linear(x[rows], w3[e]).float()
            h = invariant_linear((a / (1 + (-a).exp()) * b).to(x.dtype), w2[e])
            y = y.index_add(0, rows, h.float() * gates[rows, which, None])
    return y.to(x.dtype)


def masked_attention(q, k, v, scale, indices):
    scores = torch.einsum("thc,shc->hts", q.float(), k.float()) * scale
    at = torch.where(indices >= 0, indices, k.shape[0]).long()
    hidden = torch.ones(q.shape[0], k.shape[0] + 1, dtype=torch.bool, device=q.device).scatter(1, at, False)
    scores = scores.masked_fill(hidden[:, :-1], -torch.inf)
    return torch.einsum("hts,shc->thc", scores.softmax(-1), v.float()).to(q.dtype)


def index_loss(query, key, weight, q, kv, scale, starts, ends, indices=None):
    scores = torch.einsum("tis,ti->ts", torch.einsum("tic,sc->tis", query.float(), key.float()).relu(), weight)
    attention = torch.einsum("thc,sc->hts", q.float(), kv.float()) * scale
    at = torch.arange(key.shape[0], device=q.device)
    hidden = (at < starts[:, None]) | (at >= ends[:, None])
    if indices is not None:
        chosen = torch.where(indices >= 0, indices, key.shape[0]).long()
        hidden = torch.ones(q.shape[0], key.shape[0] + 1, dtype=torch.bool).to(q.device).scatter(1, chosen, False)[:, :-1]
    target = attention.masked_fill(hidden, -torch.inf).softmax(-1).mean(0)
    predicted = scores.masked_fill(hidden, -torch.inf).log_softmax(-1)
    return torch.where(target > 0, target * (target.clamp(min=1e-38).log() - predicted.masked_fill(hidden, 0)), 0).sum(1)
