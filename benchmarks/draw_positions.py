"""What a token costs by its position, dense against sparse, in the form of the paper's figure 3: results/gpu_positions.svg.

    python -m benchmarks.draw_positions [--results DIR] [--out FILE]

Reads gpu_model.json: one layer of the 671B shape and the `small` model, prefill and decode, microseconds of GPU time a token.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 480, 300, 64, 56, 120, 46
COLOURS = {"dense": "#c2571a", "sparse": "#1f5fbf", "sparse, FP8 cache": "#2f9e77"}
STYLE = "font-family: system-ui, sans-serif; font-size: 12px; fill: #333"


@dataclass(frozen=True)
class Line:
    name: str
    points: list[tuple[float, float]]
    """(position, microseconds a token)."""


@dataclass(frozen=True)
class Panel:
    title: str
    lines: list[Line]
    crossover: float | None


def panels(record: dict[str, Any]) -> list[Panel]:
    """Attention of one layer, then the whole step of the small model: prefill and decode each."""
    found = []
    for name, part, title in (
        ("layer", "attention", "One 671B layer's attention"),
        ("small", "step", "The small model, all layers"),
    ):
        if name not in record:
            continue
        model = record[name]
        for kind, tokens in (("prefill", "rows"), ("decode", "batch")):
            points = model[kind]
            lines = [Line(line, [_point(p, f"{line}_{part}", tokens) for p in points]) for line in ("dense", "sparse")]
            if kind == "decode" and model["decode_fp8"]:
                lines.append(Line("sparse, FP8 cache", [_point(p, f"sparse_{part}", tokens) for p in model["decode_fp8"]]))
            found.append(Panel(f"{title}: {kind}", lines, model.get(f"{kind}_{part}_crossover")))
    return found


def _point(figures: dict[str, float], key: str, tokens: str) -> tuple[float, float]:
    return figures["position"], 1e3 * figures[key] / figures[tokens]


def ticks(largest: float, count: int = 5) -> list[float]:
    """Round numbers from 0 to at least `largest`, about `count` of them."""
    step = 10.0 ** len(str(int(largest / count))) if largest >= count else 1.0
    while largest / step < count:
        step /= 2 if f"{step:.0e}"[0] != "5" else 2.5
    return [step * i for i in range(int(largest / step) + 2)]


def drawn(panel: Panel, x: float, y: float) -> str:
    """One panel as SVG, its top left corner at (x, y)."""
    positions = [p for line in panel.lines for p, _ in line.points]
    across, up = max(positions), ticks(max(cost for line in panel.lines for _, cost in line.points))
    at_x = lambda p: x + LEFT + (WIDTH - LEFT - RIGHT) * p / across  # noqa: E731
    at_y = lambda c: y + HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * c / up[-1]  # noqa: E731
    parts = [f'<text x="{x + LEFT}" y="{y + 22}" style="{STYLE}; font-weight: 600">{escape(panel.title)}</text>']
    for cost in up:
        parts.append(
            f'<line x1="{at_x(0):.1f}" x2="{at_x(across):.1f}" y1="{at_y(cost):.1f}" y2="{at_y(cost):.1f}" stroke="#e3e3e3"/>'
        )
        parts.append(_text(at_x(0) - 8, at_y(cost) + 4, f"{cost:g}", "end"))
    for part in range(5):
        place = across * part / 4
        parts.append(_text(at_x(place), y + HEIGHT - BOTTOM + 18, f"{place / 1024:g}K", "middle"))
    parts.append(_text(at_x(across / 2), y + HEIGHT - 10, "token position", "middle"))
    parts.append(_text(x + LEFT, y + TOP - 14, "µs a token", "start"))
    if panel.crossover:
        place = at_x(panel.crossover)
        parts.append(
            f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{y + TOP}" y2="{at_y(0):.1f}" stroke="#888" stroke-dasharray="3 3"/>'
        )
        parts.append(_text(place + 4, y + TOP + 10, f"even at {panel.crossover / 1024:.1f}K", "start"))
    for line, label_y in zip(panel.lines, _apart([at_y(line.points[-1][1]) for line in panel.lines]), strict=True):
        colour, path = COLOURS[line.name], " ".join(f"{at_x(p):.1f},{at_y(c):.1f}" for p, c in line.points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{at_x(p):.1f}" cy="{at_y(c):.1f}" r="2.5" fill="{colour}"/>' for p, c in line.points]
        parts.append(_text(at_x(line.points[-1][0]) + 7, label_y + 4, line.name, "start", colour))
    return "\n".join(parts)


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#555") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="{STYLE}; fill: {colour}">{escape(text)}</text>'


def _apart(heights: Sequence[float], gap: float = 14) -> list[float]:
    """Heights of labels, moved so that no two stand closer than `gap`."""
    placed: dict[int, float] = {}
    previous = float("-inf")
    for i in sorted(range(len(heights)), key=heights.__getitem__):
        previous = placed[i] = max(heights[i], previous + gap)
    return [placed[i] for i in range(len(heights))]


def svg(record: dict[str, Any]) -> str:
    """All panels, two in a row."""
    each = panels(record)
    rows = -(-len(each) // 2)
    source = (
        f"{record.get('device', '')}, torch {record.get('torch', '')}, commit {record.get('commit', '')}: {record['command']}"
    )
    body = [drawn(panel, i % 2 * WIDTH, i // 2 * HEIGHT) for i, panel in enumerate(each)]
    body.append(_text(12, rows * HEIGHT + 14, source, "start", "#888"))
    size = f'width="{2 * WIDTH}" height="{rows * HEIGHT + 24}" viewBox="0 0 {2 * WIDTH} {rows * HEIGHT + 24}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<rect width="100%" height="100%" fill="#fff"/>'
    return "\n".join([head, *body, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = Path(__file__).parent / "results"
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument("--out", type=Path, default=results / "gpu_positions.svg")
    options = parser.parse_args()
    options.out.write_text(svg(json.loads((options.results / "gpu_model.json").read_text())), encoding="utf-8")
    print(options.out)


if __name__ == "__main__":
    main()
