"""Dense warm-up of the indexers [V3.2, 2.1.1]: the model is frozen and attends densely; indexers learn where it looks.

L = sum_t KL(p_t || softmax(I_t)),  p_t: the main attention's probabilities, summed over heads, L1-normalised
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rorqual.errors import require
from rorqual.model.call import AttentionMode
from rorqual.parallel.apply import ComputeConfig, parallelize
from rorqual.train.export import export, finished, open_model, with_indexers
from rorqual.train.lineage import Making
from rorqual.train.loop import Pace, Place, run_steps
from rorqual.train.measures import Stopwatch
from rorqual.train.objectives import Objective, ObjectiveConfig
from rorqual.train.optimizer import Optimizer, OptimizerConfig, is_indexer, learning_rate
from rorqual.train.setup import BatchConfig, Feed, begin, mixture, training_tensors
from rorqual.train.step import train_step


@dataclass(frozen=True)
class Config:
    pace: Pace = field(default_factory=lambda: Pace(steps=1000))
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-3, schedule="constant", weight_decay=0.0)
    )
    """The paper: 1e-3 for 1000 steps; schedule and decay are ours (unpublished)."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Its index weight and how often the selection is measured; the other losses are not there."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    index_topk: int | None = None
    index_n_heads: int | None = None
    index_head_dim: int | None = None
    """Of the model to be; None keeps the checkpoint's (for a checkpoint without indexers: the release's 2048, 64, 128)."""
    seed: int = 0
    """Of the indexers' weights, where the checkpoint has none."""

    def __post_init__(self) -> None:
        sizes = ("index_topk", "index_n_heads", "index_head_dim")
        require(self, **{name: ((getattr(self, name) or 1) >= 1, "at least 1, or none") for name in sizes})


def main(config: Config, init: Path, place: Place) -> Path:
    """Train the indexers of the checkpoint `init` alone (drawn anew where it has none); the finished checkpoint's directory."""
    begin(config, place, init)
    if done := finished(place):
        return done
    feed = Feed(mixture(place.store, config.batch), config.batch, place.world)
    # Nothing but indexers will change, so one process need not hold the model in more than the compute dtype.
    dtype = config.compute.dtype if place.world.size == 1 else "float32"
    model = with_indexers(open_model(init, dtype), _index_shape(config), config.seed).to(place.world.device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_indexer(name))

    objective = Objective(model, config.objective, AttentionMode(sparse=False, form="expanded"), index_loss="dense")
    parallelize(objective, model, place.world, config.compute)
    optimizer = Optimizer(model, config.optimizer)
    stopwatch = Stopwatch(model.config, config.batch.length, False, place.world)

    def one_step(step: int) -> dict[str, float]:
        stopwatch.start()
        inputs = feed(step)
        rate = learning_rate(config.optimizer, step, config.pace.steps)
        outcome = train_step(objective, optimizer, inputs, place.world, step, rate)
        return outcome.metrics | stopwatch.lap(outcome.tokens)

    run_steps("warm-indexer", config.pace, one_step, optimizer, training_tensors(model, optimizer), place)
    return export(model, place, config.compute.save_dtype, Making("warm_indexer", config, {"init": init}))


def _index_shape(config: Config) -> dict[str, int]:
    """The indexer sizes that the config sets."""
    names = ("index_topk", "index_n_heads", "index_head_dim")
    return {name: getattr(config, name) for name in names if getattr(config, name) is not None}
