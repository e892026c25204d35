"""The mismatch laboratory's table, five seeds: which injection breaks plain GRPO and which stabiliser mends it.

The claim is that plain GRPO without an injection learns (its interval lies above where it began), that every cell ended with
finite weights, and that the table holds an interval for each injection and arm; what it says of each is a finding, not a claim.
The full form goes on with the cells that runs/mismatch-lab holds already.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from rorqual.stages import mismatch_lab as lab
from rorqual.stages.sorting import SortingConfig

SECONDS, QUICK_SECONDS = 2400, 30
SEEDS = 5
QUICK = lab.Config(
    seeds=2, steps=3, prompts=2, group=4, measured=16, injections=("none", "all"), task=SortingConfig(digits=3, lessons=8)
)


def main(quick: bool) -> dict[str, Any]:
    if not quick:
        config = lab.Config(seeds=SEEDS, side_by_side=_cores())
        return checked(lab.main(config, Path("runs/mismatch-lab")))
    with tempfile.TemporaryDirectory() as directory:
        return figures(lab.main(QUICK, Path(directory), quiet=True))


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def checked(table: dict[str, Any]) -> dict[str, Any]:
    """The figures of the full table, which must show that plain GRPO without an injection learns."""
    untouched = table["rows"][0]["clean"]["success"]
    assert untouched["low"] > table["start"]["high"], (untouched, table["start"])
    return figures(table)


def figures(table: dict[str, Any]) -> dict[str, Any]:
    assert table["finite"], "a run ended with weights that are no numbers"
    for row in table["rows"]:
        for each in (row["clean"]["success"], row["sampled"]["success"]):
            assert each["low"] <= each["mean"] <= each["high"], row
    curves = {name: {kind: each[kind] for kind in ("success", "mismatch", "entropy")} for name, each in table["curves"].items()}
    return {**table, "curves": curves}
