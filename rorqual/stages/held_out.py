"""Evaluation as a stage of a recipe: checkpoints of the run on the held-out tasks, under the context strategies asked for.

Each is what `rorqual evaluate --benchmark heldout ...` does. What is stored is played once; a killed run goes on with the
attempts that are missing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from rorqual.errors import require
from rorqual.evals import runner
from rorqual.evals.benchmark import Options
from rorqual.evals.evaluation import RESULTS, Evaluation, evaluate
from rorqual.evals.policies import PolicyOptions
from rorqual.runlog import RunLog
from rorqual.workers import Workers, open_pool

Strategy = Literal["none", "summary", "discard-75", "discard-all", "parallel-fewest-step"]


@dataclass(frozen=True)
class Config:
    tasks: int | None = 200
    """At most so many held-out tasks of a store; None: all."""
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
        counts = ("attempts", "max_turn_tokens", "max_turns", "window", "concurrency", "side_by_side")
        require(
            self,
            tasks=(self.tasks is None or self.tasks >= 1, "at least 1, or none"),
            strategies=(bool(self.strategies), "at least one"),
            **{name: (getattr(self, name) >= 1, "at least 1") for name in counts},
        )


def main(config: Config, checkpoints: Mapping[str, Path], stores: Sequence[Path], directory: Path, log: RunLog) -> None:
    """Evaluate every checkpoint on every store: DIRECTORY/STAGE-STORE[-STRATEGY]/results.json.

    checkpoints: stage -> checkpoint, in the order in which they were made; the last is the finished model.
    """
    first, *others = config.strategies

    def planned(stage: str, store: Path, strategy: Strategy) -> Evaluation:
        name = "-".join([stage, store.name, *([strategy] if strategy != first else [])])
        return evaluation(config, checkpoints[stage], store, directory / name, strategy)

    plan = [planned(stage, store, first) for stage in checkpoints for store in stores]
    plan += [planned(list(checkpoints)[-1], store, each) for store in stores for each in others]
    measure(plan, config.side_by_side, log)


def evaluation(
    config: Config,
    checkpoint: Path,
    store: Path,
    out: Path,
    strategy: Strategy = "none",
    thinking: bool | None = None,
    share: tuple[int, int] = (1, 1),
    families: tuple[str, ...] = (),
) -> Evaluation:
    """One checkpoint on one store, or on some families or one share of its tasks (rorqual.evals.evaluation).

    thinking: None is the protocol's.
    """
    how = runner.Config(
        strategy, samples=config.attempts, seed=config.seed, concurrency=config.concurrency, temperature=config.temperature,
        thinking=thinking, max_turn_tokens=config.max_turn_tokens, max_turns=config.max_turns, window=config.window,
    )  # fmt: skip
    tasks = Options(str(store), config.tasks, seed=config.seed, isolation=config.isolation, split=config.split, families=families)
    player = PolicyOptions(cache_tokens=config.cache_tokens, concurrency=config.concurrency)
    return Evaluation("heldout", str(checkpoint), out, how, tasks, player, share=share)


def measure(planned: Sequence[Evaluation], side_by_side: int, log: RunLog) -> None:
    """Run what has no results yet, so many at one time, each in a process with its share of the cores; 1: in turn, here."""
    missing = [each for each in planned if not (each.out / RESULTS).exists()]
    with log.progress("evaluation", len(planned)) as bar:
        bar.advance(len(planned) - len(missing))
        if side_by_side == 1:
            for each in missing:
                evaluate(each, quiet=True)
                bar.advance()
            return
        threads = max(1, (os.cpu_count() or 1) // side_by_side)
        with open_pool(Workers(side_by_side)) as pool:
            for done in as_completed([pool.submit(_measured, each, threads) for each in missing]):
                done.result()
                bar.advance()


def _measured(planned: Evaluation, threads: int) -> None:
    torch.set_num_threads(threads)
    evaluate(planned, quiet=True)
