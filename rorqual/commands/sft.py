"""Fine-tune a checkpoint on conversations; loss on what the assistant writes, best epoch by held-out loss.

Example: rorqual sft --init runs/tiny/model --data conversations.jsonl --out runs/sft --epochs=3 --length=512
"""

from __future__ import annotations

import argparse

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="a TOML file with a table [sft]; overrides follow as --field=value")
    parser.add_argument("--init", required=True, help="the checkpoint to fine-tune")
    parser.add_argument("--data", required=True, help='JSONL: {"messages": [...], "tools": [...], "thinking": true} a line')
    parser.add_argument("--out", required=True, help="the stage's directory")
    parser.add_argument("--device", default=None, help="cpu or cuda; a GPU is taken where there is one")
    parser.add_argument("--quiet", action="store_true")


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from rorqual.config import load
    from rorqual.parallel.world import ParallelConfig, start, stop
    from rorqual.stages import sft
    from rorqual.train.loop import Site

    config = load(sft.Config, args.recipe, args.overrides, table="sft" if args.recipe else "")
    world = start(ParallelConfig(), args.device)
    out = Path(args.out)
    try:
        model = sft.main(config, Path(args.init), Path(args.data), Site.open(out, world, args.quiet))
    finally:
        stop()
    if world.is_main:
        print(f"checkpoint: {model}")
