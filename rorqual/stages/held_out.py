"""Evaluation as a stage of a recipe: checkpoints of the run on the held-out tasks, under the context strategies asked for.

Each is the command that a user would give, in a process of its own: `rorqual evaluate --benchmark heldout ...`. What is stored
is played once; a killed run goes on with the attempts that are missing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rorqual.errors import UserError, require
from rorqual.runlog import RunLog

Strategy = Literal["none", "summary", "discard-75", "discard-all", "parallel-fewest-step"]


@dataclass(frozen=True)
class Config:
    tasks: int = 200
    """At most so many held-out tasks."""
    attempts: int = 1
    split: Literal["test", "test_combination", "test_mechanism", "all"] = "test"
    temperature: float = 1.0
    """The paper's."""
    max_turn_tokens: int = 128
    max_turns: int = 4
    window: int = 1024
    strategies: tuple[Strategy, ...] = ("none",)
    """The finished model is measured under all of them, the checkpoints before it under the first."""
    isolation: str = "bwrap"
    """Of the tasks' worlds; inline is for programs that this package wrote itself."""
    concurrency: int = 64
    cache_tokens: int = 65536
    side_by_side: int = 1
    """Evaluations at one time, each a process with its share of the cores."""
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("tasks", "attempts", "max_turn_tokens", "max_turns", "window", "concurrency", "side_by_side")
        require(
            self,
            strategies=(bool(self.strategies), "at least one"),
            **{name: (getattr(self, name) >= 1, "at least 1") for name in counts},
        )


def main(config: Config, checkpoints: Mapping[str, Path], stores: Sequence[Path], directory: Path, log: RunLog) -> None:
    """Evaluate every checkpoint on every store: DIRECTORY/STAGE-STORE[-STRATEGY]/results.json.

    checkpoints: stage -> checkpoint, in the order in which they were made; the last is the finished model.
    Raises UserError where an evaluation fails, with its last line.
    """
    plan: list[tuple[str, Path, str]] = [(stage, store, config.strategies[0]) for stage in checkpoints for store in stores]
    plan += [(list(checkpoints)[-1], store, each) for store in stores for each in config.strategies[1:]]

    def one(planned: tuple[str, Path, str]) -> None:
        stage, store, strategy = planned
        name = "-".join([stage, store.name, *([strategy] if strategy != config.strategies[0] else [])])
        if not (directory / name / "results.json").exists():
            _evaluate(config, checkpoints[stage], store, strategy, directory / name)

    with log.progress("evaluation", len(plan)) as bar, ThreadPoolExecutor(config.side_by_side) as pool:
        for done in as_completed([pool.submit(one, planned) for planned in plan]):
            done.result()
            bar.advance()


def _evaluate(config: Config, checkpoint: Path, store: Path, strategy: str, out: Path) -> None:
    options = {
        "benchmark": "heldout", "policy": checkpoint, "data": store, "split": config.split, "limit": config.tasks,
        "n": config.attempts, "context": strategy, "temperature": config.temperature, "max-turn-tokens": config.max_turn_tokens,
        "max-turns": config.max_turns, "window": config.window, "isolation": config.isolation, "seed": config.seed,
        "concurrency": config.concurrency, "cache-tokens": config.cache_tokens, "out": out,
    }  # fmt: skip
    command = [sys.executable, "-m", "rorqual", "evaluate", "--quiet", "--json"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    share = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // config.side_by_side))} if config.side_by_side > 1 else {}
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**share, **os.environ})
    if done.returncode:
        raise UserError(f"{out}: the evaluation failed: {done.stderr.strip().rpartition(chr(10))[2]}")
