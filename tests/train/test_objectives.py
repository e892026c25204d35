"""The losses against plain formulas; which parameters each moves; balancing; the indexers' gradients stay apart."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from torch.nn import functional as F

from rorqual.model.call import AttentionMode
from rorqual.model.trace import Trace
from rorqual.model.transformer import Transformer
from rorqual.train.balance import add_loads, imbalance, move_biases
from rorqual.train.objectives import Inputs, Objective, ObjectiveConfig, balance_loss, count_targets
from rorqual.train.optimizer import is_indexer
from tests.train.shapes import shape, some_batch

DENSE, SPARSE = AttentionMode(sparse=False, form="expanded"), AttentionMode(sparse=True)


def run(model: Transformer, config: ObjectiveConfig, mode: AttentionMode, index_loss: str = "none"):
    inputs = Inputs.of(some_batch())
    return Objective(model, config, mode, index_loss)(inputs, count_targets([inputs]))


def moved(model: Transformer) -> set[str]:
    return {name for name, p in model.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}


def test_losses_equal_plain_formulas_over_each_document():
    model, batch = Transformer(shape(), seed=1), some_batch()
    losses = run(model, ObjectiveConfig(mtp_weight=0.3, balance_weight=0.0), DENSE)
    main = mtp = 0.0
    counts = [0, 0]
    for row in range(len(batch.tokens)):
        for document in batch.documents[row].unique().tolist():
            if document < 0:
                continue
            tokens = batch.tokens[row][batch.documents[row] == document][None]
            states = model.states(tokens, mode=DENSE)
            main += float(F.cross_entropy(model.logits(states.hidden)[:-1], tokens[0, 1:], reduction="sum"))
            hidden = model.mtp_hidden(states)
            mtp += float(F.cross_entropy(model.logits(hidden)[:-2], tokens[0, 2:], reduction="sum"))
            counts = [counts[0] + tokens.shape[1] - 1, counts[1] + tokens.shape[1] - 2]
    assert float(losses.sums["loss"]) == pytest.approx(main, rel=1e-5)
    assert float(losses.sums["mtp_loss"]) == pytest.approx(mtp, rel=1e-5)
    assert float(losses.total) == pytest.approx(main / counts[0] + 0.3 * mtp / counts[1], rel=1e-5)


def test_the_balance_loss_equals_its_formula_sequence_by_sequence():
    model, inputs = Transformer(shape(), seed=1), Inputs.of(some_batch())
    trace = Trace(router_scores=True, routed_experts=True)
    model.run(inputs.rows, trace=trace, mode=DENSE)
    config, total = model.config, 0.0
    E, K = config.n_routed_experts, config.n_activated_experts
    for sequence in range(3):
        rows = (inputs.sequences == sequence).nonzero()[:, 0].tolist()
        for layer, scores in trace.scores.items():
            for e in range(E):
                f = E / (K * len(rows)) * sum(e in trace.experts[layer][t].tolist() for t in rows)
                P = sum(float(scores[t, e] / scores[t].sum()) for t in rows) / len(rows)
                total += f * P
    assert float(balance_loss(trace, inputs, config)) == pytest.approx(total, rel=1e-5)


def test_the_language_model_loss_gives_indexers_no_gradient():
    model = Transformer(shape(), seed=1)
    run(model, ObjectiveConfig(index_weight=0.0), SPARSE, "restricted").total.backward()
    expected = {name for name, _ in model.named_parameters() if not is_indexer(name)}
    assert moved(model) == expected


def test_the_index_loss_gives_the_model_no_gradient():
    model = Transformer(shape(), seed=1)
    losses = run(model, ObjectiveConfig(), SPARSE, "restricted")
    sum(value for name, value in losses.sums.items() if name.startswith("index_loss")).backward()
    expected = {name for name, _ in model.named_parameters() if is_indexer(name)}
    assert moved(model) == expected and len({name.split(".")[1] for name in expected}) == 3


def test_gradients_of_the_joint_loss_are_those_of_its_two_halves_alone():
    grads = {}
    for index_weight, kind in ((1.0, "restricted"), (0.0, "none")):
        model = Transformer(shape(), seed=1)
        run(model, ObjectiveConfig(index_weight=index_weight), SPARSE, kind).total.backward()
        grads[kind] = {name: p.grad for name, p in model.named_parameters()}
    for name, grad in grads["none"].items():
        if not is_indexer(name):
            assert torch.equal(grad, grads["restricted"][name]), name


def digests(model: Transformer) -> dict[str, str]:
    return {name: hashlib.sha256(t.detach().numpy().tobytes()).hexdigest() for name, t in model.state_dict().items()}


def test_in_the_warm_up_only_indexers_change_every_tensor_by_hash():
    from rorqual.train.optimizer import Optimizer, OptimizerConfig

    model = Transformer(shape(), seed=1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_indexer(name))
    before, optimizer = digests(model), Optimizer(model, OptimizerConfig(weight_decay=0.1))
    for _ in range(3):
        run(model, ObjectiveConfig(), DENSE, "dense").total.backward()
        optimizer.step(1e-2)
    changed = {name for name, digest in digests(model).items() if digest != before[name]}
    assert changed == {name for name in before if is_indexer(name)}


def test_micro_batches_add_up_to_the_whole_batch():
    batch = some_batch(rows=4)
    grads = []
    for size in (4, 1):
        model = Transformer(shape(), seed=1)
        parts = [Inputs.of(part) for part in batch.split(size)]
        counts = count_targets(parts)
        objective = Objective(model, ObjectiveConfig(), SPARSE, "restricted")
        for part in parts:
            objective(part, counts).total.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=2e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_bias_balancing_evens_out_a_skewed_router_within_200_steps_and_nothing_else_does():
    inputs = Inputs.of(some_batch(rows=16, length=31))
    ratios = {}
    for step_size in (0.0, 0.02):
        model = Transformer(shape(), seed=1)
        with torch.no_grad():
            model.layers[1].ffn.router.weight[3] += 0.5 * torch.randn(32, generator=torch.Generator().manual_seed(0))
            model.layers[1].ffn.router.expert_bias[2:4] += 1.0
            for _ in range(200):
                trace = Trace()
                model.run(inputs.rows, trace=trace, mode=DENSE)
                move_biases(model, add_loads([trace]), step_size)
        ratios[step_size] = imbalance(add_loads([trace]))["load/1"]
    assert ratios[0.0] > 3.5 and ratios[0.02] < 1.3, ratios


def test_the_bias_rule_is_the_sign_of_the_missing_load():
    model = Transformer(shape(), seed=1)
    loads = {1: torch.tensor([10, 0, 4, 4, 4, 4, 4, 2])}
    move_biases(model, loads, 0.5)
    assert model.layers[1].ffn.router.expert_bias.tolist() == [-0.5, 0.5, 0, 0, 0, 0, 0, 0.5]
    assert not model.mtp.layer.ffn.router.expert_bias.any()
    assert imbalance(loads) == {"load/1": 2.5} and math.isclose(sum(loads[1].tolist()) / 8, 4)


def test_mtp_takes_its_turn():
    config = ObjectiveConfig(mtp_every=4)
    assert [config.at_step(step).mtp_weight for step in range(6)] == [0.3, 0, 0, 0, 0.3, 0]


def test_recomputation_changes_no_gradient():
    from rorqual.parallel.apply import ComputeConfig, parallelize
    from rorqual.parallel.world import ParallelConfig, start

    grads = []
    for recompute in (False, True):
        model = Transformer(shape(), seed=1)
        inputs = Inputs.of(some_batch())
        objective = Objective(model, ObjectiveConfig(), SPARSE, "restricted")
        parallelize(objective, model, start(ParallelConfig(), "cpu"), ComputeConfig(recompute=recompute))
        objective(inputs, count_targets([inputs])).total.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name in grads[0]:
        assert torch.equal(grads[0][name], grads[1][name]), name
