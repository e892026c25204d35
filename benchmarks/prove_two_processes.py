"""Two gloo processes equal one (losses to 1e-5, weights to 1e-4) under FSDP2, expert and context parallelism, each alone and
both together; a checkpoint of one process is read by two, and the reverse. Runs the tests that hold it, slow ones included."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

SECONDS, QUICK_SECONDS = 240, 120


def main(quick: bool) -> dict[str, Any]:
    chosen = ["-k", "fsdp or read_by_two"] if quick else []
    command = [sys.executable, "-m", "pytest", "-q", "tests/parallel/test_two_processes.py", "-m", "multi", *chosen]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    summary = result.stdout.strip().splitlines()[-1]
    assert result.returncode == 0, result.stdout[-3000:]
    return {"pytest": summary}
