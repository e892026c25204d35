"""Supervised fine-tuning on conversations, as the cold start and the distillation need it [V3.2, 3.1 and 3.2.2].

Loss on what the assistant writes (from the encoder's own spans), packing with document bounds, thinking and non-thinking
conversations side by side, several epochs; the epoch that is best on held-out conversations is the one that is kept. Sparse
attention and the indexers' own loss go on as in sparse training.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch

from rorqual.chat import Tokenizer
from rorqual.data.conversations import Conversation, batch_of, packed_rows, read_conversations
from rorqual.errors import UserError, require
from rorqual.model.call import AttentionMode
from rorqual.model.transformer import Transformer
from rorqual.parallel.apply import ComputeConfig, parallelize
from rorqual.parallel.world import World
from rorqual.runlog import write_atomically
from rorqual.train.export import open_model, save_whole
from rorqual.train.lineage import Making, publish
from rorqual.train.loop import Pace, Site, run_steps
from rorqual.train.objectives import Inputs, Objective, ObjectiveConfig, count_targets
from rorqual.train.optimizer import Optimizer, OptimizerConfig, learning_rate
from rorqual.train.setup import begin, training_tensors
from rorqual.train.step import train_step

CONVERSATIONS = "conversations.jsonl"
"""The file in a directory of training data that a stage made."""


@dataclass(frozen=True)
class Config:
    epochs: int = 2
    rows: int = 16
    """Rows of a step, of all ranks together."""
    length: int = 4096
    """Tokens of a row; a conversation that is longer is left out, and counted."""
    micro_rows: int | None = None
    held_out_share: float = 0.05
    drop_thinking: bool = True
    checkpoint_every: int = 100
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-5, weight_decay=0.0))
    objective: ObjectiveConfig = field(
        default_factory=lambda: ObjectiveConfig(mtp_weight=0.1, balance_weight=0.0, quality_every=0)
    )
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        require(
            self,
            epochs=(self.epochs >= 1, "at least 1"),
            rows=(self.rows >= 1, "at least 1"),
            length=(self.length >= 8, "at least 8"),
            held_out_share=(0 <= self.held_out_share < 1, "in [0, 1)"),
        )


def main(config: Config, init: Path, data: Path, site: Site) -> Path:
    """Fine-tune the checkpoint `init` on a file of conversations; the finished checkpoint's directory."""
    begin(config, site, init)
    final = site.directory / "model"
    if final.is_dir():
        return final
    tokenizer = Tokenizer.open(init)
    found = read_conversations(data, tokenizer, config.length, config.held_out_share, config.drop_thinking)
    site.log.event("conversations", train=len(found.train), held_out=len(found.held_out), dropped=found.dropped)
    model = open_model(init).to(site.world.device)
    sparse = model.config.has_indexer
    mode = AttentionMode(sparse=sparse, form="absorbed" if sparse else "expanded")
    objective = Objective(model, config.objective, mode, "restricted" if sparse else "none")
    parallelize(objective, model, site.world, config.compute)
    optimizer = Optimizer(model, config.optimizer)
    per_epoch = math.ceil(len(packed_rows(found.train, config.length, f"{config.seed}/0")) / config.rows)
    pace = Pace(config.epochs * per_epoch, config.checkpoint_every)

    @lru_cache(maxsize=1)
    def rows_of(epoch: int) -> list[list[int]]:
        return packed_rows(found.train, config.length, f"{config.seed}/{epoch}")

    def one_step(step: int) -> dict[str, float]:
        epoch, at = divmod(step, per_epoch)
        rows = rows_of(epoch)
        # Epochs may pack into one row more or less; the last step takes what is left, and begins again where there is none.
        mine = [rows[i % len(rows)] for i in range(at * config.rows, (at + 1) * config.rows)]
        outcome = train_step(
            objective, optimizer, _inputs(found.train, mine, config, site.world), site.world, step,
            learning_rate(config.optimizer, step, pace.steps),
        )  # fmt: skip
        metrics = outcome.metrics
        if at + 1 == per_epoch:
            loss = held_out_loss(objective, found.held_out, config, site.world)
            metrics = metrics | {"sft/held_out_loss": loss}
            _keep_if_best(model, loss, epoch, init, config, site)
        return metrics

    run_steps("sft", pace, one_step, optimizer, training_tensors(model, optimizer), site)
    _publish(site, final, Making("sft", config, {"init": init, "data": data}, ranks=site.world.size))
    return final


def _inputs(samples: list[Conversation], rows: list[list[int]], config: Config, world: World) -> list[Inputs]:
    """This rank's micro-batches of a step."""
    mine = rows[world.data_rank :: world.data_size]
    size = config.micro_rows or len(mine)
    parts = [mine[i : i + size] for i in range(0, len(mine), size)]
    return [Inputs.of(batch_of(samples, part, config.length).to(world.device)).share(world) for part in parts]


@torch.no_grad()
def held_out_loss(objective: Objective, samples: list[Conversation], config: Config, world: World) -> float:
    """The mean loss over the trained tokens of held-out conversations; NaN where there are none.

    All ranks call the objective equally often, as its shards ask: one that has no row left computes along for nothing.
    """
    rows = packed_rows(samples, config.length, "held out")
    total, count = torch.zeros((), dtype=torch.float64, device=world.device), torch.zeros((), device=world.device)
    for at in range(0, len(rows), world.data_size):
        mine = at + world.data_rank
        inputs = Inputs.of(batch_of(samples, [rows[min(mine, len(rows) - 1)]], config.length).to(world.device)).share(world)
        counts = {name: value.clamp(min=1) for name, value in count_targets([inputs]).items()}
        loss = objective(inputs, counts).sums["loss"].double()
        if mine < len(rows):
            total, count = total + loss, count + counts["targets"]
    total, count = world.sum(total), world.sum(count)
    return float(total / count) if count else math.nan


def _keep_if_best(model: Transformer, loss: float, epoch: int, init: Path, config: Config, site: Site) -> None:
    """Keep this epoch's weights if no epoch before was better on held-out conversations (the last, where there are none)."""
    record = site.directory / "best.json"
    best = json.loads(record.read_text()) if record.exists() else None
    is_best = best is None or best["epoch"] >= epoch or math.isnan(loss) or loss <= best["loss"]
    site.world.barrier()  # every rank has read the record before the first one changes it
    if is_best:
        save_whole(model, site.directory / "best", config.compute.save_dtype, init, site.world)
        if site.world.is_main:
            write_atomically(record, json.dumps({"epoch": epoch, "loss": loss}))


def _publish(site: Site, final: Path, making: Making) -> None:
    best = site.directory / "best"
    if site.world.is_main:
        if not best.is_dir():
            raise UserError(f"{best}: no epoch was finished; start the stage again")
        publish(best, final, making)
    site.world.barrier()
