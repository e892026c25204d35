"""Multi-token prediction (DeepSeek-V3, depth 1): one more layer that predicts the token after the next one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rorqual.model.block import Block
from rorqual.model.call import Call
from rorqual.model.config import ModelConfig
from rorqual.model.linear import Linear, RMSNorm


class MTP(nn.Module):
    """h' = Block(eh_proj [enorm(Emb(t_{i+1})) | hnorm(h_i)]); the embedding comes first, as in the released weights."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.enorm = RMSNorm(config.dim, config.norm_eps)
        self.hnorm = RMSNorm(config.dim, config.norm_eps)
        self.eh_proj = Linear(2 * config.dim, config.dim)
        ordinal = sum(kind == "full" for kind in config.layer_indexers)
        self.layer = Block(config, config.n_layers, config.mtp_indexer, ordinal)
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, embedding: Tensor, h: Tensor, call: Call) -> Tensor:
        """embedding [N, D] of the next tokens, h [N, D] of the main model -> normalised [N, D], for the shared head."""
        joined = self.eh_proj(torch.cat([self.enorm(embedding), self.hnorm(h)], -1))
        return self.norm(self.layer(joined, None, call)[0])
