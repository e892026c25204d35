"""Turn text into a token store: corpora, duplicates removed, a held-out split, a tokenizer.

rorqual prepare tiny --out runs/data
rorqual prepare my.toml --out runs/data --prepare.vocab-size=8192
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a TOML file or a shipped recipe; its table [prepare] names the corpora")
    parser.add_argument("--out", required=True, help="the token store's directory")
    parser.add_argument("--json", action="store_true", help="print what became of every document as JSON")


def run(args: argparse.Namespace) -> int | None:
    from rorqual.runlog import RunLog
    from rorqual.stages import prepare
    from rorqual.stages.recipe import load_recipe

    out = Path(args.out)
    store = prepare.main(load_recipe(args.recipe, args.overrides).prepare, out, RunLog(out.with_name(out.name + "-log")))
    if args.json:
        print(json.dumps(store.facts))
        return
    for name, splits in store.facts["corpora"].items():
        counts = ", ".join(f"{split} {x['documents']:,} documents, {x['tokens']:,} tokens" for split, x in splits.items())
        print(f"{name}: {counts}")
        print(f"  {', '.join(f'{what} {n:,}' for what, n in store.facts['documents'][name].items())}")
