"""One optimiser step: what it reports, what trains the indexers and what does not, and a rank with nothing to learn from."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from rorqual.engine import Engine
from rorqual.model.replay import Replay
from rorqual.model.transformer import Transformer
from rorqual.parallel.world import World
from rorqual.rollout.trajectory import samples
from rorqual.train.optimizer import Optimizer, OptimizerConfig, is_indexer
from rorqual.train.policy_step import DomainObjective, PolicyConfig, PolicyObjective, policy_step, prepare
from rorqual.train.samples import BatchLimits, Item, blank_item, sample_batch, score
from tests.system.test_trainer_equals_sampler import CONFIG, ENGINE, played

WORLD = World(0, 1, torch.device("cpu"))
BASE = Transformer(CONFIG, seed=2)


@pytest.fixture(scope="module")
def items() -> list[Item]:
    attempts = played(Engine(BASE, ENGINE))[:4]
    return [Item(sample, 1.0 if i % 2 else -1.0, i, "d") for i, t in enumerate(attempts) for sample in samples(t)]


def stepped(items, config=None, moved=0.0, reference=None):
    """The model after one step, the gradients it took, and the metrics."""
    model, config = copy.deepcopy(BASE), config or PolicyConfig()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * moved)
    optimizer = Optimizer(model, OptimizerConfig(learning_rate=1e-3, schedule="constant", weight_decay=0.0, clip=0.0))
    gradients = {}
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, name=name: gradients.__setitem__(name, gradients.get(name, 0) + grad))
    parts = prepare(items, config, reference, WORLD)
    return model, gradients, policy_step(PolicyObjective(model, config), optimizer, parts, WORLD, 1e-3)


def test_everything_that_tells_of_stability_is_reported(items):
    config = PolicyConfig(clip_low=0.05, clip_high=0.05, default=DomainObjective(beta=0.1, off_policy_delta=0.01))
    _, _, same = stepped(items, config, reference=BASE)
    _, _, moved = stepped(items, config, moved=0.002, reference=BASE)
    off_policy = ("kl", "clip_share", "masked_share", "mismatch_abs", "mismatch_k3")
    assert all(same[f"train/{name}"] == pytest.approx(0, abs=1e-6) for name in off_policy)
    assert all(moved[f"train/{name}"] > 0 for name in off_policy), moved
    assert moved["train/ratio_max"] > 1 > abs(moved["train/ratio_mean"] - 1) and moved["train/entropy"] > 0.1
    assert moved["train/masked_share"] in (0.25, 0.5), "shares are of samples: of four, two have negative advantages"
    assert moved["train/clip_share"] == pytest.approx(moved["train/clip_share_high"] + moved["train/clip_share_low"])


def test_figures_do_not_depend_on_micro_batches(items):
    whole = stepped(items, PolicyConfig(limits=BatchLimits(4000)), moved=0.002)[2]
    parts = stepped(items, PolicyConfig(limits=BatchLimits(1)), moved=0.002)[2]
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name


def indexer(gradients):
    return torch.cat([g.flatten() for name, g in sorted(gradients.items()) if is_indexer(name)])


def test_the_indexers_learn_from_their_own_loss_alone_by_its_coefficient(items):
    _, once, metrics = stepped(items)
    _, flipped, _ = stepped([replace(item, advantage=-item.advantage) for item in items])
    _, twice, _ = stepped(items, PolicyConfig(index_weight=2.0))
    torch.testing.assert_close(indexer(flipped), indexer(once), rtol=0, atol=0)
    torch.testing.assert_close(indexer(twice), 2 * indexer(once))
    assert indexer(once).abs().sum() > 0 and metrics["train/index_loss"] > 0


def test_coefficient_0_freezes_the_indexers_and_nothing_else(items):
    model, gradients, _ = stepped(items, PolicyConfig(index_weight=0.0))
    before, after = BASE.state_dict(), model.state_dict()
    for name, _ in model.named_parameters():
        assert torch.equal(before[name], after[name]) == (is_indexer(name) or name not in gradients), name
    assert not [name for name in gradients if is_indexer(name)] and "head.weight" in gradients


def test_the_indexers_loss_is_over_the_replayed_keys(items):
    batch = sample_batch(items[:1], WORLD.device)

    def losses(selected):
        own = replace(batch, replay=Replay(batch.replay.routed_experts, selected))
        return torch.cat(list(score(BASE, own, "restricted").trace.index_losses.values()))

    recorded, anew = losses(batch.replay.selected_indices), losses(None)
    torch.testing.assert_close(recorded, anew, rtol=0, atol=1e-6)
    first = [torch.arange(each.shape[2]).expand_as(each) for each in batch.replay.selected_indices]
    first = [torch.where(torch.arange(each.shape[1])[:, None] >= each, each, -1).int() for each in first]
    assert (losses(first) - recorded).abs().max() > 1e-3, "other keys, another divergence"


def test_the_mtp_loss_is_the_cross_entropy_of_sampled_tokens_two_places_on(items):
    _, gradients, metrics = stepped(items, PolicyConfig(mtp_weight=0.5))
    total, count = 0.0, 0
    for item in items:
        tokens = torch.from_numpy(item.sample.tokens)
        with torch.no_grad():
            states = BASE.states(tokens[None, :-1])
            logprobs = BASE.logits(BASE.mtp_hidden(states, tokens[1:])).double().log_softmax(-1)
        for place in range(len(tokens) - 2):
            if item.sample.mask[place + 2]:
                total, count = total - float(logprobs[place, tokens[place + 2]]), count + 1
    assert metrics["train/mtp_loss"] == pytest.approx(total / count, rel=1e-5)
    _, without, off = stepped(items)
    assert off["train/mtp_loss"] == 0 and "mtp.eh_proj.weight" in gradients and "mtp.eh_proj.weight" not in without


def test_expert_biases_stay_unless_asked_and_then_move_towards_balance(items):
    still, _, metrics = stepped(items)
    moved, _, _ = stepped(items, PolicyConfig(bias_rate=0.01))
    loads = torch.zeros(CONFIG.n_routed_experts)
    for item in items:
        rows = item.sample.routed_experts[:-1, 0].astype("int64").ravel()  # the last token went through no model
        loads += torch.bincount(torch.from_numpy(rows), minlength=len(loads))
    router, wanted = moved.layers[1].ffn.router, 0.01 * torch.sign(loads.mean() - loads)
    assert not still.layers[1].ffn.router.expert_bias.any() and torch.equal(router.expert_bias, wanted)
    assert metrics["load/1"] == pytest.approx(float(loads.max() / loads.mean()))


def test_what_a_rank_computes_along_moves_nothing():
    blank = blank_item(CONFIG)
    batch = sample_batch([blank], WORLD.device)
    assert batch.num_tokens == 0 and not score(BASE, batch).logprobs.any()
    model, _, metrics = stepped([])
    assert metrics["train/tokens"] == 0 and all(
        torch.equal(a, b) for a, b in zip(model.parameters(), BASE.parameters(), strict=True)
    )
