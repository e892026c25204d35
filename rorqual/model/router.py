"""Which experts a token goes to, and with what weight: DeepSeek-V3's sigmoid router with bias-corrected, group-limited choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from rorqual.kernels.dispatch import triton_form
from rorqual.kernels.linear import wide_linear
from rorqual.model.config import ModelConfig


@dataclass(frozen=True)
class Routing:
    """scores float32 [N, E]: sigmoid affinities; experts int64 [N, K], ascending; gates float32 [N, K]: with a gradient."""

    scores: Tensor
    experts: Tensor
    gates: Tensor


class Router(nn.Module):
    """s = sigmoid(x W^T) in float32; experts by s + expert_bias within the best groups; gates from s alone.

    expert_bias is a float32 buffer that the loss-free balancing rule moves after each step; no gradient reaches it.
    """

    expert_bias: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.dim))
        self.register_buffer("expert_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As nn.Module's, but a change of dtype leaves expert_bias as it is: bf16 would swallow its small steps."""
        bias = self.expert_bias
        super()._apply(fn, recurse)
        self.expert_bias = self.expert_bias.float() if bias.is_meta else bias.to(self.expert_bias.device)
        return self

    def forward(self, x: Tensor, replayed: Tensor | None = None) -> Routing:
        """x [N, D]; replayed int [N, K]: experts to use instead of choosing, a row of -1 chooses."""
        logits = wide_linear(x, self.weight)  # [N, E]
        form = triton_form("route", logits, file="routing") if replayed is None else None
        if form is None:
            return self.routed(logits, replayed)
        c = self.config
        limits = c.n_expert_groups, c.n_limited_groups, c.n_activated_experts
        scores, experts, gates = form(logits.detach(), self.expert_bias, *limits, c.route_scale, c.norm_topk_prob, c.route_eps)
        if not torch.is_grad_enabled():
            return Routing(scores, experts, gates)
        scores = logits.sigmoid()
        return Routing(scores, experts, self._gates(scores, experts))

    def routed(self, logits: Tensor, replayed: Tensor | None = None) -> Routing:
        """As forward, from logits float32 [N, E]."""
        scores = 1 / (1 + (-logits).exp())  # torch.sigmoid gives other bits at the end of a tensor on CPU
        experts = choose_experts(scores.detach() + self.expert_bias, self.config)
        if replayed is not None:
            experts = torch.where(replayed >= 0, replayed.to(experts), experts)
        return Routing(scores, experts, self._gates(scores, experts))

    def _gates(self, scores: Tensor, experts: Tensor) -> Tensor:
        gates = scores.gather(1, experts)  # [N, K]
        if self.config.norm_topk_prob:
            gates = gates / (gates.sum(1, keepdim=True) + self.config.route_eps)
        return gates * self.config.route_scale


def choose_experts(choice: Tensor, config: ModelConfig) -> Tensor:
    """The n_activated_experts best of `choice` (score + bias) [N, E] within the n_limited_groups best groups.

    A group's score is the sum of its two best experts. Ties go to the lower index. Returns int64 [N, K], ascending.
    """
    if config.n_limited_groups < config.n_expert_groups:
        choice = choice.masked_fill(~_in_best_groups(choice, config), -torch.inf)
    return _lowest_first(choice, config.n_activated_experts).sort(1).values


def _in_best_groups(choice: Tensor, config: ModelConfig) -> Tensor:
    groups = choice.unflatten(1, (config.n_expert_groups, -1))  # [N, groups, E / groups]
    group_scores = groups.topk(min(2, groups.shape[2]), dim=2).values.sum(2)
    best = _lowest_first(group_scores, config.n_limited_groups)
    kept = torch.zeros_like(group_scores, dtype=torch.bool).scatter(1, best, True)
    return kept[:, :, None].expand_as(groups).flatten(1)


def _lowest_first(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of each row [N, X]; among equals the lower index (torch.topk promises nothing there)."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
