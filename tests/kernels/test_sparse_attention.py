"""Sparse attention: equal to attention with a mask, with its gradients, and the same bits in any batch, chunk or tile."""

from __future__ import annotations

import importlib

import pytest
import torch

from rorqual.kernels import sparse_attention

module = importlib.import_module("rorqual.kernels.sparse_attention")  # the package's attribute of this name is the function


def masked(q, kv, indices, scale, value_dim):
    """The definition in float64 with a [T, S] mask; rows without keys are cut out by the caller's `full`."""
    seen = torch.zeros(q.shape[0], kv.shape[0] + 1, dtype=torch.bool)
    seen.scatter_(1, torch.where(indices < 0, kv.shape[0], indices.long()), True)
    scores = torch.einsum("thd,sd->ths", q, kv).mul(scale).masked_fill(~seen[:, None, :-1], -torch.inf)
    return torch.einsum("ths,sd->thd", scores.softmax(-1), kv[:, :value_dim]), scores.logsumexp(-1)


def draw(T, S, H, D, K, generator, dtype=torch.float64, absent: float = 0.2):
    q = torch.randn(T, H, D, dtype=dtype, generator=generator)
    kv = torch.randn(S, D, dtype=dtype, generator=generator)
    indices = torch.stack([torch.randperm(S, generator=generator)[:K] for _ in range(T)]).int()
    return q, kv, indices.masked_fill_(torch.rand(T, K, generator=generator) < absent, -1)


@pytest.mark.parametrize(
    "T, S, H, D, L, K", ((1, 1, 1, 3, 2, 1), (9, 40, 4, 24, 16, 7), (33, 61, 3, 20, 12, 61), (3, 1500, 2, 16, 16, 1200))
)
def test_output_lse_and_each_gradient_equal_the_masked_form(T, S, H, D, L, K, generator) -> None:
    q, kv, indices = draw(T, S, H, D, K, generator, absent=0.2 if T > 1 else 0.0)
    if T > 2:
        indices[1] = -1
    full = (indices >= 0).any(1)
    q.requires_grad_(), kv.requires_grad_()
    out, lse = sparse_attention(q, kv, indices, 0.3, L)
    assert (out[~full] == 0).all() and (lse[~full] == -torch.inf).all()
    results, expected = (out[full], lse[full]), masked(q[full], kv, indices[full], 0.3, L)
    torch.testing.assert_close(results, expected, rtol=1e-12, atol=1e-12)
    ups = [torch.randn(r.shape, dtype=r.dtype, generator=generator) for r in results]
    ours, theirs = (torch.autograd.grad(some, [q, kv], ups) for some in (results, expected))
    for name, a, b in zip(("q", "kv"), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


def test_gradients_pass_finite_differences(generator) -> None:
    q, kv, indices = draw(4, 9, 2, 6, 5, generator)
    q.requires_grad_(), kv.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, kv: sparse_attention(q, kv, indices, 0.5, 4), (q, kv))


def test_one_result_may_be_used_without_the_other(generator) -> None:
    q, kv, indices = draw(4, 9, 2, 6, 5, generator, absent=0.0)
    q.requires_grad_(), kv.requires_grad_()
    for which in (0, 1):
        ours = torch.autograd.grad(sparse_attention(q, kv, indices, 0.5, 4)[which].sum(), [q, kv])
        theirs = torch.autograd.grad(masked(q, kv, indices, 0.5, 4)[which].sum(), [q, kv])
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)))
def test_low_precision_is_summed_in_float32(dtype, tolerance, generator) -> None:
    q, kv, indices = draw(11, 300, 4, 40, 100, generator, dtype=torch.float32)
    q, kv = q.to(dtype).requires_grad_(), kv.to(dtype).requires_grad_()
    out, lse = sparse_attention(q, kv, indices, 0.2, 32)
    assert out.dtype == dtype and lse.dtype == torch.float32
    expected, expected_lse = masked(q.detach().double(), kv.detach().double(), indices, 0.2, 32)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(out.float().square().sum(), [q, kv])
    assert [g.dtype for g in grads] == [dtype, dtype] and all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("H, K", ((8, 1), (8, 17), (8, 256), (8, 1100), (1, 64), (2, 64), (4, 64), (16, 64)))
def test_bits_are_the_same_in_any_batch_chunk_and_tile(H, K, generator, monkeypatch) -> None:
    T, S, L = 70, 1200, 128
    q, kv, indices = draw(T, S, H, 160, K, generator, dtype=torch.float32, absent=0.1)
    indices = torch.where(torch.arange(T)[:, None] * 20 > indices, indices, -1)  # short rows beside long ones
    indices = indices.sort(1, descending=True).values
    whole, whole_lse = sparse_attention(q, kv, indices, 0.1, L)
    for rows in (1, 2, 5, 16, 33):
        for low in (0, T // 2, T - rows):
            part = slice(low, low + rows)
            out, lse = sparse_attention(q[part], kv, indices[part], 0.1, L)
            assert torch.equal(out, whole[part]) and torch.equal(lse, whole_lse[part]), rows
    for elements in (1, 1 << 16, 1 << 30):
        monkeypatch.setattr(module, "TILE_ELEMENTS", elements)
        out, lse = sparse_attention(q, kv, indices, 0.1, L)
        assert torch.equal(out, whole) and torch.equal(lse, whole_lse), elements


def test_gradients_are_bitwise_repeatable_and_the_same_in_any_tile(generator, monkeypatch) -> None:
    q, kv, indices = draw(50, 90, 4, 24, 30, generator, dtype=torch.float32)
    q.requires_grad_(), kv.requires_grad_()
    up = torch.randn(50, 4, 16, generator=generator)

    def gradients():
        return torch.autograd.grad(sparse_attention(q, kv, indices, 0.3, 16)[0], [q, kv], up)

    first = gradients()
    for elements in (1 << 20, 1, 1 << 13):
        monkeypatch.setattr(module, "TILE_ELEMENTS", elements)
        for name, a, b in zip(("q", "kv"), gradients(), first, strict=True):
            assert torch.equal(a, b), (name, elements)


def test_what_lies_at_unselected_positions_is_never_used(generator) -> None:
    q, kv, indices = draw(6, 30, 2, 8, 5, generator)
    indices[2], indices[3, 1:] = -1, -1
    unused = torch.ones(30, dtype=torch.bool)
    unused[indices[indices >= 0].long()] = False
    unused[0] = True
    indices = torch.where(indices == 0, -1, indices)
    spoiled = kv.masked_fill(unused[:, None], torch.nan).requires_grad_()
    q.requires_grad_()
    out, lse = sparse_attention(q, spoiled, indices, 0.3, 6)
    assert torch.equal(out, sparse_attention(q, kv, indices, 0.3, 6)[0]) and out.isfinite().all()
    grad_q, grad_kv = torch.autograd.grad(
        [out, lse[[0, 1, 3, 4, 5]]], [q, spoiled], [out.detach(), lse[[0, 1, 3, 4, 5]].detach()]
    )
    assert grad_q.isfinite().all() and (grad_kv[unused] == 0).all() and grad_kv.isfinite().all()


def test_empty_shapes_are_no_error(generator) -> None:
    q, kv, indices = draw(3, 9, 2, 6, 4, generator)
    out, lse = sparse_attention(q, kv, indices[:, :0], 0.5, 4)
    assert (out == 0).all() and (lse == -torch.inf).all()
    assert sparse_attention(q[:0], kv, indices[:0], 0.5, 4)[0].shape == (0, 2, 4)
    out, lse = sparse_attention(q, kv[:0], torch.full_like(indices, -1), 0.5, 4)
    assert (out == 0).all() and (lse == -torch.inf).all()
    q.requires_grad_(), kv.requires_grad_()
    grads = torch.autograd.grad(sparse_attention(q, kv, torch.full_like(indices, -1), 0.5, 4)[0].sum(), [q, kv])
    assert all((g == 0).all() for g in grads)


def test_a_position_outside_the_keys_is_an_error(generator) -> None:
    q, kv, indices = draw(3, 9, 2, 6, 4, generator)
    indices[1, 2] = 9
    with pytest.raises(IndexError):
        sparse_attention(q, kv, indices, 0.5, 4)
