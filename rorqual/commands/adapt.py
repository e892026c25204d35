"""Turn a dense MLA checkpoint into a sparse (DSA) one, and report honestly whether quality held.

    rorqual adapt runs/dense/model runs/sparse-model
    rorqual adapt MODEL DST --config adapt-tiny --warm-indexer.pace.steps=1000
    torchrun --nproc-per-node 8 -m rorqual adapt MODEL DST --config my.toml

SRC is a deepseek_v3-architecture directory. Where it has no q_lora_rank the indexer takes its query from the hidden state,
and the result opens in Rorqual only. DST gets the checkpoint with quality.json and quality.html.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="the dense checkpoint")
    parser.add_argument("destination", help="where the sparse one goes")
    parser.add_argument(
        "--config",
        help="a TOML file with tables [prepare] [warm_indexer] [train_sparse] [quality], or the recipe adapt-tiny",
    )
    parser.add_argument("--work", help="where stages and logs lie; default DST-work")
    parser.add_argument("--overwrite", action="store_true", help="replace what stands at DST")
    parser.add_argument("--quiet", action="store_true", help="no progress on the console")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int | None:
    from rorqual.config import load
    from rorqual.errors import UserError
    from rorqual.model.hf_config import rorqual_only
    from rorqual.parallel.world import start, stop
    from rorqual.stages import adapt
    from rorqual.train.export import open_model

    config = load(adapt.Config, args.config, args.overrides)
    source, destination = Path(args.source), Path(args.destination)
    if destination.exists() and not args.overwrite:
        raise UserError(f"{destination}: exists already; choose another path, or give --overwrite")
    if not source.is_dir():
        raise UserError(f"{source}: no such checkpoint")
    work = Path(args.work) if args.work else destination.with_name(destination.name + "-work")
    world = start(config.parallel, config.device)
    try:
        report = adapt.main(config, source, destination, work, world, args.quiet)
    finally:
        stop()
    if not world.is_main:
        return
    if args.json:
        print(json.dumps(report))
        return
    for name, claim in report["verdict"]["claims"].items():
        print(f"{name}: {'void' if claim['holds'] == 'void' else 'holds' if claim['holds'] else 'does not hold'}")
    if rorqual_only(open_model(destination).config):
        print("this model has no q_lora_rank: with its indexers it opens in Rorqual only")
    print(f"checkpoint: {destination}\nreport: {destination / adapt.PAGE}")
