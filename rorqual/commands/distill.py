"""Make one model of the specialists: from their verified attempts (SFT), or on the student's own samples (reverse KL).

rorqual distill --init runs/cold/sft/model --specialists runs/specialists --tasks tasks/maths tasks/search --out runs/distilled
rorqual distill --init M --specialists S --tasks T --out runs/distilled --method=on_policy --on_policy.pace.steps=50
"""

from __future__ import annotations

import argparse

from rorqual.launch import add_task_options, work_on_tasks

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_task_options(parser, "distill", "the checkpoint that becomes the generalist")
    parser.add_argument("--specialists", required=True, help="the directory that rorqual specialists made")


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from rorqual.stages import distill

    teachers = Path(args.specialists)
    model = work_on_tasks(
        args, distill.Config, "distill", lambda config, init, tasks, site: distill.main(config, init, teachers, tasks, site)
    )
    if model:
        print(f"checkpoint: {model}")
