"""Post-training pays, step by step, on held-out tasks: base, cold start, specialists, distilled generalist, after mixed RL.

Claims: on at least three of maths, logic, general and search the specialist is at least 10 points above the cold start; the
distilled generalist is within 3 points of the mean of the specialists, each on its own domain, over at least 2,000 held-out
tasks. Differences are paired by task, with bootstrap intervals. The whole table, held or not, lies in RUN/proof/table.json.

    python -m benchmarks.prove_post_training RECIPE RUN [--tasks N]    train what is missing in RUN, evaluate, and print the table

The quick form computes the table of evaluations whose truth is known.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rorqual.evals.statistics import compare, wilson
from rorqual.runlog import write_atomically
from rorqual.stages.recipe import Recipe, load_recipe
from rorqual.stages.specialists import Specialist, read_specialists
from rorqual.stages.synthesize import trained_on
from rorqual.tasks import Store

SECONDS, QUICK_SECONDS = 5400, 12
RECIPE, RUN = "tiny", Path("runs/post-training-proof")
TASKS = 2000
GAIN, WITHIN, DOMAINS = 0.10, 0.03, ("maths", "logic", "general", "search")
BASE, COLD, DISTILLED, MIXED = "base", "cold start", "distilled", "mixed RL"

Scores = dict[str, float]
"""task -> mean score of its attempts."""


@dataclass(frozen=True)
class Evaluated:
    """One checkpoint on the held-out tasks: by domain, each task's score."""

    name: str
    by_domain: Mapping[str, Scores]


def main(quick: bool) -> dict[str, Any]:
    if quick:
        return known_truth()
    found = prove(RECIPE, RUN, TASKS)
    assert_claims(found)
    return found


def prove(recipe_name: str, run: Path, tasks: int) -> dict[str, Any]:
    """Train what is missing, evaluate what is missing, and write the table."""
    recipe = load_recipe(recipe_name)
    assert recipe.post_training is not None, f"{recipe_name}: has no table [post_training]"
    subprocess.run([sys.executable, "-m", "rorqual", "run", recipe_name, "--out", str(run), "--quiet"], check=True)
    stores = trained_on(recipe.post_training.synthesis, run / "tasks")
    specialists = read_specialists(run / "specialists") if recipe.post_training.specialists else []
    stages = {name: evaluated(name, path, stores, recipe, run, tasks) for name, path in checkpoints(recipe, run).items()}
    own = {s.name: evaluated(s.name, s.model, stores, recipe, run, tasks, s) for s in specialists}
    # Of a domain's specialists in two modes, the one in the chain's own mode is compared.
    chosen = sorted(specialists, key=lambda s: s.thinking == _thinks(recipe))
    found = table(stages, {s.domain: own[s.name] for s in chosen})
    found["lineage"] = lineage(checkpoints(recipe, run))
    write_atomically(run / "proof" / "table.json", json.dumps(found, indent=1))
    return found


def checkpoints(recipe: Recipe, run: Path) -> dict[str, Path]:
    """The chain, in order: where each stage that the recipe has leaves its model."""
    post = recipe.post_training
    assert post is not None
    base = next(n for n in ("train-sparse", "warm-indexer", "extend", "pretrain") if getattr(recipe, n.replace("-", "_")))
    places = {BASE: run / base / "model"}
    if post.cold_start:
        places[COLD] = run / "cold-start" / "sft" / "model"
    if post.distill and post.specialists:
        below = "sft" if post.distill.method == "data" else "on-policy"
        places[DISTILLED] = run / "distill" / below / "model"
    if post.mixed:
        places[MIXED] = run / "mixed" / "model"
    return places


def evaluated(
    name: str, model: Path, stores: Sequence[Path], recipe: Recipe, run: Path, tasks: int, own: Specialist | None = None
) -> Evaluated:
    """`rorqual evaluate` on every store's held-out split; what was played before is not played again."""
    by_domain: dict[str, Scores] = {}
    for store in stores:
        families = {task.id: task.family for task in Store(store).tasks()}
        out = run / "proof" / f"{name.replace(' ', '-')}-{store.name}"
        if not (out / "results.json").exists():
            evaluate(model, store, recipe, out, tasks, own)
        for task, values in json.loads((out / "results.json").read_text())["by_task"].items():
            scored = [value for value in values if value is not None]
            if scored and (own is None or families[task] == own.domain):
                by_domain.setdefault(families[task], {})[f"{store.name}/{task}"] = sum(scored) / len(scored)
    return Evaluated(name, by_domain)


def evaluate(model: Path, store: Path, recipe: Recipe, out: Path, tasks: int, own: Specialist | None) -> None:
    """As the recipe's own evaluation is made, in the mode that was trained."""
    post = recipe.post_training
    assert post is not None
    from rorqual.stages.held_out import Config

    config = post.evaluation or Config()
    thinking = own.thinking if own else _thinks(recipe)
    options = {
        "benchmark": "heldout", "policy": model, "data": store, "split": config.split, "limit": tasks, "n": config.attempts,
        "temperature": config.temperature, "max-turn-tokens": config.max_turn_tokens, "max-turns": config.max_turns,
        "window": config.window, "isolation": config.isolation, "seed": config.seed, "concurrency": config.concurrency,
        "cache-tokens": config.cache_tokens, "thinking": "on" if thinking else "off", "out": out,
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    subprocess.run(
        [sys.executable, "-m", "rorqual", "evaluate", "--quiet", "--json", *words],
        check=True, stdout=subprocess.DEVNULL, env=environment,
    )  # fmt: skip


def _thinks(recipe: Recipe) -> bool:
    """The mode of the chain: that of mixed RL, else the specialists' first."""
    post = recipe.post_training
    assert post is not None
    if post.mixed:
        return post.mixed.mode.thinking
    return post.specialists is None or post.specialists.modes[0] == "thinking"


def table(stages: Mapping[str, Evaluated], specialists: Mapping[str, Evaluated]) -> dict[str, Any]:
    """Rates by checkpoint and domain, paired differences of each step, and what the claims come to."""
    rows = {name: _rates(each) for name, each in stages.items()}
    rows |= {f"specialist {domain}": _rates(each) for domain, each in specialists.items()}
    joined = Evaluated("specialists", {domain: each.by_domain.get(domain, {}) for domain, each in specialists.items()})
    order = [stages.get(BASE), stages.get(COLD), joined if specialists else None, stages.get(DISTILLED), stages.get(MIXED)]
    there = [each for each in order if each is not None]
    steps = {f"{a.name} -> {b.name}": _differences(a, b) for a, b in pairwise(there)}
    if stages.get(MIXED) and specialists:
        steps[f"specialists -> {MIXED}"] = _differences(joined, stages[MIXED])
    claims: dict[str, Any] = {}
    if COLD in stages and specialists:
        claims["specialists"] = _gains(_differences(stages[COLD], joined))
    if DISTILLED in stages and specialists:
        claims["generalist"] = _closeness(_differences(joined, stages[DISTILLED])["all"])
    return {"rates": rows, "steps": steps, "claims": claims}


def _rates(found: Evaluated) -> dict[str, Any]:
    """Domain -> mean score with Wilson's interval (of attempts rounded to tasks), and how many tasks."""
    everything = {f"{domain}/{task}": s for domain, scores in found.by_domain.items() for task, s in scores.items()}
    rates = {}
    for domain, scores in {**found.by_domain, "all": everything}.items():
        interval = wilson(round(sum(scores.values())), len(scores))
        mean = sum(scores.values()) / len(scores) if scores else math.nan
        rates[domain] = {"value": mean, "low": min(interval.low, mean), "high": max(interval.high, mean), "tasks": len(scores)}
    return rates


def _differences(first: Evaluated, second: Evaluated) -> dict[str, Any]:
    """Second less first, task by task, in each domain that both were measured in, and in all of them."""
    pairs: dict[str, list[tuple[float, float]]] = {}
    for domain in sorted(first.by_domain.keys() & second.by_domain.keys()):
        one, other = first.by_domain[domain], second.by_domain[domain]
        pairs[domain] = [(one[task], other[task]) for task in sorted(one.keys() & other.keys())]
    pairs["all"] = [pair for domain in list(pairs) for pair in pairs[domain]]
    found = {}
    for domain, scores in pairs.items():
        if scores:
            result = compare([a for a, _ in scores], [b for _, b in scores])
            d = result.difference
            found[domain] = {"value": d.value, "low": d.low, "high": d.high, "tasks": len(scores), "p_value": result.p_value}
    return found


def _gains(differences: Mapping[str, Any]) -> dict[str, Any]:
    """At least 10 points in at least three of the four domains, each apart from no gain."""
    gains = {domain: differences[domain] for domain in DOMAINS if domain in differences}
    enough = sorted(domain for domain, d in gains.items() if d["value"] >= GAIN and d["low"] > 0)
    return {"holds": len(enough) >= 3, "enough": enough, "gains": gains}


def _closeness(difference: Mapping[str, Any]) -> dict[str, Any]:
    return {"holds": difference["value"] >= -WITHIN and difference["tasks"] >= TASKS, "difference": difference}


def lineage(places: Mapping[str, Path]) -> dict[str, list[str]]:
    """What made each checkpoint, as its own record draws it."""
    from rorqual.train.lineage import read_lineage, tree

    return {name: tree(*read_lineage(path)) for name, path in places.items()}


def assert_claims(found: Mapping[str, Any]) -> None:
    for name in ("specialists", "generalist"):
        assert name in found["claims"], f"{name}: the run has no such checkpoints"
        assert found["claims"][name]["holds"], f"{name}: {json.dumps(found['claims'][name])}"


def render(found: Mapping[str, Any]) -> str:
    """The table as text: a line for each checkpoint, then one for each step."""
    domains = [*sorted({domain for row in found["rates"].values() for domain in row} - {"all"}), "all"]
    lines = [f"{'':<22}" + "".join(f"{domain:>22}" for domain in domains)]
    for kind in ("rates", "steps"):
        for name, row in found[kind].items():
            lines.append(f"{name:<22}" + "".join(f"{_cell(row.get(domain), kind == 'steps'):>22}" for domain in domains))
    lines += [f"claim {name}: {'holds' if claim['holds'] else 'does not hold'}" for name, claim in found["claims"].items()]
    return "\n".join(lines)


def _cell(found: Mapping[str, Any] | None, is_signed: bool) -> str:
    if found is None or math.isnan(found["value"]):
        return "-"
    sign = "+" if is_signed else ""
    return f"{100 * found['value']:{sign}.1f} [{100 * found['low']:{sign}.1f}, {100 * found['high']:{sign}.1f}]"


def known_truth() -> dict[str, Any]:
    """Evaluations drawn with known success rates: the table must find the gains and the gap that were put in."""
    rates = {BASE: 0.02, COLD: 0.3, DISTILLED: 0.58, MIXED: 0.65}
    tasks = {domain: [f"{domain}/{n}" for n in range(700)] for domain in ("maths", "logic", "general", "writing")}
    draw = {(d, t): random.Random(t).random() for d, names in tasks.items() for t in names}

    def drawn(name: str, rate: float, domains: Sequence[str]) -> Evaluated:
        return Evaluated(name, {d: {t: float(draw[d, t] < rate) for t in tasks[d]} for d in domains})

    stages = {name: drawn(name, rate, list(tasks)) for name, rate in rates.items()}
    specialists = {domain: drawn(domain, 0.6 if domain != "writing" else 0.31, [domain]) for domain in tasks}
    found = table(stages, specialists)
    assert found["claims"]["specialists"]["holds"] and found["claims"]["specialists"]["enough"] == ["general", "logic", "maths"]
    gap = found["claims"]["generalist"]["difference"]
    truth = sum(
        stages[DISTILLED].by_domain[d][t] - specialists[d].by_domain[d][t] for d in tasks for t in tasks[d]
    ) / sum(map(len, tasks.values()))  # fmt: skip
    assert abs(gap["value"] - truth) < 1e-12 and gap["low"] <= truth <= gap["high"] and gap["tasks"] == 2800
    worse = {**stages, DISTILLED: drawn(DISTILLED, 0.4, list(tasks))}
    assert not table(worse, specialists)["claims"]["generalist"]["holds"], "a generalist 20 points below is found out"
    lazy = {domain: drawn(domain, 0.35, [domain]) for domain in tasks}
    assert not table(stages, lazy)["claims"]["specialists"]["holds"], "gains of 5 points are no gains of 10"
    with tempfile.TemporaryDirectory() as directory:
        write_atomically(Path(directory) / "table.json", json.dumps(found))
    assert render(found).count("\n") >= len(rates) + len(specialists)
    return {"claims": found["claims"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("run", type=Path)
    parser.add_argument("--tasks", type=int, default=TASKS)
    asked = parser.parse_args()
    print(render(prove(asked.recipe, asked.run, asked.tasks)))
