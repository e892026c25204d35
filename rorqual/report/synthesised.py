"""The tasks that a run made, family by family, beside the paper's own count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rorqual.report.markup import Section, absent, prose, table
from rorqual.report.reading import Run

PAPER_TABLE = (
    ("code agent", 24_667, "real", "extracted"),
    ("search agent", 50_275, "real", "synthesised"),
    ("general agent", 4_417, "synthesised", "synthesised"),
    ("code interpreter", 5_908, "real", "extracted"),
)
"""Table 1: tasks, environment, prompts."""


def section(run: Run) -> Section:
    paper = "Section 3.2.3, table 1"
    body = prose(
        "Reinforcement learning needs tasks that are hard to solve and easy to check. The paper makes them at scale: an "
        "environment with a database and tools, a question on it, and a program that verifies answers; what a solver never "
        "solves, or a shortcut solves, is thrown away. Every gate is an execution, not an opinion.",
    )
    if run.stores:
        body += table(
            ("store", "tasks", "worlds", "refused", "refused most often because"),
            [_row(name, manifest) for name, manifest in run.stores.items()],
            "This run",
        )
    else:
        body += absent("This run synthesised no tasks.")
    rows = [(name, f"{tasks:,}", environment, prompts) for name, tasks, environment, prompts in PAPER_TABLE]
    body += table(("the paper’s family", "tasks", "environment", "prompts"), rows, "The paper, table 1")
    return Section("tasks", "Tasks out of programs", paper, body)


def _row(name: str, manifest: Mapping[str, Any]) -> tuple[str, ...]:
    counts, rejected = manifest["counts"], manifest.get("rejected", {})
    reasons = sorted(rejected.items(), key=lambda item: -item[1])[:3] if isinstance(rejected, Mapping) else []
    words = ", ".join(f"{reason.replace('_', ' ')} ({number})" for reason, number in reasons)
    return name, f"{counts.get('task', 0):,}", f"{counts.get('world', 0):,}", f"{counts.get('rejected', 0):,}", words
