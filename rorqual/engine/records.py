"""What a trainer must replay, kept by cache slot: the experts of each token and the keys each query selected.

Kept beside the activations of the same token, so that a prefix hit brings them along and a recomputation writes them again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.model.config import ModelConfig
from rorqual.model.trace import Trace


class RecordStore:
    """Per slot: routed experts int16 [MoE layers, K], and if asked, selected positions int32 [topk] per full layer."""

    def __init__(self, config: ModelConfig, num_slots: int, routing: bool, selection: bool, device: torch.device):
        self.moe_layers = range(config.n_dense_layers, config.n_layers) if routing else range(0)
        self.full_layers = [i for i, kind in enumerate(config.layer_indexers) if kind == "full"] if selection else []
        self.routing, self.selection = routing, selection
        shape = (num_slots, len(self.moe_layers), config.n_activated_experts)
        self._experts = torch.empty(shape, dtype=torch.int16, device=device)
        self._selected = [torch.empty(num_slots, config.index_topk, dtype=torch.int32, device=device) for _ in self.full_layers]

    def trace(self) -> Trace:
        """What to ask of a forward."""
        return Trace(routed_experts=self.routing, selected_indices=self.selection, router_loads=False)

    def write(self, slots: Tensor, trace: Trace) -> None:
        """Keep what a forward told, for its rows' slots int64 [N]."""
        for index, layer in enumerate(self.moe_layers):
            self._experts[slots, index] = trace.experts[layer].to(torch.int16)
        for store, layer in zip(self._selected, self.full_layers, strict=True):
            store[slots] = trace.selected[layer]

    def experts(self, slots: Tensor) -> Tensor:
        """int16 [N, MoE layers, K]."""
        return self._experts[slots]

    def selected(self, slots: Tensor) -> list[Tensor]:
        """For each layer that selects, int32 [N, topk] positions, ascending, -1 last."""
        return [store[slots] for store in self._selected]
