"""Queries with keys of their own get what the one-sequence kernels give them, bit for bit, in any batch."""

from __future__ import annotations

import pytest
import torch

from rorqual.kernels import dense_attention, select_tokens
from rorqual.kernels.own_keys import attend_own_keys, select_own_tokens
from tests.kernels.test_linear import threads as threads


@pytest.mark.parametrize(("heads", "width", "topk"), [(4, 32, 64), (8, 64, 24), (3, 16, 7), (20, 128, 5)])
def test_selection_is_that_of_each_query_alone(threads, heads, width, topk, generator) -> None:
    B, S = 21, 1000
    q = torch.randn(B, heads, width, generator=generator)
    k = torch.randn(B, S, width, generator=generator)
    w = torch.randn(B, heads, generator=generator)
    k[:, 500:] = k[:, :500]  # every score twice: ties go to the lowest
    lengths = torch.randint(1, S + 1, (B,), generator=generator)
    lengths[:3] = torch.tensor([1, topk, S])
    for b in range(B):
        k[b, lengths[b] :] = torch.nan  # what a page held before
    together = select_own_tokens(q, k, w, topk, lengths)
    for b in range(B):
        n = int(lengths[b])
        assert torch.equal(together[b], select_tokens(q[b : b + 1], k[b, :n], w[b : b + 1], topk)[0]), n
        wide = select_tokens(q[:, :], k[b, :n], w, topk, None, torch.full((B,), n))[b]
        assert torch.equal(together[b], wide), "nor does the company in the other form matter"


@pytest.mark.parametrize(("heads", "latent", "rope"), [(4, 48, 16), (8, 128, 32), (3, 20, 8), (33, 17, 3)])
def test_dense_attention_is_that_of_each_query_alone(threads, heads, latent, rope, generator) -> None:
    B, S, D = 17, 600, latent + rope
    q, kv = torch.randn(B, heads, D, generator=generator), torch.randn(B, S, D, generator=generator)
    lengths = torch.randint(1, S + 1, (B,), generator=generator)
    lengths[:5] = torch.tensor([1, 255, 256, 257, S])
    for b in range(B):
        kv[b, lengths[b] :] = torch.nan
    together = attend_own_keys(q, kv, 0.11, latent, lengths)
    for b in range(B):
        keys = kv[b, : lengths[b], None]
        alone = dense_attention(q[b : b + 1], keys, keys[..., :latent], 0.11)[0]
        assert torch.equal(together[b], alone[0]), int(lengths[b])
        many = dense_attention(q, keys, keys[..., :latent], 0.11, None, lengths[b].expand(B))[0]
        assert torch.equal(together[b], many[b])
