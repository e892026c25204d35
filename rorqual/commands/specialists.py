"""Train one specialist per domain from one checkpoint by GRPO, in turn or several side by side.

rorqual specialists --init runs/cold/sft/model --tasks tasks/maths tasks/search --out runs/specialists --grpo.pace.steps=50
rorqual specialists my.toml --init M --tasks T --out runs/specialists --side_by_side=2 --modes='["thinking", "direct"]'
"""

from __future__ import annotations

import argparse

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="a TOML file with a table [specialists]; overrides follow as --field=value")
    parser.add_argument("--init", required=True, help="the checkpoint they all start from")
    parser.add_argument("--tasks", required=True, nargs="+", help="directories that rorqual synthesize made")
    parser.add_argument("--out", required=True, help="the stage's directory; one below it for each specialist")
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
    from rorqual.stages import specialists
    from rorqual.stages.task_set import open_tasks
    from rorqual.train.loop import Site

    config = load(specialists.Config, args.recipe, args.overrides, table="specialists" if args.recipe else "")
    tasks = open_tasks([Path(path) for path in args.tasks], args.isolation, args.split, open_judge(args.judge))
    world = start(ParallelConfig(), args.device)
    out = Path(args.out)
    try:
        specialists.main(config, Path(args.init), tasks, Site.open(out, world, args.quiet))
    finally:
        stop()
    if world.is_main:
        for each in specialists.read_specialists(out):
            print(f"{each.name}: {each.model}")
