"""Sparse attention on the page: loss against dense, the selection to look at, the attention mass that it keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from rorqual.report import controls
from rorqual.report.diagram import selection_steps
from rorqual.report.markup import Axis, Line, Plot, Section, absent, data, percent, plot, prose, signed, table
from rorqual.report.reading import Run, Stage
from rorqual.report.training import COLOURS, title_of

PAPER = "Section 2.1, equations 1 to 4"
LOSS_BAR, MASS_BAR = 0.01, 0.95
"""What `rorqual adapt` holds a sparse model to as well: loss at most so much above dense, and this share of the best mass."""
MODEL_NAMES = {
    "sparse": ("sparse", "accent", "solid"),
    "same weights, dense": ("same weights, dense attention", "third", "dot"),
    "before, dense": ("before sparse training, dense", "dense", "dash"),
    "control": ("dense control", "dense", "solid"),
}


def loss_section(run: Run) -> Section:
    body = prose(
        "Does a token predict its successor as well when it may look at a few earlier tokens only? Held-out text, cut into "
        "ranges of positions: far into the text, where most tokens are out of reach, sparse attention would show what it "
        "loses. The paper finds no substantial loss against its dense predecessor (section 2.2)."
    )
    found = run.exhibits.get("quality")
    if not found:
        why = "This run holds no comparison of sparse and dense attention (exhibits/quality.json)."
        return Section("dense-or-sparse", "Dense against sparse", "Section 2.2", body + absent(why))
    body += prose(_verdict(found)) + _loss_plot(found) + _needles(found)
    return Section("dense-or-sparse", "Dense against sparse", "Section 2.2", body)


def _verdict(found: Mapping[str, Any]) -> str:
    losses = found["loss"]
    parts = []
    for name, words in (("control", "a control trained on densely for the same tokens"),
                        ("before, dense", "the dense model before sparse training"),
                        ("same weights, dense", "the same weights with dense attention")):  # fmt: skip
        if name in losses:
            parts.append(f"{signed(losses['sparse']['loss'] / losses[name]['loss'] - 1)} against {words}")
    text = f"Over {found['held_out_tokens']:,} held-out tokens the sparse model’s loss is {losses['sparse']['loss']:.4f} nats: "
    text += "; ".join(parts) + f". Each token attends to at most {found['top_k']} of up to {found['length']}."
    held = all(losses["sparse"]["loss"] <= (1 + LOSS_BAR) * other["loss"] for other in losses.values())
    text += f" The bar is {percent(LOSS_BAR, 0)} above dense: {'met' if held else 'not met'} here."
    if "control" not in losses:
        text += (
            " The model before sparse training has seen fewer tokens, so that comparison flatters; <code>rorqual adapt</code> "
            "trains a control that goes on densely for the same tokens."
        )
        if controls.is_committed("sparse_quality"):
            text += " A tiny model beside such a control is among the committed proofs below."
    return text


def _loss_plot(found: Mapping[str, Any]) -> str:
    losses = found["loss"]
    names = [name for name in MODEL_NAMES if name in losses]
    edges = [*losses["sparse"]["edges"], found["length"]]
    ranges = list(pairwise(edges))
    middles = [(a + b) / 2 for a, b in ranges]
    lines = []
    for name in names:
        words, colour, dash = MODEL_NAMES[name]
        lines.append(Line(words, middles, losses[name]["by_position"], colour, dash, "lines+markers"))
    rows = [
        (f"{a:,} to {b - 1:,}", *(_number(losses[name]["by_position"][i]) for name in names)) for i, (a, b) in enumerate(ranges)
    ]
    rows.append(("all", *(_number(losses[name]["loss"]) for name in names)))
    drawn = Plot(
        "loss-by-position", "Held-out loss by position, sparse and dense", lines, Axis("position in the text"),
        Axis("loss, nats per token"), notes=[{"x": found["top_k"], "text": f"top-k = {found['top_k']}"}],
    )  # fmt: skip
    caption = "Left of the mark a token sees fewer tokens than may be selected, so sparse and dense are the same."
    return plot(drawn, caption, table(("position", *(MODEL_NAMES[name][0] for name in names)), rows))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _needles(found: Mapping[str, Any]) -> str:
    asked = found.get("retrieval")
    if not asked:
        why = found.get("no_retrieval")
        return absent(f"Retrieval was not measured: {escape(why)}.") if why else ""
    names = {name: words for name, (words, _, _) in MODEL_NAMES.items()} | {"random indexers": "untrained indexers"}
    rows = [(names.get(name, name), percent(score, 0)) for name, score in asked["accuracy"].items()]
    dense = [score for name, score in asked["accuracy"].items() if "dense" in name or name == "control"]
    words = (
        f"A harder question: a fact is hidden at four depths of a text, {asked['others']} facts like it stand elsewhere, and the "
        f"answer must be the likeliest continuation. {asked['documents']} documents for each model."
    )
    if max(dense, default=0.0) < 0.8:
        words += (
            " The dense model itself answers less than 80 %, so the comparison is <b>void</b> here: a model of this size learns "
            "retrieval late, if at all."
        )
    return "<h3>A needle in text</h3>" + prose(words) + table(("model", "answered"), rows) + _needle_cells(asked, names)


def _needle_cells(asked: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """By length and depth, where several lengths were asked."""
    cells = asked.get("cells", ())
    if len({cell["length"] for cell in cells}) < 2:
        return ""
    models = list(asked["accuracy"])
    rows = [(f"{cell['length']:,}, depth {cell['depth']:g}", *(percent(cell[name], 0) for name in models)) for cell in cells]
    return table(("tokens", *(names.get(name, name) for name in models)), rows)


def selection_section(run: Run) -> Section:
    body = prose(
        "For every token the indexer of each layer scores all earlier ones with a few cheap dot products, "
        "<i>I<sub>t,s</sub> = Σ<sub>j</sub> w<sub>t,j</sub> · ReLU(q<sub>t,j</sub> · k<sub>s</sub>)</i>, and attention reads "
        "the <i>k</i> best alone. In the paper <i>k</i> is 2,048 of up to 131,072 tokens."
    )
    body += selection_steps()
    found = run.exhibits.get("selection")
    if not found or not found.get("texts"):
        why = "This run holds no record of a selection (exhibits/selection.json)."
        return Section("selection", "What the indexer selects", PAPER, body + absent(why))
    tabs = "".join(
        f"<label><input type='radio' name='text' value='{i}'{' checked' if i == 0 else ''}>"
        f"<span>{escape(text['title'])}</span></label>"
        for i, text in enumerate(found["texts"])
    )
    view = prose("Choose a token below: those that it attends to are filled. Click or tap, or walk with the arrow keys.") + (
        f"<div class='selector' id='selector'><fieldset class='tabs'><legend>Text</legend>{tabs}</fieldset>"
        "<fieldset class='tabs' id='layers'><legend>Layer</legend></fieldset>"
        "<p class='about' id='text-about'></p><p class='readout' id='readout' role='status' aria-live='polite'></p>"
        "<div class='tokens' id='tokens' role='listbox' aria-label='Tokens of the text; arrow keys choose one'></div>"
        "<p class='key'><span class='chosen'>chosen</span> <span class='on'>selected</span> <span class='off'>earlier, not "
        "selected</span> <span class='later'>later, out of sight</span></p>"
        "<figure class='map'><canvas id='map' aria-hidden='true'></canvas><figcaption>The same at a glance: a row for each "
        "token, from the first at the top; a mark for each token that it selected. The diagonal is the near past, vertical lines "
        "are tokens that everybody reads.</figcaption></figure></div>"
        "<noscript><p>Choosing tokens needs scripts.</p></noscript>"
    )
    return Section("selection", "What the indexer selects", PAPER, body + view + data("selection-data", found))


def mass_section(run: Run) -> Section:
    body = prose(
        "The indexer’s aim is the attention itself: its scores are trained so that their softmax matches the attention weights, "
        "summed over heads (equation 3 in the warm-up, over all tokens; equation 4 in sparse training, over the selected ones). "
        "The measure of success is the share of dense attention that falls on the selected tokens, beside the share that the "
        "best possible choice of as many tokens would hold."
    )
    measured = run.exhibits.get("quality", {}).get("selection")
    curves = "".join(_mass_curves(stage) for stage in run.stages if stage.names("captured/"))
    if not measured and not curves:
        body += absent("This run trained no indexer.")
    if measured:
        body += prose(_mass_verdict(measured))
        body += _mass_bars(measured, run.exhibits["quality"].get("random_selection", {}))
    return Section("mass", "How much attention the selection keeps", PAPER, body + curves)


def _mass_verdict(measured: Mapping[str, Any]) -> str:
    shares = {layer: found["captured"] / found["oracle"] for layer, found in measured.items() if found["oracle"]}
    if not shares:
        return "No token of the measured text sees more than it may select, so there is nothing to judge."
    worst = min(shares, key=lambda layer: shares[layer])
    held = "met in every layer" if shares[worst] >= MASS_BAR else "not met in every layer"
    return (
        f"The bar is {percent(MASS_BAR, 0)} of the best possible: {held} here; layer {int(worst) + 1} has least, "
        f"{percent(shares[worst])}."
    )


def _mass_bars(measured: Mapping[str, Any], random: Mapping[str, Any]) -> str:
    layers = list(measured)
    names = [f"layer {int(layer) + 1}" for layer in layers]
    lines = [
        Line("best possible", names, [measured[layer]["oracle"] for layer in layers], "faint"),
        Line("trained indexer", names, [measured[layer]["captured"] for layer in layers], "accent"),
    ]
    if random:
        lines.append(Line("untrained indexer", names, [random[layer]["captured"] for layer in layers], "dense"))
    rows = [
        (
            name, percent(measured[layer]["captured"]), percent(measured[layer]["oracle"]),
            percent(_ratio(measured[layer]["captured"], measured[layer]["oracle"])), percent(measured[layer]["recall"]),
            percent(random[layer]["captured"]) if random else "",
        )
        for name, layer in zip(names, layers, strict=True)
    ]  # fmt: skip
    head = ("layer", "captured", "best possible", "share of it", "of the best tokens found", "untrained indexer")
    drawn = Plot(
        "mass-by-layer", "Attention mass captured by the selection, by layer", lines, Axis(""),
        Axis("share of attention", is_percent=True, from_zero=True), kind="bars",
    )  # fmt: skip
    caption = (
        "On held-out text, over tokens that see more than they may select. An untrained indexer shows what choosing is worth."
    )
    return plot(drawn, caption, table(head, rows))


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _mass_curves(stage: Stage) -> str:
    names = stage.names("captured/")
    lines = []
    for i, name in enumerate(names):
        layer = name.rpartition("/")[2]
        colour = COLOURS[i % len(COLOURS)]
        x, captured = stage.curve(name)
        _, oracle = stage.curve(f"oracle/{layer}")
        if len(captured) == len(oracle):
            share = [_ratio(c, o) for c, o in zip(captured, oracle, strict=True)]
            lines.append(Line(f"layer {int(layer) + 1}", x, share, colour))
    if not lines or all(len(line.x) < 2 for line in lines):
        return ""
    rows = [(line.name, *(percent(v) for v in _first_last(line.y))) for line in lines]
    drawn = Plot(
        f"mass-{stage.name.replace('/', '-')}", f"Captured share of the best possible mass during {title_of(stage.name)}", lines,
        Axis("step"), Axis("captured, of the best possible", is_percent=True), height=260,
    )  # fmt: skip
    return plot(drawn, f"{title_of(stage.name)}: what is captured, of what could be.", table(("layer", "first", "last"), rows))


def _first_last(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    return values[0], values[-1]
