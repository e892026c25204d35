"""The router's choice, the pairs' order and the slots are those of plain torch, ties and idle rows included."""

from __future__ import annotations

import pytest
import torch

from rorqual.model.config import ModelConfig
from rorqual.model.router import Router
from tests.kernels.devices import on_each_device

pytest.importorskip("triton")
from rorqual.kernels import experts_triton, routing_triton


@on_each_device
@pytest.mark.parametrize(
    "E, groups, limited, count, normed", [(16, 4, 2, 4, True), (12, 3, 1, 3, False), (8, 8, 3, 2, True), (6, 1, 1, 6, True)]
)
def test_the_choice_is_the_routers(device, E, groups, limited, count, normed):
    sizes = dict(n_routed_experts=E, n_expert_groups=groups, n_limited_groups=limited, n_activated_experts=count)
    config = ModelConfig(dim=10, norm_topk_prob=normed, **sizes)
    router = Router(config)
    g = torch.Generator().manual_seed(E)
    logits = torch.randn(33, E, generator=g)
    logits[::2] = logits[::2].round()  # ties
    router.expert_bias = torch.randn(E, generator=g).round() / 4
    expected = router.routed(logits)
    scores, experts, gates = routing_triton.route(
        logits.to(device), router.expert_bias.to(device), groups, limited, count, config.route_scale, normed, config.route_eps
    )
    assert torch.equal(experts.cpu(), expected.experts)
    torch.testing.assert_close(scores.cpu(), expected.scores, rtol=0, atol=1e-6)
    torch.testing.assert_close(gates.cpu(), expected.gates, rtol=1e-5, atol=1e-6)
    broken = torch.full((2, E), torch.nan, device=device)
    _, idle, _ = routing_triton.route(broken, router.expert_bias.to(device), groups, limited, count, 1.0, normed, 0.0)
    assert bool(((idle >= 0) & (idle < E)).all())


@on_each_device
@pytest.mark.parametrize("N, K, E", [(1, 2, 5), (11, 3, 8), (40, 4, 16), (3, 1, 1)])
def test_pairs_are_ordered_as_by_a_stable_sort(device, N, K, E):
    chosen = torch.randint(-1, E, (N, K), generator=torch.Generator().manual_seed(N)).to(device)
    assert routing_triton.few_pairs(chosen, E)
    flat = torch.where(chosen.flatten() < 0, E, chosen.flatten())
    order, place, ends = routing_triton.order_pairs(chosen, E)
    assert torch.equal(order, flat.argsort(stable=True))
    assert torch.equal(place.flatten()[order].cpu().long(), torch.arange(N * K))
    assert ends.tolist() == [int((flat <= e).sum()) for e in range(E)]
    assert all(torch.equal(a, b) for a, b in zip(experts_triton.plan(chosen, E), (order, place, ends), strict=True))


@on_each_device
def test_slots_follow_the_table(device):
    table = torch.tensor([[3, 1, 7], [2, 0, 5]], dtype=torch.int32, device=device)
    ends = torch.tensor([9, 4], dtype=torch.int32, device=device)
    positions = torch.tensor([[0, 5, 8, -1], [3, 1, 4, 2]], device=device)
    found = routing_triton.slots_of(table, positions, ends, 4, 4)
    assert found.tolist() == [[12, 5, 28, -1], [11, 9, -1, 10]]
    listed = routing_triton.slots_of(table, None, ends, 4, 11)
    assert listed.tolist() == [[12, 13, 14, 15, 4, 5, 6, 7, 28, -1, -1], [8, 9, 10, 11] + [-1] * 7]
