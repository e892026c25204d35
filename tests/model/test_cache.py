"""In float32 on CPU a token's result is a function of its context alone: the same bits in any chunk, batch or cache."""

from __future__ import annotations

import pytest
import torch

from rorqual.errors import UserError
from rorqual.model import Cache, Trace, Transformer
from tests.model.small_models import random_tokens, small_model

# The last has few index heads: ReLU makes many scores exactly zero, so that ties decide most selections.
KINDS = {
    "sparse": {},
    "dense": {"indexers": "none"},
    "shared": {"indexers": ("full", "shared", "shared")},
    "many exact ties": {"index_n_heads": 1},
    "wide": {"dim": 96, "n_heads": 16, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "index_head_dim": 32},
}


def in_chunks(model: Transformer, tokens: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Logits and selections of the tokens, fed through a cache in chunks of these sizes."""
    cache, parts, selections, at = Cache(model.config, len(tokens), capacity=4), [], {}, 0
    for size in sizes:
        trace = Trace(selected_indices=True)
        parts.append(model(tokens[:, at : at + size], cache=cache, trace=trace))
        for layer, selected in trace.selected.items():
            selections.setdefault(layer, []).append(selected.unflatten(0, (len(tokens), -1)))
        at += size
    return torch.cat(parts, 1), {layer: torch.cat(pieces, 1) for layer, pieces in selections.items()}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_decoding_and_chunked_prefill_equal_one_forward_bitwise(kind: str) -> None:
    model = small_model(**KINDS[kind])
    tokens = random_tokens(2, 43)
    trace = Trace(selected_indices=True)
    whole = model(tokens, trace=trace)
    for sizes in ([43], [1] * 43, [17] + [1] * 26, [5, 15, 16, 7], [40, 3], [2, 41]):
        logits, selections = in_chunks(model, tokens, sizes)
        assert torch.equal(logits, whole), f"chunks {sizes}: off by {(logits - whole).abs().max()}"
        for layer, selected in selections.items():
            assert torch.equal(selected.flatten(0, 1), trace.selected[layer]), f"chunks {sizes}, layer {layer}"


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_sequence_is_the_same_bits_in_any_batch(kind: str) -> None:
    model = small_model(**KINDS[kind])
    tokens = random_tokens(9, 31)
    alone = model(tokens[:1])
    for B in (2, 5, 9):
        assert torch.equal(model(tokens[:B])[:1], alone), f"batch of {B}"


@torch.no_grad()
def test_sequences_of_different_lengths_decode_together() -> None:
    model = small_model()
    tokens, lengths = random_tokens(3, 40), (33, 5, 14)
    documents = torch.where(torch.arange(33) < torch.tensor(lengths)[:, None], 0, -1)
    cache = Cache(model.config, 3)
    model(tokens[:, :33], documents=documents, cache=cache)
    assert cache.lengths == [33, 5, 14]
    following = torch.stack([tokens[i, n : n + 2] for i, n in enumerate(lengths)])
    step = model(following, cache=cache)
    for i, n in enumerate(lengths):
        assert torch.equal(step[i], model(tokens[i : i + 1, : n + 2])[0, -2:]), f"sequence {i}"


@torch.no_grad()
def test_a_truncated_cache_continues_as_if_the_rest_had_never_been() -> None:
    model = small_model()
    tokens, cache = random_tokens(1, 30), Cache(model.config)
    model(tokens, cache=cache)
    cache.truncate(0, 21)
    assert torch.equal(model(tokens[:, 21:], cache=cache), model(tokens)[:, 21:])
    with pytest.raises(UserError, match="31"):
        cache.truncate(0, 31)


@torch.no_grad()
def test_the_mtp_module_decodes_as_it_prefills() -> None:
    model = small_model()
    tokens, cache = random_tokens(1, 26), Cache(model.config)
    whole = model.mtp_hidden(model.states(tokens))[:-1]
    parts = []
    for i in range(25):
        states = model.states(tokens[:, i : i + 1], cache=cache)
        parts.append(model.mtp_hidden(states, tokens[0, i + 1 : i + 2]))
    assert torch.equal(torch.cat(parts), whole)


def test_a_cache_refuses_another_batch_size_and_several_documents() -> None:
    model = small_model()
    with pytest.raises(UserError, match="holds 2 sequences, found a batch of 1"):
        model(random_tokens(1, 4), cache=Cache(model.config, 2))
    with pytest.raises(UserError, match="one document per sequence"):
        model(random_tokens(1, 4), documents=torch.tensor([[0, 0, 1, 1]]), cache=Cache(model.config))


def test_two_runs_with_one_seed_are_bitwise_equal_gradients_included() -> None:
    def run() -> list[torch.Tensor]:
        model = small_model(seed=3)
        trace = Trace(index_loss="restricted")
        loss = model(random_tokens(2, 33), trace=trace).logsumexp(-1).mean()
        (loss + sum(each.mean() for each in trace.index_losses.values())).backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("indexers", ["full", "none"])
@torch.no_grad()
def test_decoding_equals_prefill_bitwise_beyond_a_key_tile(indexers: str) -> None:
    """At the sizes of a model of 65 million parameters, whose contexts span several tiles of keys and of scores."""
    model = small_model(
        dim=512, n_heads=8, q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
        index_n_heads=8, index_head_dim=64, index_topk=64, moe_inter_dim=256, n_routed_experts=16, init_std=0.05,
        inter_dim=1024, indexers=indexers,
    )  # fmt: skip
    tokens = random_tokens(2, 1100)
    whole = model(tokens)
    assert torch.equal(model(tokens[1:])[0], whole[1])
    for sizes in ([1024] + [1] * 76, [255, 257, 1, 300, 200, 87], [600, 500]):
        logits, _ = in_chunks(model, tokens, sizes)
        assert torch.equal(logits, whole), f"chunks {sizes[:6]}: off by {(logits - whole).abs().max()}"
