"""The lightning indexer: which earlier tokens a query attends to (DeepSeek Sparse Attention; the paper's equation 1).

    I_{t,s} = sum_j w_{t,j} ReLU(q_{t,j} . k_s)        S_t = the top-k of I_{t,:}

The scores themselves are never held: `rorqual.kernels.select_tokens` makes them tile by tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rorqual.kernels.linear import wide_linear
from rorqual.kernels.rowwise import hadamard_transform
from rorqual.model.config import ModelConfig
from rorqual.model.linear import LayerNorm, Linear
from rorqual.model.rope import Rotation, rotate_half_split, rotate_interleaved


@dataclass(frozen=True)
class IndexQueries:
    """query [N, I, C]; weight float32 [N, I], with both constants (C^-0.5 and I^-0.5) in it; it may be negative."""

    query: Tensor
    weight: Tensor


class Indexer(nn.Module):
    """Index queries from the query latent, one index key per token and head weights from the layer's input."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.wq_b = Linear(config.q_lora_rank or config.dim, config.index_n_heads * config.index_head_dim)
        self.wk = Linear(config.dim, config.index_head_dim)
        self.k_norm = LayerNorm(config.index_head_dim)
        self.weights_proj = Linear(config.dim, config.index_n_heads)

    def queries(self, x: Tensor, c_q: Tensor, rotation: Rotation) -> IndexQueries:
        """x [N, D] the normalised layer input, c_q [N, q_lora_rank] the query latent (x itself where there is none)."""
        query = self._rotate(self.wq_b(c_q).unflatten(-1, (self.config.index_n_heads, -1)), rotation)  # [N, I, C]
        constants = self.config.index_head_dim**-0.5 * self.config.index_n_heads**-0.5
        weight = wide_linear(x, self.weights_proj.weight) * constants  # [N, I]
        return IndexQueries(query, weight)

    def keys(self, x: Tensor, rotation: Rotation) -> Tensor:
        """One key per token, shared by all index heads: [N, C]."""
        return self.finished_keys(self.wk(x), rotation)

    def finished_keys(self, projected: Tensor, rotation: Rotation) -> Tensor:
        """wk(x) [N, C] normalised and rotated."""
        return self._rotate(self.k_norm(projected), rotation)

    def _rotate(self, x: Tensor, rotation: Rotation) -> Tensor:
        """RoPE on the FIRST dims (MLA has it on the last ones), then the Hadamard rotation where the config asks for it."""
        rope_dim = self.config.qk_rope_head_dim
        rotate = rotate_interleaved if self.config.index_rope_interleaved else rotate_half_split
        x = torch.cat([rotate(x[..., :rope_dim], rotation), x[..., rope_dim:]], -1)
        return hadamard_transform(x) if self.config.index_hadamard else x
