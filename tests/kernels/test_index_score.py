"""Index scores: the paper's formula, its gradients, and the same bits in any tile."""

from __future__ import annotations

import pytest
import torch

from rorqual.kernels import index_score


def formula(q, k, w):
    """I[t, s] = sum_j w[t, j] ReLU(q[t, j] . k[s]), term by term."""
    scores = torch.zeros(q.shape[0], k.shape[0], dtype=torch.float64)
    for j in range(q.shape[1]):
        scores = scores + w[:, j, None].double() * (q[:, j].double() @ k.double().t()).clamp(min=0)
    return scores


@pytest.mark.parametrize("T, S, I, C", ((7, 13, 3, 5), (1, 1, 1, 1), (33, 70, 16, 24), (1, 300, 64, 128)))
def test_scores_equal_the_formula(T, S, I, C, generator) -> None:
    q, k, w = (torch.randn(*shape, generator=generator) for shape in ((T, I, C), (S, C), (T, I)))
    scores = index_score(q, k, w)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), formula(q, k, w), rtol=1e-5, atol=1e-5 * (I * C) ** 0.5)


def test_bfloat16_inputs_are_multiplied_exactly_and_summed_in_float32(generator) -> None:
    q, k, w = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((5, 4, 16), (40, 16), (5, 4)))
    torch.testing.assert_close(index_score(q, k, w), formula(q, k, w).float(), rtol=1e-5, atol=1e-5)


def test_gradients_of_query_key_and_weight_equal_those_of_the_formula(generator) -> None:
    shapes = dict(q=(7, 3, 5), k=(13, 5), w=(7, 3))
    inputs = {n: torch.randn(*s, dtype=torch.float64, generator=generator, requires_grad=True) for n, s in shapes.items()}
    upstream = torch.randn(7, 13, dtype=torch.float64, generator=generator)
    ours = torch.autograd.grad(index_score(**inputs), list(inputs.values()), upstream)
    theirs = torch.autograd.grad(formula(**inputs), list(inputs.values()), upstream)
    for name, a, b in zip(inputs, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    assert torch.autograd.gradcheck(index_score, tuple(inputs.values()))


@pytest.mark.parametrize("I, C", ((2, 16), (8, 64), (64, 128), (5, 24)))
def test_scores_are_bitwise_the_same_in_any_tile(I, C, generator) -> None:
    T, S = 70, 600
    q, k, w = (torch.randn(*shape, generator=generator) for shape in ((T, I, C), (S, C), (T, I)))
    whole = index_score(q, k, w)
    for rows in (1, 2, 3, 7, 16, 33):
        for columns in (1, 5, 16, 17, 100, 512):
            for t, s in ((0, 0), (T - rows, S - columns)):
                tile = index_score(q[t : t + rows], k[s : s + columns], w[t : t + rows])
                assert torch.equal(tile, whole[t : t + rows, s : s + columns]), (rows, columns)
