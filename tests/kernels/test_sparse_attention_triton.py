"""The Triton and Gluon forms of sparse attention against a naive float64 model: outputs, each gradient, determinism, bad rows."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.devices import on_each_device

triton = pytest.importorskip("triton")
form = pytest.importorskip("rorqual.kernels.sparse_attention_triton")

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
RELEASED = [(3, 128, 2048, 9000), (5, 64, 300, 700), (2, 192, 1, 50), (140, 64, 129, 4096), (1, 128, 2000, 2500)]


def naive(q, kv, indices, scale, value_dim):
    """The formula, dense, in float64: out [T, H, L], lse [T, H]."""
    chosen = torch.zeros(q.shape[0], len(kv), dtype=torch.bool, device=q.device)
    for t, row in enumerate(indices):
        chosen[t, row[row >= 0].long()] = True
    scores = (q @ kv.T * scale).masked_fill(~chosen[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    return weights @ kv[:, :value_dim], lse


def selection(T, K, S, generator, device, holes=True):
    """Distinct positions in random order, -1 anywhere, one row with none and one with a single key where there is room."""
    rows = [torch.randperm(S, generator=generator)[:K] for _ in range(T)]
    rows = torch.stack(
        [torch.cat([row, torch.full((K - len(row),), -1)])[torch.randperm(K, generator=generator)] for row in rows]
    )
    if holes:
        rows[torch.rand(T, K, generator=generator) < 0.2] = -1
        if T > 2:
            rows[1] = -1
            rows[2, 1:] = -1
    return rows.to(device, torch.int32)


def case(T, H, K, S, L, R, dtype, device, holes=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)  # noqa: E731
    indices = selection(T, K, S, generator, device, holes)
    return draw(T, H, L + R), draw(S, L + R), indices, draw(T, H, L), draw(T, H).float()


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def check(T, H, K, S, L, R, dtype, device, **options):
    q, kv, indices, grad_out, grad_lse = case(T, H, K, S, L, R, dtype, device)
    scale = (L + R) ** -0.5
    truth = [x.double().requires_grad_() for x in (q, kv)]
    out, lse = naive(*truth, indices, scale, L)
    there = (indices >= 0).any(1)
    grads = torch.autograd.grad((out[there], lse[there]), truth, (grad_out[there].double(), grad_lse[there].double()))
    found, found_lse = form.attend(q, kv, indices, scale, L, **options)
    portable = options.get("portable", False)
    q_grad, kv_grad = form.attend_backward(q, kv, indices, scale, found, found_lse, grad_out, grad_lse, portable=portable)
    assert torch.isneginf(found_lse[~there]).all() and not found[~there].any() and not q_grad[~there].any()
    tolerance = TOLERANCE[dtype]
    assert relative(found, out) < tolerance, "out"
    assert (found_lse - lse)[there].abs().max() < 20 * tolerance, "lse"
    assert relative(q_grad, grads[0]) < tolerance, "grad of q"
    assert relative(kv_grad, grads[1]) < tolerance, "grad of kv"


@on_each_device
@pytest.mark.parametrize(
    ("T", "H", "K", "S", "L", "R"), [(5, 3, 37, 61, 32, 16), (3, 20, 1, 9, 24, 8), (4, 8, 130, 150, 128, 32), (1, 1, 7, 5, 16, 2)]
)
def test_output_and_gradients_match_float64(device, T, H, K, S, L, R):
    check(T, H, K, S, L, R, torch.float32, device)


@on_each_device
@pytest.mark.parametrize("shares", [1, 2, 3])
def test_shared_keys_merge_to_the_same_attention(device, shares):
    check(3, 5, 300, 310, 32, 16, torch.float32, device, shares=shares)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize(("T", "H", "K", "S"), RELEASED)
def test_released_shape_matches_float64(T, H, K, S, portable, dtype):
    check(T, H, K, S, 512, 64, dtype, "cuda", portable=portable)


@pytest.mark.gpu
@pytest.mark.parametrize("shares", [1, 2, 5, 16])
def test_released_shape_merges_shares(shares):
    check(3, 128, 2048, 5000, 512, 64, torch.bfloat16, "cuda", shares=shares)


@on_each_device
def test_unselected_entries_are_never_used(device):
    """NaN at every position that no row selects, position 0 among them (where a negative index would point)."""
    q, kv, indices, grad_out, grad_lse = case(4, 4, 20, 60, 32, 16, torch.float32, device)
    indices = torch.where(indices == 0, -1, indices)
    unused = torch.ones(60, dtype=torch.bool, device=device)
    unused[indices[indices >= 0].long()] = False
    spoilt = kv.masked_fill(unused[:, None], torch.nan)
    out, lse = form.attend(q, spoilt, indices, 0.1, 32)
    clean, clean_lse = form.attend(q, kv, indices, 0.1, 32)
    assert torch.equal(out, clean) and torch.equal(lse, clean_lse)
    q_grad, kv_grad = form.attend_backward(q, spoilt, indices, 0.1, out, lse, grad_out, grad_lse)
    assert not q_grad.isnan().any() and not kv_grad.isnan().any()


@pytest.mark.gpu
def test_unselected_entries_are_never_used_in_the_released_shape():
    q, kv, indices, grad_out, grad_lse = case(4, 64, 200, 600, 512, 64, torch.bfloat16, "cuda")
    indices = torch.where(indices == 0, -1, indices)
    spoilt = kv.clone()
    spoilt[0] = torch.nan
    out, lse = form.attend(q, spoilt, indices, 0.1, 512)
    assert torch.equal(out, form.attend(q, kv, indices, 0.1, 512)[0])
    q_grad, kv_grad = form.attend_backward(q, spoilt, indices, 0.1, out, lse, grad_out, grad_lse)
    assert not q_grad.isnan().any() and not kv_grad.isnan().any()


@on_each_device
def test_gradients_add_up_over_chunks_and_are_bitwise_repeatable(device, monkeypatch):
    q, kv, indices, grad_out, grad_lse = case(7, 4, 33, 50, 32, 16, torch.float32, device)
    out, lse = form.attend(q, kv, indices, 0.1, 32)
    run = lambda: form.attend_backward(q, kv, indices, 0.1, out, lse, grad_out, grad_lse)  # noqa: E731
    whole = run()
    assert all(torch.equal(a, b) for a, b in zip(run(), whole, strict=True))
    monkeypatch.setattr(form, "BACKWARD_BYTES", 1)
    pieces = run()
    assert torch.equal(pieces[0], whole[0])
    assert relative(pieces[1], whole[1].double()) < 1e-6


@pytest.mark.gpu
def test_released_shape_is_bitwise_repeatable():
    q, kv, indices, grad_out, grad_lse = case(600, 128, 2048, 3000, 512, 64, torch.bfloat16, "cuda", holes=False)
    out, lse = form.attend(q, kv, indices, 0.1, 512)
    grads = form.attend_backward(q, kv, indices, 0.1, out, lse, grad_out, grad_lse)
    for _ in range(20):
        again = form.attend(q, kv, indices, 0.1, 512)
        assert torch.equal(again[0], out) and torch.equal(again[1], lse)
        assert all(map(torch.equal, form.attend_backward(q, kv, indices, 0.1, out, lse, grad_out, grad_lse), grads))


@pytest.mark.gpu
def test_offsets_beyond_two_billion_elements():
    """4.1 million entries of 576 are 2.4e9 elements: the last ones must be read and their gradients kept."""
    S, H = 4_100_000, 64
    kv = torch.zeros(S, 576, dtype=torch.bfloat16, device="cuda")
    q, tail, indices, grad_out, grad_lse = case(4, H, 128, 1000, 512, 64, torch.bfloat16, "cuda")
    kv[-1000:] = tail
    far = torch.where(indices < 0, indices, indices + S - 1000)
    for portable in (False, True):
        near_out = form.attend(q, tail, indices, 0.1, 512, portable=portable)
        far_out = form.attend(q, kv, far, 0.1, 512, portable=portable)
        assert all(map(torch.equal, near_out, far_out))
        gradients = [
            form.attend_backward(q, keys, at, 0.1, *near_out, grad_out, grad_lse, portable=portable)
            for keys, at in ((tail, indices), (kv, far))
        ]
        assert torch.equal(gradients[0][0], gradients[1][0])
        assert torch.equal(gradients[0][1], gradients[1][1][-1000:])
        del gradients


@on_each_device
@pytest.mark.parametrize("chunked", [False, True])
def test_atomic_backward_sums_to_the_same_gradient(device, chunked, monkeypatch):
    """Only the order differs, and only that of kv's gradient; the default stays the one with a fixed order."""
    if chunked:
        monkeypatch.setattr(form, "BACKWARD_BYTES", 1)
    q, kv, indices, grad_out, _ = case(6, 4, 33, 50, 32, 16, torch.float32, device)
    grads = {}
    for atomic in (False, True):
        a, b = q.clone().requires_grad_(), kv.clone().requires_grad_()
        out = form.sparse_attention(a, b, indices, 0.2, 32, atomic_backward=atomic)[0]
        grads[atomic] = torch.autograd.grad(out, (a, b), grad_out)
    assert torch.equal(grads[True][0], grads[False][0])
    assert relative(grads[True][1], grads[False][1].double()) < 1e-6


@pytest.mark.gpu
def test_atomic_backward_of_the_released_shape_matches_float64():
    q, kv, indices, grad_out, grad_lse = case(40, 128, 300, 700, 512, 64, torch.bfloat16, "cuda")
    out, lse = form.attend(q, kv, indices, 0.1, 512)
    wanted = form.attend_backward(q, kv, indices, 0.1, out, lse, grad_out, grad_lse)
    found = form.attend_backward(q, kv, indices, 0.1, out, lse, grad_out, grad_lse, atomic=True)
    assert torch.equal(found[0], wanted[0]) and relative(found[1], wanted[1].double()) < 4e-3


@on_each_device
def test_autograd_runs_through_the_dispatched_function(device):
    q, kv, indices, grad_out, _ = case(3, 2, 9, 12, 16, 16, torch.float32, device)
    q.requires_grad_(), kv.requires_grad_()
    truth = [x.detach().double().requires_grad_() for x in (q, kv)]
    there = (indices >= 0).any(1)
    out, _ = form.sparse_attention(q, kv, indices, 0.2, 16)
    expected = naive(*truth, indices, 0.2, 16)[0]
    grads = torch.autograd.grad(out, (q, kv), grad_out)
    for name, a, b in zip(("q", "kv"), grads, torch.autograd.grad(expected[there], truth, grad_out[there].double()), strict=True):
        assert relative(a, b) < 2e-6, name


def test_no_keys_no_queries_and_no_selection_give_zeros():
    q, kv = torch.randn(2, 3, 24), torch.randn(5, 24)
    for queries, keys, indices in (
        (q, kv, torch.zeros(2, 0)),
        (q, kv[:0], torch.full((2, 4), -1)),
        (q[:0], kv, torch.zeros(0, 4)),
    ):
        out, lse = form.sparse_attention(queries, keys, indices.int(), 0.1, 16)
        assert not out.any() and torch.isneginf(lse).all() and out.shape == (*queries.shape[:2], 16)


def test_the_schedule_of_shares_fills_the_processors_and_never_lengthens():
    for programs in (1, 2, 7, 64, 128, 133, 256, 500):
        shares = form.share_count(programs, 16, 132)
        costs = [-(-programs * n // 132) * (-(-16 // n) + 2) for n in range(1, 17)]
        assert 1 <= shares <= 16 and costs[shares - 1] == min(costs)
    assert form.share_count(1, 16, 132) > 8 and form.share_count(128, 16, 132) == 1
