"""An evaluation killed (SIGKILL) at random moments and resumed gives the same table as one that was left alone, and plays no
finished attempt twice.

Moments are counted in what the evaluation itself does, never in seconds: a drawn number of attempts, counted where each is about
to be created, or about to be given its name. There the evaluation kills itself, or says so and is killed from outside wherever it
has come to by then. The former happens on a machine of any speed, since fewer attempts are drawn than are still to come.
"""

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

# Audit events come before the act: "open" before the part file exists, "os.rename" when it is whole and not yet in place.
DOOMED = """
import os, signal, sys
moment, left, inside = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "inside"
def watch(event, arguments):
    global left
    if event == moment and str(arguments[0]).endswith(".part") and (left := left - 1) == 0:
        if inside:
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(2, b"there\\n")
sys.addaudithook(watch)
from rorqual.cli import main
sys.exit(main(sys.argv[4:]))
"""


def arguments(out: Path, tasks: int) -> list[str]:
    return [
        "evaluate", "--benchmark", "ruler", "--count", str(tasks), "--length", "2000", "--policy", "program:failing",
        "--n", "4", "--k", "1", "4", "--out", str(out), "--json", "--concurrency", "4",
    ]  # fmt: skip


def left_alone(out: Path, tasks: int) -> None:
    subprocess.run([sys.executable, "-m", "rorqual", *arguments(out, tasks)], check=True, stdout=subprocess.DEVNULL)


def result(out: Path) -> dict:
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return {name: found[name] for name in SAME}


def finished(out: Path) -> dict[Path, int]:
    """Attempts on disk, and the inode of each: another one where it was written again."""
    return {path: path.stat().st_ino for path in (out / "attempts").rglob("*.npz")}


def killed(out: Path, tasks: int, draw: random.Random, inside: bool) -> bool:
    """Resume, and die at a drawn attempt of the first half of those to come. False where the end came before the kill."""
    attempts = draw.randint(1, max(1, (4 * tasks - len(finished(out))) // 2))
    doom = [draw.choice(["open", "os.rename"]), str(attempts), "inside" if inside else "outside"]
    child = subprocess.Popen(
        [sys.executable, "-c", DOOMED, *doom, *arguments(out, tasks)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert child.stderr is not None
    heard = child.stderr.readline()
    if not inside:
        assert heard == b"there\n", heard
        child.kill()
    code = child.wait()
    child.stderr.close()
    assert code == -9 or not inside, f"it was to kill itself at attempt {attempts}, and ended with {code}"
    return code == -9


def main(quick: bool) -> dict:
    tasks, rounds, dooms = (60, 1, (True, False)) if quick else (250, 5, (True, False, True, False))
    draw, kills, torn = random.Random(0), [], 0
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder) / "alone"
        began = time.monotonic()
        left_alone(alone, tasks)
        seconds = time.monotonic() - began
        for number in range(rounds):
            out, kept = Path(folder) / f"killed-{number}", {}
            kills.append(0)
            for inside in dooms:
                kills[-1] += killed(out, tasks, draw, inside)
                torn += len(list((out / "attempts").rglob("*.part")))
                assert kept.items() <= finished(out).items(), "a finished attempt was lost, or played again"
                kept = finished(out)
            left_alone(out, tasks)
            assert kept.items() <= finished(out).items(), "a finished attempt was lost, or played again"
            assert result(out) == result(alone), f"round {number}: another table after {kills[-1]} kills"
            assert len(finished(out)) == 4 * tasks and not list((out / "attempts").rglob("*.part"))
        found = result(alone)
    return {
        "attempts": 4 * tasks, "seconds_alone": round(seconds, 1), "kills_by_round": kills, "kills_that_left_a_part": torn,
        "unscored": found["outcomes"]["verdicts"].get("policy_failed", 0),
    }  # fmt: skip
