"""An evaluation killed (SIGKILL) at random moments and resumed gives the same table as one that was left alone."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SECONDS = 150
QUICK_SECONDS = 40
SAME = (
    "score",
    "passed_attempts",
    "pass_at_k",
    "majority",
    "mean_steps",
    "outcomes",
    "accounts",
    "by_task",
    "curve",
    "not_played",
)


def command(out: Path, tasks: int) -> list[str]:
    return [
        sys.executable, "-m", "rorqual", "evaluate", "--benchmark", "ruler", "--count", str(tasks), "--length", "2000",
        "--policy", "program:failing", "--n", "4", "--k", "1", "4", "--out", str(out), "--json", "--concurrency", "4",
    ]  # fmt: skip


def result(out: Path) -> dict:
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return {name: found[name] for name in SAME}


def killed_until_done(out: Path, tasks: int, draw: random.Random, longest_s: float) -> int:
    """Start, kill after a random time, start again, until it ends by itself; how many kills it took."""
    for kills in range(200):
        child = subprocess.Popen(command(out, tasks), stdout=subprocess.DEVNULL)
        try:
            child.wait(timeout=draw.uniform(0.3, longest_s))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            continue
        assert child.returncode == 0
        return kills
    raise AssertionError("200 kills, and no end")


def main(quick: bool) -> dict:
    tasks, rounds = (100, 1) if quick else (250, 5)
    draw, kills, stored = random.Random(0), [], []
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder) / "alone"
        began = time.monotonic()
        subprocess.run(command(alone, tasks), check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - began
        for number in range(rounds):
            out = Path(folder) / f"killed-{number}"
            kills.append(killed_until_done(out, tasks, draw, max(1.5, 0.7 * seconds)))
            assert result(out) == result(alone), f"round {number}: another table after {kills[-1]} kills"
            stored.append(sum(1 for _ in (out / "attempts").rglob("*.npz")))
            assert stored[-1] == 4 * tasks and not list((out / "attempts").rglob("*.part.npz"))
        assert sum(kills) > 0, "no run was killed"
        found = result(alone)
    return {
        "attempts": 4 * tasks, "seconds_alone": round(seconds, 1), "kills_by_round": kills,
        "unscored": found["outcomes"]["verdicts"].get("policy_failed", 0),
    }  # fmt: skip
