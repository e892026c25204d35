"""Small models in which every mechanism is present and every weight matters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rorqual.model import ModelConfig, Transformer

SMALL: dict[str, Any] = {
    "vocab_size": 97, "dim": 40, "n_layers": 3, "n_dense_layers": 1, "inter_dim": 56, "max_positions": 512, "init_std": 0.12,
    "n_heads": 3, "q_lora_rank": 28, "kv_lora_rank": 20, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 14,
    "yarn": None, "index_n_heads": 5, "index_head_dim": 16, "index_topk": 9,
    "n_routed_experts": 12, "n_activated_experts": 3, "moe_inter_dim": 22, "n_expert_groups": 4, "n_limited_groups": 2,
    "n_mtp_layers": 1,
}  # fmt: skip


def small_model(seed: int = 0, **changes: Any) -> Transformer:
    """A random model with uneven norms and a biased router."""
    model = Transformer(ModelConfig(**{**SMALL, **changes}), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dim() == 1:
                noise = torch.rand(tensor.shape, generator=generator) * 0.4 - 0.2
                tensor.copy_(noise if name.endswith("bias") else 1 + noise)
    return model


def random_tokens(B: int, T: int, vocab_size: int = 97, seed: int = 0) -> Tensor:
    return torch.randint(0, vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))
