"""What a forward is asked to tell beside its result.

    trace = Trace(routed_experts=True, index_loss="restricted")
    model(tokens, trace=trace)
    trace.index_losses[3].mean()

Everything is by packed row, [N, ...], and by layer: the main layers 0 .. n_layers - 1, the MTP layer n_layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from rorqual.kernels.index_loss import SelectionQuality
from rorqual.model.router import Routing

IndexLossKind = Literal["none", "dense", "restricted"]


@dataclass
class Trace:
    """The first fields ask; the dicts, keyed by layer, are filled by the forward. A layer run twice (recomputed in the
    backward) keeps what its first run told."""

    routed_experts: bool = False
    selected_indices: bool = False
    router_loads: bool = True
    """Count the tokens sent to each expert; sampling does without."""
    router_scores: bool = False
    """Keep the affinities of all experts, with their gradient: the sequence-wise balance loss needs them."""
    index_loss: IndexLossKind = "none"
    """dense: KL against attention over all keys (the warm-up, where attention itself is dense); restricted: over the
    selected keys (sparse training)."""
    index_quality: bool = False
    """How much of dense attention's mass the selection keeps; costs a dense pass."""

    experts: dict[int, Tensor] = field(default_factory=dict)
    """int64 [N, K], ascending; every MoE layer, if routed_experts."""
    loads: dict[int, Tensor] = field(default_factory=dict)
    """int64 [E]: tokens sent to each expert; every MoE layer, if router_loads."""
    scores: dict[int, Tensor] = field(default_factory=dict)
    """float32 [N, E], if router_scores."""
    selected: dict[int, Tensor] = field(default_factory=dict)
    """int32 [N, K] positions in the row's document, ascending, -1 last; layers with their own indexer, if selected_indices."""
    index_losses: dict[int, Tensor] = field(default_factory=dict)
    """float32 [N] in nats, with a gradient for the indexer alone; layers with their own indexer, if index_loss."""
    qualities: dict[int, SelectionQuality] = field(default_factory=dict)
    """Each row's captured mass, the ceiling of it, and recall; layers with their own indexer, if index_quality."""

    @property
    def wants_index(self) -> bool:
        """Whether indexers must run even where attention is dense."""
        return self.index_loss != "none" or self.selected_indices or self.index_quality

    def record_routing(self, layer: int, routing: Routing) -> None:
        if layer in self.loads or layer in self.experts:
            return
        if self.router_loads:
            # Not torch.bincount: on a GPU it waits for its input, to learn the largest value.
            every = torch.arange(routing.scores.shape[1], device=routing.experts.device)
            self.loads[layer] = (routing.experts[..., None] == every).sum((0, 1))
        if self.routed_experts:
            self.experts[layer] = routing.experts
        if self.router_scores:
            self.scores[layer] = routing.scores
