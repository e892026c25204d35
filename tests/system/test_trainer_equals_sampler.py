"""What was sampled is what is trained: with full replay the trainer's log-probs are the sampler's, and each replay matters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rorqual.engine import Engine, EngineConfig
from rorqual.model.config import ModelConfig
from rorqual.model.transformer import Transformer
from rorqual.policy import SamplingParams
from rorqual.rollout.trajectory import End, Trajectory, Turn, samples
from rorqual.train.samples import BatchLimits, Item, ReplayConfig, micro_batches, sample_batch, score

CONFIG = ModelConfig(
    vocab_size=211, dim=48, n_layers=4, n_dense_layers=1, inter_dim=80, max_positions=1024, n_heads=4, q_lora_rank=24,
    kv_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=12, yarn=None, index_n_heads=4, index_head_dim=16,
    index_topk=24, n_routed_experts=16, n_activated_experts=4, moe_inter_dim=24, n_expert_groups=4, n_limited_groups=2,
    init_std=0.15,
)  # fmt: skip
PARAMS = dict(
    max_tokens=40, temperature=0.8, top_p=0.9, record_kept_tokens=True, record_routed_experts=True, record_selected_indices=True
)
ENGINE = EngineConfig(block_size=8, cache_tokens=400, max_step_tokens=37, record_selection=True)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(CONFIG, seed=2)


@pytest.fixture(scope="module")
def trajectories(model) -> list[Trajectory]:
    return played(Engine(model, ENGINE))


def played(engine: Engine) -> list[Trajectory]:
    """Six attempts of three turns with observations between, side by side in a cache too small for them: prefixes are
    found, requests are preempted and computed again, contexts reach five times top-k."""
    draw = np.random.default_rng(0)
    shared = draw.integers(2, 211, 30).tolist()
    contexts = [shared + draw.integers(2, 211, 5).tolist() for _ in range(6)]
    turns: list[list[Turn]] = [[] for _ in contexts]
    for turn in range(3):
        params = [SamplingParams(seed=100 * turn + i, **PARAMS) for i in range(len(contexts))]
        for i, done in enumerate(engine.generate(contexts, params)):
            turns[i].append(Turn({}, done, sampled_tokens=len(done.tokens)))
            contexts[i] = [*done.prompt_tokens, *done.tokens, *draw.integers(2, 211, draw.integers(1, 20)).tolist()]
    assert engine.counters.preemptions > 0 and engine.counters.cached_tokens > 0
    return [Trajectory(f"t{i}", 0, tuple(each), End.ANSWERED) for i, each in enumerate(turns)]


def gaps(model, trajectories, replay=None) -> torch.Tensor:
    """|log ratio| of every sampled token."""
    items = [Item(sample, 1.0, i) for i, t in enumerate(trajectories) for sample in samples(t)]
    found = []
    for part in micro_batches(items, BatchLimits(400)):
        batch = sample_batch(part, torch.device("cpu"), replay)
        with torch.no_grad():
            scored = score(model, batch)
        found.append((scored.logprobs - batch.sampler_logprobs)[batch.mask].abs())
    return torch.cat(found)


def gap(model, trajectories, replay=None) -> float:
    return float(gaps(model, trajectories, replay).max())


def test_with_full_replay_log_probs_agree_to_1e_5_on_long_rollouts_above_top_k(model, trajectories):
    assert all(len(samples(t)) == 1 and len(samples(t)[0]) > 120 for t in trajectories)
    assert gap(model, trajectories) < 1e-5


def test_every_sampled_token_is_trained_and_nothing_else(trajectories):
    items = [Item(sample, 1.0, i) for i, t in enumerate(trajectories) for sample in samples(t)]
    parts = micro_batches(items, BatchLimits(400))
    assert len(parts) > 1 and sorted(i.trajectory for part in parts for i in part) == list(range(6))
    batches = [sample_batch(part, torch.device("cpu")) for part in parts]
    assert sum(b.num_tokens for b in batches) == sum(len(turn.completion.tokens) for t in trajectories for turn in t.turns)
    for batch, part in zip(batches, parts, strict=True):
        for row, item in enumerate(part):
            assert torch.equal(batch.tokens[row, 1:][batch.mask[row]], torch.tensor(item.sample.tokens[item.sample.mask]))


@pytest.mark.parametrize("left_out", ["routing", "selection", "kept_tokens", "temperature"])
def test_after_the_weights_moved_each_replay_left_out_shows_a_larger_gap(model, trajectories, left_out):
    """The sampler's decisions are those of the weights it had: with others, deciding anew takes other experts and keys."""
    moved = Transformer(CONFIG, seed=2)
    with torch.no_grad():
        for weight in moved.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)) * 0.003)
    whole, without = gap(moved, trajectories), gap(moved, trajectories, ReplayConfig(**{left_out: False}))
    assert without > whole * 1.02, (whole, without)


def test_a_replay_that_was_not_recorded_is_refused(model):
    plain = Engine(model).generate([[3, 4, 5]], SamplingParams(max_tokens=4, seed=1))[0]
    items = [Item(sample, 1.0, 0) for sample in samples(Trajectory("t", 0, (Turn({}, plain),), End.ANSWERED))]
    with pytest.raises(ValueError, match="routed experts"):
        sample_batch(items, torch.device("cpu"))
    batch = sample_batch(items, torch.device("cpu"), ReplayConfig(routing=False, selection=False))
    assert float((score(model, batch).logprobs - batch.sampler_logprobs).abs().max()) < 1e-5


def test_replayed_routing_gives_the_router_gradients(model, trajectories):
    batch = sample_batch([Item(samples(trajectories[0])[0], 1.0, 0)], torch.device("cpu"))
    scored = score(model, batch, index_loss="restricted")
    router, index = model.layers[1].ffn.router.weight, model.layers[1].attn.indexer.wk.weight
    grad_router, grad_index = torch.autograd.grad(scored.logprobs.sum(), [router, index], retain_graph=True, allow_unused=True)
    assert grad_router.abs().sum() > 0 and grad_index is None, "the policy's gradient reaches routers, never indexers"
    losses = sum(loss.sum() for loss in scored.trace.index_losses.values())
    assert torch.autograd.grad(losses, index)[0].abs().sum() > 0, "the indexer learns from its own loss on the replayed set"
