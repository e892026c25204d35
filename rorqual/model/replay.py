"""What a forward takes from an earlier one instead of deciding anew: the experts of each token, the keys of each query.

Replay keeps training on the path that sampling took (the paper's Keep Routing, and its counterpart for DSA's selection).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rorqual.model.rows import Rows


@dataclass(frozen=True)
class Replay:
    """Decisions in the padded form. A row of -1 decides anew, as does all that is None."""

    routed_experts: Tensor | None = None
    """int [B, T, MoE layers, K]; gates are computed afresh from the current scores of these experts."""
    selected_indices: Sequence[Tensor] | None = None
    """For each layer with its own indexer, int [B, T, K] positions in the token's document, ascending, -1 last. Any
    sequence will do, so that one read from disk layer by layer need not be held whole."""

    def experts(self, rows: Rows, ordinal: int) -> Tensor | None:
        """Of the ordinal-th MoE layer, [N, K]."""
        return None if self.routed_experts is None else rows.pack(self.routed_experts[:, :, ordinal])

    def indices(self, rows: Rows, ordinal: int) -> Tensor | None:
        """Of the ordinal-th layer with its own indexer, [N, K]."""
        return None if self.selected_indices is None else rows.pack(self.selected_indices[ordinal].to(rows.tokens.device))
