"""Context extension: YaRN stretches the rotary angles, and training goes on with longer rows [V3; YaRN, arXiv 2309.00071]."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from rorqual.errors import UserError, require
from rorqual.model.call import AttentionMode
from rorqual.model.config import YarnConfig
from rorqual.parallel.apply import ComputeConfig, parallelize
from rorqual.train.balance import imbalance, move_biases
from rorqual.train.export import export, finished, open_model, with_shape
from rorqual.train.lineage import Making
from rorqual.train.loop import Pace, Place, run_steps
from rorqual.train.measures import Stopwatch
from rorqual.train.objectives import Objective, ObjectiveConfig
from rorqual.train.optimizer import Optimizer, OptimizerConfig, learning_rate
from rorqual.train.setup import BatchConfig, Feed, begin, mixture, training_tensors
from rorqual.train.step import train_step


@dataclass(frozen=True)
class Config:
    factor: float = 4.0
    """By how much the context grows; YaRN's factor."""
    pace: Pace = field(default_factory=Pace)
    batch: BatchConfig = field(default_factory=BatchConfig)
    """Its length is the extended context."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=7.3e-6, schedule="constant"))
    objective: ObjectiveConfig = field(default_factory=lambda: ObjectiveConfig(mtp_weight=0.1))
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    bias_step: float = 0.0

    def __post_init__(self) -> None:
        require(self, factor=(self.factor >= 1, "at least 1"), bias_step=(self.bias_step >= 0, "at least 0"))


def main(config: Config, init: Path, place: Place) -> Path:
    """Train the checkpoint `init` on longer rows, with dense attention; the finished checkpoint's directory.

    Raises UserError where the checkpoint is stretched already, or the rows are longer than the extended context.
    """
    begin(config, place, init)
    if done := finished(place):
        return done
    feed = Feed(mixture(place.store, config.batch), config.batch, place.world)
    model = open_model(init)
    old = model.config
    if old.yarn is not None:
        raise UserError(f"{init}: its context is extended already (YaRN factor {old.yarn.factor})")
    longest = round(old.max_positions * config.factor)
    if config.batch.length > longest:
        raise UserError(f"extend: rows of {config.batch.length} exceed the extended context {longest}; raise extend.factor")
    shape = replace(old, yarn=YarnConfig(config.factor, old.max_positions), max_positions=longest)
    model = with_shape(model, shape).to(place.world.device)
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

    run_steps("extend", config.pace, one_step, optimizer, training_tensors(model, optimizer), place)
    return export(model, place, config.compute.save_dtype, Making("extend", config, {"init": init}))
