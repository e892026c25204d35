"""Post-training in the paper's order [V3.2, 3.1 to 3.3]: tasks, cold start, specialists, distillation, one mixed RL stage, and
what each was worth on held-out tasks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from rorqual.parallel.world import World
from rorqual.runlog import RunLog
from rorqual.stages import cold_start as cold_start_stage
from rorqual.stages import distill as distill_stage
from rorqual.stages import grpo, held_out, synthesize
from rorqual.stages import specialists as specialists_stage
from rorqual.stages.task_set import TaskSet, open_tasks
from rorqual.train.loop import Site


@dataclass(frozen=True)
class Config:
    """A stage whose table is missing is left out."""

    synthesis: synthesize.Config
    cold_start: cold_start_stage.Config | None = None
    specialists: specialists_stage.Config | None = None
    distill: distill_stage.Config | None = None
    mixed: grpo.Config | None = None
    """The mixed RL stage: all domains at once."""
    mixed_threads: int | None = None
    """Of the mixed stage's arithmetic on CPU. Small models run sooner on one: their operations are too short to be shared."""
    evaluation: held_out.Config | None = None
    isolation: str = "bwrap"
    """Of the worlds that post-training plays in; inline is for programs that this package wrote itself."""


def main(config: Config, base: Path, directory: Path, world: World, log: RunLog, quiet: bool = False) -> Path:
    """All stages that have a table, from the checkpoint `base`; the last one's checkpoint."""
    if world.is_main:
        synthesize.main(config.synthesis, directory / "tasks", log)
    world.barrier()
    stores = synthesize.trained_on(config.synthesis, directory / "tasks")
    made = trained(config, base, open_tasks(stores, config.isolation), directory, world, quiet) if stores else {}
    made = {base.parent.name: base, **made}
    final = next((stage for stage in ("mixed", "distill", "cold-start") if stage in made), base.parent.name)
    made[final] = model = made.pop(final)  # last, where the evaluation looks for the finished model
    if config.evaluation and stores and world.is_main:
        held_out.main(config.evaluation, made, stores, directory / "evaluation", log)
    world.barrier()
    return model


def trained(config: Config, base: Path, tasks: TaskSet, directory: Path, world: World, quiet: bool) -> dict[str, Path]:
    """The checkpoint of every stage, in order, the specialists' too; the last is the finished model's."""

    def site(stage: str) -> Site:
        return Site.open(directory / stage, world, quiet)

    made: dict[str, Path] = {}
    model = base
    if config.cold_start:
        model = made["cold-start"] = cold_start_stage.main(config.cold_start, model, tasks, site("cold-start"))
    experts = specialists_stage.main(config.specialists, model, tasks, site("specialists")) if config.specialists else None
    made |= {f"specialist-{each.name}": each.model for each in specialists_stage.read_specialists(experts)} if experts else {}
    if config.distill and experts:
        model = made["distill"] = distill_stage.main(config.distill, model, experts, tasks, site("distill"))
    if config.mixed:
        with cpu_threads(config.mixed_threads):
            model = made["mixed"] = grpo.main(config.mixed, model, grpo.pool_of(tasks), site("mixed"))
    return made


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """So many threads for torch inside; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
