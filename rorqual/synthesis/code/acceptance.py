"""What every code task must show by execution: the state as given fails, the gold change passes, nothing of it can be seen.

Paper 3.2.3: at least one fail-to-pass test and no pass-to-fail test under the gold change. Added: three runs against flakiness.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from rorqual.synthesis.code.projects import RUNS, Project
from rorqual.synthesis.line import Made, refused
from rorqual.tasks import GateResult, Task, TaskError, TaskRow, World, digest
from rorqual.tasks.code import BASH_TOOL
from rorqual.tasks.grading import changed, gold_of, grade, open_box
from rorqual.tasks.language import language_of

MAX_CALLS = 40
LEAST_TEXT = 64
"""Characters: a shorter file says nothing, and stands in many places."""
NAMED_TESTS = 3
Runs = list[dict[str, str]]


@dataclass(frozen=True)
class Attempt:
    """A change to a project that may become a task."""

    number: int
    project: Project
    changes: Mapping[str, str | None]
    """path -> the text that an agent is given; None where the file is taken away."""
    ask: str
    tags: Mapping[str, str]


def made(
    attempt: Attempt, files: Sequence[str] | None, tests: Sequence[str] | None, runs: Runs | None = None, is_warm: bool = False
) -> Made:
    """The task with its gates, or why there is none.

    files: run them whole; tests: only these count. runs: had already. is_warm: the gates too rest on warm runs.
    """
    found = attempt.project
    names = sorted({name.partition("::")[0] for name in tests or ()}) if files is None else files
    if runs is None:
        result = runs_of(found, attempt.changes, names, tests)
        if isinstance(result, str):
            return refused("runs", result)
        runs = result
    ends = {name: [run.get(name, "absent") for run in runs] for name in (found.passing if tests is None else tests)}
    unstable = sorted(name for name, seen in ends.items() if len(set(seen)) > 1)
    failing = sorted(name for name, seen in ends.items() if set(seen) != {"passed"} and name not in unstable)
    if not failing:
        if unstable:
            return refused("stable", f"{len(unstable)} tests end differently from run to run, and no other fails")
        if files is not None and found.flaky:
            return refused("flaky", f"no test fails and then passes every time; {len(found.flaky)} tests are flaky")
        return refused("fail_to_pass", "no test notices the change")
    if files is not None and (broken := pass_to_fail(found, runs)):
        return refused("pass_to_fail", f"{len(broken)} tests pass before the gold change and fail after it, as {broken[0]}"[:300])
    passing = sorted(name for name, seen in ends.items() if set(seen) == {"passed"})
    task = _task(attempt, failing, passing, is_whole=files is not None)
    results = warm_gates(task, found) if is_warm else gates(task, found.world, "bwrap")
    measures = {"failing": float(len(failing)), "passing": float(len(passing)), "flaky": float(len(unstable) + len(found.flaky))}
    return Made(TaskRow(task, tuple(results), measures), found.world)


def runs_of(
    found: Project, changes: Mapping[str, str | None], files: Sequence[str], tests: Sequence[str] | None = None
) -> Runs | str:
    """The outcomes of three runs in one fresh sandbox, with the world's own tests; or why there are none.

    tests: where the language can choose among a file's tests, only these are run.
    """
    payload, runs = found.world.payload, []
    speaks = language_of(payload)
    given = {path: text for path, text in changes.items() if speaks.is_source(path, payload)}
    with open_box(changed(payload["files"], given), payload) as box:
        for _ in range(RUNS):
            run = speaks.run(box, payload, files, only=tests)
            if run.problem:
                return run.problem
            runs.append(run.results)
    return runs


def pass_to_fail(found: Project, runs: Runs) -> list[str]:
    """Tests that pass every time before the gold change, and fail every time after it."""
    return [name for name in found.failing if all(run.get(name) == "passed" for run in runs)]


def prompt_of_tests(failing: Sequence[str]) -> str:
    shown = "\n".join(f"- {_readable(name)}" for name in failing[:NAMED_TESTS])
    return (
        f"These tests fail, among {len(failing)}:\n{shown}\n\n"
        "Mend the source so that they pass; changes of tests do not count. Say when you are done."
    )


def _readable(name: str) -> str:
    file, owner, test = name.split("::", 2)
    return f"{file} {owner}.{test}" if owner else f"{file} {test}"


def _task(attempt: Attempt, failing: list[str], passing: list[str], is_whole: bool) -> Task:
    payload = attempt.project.world.payload
    gold = gold_of(payload, {"changes": attempt.changes})
    patch = "".join(_diff(path, attempt.changes[path] or "", text or "") for path, text in sorted(gold.items()))
    ask = attempt.ask if is_whole else attempt.ask + prompt_of_tests(failing)
    hidden = {"changes": dict(attempt.changes), "gold": patch, "fail_to_pass": failing, "pass_to_pass": passing}
    tags = {**attempt.tags, "language": payload["language"], "build": _build(attempt.project)}
    return Task(
        f"code-{attempt.number}-{digest(patch, 8)}", "code", ({"role": "user", "content": ask},), (BASH_TOOL,),
        attempt.project.world.id, hidden, min(4, len(failing)), MAX_CALLS, tags, attempt.project.world.provenance,
    )  # fmt: skip


def _build(found: Project) -> str:
    return found.rungs.get("build", "none").split(":")[0]


def _diff(path: str, before: str, after: str) -> str:
    lines = difflib.unified_diff(before.splitlines(True), after.splitlines(True), f"a/{path}", f"b/{path}")
    return "".join(line if line.endswith("\n") else line + "\n\\ No newline at end of file\n" for line in lines)


def gates(task: Task, world: World | None, isolation: str) -> list[GateResult]:
    """As given it fails, the gold change passes (no pass-to-fail), and the gold text can't be seen from inside."""
    if world is None:
        raise TaskError(f"task {task.id}: its world {task.world} is missing from the store")
    payload: dict[str, Any] = task.payload
    gold = gold_of(world.payload, payload)
    idle, fixed = grade(world.payload, payload, {}, isolation), grade(world.payload, payload, gold, isolation)
    return [
        GateResult("initial_fails", idle.is_valid and not idle.passed, "; ".join(idle.reasons)[:200]),
        GateResult("gold_passes", fixed.passed, "; ".join(fixed.reasons)[:200]),
        GateResult("fail_to_pass", bool(payload["fail_to_pass"]), "", {"tests": float(len(payload["fail_to_pass"]))}),
        leak_gate(world, payload, isolation) if len(payload["changes"]) > 1 else _leak_of_file(world, payload, isolation),
    ]


def warm_gates(task: Task, found: Project) -> list[GateResult]:
    """The same claims where the faulty state was run warm: the gold state is the project's own, which was run three times."""
    payload = task.payload
    return [
        GateResult("initial_fails", bool(payload["fail_to_pass"]), "warm"),
        GateResult("gold_passes", {*payload["fail_to_pass"], *payload["pass_to_pass"]} <= set(found.passing), "warm"),
        GateResult("fail_to_pass", bool(payload["fail_to_pass"]), "", {"tests": float(len(payload["fail_to_pass"]))}),
        _leak_of_file(found.world, payload, "bwrap"),
    ]


_seen: dict[tuple[str, str, str], GateResult] = {}


def _leak_of_file(world: World, payload: Mapping[str, Any], isolation: str) -> GateResult:
    """Once for each file of a project: what else can be seen from inside does not depend on the change in it."""
    ((path, text),) = payload["changes"].items()
    key = (world.id, path, isolation)
    if key not in _seen:
        _seen[key] = leak_gate(world, payload, isolation)
    if text == world.payload["files"].get(path):
        return GateResult("leak_free", False, "the given state holds the gold text")
    return _seen[key]


@cache
def _system_files() -> Mapping[str, tuple[str, ...]]:
    """Programs' texts of the system, which every sandbox sees, by name; the places that are hidden from it left out."""
    found: dict[str, list[str]] = {}
    for folder, folders, names in os.walk("/usr"):
        if os.path.basename(folder) in ("dist-packages", "site-packages") and "/python3" in folder:
            folders.clear()
            continue
        for name in names:
            if name.endswith((".py", ".js", ".mjs", ".cjs")):
                found.setdefault(name, []).append(os.path.join(folder, name))
    return {name: tuple(paths) for name, paths in found.items()}


def system_copies(name: str, sha256: str) -> list[str]:
    """Files of the system that hold a text."""
    found = []
    for path in _system_files().get(name, ()):
        try:
            with open(path, "rb") as file:
                if hashlib.sha256(file.read()).hexdigest() == sha256:
                    found.append(path)
        except OSError:
            continue
    return found


LOOK = """import hashlib, json, os, socket, sys
hidden, found = json.load(sys.stdin), []
names = {entry["name"] for entry in hidden["files"]}
digests = {entry["digest"] for entry in hidden["files"]}
for top in (".", *sys.path, "/root", "/home", "/var", "/srv", "/tmp", "/opt", "/mnt", "/run", "/node_modules"):
    for folder, folders, files in os.walk(top or "."):
        if os.path.basename(folder) in (".git", ".hg") or folder.endswith(("cache/pip", "pip/cache")):
            found.append(folder)
        for name in files:
            if name in names:
                try:
                    data = open(os.path.join(folder, name), "rb").read()
                except OSError:
                    continue
                if hashlib.sha256(data).hexdigest() in digests:
                    found.append(os.path.join(folder, name))
for address in (("1.1.1.1", 53), ("127.0.0.1", 80)):
    try:
        socket.create_connection(address, 1).close()
        found.append("network")
    except OSError:
        pass
print(found)
"""


def leak_gate(world: World, payload: Mapping[str, Any], isolation: str) -> GateResult:
    """A program that may only look finds no file with a gold text, no history, no package cache, no network."""
    project = world.payload
    gold = {path: text for path, text in gold_of(project, payload).items() if text is not None and len(text) >= LEAST_TEXT}
    hidden = [
        {"name": path.rpartition("/")[2], "digest": hashlib.sha256(text.encode()).hexdigest()} for path, text in gold.items()
    ]
    with open_box(changed(project["files"], payload["changes"]), project, isolation) as box:
        box.upload("look_here.py", LOOK)
        result = box.run([box.python, "look_here.py"], stdin=json.dumps({"files": hidden}))
    copied = [path for path, entry in zip(gold, hidden, strict=True) if system_copies(entry["name"], entry["digest"])]
    if copied:
        return GateResult("leak_free", False, f"the system holds a copy of {copied[0]}")
    is_clean = result.is_ok and result.stdout.strip() == "[]"
    differs = all(payload["changes"][path] != text for path, text in gold.items())
    return GateResult("leak_free", is_clean and differs, (result.stdout + result.stderr)[:200] * (not is_clean))
