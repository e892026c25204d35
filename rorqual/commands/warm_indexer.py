"""Warm up the indexers of a dense checkpoint; everything else is frozen.

    rorqual warm-indexer tiny --data runs/tiny/data --init runs/longer/model --out runs/warm

Data comes from rorqual prepare (or a run's data/). Started again on the same --out, it goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rorqual.launch import add_text_options, train_on_text

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_text_options(parser, "warm_indexer")


def run(args: argparse.Namespace) -> None:
    from rorqual.stages import warm_indexer as stage

    train_on_text(args, "warm_indexer", lambda config, recipe, place: stage.main(config, Path(args.init), place))
