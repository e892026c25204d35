"""The mixture of experts: routed experts weighted by their gates, plus shared experts that see every token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rorqual.kernels.experts import experts
from rorqual.model.config import ModelConfig
from rorqual.model.ffn import FFN
from rorqual.model.router import Router, Routing


class Experts(nn.Module):
    """The routed experts' weights, stacked: w1, w3 [E, F, D] and w2 [E, D, F]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        n, inner, dim = config.n_routed_experts, config.moe_inter_dim, config.dim
        self.w1 = nn.Parameter(torch.empty(n, inner, dim))
        self.w2 = nn.Parameter(torch.empty(n, dim, inner))
        self.w3 = nn.Parameter(torch.empty(n, inner, dim))

    def forward(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """sum_k gates[:, k] E_k(x), accumulated in float32; x [N, D], chosen and gates [N, K] -> [N, D]."""
        return experts(x, self.w1, self.w2, self.w3, chosen, gates)


class MoE(nn.Module):
    """y = sum_e g_e E_e(x) + SharedExperts(x). The shared experts are one FFN of n_shared_experts times the inner size."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        shared_dim = config.moe_inter_dim * config.n_shared_experts
        self.shared_experts = FFN(config.dim, shared_dim) if shared_dim else None

    def forward(self, x: Tensor, replayed: Tensor | None = None) -> tuple[Tensor, Routing]:
        """x [N, D] -> y [N, D] and how the rows were routed; replayed as in Router."""
        routing = self.router(x, replayed)
        y = self.experts(x, routing.experts, routing.gates)
        return (y + self.shared_experts(x) if self.shared_experts else y), routing
