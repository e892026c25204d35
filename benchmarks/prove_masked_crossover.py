"""On a CPU masked multi-head attention beats gathered sparse attention at a context of twice the selected keys and loses at
twelve times, at three shapes: AttentionMode.masked_factor (3.5) lies just below where they are level. Both give the same result.

The quick form checks the results alone: which is faster is asserted where nothing else runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rorqual.kernels import masked_attention, sparse_attention

SECONDS = 60
QUICK_SECONDS = 15
FACTORS = (2, 3, 4, 6, 8, 12)


class Shape(NamedTuple):
    heads: int
    latent: int
    rope: int
    nope: int
    value: int
    topk: int


SHAPES = {
    "65M": Shape(8, 128, 32, 64, 64, 256),
    "small": Shape(4, 64, 16, 32, 32, 128),
    "released, 16 heads": Shape(16, 512, 64, 128, 128, 256),
}


def best_of(runs: list[Callable[[], Tensor]], rounds: int) -> list[float]:
    """Seconds of each run's fastest round, the one that no neighbour disturbed; the runs take turns."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, own in zip(runs, times, strict=True):
            began = time.perf_counter()
            run()
            own.append(time.perf_counter() - began)
    return [min(own) for own in times]


def selection(S: int, topk: int, generator: torch.Generator) -> Tensor:
    """A random set of topk causal keys for each of S queries, int32 [S, topk]."""
    noise = torch.rand(S, S, generator=generator).masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), -1)
    best = noise.topk(topk, dim=1)
    chosen = torch.where(best.values >= 0, best.indices, S).sort(1).values
    return torch.where(chosen < S, chosen, -1).int()


def ratio(shape: Shape, S: int, rounds: int) -> float:
    """Time of the masked form over that of the sparse one, S queries of S keys, projections between the forms included."""
    generator = torch.Generator().manual_seed(0)
    H, L, scale = shape.heads, shape.latent, (shape.nope + shape.rope) ** -0.5
    kv = torch.randn(S, L + shape.rope, generator=generator)
    q = torch.randn(S, H, shape.nope + shape.rope, generator=generator)
    up = torch.randn(H, shape.nope + shape.value, L, generator=generator) * L**-0.5
    indices = selection(S, shape.topk, generator)

    def masked() -> Tensor:
        expanded = torch.einsum("sl,hdl->shd", kv[:, :L], up)
        k = torch.cat([expanded[..., : shape.nope], kv[:, None, L:].expand(-1, H, -1)], -1)
        return masked_attention(q, k, expanded[..., shape.nope :], scale, indices)

    def sparse() -> Tensor:
        absorbed = torch.einsum("thd,hdl->thl", q[..., : shape.nope], up[:, : shape.nope])
        out = sparse_attention(torch.cat([absorbed, q[..., shape.nope :]], -1), kv, indices, scale, L)[0]
        return torch.einsum("thl,hdl->thd", out, up[:, shape.nope :])

    torch.testing.assert_close(masked(), sparse(), rtol=0, atol=1e-4)
    seconds = best_of([masked, sparse], rounds if S > 1024 else 4 * rounds)
    return seconds[0] / seconds[1]


@torch.no_grad()
def main(quick: bool) -> dict[str, dict[str, float]]:
    factors, rounds = ((2, 12), 2) if quick else (FACTORS, 4)
    shapes = {"65M": SHAPES["65M"]} if quick else SHAPES
    figures = {
        name: {f"masked_over_sparse_at_{factor}x": round(ratio(shape, factor * shape.topk, rounds), 2) for factor in factors}
        for name, shape in shapes.items()
    }
    for name, ratios in figures.items():
        assert quick or ratios["masked_over_sparse_at_2x"] < 1 < ratios["masked_over_sparse_at_12x"], f"{name}: {ratios}"
    return figures
