"""What a token costs at each position: cache bytes held, cache bytes read, floating-point operations; dense and sparse.

One multiply and one add are two operations. n = position + 1 is the number of tokens it may attend to, K = index_topk. Per
layer, for one token (softmax, norms and RoPE are left out: they are smaller by the head size):

    dense, absorbed (decoding)   n H 2 (2L + R)               scores of L + R dims, values of L dims, for each head
    dense, expanded (prefill)    n H 2 (nope + R + v)
    sparse, absorbed             min(n, K) H 2 (2L + R)  +  n 2 I (C + 1)   the second term where the layer has its indexer

Weights cost 2 operations for each activated parameter whatever the position; the up-projections of the latents (wkv_b) cost
the same in both forms. Bytes read are those of the cache, batch 1; weights are read once a step for the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rorqual.model.config import ModelConfig
from rorqual.model.parameters import Parameters

CacheLayout = Literal["bf16", "fp8"]
FP8_GROUP = 128
"""Values that share one float32 scale in the FP8 layouts."""


def entry_bytes(config: ModelConfig, layout: CacheLayout) -> int:
    """Bytes of a token's latent and rope key in one layer. bf16: 2 (L + R). fp8: L values, a float32 scale for each 128 of
    them, R rope dims in bf16 (656 in the release)."""
    L, R = config.kv_lora_rank, config.qk_rope_head_dim
    return 2 * (L + R) if layout == "bf16" else L + 4 * -(-L // FP8_GROUP) + 2 * R


def index_key_bytes(config: ModelConfig, layout: CacheLayout) -> int:
    """Bytes of a token's index key in one layer with an indexer. bf16: 2 C. fp8: C values and one float32 scale (132)."""
    return 2 * config.index_head_dim if layout == "bf16" else config.index_head_dim + 4


def cache_bytes(config: ModelConfig, layout: CacheLayout) -> int:
    """Bytes that the cache holds for one token over all main layers."""
    full = config.layer_indexers.count("full")
    return config.n_layers * entry_bytes(config, layout) + full * index_key_bytes(config, layout)


def mtp_cache_bytes(config: ModelConfig, layout: CacheLayout) -> int:
    """The same of the MTP layer, where it drafts."""
    index = index_key_bytes(config, layout) if config.mtp_indexer == "full" else 0
    return config.n_mtp_layers * (entry_bytes(config, layout) + index)


def dense_flops(config: ModelConfig, position: int, form: Literal["absorbed", "expanded"] = "absorbed") -> int:
    """Operations of attention for the token at `position`, all main layers, if all of them attended to everything."""
    absorbed, expanded = 2 * config.kv_lora_rank + config.qk_rope_head_dim, config.qk_head_dim + config.v_head_dim
    width = absorbed if form == "absorbed" else expanded
    return config.n_layers * (position + 1) * config.n_heads * 2 * width


def sparse_flops(config: ModelConfig, position: int) -> int:
    """Operations of indexers and attention over what they select; layers without a selection attend to everything."""
    kinds, n = config.layer_indexers, position + 1
    width = 2 * config.kv_lora_rank + config.qk_rope_head_dim
    dense = kinds.count("none")
    attended = dense * n + (len(kinds) - dense) * min(n, config.index_topk)
    index = kinds.count("full") * n * 2 * config.index_n_heads * (config.index_head_dim + 1)
    return attended * config.n_heads * 2 * width + index


def weight_flops(config: ModelConfig, parameters: Parameters, sparse: bool) -> int:
    """Operations of the weights for one token, head included; with sparse also those of the indexers."""
    return 2 * (parameters.activated_matrices + (parameters.indexers if sparse else 0))


def dense_read(config: ModelConfig, position: int, layout: CacheLayout) -> int:
    """Cache bytes that decoding the token at `position` reads if every layer attends to everything."""
    return config.n_layers * (position + 1) * entry_bytes(config, layout)


def sparse_read(config: ModelConfig, position: int, layout: CacheLayout) -> int:
    """Cache bytes read with selection: index keys of all tokens, entries of the selected ones."""
    kinds, n = config.layer_indexers, position + 1
    dense = kinds.count("none")
    attended = dense * n + (len(kinds) - dense) * min(n, config.index_topk)
    return attended * entry_bytes(config, layout) + kinds.count("full") * n * index_key_bytes(config, layout)


@dataclass(frozen=True)
class Crossovers:
    """The first position from which sparse costs less than dense; None where it never does within max_positions."""

    decode_flops: int | None
    prefill_flops: int | None
    """Against dense attention in the expanded form, which is cheaper for each pair of tokens."""
    read_bf16: int | None
    read_fp8: int | None


def crossovers(config: ModelConfig) -> Crossovers:
    return Crossovers(
        _first(config, lambda p: dense_flops(config, p) - sparse_flops(config, p)),
        _first(config, lambda p: dense_flops(config, p, "expanded") - sparse_flops(config, p)),
        _first(config, lambda p: dense_read(config, p, "bf16") - sparse_read(config, p, "bf16")),
        _first(config, lambda p: dense_read(config, p, "fp8") - sparse_read(config, p, "fp8")),
    )


def _first(config: ModelConfig, saving: Callable[[int], int]) -> int | None:
    """Savings are negative up to index_topk and linear after it: bisect for the first position with a positive one."""
    low, high = 0, config.max_positions - 1
    if not config.has_indexer or saving(high) <= 0:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if saving(middle) > 0 else (middle + 1, high)
    return low
