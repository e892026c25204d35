"""Extend a checkpoint to a longer context with YaRN.

    rorqual extend tiny --data runs/tiny/data --init runs/dense/model --out runs/longer

Data comes from rorqual prepare (or a run's data/). Started again on the same --out, it goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rorqual.launch import add_text_options, train_on_text

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_text_options(parser, "extend")


def run(args: argparse.Namespace) -> None:
    from rorqual.stages import extend as stage

    train_on_text(args, "extend", lambda config, recipe, place: stage.main(config, Path(args.init), place))
