"""Dense pre-training [V3]: next-token and multi-token-prediction losses, loss-free expert balancing, AdamW."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rorqual.config import to_mapping
from rorqual.errors import require
from rorqual.model.call import AttentionMode
from rorqual.model.config import ModelConfig
from rorqual.model.transformer import Transformer
from rorqual.parallel.apply import ComputeConfig, parallelize
from rorqual.train.balance import imbalance, move_biases
from rorqual.train.export import export, finished
from rorqual.train.lineage import Making
from rorqual.train.loop import Pace, Place, run_steps
from rorqual.train.measures import Stopwatch
from rorqual.train.objectives import Objective, ObjectiveConfig
from rorqual.train.optimizer import Optimizer, OptimizerConfig, learning_rate
from rorqual.train.setup import BatchConfig, Feed, begin, check_vocabulary, mixture, training_tensors
from rorqual.train.step import train_step


@dataclass(frozen=True)
class Config:
    pace: Pace = field(default_factory=Pace)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    bias_step: float = 1e-3
    """gamma of the loss-free balancing rule; V3: 0.001, and 0 at its end."""
    seed: int = 0
    """Of the weights."""

    def __post_init__(self) -> None:
        require(self, bias_step=(self.bias_step >= 0, "at least 0"))


def main(config: Config, shape: ModelConfig, place: Place) -> Path:
    """Train a model of this shape from nothing, with dense attention; the finished checkpoint's directory."""
    begin(config, place)
    if done := finished(place):
        return done
    check_vocabulary(place.store, shape)
    feed = Feed(mixture(place.store, config.batch), config.batch, place.world)

    model = Transformer(shape, config.seed).to(place.world.device)
    objective = Objective(model, config.objective, AttentionMode(sparse=False, form="expanded"))
    parallelize(objective, model, place.world, config.compute)
    optimizer = Optimizer(model, config.optimizer)
    stopwatch = Stopwatch(shape, config.batch.length, False, place.world)

    def one_step(step: int) -> dict[str, float]:
        stopwatch.start()
        inputs = feed(step)
        rate = learning_rate(config.optimizer, step, config.pace.steps)
        outcome = train_step(objective, optimizer, inputs, place.world, step, rate)
        move_biases(model, outcome.loads, config.bias_step)
        return outcome.metrics | imbalance(outcome.loads) | stopwatch.lap(outcome.tokens)

    run_steps("pretrain", config.pace, one_step, optimizer, training_tensors(model, optimizer), place)
    return export(model, place, config.compute.save_dtype, Making("pretrain", config, settings={"model": to_mapping(shape)}))
