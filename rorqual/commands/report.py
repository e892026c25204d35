"""Make the page of a run anew: one HTML file, readable offline, from the run's files alone.

    rorqual report runs/tiny
    rorqual report runs/tiny --measure       first measure the finished model, where the run did not

The page is RUN/report.html. `rorqual run` writes it when it ends; this command is for a run that was stopped, or was made
before the page learned something new. --measure needs torch and the run's data, and takes about half a minute.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's directory, such as runs/tiny")
    parser.add_argument("--measure", action="store_true", help="measure what RUN/exhibits lacks of the finished model first")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def run(args: argparse.Namespace) -> int | None:
    from rorqual.report import page

    directory = Path(args.run)
    if args.measure:
        _measure(directory)
    path = page.write(directory)
    figures = {"page": str(path), "bytes": path.stat().st_size}
    print(json.dumps(figures) if args.json else f"{path}: {figures['bytes'] / 1e6:.1f} MB")


def _measure(directory: Path) -> None:
    from rorqual.errors import UserError
    from rorqual.runlog import EVENTS, RunLog
    from rorqual.train.exhibits import record_exhibits

    if not (directory / EVENTS).is_file():
        raise UserError(f"{directory}: no run (no {EVENTS}); make one with rorqual run RECIPE --out {directory}")
    log = RunLog(directory, quiet=True)
    try:
        record_exhibits(directory, directory / "model", log)
    finally:
        log.close()
