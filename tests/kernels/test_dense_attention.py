"""Dense and masked attention in tiles: the definition, gradients, the same bits in any batch, equal to sparse with all keys."""

from __future__ import annotations

import importlib

import pytest
import torch

from rorqual.kernels import dense_attention, masked_attention, sparse_attention

module = importlib.import_module("rorqual.kernels.dense_attention")  # the package's attribute of this name is the function


def definition(q, k, v, scale, seen):
    """softmax(q k^T scale) v under a boolean mask seen [T, S], keys shared by groups of consecutive heads."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("thd,shd->ths", q, k).mul(scale).masked_fill(~seen[:, None], -torch.inf)
    return torch.einsum("ths,shd->thd", scores.softmax(-1), v), scores.logsumexp(-1)


def draw(T, S, H, G, D, L, generator, dtype=torch.float64):
    return tuple(torch.randn(*s, dtype=dtype, generator=generator) for s in ((T, H, D), (S, G, D), (S, G, L)))


def ranges(T, S, generator):
    starts = torch.randint(0, S, (T,), generator=generator)
    return starts, (starts + torch.randint(1, S, (T,), generator=generator)).clamp(max=S)


def compare(ours, theirs, inputs, generator) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    ups = [torch.randn(a.shape, dtype=a.dtype, generator=generator) for a in ours]
    for name, a, b in zip("qkv", torch.autograd.grad(ours, inputs, ups), torch.autograd.grad(theirs, inputs, ups), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


SHAPES = ((1, 1, 1, 1, 3, 2), (1, 700, 4, 1, 24, 16), (37, 61, 3, 3, 10, 6), (300, 300, 2, 1, 8, 8), (65, 530, 4, 4, 12, 20))


@pytest.mark.parametrize("T, S, H, G, D, L", SHAPES)
def test_causal_output_lse_and_each_gradient_equal_the_definition(T, S, H, G, D, L, generator) -> None:
    inputs = [x.requires_grad_() for x in draw(T, S, H, G, D, L, generator)]
    seen = torch.arange(S) < torch.arange(S - T + 1, S + 1)[:, None]
    compare(dense_attention(*inputs, 0.3), definition(*inputs, 0.3, seen), inputs, generator)


@pytest.mark.parametrize("T, S, H, G, D, L", SHAPES[1:])
def test_ranges_bound_what_a_row_sees(T, S, H, G, D, L, generator) -> None:
    inputs = [x.requires_grad_() for x in draw(T, S, H, G, D, L, generator)]
    starts, ends = ranges(T, S, generator)
    seen = (torch.arange(S) >= starts[:, None]) & (torch.arange(S) < ends[:, None])
    compare(dense_attention(*inputs, 0.3, starts, ends), definition(*inputs, 0.3, seen), inputs, generator)


@pytest.mark.parametrize("T, S, H, G, D, L", SHAPES[1:])
def test_masked_form_and_its_gradients_equal_the_definition(T, S, H, G, D, L, generator) -> None:
    inputs = [x.requires_grad_() for x in draw(T, S, H, G, D, L, generator)]
    indices = torch.stack([torch.randperm(S, generator=generator)[:9] for _ in range(T)]).int()
    indices[:, 1:].masked_fill_(torch.rand(T, 8, generator=generator) < 0.5, -1)
    seen = torch.zeros(T, S + 1, dtype=torch.bool).scatter(1, torch.where(indices < 0, S, indices).long(), True)[:, :-1]
    expected = definition(*inputs, 0.3, seen)[:1]
    compare([masked_attention(*inputs, 0.3, indices)], expected, inputs, generator)


def test_gradients_pass_finite_differences(generator) -> None:
    inputs = [x.requires_grad_() for x in draw(4, 7, 2, 1, 5, 3, generator)]
    assert torch.autograd.gradcheck(lambda q, k, v: dense_attention(q, k, v, 0.4), inputs)


def test_sparse_attention_over_all_keys_is_dense_attention(generator) -> None:
    T = S = 300
    q, kv = torch.randn(T, 4, 24, generator=generator), torch.randn(S, 24, generator=generator)
    everything = torch.where(torch.arange(S) <= torch.arange(T)[:, None], torch.arange(S), -1).int()
    sparse, dense = sparse_attention(q, kv, everything, 0.3, 16), dense_attention(q, kv[:, None], kv[:, None, :16], 0.3)
    for a, b in zip(sparse, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_rows_without_keys_give_zero_and_minus_infinity(generator) -> None:
    inputs = [x.requires_grad_() for x in draw(5, 9, 2, 1, 6, 4, generator)]
    starts, ends = torch.tensor([0, 3, 9, 2, 0]), torch.tensor([4, 3, 9, 1, 9])
    out, lse = dense_attention(*inputs, 0.3, starts, ends)
    assert (out[1:4] == 0).all() and (lse[1:4] == -torch.inf).all() and lse[[0, 4]].isfinite().all()
    grads = torch.autograd.grad([out, lse[[0, 4]]], inputs, [torch.ones_like(out), torch.ones(2, 2).double()])
    assert all(g.isfinite().all() for g in grads) and (grads[0][1:4] == 0).all()
    none = masked_attention(*inputs, 0.3, torch.full((5, 3), -1))
    assert (none == 0).all()


@pytest.mark.parametrize("G", (1, 8))
def test_bits_are_the_same_in_any_batch_chunk_and_tile(G, generator, monkeypatch) -> None:
    T = S = 700
    q, k, v = draw(T, S, 8, G, 48, 32, generator, torch.float32)
    whole, whole_lse = dense_attention(q, k, v, 0.2)
    for chunk in (1, 2, 7, 33, 256):
        for low in range(0, T, max(chunk, 131)):
            high = min(low + chunk, T)
            out, lse = dense_attention(q[low:high], k[:high], v[:high], 0.2)
            assert torch.equal(out, whole[low:high]) and torch.equal(lse, whole_lse[low:high]), chunk
    for scores in (1, 1 << 16, 1 << 30):
        monkeypatch.setattr(module, "TILE_SCORES", scores)
        out, lse = dense_attention(q, k, v, 0.2)
        assert torch.equal(out, whole) and torch.equal(lse, whole_lse), scores
