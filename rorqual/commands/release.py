"""Pack a run's checkpoint for others: bf16, with its model card, its conformance vectors and a hash of it all.

    rorqual release runs/tiny --out tiny.tar.gz
    rorqual release runs/tiny --out released/tiny --json        a directory instead of an archive

The archive's SHA-256 is printed, stands beside it in FILE.sha256, and is written to the run's log. What it holds:
rorqual/train/release.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's directory; its checkpoint is RUN/model")
    parser.add_argument("--out", required=True, metavar="FILE.tar.gz|DIR", help="where to; must not exist")
    parser.add_argument("--limit-mb", type=float, default=10.0, help="largest size of the checkpoint in megabytes")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int | None:
    from rorqual.errors import UsageError, UserError
    from rorqual.report.card import card
    from rorqual.report.reading import read_run
    from rorqual.runlog import RunLog, write_atomically
    from rorqual.train.release import is_archive, release

    if not args.limit_mb > 0:
        raise UsageError(f"--limit-mb: expected more than 0, found {args.limit_mb:g}")
    directory, out = Path(args.run), Path(args.out)
    found = read_run(directory)
    if not (directory / "model").is_dir():
        raise UserError(f"{directory}/model: no such checkpoint; the run has not ended: rorqual run goes on with it")
    released = release(directory / "model", out, card(found), int(args.limit_mb * 1e6))
    if is_archive(out):
        write_atomically(out.with_name(f"{out.name}.sha256"), f"{released.sha256}  {out.name}\n")
    log = RunLog(directory, quiet=True)
    log.event("released", file=out.name, sha256=released.sha256, bytes=released.bytes)
    log.close()
    if args.json:
        print(json.dumps(dataclasses.asdict(released) | {"path": str(out)}))
        return
    print(f"{out}: {released.bytes / 1e6:.1f} MB, of it {released.checkpoint_bytes / 1e6:.1f} MB weights")
    print(f"sha256 {released.sha256}")
