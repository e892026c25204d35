"""Sparse training [V3.2, 2.1.1]: every query attends to the top-k keys of its indexer, and everything is trained.

model:    next-token loss (and MTP), through the selected keys
indexers: sum_t KL(p_{t,S_t} || softmax(I_{t,S_t})), both restricted to the selection S_t and renormalised
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rorqual.errors import UserError, require
from rorqual.model.call import AttentionMode
from rorqual.parallel.apply import ComputeConfig, parallelize
from rorqual.train.balance import imbalance, move_biases
from rorqual.train.export import export, finished, open_model
from rorqual.train.lineage import Making
from rorqual.train.loop import Pace, Place, run_steps
from rorqual.train.measures import Stopwatch
from rorqual.train.objectives import Objective, ObjectiveConfig
from rorqual.train.optimizer import Optimizer, OptimizerConfig, learning_rate
from rorqual.train.setup import BatchConfig, Feed, begin, mixture, training_tensors
from rorqual.train.step import train_step


@dataclass(frozen=True)
class Config:
    pace: Pace = field(default_factory=lambda: Pace(steps=15000))
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=7.3e-6, schedule="constant"))
    """The paper: 7.3e-6 throughout."""
    objective: ObjectiveConfig = field(default_factory=lambda: ObjectiveConfig(mtp_weight=0.1))
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    bias_step: float = 0.0
    """V3's value at the end of its pre-training; V3.2 does not say."""
    dense: bool = False
    """The control: the same tokens with dense attention and no KL."""

    def __post_init__(self) -> None:
        require(self, bias_step=(self.bias_step >= 0, "at least 0"))


def main(config: Config, init: Path, place: Place) -> Path:
    """Train the checkpoint `init`, whose indexers are warm; the finished checkpoint's directory."""
    begin(config, place, init)
    if done := finished(place):
        return done
    feed = Feed(mixture(place.store, config.batch), config.batch, place.world)
    model = open_model(init).to(place.world.device)
    if not model.config.has_indexer:
        raise UserError(f"{init}: has no indexer; warm one first with rorqual warm-indexer")
    if config.dense:
        mode, index_loss = AttentionMode(sparse=False, form="expanded"), "none"
    else:
        mode, index_loss = AttentionMode(sparse=True), "restricted"
    objective = Objective(model, config.objective, mode, index_loss)
    parallelize(objective, model, place.world, config.compute)
    optimizer = Optimizer(model, config.optimizer)
    stopwatch = Stopwatch(model.config, config.batch.length, not config.dense, place.world)

    def one_step(step: int) -> dict[str, float]:
        stopwatch.start()
        inputs = feed(step)
        rate = learning_rate(config.optimizer, step, config.pace.steps)
        outcome = train_step(objective, optimizer, inputs, place.world, step, rate)
        move_biases(model, outcome.loads, config.bias_step)
        return outcome.metrics | imbalance(outcome.loads) | stopwatch.lap(outcome.tokens)

    run_steps("train-sparse", config.pace, one_step, optimizer, training_tensors(model, optimizer), place)
    return export(model, place, config.compute.save_dtype, Making("train_sparse", config, {"init": init}))
