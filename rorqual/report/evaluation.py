"""The page of evaluations: one row each, score against steps for each strategy, how attempts ended. Made from results.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1b2733}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .8rem;text-align:right;border-bottom:1px solid #d8dee4}
th:first-child,td:first-child{text-align:left}pre{white-space:pre-wrap}main{overflow-x:auto}.warn{color:#b42318}"""
CONTEXTS = ("none", "summary", "discard-75", "discard-all", "parallel-fewest-step")
VERDICTS = {"passed": "#1a7f37", "wrong": "#b42318", "unfinished": "#bf8700"}
"""Colours of the named ends; what has no score is grey."""
COLOURS = ("#57606a", "#bf8700", "#8250df", "#1a7f37", "#0969da")


def evaluation_page(runs: Sequence[Mapping[str, Any]]) -> str:
    """A self-contained HTML page (the plotting library is in it) of one evaluation, or of several side by side."""
    from plotly.offline import get_plotlyjs

    title = f"{', '.join(sorted({run['benchmark'] for run in runs}))}: " + ", ".join(run["context"] for run in runs)
    parts = [
        f"<h1>{escape(title)}</h1>",
        _protocol(runs[0]),
        _scores(runs),
        "<h2>Score against steps</h2>",
        "<p>Real steps, resets included; under parallel-fewest-step the steps of all runs. Bars: Wilson 95 %.</p>",
        _plot(steps_figure(runs)),
        *_figure_6(runs[0]),
        "<h2>How attempts ended</h2>",
        _plot(ends_figure(runs)),
        *map(_warnings, runs),
        "<h2>Accounts</h2>",
        _accounts(runs),
        *(_contest(run) for run in runs if run.get("extra")),
        _published(runs),
    ]
    head = f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(title)}</title><style>{STYLE}</style>"
    return f"{head}<script>{get_plotlyjs()}</script><body><main>{''.join(filter(None, parts))}</main></body></html>"


def steps_figure(runs: Sequence[Mapping[str, Any]]) -> Any:
    """Score against mean steps, one line for each evaluation, as the paper's figure 6."""
    from plotly.graph_objects import Figure, Scatter

    figure = Figure()
    for run in runs:
        points = [point for point in run["curve"] if point["score"] is not None]
        colour = COLOURS[CONTEXTS.index(run["context"])]
        figure.add_trace(
            Scatter(
                x=[point["steps"] for point in points],
                y=[100 * point["score"] for point in points],
                error_y={
                    "type": "data", "symmetric": False, "thickness": 1,
                    "array": [100 * max(point["high"] - point["score"], 0) for point in points],
                    "arrayminus": [100 * max(point["score"] - point["low"], 0) for point in points],
                },
                text=[point["label"] for point in points], name=f"{run['context']} ({run['policy']})", mode="lines+markers",
                line={"color": colour},
            )
        )  # fmt: skip
    figure.update_layout(xaxis_title="mean real steps", yaxis_title="score, %", template="simple_white", height=480)
    return figure


def _figure_6(run: Mapping[str, Any]) -> list[str]:
    """The paper's own points beside, with axes of their own: another model, another corpus, other lengths."""
    if not run.get("published_curves"):
        return []
    from plotly.graph_objects import Figure, Scatter

    figure = Figure()
    for context, points in run["published_curves"].items():
        steps, scores = zip(*points, strict=True)
        line = {"color": COLOURS[CONTEXTS.index(context)], "dash": "dot"}
        figure.add_trace(Scatter(x=steps, y=scores, name=f"{context} (published)", mode="lines+markers", line=line))
    figure.update_layout(xaxis_title="mean real steps", yaxis_title="score, %", template="simple_white", height=380)
    return ["<h3>The paper's figure 6: DeepSeek-V3.2 on BrowseComp, read from the image</h3>", _plot(figure)]


def _contest(run: Mapping[str, Any]) -> str:
    contest = run["extra"]
    rows = [
        (name, f"{found['points']:g} of {found['of']:g}", found["attempts"], found["submitted"], found["accepted_at"] or "")
        for name, found in contest["problems"].items()
    ]
    rows += [(f"published: {name}", text, "", "", "") for name, text in contest["published"].items()]
    head = ("problem", "points", "attempts", "submitted", "accepted at")
    return f"<h2>The contest, by the rule of {escape(contest['rule'].upper())}</h2>{_table(head, rows)}"


def ends_figure(runs: Sequence[Mapping[str, Any]]) -> Any:
    """A stacked bar of outcomes for each evaluation."""
    from plotly.graph_objects import Bar, Figure

    names = sorted({name for run in runs for name in run["outcomes"]["verdicts"]})
    labels = [f"{number}: {run['context']}" for number, run in enumerate(runs, 1)]
    bars = [
        Bar(
            name=name, x=labels, y=[run["outcomes"]["verdicts"].get(name, 0) for run in runs],
            marker_color=VERDICTS.get(name, "#8c959f"),
        )
        for name in names
    ]  # fmt: skip
    figure = Figure(bars)
    figure.update_layout(barmode="stack", yaxis_title="attempts", template="simple_white", height=360)
    return figure


def _plot(figure: Any) -> str:
    return figure.to_html(full_html=False, include_plotlyjs=False)


def _protocol(run: Mapping[str, Any]) -> str:
    protocol = run["protocol"]
    facts = ", ".join(f"{name} {value}" for name, value in protocol.items() if name != "template" and value not in ("", None))
    template = f"<pre>{escape(protocol['template'])}</pre>"
    judge = f" Answers decided by the judge {escape(run['judge'])}." if run.get("judge") else ""
    return f"<p>Source: {escape(run['source'])}; licence {escape(run['licence'])}. {escape(facts)}.{judge}</p>{template}"


def _scores(runs: Sequence[Mapping[str, Any]]) -> str:
    header = ("policy", "context", "tasks", "attempts", "score", "passed attempts", "pass@k", "mean steps", "without a score")
    rows = [
        (
            run["policy"], run["context"], run["tasks"], run["samples"], _rate(run["score"]), _rate(run["passed_attempts"]),
            "; ".join(f"@{k} {_rate(found)}" for k, found in run["pass_at_k"].items()),
            "none" if run["mean_steps"] is None else f"{run['mean_steps']:.1f}", run["unscored_attempts"],
        )
        for run in runs
    ]  # fmt: skip
    return _table(header, rows)


def _warnings(run: Mapping[str, Any]) -> str:
    texts = []
    if run["unscored_attempts"]:
        texts.append(f"{run['unscored_attempts']} attempts have no score; were all of them failures, the score would be "
                     f"{100 * run['score_if_unscored_fail']:.1f} %")  # fmt: skip
    if run["defective_rows"]:
        first = run["defective_rows"][0]
        texts.append(f"{len(run['defective_rows'])} rows are no tasks and were left out; {first['where']}: {first['what']}")
    return "".join(f"<p class='warn'>{escape(run['context'])}: {escape(text)}.</p>" for text in texts)


def _accounts(runs: Sequence[Mapping[str, Any]]) -> str:
    names = [name for name in runs[0]["accounts"] if any(run["accounts"].get(name) for run in runs)]
    rows = [(run["context"], *(_amount(run["accounts"].get(name, 0)) for name in names)) for run in runs]
    return _table(("context", *(name.replace("_", " ") for name in names)), rows)


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"


def _published(runs: Sequence[Mapping[str, Any]]) -> str:
    scores = runs[0]["published"]
    if not scores:
        return ""
    measured = [(f"measured here: {run['policy']}, {run['context']}", _rate(run["score"]), _thousands(run)) for run in runs]
    costs = runs[0].get("published_costs") or {}
    both = {name: score for name, (score, _) in costs.items()} | scores
    published = [(f"published: {name}", f"{both[name]:g}", f"{costs[name][1]:g}" if name in costs else "") for name in both]
    return "<h2>Beside the published tables</h2>" + _table(("policy", "score", "thousand output tokens"), [*measured, *published])


def _thousands(run: Mapping[str, Any]) -> str:
    """Sampled tokens of one attempt, in thousands."""
    accounts = run["accounts"]
    return f"{accounts['sampled_tokens'] / accounts['attempts'] / 1000:.3g}" if accounts["attempts"] else ""


def _rate(found: Mapping[str, Any]) -> str:
    if found["value"] is None:
        return "none"
    return f"{100 * found['value']:.1f} % [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def _table(header: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    head = "".join(f"<th>{escape(str(cell))}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
