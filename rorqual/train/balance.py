"""Loss-free load balancing: an expert that got more than the mean load of the global batch is chosen less from now on [V3]."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from rorqual.model.moe import MoE
from rorqual.model.router import Router
from rorqual.model.trace import Trace
from rorqual.model.transformer import Transformer


def add_loads(traces: Iterable[Trace]) -> dict[int, Tensor]:
    """Tokens sent to each expert over several forwards: layer -> int64 [E]."""
    loads: dict[int, Tensor] = {}
    for trace in traces:
        for layer, load in trace.loads.items():
            loads[layer] = loads[layer] + load if layer in loads else load
    return loads


@torch.no_grad()
def move_biases(model: Transformer, loads: Mapping[int, Tensor], step_size: float) -> None:
    """b_e += step_size sign(mean load - load_e), in each layer that has loads (of the whole global batch)."""
    for layer, router in routers(model):
        if layer in loads:
            load = loads[layer].float()
            router.expert_bias.add_(torch.sign(load.mean() - load), alpha=step_size)


def routers(model: Transformer) -> list[tuple[int, Router]]:
    """(layer, router) of every MoE layer; the MTP layer is number n_layers."""
    blocks = [*model.layers, *([model.mtp.layer] if model.mtp is not None else [])]
    return [(block.layer, block.ffn.router) for block in blocks if isinstance(block.ffn, MoE)]


def imbalance(loads: Mapping[int, Tensor]) -> dict[str, float]:
    """The most loaded expert's share of the mean, by layer: 1 is perfect balance."""
    if not loads:
        return {}
    names, stacked = sorted(loads), torch.stack([loads[layer] for layer in sorted(loads)])  # [layers, E]
    shares = stacked.amax(1) / stacked.float().mean(1).clamp(min=1e-9)
    return {f"load/{layer}": share for layer, share in zip(names, shares.tolist(), strict=True)}
