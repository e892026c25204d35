"""The indexer's KL: the formula in float64, dense and restricted, document bounds, odd lengths, several tile sizes."""

from __future__ import annotations

import importlib

import pytest
import torch

from rorqual.kernels import dense_attention, index_loss, select_tokens, selection_quality

module = importlib.import_module("rorqual.kernels.index_loss")  # the package's attribute of this name is the function
SCALE = 0.3


def draw(T, S, generator, dtype=torch.float64, I=3, C=10, H=4, D=14):
    shapes = (T, I, C), (S, C), (T, I), (T, H, D), (S, D)
    return [torch.randn(*s, dtype=dtype, generator=generator) for s in shapes]


def formula(query, key, weight, q, kv, seen):
    """KL(p || softmax(I)) of each row over the keys that seen [T, S] allows; p sums the heads' probabilities, L1-normalised."""
    scores = torch.einsum("tic,sc->tis", query, key).relu().mul(weight[..., None]).sum(1)
    attention = torch.einsum("thd,sd->ths", q, kv).mul(SCALE).masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    target = attention.sum(1) / attention.sum((1, 2))[:, None]
    predicted = scores.masked_fill(~seen, -torch.inf).log_softmax(1).masked_fill(~seen, 0)
    return torch.where(seen, torch.xlogy(target, target) - target * predicted, 0).sum(1)


def seen_by(T, S, starts=None, ends=None, indices=None):
    if indices is not None:
        at = torch.where(indices < 0, S, indices).long()
        return torch.zeros(T, S + 1, dtype=torch.bool).scatter(1, at, True)[:, :-1]
    starts = torch.zeros(T) if starts is None else starts
    ends = torch.arange(S - T + 1, S + 1) if ends is None else ends
    return (torch.arange(S) >= starts[:, None]) & (torch.arange(S) < ends[:, None])


def bounds(kind, T, S, generator) -> dict[str, torch.Tensor]:
    if kind == "documents":
        starts = torch.arange(T) // 7 * 7 + (S - T)
        ends = torch.arange(S - T + 1, S + 1)
        ends[T // 2] = starts[T // 2]  # a padding row
        return dict(starts=starts, ends=ends)
    if kind == "restricted":
        indices = torch.stack([torch.randperm(S, generator=generator)[: min(9, S)] for _ in range(T)])
        indices[:, 1:].masked_fill_(torch.rand(T, min(9, S) - 1, generator=generator) < 0.3, -1)
        indices[T // 2] = -1
        return dict(indices=indices.int())
    return {}


@pytest.mark.parametrize("kind", ("causal", "documents", "restricted"))
@pytest.mark.parametrize("T, S", ((2, 2), (41, 41), (23, 307), (150, 600)))
@pytest.mark.parametrize("elements", (None, 1, 5000))
def test_loss_and_each_gradient_equal_the_formula(kind, T, S, elements, generator, monkeypatch) -> None:
    if elements is not None:
        monkeypatch.setattr(module, "TILE_ELEMENTS", elements)
        monkeypatch.setattr(module, "KEY_TILE", 48)
    query, key, weight, q, kv = draw(T, S, generator)
    where = bounds(kind, T, S, generator)
    seen = seen_by(T, S, **where)
    full = seen.any(1)
    inputs = [x.requires_grad_() for x in (query, key, weight)]
    loss = index_loss(query, key, weight, q, kv, SCALE, **where)
    expected = formula(query[full], key, weight[full], q[full], kv, seen[full])
    torch.testing.assert_close(loss[full], expected, rtol=1e-11, atol=1e-11)
    assert (loss[~full] == 0).all()
    up = torch.randn(T, dtype=loss.dtype, generator=generator)
    ours, theirs = torch.autograd.grad(loss, inputs, up), torch.autograd.grad(expected, inputs, up[full])
    for name, a, b in zip(("query", "key", "weight"), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", ("causal", "restricted"))
def test_gradients_pass_finite_differences(kind, generator) -> None:
    query, key, weight, q, kv = draw(4, 9, generator)
    where = bounds(kind, 4, 9, generator)
    inputs = [x.requires_grad_() for x in (query, key, weight)]
    assert torch.autograd.gradcheck(lambda *index: index_loss(*index, q, kv, SCALE, **where), inputs)


@pytest.mark.parametrize("kind", ("causal", "restricted"))
def test_the_main_attention_gets_no_gradient(kind, generator) -> None:
    inputs = [x.requires_grad_() for x in draw(6, 9, generator)]
    index_loss(*inputs, SCALE, **bounds(kind, 6, 9, generator)).sum().backward()
    assert inputs[3].grad is None and inputs[4].grad is None and all(x.grad.abs().sum() > 0 for x in inputs[:3])


def test_a_handed_lse_gives_the_same_loss(generator) -> None:
    inputs = draw(40, 70, generator)
    lse = dense_attention(inputs[3], inputs[4][:, None], inputs[4][:, None], SCALE)[1]
    torch.testing.assert_close(index_loss(*inputs, SCALE, lse=lse), index_loss(*inputs, SCALE), rtol=1e-12, atol=1e-12)


def test_loss_is_zero_where_the_indexer_agrees_exactly(generator) -> None:
    """One head, one index head: with equal positive scores the two softmaxes are the same distribution."""
    S = 30
    query, key = torch.rand(S, 1, 6, dtype=torch.float64, generator=generator), torch.rand(S, 6, generator=generator).double()
    loss = index_loss(query, key, torch.full((S, 1), SCALE).double(), query, key, SCALE)
    torch.testing.assert_close(loss, torch.zeros(S).double(), rtol=0, atol=1e-7)


def test_float32_is_close_and_repeatable(generator) -> None:
    inputs = [x.float() for x in draw(90, 400, generator)]
    exact = formula(*(x.double() for x in inputs), seen_by(90, 400))
    loss = index_loss(*inputs, SCALE)
    assert loss.dtype == torch.float32 and torch.equal(loss, index_loss(*inputs, SCALE))
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-5)


def test_quality_of_a_selection_equals_brute_force(generator) -> None:
    T, S, topk = 60, 80, 12
    query, key, weight, q, kv = draw(T, S, generator)
    chosen = select_tokens(query, key, weight, topk)
    chosen[7] = -1
    quality = selection_quality(q, kv, SCALE, chosen)
    mass = torch.einsum("thd,sd->ths", q, kv).mul(SCALE).masked_fill(~seen_by(T, S)[:, None], -torch.inf).softmax(-1).mean(1)
    for t in range(T):
        picked = {s for s in chosen[t].tolist() if s >= 0}
        if not picked:
            assert quality.captured[t].isnan() and quality.oracle[t].isnan() and quality.recall[t].isnan()
            continue
        best = sorted(range(S), key=lambda s, t=t: (-mass[t, s].item(), s))[: len(picked)]
        assert abs(quality.captured[t] - sum(mass[t, s] for s in picked)) < 1e-12
        assert abs(quality.oracle[t] - sum(mass[t, s] for s in best)) < 1e-12
        assert abs(quality.recall[t] - len(picked & set(best)) / len(picked)) < 1e-12
    assert (quality.captured.nan_to_num() <= quality.oracle.nan_to_num() + 1e-12).all()


def test_a_selection_of_everything_captures_everything(generator) -> None:
    *_, q, kv = draw(20, 20, generator)
    everything = torch.where(torch.arange(20) <= torch.arange(20)[:, None], torch.arange(20), -1)
    quality = selection_quality(q, kv, SCALE, everything)
    for part in quality:
        torch.testing.assert_close(part, torch.ones(20).double(), rtol=1e-12, atol=1e-12)
