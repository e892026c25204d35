"""AdamW with decay groups, learning-rate schedules, clipping, and fp32 master weights for a model that computes in bf16.

Defaults are DeepSeek-V3's (betas 0.9 and 0.95, weight decay 0.1, clip 1.0); what V3.2 used for its indexers is unpublished.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rorqual.errors import require


@dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = 3e-4
    """The peak."""
    warmup_steps: int = 0
    """Linear from 0."""
    schedule: Literal["constant", "cosine", "linear", "stable-decay"] = "cosine"
    """After warm-up, down to final_share at the last step; stable-decay holds the peak until decay_share of the steps is left."""
    final_share: float = 0.1
    decay_share: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """On matrices but the embedding; norms, biases and the embedding have none."""
    clip: float = 1.0
    """Of the gradients' norm, the model's and the indexers' each on its own; 0 clips nothing."""

    def __post_init__(self) -> None:
        require(
            self,
            learning_rate=(self.learning_rate > 0, "more than 0"),
            warmup_steps=(self.warmup_steps >= 0, "at least 0"),
            final_share=(0 <= self.final_share <= 1, "in [0, 1]"),
            decay_share=(0 < self.decay_share <= 1, "in (0, 1]"),
            beta1=(0 <= self.beta1 < 1, "in [0, 1)"),
            beta2=(0 <= self.beta2 < 1, "in [0, 1)"),
            epsilon=(self.epsilon > 0, "more than 0"),
            weight_decay=(self.weight_decay >= 0, "at least 0"),
            clip=(self.clip >= 0, "at least 0"),
        )


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of step `step` (from 0) of `steps`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    return config.learning_rate * (config.final_share + (1 - config.final_share) * _height(config, step, steps))


def _height(config: OptimizerConfig, step: int, steps: int) -> float:
    """From 1 after warm-up to 0 at the last step, in the schedule's shape."""
    left = (steps - step) / max(steps - config.warmup_steps, 1)
    match config.schedule:
        case "constant":
            return 1.0
        case "cosine":
            return 0.5 * (1 - math.cos(math.pi * left))
        case "linear":
            return left
        case "stable-decay":
            return min(left / config.decay_share, 1.0)


def is_indexer(name: str) -> bool:
    """Whether a parameter belongs to an indexer."""
    return ".indexer." in name


class Optimizer:
    """AdamW over the parameters that require gradients, by name.

    A parameter that is not float32 has a float32 master: gradients are added up in float32 over the micro-batches of a step,
    the master takes the step, and the parameter its rounded copy.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig):
        self.config = config
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = {name: _master(p) for name, p in self.parameters.items()}
        self._hooks = [self._add_in_float32(name) for name, p in self.parameters.items() if self.masters[name] is not p]
        decayed = [p for name, p in self.masters.items() if p.dim() >= 2 and "embed" not in name]
        others = [p for name, p in self.masters.items() if not (p.dim() >= 2 and "embed" not in name)]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=True,
        )
        for master in self.masters.values():
            self.adam.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }

    def step(self, rate: float) -> None:
        """One update at this learning rate, from the gradients added up so far; they are cleared."""
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self.round_masters()

    @torch.no_grad()
    def round_masters(self) -> None:
        """Give every parameter the rounded copy of its master."""
        names = [name for name, parameter in self.parameters.items() if self.masters[name] is not parameter]
        if names:
            rounded: list[Tensor] = [self.parameters[name] for name in names]
            exact = [self.masters[name] for name in names]
            torch._foreach_copy_(rounded, exact)  # pyright: ignore[reportPrivateImportUsage]

    def gradients(self, indexers: bool) -> list[Tensor]:
        """The gradients of the indexers, or of everything else."""
        return [p.grad for name, p in self.masters.items() if p.grad is not None and is_indexer(name) == indexers]

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts by name: the tensors themselves, to save from and to load into."""
        return {f"{name}.{part}": x for name, master in self.masters.items() for part, x in self.adam.state[master].items()}

    def _add_in_float32(self, name: str) -> torch.utils.hooks.RemovableHandle:
        master = self.masters[name]

        def add(parameter: Tensor) -> None:
            if parameter.grad is not None:
                master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
                parameter.grad = None

        return self.parameters[name].register_post_accumulate_grad_hook(add)


def _master(parameter: nn.Parameter) -> Tensor:
    if parameter.dtype == torch.float32:
        return parameter
    return parameter.detach().float().requires_grad_()


def clip_(gradients: Iterable[Tensor], norm: Tensor, limit: float) -> None:
    """Scale gradients whose joint norm is `norm` down to the limit; 0 leaves them."""
    if limit > 0:
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        if parts := list(_local(gradients)):
            torch._foreach_mul_(parts, scale)  # pyright: ignore[reportPrivateImportUsage]


def squared_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The sum of squares of what this rank holds of the gradients, a float32 scalar (0 where there are none)."""
    parts = [part.float() for part in _local(gradients)]
    if not parts:
        return torch.zeros(())
    return torch.stack(list(torch._foreach_norm(parts))).square().sum()  # pyright: ignore[reportPrivateImportUsage]


def _local(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """A sharded tensor's own part; any other as it is."""
    for tensor in tensors:
        yield tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[attr-defined]
