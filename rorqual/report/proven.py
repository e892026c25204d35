"""Committed proofs whose figures are tables of their own: post-training step by step, transfer, Speciale, proof rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rorqual.report.markup import percent, prose, rate, signed, table

Figures = Mapping[str, Any]


def post_training(figures: Figures) -> str:
    """Rates by checkpoint and domain, then what each step gained or lost, task by task."""
    rates, steps = figures["rates"], figures["steps"]
    domains = sorted({domain for row in rates.values() for domain in row} - {"all"})
    columns = [*domains, "all"]
    tasks = {domain: max(row[domain]["tasks"] for row in rates.values() if domain in row) for domain in columns}
    head = ["checkpoint", *(f"{domain}, {tasks[domain]:,} tasks" for domain in columns)]
    by_checkpoint = [[name, *(_rate(row.get(domain)) for domain in columns)] for name, row in rates.items()]
    mean = "mean of domains"
    by_step = [[name, *(_points(row.get(domain)) for domain in [*columns, mean])] for name, row in steps.items()]
    others = [[name, *(_figure(value) for value in found.values())] for name, found in figures.get("other_domains", {}).items()]
    measures = list(next(iter(figures.get("other_domains", {}).values()), {}))
    claims = [f"{name}: {'holds' if claim['holds'] else 'does not hold'}" for name, claim in figures["claims"].items()]
    return (
        table(head, by_checkpoint, "Held-out tasks solved, with 95 % intervals")
        + table(["step", *columns, mean], by_step, "Difference in points, paired by task")
        + prose(f"Claims: {'; '.join(claims)}.", *map(str, figures.get("why", ())))
        + (table(["domain", *measures], others, "Further domains, run end to end; no claim is made of them") if others else "")
    )


def transfer(figures: Figures) -> str:
    """By set of tasks: success of each model, how much of what it writes can be read, and what separates the models."""
    parts = []
    for suite, models in figures["success"].items():
        rows = [
            [name, found["tasks"], rate(found), percent(found["readable"]), f"{found['calls']:,}", percent(found["accepted"])]
            for name, found in models.items()
        ]
        head = ("model", "tasks", "solved", "readable attempts", "calls", "calls accepted")
        parts.append(table(head, rows, f"Set: {suite}"))
        if gaps := [[name, found["tasks"], _points(found)] for name, found in figures["differences"][suite].items()]:
            parts.append(table(("difference", "tasks", "points"), gaps))
    ks = list(next(iter(figures["solvers"].values())))
    solvers = [[name, *(rate(found[k]) for k in ks)] for name, found in figures["solvers"].items()]
    parts.append(table(["solver", *ks], solvers, "The fifty compiled tasks by solver"))
    return "".join(parts) + prose(*map(str, figures.get("why", ())))


def speciale(figures: Figures) -> str:
    """Both recipes at each strength of the standard length penalty."""
    rows, said = [], []
    for weight, found in figures["by_weight"].items():
        for measure, scale, unit in (("success", 100, " %"), ("tokens", 1, "")):
            cells = [_interval(found[measure][name], scale) for name in ("standard", "speciale", "speciale less standard")]
            rows.append([weight, f"{measure}{unit}", *cells])
        verdict = [f"{name}: {'yes' if holds else 'not shown'}" for name, holds in found["verdict"].items()]
        said.append(f"Penalty weight {weight}: {'; '.join(verdict)}.")
    head = ("weight of the standard penalty", "measure", "standard", "Speciale", "Speciale less standard")
    start = f"{100 * figures['base']['success']:.1f} % at {figures['base']['tokens']:.1f} tokens"
    caption = f"{figures['seeds']} seeds, {figures['steps']} steps, {figures['held_out']} held-out tasks; the base: {start}"
    return table(head, rows, caption, text_columns=2) + prose(*said)


def proof_rewards(figures: Figures) -> str:
    """What verifiers earn by the mixture of true scores, and the labels that noisy panels give."""
    rows = [
        [mixture, name.replace("_", " "), *(f"{found[term]:.2f}" for term in ("reward", "score", "meta"))]
        for mixture, verifiers in figures["verifiers"].items()
        for name, found in verifiers.items()
    ]
    labels = [[noise, *(found[name] for name in ("right", "wrong", "discarded"))] for noise, found in figures["labels"].items()]
    head = ("proofs", "verifier", "reward", "R_score", "R_meta")
    return (
        table(head, rows, "The verifier's reward is the product of its parts; planted verifiers are found out", text_columns=2)
        + table(("share of invented analyses", "right", "wrong", "discarded"), labels, "Automatic labels")
        + table(("proof search", "figure"), list(figures["search"].items()))
    )


SHOWN: dict[str, tuple[Sequence[str], Callable[[Figures], str]]] = {
    "post_training": (("rates", "steps", "claims"), post_training),
    "transfer": (("success", "differences", "solvers"), transfer),
    "speciale": (("by_weight", "base", "seeds"), speciale),
    "proof_rewards": (("verifiers", "labels", "search"), proof_rewards),
}
"""proof -> the figures that its table is made of, and the table."""


def shown(name: str, figures: Any) -> str | None:
    """The table of a proof's figures; None for a proof that has none, or figures of an older form of it."""
    needed, made = SHOWN.get(name, ((), None))
    if made is None or not isinstance(figures, Mapping) or not set(needed) <= set(figures):
        return None
    return made(figures)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:.3f}"


def _rate(found: Figures | None) -> str:
    return "" if found is None else rate(found)


def _points(found: Figures | None) -> str:
    """A difference in points with its interval: +12.0 [+9.1, +15.2]."""
    if found is None:
        return ""
    value, low, high = (signed(found[name], 1).removesuffix(" %") for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _interval(found: Figures, scale: float) -> str:
    return f"{scale * found['mean']:.1f} [{scale * found['low']:.1f}, {scale * found['high']:.1f}]".replace("-", "−")
