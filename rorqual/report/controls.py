"""The committed proofs: figures of other runs, shown as such, with their dates, commits and commands."""

from __future__ import annotations

import ast
import json
import subprocess
from collections.abc import Iterator, Mapping
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from rorqual.report import proven
from rorqual.report.markup import Html, Section, absent, code, prose, table

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"
MAX_FIGURES = 60


def section(results: Path = RESULTS) -> Section:
    """results: a directory of JSON files as `python -m benchmarks.prove` writes them."""
    body = prose(
        "One run of one seed proves little. What takes hours, many seeds or a control that must fail is run apart, by "
        f"{code('make prove')}, and its figures are committed with the code. <strong>They are of other runs</strong>, on the "
        "machines and at the commits named, not of this one."
    )
    found = [_proof(path) for path in sorted(results.glob("*.json"))]
    found = [each for each in found if each]
    if not found:
        body += absent("No committed results stand beside this installation (benchmarks/results).")
        return Section("controls", "Controls and proofs: other runs", "", body)
    return Section("controls", "Controls and proofs: other runs", "", body + "".join(found))


def is_committed(name: str, results: Path = RESULTS) -> bool:
    """Whether the proof's figures are committed, so that a page may point to them."""
    return (results / f"{name}.json").is_file()


def _proof(path: Path) -> str:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return ""
    if not isinstance(record, dict) or not record:
        return ""
    figures = record.get("figures", {k: v for k, v in record.items() if k not in ("command", "commit")})
    shown = proven.shown(path.stem, figures) or _figures(figures, path.name)
    claim, _, rest = _claim(path.stem).partition(". ")
    title = f"<b>{escape(path.stem.replace('_', ' '))}</b> {escape(claim.rstrip('.'))}"
    told = f"<p>{escape(rest)}</p>" if rest else ""
    return (
        f"<details class='proof'><summary>{title}<small>another run · {escape(_when(record))}</small></summary>"
        f"{told}<p>{code(str(record.get('command', '')))}</p>{shown}</details>"
    )


def _figures(figures: Any, file: str) -> str:
    """Every figure by its dotted name, the first so many."""
    rows = list(flat(figures))
    more = f"<p><em>{len(rows) - MAX_FIGURES:,} more figures in {escape(file)}.</em></p>" if len(rows) > MAX_FIGURES else ""
    return table(("figure", "value"), [(Html(escape(name)), value) for name, value in rows[:MAX_FIGURES]]) + more


def _when(record: Mapping[str, Any]) -> str:
    """Date, commit and machine. The date is that of the commit where the record itself has none."""
    commit = str(record.get("commit") or "")
    date = str(record.get("date") or "")[:10] or _date_of(commit)
    parts = [date or "date not recorded", f"commit {commit[:7]}" if commit else "", _machine(record)]
    return " · ".join(part for part in parts if part)


def _machine(record: Mapping[str, Any]) -> str:
    device = str(record.get("device") or "cpu")
    if device != "cpu":
        return device
    return f"{record['cores']} CPU cores" if record.get("cores") else ""


def _date_of(commit: str) -> str:
    if not commit:
        return ""
    command = ["git", "show", "-s", "--format=%cI", commit]
    try:
        shown = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        return datetime.fromisoformat(shown.stdout.strip()).date().isoformat()
    except (OSError, ValueError):
        return ""


def _claim(name: str) -> str:
    """The docstring of the proof: what it claims."""
    path = REPOSITORY / "benchmarks" / f"prove_{name}.py"
    path = path if path.is_file() else path.with_name(f"{name}.py")
    if not path.is_file():
        return ""
    return " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split())


def flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every figure of nested JSON with its dotted name."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        if all(isinstance(each, int | float | str) for each in value) and len(value) <= 12:
            yield name, ", ".join(_short(each) for each in value)
        else:
            for i, inner in enumerate(value):
                yield from flat(inner, f"{name}[{i}]")
    else:
        yield name, _short(value)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
