"""The dense feed-forward layer, also the form of the shared experts."""

from __future__ import annotations

from torch import Tensor, nn

from rorqual.kernels.rowwise import silu_product
from rorqual.model.linear import Linear


class FFN(nn.Module):
    """W2 (silu(W1 x) * (W3 x)), the product in float32."""

    def __init__(self, dim: int, inter_dim: int):
        super().__init__()
        self.w1 = Linear(dim, inter_dim)
        self.w2 = Linear(inter_dim, dim)
        self.w3 = Linear(dim, inter_dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, D] -> [N, D]."""
        return self.w2(silu_product(self.w1(x), self.w3(x)))
