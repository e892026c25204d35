"""Post-training pays, step by step, on held-out tasks: base, cold start, specialists, distilled generalist, after mixed RL.

Claims: on at least three of maths, logic, general and search the specialist is at least 10 points above the cold start; the
distilled generalist is within 3 points of the mean of the specialists, each on its own domain and every domain counting the same,
over at least 2,000 held-out tasks. Differences are paired by task, with bootstrap intervals. Domains beyond these four that the
recipe trains on stand in the table too, and no claim is made about them.

    python -m benchmarks.prove_post_training RECIPE RUN [--base MODEL] [--tasks N] [--jobs N] [--field=value ...]

trains what is missing in RUN (with --base, post-training alone), plays what is missing, each checkpoint on each share of the
tasks in a process of its own, writes RUN/proof/table.json and prints it. RUN may be a copy of another machine's: what stands in
it is not made again. The quick form computes the table of evaluations whose truth is known.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.prove import jobs
from rorqual.evals.evaluation import Evaluation, read_results
from rorqual.evals.statistics import compare, wilson
from rorqual.parallel.world import start, stop
from rorqual.runlog import RunLog, read_events, write_atomically
from rorqual.stages import held_out, post_training
from rorqual.stages import run as whole_run
from rorqual.stages.recipe import Recipe, load_recipe
from rorqual.stages.specialists import read_specialists
from rorqual.stages.synthesize import trained_on
from rorqual.synthesis.primers import DOMAINS as PRIMERS
from rorqual.synthesis.primers import MORE, PrimerConfig, primer
from rorqual.tasks import Store, splits, task_record
from rorqual.tasks.store import world_record
from rorqual.train.loop import Site

SECONDS, QUICK_SECONDS = 5400, 12
RECIPE, RUN = "tiny", Path("runs/post-training-proof")
TASKS = 2000
GAIN, WITHIN, DOMAINS = 0.10, 0.03, ("maths", "logic", "general", "search")
BASE, COLD, DISTILLED, MIXED = "base", "cold start", "distilled", "mixed RL"
MEAN = "mean of domains"
DRAWS = 2000

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
    found = prove(load_recipe(RECIPE), RUN, TASKS, jobs())
    assert_claims(found)
    return found


def prove(recipe: Recipe, run: Path, tasks: int, side_by_side: int, base: Path | None = None) -> dict[str, Any]:
    """Train what is missing, evaluate what is missing, and write the table."""
    assert recipe.post_training is not None, "the recipe has no table [post_training]"
    train(recipe, run, base)
    stores = [held_out_primers(run / "proof" / "primers", tasks), *trained_on(recipe.post_training.synthesis, run / "tasks")]
    rows = checkpoints(recipe, run, base)
    plan = [each for row in rows for each in pieces(row, stores, recipe, run / "proof", side_by_side)]
    held_out.measure(plan, side_by_side, RunLog(run / "proof"))
    found = table(*gathered(rows, stores, recipe, run / "proof", side_by_side))
    found["lineage"] = lineage({row.name: row.model for row in rows if not row.domain})
    write_atomically(run / "proof" / "table.json", json.dumps(found, indent=1))
    return found


def train(recipe: Recipe, run: Path, base: Path | None) -> None:
    """The whole recipe, or from a given base its post-training; without its own evaluation, since the table is a larger one."""
    assert recipe.post_training is not None
    config = replace(recipe.post_training, evaluation=None)
    world = start(recipe.parallel, recipe.device)
    try:
        if base is None:
            whole_run.main(replace(recipe, post_training=config), run, world, quiet=True)
        else:
            post_training.main(config, base, run, world, Site.open(run, world, quiet=True).log, quiet=True)
    finally:
        stop()


@dataclass(frozen=True)
class Row:
    """A checkpoint to measure; a specialist in its own domain alone."""

    name: str
    model: Path
    thinking: bool
    domain: str = ""


def checkpoints(recipe: Recipe, run: Path, base: Path | None) -> list[Row]:
    """The chain in order, then the specialists."""
    post = recipe.post_training
    assert post is not None
    thinking = _thinks(recipe)
    if base is None:
        last = next(n for n in ("train-sparse", "warm-indexer", "extend", "pretrain") if getattr(recipe, n.replace("-", "_")))
        base = run / last / "model"
    rows = [Row(BASE, base, thinking)]
    if post.cold_start:
        rows.append(Row(COLD, run / "cold-start" / "sft" / "model", thinking))
    if post.distill and post.specialists:
        below = "sft" if post.distill.method == "data" else "on-policy"
        rows.append(Row(DISTILLED, run / "distill" / below / "model", thinking))
    if post.mixed:
        rows.append(Row(MIXED, run / "mixed" / "model", thinking))
    specialists = read_specialists(run / "specialists") if post.specialists else []
    return rows + [Row(s.name, s.model, s.thinking, s.domain) for s in specialists]


def pieces(row: Row, stores: Sequence[Path], recipe: Recipe, directory: Path, shares: int) -> list[Evaluation]:
    """The row's evaluations, as the recipe's own are made: every store that has tasks for it, in shares."""
    post = recipe.post_training
    assert post is not None
    config = replace(post.evaluation or held_out.Config(), tasks=None)
    found = []
    for store in stores:
        counts = {d: len(held_out_tasks(store, d)) for d in _measured_in(store) if row.domain in ("", d)}
        families, count = tuple(d for d in counts if counts[d]), min(shares, sum(counts.values()))
        for index in range(1, count + 1):
            out = directory / f"{row.name.replace(' ', '-')}-{store.name}" / f"{index}-of-{count}"
            found.append(held_out.evaluation(config, row.model, store, out, "none", row.thinking, (index, count), families))
    return found


@cache
def _measured_in(store: Path) -> tuple[str, ...]:
    """The store's domains; of the run's own primers those that the larger store of held-out ones lacks."""
    domains = dict.fromkeys(task.family for task in Store(store).tasks())
    return tuple(d for d in domains if store.name != "primer" or d not in PRIMERS)


@cache
def held_out_tasks(store: Path, domain: str) -> tuple[str, ...]:
    found = Store(store)
    tasks = {task.id: task for task in found.tasks()}
    return tuple(name for name in splits(tasks.values(), found.worlds()).get("test", ()) if tasks[name].family == domain)


def gathered(
    rows: Sequence[Row], stores: Sequence[Path], recipe: Recipe, directory: Path, shares: int
) -> tuple[dict[str, Evaluated], dict[str, Evaluated]]:
    """(the chain by name, the specialists by domain). Of a domain's two modes the chain's own is compared."""
    families = {task.id: task.family for store in stores for task in Store(store).tasks()}
    chain, specialists = dict[str, Evaluated](), dict[str, Evaluated]()
    for row in sorted(rows, key=lambda row: row.thinking == _thinks(recipe)):
        by_domain: dict[str, Scores] = {}
        for piece in pieces(row, stores, recipe, directory, shares):
            for task, values in read_results(piece.out)["by_task"].items():
                if scored := [value for value in values if value is not None]:
                    by_domain.setdefault(families[task], {})[task] = sum(scored) / len(scored)
        (specialists if row.domain else chain)[row.domain or row.name] = Evaluated(row.name, by_domain)
    return {row.name: chain[row.name] for row in rows if not row.domain}, specialists


def held_out_primers(directory: Path, most: int) -> Path:
    """A store of `most` primers at least, all of the held-out split: as many of each domain as there are, or an equal share."""
    store = Store(directory)
    if store.is_sealed:
        return directory
    wanted: dict[str, int] = {}
    for domain in PRIMERS:  # the larger ones last: they fill what the small ones lack
        rest = -(-(most - sum(wanted.values())) // (len(PRIMERS) - len(wanted)))
        wanted[domain] = append_primers(store, domain, rest)
    store.seal({"held_out": wanted})
    return directory


def append_primers(store: Store, domain: str, most: int) -> int:
    """Held-out tasks of one domain, until there are enough or no new one is found in a long while; how many there are."""
    config, order = PrimerConfig(seed=1, domains=domain), (*PRIMERS, *MORE).index(domain)
    seen, known, number, last = set[str](), set[str](), 0, 0
    while len(seen) < most and number - last < 5_000:
        made = primer(config, number)
        number += 1
        if made.row is None or made.row.task.id in seen:
            continue
        task, worlds = made.row.task, {made.world.id: made.world} if made.world else {}
        if splits([task], worlds).get("test"):
            if made.world is not None and made.world.id not in known:
                store.append(world_record(made.world, (order, number)))
                known.add(made.world.id)
            store.append(task_record(made.row, (order, number, 1)))
            seen.add(task.id)
            last = number
    return len(seen)


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
        claims["generalist"] = _closeness(_differences(joined, stages[DISTILLED])[MEAN])
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
    """Second less first, task by task: in each domain that both were measured in, over all tasks, and as the mean of DOMAINS."""
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
    return found | _mean_of_domains({domain: pairs[domain] for domain in DOMAINS if pairs.get(domain)})


def _mean_of_domains(pairs: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, Any]:
    """The mean of the domains' differences; tasks are drawn anew within each domain."""
    if not pairs:
        return {}
    generator, value, drawn = np.random.default_rng(0), 0.0, np.zeros(DRAWS)
    for scores in pairs.values():
        deltas = np.array([b - a for a, b in scores])
        value += float(deltas.mean()) / len(pairs)
        drawn += deltas[generator.integers(0, len(deltas), (DRAWS, len(deltas)))].mean(axis=1) / len(pairs)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {MEAN: {"value": value, "low": float(low), "high": float(high), "tasks": sum(map(len, pairs.values()))}}


def _gains(differences: Mapping[str, Any]) -> dict[str, Any]:
    """At least 10 points in at least three of the four domains, each apart from no gain."""
    gains = {domain: differences[domain] for domain in DOMAINS if domain in differences}
    enough = sorted(domain for domain, d in gains.items() if d["value"] >= GAIN and d["low"] > 0)
    return {"holds": len(enough) >= 3, "enough": enough, "gains": gains}


def _closeness(difference: Mapping[str, Any]) -> dict[str, Any]:
    return {"holds": difference["value"] >= -WITHIN and difference["tasks"] >= TASKS, "difference": difference}


def end_to_end(directory: Path) -> dict[str, dict[str, float]]:
    """By domain what came of specialists that are no part of the table (`rorqual specialists --out DIRECTORY`): means over
    their iterations. Writing is judged by programmatic rubrics, unless the run had a judge."""
    found = {}
    for each in read_specialists(directory):
        means: dict[str, float] = {}
        for event in read_events(each.model.parent, "metrics"):
            for name, value in event.items():
                if name.startswith(("rollout/", "reward/")):
                    means[name] = means.get(name, 0.0) + value
        steps = len(read_events(each.model.parent, "metrics"))
        chosen = ("rollout/success", "reward/mean", "reward/outcome", "rollout/answered", "rollout/steps", "rollout/flat_groups")
        found[each.domain] = {"iterations": steps, "attempts": means["rollout/samples"]} | {
            name: means[name] / steps for name in chosen if name in means
        }
    return found


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
    domains = [*sorted({domain for row in found["rates"].values() for domain in row} - {"all"}), "all", MEAN]
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
    four = [d for d in tasks if d in DOMAINS]
    truth = sum(
        (stages[DISTILLED].by_domain[d][t] - specialists[d].by_domain[d][t]) / len(tasks[d]) for d in four for t in tasks[d]
    ) / len(four)  # fmt: skip
    assert abs(gap["value"] - truth) < 1e-12 and gap["low"] <= truth <= gap["high"] and gap["tasks"] == 2100
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
    parser.add_argument("--base", type=Path)
    parser.add_argument("--tasks", type=int, default=TASKS)
    parser.add_argument("--others", type=Path, help="a directory of specialists in further domains, to report what came")
    parser.add_argument("--jobs", type=int, default=jobs())
    asked, overrides = parser.parse_known_args()
    table_of = prove(load_recipe(asked.recipe, overrides), asked.run, asked.tasks, asked.jobs, asked.base)
    if asked.others:
        table_of["other_domains"] = end_to_end(asked.others)
        write_atomically(asked.run / "proof" / "table.json", json.dumps(table_of, indent=1))
    print(render(table_of))
