"""The shape of a DeepSeek-V3.2 model, in DeepSeek's own names (the HF spellings live in rorqual/model/hf_config.py).

The legend of dimensions, used in every docstring and trailing comment of the package:

    B sequences · T query positions (packed tokens too) · S key positions · D model dim · H query heads
    L latent (kv_lora_rank) · R rope dims · I indexer heads · C indexer dim · K selected keys or experts
    E experts · F expert hidden · V vocabulary · P prompts · G group members
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

from rorqual.errors import require

IndexerKind = Literal["none", "full", "shared"]


@dataclass(frozen=True)
class YarnConfig:
    """YaRN's extension of RoPE (spec of the released model: factor 40 over 4096 positions)."""

    factor: float = 40.0
    original_max_positions: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self) -> None:
        require(
            self,
            factor=(self.factor >= 1, "at least 1"),
            original_max_positions=(self.original_max_positions >= 1, "at least 1"),
            beta_fast=(self.beta_fast > self.beta_slow, "more than beta_slow"),
            beta_slow=(self.beta_slow > 0, "more than 0"),
        )


@dataclass(frozen=True)
class ModelConfig:
    """Defaults are the released 671B model's. Sizes are in elements, counts in units."""

    vocab_size: int = 129280
    dim: int = 7168
    n_layers: int = 61
    n_dense_layers: int = 3
    """The first layers whose FFN is dense."""
    inter_dim: int = 18432
    """Hidden size of the dense FFN."""
    norm_eps: float = 1e-6
    latent_norm_eps: float = 1e-6
    """Of the norms of the query and key latents: 1e-6 in DeepSeek's code and in transformers, whatever norm_eps is."""
    max_positions: int = 163840
    """The longest context the weights are meant for."""
    init_std: float = 0.006
    tie_embeddings: bool = False

    # Multi-head latent attention
    n_heads: int = 128
    q_lora_rank: int | None = 1536
    """None: the query comes straight from the hidden state, and so does the indexer's (opens in Rorqual only with an indexer)."""
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_theta: float = 10000.0
    yarn: YarnConfig | None = YarnConfig()

    # DeepSeek Sparse Attention
    indexers: IndexerKind | tuple[IndexerKind, ...] = "full"
    """One kind for all layers, or one for each layer: shared uses the selection of the last full layer before it."""
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 2048
    index_rope_interleaved: bool = False
    """False: half-split, as the corrected release; True: GLM's glm_moe_dsa, and the published demo's bug."""
    index_hadamard: bool = False
    """Rotate index queries and keys by a Hadamard matrix: changes nothing in exact arithmetic, spreads outliers before FP8."""

    # Mixture of experts
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    n_activated_experts: int = 8
    moe_inter_dim: int = 2048
    n_expert_groups: int = 8
    n_limited_groups: int = 4
    route_scale: float = 2.5
    norm_topk_prob: bool = True
    route_eps: float = 1e-20
    """Added to the sum that normalises the gates, as the Hugging Face code does."""

    # Multi-token prediction
    n_mtp_layers: int = 1
    mtp_reads_normed: bool = True
    """Whether the MTP module's hnorm reads the main model's hidden state after the final norm, as vLLM and SGLang feed the
    released weights, or before it; the report does not say."""

    def __post_init__(self) -> None:
        positive = "vocab_size dim n_layers inter_dim max_positions n_heads kv_lora_rank v_head_dim index_n_heads index_head_dim"
        claims = {name: (getattr(self, name) >= 1, "at least 1") for name in positive.split()}
        kinds = self.indexers if isinstance(self.indexers, tuple) else (self.indexers,) * self.n_layers
        claims |= {
            "n_dense_layers": (0 <= self.n_dense_layers <= self.n_layers, f"in [0, n_layers={self.n_layers}]"),
            "q_lora_rank": (self.q_lora_rank is None or self.q_lora_rank >= 1, "at least 1, or none"),
            "qk_rope_head_dim": (self.qk_rope_head_dim >= 2 and self.qk_rope_head_dim % 2 == 0, "even and at least 2"),
            "qk_nope_head_dim": (self.qk_nope_head_dim >= 1, "at least 1"),
            "index_topk": (self.index_topk >= 1, "at least 1"),
            "norm_eps": (self.norm_eps > 0, "more than 0"),
            "latent_norm_eps": (self.latent_norm_eps > 0, "more than 0"),
            "n_mtp_layers": (self.n_mtp_layers in (0, 1), "0 or 1 (the release has depth 1)"),
            "n_shared_experts": (self.n_shared_experts >= 0, "at least 0"),
            "moe_inter_dim": (self.moe_inter_dim >= 1, "at least 1"),
            "indexers": (
                len(kinds) == self.n_layers and kinds[0] != "shared" and not _shared_after_none(kinds),
                f"one kind, or {self.n_layers} kinds of none/full/shared where a shared layer follows a full one",
            ),
        }
        if self.has_indexer:
            claims["index_head_dim"] = (
                self.index_head_dim >= self.qk_rope_head_dim,
                f"at least qk_rope_head_dim={self.qk_rope_head_dim} (the rotated dims come first)",
            )
            claims["index_hadamard"] = (
                not self.index_hadamard or self.index_head_dim.bit_count() == 1,
                f"false where index_head_dim={self.index_head_dim} is no power of two",
            )
        if self.n_dense_layers < self.n_layers or self.n_mtp_layers:
            claims |= self._expert_claims()
        require(self, **claims)

    def _expert_claims(self) -> dict[str, tuple[bool, str]]:
        groups, experts = self.n_expert_groups, self.n_routed_experts
        divides = groups >= 1 and experts >= 1 and experts % groups == 0
        limited = 1 <= self.n_limited_groups <= groups
        reachable = experts // groups * self.n_limited_groups if divides and limited else experts
        return {
            "n_expert_groups": (divides, f"a divisor of n_routed_experts={experts}"),
            "n_limited_groups": (limited, f"in [1, n_expert_groups={groups}]"),
            "n_activated_experts": (
                1 <= self.n_activated_experts <= reachable,
                f"in [1, {reachable}] (the limited groups' experts)",
            ),
        }

    @property
    def has_indexer(self) -> bool:
        return self.indexers != "none" if isinstance(self.indexers, str) else any(k != "none" for k in self.indexers)

    @property
    def layer_indexers(self) -> tuple[IndexerKind, ...]:
        """The indexer kind of each of the n_layers main layers."""
        return self.indexers if isinstance(self.indexers, tuple) else (self.indexers,) * self.n_layers

    @property
    def mtp_indexer(self) -> IndexerKind:
        """The MTP layer has its own indexer wherever the model has any."""
        return "full" if self.has_indexer else "none"

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim


def _shared_after_none(kinds: tuple[str, ...]) -> bool:
    """A shared layer needs a full layer before it, with none of kind `none` between (there would be no selection to use)."""
    return any(kind == "shared" and before == "none" for before, kind in itertools.pairwise(kinds))
