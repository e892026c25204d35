"""Pieces of the page as strings of HTML: sections, tables, plots with their figures, numbers as people write them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

MAX_POINTS = 400
"""A longer curve is drawn by means over equal shares of it."""


@dataclass(frozen=True)
class Section:
    """A part of the page. paper: where DeepSeek's report tells of it."""

    id: str
    title: str
    paper: str
    body: str


@dataclass(frozen=True)
class Line:
    """One series of a plot. colour: a name of page.css, such as accent or dense. low, high: ends of each point's interval."""

    name: str
    x: Sequence[Any]
    y: Sequence[float | None]
    colour: str = "accent"
    dash: str = "solid"
    mode: str = "lines"
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    hover: Sequence[str] = ()


@dataclass(frozen=True)
class Axis:
    title: str
    is_log: bool = False
    is_percent: bool = False
    from_zero: bool = False


@dataclass(frozen=True)
class Plot:
    """kind: lines, or bars (beside one another)."""

    id: str
    label: str
    """What it shows, for whoever can't see it."""
    lines: Sequence[Line]
    x: Axis
    y: Axis
    kind: str = "lines"
    height: int = 340
    notes: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    """Vertical marks: {"x": where, "text": what}."""


def plot(drawn: Plot, caption: str, figures: str = "") -> str:
    """A figure that page.js draws, its caption, and its figures as a table to open."""
    lines = [_thinned(line) if drawn.kind == "lines" else line for line in drawn.lines]
    spec = {
        "kind": drawn.kind, "height": drawn.height, "x": vars(drawn.x), "y": vars(drawn.y), "notes": list(drawn.notes),
        "lines": [vars(line) for line in lines],
    }  # fmt: skip
    more = f"<details class='figures'><summary>The figures</summary>{figures}</details>" if figures else ""
    return (
        f"<figure class='plot' id='{drawn.id}'><div class='canvas' role='img' aria-label='{escape(drawn.label)}' "
        f"style='min-height:{drawn.height}px'></div><noscript><p>The plot needs scripts; its figures are below.</p></noscript>"
        f"{data(f'{drawn.id}-spec', spec)}<figcaption>{caption}</figcaption>{more}</figure>"
    )


def _thinned(line: Line) -> Line:
    """At most MAX_POINTS means over equal runs of points; lines with intervals or words are left as they are."""
    if len(line.x) <= MAX_POINTS or line.low or line.hover:
        return line
    width = -(-len(line.x) // MAX_POINTS)
    starts = range(0, len(line.x), width)

    def means(values: Sequence[Any]) -> list[float]:
        parts = [[v for v in values[start : start + width] if v is not None] for start in starts]
        return [sum(part) / len(part) for part in parts if part]

    return Line(line.name, means(line.x), means(line.y), line.colour, line.dash, line.mode)


def data(name: str, value: Any) -> str:
    """JSON in the page; nothing in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str, allow_nan=False)
    return f"<script type='application/json' id='{name}'>{text.replace('<', chr(92) + 'u003c')}</script>"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "", text_columns: int = 1) -> str:
    """A table that scrolls by itself where it is wide. Cells are text; the first `text_columns` columns stand left."""

    def cells(row: Sequence[Any], tag: str) -> str:
        parts = []
        for i, cell in enumerate(row):
            kind = " class='text'" if i < text_columns else ""
            scope = " scope='col'" if tag == "th" else ""
            name = "th scope='row'" if tag == "td" and i == 0 else tag + scope
            parts.append(f"<{name}{kind}>{cell if isinstance(cell, Html) else escape(str(cell))}</{name.split()[0]}>")
        return f"<tr>{''.join(parts)}</tr>"

    label = escape(re.sub(r"<[^>]+>", "", caption) or ", ".join(map(str, head)))
    top = f"<p class='caption'>{caption}</p>" if caption else ""
    body = "".join(cells(row, "td") for row in rows)
    return (
        f"{top}<div class='scroll' tabindex='0' role='region' aria-label='Table: {label}'><table>"
        f"<thead>{cells(head, 'th')}</thead><tbody>{body}</tbody></table></div>"
    )


class Html(str):
    """Text of a cell that is HTML already."""


def prose(*paragraphs: str) -> str:
    return "".join(f"<p>{text}</p>" for text in paragraphs)


def absent(sentence: str) -> str:
    """In place of what the run did not leave."""
    return f"<p class='absent'>{sentence}</p>"


def facts(pairs: Iterable[tuple[str, str, str]]) -> str:
    """The few figures that matter: (figure, what it is, a remark)."""
    items = [
        f"<div><dt>{escape(what)}</dt><dd><b>{escape(figure)}</b>{f'<span>{escape(remark)}</span>' if remark else ''}</dd></div>"
        for figure, what, remark in pairs
    ]
    return f"<dl class='facts'>{''.join(items)}</dl>"


def code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def count(value: float) -> str:
    """1234 -> 1,234; 1234567 -> 1.23 million."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if abs(value) >= size:
            return f"{value / size:.3g} {word}"
    return f"{round(value):,}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def size(number: float) -> str:
    """Bytes: 473690112 -> 452 MiB."""
    for power, word in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if number >= 1024**power:
            return f"{number / 1024**power:.3g} {word}"
    return f"{number:.0f} bytes"


def signed(share: float, digits: int = 2) -> str:
    """A change: 0.0033 -> +0.33 %."""
    return f"{100 * share:+.{digits}f} %".replace("-", "−")


def percent(share: float | None, digits: int = 1) -> str:
    return "none" if share is None else f"{100 * share:.{digits}f} %"


def rate(found: Mapping[str, Any]) -> str:
    """A share with its 95 % interval."""
    if found.get("value") is None:
        return "none"
    return f"{percent(found['value'])} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"
