"""Parallelism applied to a model from outside, in one ordered function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from rorqual.parallel.world import World


@dataclass(frozen=True)
class ComputeConfig:
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in. bfloat16: with float32 master weights; norms, router, index weights, logits stay float32."""
    save_dtype: Literal["float32", "bf16"] = "bf16"
    """Of the finished checkpoint. float32 loses nothing between stages."""
    recompute: bool = False
    """Activation checkpointing: keep a layer's input only, and run the layer again in the backward."""


def parallelize(objective: nn.Module, world: World, config: ComputeConfig) -> None:
    """Shard in place."""
    if config.dtype == "bfloat16":
        objective.model.to(torch.bfloat16)
    if world.size > 1:
        raise NotImplementedError
