"""The mismatch laboratory: which disagreement between sampler and trainer breaks GRPO, and which stabiliser mends it.

    for each injection, each arm, each seed:   teach -> { sample with the injection -> train with the arm } -> measure

An injection makes the sampler disagree with the trainer in one known way (or in all of them); an arm is plain GRPO, plain
GRPO with one stabiliser, or all five. Every cell is a file; a killed run goes on with the cells that are missing, and ends
with mismatch.json (figures) and mismatch.html (a page that needs no network).
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import numpy as np
import torch

from rorqual.errors import UserError, require
from rorqual.model.call import EXPANDED
from rorqual.model.config import ModelConfig
from rorqual.model.transformer import Transformer
from rorqual.parallel.world import World
from rorqual.policy import SamplingParams
from rorqual.rewards.advantages import group_advantages
from rorqual.rollout.trajectory import End, Trajectory, Turn, samples
from rorqual.runlog import RunLog, write_atomically
from rorqual.stages.injections import INJECTIONS, ForwardSampler, Strengths, disagree
from rorqual.stages.sorting import SHAPE, SortingConfig, draw_prompts, taught, verdict
from rorqual.train.optimizer import Optimizer, OptimizerConfig
from rorqual.train.policy_step import DomainObjective, PolicyConfig, PolicyObjective, policy_step, prepare
from rorqual.train.samples import Item, ReplayConfig, sample_batch, score
from rorqual.workers import Workers, open_pool

STABILISERS = ("unbiased_kl", "sequence_mask", "keep_routing", "keep_sampling_mask", "keep_selection")
ARMS = ("plain", *STABILISERS, "all")
MADE_FOR = {
    "none": (),
    "staleness": ("unbiased_kl", "sequence_mask"),
    "precision": ("unbiased_kl", "sequence_mask"),
    "truncation": ("keep_sampling_mask",),
    "routing": ("keep_routing",),
    "selection": ("keep_selection",),
    "all": STABILISERS,
}
"""The stabilisers that are tried alone against each injection in the short grid."""
CURVES = {
    "success": "rollout/success", "entropy": "train/entropy", "mismatch": "train/mismatch_abs", "kl": "train/kl",
    "clip_share": "train/clip_share", "masked_share": "train/masked_share", "grad_norm": "train/grad_norm",
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """What the paper leaves unpublished (eps, beta, delta, rate) is set so that plain GRPO without an injection learns."""

    seeds: int = 5
    steps: int = 48
    """Optimiser steps of a run."""
    prompts: int = 8
    """Of one optimiser step."""
    group: int = 8
    learning_rate: float = 1e-3
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.01
    delta: float = 0.1
    """Of off-policy sequence masking, in nats a token."""
    side_by_side: int = 1
    """Cells at one time, each in a process with one thread; more than 1 only makes them sooner."""
    budget_s: float | None = None
    """Begin no further cell after so long, and write the table of those that are there; a later run goes on."""
    measured: int = 256
    """Prompts of the final measurement: never trained on, one answer each from the trained weights without an injection."""
    grid: Literal["short", "full"] = "short"
    """short: each injection with plain, the stabilisers meant for it, and all; full: with every arm."""
    injections: tuple[str, ...] = ("none", *INJECTIONS, "all")
    strengths: Strengths = field(default_factory=Strengths)
    task: SortingConfig = field(default_factory=lambda: SortingConfig(digits=3))
    model: ModelConfig = SHAPE

    def __post_init__(self) -> None:
        known = set(MADE_FOR)
        require(
            self,
            seeds=(self.seeds >= 2, "at least 2 (one seed has no interval)"),
            steps=(self.steps >= 1, "at least 1"),
            group=(self.group >= 2, "at least 2"),
            side_by_side=(self.side_by_side >= 1, "at least 1"),
            injections=(set(self.injections) <= known, f"some of {', '.join(MADE_FOR)}"),
        )

    @property
    def cells(self) -> list[tuple[str, str]]:
        """(injection, arm), in the order they are run."""
        short = {injection: ("plain", *MADE_FOR[injection], "all") for injection in self.injections}
        return [(i, arm) for i in self.injections for arm in (ARMS if self.grid == "full" else short[i])]


@dataclass(frozen=True)
class Cell:
    injection: str
    arm: str
    seed: int

    @property
    def injected(self) -> tuple[str, ...]:
        return INJECTIONS if self.injection == "all" else () if self.injection == "none" else (self.injection,)

    def has(self, stabiliser: str) -> bool:
        return self.arm in ("all", stabiliser)

    @property
    def name(self) -> str:
        return f"{self.injection}.{self.arm}.{self.seed}"


def main(config: Config, directory: Path, quiet: bool = False) -> dict[str, Any]:
    """Run the cells that are missing, then write the table and the page; the table."""
    directory.mkdir(parents=True, exist_ok=True)
    _claim(config, directory)
    log = RunLog(directory, quiet)
    log.begin(config)
    cells = [Cell(injection, arm, seed) for seed in range(config.seeds) for injection, arm in config.cells]
    found: dict[str, dict[str, Any]] = {}
    with log.progress("mismatch lab", len(cells)) as progress:
        for cell in finished(config, cells, directory):
            found[cell.name] = json.loads(_place(directory, cell).read_text(encoding="utf-8"))
            progress.advance(note=f"{cell.name} {found[cell.name]['success']:.2f}")
    found = {cell.name: found[cell.name] for cell in cells if cell.name in found}
    table = publish(config, found, directory)
    log.close()
    return table


def finished(config: Config, cells: Sequence[Cell], directory: Path) -> Iterator[Cell]:
    """The cells as they are there: first those that were, then those that are run now, in this process or in several."""
    _place(directory, cells[0]).parent.mkdir(exist_ok=True)
    missing = [cell for cell in cells if not _place(directory, cell).exists()]
    yield from (cell for cell in cells if cell not in missing)
    ends = math.inf if config.budget_s is None else time.monotonic() + config.budget_s
    if config.side_by_side == 1:
        for cell in missing:
            if time.monotonic() < ends:
                yield write_cell(config, cell, directory)
        return
    with open_pool(Workers(config.side_by_side)) as pool:
        waiting = [pool.submit(_write_cell_on_one_thread, config, cell, directory) for cell in missing]
        for done in as_completed(waiting):
            if not done.cancelled():
                yield done.result()
            if time.monotonic() > ends:
                for each in waiting:
                    each.cancel()


def write_cell(config: Config, cell: Cell, directory: Path) -> Cell:
    """Run one cell and keep its figures; the cell."""
    write_atomically(_place(directory, cell), json.dumps(run_cell(config, cell, directory)))
    return cell


def _write_cell_on_one_thread(config: Config, cell: Cell, directory: Path) -> Cell:
    torch.set_num_threads(1)
    return write_cell(config, cell, directory)


def _place(directory: Path, cell: Cell) -> Path:
    return directory / "cells" / f"{cell.name}.json"


def publish(config: Config, found: Mapping[str, Mapping[str, Any]], directory: Path) -> dict[str, Any]:
    """Write the table and the page of finished cells; the table."""
    from rorqual.report.mismatch import mismatch_page

    starts = {name.rsplit(".", 1)[1]: each["start"] for name, each in found.items()}
    table = {
        "config": _settings(config), "start": interval(list(starts.values())),
        "rows": tabulate(config, found), "curves": curves(found),
        "finite": all(each["finite"] for each in found.values()),
    }  # fmt: skip
    write_atomically(directory / "mismatch.json", json.dumps(table, indent=1))
    write_atomically(directory / "mismatch.html", mismatch_page(table))
    return table


def as_text(table: Mapping[str, Any]) -> str:
    """The table for a console, one line for each injection and arm."""
    lines = []
    for row in table["rows"]:
        gap, success = row["clean"].get("against"), f"{100 * row['clean']['success']['mean']:5.1f} %"
        shown = f"{100 * gap['mean']:+6.1f} [{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}]" if gap else ""
        lines.append(f"{row['injection']:<11} {row['arm']:<19} {success}  {shown:<24} {row['clean'].get('says', '')}".rstrip())
    return "\n".join(lines)


def run_cell(config: Config, cell: Cell, directory: Path) -> dict[str, Any]:
    """One run, from the taught model to the measured one."""
    model = _begin(config, cell.seed, directory)
    policy = policy_of(config, cell)
    run = _Run(config, cell, policy, model, copy.deepcopy(model).eval().requires_grad_(False))
    for step in range(config.steps):
        run.one_step(step)
    return {
        "success": run.measure(), "start": run.start, "curves": run.curves, "disagreement": run.disagreement,
        "finite": all(bool(p.isfinite().all()) for p in model.parameters()),
    }  # fmt: skip


def policy_of(config: Config, cell: Cell) -> PolicyConfig:
    """The objective of an arm: plain is clipped GRPO with K3, no mask, and every decision made anew by the trainer."""
    return PolicyConfig(
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        kl="unbiased" if cell.has("unbiased_kl") else "k3",
        default=DomainObjective(config.beta, config.delta if cell.has("sequence_mask") else None),
        replay=ReplayConfig(cell.has("keep_routing"), cell.has("keep_selection"), cell.has("keep_sampling_mask")),
        attention=EXPANDED,
    )


class _Run:
    """A cell under way."""

    def __init__(self, config: Config, cell: Cell, policy: PolicyConfig, model: Transformer, reference: Transformer):
        self.config, self.cell, self.policy, self.model, self.reference = config, cell, policy, model, reference
        self.world = World(0, 1, torch.device("cpu"))
        self.objective = PolicyObjective(model, policy)
        rate = OptimizerConfig(learning_rate=config.learning_rate, schedule="constant", weight_decay=0.0)
        self.optimizer = Optimizer(model, rate)
        self.sampler = ForwardSampler.of(model)
        self.staleness = config.strengths.staleness if "staleness" in cell.injected else 1
        self.waiting: list[list[Item]] = []
        self.curves: dict[str, list[float]] = {name: [] for name in CURVES}
        self.disagreement: dict[str, float] = {}
        self.start = self.measure()

    def one_step(self, step: int) -> None:
        """One optimiser step, on rollouts that are up to `staleness` - 1 steps old."""
        if not self.waiting:
            self._refresh(step)
            self.waiting = [self._rollouts(step + later) for later in range(self.staleness)]
        items = self.waiting.pop(0)
        parts = prepare(items, self.policy, self.reference, self.world)
        metrics = policy_step(self.objective, self.optimizer, parts, self.world, self.config.learning_rate) if parts else {}
        for name, metric in CURVES.items():
            if metric in metrics:
                self.curves[name].append(metrics[metric])

    def measure(self) -> float:
        """The success of the trained weights, sampled as they are, on prompts of their own."""
        self.sampler.load(self.model, 0)
        prompts = draw_prompts(self.config.measured, self.config.task.digits, (9, self.cell.seed))
        return fmean(self._success(prompts, range(len(prompts)), 1.0))

    def _refresh(self, step: int) -> None:
        self.sampler.load(self.model, step)
        disagree(self.sampler.model, self.cell.injected, self.config.strengths, (7, self.cell.seed, step))

    def _rollouts(self, step: int) -> list[Item]:
        """The samples of one optimiser step, with advantages; groups without a difference teach nothing."""
        config = self.config
        drawn = draw_prompts(config.prompts, config.task.digits, (3, self.cell.seed, step))
        prompts = np.repeat(drawn, config.group, 0)
        seeds = np.random.default_rng([4, self.cell.seed, step]).integers(2**62, size=len(prompts))
        top_p = config.strengths.truncation if "truncation" in self.cell.injected else 1.0
        done = self.sampler.complete(prompts, SamplingParams(max_tokens=config.task.digits, top_p=top_p), seeds.tolist())
        rewards = [verdict(prompt.tolist(), each.tokens) for prompt, each in zip(prompts, done, strict=True)]
        self.curves["success"].append(fmean(rewards))
        groups = [group_advantages(rewards[i : i + config.group]) for i in range(0, len(rewards), config.group)]
        advantages = list(itertools.chain.from_iterable(group.advantages for group in groups))
        whole = [samples(Trajectory("", i, (Turn({}, each),), End.ANSWERED))[0] for i, each in enumerate(done)]
        items = [Item(sample, a, i) for i, (sample, a) in enumerate(zip(whole, advantages, strict=True)) if a is not None]
        if not self.disagreement:
            self.disagreement = self._compare(items)
        return items if any(item.advantage for item in items) else []

    def _compare(self, items: Sequence[Item]) -> dict[str, float]:
        """What the injection amounts to on the first batch: the mean |log ratio| of the sampled tokens without any replay."""
        batch = sample_batch(items, self.world.device, ReplayConfig(False, False, False))
        with torch.no_grad():
            scored = score(self.model, batch, mode=EXPANDED)
        gaps = (scored.logprobs - batch.sampler_logprobs)[batch.mask].abs()
        return {"mean": float(gaps.mean()), "max": float(gaps.max())}

    def _success(self, prompts: np.ndarray, seeds: Iterable[int], top_p: float) -> list[float]:
        params = SamplingParams(max_tokens=self.config.task.digits, top_p=top_p)
        seeds, size, found = list(seeds), 32, []
        for i in range(0, len(prompts), size):
            done = self.sampler.complete(prompts[i : i + size], params, seeds[i : i + size])
            found += [verdict(p.tolist(), each.tokens) for p, each in zip(prompts[i : i + size], done, strict=True)]
        return found


def _begin(config: Config, seed: int, directory: Path) -> Transformer:
    """The taught model of a seed: taught once, the same for all its cells."""
    from safetensors.torch import load_file, save_file

    path = directory / "taught" / f"{seed}.safetensors"
    if path.exists():
        model = Transformer(config.model)
        model.load_state_dict(load_file(path))
        return model
    model = taught(config.model, config.task, seed)
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    save_file(model.state_dict(), part)
    part.rename(path)
    return model


def tabulate(config: Config, found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each injection and arm, over seeds with intervals, by two measures: `clean`, the trained weights sampled
    without an injection; `sampled`, the last batches as they were sampled. Each has its value, and against `plain` without an
    injection (what the injection cost) or with it (what the arm mended)."""
    rows = []
    for injection, arm in config.cells:
        mine = _by_seed(config, found, injection, arm)
        if len(mine) < 2:
            continue
        row: dict[str, Any] = {"injection": injection, "arm": arm, "seeds": len(mine)}
        row["mismatch"] = fmean(each["disagreement"]["mean"] for each in mine.values())
        against = _by_seed(config, found, "none" if arm == "plain" else injection, "plain")
        # Paired by seed: both began with the same weights and were asked the same prompts.
        pairs = [(each, against[seed]) for seed, each in mine.items() if seed in against]
        for name, measure in MEASURES.items():
            row[name] = {"success": interval([measure(each) for each in mine.values()])}
            if (injection, arm) != ("none", "plain") and len(pairs) > 1:
                gap = interval([measure(each) - measure(other) for each, other in pairs])
                row[name] |= {"against": gap, "says": _says(gap, name, arm)}
        rows.append(row)
    return rows


LAST = 6
"""Batches at a run's end that `sampled` is the mean of."""
MEASURES = {
    "clean": lambda cell: cell["success"],
    "sampled": lambda cell: fmean(cell["curves"]["success"][-LAST:]),
}


def _says(gap: Mapping[str, float], measure: str, arm: str) -> str:
    """What an interval allows to be said, and no more. As sampled, an injection is a handicap of its own: no word of breaking."""
    if arm != "plain":
        words = ("hurts", "no effect shown", "helps")
    else:
        words = ("breaks", "no harm shown", "no harm shown") if measure == "clean" else ("lower", "no difference shown", "higher")
    return words[0 if gap["high"] < 0 else 2 if gap["low"] > 0 else 1]


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean and Student's 95 % interval over seeds; fewer than two have none."""
    if len(values) < 2:
        return {"mean": fmean(values) if values else math.nan, "low": -math.inf, "high": math.inf}
    mean, half = fmean(values), T_95[min(len(values) - 1, len(T_95)) - 1] * stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)
"""Two-sided 95 % points of Student's t by degrees of freedom, from 1; beyond the last one the last one, which is wider."""


def _by_seed(config: Config, found: Mapping[str, Any], injection: str, arm: str) -> dict[int, Mapping[str, Any]]:
    """The cells that are there: seed -> figures."""
    names = {seed: Cell(injection, arm, seed).name for seed in range(config.seeds)}
    return {seed: found[name] for seed, name in names.items() if name in found}


def curves(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """For each injection.arm the mean over seeds of each curve, step by step (shorter curves end earlier)."""
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for name, each in found.items():
        grouped.setdefault(name.rsplit(".", 1)[0], []).append(each["curves"])
    return {name: {curve: _mean_curve([each[curve] for each in runs]) for curve in CURVES} for name, runs in grouped.items()}


def _mean_curve(runs: Sequence[Sequence[float]]) -> list[float]:
    length = min(map(len, runs))
    return [round(fmean(run[i] for run in runs), 5) for i in range(length)]


def _settings(config: Config) -> dict[str, Any]:
    from rorqual.config import to_mapping

    return {name: value for name, value in to_mapping(config).items() if name != "model"}


FREE = ("seeds", "side_by_side", "budget_s", "grid", "injections")
"""What may change between runs in one directory: how many cells there are, not what is in them."""


def _claim(config: Config, directory: Path) -> None:
    """Cells of other settings are not mixed. Raises UserError where the directory holds some."""
    settings = {name: value for name, value in _settings(config).items() if name not in FREE}
    path, mine = directory / "settings.json", json.dumps(settings, indent=1)
    if path.exists() and path.read_text(encoding="utf-8") != mine:
        raise UserError(f"{directory}: holds cells of another configuration; choose another --out")
    write_atomically(path, mine)
