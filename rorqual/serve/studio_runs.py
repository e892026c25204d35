"""The studio's runs: choose some, choose a metric, compare their curves and their last figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nicegui import run, ui

from rorqual.runlog import EVENTS, read_events

if TYPE_CHECKING:
    from rorqual.serve.studio import Studio

MAX_POINTS = 2000
Curves = dict[str, list[tuple[int, float]]]
"""Metric -> (step, value) by ascending step."""


def find_runs(root: str, depth: int = 4) -> list[str]:
    """The run directories under a root, as paths relative to it; a run holds events.jsonl."""
    top = Path(root)
    patterns = ["/".join(["*"] * level + [EVENTS]) for level in range(depth + 1)]
    return sorted({str(path.parent.relative_to(top)) for pattern in patterns for path in top.glob(pattern)})


def curves_of(directory: Path) -> Curves:
    """Every metric of a run; of a step that was written twice (after a resume) the last counts."""
    values: dict[str, dict[int, float]] = {}
    for event in read_events(directory, "metrics"):
        for name, value in event.items():
            if name not in ("time", "kind", "step") and isinstance(value, int | float):
                values.setdefault(name, {})[event["step"]] = value
    return {name: sorted(points.items()) for name, points in values.items()}


def thinned(points: list[tuple[int, float]], most: int = MAX_POINTS) -> list[tuple[int, float]]:
    """Every so-manieth point and the last one."""
    stride = -(-len(points) // most)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]


class RunsPage:
    """One visitor's comparison."""

    def __init__(self, studio: Studio):
        self.root = studio.config.runs
        self._curves: dict[str, Curves] = {}

    def draw(self) -> None:
        with ui.element("section").props('aria-label="Runs to compare"').classes("stack"):
            with ui.element("div").classes("line"):
                self.chosen = ui.select([], label="Runs", multiple=True, with_input=True, on_change=self.compare)
                self.chosen.props("use-chips outlined dense").style("flex: 1 1 20rem")
                self.metric = ui.select([], label="Metric", with_input=True, on_change=self._show)
                self.metric.props("outlined dense").style("flex: 0 1 18rem")
                self.logarithmic = ui.switch("Logarithmic", on_change=self._show)
                ui.button(icon="refresh", on_click=self.look).props('flat round aria-label="Look for runs again"')
            self.said = ui.label().classes("quiet").props("aria-live=polite")
            self.chart = ui.echart({}).classes("chart")
            self.table = ui.element("div").classes("wide")
        self.chart.set_visibility(False)
        ui.timer(0.05, self.look, once=True)

    async def look(self) -> None:
        """Look for runs again, and read those that are chosen anew."""
        found = await run.io_bound(find_runs, self.root) or []
        self.chosen.set_options(found, value=[name for name in self.chosen.value or () if name in found])
        self.said.set_text(f"{len(found)} runs under {self.root}" if found else f"There are no runs under {self.root}.")
        await self.compare()

    async def compare(self) -> None:
        names = list(self.chosen.value or ())
        self._curves = {name: await run.io_bound(curves_of, Path(self.root) / name) or {} for name in names}
        metrics = sorted({metric for curves in self._curves.values() for metric in curves})
        kept = self.metric.value if self.metric.value in metrics else _first_choice(metrics)
        self.metric.set_options(metrics, value=kept)
        self._show()

    def _show(self) -> None:
        metric = self.metric.value
        curves = {name: found[metric] for name, found in self._curves.items() if metric in found}
        self.chart.set_visibility(bool(curves))
        self.chart.options.clear()
        self.chart.options.update(_options(metric, curves, bool(self.logarithmic.value)))
        self.chart.update()
        self.table.clear()
        if curves:
            with self.table:
                _table(metric, curves)


def _first_choice(metrics: list[str]) -> str | None:
    preferred = [name for name in metrics if name in ("train/loss", "reward/mean")]
    return (preferred or metrics or [None])[0]


def _options(metric: str, curves: Curves, logarithmic: bool) -> dict[str, Any]:
    lines = [{"type": "line", "name": name, "showSymbol": False, "data": [list(point) for point in thinned(points)]}
             for name, points in curves.items()]  # fmt: skip
    grey = {"color": "#7a8791"}
    axis = {"nameTextStyle": grey, "axisLabel": grey, "scale": True}
    return {
        "animation": False,
        "tooltip": {"trigger": "axis"},
        "legend": {"type": "scroll", "top": 0, "textStyle": grey},
        "grid": {"left": 60, "right": 20, "top": 40, "bottom": 40},
        "xAxis": {"type": "value", "name": "step", "nameLocation": "middle", "nameGap": 26, **axis},
        "yAxis": {"type": "log" if logarithmic else "value", "name": metric, **axis},
        "series": lines,
    }


def _table(metric: str, curves: Curves) -> None:
    """The same in figures, for those who read no curves."""
    with ui.element("table"):
        with ui.element("thead"), ui.element("tr"):
            for title in ("run", "steps", f"first {metric}", "last", "lowest", "highest"):
                ui.html(title, tag="th").props("scope=col")
        with ui.element("tbody"):
            for name, points in curves.items():
                values = [value for _, value in points]
                with ui.element("tr"):
                    ui.html(name, tag="th").props("scope=row")
                    for figure in (len(points), values[0], values[-1], min(values), max(values)):
                        ui.html(f"{figure:.6g}", tag="td").classes("figure")
