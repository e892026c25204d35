"""Run every gate of stored tasks again: rorqual validate runs/tasks

Nothing stored is trusted: databases, tools, solutions and verifiers run confined. Exit status 1 where any gate fails.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="a store that rorqual synthesize made")
    parser.add_argument("--limit", type=int, default=0, help="only the first so many tasks")
    parser.add_argument("--isolation", default="bwrap", help="a back end of the sandbox, or inline for tasks that you trust")
    parser.add_argument("--workers", type=int, default=1, help="tasks at a time")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(args: argparse.Namespace) -> int:
    from rorqual.errors import UserError
    from rorqual.synthesis import maker
    from rorqual.tasks import Store

    store = Store(args.directory)
    worlds, tasks = store.worlds(), store.tasks()[: args.limit or None]
    if not tasks:
        raise UserError(f"{args.directory}: holds no task")

    def gates(task: Any) -> list[Any]:
        return maker(task.family).regate(task, worlds.get(task.world), args.isolation)

    with ThreadPoolExecutor(args.workers) as pool:
        results = dict(zip((task.id for task in tasks), pool.map(gates, tasks), strict=True))
    failed = {name: [g.to_json() for g in found if not g.passed] for name, found in results.items()}
    failed = {name: found for name, found in failed.items() if found}
    passed = Counter(g.name for found in results.values() for g in found if g.passed)
    if args.json:
        print(json.dumps({"tasks": len(tasks), "failed": failed, "passed_by_gate": dict(passed)}))
    else:
        _print(len(tasks), failed, passed)
    return 1 if failed else 0


def _print(count: int, failed: dict[str, list[dict[str, Any]]], passed: Counter[str]) -> None:
    for gate, number in passed.items():
        print(f"{gate:>22}  {number} of {count}")
    for name, gates in failed.items():
        for gate in gates:
            print(f"{name}: {gate['name']} fails: {gate['detail']}")
    print(f"{count - len(failed)} of {count} tasks pass every gate")
