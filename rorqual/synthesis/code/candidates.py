"""Candidates of the code family in their order: pairs first, whole and in parts, then faults, project by project."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

from rorqual.synthesis.code import CodeConfig
from rorqual.synthesis.code.acceptance import Attempt, gates, made
from rorqual.synthesis.code.agent import agent_of
from rorqual.synthesis.code.filters import heuristic, judged
from rorqual.synthesis.code.ladder import back_end
from rorqual.synthesis.code.mutations import mutations
from rorqual.synthesis.code.mutations_javascript import mutations as mutations_javascript
from rorqual.synthesis.code.pairs import (
    MAX_ISSUE_CHARS,
    Pair,
    change_log,
    commit_pair,
    commits,
    instance_pair,
    instances,
    release_pair,
)
from rorqual.synthesis.code.parts import Part, parts
from rorqual.synthesis.code.projects import Project, project_of
from rorqual.synthesis.code.sources import fetch
from rorqual.synthesis.code.warm import forget, warm
from rorqual.synthesis.line import Made, refused
from rorqual.tasks import Provenance, TaskError
from rorqual.tasks.language import language, language_of, language_of_files

__all__ = ["gates", "jobs", "make"]
GROUP = 3
"""Projects whose faults are shuffled together."""
MUTATIONS = {"python": mutations, "javascript": mutations_javascript}


@dataclass(frozen=True)
class Job:
    """A candidate before anything of it is run."""

    kind: str
    """release, history, instance (a pair), or mutation."""
    wish: str
    index: int = 0
    """Of a pair in its history or file."""
    change: Any = None
    """A Part, a mutation, or None for a whole pair."""


class Plan:
    """The jobs in order, read only as far as they are asked for: a project is set up when its turn comes."""

    def __init__(self, config: CodeConfig):
        self._jobs, self._more = [], jobs(config)

    def job(self, number: int) -> Job | None:
        while number >= len(self._jobs):
            if (job := next(self._more, None)) is None:
                return None
            self._jobs.append(job)
        return self._jobs[number]


plan = cache(Plan)


def jobs(config: CodeConfig) -> Iterator[Job]:
    """Every candidate, in order."""
    for wish in config.releases:
        yield from _jobs_of_pair(config, "release", wish, 0)
    for wish in config.histories:
        for index in range(len(commits(wish))):
            yield from _jobs_of_pair(config, "history", wish, index)
    if config.instances:
        for index in range(len(instances(config.instances))):
            yield from _jobs_of_pair(config, "instance", config.instances, index)
    for first in range(0, len(config.projects), GROUP):
        group = [job for wish in config.projects[first : first + GROUP] for job in _faults(config, wish)]
        random.Random(f"{config.seed}/{first}").shuffle(group)
        yield from group


def _jobs_of_pair(config: CodeConfig, kind: str, wish: str, index: int) -> Iterator[Job]:
    yield Job(kind, wish, index)
    if config.parts:
        try:
            pair = pair_of(config, kind, wish, index)
        except TaskError:
            return  # the whole pair's job says why
        for part in list(parts(pair.old, pair.new, source_changes(pair)))[: config.most_parts]:
            yield Job(kind, wish, index, part)


def _faults(config: CodeConfig, wish: str) -> list[Job]:
    """At most `per_function` faults of each tested function; one job that says why where the project can't be set up."""
    try:
        found = project_named(config, wish)
    except TaskError:
        return [Job("mutation", wish)]
    payload, rng = found.world.payload, random.Random(f"{config.seed}/{wish}")
    speaks, by_function = language_of(payload), {}
    for path, text in payload["files"].items():
        if speaks.is_source(path, payload):
            for mutation in MUTATIONS[speaks.name](path, text):
                by_function.setdefault((path, mutation.line), []).append(mutation)
    tested = [made for (path, line), made in sorted(by_function.items()) if found.covering(path, line)]
    return [Job("mutation", wish, 0, m) for made in tested for m in rng.sample(made, min(len(made), config.per_function))]


@lru_cache(maxsize=6)
def project_named(config: CodeConfig, wish: str) -> Project:
    """A project for faults, set up. Raises TaskError that names the rung."""
    name, _, version = wish.partition("==")
    source = Provenance(wish, "source archive")
    return project_of(fetch(wish), name.rstrip("/").rpartition("/")[2], version, source, agent_of(config.endpoint, config.model))


@lru_cache(maxsize=2)
def pair_of(config: CodeConfig, kind: str, wish: str, index: int) -> Pair:
    """Raises TaskError."""
    if kind == "release":
        return release_pair(wish)
    return commit_pair(wish, index) if kind == "history" else instance_pair(instances(wish)[index], config.clones)


@lru_cache(maxsize=2)
def mended(config: CodeConfig, kind: str, wish: str, index: int) -> Project:
    """The new state of a pair, set up. Raises TaskError that names the rung."""
    pair = pair_of(config, kind, wish, index)
    return project_of(pair.new, pair.name, pair.new_label, pair.provenance, agent_of(config.endpoint, config.model))


def source_changes(pair: Pair) -> list[str]:
    """The source files in which the states differ, by the new state's layout, or by the old one's."""
    speaks = language(language_of_files(pair.new))
    found = set()
    for state in (pair.old, pair.new):
        try:
            layout = speaks.layout(state)
        except TaskError:
            continue
        found |= {p for p in state if pair.old.get(p) != pair.new.get(p) and speaks.is_source(p, layout)}
    return sorted(found)


def make(config: CodeConfig, number: int) -> Made:
    job = plan(config).job(number)
    if job is None:
        return refused("exhausted", f"the sources give {number} candidates or fewer; name more of them")
    try:
        if job.kind == "mutation":
            return _fault(config, number, job)
        return _part(config, number, job) if job.change else _whole(config, number, job)
    except TaskError as error:
        return refused("set_up", str(error))


def pair_refusal(config: CodeConfig, pair: Pair) -> Made | None:
    """What can be said against a pair before its tests are run."""
    if not (sources := source_changes(pair)):
        return refused("source_changed", "no source file differs")
    if back_end(pair.old) != back_end(pair.new):
        return refused("same_build", f"the build changed: {back_end(pair.old)} -> {back_end(pair.new)}")
    speaks = language(language_of_files(pair.new))
    new = speaks.layout(pair.new)
    try:
        old = speaks.layout(pair.old)
    except TaskError as error:
        return refused("same_build", f"the old state: {error}")
    if old["path"] != new["path"] or (new["tops"] and not set(old["tops"]) & set(new["tops"])):
        return refused("same_build", "the packages moved")
    if all(pair.old.get(test) == pair.new.get(test) for test in new["tests"]):
        return refused("tests_changed", "no test differs")
    if pair.source != "release":
        if reason := heuristic(pair):
            return refused("heuristic_filter", reason)
        diff = pair.patch or "\n".join(f"{p}\n{pair.new.get(p, '')}" for p in sources)
        if config.endpoint and (reason := judged(pair, diff, config.endpoint, config.model)):
            return refused("endpoint_filter", reason)
    return None


def _whole(config: CodeConfig, number: int, job: Job) -> Made:
    """A whole pair: the agent is given the old state, the new state's tests decide."""
    pair = pair_of(config, job.kind, job.wish, job.index)
    if refusal := pair_refusal(config, pair):
        return refusal
    issue = pair.issue or change_log(pair) or described(pair)
    if not issue:
        return refused("issue_text", "neither a change log nor a function's signature or documentation differs")
    found = mended(config, job.kind, job.wish, job.index)
    changes = {path: pair.old.get(path) for path in {*pair.old, *pair.new} if pair.old.get(path) != pair.new.get(path)}
    ask = (
        f"The project {pair.name} in this directory is at {pair.old_label}. Bring its source to what is asked for here:\n\n"
        f"{issue}\n\n"
        "Hidden tests check it; changes of tests do not count. Say when you are done."
    )  # fmt: skip
    attempt = Attempt(number, found, dict(sorted(changes.items())), ask, {"source": job.kind, "kind": pair.name})
    return made(attempt, found.world.payload["tests"], None)


def described(pair: Pair) -> str:
    """Where no change log speaks: the functions and classes that change, each with its signature and documentation."""
    found = parts(pair.old, pair.new, source_changes(pair))
    return "\n\n".join(f"{part.path}, {part.name}:\n{part.head}" for part in found)[:MAX_ISSUE_CHARS]


def _part(config: CodeConfig, number: int, job: Job) -> Made:
    """One definition of a pair: the agent is given the new state without it, or with its old text."""
    part: Part = job.change
    pair = pair_of(config, job.kind, job.wish, job.index)
    found = mended(config, job.kind, job.wish, job.index)
    payload = found.world.payload
    text = part.apply(payload["files"].get(part.path, ""))
    if text is None:
        return refused("compiles", "the state without the part does not compile, or means the same")
    tests = sorted({name for line in range(part.lines[0], part.lines[1] + 1) for name in found.covering(part.path, line)})
    if not tests:
        return refused("covered", f"no test calls {part.name}")
    said = "is to be written anew" if not part.old else "does not do yet what its tests ask for"
    ask = f"In the project {pair.name} in this directory, {part.name} in {part.path} {said}. It should be:\n\n{part.head}\n\n"
    tags = {"source": f"{job.kind}_part", "kind": pair.name, "change": "added" if not part.old else "changed"}
    tests = tests[:: max(1, len(tests) // config.most_tests)][: config.most_tests]
    runs = trials(found, part.path, part.lines[0], text, tests) if part.old and payload["language"] == "python" else None
    if isinstance(runs, list) and not noticed(runs):
        return refused("fail_to_pass", "no test notices the change")
    return made(Attempt(number, found, {part.path: text}, ask, tags), None, tests, runs if isinstance(runs, list) else None)


def _fault(config: CodeConfig, number: int, job: Job) -> Made:
    found = project_named(config, job.wish)
    mutation, payload = job.change, found.world.payload
    text = mutation.apply(payload["files"][mutation.path])
    if text is None:
        return refused("compiles", "the change does not compile, or means the same")
    tests = found.covering(mutation.path, mutation.line)[: config.most_tests]
    tags = {"source": "mutation", "kind": payload["name"], "mutation": mutation.kind}
    ask = f"The project {payload['name']} in this directory has a fault. "
    attempt = Attempt(number, found, {mutation.path: text}, ask, tags)
    if payload["language"] != "python":
        return made(attempt, None, tests)
    runs = trials(found, mutation.path, mutation.line, text, tests)
    if isinstance(runs, str):
        return refused("runs", runs)
    if not noticed(runs):
        return refused("fail_to_pass", "no covering test notices the change")
    if config.grading == "warm" and number % config.recheck:
        return made(attempt, None, tests, runs, is_warm=True)
    again = made(attempt, None, tests)
    if again.row is None:
        return again
    agrees = float(noticed(runs) == set(again.row.task.payload["fail_to_pass"]))
    return replace(again, row=replace(again.row, measures={**again.row.measures, "warm_agrees": agrees}))


def trials(found: Project, path: str, line: int, text: str, tests: Sequence[str]) -> list[dict[str, str]] | str:
    """Warm runs of a change of one function; a sandbox that died is left behind, and the next change gets a new one."""
    try:
        return warm(found).runs(path, line, text, tests)
    except TaskError:
        forget(found)
        return "the sandbox of this project's trials ended"


def noticed(runs: list[dict[str, str]]) -> set[str]:
    """The tests that do not pass every time."""
    return {name for run in runs for name, end in run.items() if end != "passed"}
