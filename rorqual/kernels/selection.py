"""The selection of DSA: the top-k keys of each query by index score (DeepSeek-V3.2, eq. 2), exact and deterministic."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rorqual.kernels.dispatch import triton_form
from rorqual.kernels.index_score import write_scores
from rorqual.kernels.linear import MIN_ROWS, accumulator

TILE_DOTS = 1 << 18
"""Dot products held at once (queries x heads x keys): 1 MiB of float32, so that a tile stays in a core's cache."""
TILE_SCORES = 1 << 22
"""Scores held at once (queries x keys): 16 MiB of float32."""
KEY_TILE = 512
SAMPLE = 8
"""Every so many columns are looked at to guess a row's threshold..."""
SAMPLED_FROM = 12
"""...where a row is at least this many times topk long."""


def select_tokens(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    topk: int,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    *,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The `topk` best keys of each query: q [T, I, C], k [S, C], w [T, I] -> int32 [T, topk], ascending, -1 last.

    Row t chooses among the positions [starts[t], ends[t]) (integer tensors [T]), by default the causal [0, S - T + t + 1) of
    T queries at the end of S keys. A row with fewer eligible positions takes them all; one with ends <= starts takes none.

    Exact: among equal scores the lowest position wins, so the set is a pure function of the scores, whatever the tiling. On CPU
    the scores too are the same bits under any chunking or batching; on GPU they may differ with the launch's shape.
    A NaN or -inf score counts as the lowest finite number, so an eligible position is still chosen before none.

    return_scores: also the scores of the selected, float32 [T, topk], -inf where the index is -1.
    No gradient flows. Holds at most TILE_SCORES scores beside its output.
    """
    form = triton_form("select_tokens", q, k, w) or select_tokens_plain
    return form(q, k, w, topk, starts, ends, return_scores=return_scores)


@torch.no_grad()
def select_tokens_plain(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    topk: int,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    *,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    if topk < 1:
        raise ValueError(f"topk: expected at least 1, found {topk}")
    T, S = q.shape[0], k.shape[0]
    dtype = accumulator(q, k, w)
    q, k, w = q.to(dtype), k.to(dtype), w.to(dtype)
    starts, ends = row_ranges(T, S, starts, ends, q.device)
    counts, columns = ends - starts, torch.arange(topk, device=q.device)
    # A row with no more eligible keys than topk takes them all, in order: no score is needed.
    indices = torch.where(columns < counts[:, None], starts[:, None] + columns, -1).to(torch.int32)  # [T, K]
    scores = torch.full((T, topk), -torch.inf, dtype=dtype, device=q.device) if return_scores else None
    for rows in row_tiles(counts > (0 if return_scores else topk), S, heads=q.shape[1]):
        low, high = int(starts[rows].min()), int(ends[rows].max())
        tile = tile_scores(q[rows], k[low:high], w[rows])  # [t, high - low]
        exclude_outside(tile, starts[rows] - low, ends[rows] - low)
        if high - low > topk:
            chosen = (top_columns(tile, topk) + low).to(torch.int32)
            indices[rows] = torch.where((counts[rows] > topk)[:, None], chosen, indices[rows])
        if scores is not None:
            taken = indices[rows]
            scores[rows] = tile.gather(1, (taken.long() - low).clamp_min(0)).masked_fill_(taken < 0, -torch.inf)
    return indices if scores is None else (indices, scores)


def row_ranges(T: int, S: int, starts: Tensor | None, ends: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """The eligible positions [starts, ends) of each row, int64 [T] each, clamped to [0, S]; by default causal."""
    starts = torch.zeros(T, dtype=torch.long, device=device) if starts is None else starts.to(device, torch.long)
    ends = torch.arange(S - T + 1, S + 1, device=device) if ends is None else ends.to(device, torch.long)
    if starts.shape != (T,) or ends.shape != (T,):
        raise ValueError(f"starts and ends: expected shape [{T}], found {list(starts.shape)} and {list(ends.shape)}")
    return starts.clamp(0, S), ends.clamp(0, S)


def tile_dots() -> int:
    """TILE_DOTS for each of the cores that share a tile's operations."""
    return TILE_DOTS * torch.get_num_threads()


def row_tiles(wanted: Tensor, S: int, heads: int) -> list[Tensor]:
    """The rows where `wanted` [T] holds, in tiles whose scores and dot products keep within their bounds."""
    rows = wanted.nonzero()[:, 0]
    tile = min(max(MIN_ROWS, tile_dots() // (heads * KEY_TILE)), max(1, TILE_SCORES // max(S, 1)))
    return list(rows.split(tile)) if len(rows) else []


def tile_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Index scores of a tile of rows, key tile by key tile: [t, S]. The bits do not depend on the tiles (`index_score`)."""
    t, I, _ = q.shape
    scores = torch.empty(t, k.shape[0], dtype=q.dtype, device=q.device)
    width = max(KEY_TILE, tile_dots() // (t * I * KEY_TILE) * KEY_TILE)
    for low in range(0, k.shape[0], width):
        write_scores(q, k[low : low + width], w, scores[:, low : low + width])
    return scores


def exclude_outside(scores: Tensor, starts: Tensor, ends: Tensor) -> None:
    """-inf, in place, outside [starts, ends) of each row; inside, what is NaN or -inf becomes the lowest finite number."""
    if not bool(torch.isfinite(scores.sum())):
        scores.nan_to_num_(nan=torch.finfo(scores.dtype).min, posinf=torch.inf, neginf=torch.finfo(scores.dtype).min)
    first, last = int(starts.max()), int(ends.min())
    if first > 0:
        scores[:, :first].masked_fill_(torch.arange(first, device=scores.device) < starts[:, None], -torch.inf)
    if last < scores.shape[1]:
        columns = torch.arange(last, scores.shape[1], device=scores.device)
        scores[:, last:].masked_fill_(columns >= ends[:, None], -torch.inf)


def top_columns(scores: Tensor, topk: int) -> Tensor:
    """The columns of the topk best of each row of scores [t, S] (S > topk, no NaN, at least topk above -inf), ascending, ties to
    the lowest: [t, topk]."""
    likely = likely_columns(scores, topk)
    if likely is None:
        return exact_columns(scores, topk)
    columns, values = likely
    return columns.gather(1, exact_columns(values, topk))


def exact_columns(scores: Tensor, topk: int) -> Tensor:
    threshold = scores.topk(topk, dim=1, sorted=False).values.amin(1, keepdim=True)
    chosen = scores >= threshold
    surplus = chosen.sum(1) - topk
    if bool((surplus > 0).any()):  # more keys than wanted stand at the threshold: the highest positions among them go
        rows = surplus.nonzero()[:, 0]
        tied = scores[rows] == threshold[rows]
        last = tied.sum(1) - surplus[rows]
        chosen[rows] &= ~tied | (tied.cumsum(1) <= last[:, None])
    return chosen.nonzero()[:, 1].view(-1, topk)


def likely_columns(scores: Tensor, topk: int) -> tuple[Tensor, Tensor] | None:
    """Columns that surely hold the topk best of each row, ascending, and their scores, padded with -inf: [t, c] both, c << S.

    A threshold is guessed from every SAMPLE-th column; all that reach it are kept, ties included, so that where they are topk or
    more the best are among them, and choosing among few is as exact as among all. None where the guess failed, or S is short.
    """
    S = scores.shape[1]
    if scores.is_cuda or SAMPLED_FROM * topk > S:
        return None
    expected = topk / SAMPLE
    rank = min(int(expected + 4 * expected**0.5) + 2, S // SAMPLE)
    guess = scores[:, ::SAMPLE].topk(rank, dim=1, sorted=False).values.amin(1, keepdim=True)
    reached = scores >= guess.clamp_min(torch.finfo(scores.dtype).min)
    counts = torch.from_numpy(np.count_nonzero(reached.numpy(), axis=1))
    if int(counts.min()) < topk or int(counts.max()) > S // 2:
        return None
    flat = torch.from_numpy(np.flatnonzero(reached.numpy()))  # numpy finds them several times faster than torch
    place = torch.arange(len(flat)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
    columns = torch.zeros(len(counts), int(counts.max()), dtype=torch.long)
    values = torch.full(columns.shape, -torch.inf, dtype=scores.dtype)
    columns[rows, place], values[rows, place] = flat - rows * S, scores.view(-1)[flat]
    return columns, values
