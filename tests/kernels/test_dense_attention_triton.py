"""Dense and masked attention in Triton against float64: row ranges, selections as bits, gradients, shared keys."""

from __future__ import annotations

import pytest
import torch

from rorqual.kernels.dense_attention import selection_ranges
from tests.kernels.devices import on_each_device
from tests.kernels.test_dense_attention import definition
from tests.kernels.test_sparse_attention_triton import relative, selection

pytest.importorskip("triton")
form = pytest.importorskip("rorqual.kernels.dense_attention_triton")

SHAPES = [(37, 61, 3, 3, 24, 16), (50, 130, 4, 1, 40, 12), (1, 200, 2, 2, 16, 32), (70, 70, 2, 1, 10, 6)]
RELEASED = [(300, 300, 16, 16), (129, 1000, 8, 8), (64, 64, 128, 128), (200, 700, 4, 1)]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def draw(T, S, H, G, D, L, dtype, device, seed=0):
    """Keys and values are views of one tensor, as an expansion of latents leaves them."""
    generator = torch.Generator().manual_seed(seed)
    q, kv = (torch.randn(*s, generator=generator).to(dtype).to(device) for s in ((T, H, D), (S, G, D + L)))
    return q, kv[..., :D], kv[..., D:], generator


def check_ranges(T, S, H, G, D, L, dtype, device, causal):
    q, k, v, generator = draw(T, S, H, G, D, L, dtype, device)
    starts = torch.zeros(T, dtype=torch.long) if causal else torch.randint(0, S, (T,), generator=generator)
    ends = torch.arange(S - T + 1, S + 1) if causal else (starts + torch.randint(-3, S, (T,), generator=generator)).clamp(0, S)
    starts, ends = starts.to(device), ends.to(device)
    seen = (torch.arange(S, device=device) >= starts[:, None]) & (torch.arange(S, device=device) < ends[:, None])
    compare(form.attend(q, k, v, 0.2, starts, ends, None), q, k, v, seen)


def compare(found, q, k, v, seen):
    out, lse = definition(q.double(), k.double(), v.double(), 0.2, seen)
    there, tolerance = seen.any(1), TOLERANCE[q.dtype]
    assert relative(found[0][there], out[there]) < tolerance, "out"
    assert (found[1] - lse)[there].abs().max() < 20 * tolerance, "lse"
    assert not found[0][~there].any() and torch.isneginf(found[1][~there]).all()


@on_each_device
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("T", "S", "H", "G", "D", "L"), SHAPES)
def test_ranges_match_float64(device, T, S, H, G, D, L, causal):
    check_ranges(T, S, H, G, D, L, torch.float32, device, causal)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("T", "S", "H", "G"), RELEASED)
def test_released_heads_match_float64(T, S, H, G, causal, dtype):
    check_ranges(T, S, H, G, 192, 128, dtype, "cuda", causal)


def check_selection(T, S, H, G, D, L, K, dtype, device):
    q, k, v, generator = draw(T, S, H, G, D, L, dtype, device)
    indices = selection(T, K, S, generator, device)
    seen = torch.zeros(T, S + 1, dtype=torch.bool, device=device)
    seen.scatter_(1, torch.where(indices < 0, S, indices).long(), True)
    seen = seen[:, :S]
    bits = form.selection_bits(indices, S)
    words = (bits[:, torch.arange(S, device=device) // 32] >> (torch.arange(S, device=device) % 32)) & 1
    assert torch.equal(words.bool(), seen)
    compare(form.attend(q, k, v, 0.2, *selection_ranges(indices, S), bits), q, k, v, seen)


@on_each_device
@pytest.mark.parametrize(("T", "S", "H", "G", "D", "L"), SHAPES)
def test_selections_match_float64(device, T, S, H, G, D, L):
    check_selection(T, S, H, G, D, L, min(S, 20), torch.float32, device)


@pytest.mark.gpu
@pytest.mark.parametrize(("T", "S", "H", "G"), RELEASED)
@pytest.mark.parametrize("K", [1, 40, 600])
def test_released_selections_match_float64(T, S, H, G, K):
    check_selection(T, S, H, G, 192, 128, min(K, S), torch.bfloat16, "cuda")


@on_each_device
def test_gradients_match_float64(device):
    T, S, H, K = 20, 30, 2, 7
    q, k, v, generator = draw(T, S, H, H, 16, 16, torch.float32, device)
    indices = selection(T, K, S, generator, device, holes=False)
    seen = torch.zeros(T, S, dtype=torch.bool, device=device).scatter_(1, indices.long(), True)
    leaves = a, b, c = tuple(x.detach().clone().requires_grad_() for x in (q, k, v))
    truth = tuple(x.detach().double().requires_grad_() for x in (q, k, v))
    grad = torch.randn(T, H, 16, generator=generator).to(device)
    grads = torch.autograd.grad(form.masked_attention(a, b, c, 0.2, indices), leaves, grad)
    wanted = torch.autograd.grad(definition(*truth, scale=0.2, seen=seen)[0], truth, grad.double())
    for name, found, exact in zip("qkv", grads, wanted, strict=True):
        assert relative(found, exact) < 1e-5, name
    causal = torch.arange(S, device=device) < torch.arange(S - T + 1, S + 1, device=device)[:, None]
    grads = torch.autograd.grad(form.dense_attention(a, b, c, 0.2)[0], leaves, grad)
    for name, a, b in zip(
        "qkv", grads, torch.autograd.grad(definition(*truth, scale=0.2, seen=causal)[0], truth, grad.double()), strict=True
    ):
        assert relative(a, b) < 1e-5, name


@on_each_device
@pytest.mark.parametrize("at_once", [1 << 26, 100])
def test_the_absorbed_form_matches_float64_however_rows_are_tiled(device, at_once, monkeypatch):
    """Values are the keys' first dims, too wide for the other kernel: forward, log-sums and gradients."""
    monkeypatch.setattr(form, "LISTED", at_once)
    T, S, H, L, R = 9, 40, 3, 260, 20
    generator = torch.Generator().manual_seed(3)
    q, kv = (torch.randn(*s, generator=generator).to(device).requires_grad_() for s in ((T, H, L + R), (S, L + R)))
    starts = torch.randint(0, 20, (T,), generator=generator)
    ends = starts + torch.randint(1, 21, (T,), generator=generator)
    ends[4] = starts[4]
    starts, ends = starts.to(device), ends.to(device)
    keys = kv[:, None]
    assert form.is_absorbed(q, keys, keys[..., :L]) and not form.takes(q, keys, keys[..., :L])
    found = form.dense_attention(q, keys, keys[..., :L], 0.05, starts, ends)
    exact_q, exact_kv = q.detach().double().requires_grad_(), kv.detach().double().requires_grad_()
    seen = (torch.arange(S, device=device) >= starts[:, None]) & (torch.arange(S, device=device) < ends[:, None])
    there = seen.any(1)
    out, lse = definition(exact_q[there], exact_kv[:, None], exact_kv[:, None, :L], 0.05, seen[there])
    assert relative(found[0][there], out) < 3e-6 and (found[1][there] - lse).abs().max() < 1e-5
    assert not found[0][~there].any() and torch.isneginf(found[1][~there]).all()
    grad = torch.randn(T, H, L, generator=generator).to(device)
    grads = torch.autograd.grad(found[0], (q, kv), grad)
    wanted = torch.autograd.grad(out, (exact_q, exact_kv), grad[there].double())
    for name, a, b in zip(("q", "kv"), grads, wanted, strict=True):
        assert relative(a, b) < 1e-5, name


@pytest.mark.gpu
@pytest.mark.parametrize("H", [16, 128])
def test_the_absorbed_form_of_the_released_shape_matches_float64(H):
    generator = torch.Generator().manual_seed(4)
    q, kv = (torch.randn(*s, generator=generator).bfloat16().cuda() for s in ((70, H, 576), (500, 576)))
    keys, ends = kv[:, None], torch.arange(431, 501, device="cuda")
    found = form.dense_attention(q, keys, keys[..., :512], 0.05)
    seen = torch.arange(500, device="cuda") < ends[:, None]
    out, lse = definition(q.double(), keys.double(), keys[..., :512].double(), 0.05, seen)
    assert relative(found[0], out) < 8e-3 and (found[1] - lse).abs().max() < 0.1


@pytest.mark.gpu
def test_cudnn_takes_a_whole_prompt():
    q, k, v, _ = draw(400, 400, 8, 8, 192, 128, torch.bfloat16, "cuda")
    out = form.cudnn_causal_attention(q, k, v, 0.2)
    causal = torch.ones(400, 400, dtype=torch.bool, device="cuda").tril()
    assert relative(out, definition(q.double(), k.double(), v.double(), 0.2, causal)[0]) < 8e-3
    found = form.dense_attention(q, k, v, 0.2)[0]
    assert relative(found, out.double()) < 8e-3


@pytest.mark.gpu
def test_bits_and_keys_beyond_two_billion_elements():
    """140,000 keys of 128 heads of 128 are 2.3e9 numbers."""
    S, H = 140_000, 128
    generator = torch.Generator().manual_seed(1)
    tail = torch.randn(100, H, 128, generator=generator).bfloat16().cuda()
    k = torch.zeros(S, H, 128, dtype=torch.bfloat16, device="cuda")
    k[-100:] = tail
    q = torch.randn(5, H, 128, generator=generator).bfloat16().cuda()
    indices = selection(5, 30, 100, generator, "cuda", holes=False)
    near = form.masked_attention(q, tail, tail, 0.1, indices)
    far = form.masked_attention(q, k, k, 0.1, indices + S - 100)
    assert relative(far, near.double()) < 5e-3
