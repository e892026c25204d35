"""kill -9 at ten drawn moments inside the stages, and the run still ends with the bits of one that nobody killed.

Moments are steps of the stages, and file operations of the checkpoint that follows a step, so that every kill lands inside a
stage whatever the machine's speed; what each start then resumed from must be what the kill before it had left.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from tests.stages.test_resume import STAGES, Kill, assert_same_bits, kill, planned, run

SECONDS, QUICK_SECONDS = 150, 60


def main(quick: bool) -> dict[str, Any]:
    plan = [Kill("pretrain", 5, 0), Kill("extend", 3, 7), Kill("train-sparse", 2, 0)] if quick else planned(10, seed=3)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        run(whole)
        resumed = kill(killed, plan)
        assert_same_bits(whole, killed)
    inside = Counter(each.stage for each in plan)
    return {
        "kills_inside_stages": len(plan), "kills_by_stage": {stage: inside[stage] for stage in STAGES},
        "kills_while_a_checkpoint_was_saved": sum(each.operations > 0 for each in plan), "resumed_at_steps": resumed,
    }  # fmt: skip
