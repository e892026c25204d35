"""Improve a checkpoint on tasks by GRPO, with the paper's stabilisers; a killed run goes on where it was.

Example: rorqual grpo --init runs/tiny/model --tasks runs/tasks --out runs/rl --pace.steps=50 --groups.size=8
"""

from __future__ import annotations

import argparse

from rorqual.errors import UsageError

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="a TOML file with a table [grpo]; overrides follow as --field=value")
    parser.add_argument("--init", required=True, help="the checkpoint to improve")
    parser.add_argument("--tasks", required=True, nargs="+", help="directories that rorqual synthesize made")
    parser.add_argument("--split", default="train", choices=("train", "all"), help="of the tasks; the rest is for evaluation")
    parser.add_argument("--out", required=True, help="the stage's directory")
    parser.add_argument("--domains", nargs="+", default=[], help="only tasks of these; all by default")
    parser.add_argument(
        "--judge", help="who scores writing by rubrics: an endpoint's address, or a TOML file with a table [judge]"
    )
    parser.add_argument("--isolation", default="bwrap", help="of the tasks' worlds: bwrap, process or inline")
    parser.add_argument(
        "--workers", default="1", help="ray or ray:N: environments are played on a Ray cluster's workers; 1: here"
    )
    parser.add_argument("--device", default=None, help="cpu or cuda; a GPU is taken where there is one")
    parser.add_argument("--quiet", action="store_true")


def run(args: argparse.Namespace) -> None:
    from dataclasses import replace
    from pathlib import Path

    from rorqual.config import load
    from rorqual.parallel.world import ParallelConfig, start, stop
    from rorqual.rewards.judging import open_judge
    from rorqual.stages import grpo
    from rorqual.stages.task_set import open_tasks
    from rorqual.tasks import open_episode
    from rorqual.train.loop import Site
    from rorqual.workers import Workers, open_stage

    workers = Workers.parse(args.workers)
    if workers.engine == "local" and workers.count > 1:
        raise UsageError(f"--workers {args.workers}: on one machine groups.concurrency says how many attempts go on at a time")
    config = load(grpo.Config, args.recipe, args.overrides, table="grpo" if args.recipe else "")
    world = start(ParallelConfig(), args.device)
    out = Path(args.out)
    try:
        tasks = open_tasks([Path(path) for path in args.tasks], args.isolation, args.split, open_judge(args.judge))
        with open_stage(workers) as stage:
            tasks = replace(tasks, opener=stage.remote(open_episode))
            pool = grpo.pool_of(tasks.of(args.domains) if args.domains else tasks)
            model = grpo.main(config, Path(args.init), pool, Site.open(out, world, args.quiet))
    finally:
        stop()
    if world.is_main:
        print(f"checkpoint: {model}")
