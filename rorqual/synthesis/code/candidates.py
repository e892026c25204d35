"""Candidates of the code family: one fault each, its covering tests run three times, the gold change graded afresh."""

from __future__ import annotations

import difflib
import random
from functools import cache
from typing import Any

from rorqual.synthesis.code import CodeConfig
from rorqual.synthesis.code.mutations import Mutation, mutations
from rorqual.synthesis.code.projects import RUNS, Project, project
from rorqual.synthesis.line import Made, refused
from rorqual.tasks import GateResult, Task, TaskError, TaskRow, World, digest
from rorqual.tasks.code import BASH_TOOL
from rorqual.tasks.grading import grade, is_source, open_box, run_tests

MAX_CALLS = 40


@cache
def plan(config: CodeConfig) -> tuple[tuple[str, Mutation], ...]:
    """All changes that may be tried, at most `per_function` of a function, in the seed's order."""
    chosen = []
    for wish in config.projects:
        found = project(wish)
        rng = random.Random(f"{config.seed}/{wish}")
        by_function: dict[tuple[str, int], list[Mutation]] = {}
        for path, text in found.world.payload["files"].items():
            if is_source(path, found.world.payload):
                for mutation in mutations(path, text):
                    by_function.setdefault((path, mutation.line), []).append(mutation)
        for place, made in sorted(by_function.items()):
            if place in found.covers:
                chosen += [(wish, m) for m in rng.sample(made, min(len(made), config.per_function))]
    random.Random(f"{config.seed}/plan").shuffle(chosen)
    return tuple(chosen)


def make(config: CodeConfig, number: int) -> Made:
    if number >= len(plan(config)):
        return refused("exhausted", f"the projects give {len(plan(config))} changes; name more of them")
    wish, mutation = plan(config)[number]
    found = project(wish)
    text = mutation.apply(found.world.payload["files"][mutation.path])
    if text is None:
        return refused("compiles", "the change does not compile, or means the same")
    tests = found.covers[mutation.path, mutation.line][: config.most_tests]
    runs = _runs(found, mutation.path, text, tests)
    if isinstance(runs, str):
        return refused("runs", runs)
    if any(run != runs[0] for run in runs):
        return refused("stable", "the tests end differently from run to run")
    failing = sorted(name for name in tests if runs[0].get(name) != "passed")
    if not failing:
        return refused("fail_to_pass", "no covering test notices the change")
    task = _task(number, found, mutation, text, failing, sorted(set(tests) - set(failing)))
    return Made(TaskRow(task, tuple(gates(task, found.world, "bwrap")), {"covering_tests": float(len(tests))}), found.world)


def _runs(found: Project, path: str, text: str, tests: tuple[str, ...]) -> list[dict[str, str]] | str:
    payload, runs = found.world.payload, []
    files = sorted({name.partition("::")[0] for name in tests})
    with open_box({**payload["files"], path: text}) as box:
        for _ in range(RUNS):
            result = run_tests(box, payload["path"], files)
            if isinstance(result, str):
                return result
            runs.append({name: result.get(name, "absent") for name in tests})
    return runs


def _task(number: int, found: Project, mutation: Mutation, text: str, failing: list[str], passing: list[str]) -> Task:
    payload = found.world.payload
    gold = "".join(difflib.unified_diff(
        text.splitlines(True), payload["files"][mutation.path].splitlines(True),
        f"a/{mutation.path}", f"b/{mutation.path}",
    ))  # fmt: skip
    shown = "\n".join(f"- {name.replace('::', ' ', 1).replace('::', '.')}" for name in failing[:3])
    prompt = (
        f"The project {payload['name']} in this directory has a fault. These tests fail, among {len(failing)}:\n{shown}\n\n"
        "Find the fault in the source and mend it there; changes of tests do not count. Say when you are done."
    )
    hidden = {"changes": {mutation.path: text}, "gold": gold, "fail_to_pass": failing, "pass_to_pass": passing}
    tags = {"source": "mutation", "kind": payload["name"], "mutation": mutation.kind, "language": "python"}
    return Task(
        f"code-{number}-{digest(gold, 8)}", "code", ({"role": "user", "content": prompt},), (BASH_TOOL,), found.world.id,
        hidden, min(4, len(failing)), MAX_CALLS, tags, found.world.provenance,
    )  # fmt: skip


def gates(task: Task, world: World | None, isolation: str) -> list[GateResult]:
    """As given it fails, the gold change passes (no pass-to-fail), and the gold text can't be seen from inside."""
    if world is None:
        raise TaskError(f"task {task.id}: its world {task.world} is missing from the store")
    payload: dict[str, Any] = task.payload
    gold = {path: world.payload["files"][path] for path in payload["changes"]}
    idle, fixed = grade(world.payload, payload, {}, isolation), grade(world.payload, payload, gold, isolation)
    return [
        GateResult("initial_fails", idle.is_valid and not idle.passed, "; ".join(idle.reasons)[:200]),
        GateResult("gold_passes", fixed.passed, "; ".join(fixed.reasons)[:200]),
        GateResult("fail_to_pass", bool(payload["fail_to_pass"]), "", {"tests": float(len(payload["fail_to_pass"]))}),
        _leak_gate(world, payload, isolation),
    ]


LOOK = """import os, sys
hidden, found = sys.stdin.read(), []
for top in (".", *sys.path, "/root", "/home", "/var", "/srv", "/tmp", "/opt", "/usr/lib/python3/dist-packages"):
    for folder, folders, files in os.walk(top or "."):
        if os.path.basename(folder) in (".git", ".hg") or folder.endswith(("cache/pip", "pip/cache")):
            found.append(folder)
        for name in files:
            if name == MODULE:
                try:
                    if open(os.path.join(folder, name), errors="replace").read() == hidden:
                        found.append(os.path.join(folder, name))
                except OSError:
                    pass
print(found)
"""


def _leak_gate(world: World, payload: dict[str, Any], isolation: str) -> GateResult:
    """A program that may only look finds no gold file and no history."""
    path, before = next(iter(payload["changes"].items()))
    module = path.rpartition("/")[2]
    with open_box({**world.payload["files"], **payload["changes"]}, isolation) as box:
        box.upload("look_here.py", LOOK.replace("MODULE", repr(module)))
        result = box.run([box.python, "look_here.py"], stdin=world.payload["files"][path])
    is_clean = result.is_ok and result.stdout.strip() == "[]"
    return GateResult(
        "leak_free", is_clean and before != world.payload["files"][path], (result.stdout + result.stderr)[:200] * (not is_clean)
    )
