"""Sparse attention over the FP8 latent cache against float64 over its unpacked entries: each form."""

from __future__ import annotations

import importlib

import pytest
import torch

from rorqual.kernels import pack_latent, sparse_attention, unpack_latent
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


def test_no_keys_no_queries_and_no_selection_give_zeros():
    q, cache = torch.randn(2, 3, 144), pack_latent(torch.randn(5, 128), torch.randn(5, 16))
    for queries, keys, indices in (
        (q, cache, torch.zeros(2, 0)),
        (q, cache[:0], torch.full((2, 4), -1)),
        (q[:0], cache, torch.zeros(0, 4)),
    ):
        out, lse = sparse_attention(queries, keys, indices.int(), 0.1, 128)
        assert not out.any() and torch.isneginf(lse).all() and out.shape == (*queries.shape[:2], 128)
