"""Count what a model holds and costs: parameters, cache bytes per token, FLOPs and bytes by position, dense and sparse.

    rorqual inspect paper
    rorqual inspect runs/tiny/model --json
    rorqual inspect runs/tiny/model --lineage
    rorqual inspect paper --model.index_topk=1024 --positions 4096 131071

Takes a checkpoint directory, a config.json, or a recipe (its [model] table). Reads no weights, only the shards' headers.
"""

from __future__ import annotations

import argparse
import json

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL|RECIPE|config.json")
    parser.add_argument("--positions", type=int, nargs="+", help="positions to cost; by default powers of two up to the longest")
    parser.add_argument("--lineage", action="store_true", help="the stages, data and parents that made a checkpoint")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int | None:
    if args.lineage:
        from pathlib import Path

        from rorqual.train.lineage import read_lineage, tree

        own, records = read_lineage(Path(args.model))
        print(json.dumps({"id": own, "records": records}) if args.json else "\n".join(tree(own, records)))
        return
    from rorqual.model.inspection import figures, render

    found = figures(args.model, args.overrides, args.positions)
    print(json.dumps(found) if args.json else render(found))
