"""Experts are chosen as a brute force chooses them, and gates come from the scores alone."""

from __future__ import annotations

import pytest
import torch

from rorqual.model import ModelConfig
from rorqual.model.router import Router, choose_experts
from tests.model.naive_model import brute_force_experts
from tests.model.small_models import small_model


def config(groups: int, limited: int, chosen: int) -> ModelConfig:
    return ModelConfig(
        dim=24, n_routed_experts=24, n_expert_groups=groups, n_limited_groups=limited, n_activated_experts=chosen, route_scale=1.7
    )


@pytest.mark.parametrize("levels", [None, 4], ids=["distinct scores", "many ties"])
@pytest.mark.parametrize(("groups", "limited", "chosen"), [(1, 1, 5), (4, 2, 3), (6, 1, 4), (8, 3, 8), (24, 5, 5), (4, 4, 24)])
def test_grouped_top_k_equals_brute_force(groups: int, limited: int, chosen: int, levels: int | None) -> None:
    scores = torch.rand(200, 24, generator=torch.Generator().manual_seed(0)) - 0.3
    scores = scores if levels is None else (scores * levels).round() / levels
    c = config(groups, limited, chosen)
    assert choose_experts(scores, c).tolist() == [brute_force_experts(row, c) for row in scores.tolist()]


def test_the_bias_moves_the_choice_but_not_the_gates() -> None:
    router = Router(config(1, 1, 2))
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(1))
    router.expert_bias[[3, 7]] = 2.0
    routing = router(x)
    assert routing.experts.unique().tolist() == [3, 7]
    s = (x @ router.weight.T).sigmoid()[:, [3, 7]]
    torch.testing.assert_close(routing.gates, 1.7 * s / s.sum(1, keepdim=True))
    router.expert_bias.zero_()
    assert len(router(x).experts.unique()) > 10


def test_replayed_experts_get_gates_of_the_current_scores_with_a_gradient() -> None:
    router = small_model().layers[1].ffn.router
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    replayed = torch.tensor([[0, 5, 11]] * 5 + [[-1, -1, -1]])
    routing = router(x, replayed)
    free = router(x)
    assert routing.experts[:5].tolist() == [[0, 5, 11]] * 5
    assert torch.equal(routing.experts[5], free.experts[5])
    s = (x @ router.weight.T).sigmoid()[:5, [0, 5, 11]]
    torch.testing.assert_close(routing.gates[:5], 2.5 * s / s.sum(1, keepdim=True))
    routing.gates[0, 0].backward()
    assert router.weight.grad[[0, 5, 11]].abs().sum(1).gt(0).all()


def test_the_bias_stays_float32_when_the_model_becomes_bfloat16() -> None:
    model = small_model()
    before = model.layers[1].ffn.router.expert_bias.clone()
    model.to(torch.bfloat16)
    assert model.layers[1].ffn.router.weight.dtype == torch.bfloat16
    assert torch.equal(model.layers[1].ffn.router.expert_bias, before)
