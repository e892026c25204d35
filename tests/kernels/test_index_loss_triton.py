"""The indexer's loss in Triton against the formula in float64: both forms, every gradient, ranges, empty rows, determinism."""

from __future__ import annotations

import importlib

import pytest
import torch

from tests.kernels.devices import on_each_device

pytest.importorskip("triton")
form = pytest.importorskip("rorqual.kernels.index_loss_triton")
plain = importlib.import_module("rorqual.kernels.index_loss")

NAMES = ("query", "key", "weight")


def naive(query, key, weight, q, kv, scale, eligible):
    """KL(p_t || softmax(I_t)) over the eligible keys [T, S], 0 for a row without any."""
    attention = (torch.einsum("thd,sd->ths", q, kv) * scale).masked_fill(~eligible[:, None], -torch.inf)
    target = attention.softmax(-1).nan_to_num().sum(1)
    target = target / target.sum(1, keepdim=True).clamp_min(1e-300)
    scores = (torch.relu(torch.einsum("tic,sc->tis", query, key)) * weight[..., None]).sum(1)
    predicted = scores.masked_fill(~eligible, -torch.inf).log_softmax(-1)
    return torch.where(eligible & (target > 0), target * (target.clamp_min(1e-300).log() - predicted), 0).sum(1)


def case(T, S, I, C, H, D, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype).to(device)  # noqa: E731
    return draw(T, I, C), draw(S, C), draw(T, I) * I**-0.5, draw(T, H, D), draw(S, D)


def check(inputs, scale, eligible, tolerance, **options):
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    truth = [x.detach().double().requires_grad_() for x in leaves]
    grad = torch.linspace(-1, 2, len(inputs[0]), device=eligible.device)
    expected = naive(*truth, inputs[3].double(), inputs[4].double(), scale, eligible)
    found = form.index_loss(*leaves, *inputs[3:], scale, **options)
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1)
    seen = eligible.any(1)
    wanted = torch.autograd.grad(expected[seen], truth, grad[seen].double())
    for name, a, b in zip(NAMES, torch.autograd.grad(found, leaves, grad), wanted, strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < tolerance, name
        assert not a.isnan().any(), name


def ranges(T, S):
    starts = torch.arange(T) * S // (3 * T)
    ends = (starts + torch.arange(T) * 7 + 1).clamp(max=S)
    ends[T // 2] = starts[T // 2]  # a row without keys
    return starts, ends


def within(starts, ends, S):
    columns = torch.arange(S)
    return (columns >= starts[:, None]) & (columns < ends[:, None])


@on_each_device
@pytest.mark.parametrize(("T", "S", "I", "C", "H", "D"), [(7, 50, 4, 32, 3, 48), (5, 21, 3, 24, 20, 40)])
def test_dense_form_matches_float64(device, T, S, I, C, H, D):
    inputs = case(T, S, I, C, H, D, torch.float32, device)
    causal = within(torch.zeros(T), torch.arange(S - T + 1, S + 1), S).to(device)
    check(inputs, 0.3, causal, 1e-5)
    starts, ends = ranges(T, S)
    check(inputs, 0.3, within(starts, ends, S).to(device), 1e-5, starts=starts.to(device), ends=ends.to(device))


def selected(T, K, S, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.stack([torch.randperm(S, generator=generator)[:K] for _ in range(T)]).int()
    indices[torch.rand(T, K, generator=generator) < 0.2] = -1
    indices[1] = -1
    eligible = torch.zeros(T, S + 1, dtype=torch.bool).scatter_(1, torch.where(indices < 0, S, indices).long(), True)[:, :S]
    return indices.to(device), eligible.to(device)


@on_each_device
@pytest.mark.parametrize(("T", "S", "K", "I", "C", "H", "D"), [(5, 90, 37, 4, 32, 3, 48), (3, 70, 70, 3, 24, 20, 40)])
def test_restricted_form_matches_float64(device, T, S, K, I, C, H, D):
    indices, eligible = selected(T, K, S, device)
    check(case(T, S, I, C, H, D, torch.float32, device), 0.3, eligible, 1e-5, indices=indices)


@on_each_device
def test_chunks_change_no_bit_of_the_row_gradients_and_runs_repeat(device, monkeypatch):
    inputs = [x.round() for x in case(40, 60, 4, 32, 2, 32, torch.float32, device)]

    def run():
        leaves = [x.clone().requires_grad_() for x in inputs[:3]]
        loss = form.index_loss(*leaves, *inputs[3:], 0.05)
        return loss, *torch.autograd.grad(loss.sum(), leaves)

    whole = run()
    assert all(map(torch.equal, run(), whole))
    monkeypatch.setattr(form, "LOSS_BYTES", 16 * 60 * 4)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(run(), whole, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("T", "S"), [(300, 1000), (129, 4097)])
def test_released_shape_matches_float64(T, S):
    inputs = case(T, S, 64, 128, 128, 576, torch.bfloat16, "cuda")
    causal = within(torch.zeros(T), torch.arange(S - T + 1, S + 1), S).cuda()
    check(inputs, 576**-0.5, causal, 1.5e-2)
    indices, eligible = selected(T, 500, S, "cuda")
    check(inputs, 576**-0.5, eligible, 1.5e-2, indices=indices)


@on_each_device
@pytest.mark.parametrize(("T", "S", "H", "D", "K"), [(9, 60, 3, 24, 7), (21, 40, 5, 40, 33), (3, 17, 16, 16, 17)])
def test_quality_of_a_selection_is_the_plain_forms(device, T, S, H, D, K):
    _, _, _, q, kv = case(T, S, 1, 16, H, D, torch.float32, device)
    starts, ends = ranges(T, S)
    indices = torch.full((T, K), -1)
    for t in range(T):
        some = torch.randperm(int(ends[t] - starts[t]))[: max(K - t % 3, 1)] + starts[t]
        indices[t, : len(some)] = some.sort().values
    bounds = [x.to(device) for x in (indices.int(), starts, ends)]
    found = form.selection_quality(q, kv, 0.3, *bounds)
    expected = plain.selection_quality_plain(q.double(), kv.double(), 0.3, *bounds)
    for name, a, b in zip(found._fields, found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")
