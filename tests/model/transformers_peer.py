"""Random models of transformers, and the same weights in ours, copied tensor by tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rorqual.model import ModelConfig, Transformer, YarnConfig

CLASSES = {
    "deepseek_v32": ("DeepseekV32Config", "DeepseekV32ForCausalLM"),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM"),
    "glm_moe_dsa": ("GlmMoeDsaConfig", "GlmMoeDsaForCausalLM"),
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def random_peer(model_type: str, fields: dict[str, Any], seed: int = 0) -> nn.Module:
    """A random transformers model in which everything matters: wide weights, uneven norms, biased router and key norm."""
    import transformers

    config_name, model_name = CLASSES[model_type]
    config = getattr(transformers, config_name)(
        initializer_range=0.08, attn_implementation="eager", bos_token_id=None, eos_token_id=None, pad_token_id=None, **fields
    )
    config._experts_implementation = "eager"  # the grouped one wants sizes that are multiples of four
    torch.manual_seed(seed)
    peer = getattr(transformers, model_name)(config).float().eval()
    with torch.no_grad():
        for name, weight in [*peer.named_parameters(), *peer.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                weight.uniform_(-0.2, 0.2)
            elif weight.dim() == 1 and "norm" in name:
                weight.add_(torch.empty_like(weight).uniform_(-0.3, 0.3))
    return peer


def our_config(peer: nn.Module) -> ModelConfig:
    c: Any = peer.config
    rope = c.rope_parameters
    yarn = None
    if rope["rope_type"] == "yarn":
        names = ["factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"]
        yarn = YarnConfig(
            original_max_positions=rope["original_max_position_embeddings"], **{name: float(rope[name]) for name in names}
        )
    has_indexer = hasattr(c, "index_topk")
    indexers = tuple(c.indexer_types) if hasattr(c, "indexer_types") else "full" if has_indexer else "none"
    index = {name: getattr(c, name) for name in ("index_n_heads", "index_head_dim", "index_topk") if has_indexer}
    return ModelConfig(
        vocab_size=c.vocab_size, dim=c.hidden_size, n_layers=c.num_hidden_layers, n_dense_layers=c.first_k_dense_replace,
        inter_dim=c.intermediate_size, norm_eps=c.rms_norm_eps, n_heads=c.num_attention_heads, q_lora_rank=c.q_lora_rank,
        kv_lora_rank=c.kv_lora_rank, qk_nope_head_dim=c.qk_nope_head_dim, qk_rope_head_dim=c.qk_rope_head_dim,
        v_head_dim=c.v_head_dim, rope_theta=rope["rope_theta"], yarn=yarn, indexers=indexers,
        index_rope_interleaved=c.model_type == "glm_moe_dsa", n_routed_experts=c.n_routed_experts,
        n_shared_experts=c.n_shared_experts, n_activated_experts=c.num_experts_per_tok, moe_inter_dim=c.moe_intermediate_size,
        n_expert_groups=c.n_group, n_limited_groups=c.topk_group, route_scale=c.routed_scaling_factor,
        norm_topk_prob=c.norm_topk_prob, n_mtp_layers=0, **index,
    )  # fmt: skip


PLACES = {
    "model.embed_tokens": "embed", "model.norm": "norm", "lm_head": "head", "model.layers": "layers",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn": "attn", "mlp": "ffn",
    "q_a_proj": "wq_a", "q_a_layernorm": "q_norm", "q_b_proj": "wq_b", "kv_a_proj_with_mqa": "wkv_a",
    "kv_a_layernorm": "kv_norm", "kv_b_proj": "wkv_b", "o_proj": "wo", "q_proj": "wq",
    "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2",
    "gate.weight": "router.weight", "gate.e_score_correction_bias": "router.expert_bias",
}  # fmt: skip


def our_name(name: str) -> str:
    """model.layers.0.self_attn.q_a_proj.weight -> layers.0.attn.wq_a.weight."""
    for theirs, ours in PLACES.items():
        name = f".{name}.".replace(f".{theirs}.", f".{ours}.").strip(".")
    return name


def same_weights(peer: nn.Module, config: ModelConfig | None = None) -> Transformer:
    """Our model with the peer's weights; every tensor of both is used exactly once."""
    model = Transformer(config or our_config(peer)).eval()
    weights: dict[str, Tensor] = {}
    for name, tensor in peer.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            prefix = our_name(name.removesuffix(".gate_up_proj"))
            weights[f"{prefix}.w1"], weights[f"{prefix}.w3"] = tensor.chunk(2, dim=1)
        else:
            weights[our_name(name)] = tensor
    model.load_state_dict(weights, strict=True)
    return model
