"""One optimiser step: micro-batches forward and backward, sums over ranks, clipping, the update."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rorqual.model.trace import Trace
from rorqual.parallel.world import World
from rorqual.train.balance import add_loads
from rorqual.train.objectives import Inputs, Objective, count_targets
from rorqual.train.optimizer import Optimizer, clip_, squared_norm


@dataclass
class Outcome:
    """What a step told. metrics: means over the global batch, by name; loads: layer -> int64 [E], of the global batch."""

    metrics: dict[str, float] = field(default_factory=dict)
    loads: dict[int, Tensor] = field(default_factory=dict)
    tokens: int = 0


def train_step(objective: Objective, optimizer: Optimizer, inputs: list[Inputs], world: World, step: int, rate: float) -> Outcome:
    """Move the weights by one step on a rank's micro-batches of the global batch; gradients are of the global mean."""
    counts = count_targets(inputs)
    counts = dict(zip(counts, world.sum(torch.stack(list(counts.values()))).unbind(), strict=True))
    least_one = {name: count.clamp(min=1) for name, count in counts.items()}
    sums: dict[str, Tensor] = {}
    traces: list[Trace] = []
    for part in inputs:
        losses = objective(part, least_one, step)
        losses.total.backward()
        for name, value in losses.sums.items():
            sums[name] = sums.get(name, 0) + value.detach()
        traces.append(losses.trace)

    norms = {}
    for indexers in (False, True):
        gradients = optimizer.gradients(indexers)
        squares = squared_norm(gradients).to(world.device)
        norm = world.sum(squares).sqrt()
        clip_(gradients, norm, optimizer.config.clip)
        norms["train/index_grad_norm" if indexers else "train/grad_norm"] = norm
    optimizer.step(rate)

    sums = dict(zip(sums, world.sum(torch.stack(list(sums.values()))).unbind(), strict=True)) if sums else {}
    loads = {layer: world.sum(load) for layer, load in add_loads(traces).items()}
    means = {f"train/{name}": value / least_one[_count_name(name)] for name, value in sums.items()}
    told = _on_host(means | norms | {"rows": counts["rows"]})
    rows = int(told.pop("rows"))
    by_layer = [value for name, value in told.items() if name.startswith("train/index_loss/")]
    metrics = told | ({"train/index_loss": sum(by_layer) / len(by_layer)} if by_layer else {}) | {"train/learning_rate": rate}
    return Outcome(metrics, loads, rows)


def _on_host(scalars: dict[str, Tensor]) -> dict[str, float]:
    """All in one transfer: a GPU that is asked for one number at a time stands idle in between."""
    return dict(zip(scalars, torch.stack([value.double() for value in scalars.values()]).tolist(), strict=True))


def _count_name(name: str) -> str:
    """Which count a loss is a mean over."""
    return {"loss": "targets", "mtp_loss": "mtp_targets", "balance_loss": "sequences"}.get(name, "rows")
