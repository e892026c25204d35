"""What a token costs at each position: this model, the released 671B configuration, and the paper's own figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rorqual.report.markup import Axis, Line, Plot, Section, absent, count, plot, prose, size, table
from rorqual.report.reading import Run

PAPER = "Section 2.3, figure 3"

PAPER_FIGURE = {
    "prefill": {
        "V3.1-Terminus": ((0, 0.05), (131_072, 0.665)),
        "V3.2": ((0, 0.06), (7_000, 0.10), (131_072, 0.187)),
    },
    "decode": {
        "V3.1-Terminus": ((0, 0.07), (131_072, 2.15)),
        "V3.2": ((0, 0.10), (2_000, 0.145), (131_072, 0.25)),
    },
}
"""Dollars of a million tokens on H800s at 2 dollars an hour, read off the chart by eye: (position, dollars)."""


def section(run: Run) -> Section:
    body = prose(
        "Dense attention reads every earlier token, so a token costs more the later it stands. With selection it reads at most "
        "<i>k</i> of them; only the indexer still looks at all, and it is small: few heads, low precision, no values. The paper "
        "writes it as a change from <i>O(L²)</i> to <i>O(Lk)</i> for the core attention, and shows what it does to the price of "
        "a million tokens."
    )
    found = run.exhibits.get("cost")
    if not found:
        return Section("cost", "What a token costs", PAPER, body + absent("This run holds no costs (exhibits/cost.json)."))
    body += "<div class='pair'>" + _flops("this", "This model", found["this"]) + _flops("671b", "671B", found["paper"]) + "</div>"
    body += _measured(found.get("prefill")) + _crossings(found) + _prices(found["paper"])
    return Section("cost", "What a token costs", PAPER, body)


def _flops(name: str, title: str, found: Mapping[str, Any]) -> str:
    x = found["positions"]
    lines = [Line("dense", x, found["dense_flops"], "dense"), Line("sparse, indexer included", x, found["sparse_flops"])]
    picked = sorted({0, len(x) // 8, len(x) // 4, len(x) // 2, len(x) - 1})
    rows = [
        (
            f"{x[i]:,}", count(found["dense_flops"][i]), count(found["sparse_flops"][i]),
            f"{found['dense_flops'][i] / found['sparse_flops'][i]:.2f}", size(found["dense_read"][i]),
            size(found["sparse_read"][i]),
        )
        for i in picked
    ]  # fmt: skip
    head = ("position", "dense operations", "sparse", "ratio", "dense cache reads", "sparse")
    drawn = Plot(
        f"cost-{name}", f"Operations of attention for one token by position, {title}", lines, Axis("position"),
        Axis("operations", from_zero=True), notes=[{"x": found["top_k"], "text": f"top-k = {found['top_k']:,}"}], height=280,
    )  # fmt: skip
    caption = f"<b>{title}.</b> Attention’s multiplications and additions for one decoded token, all layers, by formula."
    return plot(drawn, caption, table(head, rows))


def _measured(found: Mapping[str, Any] | None) -> str:
    """Time on the clock, of this model, whole layers included."""
    if not found:
        return ""
    chunk, x = found["chunk"], [p + found["chunk"] / 2 for p in found["positions"]]
    spent = {name: [s / chunk * 1e6 for s in seconds] for name, seconds in found["seconds"].items()}
    drawn = Plot(
        "prefill-measured", "Measured time of a prefilled token by position", [
            Line("dense", x, spent["dense"], "dense", mode="lines+markers"),
            Line("sparse, indexer included", x, spent["sparse"], "accent", mode="lines+markers"),
        ], Axis("position"), Axis("microseconds for each token", from_zero=True), height=280,
    )  # fmt: skip
    rows = [
        (f"{p:,} to {p + chunk - 1:,}", f"{d:.2f}", f"{s:.2f}", f"{d / s:.2f}")
        for p, d, s in zip(found["positions"], spent["dense"], spent["sparse"], strict=True)
    ]
    caption = (
        f"<b>Measured.</b> One sequence prefilled in chunks of {chunk:,} tokens on {found['device']}, the whole model; medians "
        "of three. What does not grow with the position (projections, experts, launches) is in both lines."
    )
    return plot(drawn, caption, table(("positions", "dense, µs a token", "sparse", "ratio"), rows))


def _crossings(found: Mapping[str, Any]) -> str:
    words = {
        "decode_flops": "operations while decoding", "prefill_flops": "operations of prefill, dense in its cheaper form",
        "read_bf16": "cache bytes read, bf16", "read_fp8": "cache bytes read, FP8",
    }  # fmt: skip

    def from_where(position: int | None) -> str:
        return "never" if position is None else f"{position:,}"

    ours, theirs = found["this"]["crossovers"], found["paper"]["crossovers"]
    rows = [(label, from_where(ours[name]), from_where(theirs[name])) for name, label in words.items() if name in ours]
    return table(("from which position sparse is cheaper", "this model", "671B"), rows)


def _prices(paper: Mapping[str, Any]) -> str:
    planned = paper.get("prefill_dollars", ())
    words = prose(
        "Beside it the paper’s figure, in dollars for a million tokens. Its points were read off the printed chart by eye. The "
        "dotted lines are this project’s plan for the same configuration: floating-point operations over assumed efficiencies, "
        "nothing else, so its level is a rough estimate and its shape is the claim."
    )
    return "<h3>Beside the paper’s figure</h3>" + words + "<div class='pair'>" + _prefill(planned) + _decode() + "</div>"


def _paper_lines(kind: str) -> list[Line]:
    colours = {"V3.1-Terminus": "dense", "V3.2": "accent"}
    return [
        Line(f"paper: {name}", [p for p, _ in points], [d for _, d in points], colours[name], mode="lines+markers")
        for name, points in PAPER_FIGURE[kind].items()
    ]


def _prefill(planned: Sequence[Mapping[str, float]]) -> str:
    lines = _paper_lines("prefill")
    if planned:
        x = [row["position"] for row in planned]
        lines += [
            Line("plan: dense", x, [row["dense"] for row in planned], "dense", "dot"),
            Line("plan: sparse", x, [row["sparse"] for row in planned], "accent", "dot"),
        ]
    rows = [(f"{row['position']:,}", f"{row['dense']:.3f}", f"{row['sparse']:.3f}") for row in planned]
    drawn = Plot(
        "price-prefill", "Dollars for a million prefilled tokens by position: the paper's figure and the plan", lines,
        Axis("position"), Axis("dollars per million", from_zero=True), height=280,
    )  # fmt: skip
    figures = table(("position", "plan: dense", "plan: sparse"), rows) if rows else ""
    return plot(drawn, "<b>Prefill.</b> The knee of the sparse line is where masked dense attention gives way.", figures)


def _decode() -> str:
    drawn = Plot(
        "price-decode", "Dollars for a million decoded tokens by position: the paper's figure", _paper_lines("decode"),
        Axis("position"), Axis("dollars per million", from_zero=True), height=280,
    )  # fmt: skip
    rows = [
        (name, f"{position:,}", f"{dollars:.3f}")
        for name, points in PAPER_FIGURE["decode"].items()
        for position, dollars in points
    ]
    return plot(
        drawn, "<b>Decoding.</b> The paper’s figure alone.", table(("model", "position", "dollars"), rows, text_columns=1)
    )
