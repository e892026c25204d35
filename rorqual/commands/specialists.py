"""Train one specialist per domain from one checkpoint by GRPO, in turn or several side by side.

rorqual specialists --init runs/cold/sft/model --tasks tasks/maths tasks/search --out runs/specialists --grpo.pace.steps=50
rorqual specialists my.toml --init M --tasks T --out runs/specialists --side_by_side=2 --modes='["thinking", "direct"]'
"""

from __future__ import annotations

import argparse

from rorqual.launch import add_task_options, work_on_tasks

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    out = "the stage's directory; one below it for each specialist"
    add_task_options(parser, "specialists", "the checkpoint they all start from", out)


def run(args: argparse.Namespace) -> None:
    from rorqual.stages import specialists

    if directory := work_on_tasks(args, specialists.Config, "specialists", specialists.main):
        for each in specialists.read_specialists(directory):
            print(f"{each.name}: {each.model}")
