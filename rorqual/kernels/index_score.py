"""The lightning indexer's scores: I[t, s] = sum_j w[t, j] ReLU(q[t, j] . k[s]) (DeepSeek-V3.2, eq. 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.kernels.dispatch import triton_form
from rorqual.kernels.linear import accumulator, row_product


def index_score(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Scores of one tile, unmasked: q [T, I, C], k [S, C], w [T, I] -> [T, S] in float32 (float64 for float64 inputs).

    Both constants of the released code (I^-0.5 and C^-0.5) are already in w, which may be negative. Differentiable with respect
    to q, k and w. On CPU a score is bitwise the same in any tile: each dot product is one product of at least 16 rows and
    columns, and the heads are summed in one order. On GPU the bits may depend on the tile's shape.
    It holds [T, I, S]: callers bound T and S (`select_tokens` and `index_loss` do).
    """
    return (triton_form("index_score", q, k, w) or index_score_plain)(q, k, w)


def index_score_plain(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    T, I, C = q.shape
    dtype = accumulator(q, k, w)
    dots = row_product(q.to(dtype).reshape(T * I, C), k.to(dtype)).view(T, I, -1)  # [T, I, S]
    dots, weights = torch.relu_(dots), w.to(dtype).unsqueeze(-1)
    if dots.requires_grad or weights.requires_grad:
        return sum_heads(dots * weights)
    return fold_heads(dots.mul_(weights), dots.new_empty(T, dots.shape[2]))


def write_scores(q: Tensor, k: Tensor, w: Tensor, out: Tensor) -> None:
    """`index_score_plain` of q [T, I, C], k [S, C], w [T, I], all of the dtype summed in, into out [T, S]; no gradient."""
    T, I, C = q.shape
    dots = torch.relu_(row_product(q.reshape(T * I, C), k).view(T, I, -1))
    fold_heads(dots.mul_(w.unsqueeze(-1)), out)


def fold_heads(x: Tensor, out: Tensor) -> Tensor:
    """`sum_heads` of x [T, I, S] into out [T, S], in the same order, in x's own memory: a tile stays in the core's cache."""
    heads = x.shape[1]
    while heads > 2:
        half, odd = divmod(heads, 2)
        x[:, :half] += x[:, half : 2 * half]
        if odd:
            x[:, half] = x[:, heads - 1]
        heads = half + odd
    return out.copy_(x[:, 0]) if heads == 1 else torch.add(x[:, 0], x[:, 1], out=out)


def sum_heads(x: Tensor) -> Tensor:
    """x [T, I, S] summed over the heads -> [T, S], halves upon halves: elementwise sums, whose bits no shape can change.

    (torch's own sum over a dim takes other paths, with other bits, where T or S is small.)
    """
    while x.shape[1] > 1:
        half, odd = divmod(x.shape[1], 2)
        folded = x[:, :half] + x[:, half : 2 * half]
        x = torch.cat([folded, x[:, 2 * half :]], 1) if odd else folded
    return x[:, 0]
