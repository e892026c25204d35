"""Pre-train a dense model from nothing.

    rorqual pretrain tiny --data runs/tiny/data --out runs/dense --pretrain.pace.steps=500

Data comes from rorqual prepare (or a run's data/). Started again on the same --out, it goes on where it was.
"""

from __future__ import annotations

import argparse

from rorqual.launch import add_text_options, train_on_text

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_text_options(parser, "pretrain", has_init=False)


def run(args: argparse.Namespace) -> None:
    from rorqual.stages import pretrain as stage

    train_on_text(args, "pretrain", lambda config, recipe, place: stage.main(config, recipe.model, place))
