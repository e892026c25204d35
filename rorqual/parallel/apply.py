"""Parallelism applied to a model from outside, in one ordered function: experts, then recomputation, then sharding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from rorqual.model.block import Block
from rorqual.model.moe import MoE
from rorqual.model.transformer import Transformer
from rorqual.parallel.expert import TravellingExperts
from rorqual.parallel.world import World


@dataclass(frozen=True)
class ComputeConfig:
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in. bfloat16: with float32 master weights; norms, router, index weights, logits stay float32."""
    save_dtype: Literal["float32", "bf16"] = "bf16"
    """Of the finished checkpoint. float32 loses nothing between stages."""
    recompute: bool = False
    """Activation checkpointing: keep a layer's input only, and run the layer again in the backward."""


def parallelize(objective: nn.Module, model: Transformer, world: World, config: ComputeConfig) -> None:
    """Prepare `objective`, which holds `model`, to be called on every rank; changes both in place.

    One process: the model takes the compute dtype (the optimiser then keeps float32 masters). Several: parameters stay
    float32, sharded, and are gathered layer by layer in the compute dtype; gradients are summed, not averaged, over ranks.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    if world.size > 1 and world.config.expert > 1:
        for block in blocks:
            if isinstance(block.ffn, MoE):
                block.ffn.register_module("experts", TravellingExperts(block.ffn.experts, world.flat_mesh))
    if config.recompute:
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if world.size == 1:
        model.to(dtype)
        return
    travelling = {p for module in model.modules() if isinstance(module, TravellingExperts) for p in module.parameters()}
    # Casting the inputs would copy the Call, and what layers write to.
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # While indexers alone learn, no gradient flows through the layers, so nothing would gather a layer again.
    reshard = all(parameter.requires_grad for parameter in model.embed.parameters())
    shard = partial(fully_shard, mesh=world.flat_mesh, mp_policy=precision, ignored_params=travelling)
    for block in blocks:
        shard(block, reshard_after_forward=reshard)
    shard(objective)
    for module in objective.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other


class Opaque:
    """An object seen through a veil: FSDP copies any dataclass among a layer's arguments that holds tensors with a gradient,
    and a layer would write into the copy."""

    def __init__(self, veiled: Any):
        self._veiled = veiled

    def __getattr__(self, name: str) -> Any:
        return getattr(self._veiled, name)


def whole_state(model: Transformer) -> dict[str, Tensor]:
    """Parameters and buffers by name, whole, on every rank; all ranks must call it."""
    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in ((n, t.detach()) for n, t in model.state_dict().items())
    }
