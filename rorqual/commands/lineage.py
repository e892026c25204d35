"""Show what made a checkpoint: its stages, data, seeds and parents; or make it again from that record and compare the hashes.

    rorqual lineage runs/tiny/model
    rorqual lineage runs/sft/model --rebuild runs/again --given conversations.jsonl

Exits with 1 where a rebuilt part differs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a checkpoint or token store with a lineage.json, or that file")
    parser.add_argument("--rebuild", metavar="DIR", help="run every stage of the record again, below this directory")
    parser.add_argument("--given", nargs="*", default=[], metavar="PATH", help="where inputs lie that no stage made")
    parser.add_argument("--json", action="store_true", help="print the record, or the rebuild's report, as JSON")


def run(args: argparse.Namespace) -> int | None:
    from rorqual.train.lineage import read_lineage, tree

    if args.rebuild:
        return _rebuild(args)
    own, records = read_lineage(Path(args.model))
    print(json.dumps({"id": own, "records": records}) if args.json else "\n".join(tree(own, records)))


def _rebuild(args: argparse.Namespace) -> int:
    from rorqual.parallel.world import ParallelConfig, start, stop
    from rorqual.stages import rebuild

    world = start(ParallelConfig(), "cpu")
    try:
        report = rebuild.main(Path(args.model), Path(args.rebuild), [Path(path) for path in args.given], world)
    finally:
        stop()
    if args.json:
        print(json.dumps(report))
    else:
        for name, found in report["records"].items():
            print(f"{'same     ' if found['same'] else 'DIFFERENT'}  {found['stage']} {name}  {found['path']}")
    return 0 if report["same"] else 1
