"""Grades a state of a project by its tests: a fresh sandbox, pristine tests, JUnit XML, and canaries that must fail.

The program under test shares a process with the test runner, so a hostile one could try to forge results. Three barriers: only
source files of the project are taken from the agent; a change may not name the machinery that forging needs, unless the gold
change does; and tests that must fail, under names drawn afresh, are run along: where one does not fail, nothing counts.

A world's files are the pristine, mended state. A task's `changes` (path -> text, or None for a file that is absent) make of them
what an agent is given; of these only source files count when it is graded: tests are the world's.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Mapping
from typing import Any

from rorqual.tasks.language import Language, language_of, read_report
from rorqual.tasks.verdict import Verdict, failed, passed

Files = Mapping[str, str]
Changes = Mapping[str, str | None]

__all__ = ["changed", "gold_of", "grade", "open_box", "read_report", "suspect_growth"]


def open_box(files: Files, project: Mapping[str, Any], backend: str = "bwrap") -> Any:
    """A sandbox with the files, the project's test runner and its dependencies."""
    return language_of(project).open_box(files, project, backend)


def changed(files: Files, changes: Changes) -> dict[str, str]:
    """The files after changes; None takes a file away."""
    return {path: text for path, text in {**files, **changes}.items() if text is not None}


def gold_of(project: Mapping[str, Any], payload: Mapping[str, Any]) -> dict[str, str | None]:
    """The gold change: the pristine text of every source file that the task changed."""
    speaks = language_of(project)
    return {path: project["files"].get(path) for path in payload["changes"] if speaks.is_source(path, project)}


def suspect_growth(speaks: Language, before: Files, after: Changes) -> Counter[str]:
    """The suspect names that a change adds. Raises SyntaxError or ValueError."""
    grown: Counter[str] = Counter()
    for path, text in after.items():
        if text is not None and text != before.get(path):
            grown += speaks.suspects(text) - speaks.suspects(before.get(path, ""))
    return grown


def grade(project: Mapping[str, Any], payload: Mapping[str, Any], submitted: Changes, isolation: str = "bwrap") -> Verdict:
    """The verdict on source files: every fail-to-pass and pass-to-pass test passes, in a fresh sandbox with pristine tests."""
    speaks = language_of(project)
    given = {path: text for path, text in payload["changes"].items() if speaks.is_source(path, project)}
    base = changed(project["files"], given)
    taken = {path: text for path, text in submitted.items() if speaks.is_source(path, project)}
    try:
        added = suspect_growth(speaks, base, taken) - suspect_growth(speaks, base, gold_of(project, payload))
    except (SyntaxError, ValueError, RecursionError) as error:
        return failed(f"the source does not compile: {type(error).__name__}")
    if added:
        return failed(f"the change names {', '.join(sorted(added))}, which the grader does not admit")
    return _run(speaks, project, payload, changed(base, taken), isolation)


def _run(
    speaks: Language, project: Mapping[str, Any], payload: Mapping[str, Any], files: Files, isolation: str
) -> Verdict:  # fmt: skip
    key = secrets.token_hex(6)
    canary, text, expected = speaks.canary(key)
    wanted = [*payload["fail_to_pass"], *payload["pass_to_pass"]]
    with speaks.open_box({**files, canary: text}, project, isolation) as box:
        done = speaks.run(box, project, [*sorted({name.partition("::")[0] for name in wanted}), canary], only=wanted)
    if done.problem:
        return failed(done.problem)
    seen = {name.split("::")[-1].removesuffix(f"_{key}"): outcome for name, outcome in done.results.items() if key in name}
    if seen != expected:
        return failed("tests that must fail did not")
    broken = [name for name in wanted if done.results.get(name) != "passed"]
    measures = {"passed": float(len(wanted) - len(broken)), "wanted": float(len(wanted))}
    return passed(measures) if not broken else failed(*broken[:5], measures=measures)
