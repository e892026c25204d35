"""Teach a checkpoint to think while it uses tools: data under the paper's system prompts, verified, then fine-tuned on.

    rorqual cold-start --init runs/tiny/model --tasks runs/tasks --out runs/cold --source=gold --sft.epochs=3 --sft.length=1024

--source: sampled (the checkpoint's own accepted attempts), gold (the tasks' solutions, with generated thoughts), or both.
"""

from __future__ import annotations

import argparse

from rorqual.launch import add_task_options, work_on_tasks

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_task_options(parser, "cold_start", "the checkpoint to teach")


def run(args: argparse.Namespace) -> None:
    from rorqual.stages import cold_start

    if model := work_on_tasks(args, cold_start.Config, "cold_start", cold_start.main):
        print(f"checkpoint: {model}")
