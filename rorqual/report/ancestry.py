"""The lineage of the run's checkpoint, drawn: what each thing was made of, by content hashes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rorqual.report.markup import Section, absent, code, prose
from rorqual.report.reading import Run
from rorqual.report.training import title_of

ROW = 56
"""Height of a record in CSS pixels; the drawing and the list beside it share it."""
LANE = 14


def section(run: Run) -> Section:
    body = prose(
        "Every checkpoint carries the record of what made it: stage, settings, seeds, parents, and a hash of every content. The "
        f"names below are such hashes. {code('rorqual lineage')} prints the record, and rebuilds from it."
    )
    records = run.lineage.get("records")
    if not records:
        body += absent("This run’s checkpoint has no lineage record (model/lineage.json).")
        return Section("lineage", "Where the model comes from", "", body)
    order = in_order(records)
    body += (
        f"<div class='lineage'>{_drawing(records, order)}<ol>{''.join(_row(records[name], name) for name in order)}</ol></div>"
    )
    return Section("lineage", "Where the model comes from", "", body)


def in_order(records: Mapping[str, Any]) -> list[str]:
    """Parents before children; what is needed late stands late, so that lines are short."""
    order: list[str] = []

    def visit(name: str) -> None:
        if name in order or name not in records:
            return
        for parent in records[name]["parents"]:
            visit(parent["id"])
        order.append(name)

    children = {parent["id"] for record in records.values() for parent in record["parents"]}
    for name in records:
        if name not in children:
            visit(name)
    for name in records:
        visit(name)
    return order


def _drawing(records: Mapping[str, Any], order: Sequence[str]) -> str:
    """Dots in one column; a line from each parent, bulging left by the rows it passes."""
    at = {name: i * ROW + ROW / 2 for i, name in enumerate(order)}
    spans = [(at[p["id"]], at[name]) for name in order for p in records[name]["parents"] if p["id"] in at]
    widest = max((round((b - a) / ROW) for a, b in spans), default=1)
    x = min(widest, 6) * LANE + 10
    paths = []
    for a, b in spans:
        rows = (b - a) / ROW
        bulge = 0 if rows <= 1 else min(rows, 6) * LANE * 1.25
        paths.append(f"<path d='M{x} {a:.0f} C{x - bulge:.0f} {a + 20:.0f} {x - bulge:.0f} {b - 20:.0f} {x} {b:.0f}'/>")
    dots = []
    for name in order:
        given = " class='given'" if records[name]["stage"] == "given" else ""
        dots.append(f"<circle cx='{x}' cy='{at[name]:.0f}' r='5'{given}/>")
    height, width = len(order) * ROW, x + 12
    title = f"Lineage: {len(order)} records, parents above children"
    return (
        f"<svg role='img' aria-label='{title}' width='{width}' height='{height}' viewBox='0 0 {width} {height}'>"
        f"<g class='edges'>{''.join(paths)}</g><g class='dots'>{''.join(dots)}</g></svg>"
    )


def _row(record: Mapping[str, Any], name: str) -> str:
    hashes = record["content"]
    kind = "weights" if "weights" in hashes else next(iter(sorted(hashes)), "")
    roles = ", ".join(f"{parent['role']} {parent['id'][:6]}" for parent in record["parents"])
    parts = [code(name[:10])] + ([f"from {escape(roles)}"] if roles else [])
    parts += [f"{escape(kind)} {code(hashes[kind][:10])}"] if kind else []
    seeds = [f"{key} {value}" for key, value in record.get("seeds", {}).items()]
    parts += [escape(", ".join(seeds))] if seeds else []
    title = "Given: made by no stage" if record["stage"] == "given" else title_of(record["stage"])
    return f"<li style='height:{ROW}px'><b>{escape(title)}</b><small>{' · '.join(parts)}</small></li>"
