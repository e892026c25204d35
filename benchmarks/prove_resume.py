"""kill -9 at ten random moments, and the run still ends with the bits of one that nobody killed: every stage's weights."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from rorqual.runlog import read_events
from tests.stages.test_resume import STAGES, assert_same_bits, kill_at_random, run

SECONDS, QUICK_SECONDS = 240, 90


def main(quick: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        began = time.monotonic()
        run(whole)
        seconds = time.monotonic() - began
        kills = 3 if quick else 10
        hits = kill_at_random(killed, kills, 0.6 * seconds, seed=4)
        assert hits >= kills // 2, f"only {hits} of {kills} kills hit the run"
        assert_same_bits(whole, killed)
        resumed = {stage: [event["step"] for event in read_events(killed / stage, "resumed")] for stage in STAGES}
    assert any(resumed.values()), "no kill fell between a stage's checkpoints: nothing was resumed, so nothing is proved"
    return {"kills": hits, "uninterrupted_seconds": round(seconds, 1), "resumed_at_steps": resumed}
