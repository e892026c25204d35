"""The indexer's loss: sum_t KL(p_t || softmax(I_t)) (DeepSeek-V3.2, eq. 3 and 4), and how good a selection is.

The target p_t is the main attention's: its probabilities summed over heads and L1-normalised over the row's keys. Dense warm-up
takes all eligible keys, sparse training only the selected ones, both sides restricted to them and renormalised.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rorqual.kernels.dense_attention import KEY_TILE, dense_attention_plain
from rorqual.kernels.dispatch import triton_form
from rorqual.kernels.index_score import sum_heads
from rorqual.kernels.linear import accumulator, row_product
from rorqual.kernels.selection import exclude_outside, row_ranges, top_columns
from rorqual.kernels.sparse_attention import add_rows, gather_rows

TILE_ELEMENTS = 1 << 20
"""Numbers held at once in the largest tensor of a tile: 4 MiB of float32."""


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
    """KL divergence of each row, in nats, float32 [T] (float64 for float64 inputs); 0 for a row without keys.

    The indexer's: query [T, I, C], key [S, C], weight [T, I], as `index_score` takes them.
    The main attention's, absorbed form: q [T, H, L+R], kv [S, L+R], scale; no gradient flows to them.
    Without indices: over the keys [starts[t], ends[t]), by default causal. With indices (integer [T, K], negative: none): over
    those alone, and starts and ends are not used.
    lse [T, H] is the main attention's over the same keys, where the caller has it; else it is computed in a pass of its own.

    The gradient with respect to the index scores is softmax(I) - p, carried on through the weighting, the ReLU, and the
    products to query, key and weight. Never a [T, S] tensor beyond a tile, forward or backward.
    """
    form = triton_form("index_loss", query, key, weight, q, kv) or index_loss_plain
    return form(query, key, weight, q, kv, scale, starts, ends, indices, lse=lse)


def index_loss_plain(
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
    q, kv = q.detach(), kv.detach()
    if indices is not None:
        return _RestrictedLoss.apply(query, key, weight, q, kv, scale, indices)  # type: ignore[return-value]
    starts, ends = row_ranges(q.shape[0], key.shape[0], starts, ends, q.device)
    if lse is None:
        with torch.no_grad():
            lse = dense_attention_plain(q, kv[:, None], kv[:, None, :1], scale, starts, ends)[1]
    return _DenseLoss.apply(query, key, weight, q, kv, scale, starts, ends, lse)  # type: ignore[return-value]


class _RestrictedLoss(torch.autograd.Function):
    """Keeps the target [T, K], which is the size of the selection itself."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, weight: Tensor, q: Tensor, kv: Tensor, scale: float, indices: Tensor
    ) -> Tensor:
        dtype = accumulator(query, key, weight)
        loss = torch.empty(len(query), dtype=dtype, device=query.device)
        target = torch.empty(indices.shape, dtype=dtype, device=query.device)
        for rows in row_slices(len(query), indices.shape[1] * max(q.shape[2], *query.shape[1:])):
            absent = indices[rows] < 0
            target[rows] = selected_target(q[rows], kv, indices[rows], scale, dtype)
            dots = selected_dots(query[rows].to(dtype), gather_rows(key, indices[rows]).to(dtype))
            loss[rows] = divergence(target[rows], masked_scores(dots, weight[rows].to(dtype), absent))
        ctx.save_for_backward(query, key, weight, indices, target)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, weight, indices, target = ctx.saved_tensors
        dtype = target.dtype
        grad_query, grad_weight = torch.empty_like(query), torch.empty_like(weight)
        grad_key = torch.zeros_like(key, dtype=dtype)
        for rows in row_slices(len(query), indices.shape[1] * max(*query.shape[1:])):
            queries, weights = query[rows].to(dtype), weight[rows].to(dtype)
            keys = gather_rows(key, indices[rows]).to(dtype)  # [t, K, C]
            dots = selected_dots(queries, keys)  # [t, I, K]
            scores = masked_scores(dots, weights, indices[rows] < 0)
            grad_scores = score_gradient(target[rows], scores, grad[rows])
            grad_weight[rows], grad_dots = through_weighting(dots, weights, grad_scores)
            grad_query[rows] = grad_dots @ keys
            add_rows(grad_key, indices[rows], grad_dots.transpose(1, 2) @ queries)
        return grad_query, grad_key.to(key.dtype), grad_weight, None, None, None, None


class _DenseLoss(torch.autograd.Function):
    """Recomputes scores and target in the backward: nothing of [T, S] is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        weight: Tensor,
        q: Tensor,
        kv: Tensor,
        scale: float,
        starts: Tensor,
        ends: Tensor,
        lse: Tensor,
    ) -> Tensor:
        loss = torch.empty(len(query), dtype=accumulator(query, key, weight), device=query.device)
        tiles = DenseTiles(query, key, weight, q, kv, scale, starts, ends, lse)
        for tile in tiles:
            loss[tile.rows] = divergence(tile.target, tile.scores)
        ctx.save_for_backward(query, key, weight, q, kv, starts, ends, lse)
        ctx.scale = scale
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, weight, q, kv, starts, ends, lse = ctx.saved_tensors
        dtype = accumulator(query, key, weight)
        grad_query = torch.zeros_like(query, dtype=dtype)
        grad_weight, grad_key = torch.zeros_like(weight, dtype=dtype), torch.zeros_like(key, dtype=dtype)
        for tile in DenseTiles(query, key, weight, q, kv, ctx.scale, starts, ends, lse):
            grad_scores = score_gradient(tile.target, tile.scores, grad[tile.rows])
            queries, weights = query[tile.rows].to(dtype), weight[tile.rows].to(dtype)
            for low in range(tile.low, tile.high, KEY_TILE):
                columns = slice(low, min(low + KEY_TILE, tile.high))
                dots = index_dots(queries, key[columns].to(dtype))
                some = grad_scores[:, columns.start - tile.low : columns.stop - tile.low]
                part, grad_dots = through_weighting(dots, weights, some)
                grad_weight[tile.rows] += part
                flat = grad_dots.flatten(0, 1)  # [t I, s]
                grad_query[tile.rows] += (flat @ key[columns].to(dtype)).view_as(queries)
                grad_key[columns] += flat.t() @ queries.flatten(0, 1)
        grads = grad_query.to(query.dtype), grad_key.to(key.dtype), grad_weight.to(weight.dtype)
        return *grads, None, None, None, None, None, None


class DenseTile(NamedTuple):
    """Some rows against the keys [low, high) that any of them sees: scores and target, both [t, high - low]."""

    rows: slice
    low: int
    high: int
    scores: Tensor
    """Index scores, -inf outside a row's range."""
    target: Tensor
    """The main attention's head-summed, L1-normalised probabilities, 0 outside a row's range."""


class DenseTiles:
    """All rows that have keys, tile by tile; a tile without keys yields empty scores."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        weight: Tensor,
        q: Tensor,
        kv: Tensor,
        scale: float,
        starts: Tensor,
        ends: Tensor,
        lse: Tensor,
    ):
        self.index = query, key, weight
        self.q, self.kv, self.scale, self.lse = q, kv, scale, lse
        self.starts, self.ends = starts, ends
        self.dtype = accumulator(query, key, weight)

    def __iter__(self) -> Iterator[DenseTile]:
        S, heads = len(self.kv), max(self.q.shape[1], self.index[0].shape[1])
        for rows in row_slices(len(self.q), max(S, heads * KEY_TILE)):
            seen = self.starts[rows] < self.ends[rows]
            low = int(self.starts[rows][seen].min()) if bool(seen.any()) else 0
            high = int(self.ends[rows][seen].max()) if bool(seen.any()) else 0
            yield DenseTile(rows, low, high, self._scores(rows, low, high), self._target(rows, low, high))

    def _scores(self, rows: slice, low: int, high: int) -> Tensor:
        query, key, weight = (part.to(self.dtype) for part in (self.index[0][rows], self.index[1][low:high], self.index[2][rows]))
        scores = torch.empty(len(query), high - low, dtype=self.dtype, device=query.device)
        for start in range(0, high - low, KEY_TILE):
            dots = torch.relu_(index_dots(query, key[start : start + KEY_TILE]))
            scores[:, start : start + KEY_TILE] = sum_heads(dots * weight.unsqueeze(-1))
        if high > low:
            exclude_outside(scores, self.starts[rows] - low, self.ends[rows] - low)
        return scores

    def _target(self, rows: slice, low: int, high: int) -> Tensor:
        return attention_mass(
            self.q[rows],
            self.kv[low:high],
            self.scale,
            self.lse[rows],
            self.starts[rows] - low,
            self.ends[rows] - low,
            self.dtype,
        )


def attention_mass(q: Tensor, kv: Tensor, scale: float, lse: Tensor, starts: Tensor, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """The main attention's probabilities summed over heads and L1-normalised over a row's keys: [t, s], 0 outside its range."""
    t, H, D = q.shape
    flat, lse = (q.to(dtype) * scale).view(t * H, D), lse.to(dtype).unsqueeze(-1)
    mass = torch.empty(t, len(kv), dtype=dtype, device=q.device)
    for low in range(0, len(kv), KEY_TILE):
        scores = row_product(flat, kv[low : low + KEY_TILE].to(dtype)).view(t, H, -1)
        mass[:, low : low + KEY_TILE] = scores.sub_(lse).exp_().sum(1)
    columns = torch.arange(len(kv), device=q.device)
    mass.masked_fill_((columns < starts[:, None]) | (columns >= ends[:, None]), 0)
    return mass.div_(mass.sum(1, keepdim=True).clamp_min_(torch.finfo(dtype).tiny))


def selected_target(q: Tensor, kv: Tensor, indices: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """`attention_mass` over the selected keys: q [t, H, D], indices [t, K] -> [t, K], 0 where negative."""
    absent = (indices < 0).unsqueeze(1)
    scores = (q.to(dtype) * scale) @ gather_rows(kv, indices).to(dtype).transpose(1, 2)  # [t, H, K]
    weights = torch.softmax(scores.masked_fill_(absent, torch.finfo(dtype).min), -1)
    return weights.masked_fill_(absent, 0).mean(1)


def selected_dots(query: Tensor, keys: Tensor) -> Tensor:
    """query [t, I, C], keys [t, K, C] -> [t, I, K]."""
    return query @ keys.transpose(1, 2)


def index_dots(query: Tensor, keys: Tensor) -> Tensor:
    """query [t, I, C], keys [s, C] -> [t, I, s]."""
    return row_product(query.flatten(0, 1), keys).unflatten(0, query.shape[:2])


def masked_scores(dots: Tensor, weight: Tensor, absent: Tensor) -> Tensor:
    """Index scores of dots [t, I, K] under weight [t, I]: [t, K], -inf where absent."""
    return (torch.relu(dots) * weight.unsqueeze(-1)).sum(1).masked_fill_(absent, -torch.inf)


def divergence(target: Tensor, scores: Tensor) -> Tensor:
    """KL(target || softmax(scores)) of each row of [t, s]; a term of target 0 is 0, a row of nothing is 0."""
    if not scores.shape[1]:
        return scores.new_zeros(len(scores))
    predicted = torch.log_softmax(scores, 1)
    return torch.where(target > 0, torch.xlogy(target, target) - target * predicted, 0).sum(1)


def score_gradient(target: Tensor, scores: Tensor, grad: Tensor) -> Tensor:
    """d(sum_t grad_t KL_t) / dI = grad (softmax(I) - p), and 0 for a row without keys: [t, s]."""
    predicted = torch.softmax(scores, 1) if scores.shape[1] else scores
    empty = target.sum(1, keepdim=True) == 0
    return ((predicted - target) * grad.to(target.dtype).unsqueeze(-1)).masked_fill_(empty, 0)


def through_weighting(dots: Tensor, weight: Tensor, grad_scores: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient of I = sum_j w_j ReLU(dots_j) to those of w [t, I] and of dots [t, I, s]."""
    positive = torch.relu(dots)
    grad_weight = (positive @ grad_scores.unsqueeze(-1)).squeeze(-1)
    return grad_weight, (grad_scores.unsqueeze(1) * weight.unsqueeze(-1)).masked_fill_(dots <= 0, 0)


def row_slices(T: int, row_elements: int) -> Iterator[slice]:
    """Slices of rows that hold at most TILE_ELEMENTS numbers, `row_elements` each, and at least one row."""
    size = max(1, TILE_ELEMENTS // max(1, row_elements))
    for low in range(0, T, size):
        yield slice(low, min(low + size, T))


class SelectionQuality(NamedTuple):
    """How good a selection is, for each row: float32 [T] each. Rows without keys hold NaN."""

    captured: Tensor
    """Share of the main attention's mass (dense, mean over heads) that the selected keys hold."""
    oracle: Tensor
    """The share that the same number of best keys would hold: the ceiling of `captured`."""
    recall: Tensor
    """Share of those best keys (ties to the lowest position) that are among the selected."""


@torch.no_grad()
def selection_quality(
    q: Tensor, kv: Tensor, scale: float, indices: Tensor, starts: Tensor | None = None, ends: Tensor | None = None
) -> SelectionQuality:
    """Judge a selection against the dense main attention: q [T, H, L+R], kv [S, L+R], indices [T, K] within [starts, ends).

    Costs a dense pass in tiles: for diagnosis and reports, not for every step.
    """
    form = triton_form("selection_quality", q, kv, indices, file="index_loss") or selection_quality_plain
    return form(q, kv, scale, indices, starts, ends)


def selection_quality_plain(
    q: Tensor, kv: Tensor, scale: float, indices: Tensor, starts: Tensor | None = None, ends: Tensor | None = None
) -> SelectionQuality:
    starts, ends = row_ranges(q.shape[0], kv.shape[0], starts, ends, q.device)
    dtype = accumulator(q, kv)
    lse = dense_attention_plain(q, kv[:, None], kv[:, None, :1], scale, starts, ends)[1]
    quality = torch.full((3, len(q)), torch.nan, dtype=dtype, device=q.device)
    for rows in row_slices(len(q), max(len(kv), q.shape[1] * KEY_TILE)):
        mass = attention_mass(q[rows], kv, scale, lse[rows], starts[rows], ends[rows], dtype)  # [t, S]
        present = indices[rows] >= 0
        chosen = torch.zeros_like(mass).scatter_add_(1, indices[rows].long().clamp_min(0), present.to(dtype)) > 0
        counts = present.sum(1, keepdim=True)
        best = best_columns(mass, min(indices.shape[1], len(kv)))  # [t, K], the heaviest first
        ranked = torch.arange(best.shape[1], device=q.device) < counts
        captured = (mass * chosen).sum(1)
        oracle = (mass.gather(1, best) * ranked).sum(1)
        hits = (chosen.gather(1, best) & ranked).sum(1).to(dtype)
        quality[:, rows] = torch.stack([captured, oracle, hits / counts[:, 0]]).masked_fill(counts[:, 0] == 0, torch.nan)
    return SelectionQuality(*quality)


def best_columns(mass: Tensor, count: int) -> Tensor:
    """The columns of the `count` largest of each row of [t, s], largest first, ties to the lowest column: [t, count]."""
    columns = top_columns(mass, count) if count < mass.shape[1] else torch.arange(count, device=mass.device).expand(len(mass), -1)
    order = mass.gather(1, columns).sort(dim=1, descending=True, stable=True).indices
    return columns.gather(1, order)
