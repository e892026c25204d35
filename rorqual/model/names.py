"""The tensors of a checkpoint in the released layout: name, shape, and which weight of the model each one is.

One table serves loading, saving, conversion and counting: `entries` lists what a checkpoint of a config holds, in the order
of the layers. The released layout has one tensor per expert and matrix; transformers 5 fuses the experts of a layer
(`fused_names`). Layer n_layers is the MTP module, with copies of the embedding and the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rorqual.model.config import IndexerKind, ModelConfig

SCALE = "_scale_inv"
"""`X.weight` in block FP8 has its block scales beside it, in `X.weight_scale_inv`."""
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Entry:
    """One tensor of the released layout."""

    name: str
    shape: tuple[int, ...]
    ours: str
    """The name in the Transformer's state dict."""
    component: str
    expert: int | None = None
    """The row of the stacked weight `ours` that this is."""
    is_quantised: bool = False
    """Whether the release stores it in block FP8: not embeddings, head, norms, router, index weights, eh_proj."""
    is_float32: bool = False
    """Kept in float32 whatever the checkpoint's dtype: the router's bias."""
    copy_of: str | None = None
    """A copy of another entry, which the release writes and other writers leave out."""


@dataclass(frozen=True)
class FusedExperts:
    """Where one expert's matrix lies in the fused tensors of transformers 5: rows [start, stop) of tensor[expert]."""

    name: str
    start: int
    stop: int


def entries(config: ModelConfig) -> Iterator[Entry]:
    """All tensors of a checkpoint of `config`, the MTP layer last. With tied embeddings there is no head."""
    yield Entry(EMBED, (config.vocab_size, config.dim), "embed.weight", "embedding")
    for i, kind in enumerate(config.layer_indexers):
        yield from _block(config, i, kind, f"model.layers.{i}.", f"layers.{i}.")
    yield Entry("model.norm.weight", (config.dim,), "norm.weight", "norms")
    if not config.tie_embeddings:
        yield Entry(HEAD, (config.vocab_size, config.dim), "head.weight", "head")
    if config.n_mtp_layers:
        yield from _mtp(config)


def mtp_prefix(config: ModelConfig) -> str:
    return f"model.layers.{config.n_layers}."


def fused_names(entry: Entry, inner_dim: int) -> FusedExperts | None:
    """gate_proj is the first half of `experts.gate_up_proj` [E, 2F, D], up_proj the second; `experts.down_proj` [E, D, F]."""
    if entry.expert is None:
        return None
    prefix, matrix = entry.name[: entry.name.index(".experts.") + len(".experts.")], entry.name.split(".")[-2]
    if matrix == "down_proj":
        return FusedExperts(f"{prefix}down_proj", 0, entry.shape[0])
    start = 0 if matrix == "gate_proj" else inner_dim
    return FusedExperts(f"{prefix}gate_up_proj", start, start + inner_dim)


def _block(config: ModelConfig, layer: int, indexer: IndexerKind, theirs: str, ours: str) -> Iterator[Entry]:
    norm = Entry("", (config.dim,), "", "norms")
    yield replace(norm, name=f"{theirs}input_layernorm.weight", ours=f"{ours}attn_norm.weight")
    yield from _attention(config, f"{theirs}self_attn.", f"{ours}attn.")
    if indexer == "full":
        yield from _indexer(config, f"{theirs}self_attn.indexer.", f"{ours}attn.indexer.")
    yield replace(norm, name=f"{theirs}post_attention_layernorm.weight", ours=f"{ours}ffn_norm.weight")
    if layer < config.n_dense_layers:
        yield from _ffn(config.dim, config.inter_dim, f"{theirs}mlp.", f"{ours}ffn.", "dense FFN")
    else:
        yield from _moe(config, f"{theirs}mlp.", f"{ours}ffn.")


def _matrix(theirs: str, ours: str, out_dim: int, in_dim: int, component: str) -> Entry:
    return Entry(f"{theirs}.weight", (out_dim, in_dim), f"{ours}.weight", component, is_quantised=True)


def _attention(config: ModelConfig, theirs: str, ours: str) -> Iterator[Entry]:
    dim, heads, latent, q_rank = config.dim, config.n_heads, config.kv_lora_rank, config.q_lora_rank
    part = "attention"
    if q_rank is None:
        yield _matrix(f"{theirs}q_proj", f"{ours}wq", heads * config.qk_head_dim, dim, part)
    else:
        yield _matrix(f"{theirs}q_a_proj", f"{ours}wq_a", q_rank, dim, part)
        yield Entry(f"{theirs}q_a_layernorm.weight", (q_rank,), f"{ours}q_norm.weight", "norms")
        yield _matrix(f"{theirs}q_b_proj", f"{ours}wq_b", heads * config.qk_head_dim, q_rank, part)
    yield _matrix(f"{theirs}kv_a_proj_with_mqa", f"{ours}wkv_a", latent + config.qk_rope_head_dim, dim, part)
    yield Entry(f"{theirs}kv_a_layernorm.weight", (latent,), f"{ours}kv_norm.weight", "norms")
    yield _matrix(f"{theirs}kv_b_proj", f"{ours}wkv_b", heads * (config.qk_nope_head_dim + config.v_head_dim), latent, part)
    yield _matrix(f"{theirs}o_proj", f"{ours}wo", dim, heads * config.v_head_dim, part)


def _indexer(config: ModelConfig, theirs: str, ours: str) -> Iterator[Entry]:
    dim, heads, head_dim, part = config.dim, config.index_n_heads, config.index_head_dim, "indexers"
    yield _matrix(f"{theirs}wq_b", f"{ours}wq_b", heads * head_dim, config.q_lora_rank or dim, part)
    yield _matrix(f"{theirs}wk", f"{ours}wk", head_dim, dim, part)
    yield Entry(f"{theirs}k_norm.weight", (head_dim,), f"{ours}k_norm.weight", part)
    yield Entry(f"{theirs}k_norm.bias", (head_dim,), f"{ours}k_norm.bias", part)
    yield Entry(f"{theirs}weights_proj.weight", (heads, dim), f"{ours}weights_proj.weight", part)


def _ffn(dim: int, inner: int, theirs: str, ours: str, component: str) -> Iterator[Entry]:
    yield _matrix(f"{theirs}gate_proj", f"{ours}w1", inner, dim, component)
    yield _matrix(f"{theirs}up_proj", f"{ours}w3", inner, dim, component)
    yield _matrix(f"{theirs}down_proj", f"{ours}w2", dim, inner, component)


def _moe(config: ModelConfig, theirs: str, ours: str) -> Iterator[Entry]:
    experts, dim, inner = config.n_routed_experts, config.dim, config.moe_inter_dim
    yield Entry(f"{theirs}gate.weight", (experts, dim), f"{ours}router.weight", "routers")
    yield Entry(f"{theirs}gate.e_score_correction_bias", (experts,), f"{ours}router.expert_bias", "routers", is_float32=True)
    for e in range(experts):
        for entry in _ffn(dim, inner, f"{theirs}experts.{e}.", f"{ours}experts.", "routed experts"):
            yield replace(entry, ours=entry.ours.removesuffix(".weight"), expert=e)
    if config.n_shared_experts:
        shared = inner * config.n_shared_experts
        yield from _ffn(dim, shared, f"{theirs}shared_experts.", f"{ours}shared_experts.", "shared experts")


def _mtp(config: ModelConfig) -> Iterator[Entry]:
    """The MTP layer. The copies stand for the main model's own tensors, which the module shares."""
    theirs, dim = mtp_prefix(config), config.dim
    table = (config.vocab_size, dim)
    head = "embed.weight" if config.tie_embeddings else "head.weight"
    yield Entry(f"{theirs}embed_tokens.weight", table, "embed.weight", "copies", copy_of=EMBED)
    yield Entry(f"{theirs}enorm.weight", (dim,), "mtp.enorm.weight", "norms")
    yield Entry(f"{theirs}hnorm.weight", (dim,), "mtp.hnorm.weight", "norms")
    yield Entry(f"{theirs}eh_proj.weight", (dim, 2 * dim), "mtp.eh_proj.weight", "MTP projection")
    yield from _block(config, config.n_layers, config.mtp_indexer, theirs, "mtp.layer.")
    yield Entry(f"{theirs}shared_head.norm.weight", (dim,), "mtp.norm.weight", "norms")
    copied = EMBED if config.tie_embeddings else HEAD
    yield Entry(f"{theirs}shared_head.head.weight", table, head, "copies", copy_of=copied)
