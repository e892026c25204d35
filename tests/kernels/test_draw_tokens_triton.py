"""Tokens drawn by the kernel are those of the engine's own sampler: token, log-probs, kept set."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rorqual.engine.philox import uniforms
from rorqual.engine.sampler import Draw, sample_rows
from rorqual.policy import SamplingParams
from tests.kernels.devices import on_each_device

triton = pytest.importorskip("triton")
from rorqual.kernels.draw_tokens_triton import draw_tokens  # noqa: E402

KINDS = [
    SamplingParams(),
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.6),
    SamplingParams(temperature=1.7, top_p=0.9),
    SamplingParams(top_p=0.35),
    SamplingParams(top_k=5),
    SamplingParams(temperature=1.2, top_k=40, top_p=0.8),
    SamplingParams(min_p=0.02),
    SamplingParams(temperature=0.9, top_k=30, top_p=0.95, min_p=0.05),
    SamplingParams(top_k=1),
    SamplingParams(top_p=1e-6),
]


def drawn(logits, kinds, seeds, device, record=True, step=None):
    B, V = logits.shape
    column = lambda name, dtype: torch.tensor([getattr(each, name) for each in kinds], dtype=dtype, device=device)  # noqa: E731
    n, at = (1, 0) if step is None else (3, step)
    noise = np.full((n, B), np.nan)
    noise[at] = uniforms(seeds, [7] * B)
    out = torch.full((n, 3, B), torch.nan, dtype=torch.float64, device=device)
    tokens = torch.full((B,), -1, device=device)
    kept = torch.full((n, B, -(-V // 8)), 255, dtype=torch.uint8, device=device) if record else None
    draw_tokens(
        logits.to(device), torch.from_numpy(noise).to(device), column("temperature", torch.float32),
        column("top_k", torch.int32), column("top_p", torch.float32), column("min_p", torch.float32),
        out, tokens, kept, None if step is None else torch.tensor([at], device=device),
    )  # fmt: skip
    assert torch.equal(tokens.cpu(), out[at, 0].long().cpu())
    return out[at].cpu().numpy(), None if kept is None else kept[at].cpu().numpy()


@on_each_device
@pytest.mark.parametrize("V", [97, 5003, 40_001])
def test_tokens_logprobs_and_kept_sets_are_the_samplers(device, V):
    g = torch.Generator().manual_seed(V)
    kinds = KINDS * (1 if device == "cpu" else 40)
    logits = torch.randn(len(kinds), V, generator=g) * 3
    logits[::3] = logits[::3].round()  # ties at every edge
    seeds = list(range(len(kinds)))
    out, kept = drawn(logits, kinds, seeds, device)
    expected = sample_rows(logits, [Draw(kind, seed, 7) for kind, seed in zip(kinds, seeds, strict=True)])
    sets = np.unpackbits(kept, axis=1, bitorder="little")
    assert not sets[:, V:].any()
    missed = 0
    for row, want in enumerate(expected):
        found = np.flatnonzero(sets[row, :V])
        whole = np.arange(V) if want.kept is None else want.kept
        assert len(np.setxor1d(found, whole)) <= 1, (kinds[row], len(found), len(whole))  # float32 mass against float64
        missed += len(found) != len(whole) or int(out[0, row]) != want.token
        if int(out[0, row]) == want.token:
            assert abs(out[1, row] - want.logprob) < 2e-4 and abs(out[2, row] - want.model_logprob) < 1e-5
    assert missed <= len(kinds) // 40, f"{missed} of {len(kinds)} rows differ by a rounding"


@on_each_device
def test_a_row_is_the_same_bits_in_any_batch_and_at_any_step(device):
    logits = torch.randn(11, 300, generator=torch.Generator().manual_seed(1)) * 2
    seeds = list(range(11))
    whole, kept = drawn(logits, KINDS, seeds, device)
    for row in (0, 3, 8):
        alone, own = drawn(logits[row : row + 1], KINDS[row : row + 1], seeds[row : row + 1], device, step=2)
        assert np.array_equal(alone[:, 0], whole[:, row]) and np.array_equal(own[0], kept[row])


@on_each_device
def test_draws_follow_the_distribution(device):
    """Chi-square of many rows with equal logits."""
    count, V, kind = (100 if device == "cpu" else 100_000), 12, SamplingParams(temperature=1.3, top_p=0.9)
    row = torch.randn(1, V, generator=torch.Generator().manual_seed(5))
    out, kept = drawn(row.repeat(count, 1), [kind] * count, list(range(count)), device)
    ids = np.flatnonzero(np.unpackbits(kept[0], bitorder="little")[:V])
    p = torch.softmax(row[0].double() / 1.3, 0).numpy()[ids]
    p /= p.sum()
    counts = np.array([(out[0] == token).sum() for token in ids])
    assert counts.sum() == count
    statistic = ((counts - count * p) ** 2 / (count * p)).sum()
    assert statistic < len(ids) - 1 + 5 * np.sqrt(2 * (len(ids) - 1)), (counts, count * p)


@on_each_device
def test_logits_that_are_no_numbers_show(device):
    logits = torch.randn(2, 50)
    logits[1] = torch.nan
    out, _ = drawn(logits, KINDS[:2], [1, 2], device, record=False)
    assert np.isfinite(out[2, 0]) and not np.isfinite(out[2, 1])
