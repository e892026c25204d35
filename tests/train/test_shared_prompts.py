"""Prompts computed once: log-probs are the same bits as apart, gradients the same numbers; what can't be shared stays apart."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from rorqual.engine import Engine
from rorqual.model.call import EXPANDED
from rorqual.model.transformer import Transformer
from rorqual.policy import SamplingParams
from rorqual.rollout.trajectory import End, Trajectory, Turn, samples
from rorqual.train.policy_step import PolicyConfig
from rorqual.train.samples import BatchLimits, Item, ReplayConfig, micro_batches, sample_batch, score
from tests.system.test_trainer_equals_sampler import CONFIG, ENGINE
from tests.train.test_policy_step import stepped

CPU = torch.device("cpu")
TOPK = CONFIG.index_topk
RECORDED = SamplingParams(
    max_tokens=40, temperature=0.8, top_p=0.9, record_kept_tokens=True, record_routed_experts=True, record_selected_indices=True
)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(CONFIG, seed=2)


@pytest.fixture(scope="module")
def items(model) -> list[Item]:
    """Three attempts of two turns at a prompt of 40 tokens, two at one of 29, two at one below top-k, one alone."""
    draw, engine = np.random.default_rng(5), Engine(model, replace(ENGINE, cache_tokens=1200))
    prompts = [draw.integers(2, 211, length).tolist() for length in (40, 29, TOPK - 3, 33)]
    found = []
    for number, place in enumerate((0, 0, 0, 1, 1, 2, 2, 3)):
        context, turns = prompts[place], []
        for turn in range(2):
            done = engine.generate([context], [replace(RECORDED, seed=10 * number + turn)])[0]
            turns.append(Turn({}, done))
            context = [*done.prompt_tokens, *done.tokens, *draw.integers(2, 211, 3).tolist()]
        sample = samples(Trajectory(f"t{place}", number, tuple(turns), End.ANSWERED))[0]
        found.append(Item(sample, (-1.0) ** number, number, "d"))
    return found


def test_log_probs_are_the_same_bits_as_apart(model, items):
    apart, shared = sample_batch(items, CPU), sample_batch(items, CPU, share_prompts=True)
    assert shared.shared is not None and len(shared.shared.rows.tokens) == apart.num_rows - 2 * 40 - 29
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for weight in moved.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.01)
        for each in (model, moved):
            one, two = score(each, apart), score(each, shared)
            assert torch.equal(one.logprobs, two.logprobs) and torch.equal(one.entropies, two.entropies)
            assert float((one.logprobs - score(each, shared, mode=EXPANDED).logprobs).abs().max()) < 1e-4
        own = score(model, shared).logprobs
        assert float((own - shared.sampler_logprobs)[shared.mask].abs().max()) < 1e-5
        assert not torch.equal(score(moved, shared).logprobs, own)


def test_a_step_takes_the_same_gradients(items):
    found = {}
    for shares in (False, True):
        _, found[shares], metrics = stepped(items, PolicyConfig(share_prompts=shares), moved=0.01)
    assert metrics["train/tokens"] == sum(int(item.sample.mask.sum()) for item in items)
    assert found[True].keys() == found[False].keys() and len(found[True]) > 20
    for name, gradient in found[False].items():
        assert float((found[True][name] - gradient).abs().max()) < 1e-5 * max(1.0, float(gradient.abs().max())), name
    indexers = [name for name in found[True] if ".indexer." in name]
    assert indexers and all(float(found[True][name].abs().sum()) > 0 for name in indexers), "they learn from shared rows too"


def test_what_can_not_be_shared_stays_apart(items):
    def rows(chosen, replay=None) -> int:
        shared = sample_batch(chosen, CPU, replay, share_prompts=True).shared
        return 0 if shared is None else len(shared.rows.tokens)

    def changed(item: Item, **fields) -> Item:
        return replace(item, sample=replace(item.sample, **fields))

    assert rows(items[5:]) == 0, "a prompt below top-k, and one alone"
    assert rows(items[:3], ReplayConfig(selection=False)) == 0
    layers = [layer.copy() for layer in items[1].sample.selected_indices or ()]
    layers[0][50] = -1
    assert rows([items[0], changed(items[1], selected_indices=tuple(layers))]) == 0, "a branch that would choose anew"
    experts = items[1].sample.routed_experts.copy()
    experts[30] = experts[30][:, ::-1]
    pair = [items[0], changed(items[1], routed_experts=experts)]
    assert rows(pair) == sum(len(item.sample) - 1 for item in pair) - 30, "shared up to the first difference"
    assert rows(pair, ReplayConfig(routing=False)) == rows(items[:2]) == rows(pair) - 10


def test_a_model_that_attends_densely_somewhere_takes_them_apart(items):
    dense = Transformer(replace(CONFIG, index_topk=64), seed=2)
    batch = sample_batch(items, CPU, share_prompts=True)
    assert batch.shared is not None and not batch.shared.serves(dense.config, EXPANDED)
    with torch.no_grad():
        assert torch.equal(score(dense, batch).logprobs, score(dense, sample_batch(items, CPU)).logprobs)


def test_micro_batches_keep_attempts_at_one_prompt_together(items):
    parts = micro_batches(items[::2] + items[1::2], BatchLimits(400), share_prompts=True)
    assert sorted(item.trajectory for item in parts[0])[:3] == [0, 1, 2]
    assert sorted(item.trajectory for part in parts for item in part) == list(range(8))
    for part in parts:
        shared = sample_batch(part, CPU, share_prompts=True)
        rows = len(shared.shared.rows.tokens) if shared.shared else shared.num_rows
        assert len(part) == 1 or rows <= 400
