"""The page of the mismatch laboratory: what breaks plain GRPO, what mends it, and where nothing is shown. From mismatch.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1b2733}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .8rem;text-align:right;border-bottom:1px solid #d8dee4}
th:first-child,td:first-child,td:nth-child(2){text-align:left}.helps{color:#1a7f37}.breaks,.hurts{color:#b42318}
.no{color:#57606a}.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(30rem,1fr))}"""
COLOURS = {
    "plain": "#57606a", "unbiased_kl": "#8250df", "sequence_mask": "#0969da", "keep_routing": "#1a7f37",
    "keep_sampling_mask": "#bf8700", "keep_selection": "#cf222e", "all": "#1b2733",
}  # fmt: skip
WINDOW = 6
"""Steps that a drawn point is the mean of."""


def mismatch_page(table: Mapping[str, Any]) -> str:
    """A self-contained HTML page; the plotting library is in it."""
    from plotly.offline import get_plotlyjs

    injections = list(dict.fromkeys(row["injection"] for row in table["rows"]))
    parts = [
        "<h1>Which mismatch breaks GRPO, and what mends it</h1>",
        _setting(table),
        "<h2>In words</h2>",
        _words(table["rows"]),
        "<h2>Success of the trained weights, sampled without an injection</h2>",
        _figure(success_figure(table["rows"], table["start"])),
        _table(table["rows"]),
        "<h2>On the way</h2>",
        "<p>Means over seeds, smoothed over six steps. Success as sampled, so with the injection.</p>",
        *(_curves(table, injection) for injection in injections),
    ]
    head = f"<!doctype html><html lang='en'><meta charset='utf-8'><title>Mismatch lab</title><style>{STYLE}</style>"
    return f"{head}<script>{get_plotlyjs()}</script><body>{''.join(parts)}</body></html>"


def success_figure(rows: Sequence[Mapping[str, Any]], start: Mapping[str, float]) -> Any:
    """Final success by injection and arm, with intervals over seeds; the line is where the taught model began."""
    from plotly.graph_objects import Bar, Figure

    figure = Figure()
    for arm in COLOURS:
        mine = [row for row in rows if row["arm"] == arm]
        if mine:
            found = [row["clean"]["success"] for row in mine]
            figure.add_trace(
                Bar(
                    name=_label(arm), x=[row["injection"] for row in mine], y=[100 * each["mean"] for each in found],
                    error_y={"type": "data", "array": [100 * (each["high"] - each["mean"]) for each in found], "thickness": 1},
                    marker={"color": COLOURS[arm]},
                )
            )  # fmt: skip
    figure.add_hline(y=100 * start["mean"], line={"dash": "dot", "color": "#57606a"})
    figure.update_layout(barmode="group", yaxis_title="success, %", template="simple_white", height=440)
    return figure


def curve_figure(curves: Mapping[str, Mapping[str, Sequence[float]]], injection: str, curve: str, title: str) -> Any:
    from plotly.graph_objects import Figure, Scatter

    figure = Figure()
    for arm, colour in COLOURS.items():
        values = _smooth(curves.get(f"{injection}.{arm}", {}).get(curve, ()))
        if values:
            figure.add_trace(
                Scatter(x=list(range(1, len(values) + 1)), y=values, name=_label(arm), mode="lines", line={"color": colour})
            )
    figure.update_layout(title=title, xaxis_title="optimiser step", template="simple_white", height=320)
    return figure


def _curves(table: Mapping[str, Any], injection: str) -> str:
    shown = {"success": "success as sampled", "mismatch": "mean |log ratio| of trainer and sampler", "entropy": "entropy, nats"}
    figures = [_figure(curve_figure(table["curves"], injection, name, title)) for name, title in shown.items()]
    return f"<h3>{escape(injection)}</h3><div class='figures'>{''.join(figures)}</div>"


SETTING = """<p>A model of about 100,000 parameters with DSA and experts sorts {digits} digits. Taught three habits, it begins at
{start} and is trained for {steps} optimiser steps of {prompts} prompts x {group} answers, with up to {seeds} seeds (of weights,
prompts and noise). Plain: clipped GRPO with K3, every decision made anew by the trainer.</p>
<p>Injections: <b>staleness</b>, {staleness} steps on one batch of rollouts; <b>precision</b>, {precision} mantissa bits in
the sampler's matrices; <b>truncation</b>, top-p {truncation}; <b>routing</b>, noise of {routing} on the sampler's expert
biases; <b>selection</b>, noise of {selection} standard deviations in its indexers; <b>all</b>, the five together. They are a
laboratory's: larger than a good deployment's. Success is measured twice: <b>clean</b>, the trained weights sampled at
temperature 1 without an injection; <b>as sampled</b>, the last six batches with it, which carry its handicap (a stale or a
rounded sampler is a worse one). Plain arms are set against plain without an injection, the others against plain under the
same one. A policy trained with the sampling mask leaves alone what its sampler never draws, and clean sampling draws it:
there the second measure is the one that deployment sees. Intervals are Student's 95 % over seeds; differences are paired by
seed, and not corrected for the number of comparisons. Where an interval holds 0, nothing is shown at this size, and the page
says so.</p>"""


def _setting(table: Mapping[str, Any]) -> str:
    config = table["config"]
    digits = config["task"]["digits"]
    return SETTING.format(**{**config, **config["strengths"], "start": _percent(table["start"]), "digits": digits})


def _words(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        if row["injection"] == "none":
            continue
        subject = f"{row['injection']}, plain GRPO" if row["arm"] == "plain" else f"{_label(row['arm'])} under {row['injection']}"
        said = "; ".join(f"{name}: {row[name]['says']} ({_points(row[name]['against'])} points)" for name in ("clean", "sampled"))
        weight = "b" if row["arm"] == "plain" else "span"
        lines.append(f"<li><{weight} class='{row['clean']['says'].split()[0]}'>{escape(subject)}</{weight}> {escape(said)}</li>")
    return f"<ul>{''.join(lines)}</ul>"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    header = (
        "injection",
        "arm",
        "seeds",
        "clean",
        "against plain",
        "says",
        "as sampled",
        "against plain",
        "says",
        "mismatch at the start",
    )
    body = []
    for row in rows:
        cells = [row["injection"], _label(row["arm"]), str(row["seeds"])]
        for name in ("clean", "sampled"):
            found = row[name]
            cells += [_percent(found["success"]), _points(found.get("against")), found.get("says", "")]
        body.append([*cells, f"{row['mismatch']:.3g}"])
    return _cells(header, body)


def _cells(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _smooth(values: Sequence[float]) -> list[float]:
    return [sum(values[max(i - WINDOW + 1, 0) : i + 1]) / min(i + 1, WINDOW) for i in range(len(values))]


def _figure(figure: Any) -> str:
    return figure.to_html(full_html=False, include_plotlyjs=False)


def _label(arm: str) -> str:
    return "all five" if arm == "all" else arm.replace("_", " ")


def _percent(found: Mapping[str, float]) -> str:
    return f"{100 * found['mean']:.1f} % [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def _points(found: Mapping[str, float] | None) -> str:
    return "" if found is None else f"{100 * found['mean']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"
