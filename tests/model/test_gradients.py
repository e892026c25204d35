"""Values and every gradient of whole models equal those of the naive float64 form, each parameter by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rorqual.model import AttentionMode, Trace, Transformer, YarnConfig
from tests.model.naive_model import NaiveRun, naive_run
from tests.model.small_models import random_tokens, small_model

KINDS = {
    "sparse": {},
    "YaRN, no query latent": {"yarn": YarnConfig(factor=4.0, original_max_positions=16), "q_lora_rank": None},
    "shared selections": {"indexers": ("full", "shared", "full"), "index_rope_interleaved": True},
    "no indexers, no groups": {"indexers": "none", "n_expert_groups": 1, "n_limited_groups": 1, "norm_topk_prob": False},
    "MTP before the final norm, no shared experts, Hadamard": {
        "mtp_reads_normed": False,
        "n_shared_experts": 0,
        "index_hadamard": True,
    },
}
FORMS = ("absorbed", "expanded")


def doubled(model: Transformer) -> dict[str, Tensor]:
    return {name: tensor.detach().double().requires_grad_() for name, tensor in model.state_dict().items()}


def losses(logits: Tensor, mtp_logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of the next token, plus 0.3 of that after it by the MTP module."""
    main = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:])
    return main + 0.3 * torch.nn.functional.cross_entropy(mtp_logits[:-2], tokens[2:])


def ours(model: Transformer, tokens: Tensor, trace: Trace, mode: AttentionMode) -> tuple[Tensor, Tensor]:
    states = model.states(tokens[None], trace=trace, mode=mode)
    return model.logits(states.hidden), model.logits(model.mtp_hidden(states))


def assert_gradients_match(model: Transformer, weights: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        expected = weights[name].grad
        found = parameter.grad
        assert (found is None or not found.any()) == (expected is None or not expected.any()), f"{name}: one has a gradient"
        if expected is not None and expected.any():
            error = (found - expected).abs().max() / expected.abs().max()
            assert error < 2e-4, f"{name}: gradient off by {error:.1e} of its largest"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_of_the_language_loss(kind: str, form: str) -> None:
    model, tokens = small_model(**KINDS[kind]), random_tokens(1, 37)[0]
    weights, trace = doubled(model), Trace(selected_indices=True)
    expected: NaiveRun = naive_run(weights, model.config, tokens)
    logits, mtp_logits = ours(model, tokens, trace, AttentionMode(form=form))
    for layer, selected in trace.selected.items():
        mask = torch.zeros(37, 38, dtype=torch.bool).scatter(1, torch.where(selected < 0, 37, selected).long(), True)
        assert torch.equal(mask[:, :37], expected.selections[layer]), f"selection of layer {layer}"
    torch.testing.assert_close(logits.double(), expected.logits, rtol=0, atol=5e-5)
    torch.testing.assert_close(mtp_logits.double(), expected.mtp_logits, rtol=0, atol=5e-5)
    losses(logits, mtp_logits, tokens).backward()
    losses(expected.logits, expected.mtp_logits, tokens).backward()
    assert_gradients_match(model, weights)
    assert all(p.grad is None or not p.grad.any() for n, p in model.named_parameters() if ".indexer." in n)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["dense", "restricted"])
@pytest.mark.parametrize("topk", [9, 100], ids=["top-k 9", "top-k above the length"])
def test_values_and_gradients_of_the_index_loss(kind: str, form: str, topk: int) -> None:
    model, tokens = small_model(index_topk=topk), random_tokens(1, 37)[0]
    weights, trace = doubled(model), Trace(index_loss=kind)
    expected = naive_run(weights, model.config, tokens, index_loss=kind, sparse=kind == "restricted")
    ours(model, tokens, trace, AttentionMode(sparse=kind == "restricted", form=form))
    assert sorted(trace.index_losses) == sorted(expected.index_losses) == [0, 1, 2, 3]
    for layer, loss in trace.index_losses.items():
        torch.testing.assert_close(loss.double(), expected.index_losses[layer], rtol=1e-4, atol=1e-5)
    sum(loss.sum() for loss in trace.index_losses.values()).backward()
    sum(loss.sum() for loss in expected.index_losses.values()).backward()
    assert_gradients_match(model, weights)
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {name for name, _ in model.named_parameters() if ".indexer." in name}
