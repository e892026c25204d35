"""The sampler draws from exactly the distribution it reports, and from nothing but its own row, seed and position."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rorqual.engine.philox import uniform, uniforms
from rorqual.engine.sampler import Draw, distribution, kept_weights, sample, sample_rows
from rorqual.policy import SamplingParams

V = 37


def logits(seed=0, ties=False):
    values = np.random.default_rng(seed).normal(size=V) * 2
    return np.round(values) if ties else values


def naive(values, params):
    """Keep by definition, token by token: a token stays if it ranks below top-k, if less than top-p lies above it, …"""
    p = np.exp(values / params.temperature - np.max(values / params.temperature))
    p /= p.sum()
    rank = sorted(range(V), key=lambda t: (-p[t], t))
    kept, above, within = [], 0.0, rank[: params.top_k or V]
    total = sum(p[t] for t in within)
    for t in within:
        if params.top_p == 1 or above < params.top_p * total - 1e-15:
            kept.append(t)
        above += p[t]
    kept = [t for t in kept if p[t] >= params.min_p * p[rank[0]]]
    q = np.zeros(V)
    q[kept] = p[kept] / p[kept].sum()
    return q


@given(st.integers(0, 50), st.booleans(), st.sampled_from([0, 1, 3, 36]), st.floats(0.05, 1), st.floats(0, 1), st.floats(0.2, 3))
def test_truncation_keeps_what_its_definition_keeps(seed, ties, top_k, top_p, min_p, temperature):
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    found = np.exp(distribution(logits(seed, ties), params))
    np.testing.assert_allclose(found, naive(logits(seed, ties), params), atol=1e-12)
    assert abs(found.sum() - 1) < 1e-12


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_p=0.95, top_k=12, temperature=1.5)])
def test_chi_square_of_100_000_draws_against_the_exact_distribution(params):
    values = logits(3)
    exact = naive(values, params)
    kept = kept_weights(np.broadcast_to(values, (100_000, V)), [Draw(params, 11, i) for i in range(100_000)])
    counts = np.bincount(kept.draw(uniforms([11] * 100_000, range(100_000))), minlength=V)
    assert counts[exact == 0].sum() == 0
    likely = exact > 0
    statistic = ((counts[likely] - 1e5 * exact[likely]) ** 2 / (1e5 * exact[likely])).sum()
    freedom = likely.sum() - 1
    assert statistic < freedom + 4 * np.sqrt(2 * freedom), (statistic, freedom)


def asked(draw_seed):
    """A mixed batch: every kind of request beside every other."""
    g = np.random.default_rng(draw_seed)
    for _ in range(23):
        params = SamplingParams(
            temperature=float(g.choice([0, 1, 0.7, 1.6])), top_k=int(g.choice([0, 0, 1, 5])),
            top_p=float(g.choice([1, 0.95, 0.3])), min_p=float(g.choice([0, 0, 0.1])),
            top_logprobs=int(g.choice([0, 3])), logit_bias={4: float(g.choice([-5.0, 8.0]))},
        )  # fmt: skip
        allowed = torch.tensor(g.random(V) < g.choice([0.0, 0.3, 1.0]))
        yield Draw(params, int(g.integers(2**62)), int(g.integers(1000)), allowed if g.random() < 0.5 else None)


def test_a_row_is_the_same_bits_in_any_batch():
    for seed in range(20):
        draws = list(asked(seed))
        values = torch.tensor(np.stack([logits(seed + i, ties=i % 3 == 0) for i in range(len(draws))]))
        for row, (each, found) in enumerate(zip(draws, sample_rows(values, draws), strict=True)):
            alone = sample(values[row], each.params, each.seed, each.position, each.allowed)
            if found is None or alone is None:
                assert found is alone is None and not each.allowed.any()
                continue
            assert (found.token, found.logprob, found.model_logprob) == (alone.token, alone.logprob, alone.model_logprob)
            assert found.top_logprobs == alone.top_logprobs and np.array_equal(found.kept, alone.kept)
            lone = distribution(values[row].numpy(), each.params, each.allowed)
            assert found.logprob == lone[found.token]


def test_logits_that_are_no_numbers_are_said():
    with pytest.raises(FloatingPointError, match="not numbers"):
        sample(torch.full((V,), torch.nan), SamplingParams(), 1, 0)


def test_noise_is_that_of_numpys_own_philox():
    g = np.random.default_rng(0)
    seeds = [0, 1, 2**64 - 1, 2**64 + 5, -3, *map(int, g.integers(0, 2**63, 100))]
    positions = [0, 2**32, *map(int, g.integers(0, 10**6, 103))]
    own = [np.random.Philox(key=s % 2**64, counter=p).random_raw() >> 11 for s, p in zip(seeds, positions, strict=True)]
    assert uniforms(seeds, positions).tolist() == [int(x) * 2.0**-53 for x in own]


def test_greedy_takes_the_lowest_of_tied_ids_with_certainty():
    values = torch.zeros(V)
    values[[9, 20]] = 5.0
    drawn = sample(values, SamplingParams(temperature=0), seed=1, position=0)
    assert (drawn.token, drawn.logprob, drawn.kept.tolist()) == (9, 0.0, [9])
    assert drawn.model_logprob == pytest.approx(float(values.log_softmax(-1)[9]))


def test_noise_belongs_to_seed_and_position_alone():
    assert uniform(5, 7) == uniform(5, 7)
    assert len({uniform(s, p) for s in range(20) for p in range(20)}) == 400
    numbers = np.array([uniform(3, p) for p in range(20_000)])
    assert abs(numbers.mean() - 0.5) < 0.01 and abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.02


def test_bias_and_grammar_change_the_distribution_sampled_from_but_not_the_raw_logprob():
    values = torch.tensor(logits(1))
    raw = values.log_softmax(-1)
    allowed = torch.zeros(V, dtype=torch.bool)
    allowed[[4, 6]] = True
    drawn = sample(values, SamplingParams(logit_bias={6: 100.0}, top_logprobs=2), 1, 0, allowed)
    assert drawn.token == 6 and drawn.logprob == pytest.approx(0, abs=1e-12)
    assert drawn.model_logprob == pytest.approx(float(raw[6]))
    assert drawn.kept.tolist() == [4, 6]
    assert [t for t, _ in drawn.top_logprobs] == raw.topk(2).indices.tolist()
    assert sample(values, SamplingParams(), 1, 0, torch.zeros(V, dtype=torch.bool)) is None


def test_the_kept_set_renormalises_to_the_logprob_that_was_reported():
    values = torch.tensor(logits(2))
    drawn = sample(values, SamplingParams(top_p=0.7, temperature=1.3), 1, 4)
    over_kept = (values[torch.tensor(drawn.kept).long()] / 1.3).log_softmax(-1)
    assert drawn.logprob == pytest.approx(float(over_kept[drawn.kept.tolist().index(drawn.token)]), abs=1e-12)
