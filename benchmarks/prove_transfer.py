"""Does what is learnt on synthesised tasks carry over [V3.2, 4.3; figure 5 and table 5 in kind]?

From one fine-tuned checkpoint (the cold start) two models are trained by GRPO at equal steps: on general-agent tasks alone, and
on search and code alone. All three are measured on what none was trained on: primers of each domain in the held-out split, fifty
compiled general tasks whose mechanisms no primer has, and tau2 retail, a foreign environment. The fifty tasks are also played by
programs of known skill, four attempts each: pass@1, 2 and 4 by solver. Nothing is asserted about who wins: differences are
paired by task, and where an interval holds 0 nothing is shown. A model of a few million parameters solves no foreign task;
beside success stand the shares of messages that can be read and of calls that the tools accept. Retail's rules are longer than
the positions it was trained on, which are widened for it untrained.

    python -m benchmarks.prove_transfer RUN [--retail DIR] [--jobs N] [--field=value ...]

RUN is one of benchmarks.prove_post_training with --base: its tasks and cold start are used, and nothing there is made again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.prove import jobs, workspace
from benchmarks.prove_post_training import held_out_tasks
from rorqual.evals.evaluation import Evaluation, read_results
from rorqual.evals.statistics import bootstrap, compare, pass_at_k
from rorqual.parallel.world import World
from rorqual.runlog import RunLog, write_atomically
from rorqual.stages import grpo, held_out
from rorqual.stages.recipe import Recipe, load_recipe
from rorqual.stages.task_set import open_tasks
from rorqual.synthesis import Request, maker
from rorqual.synthesis.general.cheap import panel
from rorqual.synthesis.general.compiler import planner_for
from rorqual.synthesis.general.goals import decode
from rorqual.synthesis.general.ladder import SKILLS, Memory, Policy, Searcher, play
from rorqual.tasks import Store, Task, WorldSession
from rorqual.tasks import World as TaskWorld
from rorqual.train.loop import Site
from rorqual.workers import Workers, open_pool

SECONDS, QUICK_SECONDS = 3600, 60
RECIPE, RUN = Path(__file__).parent / "post_training.toml", Path("runs/post-training-proof")
SFT, GENERAL, OTHERS = "SFT", "RL on general tasks", "RL on search and code"
ARMS = {GENERAL: ("general",), OTHERS: ("search", "programming")}
PRIMERS = ("general", "search", "programming")
FIFTY, ATTEMPTS, KS = 50, 4, (1, 2, 4)
RETAIL = 20
WINDOW = 16384
"""Of retail, whose rules and tools alone are thousands of tokens for a small tokenizer."""


# --- what is measured


@dataclass(frozen=True)
class Suite:
    """A set of tasks, and how it is played."""

    name: str
    benchmark: str
    data: Path
    split: str
    count: int
    """Tasks."""
    attempts: int
    settings: held_out.Config
    families: tuple[str, ...] = ()

    def pieces(self, solver: str, model: Path, directory: Path, shares: int) -> list[Evaluation]:
        found, shares = [], min(shares, self.count)
        for index in range(1, shares + 1):
            out = directory / solver.replace(" ", "-") / self.name.replace(" ", "-") / f"{index}-of-{shares}"
            config = replace(self.settings, attempts=self.attempts, split=self.split)
            asked = held_out.evaluation(config, model, self.data, out, "none", True, (index, shares), self.families)
            found.append(replace(asked, benchmark=self.benchmark, ks=tuple(k for k in KS if k <= self.attempts)))
        return found


def suites(recipe: Recipe, primers: Path, directory: Path, retail: Path | None, size: float = 1.0) -> list[Suite]:
    """The run's held-out primers, fifty compiled tasks, and retail where its files are given. size: a share, for trying."""
    assert recipe.post_training is not None
    settings = replace(recipe.post_training.evaluation or held_out.Config(), tasks=None)
    fifty = compiled(directory / "fifty", max(2, round(FIFTY * size)))
    found = [
        Suite(f"{domain} primers", "heldout", primers, "test", len(held_out_tasks(primers, domain)), 1, settings, (domain,))
        for domain in PRIMERS
    ]
    found.append(Suite("fifty", "heldout", fifty, "all", len(Store(fifty).tasks()), ATTEMPTS, replace(settings, max_turns=8)))
    if retail is not None:
        count = max(1, round(RETAIL * size))
        wide = replace(settings, tasks=count, window=WINDOW, max_turns=8, concurrency=2)
        found.append(Suite("retail", "tau2_retail", retail, "test", count, 1, wide))
    return found


def compiled(directory: Path, count: int) -> Path:
    """General tasks with short schemas and small tables, of mechanisms that no primer has."""
    store = Store(directory)
    if not store.is_sealed:
        maker("general").synthesize(Request(count, store, seed=11, workers=jobs(), overrides=("compact_share=1.0",)))
    return directory


# --- who is measured


def train(arm: str, recipe: Recipe, cold: Path, tasks: Path, directory: Path) -> Path:
    """The cold start after GRPO on an arm's domains alone, with the specialists' common settings."""
    torch.set_num_threads(1)
    assert recipe.post_training is not None and recipe.post_training.specialists is not None
    config = recipe.post_training.specialists.run("", "thinking")
    pool = grpo.pool_of(open_tasks(tasks, recipe.post_training.isolation).of(ARMS[arm]))
    place = Site.open(directory / arm.replace(" ", "-"), World(0, 1, torch.device("cpu")), quiet=True)
    return grpo.main(config, cold, pool, place)


Solver = Callable[[WorldSession, TaskWorld, Task, int], Policy]
"""(session, world, task, attempt) -> a program that plays it."""


def programs() -> dict[str, Solver]:
    """Planners that read the goal, with their rate of slips; one that reads what an agent is shown; one that calls at random."""

    def planner(skill: float, session: WorldSession, world: TaskWorld, task: Task, attempt: int) -> Policy:
        made = planner_for(decode(world.payload["domain"]), task.payload)
        return made(random.Random(f"{task.id}/{skill}/{attempt}"), skill)

    def searcher(session: WorldSession, world: TaskWorld, task: Task, attempt: int) -> Policy:
        return Searcher(decode(world.payload["domain"]), random.Random(f"{task.id}/{attempt}"))

    def by_chance(session: WorldSession, world: TaskWorld, task: Task, attempt: int) -> Policy:
        return panel(random.Random(f"{task.id}/{attempt}"))["random"]

    planners: dict[str, Solver] = {f"program: planner, {skill:g} of the slips": partial(planner, skill) for skill in SKILLS}
    return {**planners, "program: reads the prompt": searcher, "program: random calls": by_chance}


def played(directory: Path, attempts: int) -> dict[str, dict[str, list[float]]]:
    """program -> task -> the score of each attempt; kept beside the tasks."""
    store, kept = Store(directory), directory.with_name(f"{directory.name}-programs.json")
    if kept.exists():
        return json.loads(kept.read_text())
    worlds, found = store.worlds(), {name: dict[str, list[float]]() for name in programs()}
    for task in store.tasks():
        world = worlds[task.world]
        with WorldSession(world, "inline") as session:
            session.prepare(task)
            for name, solver in programs().items():
                scores = [play(session, task, solver(session, world, task, n), Memory()).passed for n in range(attempts)]
                found[name][task.id] = [float(score) for score in scores]
    write_atomically(kept, json.dumps(found))
    return found


# --- what comes of it


def prove(recipe: Recipe, run: Path, retail: Path | None, side_by_side: int, size: float = 1.0) -> dict[str, Any]:
    """Train what is missing, measure what is missing, and write RUN/transfer/table.json."""
    directory, cold = run / "transfer", run / "cold-start" / "sft" / "model"
    with open_pool(Workers(min(side_by_side, len(ARMS)))) as pool:
        running = [pool.submit(train, arm, recipe, cold, run / "tasks" / "primer", directory) for arm in ARMS]
        asked = suites(recipe, run / "tasks" / "primer", directory, retail, size)
        wait(running)
        models = {SFT: cold} | dict(zip(ARMS, [each.result() for each in running], strict=True))
    models |= {name: run / path for name, path in (("distilled", "distill/sft/model"), ("mixed RL", "mixed/model"))
               if (run / path).is_dir()}  # fmt: skip
    shares = max(1, side_by_side // 3)
    pieces = {(s, m): suite_pieces(s, m, path, directory, shares) for m, path in models.items() for s in asked}
    held_out.measure([each for found in pieces.values() for each in found], side_by_side, RunLog(directory))
    found = table({(s.name, m): [read_results(p.out) for p in each] for (s, m), each in pieces.items()}, list(models))
    found["solvers"] = {name: solver_row(scores) for name, scores in played(directory / "fifty", ATTEMPTS).items()} | {
        model: solver_row(by_task([read_results(p.out) for p in pieces[suite, model]]))
        for model in models for suite in asked if suite.name == "fifty"
    }  # fmt: skip
    found["curves"] = {arm: curve(directory / arm.replace(" ", "-")) for arm in ARMS}
    write_atomically(directory / "table.json", json.dumps(found, indent=1))
    return found


def suite_pieces(suite: Suite, solver: str, model: Path, directory: Path, shares: int) -> list[Evaluation]:
    if suite.benchmark == "tau2_retail":
        model = widened(model, directory / "wide" / solver.replace(" ", "-"))
    return suite.pieces(solver, model, directory / "measured", shares)


def widened(model: Path, directory: Path) -> Path:
    """The same weights with room for retail's prompts: more positions than were trained, or else none would be read."""
    if not directory.is_dir():
        shutil.copytree(model, directory)
        path = directory / "config.json"
        write_atomically(path, json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": WINDOW}, indent=1))
    return directory


def curve(stage: Path) -> list[float]:
    """Success in training, by iteration."""
    from rorqual.runlog import read_metrics

    return [round(value, 4) for _, value in read_metrics(stage, "rollout/success")]


def by_task(results: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Of all shares: task -> the scores of its attempts that have one."""
    return {
        task: [score for score in scores if score is not None] for each in results for task, scores in each["by_task"].items()
    }


def table(found: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]], models: Sequence[str]) -> dict[str, Any]:
    """By suite and model: success with its interval, and the shares of readable messages and accepted calls; by suite the
    paired difference of each model from SFT, and of the two arms."""
    suites = list(dict.fromkeys(suite for suite, _ in found))
    rows = {suite: {model: row(found[suite, model]) for model in models if (suite, model) in found} for suite in suites}
    pairs = [(SFT, model) for model in models if model != SFT] + [(OTHERS, GENERAL)]
    differences = {
        suite: {f"{other} less {one}": paired(found[suite, one], found[suite, other]) for one, other in pairs
                if (suite, one) in found and (suite, other) in found}
        for suite in suites
    }  # fmt: skip
    return {"success": rows, "differences": differences}


def row(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    scores = [sum(each) / len(each) for each in by_task(results).values() if each]
    interval = bootstrap(scores)
    ends: dict[str, int] = {}
    for each in results:
        for end, count in each["outcomes"]["ends"].items():
            ends[end] = ends.get(end, 0) + count
    calls, refused = (sum(each["accounts"][name] for each in results) for name in ("tool_calls", "refused_calls"))
    attempts = sum(ends.values())
    return {
        "tasks": len(scores), "value": interval.value, "low": interval.low, "high": interval.high, "attempts": attempts,
        "readable": 1 - ends.get("malformed", 0) / attempts if attempts else None, "calls": calls,
        "accepted": 1 - refused / calls if calls else None, "ends": ends,
    }  # fmt: skip


def paired(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    one, other = by_task(first), by_task(second)
    names = [name for name in one if one[name] and other.get(name)]
    means = [[sum(each[name]) / len(each[name]) for name in names] for each in (one, other)]
    found = compare(means[0], means[1])
    return {**vars(found.difference), "tasks": len(names), "p_value": found.p_value}


def solver_row(scores: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """pass@k over the tasks, each with its interval."""
    shown = {}
    for k in KS:
        enough = [each for each in scores.values() if len(each) >= k]
        interval = bootstrap([pass_at_k(len(each), sum(score >= 1 for score in each), k) for each in enough])
        shown[f"pass@{k}"] = {**vars(interval), "tasks": len(enough)}
    return shown


def main(quick: bool) -> dict[str, Any]:
    if quick:
        return known_truth()
    found = prove(load_recipe(str(RECIPE)), RUN, None, jobs())
    check(found)
    return found


def check(found: Mapping[str, Any]) -> None:
    """What must hold of any run: who errs less solves more, and the models were measured on every suite."""
    skills = [found["solvers"][f"program: planner, {skill:g} of the slips"]["pass@1"]["value"] for skill in SKILLS]
    assert skills[0] > skills[-1] > found["solvers"]["program: random calls"]["pass@1"]["value"], skills
    assert all({SFT, *ARMS} <= set(models) for models in found["success"].values()), "a model was not measured"
    assert all(row["pass@1"]["value"] <= row["pass@2"]["value"] <= row["pass@4"]["value"] for row in found["solvers"].values())


def known_truth() -> dict[str, Any]:
    """Four compiled tasks played by programs, and a table of results whose differences are known."""
    with workspace("transfer") as root:
        scores = played(compiled(root / "few", 4), 4)
    assert all(len(tasks) == 4 and all(len(each) == 4 for each in tasks.values()) for tasks in scores.values())
    careful = scores[f"program: planner, {SKILLS[0]:g} of the slips"]
    assert sum(map(sum, careful.values())) > 0 == sum(map(sum, scores["program: random calls"].values()))
    results = {}
    for model, solved in ((SFT, 20), (GENERAL, 50), (OTHERS, 20)):
        tasks = {f"t{n}": [float(n < solved), None] for n in range(100)}
        ends = {"ends": {"answered": 150, "malformed": 50}}
        results["a suite", model] = [
            {"by_task": {t: tasks[t] for t in list(tasks)[part::2]}, "outcomes": ends,
             "accounts": {"tool_calls": 40, "refused_calls": 10}} for part in (0, 1)
        ]  # fmt: skip
    found = table(results, [SFT, *ARMS])
    shown, gaps = found["success"]["a suite"], found["differences"]["a suite"]
    assert shown[SFT]["value"] == 0.2 and shown[SFT]["readable"] == shown[SFT]["accepted"] == 0.75
    assert abs(gaps[f"{GENERAL} less {SFT}"]["value"] - 0.3) < 1e-9 and gaps[f"{GENERAL} less {SFT}"]["low"] > 0
    assert gaps[f"{OTHERS} less {SFT}"]["value"] == 0 and abs(gaps[f"{GENERAL} less {OTHERS}"]["value"] - 0.3) < 1e-9
    return {"solvers": {name: solver_row(each) for name, each in scores.items()}, **found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--retail", type=Path, help="a directory with tau2 retail's db.json, policy.md and tasks.json")
    parser.add_argument("--jobs", type=int, default=jobs())
    parser.add_argument("--size", type=float, default=1.0, help="a share of each set of tasks, for trying")
    given, overrides = parser.parse_known_args()
    print(json.dumps(prove(load_recipe(str(RECIPE), overrides), given.run, given.retail, given.jobs, given.size), indent=1))
