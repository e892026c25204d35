"""Train a checkpoint with warm indexers under sparse attention.

    rorqual train-sparse tiny --data runs/tiny/data --init runs/warm/model --out runs/sparse

Data comes from rorqual prepare (or a run's data/). Started again on the same --out, it goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rorqual.launch import add_text_options, train_on_text

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_text_options(parser, "train_sparse")


def run(args: argparse.Namespace) -> None:
    from rorqual.stages import train_sparse as stage

    train_on_text(args, "train_sparse", lambda config, recipe, place: stage.main(config, Path(args.init), place))
