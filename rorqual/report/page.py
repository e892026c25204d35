"""The page of a run: one HTML file that needs nothing else, made from the run's files alone.

It tells a newcomer what DeepSeek-V3.2 is, by what this run did. Sections whose data a run does not have say so in a sentence.
The plotting library stands in the file once; nothing is asked of any network.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path

from rorqual.report import ancestry, attention, controls, costs, learning, synthesised, trajectories
from rorqual.report.markup import Section, code
from rorqual.report.reading import Run, read_run
from rorqual.report.training import environment, masthead, stages_section
from rorqual.runlog import write_atomically

FILE = "report.html"


def write(directory: Path) -> Path:
    """Make RUN/report.html anew. Raises UserError where the directory holds no run, or a file of it is damaged."""
    path = Path(directory) / FILE
    write_atomically(path, page(read_run(Path(directory))))
    return path


def sections(run: Run) -> list[Section]:
    return [
        stages_section(run),
        attention.selection_section(run),
        attention.mass_section(run),
        attention.loss_section(run),
        costs.section(run),
        synthesised.section(run),
        learning.rl_section(run),
        learning.held_out_section(run),
        trajectories.section(run),
        learning.contexts_section(run),
        ancestry.section(run),
        controls.section(),
    ]


def page(run: Run) -> str:
    from plotly.offline import get_plotlyjs

    parts = sections(run)
    title = f"{run.name}: DeepSeek-V3.2, end to end"
    return "".join(
        [
            "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
            "<meta name='viewport' content='width=device-width, initial-scale=1'>",
            "<meta name='color-scheme' content='light dark'><meta name='generator' content='Rorqual'>",
            "<link rel='icon' href='data:,'>",
            f"<title>{escape(title)}</title><style>{_asset('page.css')}</style></head><body>",
            "<a class='skip' href='#main'>Skip to the report</a>",
            _header(run),
            f"<div class='layout'>{_contents(parts)}<main id='main'>{''.join(map(_section, parts))}{_next(run)}</main></div>",
            f"<footer><p>Made by Rorqual from the files of {escape(run.name)}; every figure comes from them. {environment(run)}"
            "</p></footer>",
            f"<script>{get_plotlyjs()}</script><script>{_asset('page.js')}</script></body></html>",
        ]
    )


def _asset(name: str) -> str:
    return (files("rorqual.report") / name).read_text(encoding="utf-8")


def _header(run: Run) -> str:
    when = "" if run.ended is None else f"{datetime.fromtimestamp(run.ended, UTC):%-d %B %Y}"
    return (
        f"<header class='masthead'><p class='kicker'>Rorqual · run <b>{escape(run.name)}</b>{f' · {when}' if when else ''}</p>"
        "<h1>DeepSeek-V3.2, from text to agent</h1>"
        "<p class='standfirst'>One model, trained from nothing by the procedure of the DeepSeek-V3.2 report, small enough that "
        "every step can be looked at. Each part says what was done, where the paper tells of it, and what came out here.</p>"
        f"{masthead(run)}</header>"
    )


def _contents(parts: Sequence[Section]) -> str:
    items = "".join(f"<li><a href='#{part.id}'>{escape(part.title)}</a></li>" for part in parts)
    return f"<nav class='contents' aria-label='Contents'><h2>Contents</h2><ol>{items}</ol></nav>"


def _section(part: Section) -> str:
    paper = f"<p class='paper'>{escape(part.paper)}</p>" if part.paper else ""
    title = f"<h2 id='{part.id}-title'>{escape(part.title)}</h2>"
    return f"<section id='{part.id}' aria-labelledby='{part.id}-title'>{paper}{title}{part.body}</section>"


def _next(run: Run) -> str:
    home = f"runs/{run.name}" if run.directory.is_absolute() else run.directory.as_posix()
    commands = (
        (f"rorqual chat {home}/model", "to talk to it"),
        (f"rorqual serve {home}/model", "to serve it, with the studio in a browser"),
        (f"rorqual release {home} --out release.tar.gz", "to pack it for others, with its conformance vectors"),
    )
    items = "".join(f"<li>{code(command)} {about}</li>" for command, about in commands)
    return f"<section id='next' aria-labelledby='next-title'><h2 id='next-title'>What next</h2><ul>{items}</ul></section>"
