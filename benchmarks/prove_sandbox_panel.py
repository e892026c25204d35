"""Bubblewrap holds every escape attempt of the panel; which of them the process back end holds is written down.

The full form rewrites the table of docs/sandbox.md: bubblewrap as this user, and, where this user is root, both back ends
again as nobody with the system's interpreter.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rorqual.runlog import write_atomically

SECONDS, QUICK_SECONDS = 130, 40
REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "sandbox.md"
BEGIN, END = "<!-- panel: written by python -m benchmarks.prove sandbox_panel -->", "<!-- end of panel -->"
SYSTEM_PYTHON = "/usr/bin/python3"
NOBODY = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--"]
WEAKER_BY = 12
"""At most this many attempts may pass the process back end before its description is wrong."""


def main(quick: bool) -> dict:
    columns = {"bwrap": check("bwrap")}
    assert columns["bwrap"]["holds"], [row for row in columns["bwrap"]["attempts"] if not row["holds"]]
    if not quick:
        columns["process"] = check("process")
        if os.geteuid() == 0 and has_system_python():
            columns |= as_nobody()
        write_table(columns)
    figures = {name: _summary(table) for name, table in columns.items()}
    assert all(len(figure["broken"]) <= WEAKER_BY for figure in figures.values()), figures
    return figures


def check(backend: str, prefix: tuple[str, ...] = (), python: str = sys.executable, cwd: Path = REPOSITORY) -> dict:
    command = [*prefix, python, "-W", "ignore", "-m", "rorqual", "sandbox", "check", "--backend", backend, "--json"]
    answer = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert answer.returncode in (0, 1) and answer.stdout, answer.stderr[-2000:]
    return json.loads(answer.stdout)


def as_nobody() -> dict[str, dict]:
    """Both back ends under a plain user, from a copy of the package that it may read."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        shutil.copytree(REPOSITORY / "rorqual", Path(directory, "rorqual"), ignore=shutil.ignore_patterns("__pycache__"))
        subprocess.run(["chmod", "-R", "a+rX", directory], check=True)
        return {
            f"{name}, plain user": check(name, tuple(NOBODY), SYSTEM_PYTHON, Path(directory)) for name in ("bwrap", "process")
        }


def has_system_python() -> bool:
    if not os.access(SYSTEM_PYTHON, os.X_OK):
        return False
    return subprocess.run([SYSTEM_PYTHON, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]).returncode == 0


def _summary(table: dict) -> dict:
    rows = table["attempts"]
    return {
        "attempts": len(rows),
        "held": sum(row["holds"] for row in rows),
        "broken": [r["name"] for r in rows if not r["holds"]],
    }


def write_table(columns: dict[str, dict]) -> None:
    names = list(columns)
    held = {name: {row["name"]: row["holds"] for row in table["attempts"]} for name, table in columns.items()}
    lines = [f"| barrier | attempt | {' | '.join(names)} |", "| --- | --- |" + " --- |" * len(names)]
    for row in columns["bwrap"]["attempts"]:
        cells = ["holds" if held[name][row["name"]] else "**broken**" for name in names]
        lines.append(f"| {row['barrier']} | {row['name']} | {' | '.join(cells)} |")
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    assert rest and after, f"{PAGE} has lost its markers"
    write_atomically(PAGE, before + BEGIN + "\n\n" + "\n".join(lines) + "\n\n" + END + after)
