"""The head's float32 copy of a bf16 model is never older than the head."""

from __future__ import annotations

import copy

import torch

from tests.model.small_models import random_tokens, small_model


@torch.no_grad()
def test_logits_of_a_bfloat16_model_follow_every_change_of_its_head() -> None:
    model = small_model().to(torch.bfloat16)
    tokens = random_tokens(1, 9)

    def expected(of: torch.nn.Module) -> torch.Tensor:
        with torch.enable_grad():  # takes no copy
            return of(tokens).detach()

    for kind in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with kind():
            first = model(tokens)
        assert torch.equal(first, expected(model))
        model.head.weight.mul_(1.5)
        with kind():
            then = model(tokens)
        assert not torch.equal(then, first) and torch.equal(then, expected(model))
    other = copy.deepcopy(model)
    other.head.weight.neg_()
    model.head.weight = torch.nn.Parameter(model.head.weight * 2)
    for each in (model, other):
        assert torch.equal(each(tokens), expected(each))
