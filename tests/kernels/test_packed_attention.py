"""Sparse attention over the FP8 latent cache against float64 over its unpacked entries: each form."""

from __future__ import annotations

import importlib

import pytest
import torch

from rorqual.kernels import pack_latent, sparse_attention, unpack_latent
from tests.kernels.devices import on_each_device
from tests.kernels.test_sparse_attention_triton import TOLERANCE, naive, relative, selection

plain = importlib.import_module("rorqual.kernels.sparse_attention")

RELEASED = [
    (3, 128, 2048, 9000),
    (5, 64, 300, 700),
    (2, 192, 1, 50),
    (140, 64, 129, 4096),
    (1, 128, 2000, 2500),
    (64, 128, 2048, 3000),
]


def case(T, H, K, S, L, R, dtype, device, seed=0):
    """Latents of widely different sizes, subnormal 8-bit values among them."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    latent = draw(S, L) * 2.0 ** torch.randint(-9, 4, (S, L), generator=generator)
    cache = pack_latent(latent, draw(S, R)).to(device)
    return draw(T, H, L + R).to(dtype).to(device), cache, selection(T, K, S, generator, device)


def check(attend, T, H, K, S, L, R, dtype, device):
    q, cache, indices = case(T, H, K, S, L, R, dtype, device)
    scale = (L + R) ** -0.5
    out, lse = naive(q.double(), torch.cat(unpack_latent(cache, L, torch.float64), -1), indices, scale, L)
    found, found_lse = attend(q, cache, indices, scale, L)
    there = (indices >= 0).any(1)
    assert found.dtype == dtype and found_lse.dtype == torch.float32
    assert torch.isneginf(found_lse[~there]).all() and not found[~there].any()
    assert relative(found, out) < TOLERANCE[dtype], "out"
    assert (found_lse - lse)[there].abs().max() < 20 * TOLERANCE[dtype], "lse"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("T", "H", "K", "S", "L", "R"), [(5, 3, 37, 61, 128, 16), (3, 8, 600, 700, 512, 64), (2, 1, 1, 4, 256, 2)]
)
def test_plain_form_matches_float64(T, H, K, S, L, R, dtype):
    check(sparse_attention, T, H, K, S, L, R, dtype, "cpu")


@pytest.mark.parametrize("tile", [1, 1 << 14])
def test_plain_form_is_the_same_bits_in_any_tiling_and_batch(monkeypatch, tile):
    q, cache, indices = case(9, 4, 50, 80, 128, 16, torch.float32, "cpu")
    out, lse = sparse_attention(q, cache, indices, 0.1, 128)
    monkeypatch.setattr(plain, "TILE_ELEMENTS", tile)
    again, again_lse = sparse_attention(q, cache, indices, 0.1, 128)
    assert torch.equal(out, again) and torch.equal(lse, again_lse)
    alone = sparse_attention(q[4:5], cache, indices[4:5], 0.1, 128)[0]
    assert torch.equal(out[4:5], alone)


@on_each_device
@pytest.mark.parametrize("shares", [1, 2])
@pytest.mark.parametrize(
    ("T", "H", "K", "S", "L", "R"), [(5, 3, 37, 61, 128, 16), (3, 20, 200, 300, 256, 64), (2, 1, 1, 4, 384, 2)]
)
def test_portable_form_matches_float64(device, T, H, K, S, L, R, shares):
    form = pytest.importorskip("rorqual.kernels.sparse_attention_triton")
    attend = lambda *inputs: form.attend(*inputs, shares=shares, portable=True)  # noqa: E731
    check(attend, T, H, K, S, L, R, torch.float32, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize(("T", "H", "K", "S"), RELEASED)
def test_released_shape_matches_float64(T, H, K, S, portable, dtype):
    form = pytest.importorskip("rorqual.kernels.sparse_attention_triton")
    check(lambda *inputs: form.attend(*inputs, portable=portable), T, H, K, S, 512, 64, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("shares", [1, 2, 5, 16])
def test_released_shape_merges_shares_and_repeats_its_bits(shares):
    form = pytest.importorskip("rorqual.kernels.sparse_attention_triton")
    q, cache, indices = case(7, 128, 2048, 5000, 512, 64, torch.bfloat16, "cuda")
    check(lambda *inputs: form.attend(*inputs, shares=shares), 7, 128, 2048, 5000, 512, 64, torch.bfloat16, "cuda")
    out, lse = form.attend(q, cache, indices, 0.1, 512, shares=shares)
    for _ in range(20):
        again, again_lse = form.attend(q, cache, indices, 0.1, 512, shares=shares)
        assert torch.equal(again, out) and torch.equal(again_lse, lse)


@pytest.mark.gpu
def test_the_dispatched_form_runs_in_a_replayed_graph():
    q, cache, indices = case(4, 128, 300, 900, 512, 64, torch.bfloat16, "cuda")
    expected = sparse_attention(q, cache, indices, 0.1, 512)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = sparse_attention(q, cache, indices, 0.1, 512)
    for tensor in found:
        tensor.fill_(torch.nan)
    graph.replay()
    assert all(map(torch.equal, found, expected))


@on_each_device
def test_unselected_entries_are_never_used(device):
    """NaN codes and scales at every position that no row selects, position 0 among them."""
    form = pytest.importorskip("rorqual.kernels.sparse_attention_triton")
    H, L, R, dtype = (4, 128, 16, torch.float32) if device == "cpu" else (64, 512, 64, torch.bfloat16)
    q, cache, indices = case(4, H, 20, 60, L, R, dtype, device)
    indices = torch.where(indices == 0, -1, indices)
    unused = torch.ones(60, dtype=torch.bool, device=device)
    unused[indices[indices >= 0].long()] = False
    spoilt = cache.masked_fill(unused[:, None], 0x7F)
    clean = form.attend(q, cache, indices, 0.1, L)
    assert all(map(torch.equal, form.attend(q, spoilt, indices, 0.1, L), clean))


@pytest.mark.gpu
def test_offsets_beyond_two_billion_elements():
    """3.4 million entries of 656 bytes are 2.2e9: the last ones must be read."""
    form = pytest.importorskip("rorqual.kernels.sparse_attention_triton")
    S = 3_400_000
    q, tail, indices = case(4, 64, 128, 1000, 512, 64, torch.bfloat16, "cuda")
    cache = torch.full((S, 656), 0x7F, dtype=torch.uint8, device="cuda")
    cache[-1000:] = tail
    far = torch.where(indices < 0, indices, indices + S - 1000)
    for portable in (False, True):
        near_out = form.attend(q, tail, indices, 0.1, 512, portable=portable)
        assert all(map(torch.equal, near_out, form.attend(q, cache, far, 0.1, 512, portable=portable)))


def test_no_keys_no_queries_and_no_selection_give_zeros():
    q, cache = torch.randn(2, 3, 144), pack_latent(torch.randn(5, 128), torch.randn(5, 16))
    for queries, keys, indices in (
        (q, cache, torch.zeros(2, 0)),
        (q, cache[:0], torch.full((2, 4), -1)),
        (q[:0], cache, torch.zeros(0, 4)),
    ):
        out, lse = sparse_attention(queries, keys, indices.int(), 0.1, 128)
        assert not out.any() and torch.isneginf(lse).all() and out.shape == (*queries.shape[:2], 128)
