"""Teach a checkpoint to think while it uses tools: data under the paper's system prompts, verified, then fine-tuned on.

    rorqual cold-start --init runs/tiny/model --tasks runs/tasks --out runs/cold --source=gold --sft.epochs=3 --sft.length=1024

--source: sampled (the checkpoint's own accepted attempts), gold (the tasks' solutions, with generated thoughts), or both.
"""

from __future__ import annotations

import argparse

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="a TOML file with a table [cold_start]; overrides follow as --field=value")
    parser.add_argument("--init", required=True, help="the checkpoint to teach")
    parser.add_argument("--tasks", required=True, nargs="+", help="directories that rorqual synthesize made")
    parser.add_argument("--out", required=True, help="the stage's directory")
    parser.add_argument("--split", default="train", choices=("train", "all"), help="of the tasks; the rest is for evaluation")
    parser.add_argument(
        "--judge", help="who scores writing by rubrics: an endpoint's address, or a TOML file with a table [judge]"
    )
    parser.add_argument("--isolation", default="bwrap", help="of the tasks' worlds: bwrap, process or inline")
    parser.add_argument("--device", default=None, help="cpu or cuda; a GPU is taken where there is one")
    parser.add_argument("--quiet", action="store_true")


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from rorqual.config import load
    from rorqual.parallel.world import ParallelConfig, start, stop
    from rorqual.rewards.judging import open_judge
    from rorqual.stages import cold_start
    from rorqual.stages.task_set import open_tasks
    from rorqual.train.loop import Site

    config = load(cold_start.Config, args.recipe, args.overrides, table="cold_start" if args.recipe else "")
    tasks = open_tasks([Path(path) for path in args.tasks], args.isolation, args.split, open_judge(args.judge))
    world = start(ParallelConfig(), args.device)
    out = Path(args.out)
    try:
        model = cold_start.main(config, Path(args.init), tasks, Site.open(out, world, args.quiet))
    finally:
        stop()
    if world.is_main:
        print(f"checkpoint: {model}")
