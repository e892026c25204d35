"""What a forward tells can be replayed in another one, and replay changes what it should and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rorqual.errors import UserError
from rorqual.model import AttentionMode, Cache, Replay, Trace, Transformer
from tests.model.small_models import random_tokens, small_model

TOKENS = random_tokens(2, 33)
DOCUMENTS = torch.zeros(2, 33, dtype=torch.long)
DOCUMENTS[0, 20:] = 1
DOCUMENTS[1, 29:] = -1


def run(model: Transformer, replay: Replay | None = None) -> tuple[Tensor, Trace]:
    trace = Trace(routed_experts=True, selected_indices=True, router_scores=True)
    with torch.no_grad():
        return model(TOKENS, documents=DOCUMENTS, replay=replay, trace=trace), trace


def padded(packed: Tensor) -> Tensor:
    """[N, K] of a trace -> [B, T, K], -1 where there is padding."""
    out = torch.full((*TOKENS.shape, packed.shape[1]), -1, dtype=packed.dtype)
    out[DOCUMENTS >= 0] = packed
    return out


def replay_of(trace: Trace) -> Replay:
    experts = torch.stack([padded(each) for each in trace.experts.values()], 2)
    return Replay(experts, [padded(each) for each in trace.selected.values()])


def changed(model: Transformer) -> Transformer:
    """The model after a large step that moves routing and selection."""
    other = small_model()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "router.weight" in name or "indexer.weights_proj" in name:
                parameter.neg_()
    return other


def test_loads_and_scores_are_those_of_the_routing() -> None:
    trace = run(small_model())[1]
    N = int((DOCUMENTS >= 0).sum())
    assert sorted(trace.loads) == sorted(trace.experts) == sorted(trace.scores) == [1, 2]
    for layer, experts in trace.experts.items():
        assert experts.shape == (N, 3) and (experts.diff(dim=1) > 0).all()
        assert torch.equal(trace.loads[layer], torch.bincount(experts.flatten(), minlength=12))
        assert trace.scores[layer].shape == (N, 12) and ((trace.scores[layer] > 0) & (trace.scores[layer] < 1)).all()


def test_selections_are_ascending_positions_of_the_document_up_to_the_row_itself() -> None:
    trace = run(small_model())[1]
    positions = torch.cat([torch.arange(20), torch.arange(13), torch.arange(29)])
    for selected in trace.selected.values():
        counts = (selected >= 0).sum(1)
        assert torch.equal(counts, (positions + 1).clamp(max=9))
        assert (selected.max(1).values <= positions).all()
        assert all((row[:n].diff() > 0).all() and (row[n:] == -1).all() for row, n in zip(selected, counts, strict=True))


def test_replaying_a_forward_to_itself_changes_no_bit() -> None:
    model = small_model()
    logits, trace = run(model)
    assert torch.equal(run(model, replay_of(trace))[0], logits)


def test_a_changed_model_replays_the_old_decisions() -> None:
    model = small_model()
    old = run(model)[1]
    other = changed(model)
    free, replayed = run(other)[1], run(other, replay_of(old))[1]
    assert (free.experts[1] != old.experts[1]).any() and (free.selected[0] != old.selected[0]).any()
    for layer in old.experts:
        assert torch.equal(replayed.experts[layer], old.experts[layer])
    for layer in old.selected:
        assert torch.equal(replayed.selected[layer], old.selected[layer])


def test_rows_of_minus_one_decide_anew() -> None:
    model = small_model()
    old = replay_of(run(model)[1])
    other = changed(model)
    free = run(other)[1]
    old.routed_experts[:, 5:] = -1
    for selected in old.selected_indices:
        selected[:] = -1
    mixed = run(other, old)[1]
    after = torch.arange(33).expand(2, 33)[DOCUMENTS >= 0] >= 5
    assert torch.equal(mixed.experts[1][after], free.experts[1][after])
    assert not torch.equal(mixed.experts[1][~after], free.experts[1][~after])
    assert torch.equal(mixed.selected[0], free.selected[0])


def test_a_replayed_selection_wider_than_top_k_is_refused() -> None:
    with pytest.raises(UserError, match="at most index_topk=9 positions, found 10"):
        run(small_model(), Replay(selected_indices=[torch.zeros(2, 33, 10, dtype=torch.int32)] * 3))


def test_a_whole_replay_spares_the_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    logits, trace = run(model)
    replay = replay_of(trace)
    for selected in replay.selected_indices:
        selected[DOCUMENTS < 0] = 0  # padding is not looked at
    monkeypatch.setattr("rorqual.model.keys.select_tokens", None)
    assert torch.equal(run(model, replay)[0], logits)


def test_the_index_loss_of_several_cached_sequences_is_refused() -> None:
    model = small_model()
    with pytest.raises(UserError, match="index loss: expected the keys of one sequence or no cache, found those of 2"):
        model(TOKENS, cache=Cache(model.config, 2), trace=Trace(index_loss="dense"))


def test_gates_of_replayed_experts_carry_a_gradient_to_the_router() -> None:
    model = small_model()
    replay = replay_of(run(model)[1])
    model(TOKENS, documents=DOCUMENTS, replay=replay).logsumexp(-1).sum().backward()
    for layer in (1, 2):
        assert model.layers[layer].ffn.router.weight.grad.abs().max() > 1e-6


def test_the_indexer_is_told_of_in_dense_attention_too() -> None:
    model = small_model()
    trace = Trace(selected_indices=True, index_quality=True)
    with torch.no_grad():
        logits = model(TOKENS, mode=AttentionMode(sparse=False), trace=trace)
        assert torch.equal(logits, model(TOKENS, mode=AttentionMode(sparse=False)))
    for quality in trace.qualities.values():
        assert quality.captured.shape == (66,)
        torch.testing.assert_close(quality.captured[:9], torch.ones(9))
        assert (quality.captured <= quality.oracle + 1e-5).all() and (quality.captured[20:33] < 0.95).any()
        assert quality.recall[10:].min() >= 0 and quality.recall[10:].max() <= 1


def test_a_layer_run_twice_keeps_what_it_told_first() -> None:
    trace, model = Trace(index_loss="restricted"), small_model()
    model(TOKENS, trace=trace)
    first = dict(trace.index_losses)
    model(random_tokens(2, 33, seed=5), trace=trace)
    assert all(trace.index_losses[layer] is loss for layer, loss in first.items())
