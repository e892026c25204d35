"""The architecture computes what transformers computes, from the same random weights, in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rorqual.model import Cache, Replay, Trace, Transformer
from tests.model.transformers_peer import YARN, random_peer, same_weights

TOLERANCE = 1e-4
MARGIN = 1e-6
"""Relative margin at rank k below which rounding decides which of two keys is selected."""
ALLOWED_TIES = 0.005

SMALL: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_shared_experts": 1, "n_routed_experts": 8,
    "routed_scaling_factor": 2.5, "kv_lora_rank": 32, "q_lora_rank": 48, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "qk_nope_head_dim": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "first_k_dense_replace": 1,
    "max_position_embeddings": 512, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
INDEX: dict[str, Any] = {"index_topk": 12, "index_head_dim": 16, "index_n_heads": 16}

SPARSE: dict[str, dict[str, Any]] = {
    "top-k well below the length": {"index_topk": 6},
    "top-k 1": {"index_topk": 1},
    "top-k above the length": {"index_topk": 500},
    "no groups": {"n_group": 1, "topk_group": 1, "index_n_heads": 24},
    "YaRN": {"rope_parameters": YARN},
    "YaRN without mscale_all_dim": {"rope_parameters": {**YARN, "mscale_all_dim": 0.0}},
    "two shared experts": {"n_shared_experts": 2, "norm_topk_prob": False},
    "odd sizes": {
        "q_lora_rank": 37, "kv_lora_rank": 27, "qk_nope_head_dim": 13, "v_head_dim": 11, "qk_rope_head_dim": 6,
        "num_attention_heads": 3, "num_key_value_heads": 3, "index_head_dim": 21, "index_n_heads": 17, "hidden_size": 59,
    },
    "many heads, all layers dense": {"index_n_heads": 64, "first_k_dense_replace": 3},
    "all layers MoE, all experts of one group": {"first_k_dense_replace": 0, "num_experts_per_tok": 2, "topk_group": 1},
}  # fmt: skip
FEW_HEADS = {"one index head": {"index_n_heads": 1}, "two index heads, top-k 3": {"index_n_heads": 2, "index_topk": 3}}
DENSE = {
    "plain": {},
    "YaRN": {"rope_parameters": YARN},
    "no query latent": {"q_lora_rank": None},
    "no groups, two shared experts": {"n_group": 1, "topk_group": 1, "n_shared_experts": 2},
}
GLM = {
    "shared selections": {"indexer_types": ["full", "shared", "full", "shared", "shared"], "num_hidden_layers": 5},
    "own head sizes": {"qk_nope_head_dim": 24, "v_head_dim": 32, "rms_norm_eps": 1e-5, "index_n_heads": 32},
}


def padded_batch(vocab_size: int, B: int = 3, T: int = 70) -> tuple[Tensor, Tensor]:
    """tokens and documents [B, T]: one full sequence, one padded on the right, one on the left."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, vocab_size, (B, T), generator=generator)
    documents = torch.zeros(B, T, dtype=torch.long)
    documents[1, T - 17 :] = -1
    documents[2, :9] = -1
    return tokens, documents


@torch.no_grad()
def peer_run(peer: nn.Module, tokens: Tensor, documents: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The peer's logits [B, T, V], and the positions that each of its indexers selected, [B, T, K] as Replay takes them."""
    kept = documents >= 0
    positions = (kept.long().cumsum(1) - 1).clamp(min=0)
    selections: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _m, _i, out: selections.append(out))
        for name, module in peer.named_modules()
        if name.endswith("self_attn.indexer")
    ]
    logits = peer(input_ids=tokens, attention_mask=kept.long(), position_ids=positions).logits
    for hook in hooks:
        hook.remove()
    return logits, [as_positions(chosen.long(), kept) for chosen in selections]


def as_positions(chosen: Tensor, kept: Tensor) -> Tensor:
    """Columns of the padded batch -> positions among the visible tokens, ascending, -1 last."""
    B, T, _ = chosen.shape
    column = torch.arange(T)
    rows = torch.arange(B)[:, None, None]
    visible = kept[rows, chosen] & (chosen <= column[None, :, None]) & kept[:, :, None]
    positions = (kept.long().cumsum(1) - 1)[rows, chosen]
    ordered = torch.where(visible, positions, T).sort(-1).values
    return torch.where(ordered < T, ordered, -1)


@torch.no_grad()
def our_run(model: Transformer, tokens: Tensor, documents: Tensor, replay: Replay | None = None) -> tuple[Tensor, Trace, list]:
    """Our logits, the trace, and for each indexer the rows' full scores [N, N]."""
    trace, scores = Trace(selected_indices=True), []

    def keep_scores(_module: nn.Module, args: tuple, queries: Any) -> None:
        pairs = torch.einsum("tic,sc->tis", queries.query, last_keys[-1]).relu()
        scores.append(torch.einsum("tis,ti->ts", pairs, queries.weight))

    last_keys: list[Tensor] = []
    undo = []
    for layer in model.layers:
        if (indexer := layer.attn.indexer) is not None:
            undo.append(indexer)
            queries, keys = indexer.queries, indexer.keys

            def both(x: Tensor, c_q: Tensor, rotation: Any, queries: Any = queries, keys: Any = keys) -> Any:
                last_keys.append(keys(x, rotation))
                out = queries(x, c_q, rotation)
                keep_scores(indexer, (), out)
                return out

            indexer.queries = both
    logits = model(tokens, documents=documents, replay=replay, trace=trace)
    for indexer in undo:
        del indexer.queries
    return logits, trace, scores


def check_selections(model: Transformer, trace: Trace, scores: list[Tensor], theirs: list[Tensor], documents: Tensor) -> int:
    """Selections are equal, but where the margin at rank k is rounding; how many (row, layer) pairs are such."""
    kept = (documents >= 0).flatten()
    sequence = torch.arange(len(documents))[:, None].expand_as(documents).flatten()[kept]
    first = (sequence[None] < sequence[:, None]).sum(1)
    differing = 0
    for ours, their, score in zip(trace.selected.values(), theirs, scores, strict=True):
        their = their.flatten(0, 1)[kept]
        width = max(ours.shape[1], their.shape[1])
        ours, their = (nn.functional.pad(part, (0, width - part.shape[1]), value=-1) for part in (ours, their))
        for row in (ours != their).any(1).nonzero()[:, 0].tolist():
            a, b = (score[row, first[row] + part[row][part[row] >= 0].long()].sort().values for part in (ours, their))
            assert len(a) == len(b), f"row {row}: {len(a)} selected, transformers {len(b)}"
            assert ((a - b).abs() <= MARGIN * score[row].abs().max()).all(), f"row {row}: another score was selected"
            differing += 1
    total = len(first) * len(trace.selected)
    assert differing <= ALLOWED_TIES * total, f"{differing} of {total} rows differ by ties"
    return differing


def check_against_peer(model_type: str, fields: dict[str, Any], replayed: bool = False) -> None:
    peer = random_peer(model_type, {**SMALL, **fields})
    model = same_weights(peer)
    tokens, documents = padded_batch(model.config.vocab_size)
    expected, selections = peer_run(peer, tokens, documents)
    replay = Replay(selected_indices=selections)
    logits, trace, scores = our_run(model, tokens, documents, replay if replayed else None)
    if not replayed and check_selections(model, trace, scores, selections, documents):
        logits = our_run(model, tokens, documents, replay)[0]
    kept = documents >= 0
    assert expected[kept].std() > 0.1
    torch.testing.assert_close(logits[kept], expected[kept], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_logits_and_selections_equal_deepseek_v32(name: str) -> None:
    check_against_peer("deepseek_v32", {**INDEX, **SPARSE[name]})


@pytest.mark.parametrize("name", FEW_HEADS)
def test_with_few_index_heads_logits_equal_under_the_replayed_selection(name: str) -> None:
    check_against_peer("deepseek_v32", {**INDEX, **FEW_HEADS[name]}, replayed=True)


@pytest.mark.parametrize("name", DENSE)
def test_dense_logits_equal_deepseek_v3(name: str) -> None:
    check_against_peer("deepseek_v3", DENSE[name])


@pytest.mark.parametrize("name", GLM)
def test_logits_and_selections_equal_glm_moe_dsa(name: str) -> None:
    check_against_peer("glm_moe_dsa", {**INDEX, **GLM[name]})


@pytest.mark.parametrize("model_type", ["deepseek_v32", "deepseek_v3", "glm_moe_dsa"])
@torch.no_grad()
def test_greedy_continuations_of_64_tokens_are_identical(model_type: str) -> None:
    fields = SMALL if model_type == "deepseek_v3" else {**SMALL, **INDEX}
    peer = random_peer(model_type, fields)
    model = same_weights(peer)
    prompt = padded_batch(model.config.vocab_size)[0][:1, :23]
    expected = peer.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=64)
    tokens, cache = prompt, Cache(model.config)
    step = prompt
    for _ in range(64):
        step = model(step, cache=cache)[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, step], 1)
    assert tokens.tolist() == expected.tolist()
