"""Token log-probabilities in Triton against float64: kept sets, bias, temperature, entropy, padding, each gradient."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.devices import on_each_device

pytest.importorskip("triton")
form = pytest.importorskip("rorqual.kernels.token_logprobs_triton")


def naive(hidden, head, targets, temperature, keep, bias):
    logits = (hidden @ head.T + bias) / temperature[:, None]
    logs = logits.masked_fill(~keep, -torch.inf).log_softmax(-1)
    logprobs = logs.gather(1, targets.clamp_min(0)[:, None])[:, 0].masked_fill(targets < 0, 0)
    entropy = -(logs.exp() * logs.masked_fill(~keep, 0)).sum(1)
    return logprobs, entropy.masked_fill(targets < 0, 0)


def case(N, D, V, dtype, device):
    generator = torch.Generator().manual_seed(N + V)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[::5] = -1
    keep = torch.rand(N, V, generator=generator) < 0.3
    keep[1] = True  # an empty row keeps all
    keep[torch.arange(N), targets.clamp_min(0)] = True
    rows = [row.nonzero()[:, 0] if i != 1 else row.nonzero()[:0, 0] for i, row in enumerate(keep)]
    kept = torch.cat(rows), torch.tensor([0, *[len(row) for row in rows]]).cumsum(0)
    hidden, head = draw(N, D).to(dtype).to(device), (draw(V, D) * D**-0.5).to(dtype).to(device)
    temperature, bias = torch.rand(N, generator=generator) + 0.5, draw(V)
    return hidden, head, targets.to(device), temperature.to(device), keep.to(device), kept, bias.to(device)


def check(N, D, V, dtype, device, tolerance):
    hidden, head, targets, temperature, keep, kept, bias = case(N, D, V, dtype, device)
    weights = torch.linspace(-1, 1, N, device=device)
    for mask, replayed in ((torch.ones_like(keep), None), (keep, kept)):
        leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
        truth = [x.detach().double().requires_grad_() for x in leaves]
        found = form.token_logprobs(*leaves, targets, temperature, replayed, bias, return_entropy=True)
        expected = naive(*truth, targets, temperature.double(), mask, bias.double())
        for name, a, b in zip(("logprobs", "entropy"), found, expected, strict=True):
            assert (a - b).abs().max() < tolerance * 10, name
        grads = torch.autograd.grad((found[0] + 0.3 * found[1]) @ weights, leaves)
        wanted = torch.autograd.grad((expected[0] + 0.3 * expected[1]) @ weights.double(), truth)
        for name, a, b in zip(("hidden", "head"), grads, wanted, strict=True):
            assert ((a.double() - b).norm() / b.norm()).item() < tolerance, name


@on_each_device
@pytest.mark.parametrize("rows", [4, 1 << 15])
def test_results_and_gradients_match_float64(device, rows, monkeypatch):
    monkeypatch.setattr(form, "TILE_BYTES", 4 * 9 * 128)
    monkeypatch.setattr(form, "STRIP", 64)
    monkeypatch.setattr(form, "ROWS", rows)
    check(9, 24, 300, torch.float32, device, 2e-6)


@on_each_device
def test_a_target_outside_its_kept_set_has_no_gradient(device):
    hidden, head = torch.randn(2, 8, device=device).requires_grad_(), torch.randn(11, 8, device=device).requires_grad_()
    kept = torch.tensor([1, 2, 3]), torch.tensor([0, 3, 3])
    logprobs = form.token_logprobs(hidden, head, torch.tensor([5, 5], device=device), 1.0, kept)
    assert logprobs[0] == -torch.inf and torch.isfinite(logprobs[1])
    grads = torch.autograd.grad(logprobs[0], (hidden, head))
    assert not any(g.any() for g in grads)


@pytest.mark.gpu
def test_large_vocabulary_matches_float64():
    check(300, 256, 129280 // 4 + 7, torch.bfloat16, "cuda", 6e-3)
