"""Train a checkpoint with warm indexers under sparse attention.

    rorqual train-sparse tiny --data runs/tiny/data --init runs/warm/model --out runs/sparse

Data comes from rorqual prepare (or a run's data/). Started again on the same --out, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a TOML file or a shipped recipe with a table [train_sparse]")
    parser.add_argument("--data", required=True, help="a token store")
    parser.add_argument("--init", required=True, help="the checkpoint to start from")
    parser.add_argument("--out", required=True, help="the stage's directory: log, checkpoints, finished model")
    parser.add_argument("--quiet", action="store_true", help="no progress on the console")
    parser.add_argument("--json", action="store_true", help="print the last step's metrics as JSON")


def run(args: argparse.Namespace) -> int | None:
    from rorqual.data.store import TokenStore
    from rorqual.errors import UserError
    from rorqual.parallel.world import start, stop
    from rorqual.runlog import read_events
    from rorqual.stages import train_sparse as stage
    from rorqual.stages.recipe import load_recipe
    from rorqual.train.loop import Place

    recipe = load_recipe(args.recipe, args.overrides)
    config = recipe.train_sparse
    if config is None:
        raise UserError(f"{args.recipe}: has no table [train_sparse]")
    world = start(recipe.parallel, recipe.device)
    place = Place.open(Path(args.out), TokenStore(Path(args.data)), world, args.quiet)
    try:
        model = stage.main(config, Path(args.init), place)
    finally:
        stop()
    if world.is_main:
        last = next(iter(read_events(args.out, "metrics")[::-1]), {})
        print(json.dumps({"model": str(model), **last}) if args.json else f"checkpoint: {model}")
