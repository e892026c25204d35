"""Write golden vectors of the architecture for engine porters, or compare another implementation's tensors with them.

    rorqual conformance vectors
    rorqual conformance --check mine                      against the golden vectors
    rorqual conformance --check mine.safetensors --against vectors --partial

DIR gets a small model, inputs, every intermediate in float64 and float32, and a README that names each tensor. A check prints
one line per tensor, and exits with 1 where one differs or is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", nargs="?", help="where to write; must not exist, or be empty")
    parser.add_argument("--check", metavar="DIR", help="a directory of safetensors, or one file, to compare")
    parser.add_argument("--against", metavar="DIR", help="compare with these instead of with the golden vectors")
    parser.add_argument("--partial", action="store_true", help="tensors may be missing")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int | None:
    from rorqual.errors import UsageError

    if (args.directory is None) == (args.check is None):
        raise UsageError("expected DIR to write, or --check DIR to compare; see rorqual conformance --help")
    if args.check is None and (args.against or args.partial):
        raise UsageError("--against and --partial go with --check")
    return _write(args) if args.check is None else _check(args)


def _write(args: argparse.Namespace) -> None:
    from rorqual.model import conformance

    tensors = conformance.write(args.directory)
    figures = {"directory": args.directory, "tensors": {name: len(arrays) for name, arrays in tensors.items()}}
    if args.json:
        print(json.dumps(figures))
    else:
        counts = ", ".join(f"{count} {name}" for name, count in figures["tensors"].items())
        print(f"{args.directory}: {counts} tensors, the model, and README.md, which names each")


def _check(args: argparse.Namespace) -> int:
    from rorqual.model.conformance import FAILURES, check

    results = check(args.check, args.against)
    failures = [r for r in results if r.status in FAILURES and not (args.partial and r.status == "MISSING")]
    compared = [r for r in results if r.status not in ("MISSING", "extra")]
    passed = not failures and bool(compared)
    if args.json:
        print(json.dumps({"passed": passed, "compared": len(compared), "results": [dataclasses.asdict(r) for r in results]}))
        return 0 if passed else 1
    width = max(len(r.name) for r in results)
    for r in results:
        error = "" if r.error is None else f"{r.error:.1e} (at most {r.tolerance:.0e})"
        print(f"{r.name:<{width}}  {r.status:<11}  {error:<22}  {r.note}".rstrip())
    print(f"{len(compared)} compared, {len(failures)} failed" + ("" if compared else ": no tensor has a golden name"))
    return 0 if passed else 1
