"""Make verified agent tasks: rorqual synthesize --family general --count 100 --out runs/tasks

Every task is proven by execution before it is kept, and stands in DIR/tasks.jsonl with the result of each gate. The same
command goes on where it was killed. With --endpoint, a model behind any OpenAI-compatible API plays the builder, the proposer and
the solver; without it, programs do. --set changes the family's own settings, such as --set compact_share=1.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from rorqual.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", help="general, search, code, interpreter; maths, logic, programming, writing or proof")
    parser.add_argument("--mix", choices=["paper"], help="the four agent families in the paper's proportions, each in DIR/FAMILY")
    parser.add_argument("--scale", type=float, default=0.02, help="with --mix: the share of the paper's 85,267 tasks")
    parser.add_argument("--count", type=int, help="how many accepted tasks")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the store is; a store that exists is added to")
    parser.add_argument("--seed", type=int, default=0, help="one seed gives one set, byte for byte")
    parser.add_argument("--workers", default="1", help="processes; ray: every processor of a Ray cluster; ray:N: so many of it")
    parser.add_argument(
        "--endpoint", metavar="URL", help="base URL of an OpenAI-compatible API; its key is read from OPENAI_API_KEY"
    )
    parser.add_argument("--model", default="", help="the model's name at the endpoint")
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="NAME=VALUE", help="a setting of the family"
    )
    parser.add_argument("--export", action="append", default=[], metavar="KIND=PATH",
                        help="also write parquet=FILE, jsonl=FILE, verifiers=DIR or harbor=DIR")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


PAPER = {"search": 50_275, "code": 24_667, "interpreter": 5_908, "general": 4_417}
"""Tasks by family: the paper's table of agentic tasks."""


def run(args: argparse.Namespace) -> int:
    if (args.family is None) == (args.mix is None):
        raise UsageError("expected one of --family and --mix")
    if args.mix is None:
        return make(args)
    if args.count is not None or args.settings or args.export:
        raise UsageError("--mix: --count, --set and --export belong to one family; use --scale")
    if not 0 < args.scale <= 1:
        raise UsageError(f"--scale {args.scale}: expected above 0, at most 1")
    for family, whole in PAPER.items():
        shares = {"family": family, "count": max(1, round(whole * args.scale)), "out": f"{args.out}/{family}"}
        if family == "code":
            shares["settings"] = ["grading=warm"]  # faults by the thousand; pairs are graded afresh all the same
        make(argparse.Namespace(**{**vars(args), **shares}))
    return 0


def make(args: argparse.Namespace) -> int:
    """One family."""
    from rorqual.runlog import RunLog
    from rorqual.synthesis import Request, maker
    from rorqual.tasks import Store
    from rorqual.workers import Workers

    if args.count is None or args.count < 1:
        raise UsageError("--count: expected at least 1")
    workers = Workers.parse(args.workers)
    if args.endpoint and workers.engine == "ray":
        raise UsageError("--workers ray: with --endpoint this process only waits for the model; give a number")
    log = RunLog(args.out, quiet=args.json)
    log.event("begin", command="synthesize", family=args.family, count=args.count, seed=args.seed)
    with log.progress(f"synthesize {args.family}", args.count) as bar:

        def advance(done: int, note: str) -> None:
            bar.advance(min(done, args.count) - bar.done, note)

        request = Request(
            args.count,
            Store(args.out),
            args.seed,
            workers.count,
            args.endpoint,
            args.model,
            tuple(args.settings),
            advance,
            workers.engine,
        )
        report = dict(maker(args.family).synthesize(request))
    log.event("synthesized", **report)
    for export in args.export:
        _export(request.store, export)
    if args.json:
        print(json.dumps(report))
    else:
        _print(report, args.out)
    return 0


def _export(store: Any, wish: str) -> None:
    from rorqual.tasks.exports import EXPORTS

    kind, _, path = wish.partition("=")
    if kind not in EXPORTS or not path:
        raise UsageError(f"--export {wish}: expected KIND=PATH with KIND one of {', '.join(EXPORTS)}")
    EXPORTS[kind](store, path)


def _print(report: dict, out: str) -> None:
    for name, value in report.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        print(f"{name:>16}  {text}")
    print(f"{'stored in':>16}  {out}", file=sys.stderr)
