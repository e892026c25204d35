"""It learns: GRPO raises success on held-out tasks; with rewards dealt out at random, or with the tools taken away, it does not.

From one cold start of the recipe `tiny`, with the settings of the recipe `tiny-specialists`, several seeds. Held-out tasks are
those of the split `test`: general tasks of structures (fingerprints) that training never saw, sums and truth values that it
never saw. Success is the mean over attempts at temperature 1. Intervals of success are bootstraps over tasks, those of the gain,
which is paired by task, over structures (maths and logic: tasks), both of each task's mean over seeds; beside them Student's
over seeds. Arms: `rewarded`; `shuffled`, every group's rewards dealt out anew among its attempts; `toolless`, general tasks
whose tools are neither shown nor answer in training.

RORQUAL_BASE=checkpoint and RORQUAL_TASKS=store replace the cold start and its primers, which else are made in runs/learning.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from rorqual.config import load
from rorqual.evals.statistics import Interval, bootstrap
from rorqual.parallel.world import ParallelConfig, World
from rorqual.parallel.world import start as start_world
from rorqual.parallel.world import stop as stop_world
from rorqual.rollout.collect import GroupConfig
from rorqual.rollout.gold import final_text
from rorqual.runlog import RunLog, read_metrics, write_atomically
from rorqual.stages import grpo, specialists, synthesize
from rorqual.stages.mismatch_lab import interval
from rorqual.stages.sampling import AttemptConfig, attempts
from rorqual.stages.task_set import TaskSet, open_tasks
from rorqual.tasks.episode import AsyncEpisode, Opening
from rorqual.tasks.plans import gold_plan
from rorqual.train.loop import Pace, Site

SECONDS, QUICK_SECONDS = 3600, 45
RECIPE, SETTINGS, RUN = "tiny", "tiny-specialists", Path("runs/learning")
SEEDS, TASKS = 5, 310
ATTEMPTS = {"maths": 4, "logic": 4, "general": 2}
"""At each held-out task, of which there are about 100, 130 and 300."""
DOMAINS = ("maths", "logic", "general")
ARMS = ("rewarded", "shuffled", "toolless")

Rates = dict[str, float]
"""task -> share of its attempts that succeeded."""


@dataclass(frozen=True)
class Cell:
    """One run."""

    domain: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.domain}.{self.arm}.{self.seed}"


def main(quick: bool) -> dict[str, Any]:
    if quick:
        known_truth()
        return mechanics()
    init, store = start()
    found = run(init, store, RUN, [Cell(d, a, s) for s in range(SEEDS) for d, a in grid()])
    for problem in problems(found):
        raise AssertionError(problem)
    return found


def grid() -> list[tuple[str, str]]:
    """Text tasks have no tools to take away."""
    return [(domain, arm) for arm in ARMS for domain in DOMAINS if arm != "toolless" or domain == "general"]


def start() -> tuple[Path, Path]:
    """The cold start and its store of tasks."""
    if "RORQUAL_BASE" in os.environ:
        return Path(os.environ["RORQUAL_BASE"]), Path(os.environ["RORQUAL_TASKS"])
    left_out = [f"--post_training.{stage}=none" for stage in ("specialists", "distill", "mixed", "evaluation")]
    command = [sys.executable, "-m", "rorqual", "run", RECIPE, "--out", str(RUN), "--quiet", *left_out]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return RUN / "cold-start" / "sft" / "model", RUN / "tasks" / "primer"


# --- runs


def run(init: Path, store: Path, directory: Path, cells: Sequence[Cell], how: How | None = None) -> dict[str, Any]:
    """The cells that are missing, side by side, then the table."""
    (directory / "cells").mkdir(parents=True, exist_ok=True)
    how = how or How()
    starts = [Cell(domain, "start", 0) for domain in sorted({cell.domain for cell in cells})]
    missing = [cell for cell in [*starts, *cells] if not _place(directory, cell).exists()]
    with ThreadPoolExecutor(how.side_by_side) as pool:
        for done in as_completed([pool.submit(_process, cell, init, store, directory, how) for cell in missing]):
            print(done.result(), flush=True)
    found = {cell: json.loads(_place(directory, cell).read_text()) for cell in [*starts, *cells]}
    return table(found, clusters(store))


@dataclass(frozen=True)
class How:
    """Processes of a cell by domain (one thread each), cells at one time, and steps in place of the recipe's by domain."""

    processes: Mapping[str, int] = field(default_factory=dict)
    side_by_side: int = os.cpu_count() or 1
    steps: Mapping[str, int] = field(default_factory=dict)


def _process(cell: Cell, init: Path, store: Path, directory: Path, how: How) -> str:
    """A cell in processes of its own; a line about it."""
    count = how.processes.get(cell.domain, 1) if cell.arm != "start" else 1
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "--master-port", "0"] if count > 1 else []
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"] if count > 1 else []
    words = [cell.domain, cell.arm, str(cell.seed), str(init), str(store), str(directory), str(how.steps.get(cell.domain, ""))]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "benchmarks.prove_learning", "cell", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{cell.name}: {done.stderr[-2000:]}")
    return done.stdout.strip()


def play_cell(cell: Cell, init: Path, store: Path, directory: Path, world: World, steps: int | None = None) -> str:
    """Train a cell, measure it, and keep what came; a line about it. Every process of a cell calls it."""
    model, curve = init, []
    if cell.arm != "start":
        site = Site.open(directory / "runs" / cell.name, world, True)
        pool = pool_of(cell, open_tasks(store, "inline").of([cell.domain]))
        model = grpo.main(settings(cell, steps), init, pool, site)
        curve = [round(value, 4) for _, value in read_metrics(site.directory, "rollout/success")] if world.is_main else []
    archive = directory / "measured" / cell.name
    rates = measured(model, open_tasks(store, "inline", "test").of([cell.domain]), archive, settings(cell), world)
    if world.is_main:
        write_atomically(_place(directory, cell), json.dumps({"rates": rates, "curve": curve}))
    return f"{cell.name}: {100 * fmean(rates.values()):.1f} % of {len(rates)} held-out tasks"


def settings(cell: Cell, steps: int | None = None) -> grpo.Config:
    """The recipe's own for the domain; the seed and the arm are the cell's."""
    config = load(specialists.Config, SETTINGS, table="specialists").run(cell.domain, "thinking")
    pace = config.pace if steps is None else Pace(steps, steps)
    return replace(config, pace=pace, seed=cell.seed, shuffle_rewards=cell.arm == "shuffled")


def pool_of(cell: Cell, tasks: TaskSet) -> grpo.TaskPool:
    pool = grpo.pool_of(tasks)
    return replace(pool, open_episode=lambda name: Toolless(tasks.open(name))) if cell.arm == "toolless" else pool


class Toolless:
    """An episode whose tools are not shown, and answer nothing."""

    def __init__(self, episode: AsyncEpisode):
        self.episode = episode

    def __getattr__(self, name: str) -> Any:
        return getattr(self.episode, name)

    async def reset(self) -> Opening:
        return replace(await self.episode.reset(), tools=())

    async def call(self, name: str, arguments: dict[str, Any] | str) -> str:
        return f"error: there is no tool {name}"


def measured(model: Path, tasks: TaskSet, archive: Path, config: grpo.Config, world: World) -> Rates:
    """Each held-out task's share of successes, tools and rewards as they are."""
    ids = list(tasks.tasks)[:TASKS]
    count = max(ATTEMPTS[domain] for domain in tasks.by_domain)
    engine = replace(config.engine, record_selection=False)
    how = AttemptConfig(GroupConfig(count, config.groups.concurrency), config.agent, engine=engine)
    groups = attempts(how, model, ids, tasks.open, True, archive, 0, Site.open(archive.parent / "log", world, True))
    return {name: fmean(bool(t.verdict and t.verdict.passed) for t in group) for name, group in zip(ids, groups, strict=True)}


def clusters(store: Path) -> dict[str, str]:
    """What a task's result is judged together with: its world's structure, or the task alone."""
    tasks = open_tasks(store, "inline", "all")
    worlds = {name: tasks.world(name) for name in tasks.tasks}
    return {name: world.fingerprint if world else name for name, world in worlds.items()}


def _place(directory: Path, cell: Cell) -> Path:
    return directory / "cells" / f"{cell.name}.json"


# --- what came


def table(found: Mapping[Cell, Mapping[str, Any]], cluster: Mapping[str, str]) -> dict[str, Any]:
    """Rows by domain: success at the start and of each arm, with the gain, paired by task and by structure."""
    rows: dict[str, Any] = {}
    for domain in sorted({cell.domain for cell in found}):
        before: Rates = found[Cell(domain, "start", 0)]["rates"]
        row: dict[str, Any] = {"tasks": len(before), "structures": len({cluster[name] for name in before})}
        row["start"] = {"success": _told(bootstrap(list(before.values())))}
        for arm in ARMS:
            runs = [each["rates"] for cell, each in found.items() if (cell.domain, cell.arm) == (domain, arm)]
            if runs:
                after = {name: fmean(rates[name] for rates in runs) for name in before}
                gain = {name: after[name] - before[name] for name in before}
                row[arm] = {"success": _told(bootstrap(list(after.values()))), "gain": _told(_over(gain, cluster))}
                row[arm]["over_seeds"] = interval([fmean(rates.values()) for rates in runs])
                row[arm]["by_seed"] = [round(fmean(rates.values()), 4) for rates in runs]
        rows[domain] = row
    return {"rows": rows}


def _over(rates: Rates, cluster: Mapping[str, str]) -> Interval:
    """The mean over tasks; whole structures are drawn with replacement."""
    grouped: dict[str, list[float]] = {}
    for name, rate in rates.items():
        grouped.setdefault(cluster[name], []).append(rate)
    sums = np.array([[sum(each), len(each)] for each in grouped.values()])
    drawn = bootstrap(np.arange(len(sums)), lambda picked: float(np.divide(*sums[picked.astype(int)].sum(0))))
    return drawn


def _told(found: Interval) -> dict[str, float]:
    return {"value": found.value, "low": found.low, "high": found.high}


def problems(found: Mapping[str, Any]) -> list[str]:
    """What the table leaves open of the claim; empty where it holds."""
    told = []
    for domain, row in found["rows"].items():
        before, after = row["start"]["success"], row["rewarded"]["success"]
        rises = row["rewarded"]["gain"]["low"] > 0 and row["rewarded"]["over_seeds"]["low"] > before["value"]
        if not (rises and after["low"] > before["high"]):
            told.append(f"{domain}: no rise apart from the start is shown: {json.dumps(row)}")
        for arm in ("shuffled", "toolless"):
            if arm in row and not (row[arm]["gain"]["low"] <= 0 and row[arm]["success"]["high"] < after["low"]):
                told.append(f"{domain}: {arm} rises, or is not apart from the rewarded: {json.dumps(row)}")
    return told


def render(found: Mapping[str, Any]) -> str:
    lines = []
    for domain, row in found["rows"].items():
        for arm in ("start", *ARMS):
            if arm in row:
                cells = [f"{name} {_cell(row[arm][name])}" for name in ("success", "gain") if name in row[arm]]
                lines.append(f"{domain:<8} {arm:<9} {'  '.join(cells)}  {row[arm].get('by_seed', '')}")
    return "\n".join(lines)


def _cell(found: Mapping[str, float]) -> str:
    return f"{100 * found['value']:5.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


# --- the quick form


def known_truth() -> None:
    """Runs drawn with known rates: what was put in is found, and what was not is not."""

    def drawn(rates: Mapping[str, float]) -> dict[str, Any]:
        names = [f"t{n}" for n in range(200)]
        found = {}
        for arm, rate in rates.items():
            for seed in range(1 if arm == "start" else 3):
                draw = random.Random(f"{arm}/{seed}")
                found[Cell("general", arm, seed)] = {"rates": {n: float(draw.random() < rate) for n in names}}
        return table(found, {name: f"s{n % 20}" for n, name in enumerate(names)})

    truth = {"start": 0.2, "rewarded": 0.5, "shuffled": 0.15, "toolless": 0.02}
    assert not problems(drawn(truth)), problems(drawn(truth))
    assert len(problems(drawn(truth | {"rewarded": 0.22}))) >= 1, "two points are no rise"
    assert len(problems(drawn(truth | {"shuffled": 0.45}))) == 1, "a control that rises is found out"
    assert len(problems(drawn(truth | {"toolless": 0.5}))) == 1
    assert math.isclose(drawn(truth)["rows"]["general"]["rewarded"]["success"]["value"], 0.5, abs_tol=0.06)


def mechanics() -> dict[str, Any]:
    """On fresh primers: no structure is in both splits, and an episode without tools shows none, answers none, and is not changed
    by the gold calls that solve the same task with them."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        config = synthesize.Config((synthesize.StoreConfig("primer", 60, ("domains=general",), is_trained_on=True),))
        synthesize.main(config, directory, RunLog(directory / "log", True))
        store = directory / "primer"
        train, test = open_tasks(store, "inline"), open_tasks(store, "inline", "test")
        seen, held_out = ({clusters(store)[name] for name in tasks.tasks} for tasks in (train, test))
        assert seen and held_out and not seen & held_out, "a structure is in both splits"
        solved = {
            arm: asyncio.run(_gold_success(pool_of(Cell("general", arm, 0), train), train)) for arm in ("rewarded", "toolless")
        }
        assert solved == {"rewarded": 1.0, "toolless": 0.0}, solved
        return {"structures": len(seen), "held_out": len(held_out), "gold": solved}


async def _gold_success(pool: grpo.TaskPool, tasks: TaskSet) -> float:
    """Success of the stored plans at tasks that change a table, in the pool's episodes."""
    passed = []
    for name in [name for name, task in tasks.tasks.items() if task.tags["kind"] == "set"][:12]:
        plan = gold_plan(tasks.tasks[name], tasks.world(name), "inline")
        episode = pool.open_episode(name)
        opening = await episode.reset()
        seen = [await episode.call(move.name, move.arguments) for move in plan.moves]
        passed.append(bool((await episode.finish(final_text(plan, seen))).passed))
        assert bool(opening.tools) != isinstance(episode, Toolless)
        await episode.close()
    return fmean(passed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["cell"]:
        domain_, arm_, seed_, init_, store_, directory_, steps_ = sys.argv[2:]
        torch.set_num_threads(1)
        world_ = start_world(ParallelConfig(), "cpu")
        asked = int(steps_) if steps_ else None
        line = play_cell(Cell(domain_, arm_, int(seed_)), Path(init_), Path(store_), Path(directory_), world_, asked)
        stop_world()
        if world_.is_main:
            print(line)
    else:
        print(render(run(*start(), RUN, [Cell(d, a, s) for s in range(SEEDS) for d, a in grid()])))
