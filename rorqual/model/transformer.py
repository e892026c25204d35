"""The DeepSeek-V3.2 model as one module: tokens in, logits out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rorqual.errors import UserError
from rorqual.kernels.linear import invariant_linear, wide_linear
from rorqual.model.block import Block
from rorqual.model.cache import KeyCache, OwnRows
from rorqual.model.call import ABSORBED, AttentionMode, Call
from rorqual.model.config import ModelConfig
from rorqual.model.init import init_weights
from rorqual.model.linear import Linear, RMSNorm
from rorqual.model.mtp import MTP
from rorqual.model.replay import Replay
from rorqual.model.rope import rotation
from rorqual.model.rows import Rows, pack_rows
from rorqual.model.trace import Trace


@dataclass(frozen=True)
class States:
    """What the layers make of the rows of one forward."""

    call: Call
    last: Tensor
    """[N, D] after the last layer, before the final norm."""
    hidden: Tensor
    """[N, D] after the final norm: what the head reads."""

    @property
    def rows(self) -> Rows:
        return self.call.rows


class Transformer(nn.Module):
    """Embedding, n_layers blocks, final norm, head, and the MTP module where the config has one.

    Weights are drawn at construction from `seed` (see init.py); on the meta device nothing is drawn. Parameters are float32;
    `.to(torch.bfloat16)` gives the bf16 model, in which norms, the router, index weights and logits are still computed in
    float32, and expert_bias stays float32.
    """

    def __init__(self, config: ModelConfig, seed: int = 0):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(_blocks(config))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = Linear(config.dim, config.vocab_size)
        self.mtp = MTP(config) if config.n_mtp_layers else None
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self._head_copy: tuple[Tensor, tuple[int, int], Tensor] | None = None
        if not self.embed.weight.is_meta:
            init_weights(self, config.init_std, seed)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: KeyCache | None = None,
        replay: Replay | None = None,
        *,
        trace: Trace | None = None,
        mode: AttentionMode = ABSORBED,
    ) -> Tensor:
        """Logits of the next token, float32 [B, T, V]; zeros where there is padding.

        tokens: int64 [B, T].
        positions: [B, T] or [T]; by default they restart in each document, and go on from the cache where there is one.
        documents: int [B, T], ids that attention does not cross; -1 is padding, anywhere in a row.
        cache: continues its B sequences by these tokens, and keeps them; one document per sequence.
        replay: decisions of an earlier forward; trace: what to record of this one.
        """
        states = self.states(tokens, positions, documents, cache, replay, trace=trace, mode=mode)
        return states.rows.unpack(self.logits(states.hidden))

    def states(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: KeyCache | None = None,
        replay: Replay | None = None,
        *,
        trace: Trace | None = None,
        mode: AttentionMode = ABSORBED,
    ) -> States:
        """As forward, without the head: for losses that never hold all logits, and for MTP. Rows are packed."""
        rows = pack_rows(tokens, positions, documents, () if cache is None else cache.lengths)
        return self.run(rows, cache, replay, trace=trace, mode=mode)

    def run(
        self,
        rows: Rows,
        cache: KeyCache | None = None,
        replay: Replay | None = None,
        *,
        trace: Trace | None = None,
        mode: AttentionMode = ABSORBED,
    ) -> States:
        """The layers over rows that are packed already: what an engine calls."""
        if cache is not None:
            cache.begin(rows)
        angles = rotation(rows.positions, self.config)
        call = Call(rows, angles, OwnRows(rows) if cache is None else cache, mode, replay, trace or Trace())
        h, selected = self.embed(rows.tokens), None
        for block in self.layers:
            h, selected = block(h, selected, call)
        return States(call, h, self.norm(h))

    def mtp_hidden(self, states: States, next_tokens: Tensor | None = None) -> Tensor:
        """The MTP module over the rows of `states`: normalised [N, D], whose logits predict the token after the next.

        next_tokens: int64 [N]; by default the rows' own, and then the last row of each document means nothing. With a cache
        it is the cache's layer n_layers.
        """
        if self.mtp is None:
            raise UserError("this model has no MTP module (n_mtp_layers is 0)")
        following = states.rows.next_tokens() if next_tokens is None else next_tokens
        h = states.hidden if self.config.mtp_reads_normed else states.last
        return self.mtp(self.embed(following.clamp(min=0)), h, states.call)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [N, V] of normalised hidden states [N, D]."""
        if hidden.is_cuda:
            return wide_linear(hidden, self.head.weight)
        return invariant_linear(hidden.float(), self._wide_head())

    def _wide_head(self) -> Tensor:
        """The head in float32. Where a bf16 model decodes on a CPU the copy is kept until the head changes: making it anew for
        every token would cost as much as the product."""
        weight = self.head.weight
        if weight.dtype == torch.float32 or torch.is_grad_enabled():
            return weight.float()
        state = (weight.data_ptr(), weight._version)
        if self._head_copy is None or self._head_copy[0] is not weight or self._head_copy[1] != state:
            self._head_copy = (weight, state, weight.float())
        return self._head_copy[2]


def _blocks(config: ModelConfig) -> list[Block]:
    kinds = config.layer_indexers
    return [Block(config, i, kind, kinds[:i].count("full")) for i, kind in enumerate(kinds)]
