"""Train Speciale's recipe: verifier and generator of proofs in turn, then reasoning data with a reduced length penalty.

Example: rorqual speciale --init runs/sft/model --tasks runs/maths runs/proofs --out runs/speciale --iterations=2
Make proof tasks with rorqual synthesize --family proof; docs/proofs.md tells the recipe.
"""

from __future__ import annotations

import argparse

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="a TOML file with a table [speciale]; overrides follow as --field=value")
    parser.add_argument("--init", required=True, help="the checkpoint to train")
    parser.add_argument("--tasks", required=True, nargs="+", help="directories that rorqual synthesize made")
    parser.add_argument("--out", required=True, help="the directory of the stages")
    parser.add_argument("--isolation", default="bwrap", help="of programs that tasks run: bwrap, process or inline")
    parser.add_argument("--device", default=None, help="cpu or cuda; a GPU is taken where there is one")
    parser.add_argument("--quiet", action="store_true")


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from rorqual.config import load
    from rorqual.parallel.world import ParallelConfig, start, stop
    from rorqual.stages import speciale
    from rorqual.stages.task_set import open_tasks
    from rorqual.train.loop import Site

    config = load(speciale.Config, args.recipe, args.overrides, table="speciale" if args.recipe else "")
    world = start(ParallelConfig(), args.device)
    out = Path(args.out)
    try:
        tasks = open_tasks([Path(path) for path in args.tasks], args.isolation)
        model = speciale.main(config, Path(args.init), tasks, Site.open(out, world, args.quiet))
    finally:
        stop()
    if world.is_main:
        print(f"checkpoint: {model}")
