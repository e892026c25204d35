"""What was trained, and how it went: every stage with its steps, tokens, losses, time and memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from rorqual.report.markup import (
    Axis,
    Html,
    Line,
    Plot,
    Section,
    absent,
    count,
    duration,
    facts,
    percent,
    plot,
    prose,
    signed,
    size,
    table,
)
from rorqual.report.reading import Run, Stage

KINDS = {
    "pretrain": ("Dense pre-training", "every token attends to all before it; a second head predicts the token after next"),
    "extend": ("A longer context", "rotary positions are stretched (YaRN), and training goes on on longer rows"),
    "warm-indexer": ("Warm-up of the indexers", "all is frozen but the indexers, which learn to imitate the attention"),
    "train-sparse": ("Sparse training", "tokens attend only to what the indexers select; model and indexers learn side by side"),
    "control": ("Dense control", "the same tokens without selection, to compare with"),
    "cold-start": ("Cold start", "conversations that think and call tools, so that RL finds something to reward"),
    "sft": ("Supervised fine-tuning", "the assistant's side of conversations is imitated"),
    "specialist": ("Specialist", "reinforcement learning on one domain alone"),
    "distill": ("Distillation", "what the specialists produced is taught to one model"),
    "grpo": ("Mixed RL", "all domains in one stage of reinforcement learning"),
    "mixed": ("Mixed RL", "all domains in one stage of reinforcement learning"),
    "rl": ("Mixed RL", "all domains in one stage of reinforcement learning"),
}
LOSSES = ("train/loss", "train/index_loss", "reward/mean")
COLOURS = ("accent", "dense", "third", "fourth", "fifth", "sixth")


def title_of(name: str) -> str:
    """A stage's name as a person would say it: specialists/retail -> Specialist (retail)."""
    kind, _, rest = name.partition("/")
    for known, (title, _) in KINDS.items():
        if kind == known or kind == f"{known}s" or kind.startswith(f"{known}-"):
            more = rest or kind.removeprefix(known).removeprefix("s").strip("-")
            return f"{title} ({more})" if more else title
    return name.replace("/", ": ").replace("-", " ").capitalize()


def masthead(run: Run) -> str:
    """The figures that say at once what this run was."""
    made = run.exhibits.get("model", {})
    pairs = []
    if made:
        remark = f"{count(made['activated'])} active for a token"
        pairs.append((count(made["parameters"]), "parameters", remark))
    trained = sum(stage.tokens for stage in run.stages)
    seconds = sum(stage.seconds for stage in run.stages)
    if trained:
        pairs.append((count(trained), "tokens trained on", f"in {len(run.stages)} stages"))
    if run.stages:
        memory = max(stage.memory_bytes for stage in run.stages)
        pairs.append((duration(_elapsed(run) or seconds), "start to end", f"{duration(seconds)} of it training"))
        pairs.append((size(memory), "peak memory", "of the training process"))
    pairs += _outcomes(run)
    return facts(pairs)


def _outcomes(run: Run) -> Iterator[tuple[str, str, str]]:
    losses = run.exhibits.get("quality", {}).get("loss", {})
    if losses:
        reference = next(losses[name] for name in ("control", "before, dense", "same weights, dense") if name in losses)
        change = losses["sparse"]["loss"] / reference["loss"] - 1
        yield signed(change), "held-out loss, sparse against dense", reference["about"]
    scores = [e for e in run.evaluations if e["context"] == "none" and e["score"].get("value") is not None]
    if scores:
        same = [e for e in scores if e["suite"] == scores[-1]["suite"]]
        first, last = same[0], same[-1]
        change = f"{percent(first['score']['value'], 0)} after {title_of(first['stage']).lower()}" if first is not last else ""
        yield percent(last["score"]["value"], 0), "of held-out tasks solved at the end", change


def _elapsed(run: Run) -> float:
    times = [event["time"] for event in run.events]
    return (run.ended or 0.0) - min(times) if times else 0.0


def stages_section(run: Run) -> Section:
    body = prose(
        "DeepSeek-V3.2 is made in stages. A dense model learns language; its context is stretched; a small <em>lightning "
        "indexer</em> in every layer learns which earlier tokens matter; then attention is restricted to those. What follows is "
        "post-training: imitation first, reinforcement learning after it. This run did the same at a size that fits on a desk, "
        "so its losses are those of a very small model. What carries over is the procedure.",
    )
    if not run.stages:
        return Section("stages", "What was trained", "Sections 2 and 3", body + absent("No stage has made a step yet."))
    body += _table(run.stages) + _loss_plot(run.stages) + _text(run) + _samples(run)
    return Section("stages", "What was trained", "Sections 2 and 3", body)


def _table(stages: Sequence[Stage]) -> str:
    rows = []
    for stage in stages:
        name = _loss_name(stage)
        _, values = stage.curve(name) if name else ([], [])
        first, last = (f"{v:.3g}" for v in ends(values)) if values else ("", "")
        _, rates = stage.curve("train/tokens_per_s")
        about = next((a for k, (_, a) in KINDS.items() if stage.name.startswith(k)), "")
        rows.append(
            (
                Html(f"{escape(title_of(stage.name))}<small>{escape(about)}</small>"), f"{len(stage.metrics):,}",
                count(stage.tokens) if stage.tokens else "", Html(f"{first} → {last}<small>{escape(_short(name))}</small>"),
                duration(stage.seconds), f"{sorted(rates)[len(rates) // 2]:,.0f}" if rates else "",
                size(stage.memory_bytes) if stage.memory_bytes else "",
                ("" if stage.has_ended else "not finished") + (f" resumed {stage.resumes}×" if stage.resumes else ""),
            )
        )  # fmt: skip
    head = ("stage", "steps", "tokens", "from → to", "time", "tokens/s", "memory", "")
    return table(head, rows, "First and last are means over the first and last tenth of the steps; tokens/s is the median.")


def _loss_name(stage: Stage) -> str:
    return next((name for name in ("reward/mean", "train/loss", "train/index_loss") if stage.curve(name)[1]), "")


def _short(name: str) -> str:
    words = {"train/loss": "cross-entropy, nats", "train/index_loss": "divergence, nats", "reward/mean": "mean reward"}
    return words.get(name, name)


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Means over the first and the last tenth."""
    width = max(1, len(values) // 10)
    return sum(values[:width]) / width, sum(values[-width:]) / width


def _loss_plot(stages: Sequence[Stage]) -> str:
    """The language-model loss of all stages that have one, over the tokens seen so far."""
    lines, notes, seen = [], [], 0.0
    shown = [stage for stage in stages if stage.curve("train/loss")[1] and not stage.is_rl and stage.name != "control"]
    for i, stage in enumerate(shown):
        totals, x = seen, []
        for tokens, metrics in zip(stage.tokens_by_step, stage.metrics, strict=True):
            totals += tokens
            if isinstance(metrics.get("train/loss"), int | float):
                x.append(totals)
        y = stage.curve("train/loss")[1]
        if len(x) == len(y):
            lines.append(Line(title_of(stage.name), x, y, COLOURS[i % len(COLOURS)]))
            if i:
                notes.append({"x": seen, "text": ""})
        seen = totals
    if not lines:
        return ""
    rows = [(line.name, f"{line.x[-1]:,.0f}", *(f"{v:.4f}" for v in ends(line.y))) for line in lines]
    drawn = Plot(
        "loss", "Training loss over the tokens seen, one line for each stage", lines,
        Axis("tokens seen"), Axis("loss, nats per token"), notes=notes,
    )  # fmt: skip
    caption = (
        "The loss on the text being trained on. A jump between stages is no accident: each stage mixes its text differently, "
        "and fine-tuning counts the assistant's words alone."
    )
    return plot(drawn, caption, table(("stage", "tokens so far", "first tenth", "last tenth"), rows))


def _text(run: Run) -> str:
    told = run.event("prepared")
    if told is None:
        return ""
    rows = []
    for name, splits in told.get("corpora", {}).items():
        train, held_out = splits["train"], splits["held_out"]
        sizes = (train["documents"], train["tokens"], held_out["documents"], held_out["tokens"])
        rows.append((name, *(f"{number:,}" for number in sizes)))
    words = prose("The text was found on the machine the run was made on. Documents, not passages, are held out.")
    return words + table(("text", "documents", "tokens", "held-out documents", "tokens"), rows)


def _samples(run: Run) -> str:
    latest = {event["prompt"]: event["text"] for event in run.events if event["kind"] == "sample"}
    if not latest:
        return ""
    rows = "".join(f"<p class='sample'><b>{escape(prompt)}</b>{escape(text)}</p>" for prompt, text in latest.items())
    return f"<h3>In its own words</h3>{prose('The likeliest continuation, token by token, of what stands in bold.')}{rows}"


def environment(run: Run) -> str:
    """Where and when the run was made, in one line."""
    found = run.environment
    parts = [f"Rorqual {found['rorqual']}"] if "rorqual" in found else []
    parts += [f"commit {found['commit'][:7]}"] if found.get("commit") else []
    parts += [f"Python {found['python']}"] if "python" in found else []
    parts += [f"PyTorch {found['torch']}"] if "torch" in found else []
    parts += [f"{found.get('cores')} cores"] if found.get("cores") else []
    parts += [str(found["device"])] if found.get("device") not in (None, "cpu") else []
    return escape(" · ".join(parts))
