"""Grouped experts: the sum over chosen experts, its gradients, and the same bits for a row in any batch."""

from __future__ import annotations

import pytest
import torch

from rorqual.kernels import experts


def definition(x, w1, w2, w3, chosen, gates):
    """sum_k g_k W2 (silu(W1 x) * W3 x), one (token, slot) at a time."""
    rows = []
    for row, ids, weights in zip(x, chosen.tolist(), gates, strict=True):
        total = torch.zeros_like(row)
        for e, gate in zip(ids, weights, strict=True):
            if e >= 0:
                a, b = w1[e] @ row, w3[e] @ row
                total = total + gate * (w2[e] @ (a / (1 + torch.exp(-a)) * b))
        rows.append(total)
    return torch.stack(rows)


def draw(N, D, F, E, K, generator, dtype=torch.float64):
    x, w1, w2, w3 = (
        torch.randn(*s, dtype=dtype, generator=generator) / s[-1] ** 0.5 for s in ((N, D), (E, F, D), (E, D, F), (E, F, D))
    )
    chosen = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(N)])
    return x, w1, w2, w3, chosen, torch.rand(N, K, dtype=dtype, generator=generator)


@pytest.mark.parametrize("N, D, F, E, K", ((1, 4, 3, 2, 1), (23, 10, 7, 5, 3), (40, 24, 33, 3, 3)))
def test_output_and_each_gradient_equal_the_definition(N, D, F, E, K, generator) -> None:
    x, w1, w2, w3, chosen, gates = draw(N, D, F, E, K, generator)
    inputs = [t.requires_grad_() for t in (x, w1, w2, w3, gates)]
    ours, theirs = experts(x, w1, w2, w3, chosen.int(), gates), definition(x, w1, w2, w3, chosen, gates)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    up = torch.randn(N, D, dtype=x.dtype, generator=generator)
    grads = zip(torch.autograd.grad(ours, inputs, up), torch.autograd.grad(theirs, inputs, up), strict=True)
    for name, (a, b) in zip(("x", "w1", "w2", "w3", "gates"), grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


def test_gradients_pass_finite_differences(generator) -> None:
    x, w1, w2, w3, chosen, gates = draw(5, 4, 3, 3, 2, generator)
    inputs = [t.requires_grad_() for t in (x, w1, w2, w3, gates)]
    assert torch.autograd.gradcheck(lambda x, w1, w2, w3, g: experts(x, w1, w2, w3, chosen, g), inputs)


def test_experts_without_tokens_and_slots_without_experts_add_nothing(generator) -> None:
    x, w1, w2, w3, chosen, gates = draw(9, 6, 5, 4, 2, generator)
    chosen = chosen.clamp_max(1)  # experts 2 and 3 get no token
    chosen[:, 1] = torch.where(torch.arange(9) % 2 == 0, -1, 3 * (chosen[:, 0] == 3))
    chosen[4] = -1
    inputs = [t.requires_grad_() for t in (x, w1, w2, w3, gates)]
    ours = experts(x, w1, w2, w3, chosen, gates)
    torch.testing.assert_close(ours, definition(x, w1, w2, w3, chosen, gates), rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(ours.square().sum(), inputs)
    assert (grads[1][2] == 0).all() and (grads[0][4] == 0).all() and (grads[4][chosen < 0] == 0).all()


@pytest.mark.parametrize("D, F, E, K", ((128, 96, 8, 2), (512, 256, 16, 4), (24, 12, 4, 2)))
def test_a_row_is_bitwise_the_same_in_any_batch(D, F, E, K, generator) -> None:
    x, w1, w2, w3, chosen, gates = draw(130, D, F, E, K, generator, torch.float32)
    whole = experts(x, w1, w2, w3, chosen, gates)
    for rows in (1, 2, 3, 5, 16, 33, 100):
        for low in (0, 130 - rows):
            part = slice(low, low + rows)
            assert torch.equal(experts(x[part], w1, w2, w3, chosen[part], gates[part]), whole[part]), rows
    shuffle = torch.randperm(130, generator=generator)
    assert torch.equal(experts(x[shuffle], w1, w2, w3, chosen[shuffle], gates[shuffle]), whole[shuffle])


def test_bfloat16_keeps_its_dtype_and_sums_in_float32(generator) -> None:
    x, w1, w2, w3, chosen, gates = draw(40, 64, 48, 4, 3, generator, torch.float32)
    low = [t.bfloat16() for t in (x, w1, w2, w3)]
    ours = experts(*low, chosen, gates)
    assert ours.dtype == torch.bfloat16
    exact = definition(*(t.double() for t in low), chosen, gates.double())
    torch.testing.assert_close(ours.double(), exact, rtol=2e-2, atol=2e-2)
