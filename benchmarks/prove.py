"""Run the long proofs and write benchmarks/results/NAME.json with the command, the commit and the machine.

    python -m benchmarks.prove [NAME ...] [--slice DAY] [--list]

A proof is a module benchmarks/prove_NAME.py with a docstring that states the claim, `SECONDS` (about how long it takes on
two cores), and `main(quick: bool) -> dict`: it raises AssertionError where the claim does not hold, and returns the figures.
RORQUAL_JOBS says how many processes may run side by side in proofs that are made of pieces, RORQUAL_WORK where they keep them.
`--slice N` runs quick forms, in turn from the N-th on, until four minutes are used: CI's rotating share.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rorqual.runlog import environment, write_atomically

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SLICE_SECONDS = 240


def jobs() -> int:
    """How many processes a proof that is made of pieces may run side by side: RORQUAL_JOBS, else two."""
    return max(1, int(os.environ.get("RORQUAL_JOBS", "2")))


@contextmanager
def workspace(name: str) -> Iterator[Path]:
    """Where a proof works: RORQUAL_WORK/NAME, with which it goes on where it was; else a directory that goes at its end."""
    if kept := os.environ.get("RORQUAL_WORK"):
        yield Path(kept) / name
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def names() -> list[str]:
    return sorted(path.stem.removeprefix("prove_") for path in HERE.glob("prove_*.py"))


def prove(name: str, quick: bool) -> bool:
    """Run one proof; keep its figures unless it is the quick form. True where the claim holds."""
    began = time.time()
    try:
        figures = importlib.import_module(f"benchmarks.prove_{name}").main(quick=quick)
    except Exception:
        traceback.print_exc()
        return False
    seconds = round(time.time() - began, 1)
    print(f"{name}: holds ({seconds} s)", flush=True)
    if not quick:
        told = {"command": f"python -m benchmarks.prove {name}", "date": time.strftime("%Y-%m-%d", time.gmtime(began))}
        record = {**told, "seconds": seconds, **environment(), "figures": figures}
        RESULTS.mkdir(exist_ok=True)
        write_atomically(RESULTS / f"{name}.json", json.dumps(record, indent=1, default=str) + "\n")
    return True


def rotating_slice(day: int) -> list[str]:
    """The proofs whose stated QUICK_SECONDS fit in the slice, from the day's place in the list on; at least one."""
    ring = names()[day % len(names()) :] + names()[: day % len(names())] if names() else []
    chosen, used = [], 0.0
    for name in ring:
        seconds = getattr(importlib.import_module(f"benchmarks.prove_{name}"), "QUICK_SECONDS", SLICE_SECONDS)
        if not chosen or used + seconds <= SLICE_SECONDS:
            chosen.append(name)
            used += seconds
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="which proofs; all of them by default")
    parser.add_argument("--slice", type=int, help="run quick forms from this place in the list on")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    if options.list:
        print(*names(), sep="\n")
        return 0
    quick = options.slice is not None
    chosen = rotating_slice(options.slice) if quick else options.names or names()
    failed = [name for name in chosen if not prove(name, quick)]
    print(f"{len(chosen) - len(failed)} passed, {len(failed)} failed" + (f": {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
