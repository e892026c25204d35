"""A shape with every mechanism present, small enough for tests: 2 layers, 8 experts in 2 groups, MTP, top-k below the length."""

from __future__ import annotations

from dataclasses import replace

import torch

from rorqual.data.loader import Batch
from rorqual.model.config import ModelConfig

SMALL = ModelConfig(
    vocab_size=97,
    dim=32,
    n_layers=2,
    n_dense_layers=1,
    inter_dim=48,
    max_positions=64,
    init_std=0.2,
    n_heads=3,
    q_lora_rank=20,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    rope_theta=100.0,
    yarn=None,
    index_n_heads=4,
    index_head_dim=8,
    index_topk=6,
    n_routed_experts=8,
    n_shared_experts=1,
    n_activated_experts=2,
    moe_inter_dim=12,
    n_expert_groups=2,
    n_limited_groups=1,
    n_mtp_layers=1,
)


def shape(**changes: object) -> ModelConfig:
    return replace(SMALL, **changes)


def some_batch(seed: int = 0, rows: int = 3, length: int = 23) -> Batch:
    """Random tokens in documents of uneven lengths, with padding at the end of the last row."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, SMALL.vocab_size, (rows, length), generator=generator)
    documents = torch.zeros(rows, length, dtype=torch.int64)
    for row in range(rows):
        documents[row, 5 + 4 * row :] += 1
    documents[-1, -3:] = -1
    return Batch(tokens, documents, documents >= 0)
