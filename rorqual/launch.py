"""What the commands of stages share: their options, and the frame around a stage (settings, tasks, processes, log).

Imports wait until a command runs, so that --help needs no torch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rorqual.stages.recipe import Recipe
    from rorqual.stages.task_set import TaskSet
    from rorqual.train.loop import Place, Site


def add_text_options(parser: argparse.ArgumentParser, table: str, has_init: bool = True) -> None:
    """Of a stage that trains on text, as a recipe's table says. has_init: whether it starts from a checkpoint."""
    add = parser.add_argument
    add("recipe", help=f"a TOML file or a shipped recipe with a table [{table}]")
    add("--data", required=True, help="a token store")
    if has_init:
        add("--init", required=True, help="the checkpoint to start from")
    add("--out", required=True, help="the stage's directory: log, checkpoints, finished model")
    add("--quiet", action="store_true", help="no progress on the console")
    add("--json", action="store_true", help="print the last step's metrics as JSON")


def train_on_text(args: argparse.Namespace, table: str, stage: Callable[[Any, Recipe, Place], Path]) -> None:
    """Run `stage` with its table's settings, the recipe and its place, and print the checkpoint that it gives back.

    Raises UserError where the recipe has no such table.
    """
    from rorqual.data.store import TokenStore
    from rorqual.errors import UserError
    from rorqual.parallel.world import start, stop
    from rorqual.runlog import read_events
    from rorqual.stages.recipe import load_recipe
    from rorqual.train.loop import Place

    recipe = load_recipe(args.recipe, args.overrides)
    config = getattr(recipe, table)
    if config is None:
        raise UserError(f"{args.recipe}: has no table [{table}]")
    world = start(recipe.parallel, recipe.device)
    try:
        model = stage(config, recipe, Place.open(Path(args.out), TokenStore(Path(args.data)), world, args.quiet))
    finally:
        stop()
    if world.is_main:
        last = next(iter(read_events(args.out, "metrics")[::-1]), {})
        print(json.dumps({"model": str(model), **last}) if args.json else f"checkpoint: {model}")


def add_task_options(parser: argparse.ArgumentParser, table: str, init: str, out: str = "the stage's directory") -> None:
    """Of a stage that works on tasks. init, out: what its checkpoint and its directory are for."""
    add = parser.add_argument
    add("recipe", nargs="?", help=f"a TOML file with a table [{table}]; overrides follow as --field=value")
    add("--init", required=True, help=init)
    add("--tasks", required=True, nargs="+", help="directories that rorqual synthesize made")
    add("--out", required=True, help=out)
    add("--split", default="train", choices=("train", "all"), help="of the tasks; the rest is for evaluation")
    add("--judge", help="who scores writing by rubrics: an endpoint's address, or a TOML file with a table [judge]")
    add("--isolation", default="bwrap", help="of the tasks' worlds: bwrap, process or inline")
    add("--device", default=None, help="cpu or cuda; a GPU is taken where there is one")
    add("--quiet", action="store_true")


def work_on_tasks(
    args: argparse.Namespace, config_type: type, table: str, stage: Callable[[Any, Path, TaskSet, Site], Path]
) -> Path | None:
    """Run `stage` with its settings, the checkpoint, the tasks and its place; what it gives back, None on other ranks."""
    from rorqual.config import load
    from rorqual.parallel.world import ParallelConfig, start, stop
    from rorqual.rewards.judging import open_judge
    from rorqual.stages.task_set import open_tasks
    from rorqual.train.loop import Site

    config = load(config_type, args.recipe, args.overrides, table=table if args.recipe else "")
    tasks = open_tasks([Path(path) for path in args.tasks], args.isolation, args.split, open_judge(args.judge))
    world = start(ParallelConfig(), args.device)
    try:
        made = stage(config, Path(args.init), tasks, Site.open(Path(args.out), world, args.quiet))
    finally:
        stop()
    return made if world.is_main else None
