"""AdamW against its formula in float64, decay groups, schedules, master weights, clipping."""

from __future__ import annotations

import pytest
import torch

from rorqual.model.transformer import Transformer
from rorqual.train.optimizer import Optimizer, OptimizerConfig, clip_, is_indexer, learning_rate, squared_norm
from tests.train.shapes import shape


def adamw(p, grads, rate, decay, beta1=0.9, beta2=0.95, eps=1e-8):
    """Loshchilov and Hutter's AdamW, in float64."""
    p, m, v = p.double().clone(), 0.0, 0.0
    for t, g in enumerate(grads, 1):
        m, v = beta1 * m + (1 - beta1) * g.double(), beta2 * v + (1 - beta2) * g.double() ** 2
        p = p * (1 - rate * decay) - rate * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
    return p


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_the_formula_and_only_matrices_but_the_embedding_decay(dtype):
    model = Transformer(shape(), seed=0).to(dtype)
    start = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, OptimizerConfig(weight_decay=0.1))
    generator = torch.Generator().manual_seed(0)
    grads = {name: [torch.randn(p.shape, generator=generator) for _ in range(3)] for name, p in start.items()}
    for step in range(3):
        for name, master in optimizer.masters.items():
            master.grad = grads[name][step].clone()
        optimizer.step(1e-2)
    for name, p in model.named_parameters():
        decay = 0.1 if p.dim() >= 2 and "embed" not in name else 0.0
        expected = adamw(start[name], grads[name], 1e-2, decay)
        torch.testing.assert_close(optimizer.masters[name].double(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(p, optimizer.masters[name].to(dtype)), name


def test_bf16_gradients_add_up_in_float32_over_micro_batches():
    model = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    optimizer = Optimizer(model, OptimizerConfig())
    for _ in range(1000):
        (model.weight.sum() * 0.001).backward()
    assert model.weight.grad is None
    assert float(optimizer.masters["weight"].grad) == pytest.approx(1000 * float(torch.tensor(0.001).bfloat16()), rel=1e-5)


def test_master_weights_keep_steps_that_bf16_would_lose():
    model = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    torch.nn.init.ones_(model.weight)
    optimizer = Optimizer(model, OptimizerConfig(weight_decay=0.0))
    for _ in range(100):
        optimizer.masters["weight"].grad = torch.ones(1, 1)
        optimizer.step(1e-4)
    assert float(model.weight) == pytest.approx(0.99, abs=2e-3)


def test_schedules_have_their_shapes():
    def curve(**changes):
        config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_share=0.1, **changes)
        return [learning_rate(config, step, 110) for step in range(110)]

    for schedule in ("constant", "cosine", "linear", "stable-decay"):
        rates = curve(schedule=schedule)
        assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)]) and rates[10] == pytest.approx(1.0)
    assert curve(schedule="constant")[-1] == 1.0
    assert curve(schedule="cosine")[60] == pytest.approx(0.55) and curve(schedule="linear")[60] == pytest.approx(0.55)
    assert curve(schedule="stable-decay", decay_share=0.2)[89] == 1.0
    assert curve(schedule="stable-decay", decay_share=0.2)[100] == pytest.approx(0.55)


def test_clipping_scales_to_the_limit_and_leaves_what_is_below_it():
    gradients = [torch.full((3,), 2.0), torch.full((4,), -1.0)]
    norm = squared_norm(gradients).sqrt()
    assert float(norm) == pytest.approx(4.0)
    clip_(gradients, norm, 5.0)
    assert float(gradients[0][0]) == 2.0
    clip_(gradients, norm, 1.0)
    assert float(squared_norm(gradients).sqrt()) == pytest.approx(1.0, rel=1e-5)
    assert float(squared_norm([])) == 0.0


def test_indexers_and_the_model_are_two_sets_of_gradients():
    model = Transformer(shape(), seed=0)
    optimizer = Optimizer(model, OptimizerConfig())
    for name, p in model.named_parameters():
        p.grad = torch.full_like(p, float(is_indexer(name)))
    assert all(bool((g == 1).all()) for g in optimizer.gradients(True))
    assert all(bool((g == 0).all()) for g in optimizer.gradients(False))
    assert len(optimizer.gradients(True)) + len(optimizer.gradients(False)) == len(list(model.parameters()))
