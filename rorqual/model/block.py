"""One decoder layer: pre-norm attention and feed-forward, each added to the residual stream."""

from __future__ import annotations

from torch import Tensor, nn

from rorqual.model.attention import Attention
from rorqual.model.call import Call
from rorqual.model.config import IndexerKind, ModelConfig
from rorqual.model.ffn import FFN
from rorqual.model.linear import RMSNorm
from rorqual.model.moe import MoE


class Block(nn.Module):
    """h <- h + Attention(norm(h)); h <- h + FFN(norm(h))."""

    def __init__(self, config: ModelConfig, layer: int, indexer_kind: IndexerKind, indexer_ordinal: int):
        super().__init__()
        self.layer = layer
        self.moe_ordinal = layer - config.n_dense_layers
        self.attn_norm = RMSNorm(config.dim, config.norm_eps)
        self.attn = Attention(config, layer, indexer_kind, indexer_ordinal)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = FFN(config.dim, config.inter_dim) if self.moe_ordinal < 0 else MoE(config)

    def forward(self, h: Tensor, selected: Tensor | None, call: Call) -> tuple[Tensor, Tensor | None]:
        """h [N, D] and the selection handed from the layer before -> the same for the layer after."""
        y, selected = self.attn(self.attn_norm(h), selected, call)
        h = h + y
        return h + self._feed(self.ffn_norm(h), call), selected

    def _feed(self, x: Tensor, call: Call) -> Tensor:
        if isinstance(self.ffn, FFN):
            return self.ffn(x)
        replayed = call.replay.experts(call.rows, self.moe_ordinal) if call.replay else None
        y, routing = self.ffn(x, replayed)
        call.trace.record_routing(self.layer, routing)
        return y
