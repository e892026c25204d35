"""Post-training on the page: RL curves with the stabilisers' statistics, held-out success by stage, context strategies."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rorqual.report.markup import Axis, Line, Plot, Section, absent, plot, prose, rate, table
from rorqual.report.reading import Run, Stage
from rorqual.report.training import COLOURS, ends, title_of

STABILISERS = (
    ("train/kl", "KL to the reference", "the unbiased estimate, weighted by the ratio (equation 7)"),
    (
        "train/masked_share",
        "sequences masked",
        "negative advantage and too far off-policy: they push nothing (equations 8 and 9)",
    ),
    ("train/clip_share", "tokens clipped", "the ratio left [1 − ε, 1 + ε], and the clip stopped its gradient"),
    ("train/ratio_max", "largest ratio", "of a token’s probability in training to that in sampling"),
    (
        "train/mismatch_abs",
        "trainer against sampler",
        "mean distance of log-probs; replayed experts and kept tokens hold it down",
    ),
    ("train/entropy", "entropy", "of the sampled distribution, nats; a collapse shows here first"),
)
CONTEXTS = {
    "none": ("no management", "faint"),
    "summary": ("Summary", "fourth"),
    "discard-75": ("Discard-75%", "third"),
    "discard-all": ("Discard-all", "accent"),
    "parallel-fewest-step": ("Parallel-fewest-step", "dense"),
}
PAPER_CONTEXTS = {
    "summary": ((140, 53.4), (193, 57.0), (256, 59.0), (364, 60.2)),
    "discard-75": ((107, 54.3), (129, 57.0), (143, 57.1), (160, 57.6)),
    "discard-all": ((118, 51.0), (184, 58.5), (235, 61.6), (278, 63.5), (316, 64.8), (350, 65.9), (381, 66.6), (404, 67.3)),
    "parallel-fewest-step": tuple(
        (87.5 * n, score) for n, score in enumerate((51.5, 58.9, 62.3, 64.2, 65.3, 66.5, 67.2, 67.8, 68.1, 68.5), 1)
    ),
}
"""The paper's figure 6, BrowseComp: (mean steps, score), read off the image by eye."""


def rl_section(run: Run) -> Section:
    paper = "Section 3.1, equations 5 to 9"
    body = prose(
        "Group relative policy optimisation: several attempts at one task are compared with each other, and those better than "
        "their group’s mean are made likelier. The paper keeps it stable at scale by four means: an unbiased estimate of the KL, "
        "masking of sequences that are bad <em>and</em> off-policy, the experts used in sampling (<em>Keep Routing</em>), "
        "and the truncation used there (<em>Keep Sampling Mask</em>)."
    )
    stages = [stage for stage in run.stages if stage.is_rl]
    if not stages:
        body += absent("This run has no stage of reinforcement learning.")
        return Section("rl", "Reinforcement learning", paper, body)
    return Section("rl", "Reinforcement learning", paper, body + _success_curves(stages) + _stabilisers(stages))


def _success_curves(stages: Sequence[Stage]) -> str:
    lines, rows = [], []
    for i, stage in enumerate(stages):
        colour = COLOURS[i % len(COLOURS)]
        for name, dash, words in (("rollout/success", "solid", "solved"), ("reward/mean", "dot", "reward")):
            x, y = stage.curve(name)
            if y:
                lines.append(Line(f"{title_of(stage.name)}: {words}", x, y, colour, dash))
                rows.append((title_of(stage.name), words, *(f"{value:.3f}" for value in ends(y))))
        for name in stage.names("rollout/success/"):
            rows.append((title_of(stage.name), name.rpartition("/")[2], *(f"{v:.3f}" for v in ends(stage.curve(name)[1]))))
    drawn = Plot(
        "rl-success", "Share of training tasks solved and mean reward by iteration", lines, Axis("iteration"),
        Axis("share solved; mean reward"),
    )  # fmt: skip
    caption = (
        "On tasks drawn for training, new ones each time, so a jagged line is the luck of the draw. Whether something general "
        "was learnt, the held-out tasks below must say."
    )
    return plot(drawn, caption, table(("stage", "of", "first tenth", "last tenth"), rows, text_columns=2))


def _stabilisers(stages: Sequence[Stage]) -> str:
    panels = []
    for name, title, about in STABILISERS:
        lines = [
            Line(title_of(stage.name), *stage.curve(name), COLOURS[i % len(COLOURS)])
            for i, stage in enumerate(stages)
            if stage.curve(name)[1]
        ]
        if lines:
            rows = [(line.name, *(f"{v:.4g}" for v in ends(line.y)), f"{max(line.y):.4g}") for line in lines]  # type: ignore[type-var]
            drawn = Plot(
                f"rl-{name.rpartition('/')[2]}",
                f"{title} by iteration",
                lines,
                Axis("iteration"),
                Axis(title, from_zero=True),
                height=220,
            )
            panels.append(plot(drawn, f"<b>{title}</b>: {about}.", table(("stage", "first tenth", "last tenth", "most"), rows)))
    if not panels:
        return ""
    return "<h3>The stabilisers at work</h3><div class='pair'>" + "".join(panels) + "</div>"


def held_out_section(run: Run) -> Section:
    paper = "Sections 3 and 4.3"
    body = prose(
        "Tasks in environments that no stage was trained on, the same ones after each stage. A bar is the 95 % interval of the "
        "share solved; where two overlap widely, the run does not show that one stage is better than the other. The paper asks "
        "the same question of its synthesised tasks (table 5 and figure 5): does what is learnt there carry over?"
    )
    measured = [each for each in run.evaluations if each["context"] == "none"]
    if not measured:
        body += absent("This run evaluated no checkpoint on held-out tasks.")
        return Section("held-out", "Held-out success by stage", paper, body)
    suites = list(dict.fromkeys(each["suite"] for each in measured))
    parts = [_by_stage(name, [each for each in measured if each["suite"] == name], len(suites)) for name in suites]
    return Section("held-out", "Held-out success by stage", paper, body + "".join(parts))


def _by_stage(name: str, measured: Sequence[Mapping[str, Any]], among: int) -> str:
    shown = [each for each in measured if each["score"].get("value") is not None]
    titles = [title_of(each["stage"]) for each in shown]
    line = Line(
        name, titles, [each["score"]["value"] for each in shown], "accent", mode="markers",
        low=[each["score"]["low"] for each in shown], high=[each["score"]["high"] for each in shown],
    )  # fmt: skip
    rows = [
        (
            title_of(each["stage"]), each["tasks"], each["samples"], rate(each["score"]),
            "; ".join(f"@{k} {rate(found)}" for k, found in each.get("pass_at_k", {}).items() if k != "1"),
            "" if each.get("mean_steps") is None else f"{each['mean_steps']:.1f}", each.get("unscored_attempts", 0),
        )
        for each in measured
    ]  # fmt: skip
    head = ("after", "tasks", "attempts each", "solved", "pass", "mean steps", "without a score")
    heading = f"<h3>{name}</h3>" if among > 1 else ""
    if not shown:
        return heading + table(head, rows)
    own = re.sub("[^a-z0-9]+", "-", name.lower())
    drawn = Plot(
        f"held-out-{own}", f"Held-out success on {name} by stage, with 95 % intervals", [line], Axis(""),
        Axis("share solved", is_percent=True, from_zero=True), height=300,
    )  # fmt: skip
    return (
        heading
        + plot(drawn, f"The set <i>{name}</i>. Every attempt counts; those without a score are counted apart.")
        + table(head, rows)
    )


def contexts_section(run: Run) -> Section:
    paper = "Section 4.4, figure 6"
    body = prose(
        "An agent’s history outgrows its window. Beyond 80 % of it, the paper tries: sum up and start again (<em>Summary</em>), "
        "drop the oldest three quarters of the tool history (<em>Discard-75%</em>), drop all of it (<em>Discard-all</em>), or no "
        "reset at all but several attempts, of which the shortest counts (<em>Parallel-fewest-step</em>). What each strategy "
        "buys is judged at equal steps."
    )
    own = [each for each in run.evaluations if each["context"] != "none"]
    if own:
        of = (own[-1]["suite"], own[-1]["stage"])
        own = [each for each in run.evaluations if (each["suite"], each["stage"]) == of]
        body += "<div class='pair'>" + _own_curves(own) + _paper_curves() + "</div>" + _context_table(own)
    else:
        body += absent("This run measured no context strategy; the paper’s figure stands alone.") + _paper_curves()
    return Section("contexts", "Context strategies", paper, body)


def _own_curves(own: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for each in own:
        points = [point for point in each.get("curve", ()) if point["score"] is not None and point["steps"] is not None]
        name, colour = CONTEXTS.get(each["context"], (each["context"], "fifth"))
        lines.append(
            Line(
                name, [p["steps"] for p in points], [100 * p["score"] for p in points], colour, mode="lines+markers",
                low=[100 * p["low"] for p in points], high=[100 * p["high"] for p in points], hover=[p["label"] for p in points],
            )
        )  # fmt: skip
    drawn = Plot(
        "contexts-own", "Score against mean steps by context strategy, this run", lines, Axis("mean steps, resets included"),
        Axis("score, %", from_zero=True), height=320,
    )  # fmt: skip
    return plot(drawn, f"<b>This run</b>, {own[0]['suite']}. Lines are smaller budgets of the same attempts.")


def _context_table(own: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            CONTEXTS.get(each["context"], (each["context"],))[0], each["tasks"], rate(each["score"]),
            "" if each.get("mean_steps") is None else f"{each['mean_steps']:.1f}", f"{each['accounts'].get('resets', 0):,}",
            f"{each['accounts'].get('sampled_tokens', 0):,}",
        )
        for each in own
    ]  # fmt: skip
    return table(("strategy", "tasks", "score", "mean steps", "resets", "tokens sampled"), rows)


def _paper_curves() -> str:
    lines = [
        Line(CONTEXTS[name][0], [s for s, _ in points], [v for _, v in points], CONTEXTS[name][1], mode="lines+markers")
        for name, points in PAPER_CONTEXTS.items()
    ]
    drawn = Plot(
        "contexts-paper", "Score against steps by context strategy, the paper's figure 6", lines, Axis("mean steps"),
        Axis("BrowseComp, %"), height=320,
    )  # fmt: skip
    return plot(drawn, "<b>The paper</b>, BrowseComp; read off figure 6 by eye.")
