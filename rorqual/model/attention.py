"""Multi-head latent attention (MLA), dense or over the tokens that an indexer selected: one function in two forms.

    score_{h,t,s} = (q_nope . k_nope_s + q_rope . k_rope_s) scale,  k_nope_s = W_UK latent_s,  v_s = W_UV latent_s

absorbed: W_UK moves to the query and W_UV to the output, so that every head reads the same entry [latent | k_rope] of a
token (multi-query attention); DSA is defined on it, and caches hold nothing else. expanded: keys and values of every head
are made from the latents (multi-head attention): fewer operations for each pair of tokens, more for each token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rorqual.errors import UserError
from rorqual.kernels.dense_attention import masked_attention
from rorqual.kernels.index_loss import index_loss, selection_quality
from rorqual.model.cache import Fresh
from rorqual.model.call import AttentionMode, Call
from rorqual.model.config import IndexerKind, ModelConfig
from rorqual.model.indexer import Indexer, IndexQueries
from rorqual.model.keys import Keys, Segment, attend_densely
from rorqual.model.linear import Linear, RMSNorm, per_head
from rorqual.model.rope import Rotation, rotate_interleaved, softmax_scale


class Attention(nn.Module):
    """MLA of one layer. indexer_kind: none (dense), full (its own indexer), shared (the selection it is handed)."""

    def __init__(self, config: ModelConfig, layer: int, indexer_kind: IndexerKind, ordinal: int):
        """ordinal: the layer's place among those with their own indexer."""
        super().__init__()
        self.config, self.layer, self.indexer_kind, self.ordinal = config, layer, indexer_kind, ordinal
        self.scale = softmax_scale(config)
        H, L, eps = config.n_heads, config.kv_lora_rank, config.latent_norm_eps
        if config.q_lora_rank is None:
            self.wq = Linear(config.dim, H * config.qk_head_dim)
        else:
            self.wq_a = Linear(config.dim, config.q_lora_rank)
            self.q_norm = RMSNorm(config.q_lora_rank, eps)
            self.wq_b = Linear(config.q_lora_rank, H * config.qk_head_dim)
        self.wkv_a = Linear(config.dim, L + config.qk_rope_head_dim)
        self.kv_norm = RMSNorm(L, eps)
        self.wkv_b = Linear(L, H * (config.qk_nope_head_dim + config.v_head_dim))
        self.wo = Linear(H * config.v_head_dim, config.dim)
        self.indexer = Indexer(config) if indexer_kind == "full" else None

    def forward(self, x: Tensor, handed: Tensor | None, call: Call) -> tuple[Tensor, Tensor | None]:
        """x [N, D] normalised; handed: the selection of the last full layer. Returns [N, D] and the selection to hand on."""
        c_q = x if self.config.q_lora_rank is None else self.q_norm(self.wq_a(x))
        q_nope, q_rope = self._queries(c_q, call.rotation)
        index = self._index_queries(x, c_q, call)
        keys = call.caches.update(self.layer, self._fresh(x, call))
        selected = self._select(keys, index, handed, call)
        if index is not None and (call.trace.index_loss != "none" or call.trace.index_quality):
            with torch.no_grad():
                q = self._absorb(q_nope, q_rope)
            self._tell_index(keys, index, selected, q, call)
        used = selected if call.mode.sparse and self.indexer_kind != "none" else None
        attend = self._expanded if self._is_expanded(keys, used, call.mode) else self._absorbed
        return self.wo(attend(keys, q_nope, q_rope, used).flatten(1)), selected

    def _queries(self, c_q: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """q_nope [N, H, nope], q_rope [N, H, R] rotated; inside a head nope comes first."""
        q = self.wq(c_q) if self.config.q_lora_rank is None else self.wq_b(c_q)
        q = q.unflatten(-1, (self.config.n_heads, -1))
        q_nope, q_rope = q.split([self.config.qk_nope_head_dim, self.config.qk_rope_head_dim], -1)
        return q_nope, rotate_interleaved(q_rope, rotation)

    def _fresh(self, x: Tensor, call: Call) -> Fresh:
        return Fresh(self.wkv_a(x), self.kv_norm, call.rotation, self._projected_keys(x, call), self.indexer)

    # The indexer learns from its own loss only: its inputs are detached, and without that loss it is not differentiated.

    def _index_queries(self, x: Tensor, c_q: Tensor, call: Call) -> IndexQueries | None:
        if self.indexer is None or not call.wants_index:
            return None
        with torch.set_grad_enabled(torch.is_grad_enabled() and call.trace.index_loss != "none"):
            return self.indexer.queries(x.detach(), c_q.detach(), call.rotation)

    def _projected_keys(self, x: Tensor, call: Call) -> Tensor | None:
        """Later forwards select among the keys that a cache holds, whatever this one does."""
        if self.indexer is None or not (call.wants_index or call.is_cached):
            return None
        with torch.set_grad_enabled(torch.is_grad_enabled() and call.trace.index_loss != "none"):
            return self.indexer.wk(x.detach())

    @torch.no_grad()
    def _select(self, keys: Keys, index: IndexQueries | None, handed: Tensor | None, call: Call) -> Tensor | None:
        """The selection of this layer: its own, replayed where asked; else the one it is handed. None: all keys."""
        if index is None:
            return handed
        topk = self.config.index_topk
        replayed = call.replay.indices(call.rows, self.ordinal) if call.replay else None
        if replayed is None:
            selected = keys.select(index.query, index.weight, topk)
        else:
            is_whole = bool((replayed >= 0).any(1).all())
            selected = keys.replay(None if is_whole else keys.select(index.query, index.weight, topk), replayed, topk)
        if call.trace.selected_indices:
            call.trace.selected.setdefault(self.layer, keys.to_positions(selected, topk))
        return selected

    def _tell_index(self, keys: Keys, index: IndexQueries, selected: Tensor | None, q: Tensor, call: Call) -> None:
        """The divergence of the indexer from the main attention, whose absorbed queries are q, and how good its selection is."""
        if len(keys.segments) != 1:
            raise UserError(f"index loss: expected the keys of one sequence or no cache, found those of {len(keys.segments)}")
        segment = keys.segments[0]
        reach, kv, trace = segment.reach, segment.kv.detach(), call.trace
        listed = reach.listed(self.config.index_topk) if selected is None else selected
        if trace.index_loss != "none" and segment.index_keys is not None:
            over = listed if trace.index_loss == "restricted" else None
            loss = index_loss(index.query, segment.index_keys, index.weight, q, kv, self.scale, reach.starts, reach.ends, over)
            trace.index_losses.setdefault(self.layer, loss)
        if trace.index_quality:
            quality = selection_quality(q, kv, self.scale, listed, reach.starts, reach.ends)
            trace.qualities.setdefault(self.layer, quality)

    def _is_expanded(self, keys: Keys, selected: Tensor | None, mode: AttentionMode) -> bool:
        if mode.form != "auto":
            return mode.form == "expanded"
        reaches = keys.reaches
        # A mask costs what the rows see on average: half the length of a whole prompt, more in its later chunks.
        twice_the_mean = max((reach.min_len - 1 + reach.max_len for reach in reaches), default=0)
        is_short = selected is None or twice_the_mean <= mode.masked_factor * self.config.index_topk
        return is_short and all(len(reach.ends) >= self._rows_worth_expanding() for reach in reaches)

    def _rows_worth_expanding(self) -> float:
        """From how many queries on fewer operations for each pair of tokens make up for the expansion of each key."""
        c = self.config
        spared = 2 * c.kv_lora_rank - c.qk_nope_head_dim - c.v_head_dim
        return (c.qk_nope_head_dim + c.v_head_dim) * c.kv_lora_rank / spared if spared > 0 else math.inf

    def _absorbed(self, keys: Keys, q_nope: Tensor, q_rope: Tensor, selected: Tensor | None) -> Tensor:
        """[N, H, v]: every head attends over the latents themselves."""
        latent = keys.attend(self._absorb(q_nope, q_rope), self.scale, self.config.kv_lora_rank, selected)  # [N, H, L]
        return per_head(latent, self._up_values().transpose(1, 2))

    def _absorb(self, q_nope: Tensor, q_rope: Tensor) -> Tensor:
        """[W_UK^T q_nope | q_rope]: [N, H, L + R]."""
        return torch.cat([per_head(q_nope, self._up_keys()), q_rope], -1)

    def _expanded(self, keys: Keys, q_nope: Tensor, q_rope: Tensor, selected: Tensor | None) -> Tensor:
        """[N, H, v]: keys and values of every head are made of the latents."""
        q = torch.cat([q_nope, q_rope], -1)  # [N, H, nope + R]
        parts = [
            self._expanded_segment(segment, q[segment.rows], None if selected is None else selected[segment.rows])
            for segment in keys.segments
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _expanded_segment(self, segment: Segment, q: Tensor, selected: Tensor | None) -> Tensor:
        latent, k_rope = segment.kv.split([self.config.kv_lora_rank, self.config.qk_rope_head_dim], -1)
        kv = self.wkv_b(latent).unflatten(-1, (self.config.n_heads, -1))  # [S, H, nope + v]
        k_nope, v = kv.split([self.config.qk_nope_head_dim, self.config.v_head_dim], -1)
        k = torch.cat([k_nope, k_rope[:, None].expand(-1, self.config.n_heads, -1)], -1)  # [S, H, nope + R]
        if selected is None:
            return attend_densely(q, k, v, self.scale, segment.reach)
        return masked_attention(q, k, v, self.scale, selected)

    def _up_keys(self) -> Tensor:
        """W_UK [H, nope, L]: the first rows of each head in wkv_b."""
        return self._per_head_weight()[:, : self.config.qk_nope_head_dim]

    def _up_values(self) -> Tensor:
        """W_UV [H, v, L]: the last rows of each head in wkv_b."""
        return self._per_head_weight()[:, self.config.qk_nope_head_dim :]

    def _per_head_weight(self) -> Tensor:
        return self.wkv_b.weight.unflatten(0, (self.config.n_heads, -1))  # [H, nope + v, L]
