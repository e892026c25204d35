"""Run a whole recipe, from text to a sparse model and its page; a killed run goes on where it was.

rorqual run tiny                                  two CPU cores, minutes; ends with runs/tiny/model and runs/tiny/report.html
rorqual run tiny --out runs/mine --pretrain.pace.steps=2000
rorqual run small --stop-after 500                a part of at most about 500 seconds; the same command goes on from there
torchrun --nproc-per-node 2 -m rorqual run small  the same stages, sharded
rorqual run mismatch-lab                          which mismatch breaks GRPO, and what mends it: a table and a page
"""

from __future__ import annotations

import argparse
import json

TAKES_OVERRIDES = True
LAB = "mismatch-lab"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", help="a TOML file, or the name of a shipped recipe (tiny, smoke, small, paper), or mismatch-lab"
    )
    parser.add_argument("--out", help="the run's directory; default runs/RECIPE")
    parser.add_argument("--plan", action="store_true", help="print memory, layout, time and cost of each stage; run nothing")
    parser.add_argument(
        "--stop-after",
        type=float,
        metavar="SECONDS",
        help="finish the step in hand and save it after so many seconds; exit status 1 until the run has ended",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on the console")
    parser.add_argument("--json", action="store_true", help="print the run's figures as JSON")


def run(args: argparse.Namespace) -> int | None:
    from rorqual.errors import UserError
    from rorqual.parallel.world import start, stop
    from rorqual.runlog import read_events
    from rorqual.stages import run as stage
    from rorqual.stages.recipe import load_recipe, run_directory

    if args.recipe == LAB:
        return _mismatch_lab(args)
    recipe = load_recipe(args.recipe, args.overrides)
    if args.plan:
        from rorqual.train.plan import plan, render

        found = plan(recipe.model, recipe.plan)
        print(json.dumps(found) if args.json else render(found))
        return
    if recipe.pretrain is None:
        raise UserError(f"{args.recipe}: has no table [pretrain], so there is nothing to run; --plan says what it would need")
    directory = run_directory(args.recipe, args.out)
    if args.stop_after is not None:
        _stop_after(args.stop_after)
    world = start(recipe.parallel, recipe.device)
    try:
        model = stage.main(recipe, directory, world, args.quiet)
    finally:
        stop()
    if not world.is_main:
        return
    samples = read_events(directory, "sample")[-len(recipe.sample.prompts) :]
    if args.json:
        print(json.dumps({"model": str(model), "samples": {event["prompt"]: event["text"] for event in samples}}))
        return
    for event in samples:
        print(f"{event['prompt']}|{event['text']}")
    print(f"checkpoint: {model}")
    print(f"page: {directory / 'report.html'}")


def _stop_after(seconds: float) -> None:
    """Let an alarm end the run: a training stage saves its step first, everything else is made again by the next part."""
    import signal

    from rorqual.errors import UserError

    if seconds <= 0:
        raise UserError(f"--stop-after {seconds:g}: expected more than 0 seconds")

    def stop(number: int, frame: object) -> None:
        # Not an error that a part of the run could take for its own.
        raise SystemExit(f"rorqual run: stopped after {seconds:g} seconds; the same command goes on from the last finished part")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _mismatch_lab(args: argparse.Namespace) -> None:
    from pathlib import Path

    from rorqual.config import load
    from rorqual.stages import mismatch_lab

    directory = Path(args.out or f"runs/{LAB}")
    table = mismatch_lab.main(load(mismatch_lab.Config, None, args.overrides), directory, args.quiet)
    if args.json:
        print(json.dumps({"page": str(directory / "mismatch.html"), "rows": table["rows"]}))
        return
    print(mismatch_lab.as_text(table))
    print(f"page: {directory / 'mismatch.html'}")
