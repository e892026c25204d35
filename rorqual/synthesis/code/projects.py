"""Projects whose tests run: set up once, run three times, each test mapped to the functions that it calls; kept in the cache."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rorqual.runlog import write_atomically
from rorqual.synthesis.code.agent import Agent
from rorqual.synthesis.code.ladder import SET_UP_S, Environment, back_end, pinned, proven, run_once, set_up
from rorqual.synthesis.code.sources import fetch
from rorqual.tasks import Provenance, TaskError, World, digest
from rorqual.tasks.language import language_of
from rorqual.tasks.language_python import VERSION, cache_of, runner_packages

RUNS = 3
EDITION = 5
"""Of the ladder: another number sets every project up anew."""
COVER = '''"""Writes which functions each test calls: {test: [[file, first line], ...]}."""
import json, os, sys

called, found, here = set(), {}, os.getcwd() + os.sep

def note(frame, event, argument):
    if frame.f_code.co_filename.startswith(here):
        called.add((frame.f_code.co_filename[len(here):], frame.f_code.co_firstlineno))

def pytest_runtest_setup(item):
    called.clear()
    sys.settrace(note)

def pytest_runtest_teardown(item):
    sys.settrace(None)
    found.setdefault(f"{item.nodeid.partition('::')[0]}::{item.location[2].split('[')[0]}", set()).update(called)

def pytest_sessionfinish(session):
    with open("cover.json", "w") as file:
        json.dump({name: sorted(places) for name, places in found.items()}, file)
'''


@dataclass(frozen=True)
class Project:
    """A project whose tests run: its world, how they end, and which functions each calls."""

    world: World
    passing: tuple[str, ...]
    """Test ids that pass every time."""
    failing: tuple[str, ...]
    """Test ids that end otherwise every time."""
    flaky: tuple[str, ...]
    covers: Mapping[tuple[str, int], tuple[str, ...]]
    """(file, first line) -> test ids."""
    rungs: Mapping[str, str]
    """What each rung of the set-up ladder gave."""

    def covering(self, path: str, line: int) -> tuple[str, ...]:
        """The passing tests that call a function; every test where the language has no coverage map."""
        if self.world.payload["language"] != "python":
            return self.passing
        return self.covers.get((path, line), ())


def project(wish: str, agent: Agent | None = None) -> Project:
    """A directory, an archive or name==version, set up. Raises TaskError that names the rung."""
    name, _, version = wish.partition("==")
    return project_of(fetch(wish), name.rstrip("/").rpartition("/")[2], version, Provenance(wish, "source archive"), agent)


def project_of(files: Mapping[str, str], name: str, version: str, source: Provenance, agent: Agent | None = None) -> Project:
    """Set up the project that these files are, or read from the cache what came of it before. Raises TaskError.

    agent: says how the tests run where the ladder's rules do not find out.
    """
    key = digest([files, name, version, VERSION, runner_packages().rpartition("/")[2], EDITION, agent is not None], 32)
    place = cache_of("projects") / f"{key}.json"
    with open(place.with_suffix(".lock"), "w") as lock:  # of several workers that come to a project one sets it up
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            write_atomically(place, json.dumps(_examined(files, name, version, agent)))
    found = json.loads(place.read_text(encoding="utf-8"))
    if "refused" in found:
        raise TaskError(f"project {found['refused']}")
    return _project(found, source, digest(files, 64))


def _examined(files: Mapping[str, str], name: str, version: str, agent: Agent | None) -> dict[str, Any]:
    """What is kept of a project: how its tests end and what they call, or why it is refused."""
    try:
        return _examine(_set_up(files, name, version, agent))
    except TaskError as error:
        return {"refused": f"{name} {version}".strip() + f": {error}"}


def _set_up(files: Mapping[str, str], name: str, version: str, agent: Agent | None) -> Environment:
    try:
        return set_up(files, name, version)
    except TaskError as error:
        if agent is None:
            raise
        payload = agent(files, name, version, str(error))
        payload["requires"] = pinned(payload["requires"], payload["tops"])
        return proven(payload, {"metadata": "agent", "build": back_end(files), "runner": "agent"}, run_once(payload))


def _examine(env: Environment) -> dict[str, Any]:
    """The first run, one more, and one with coverage; all in one sandbox, none of which the source changes."""
    payload = env.payload
    speaks = language_of(payload)
    runs, cover = [env.first], {}
    with speaks.open_box({**payload["files"], "rorqual_cover.py": COVER}, payload, "bwrap", SET_UP_S) as box:
        for number in range(1, RUNS):
            is_last = number == RUNS - 1 and speaks.name == "python"
            inside = {**payload, "path": f"{payload['path']}:{box.directory}"} if is_last else payload
            run = speaks.run(box, inside, payload["tests"], ["-p", "rorqual_cover"] if is_last else [])
            if run.problem:
                raise TaskError(f"runner: tests do not run again: {run.problem[-300:]}")
            runs.append(run.results)
        if speaks.name == "python":
            cover = json.loads(box.download("cover.json"))
    return {"payload": payload, "rungs": env.rungs, "cover": cover, **_by_outcome(runs)}


def _by_outcome(runs: list[dict[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"passing": [], "failing": [], "flaky": []}
    for name in sorted({name for run in runs for name in run}):
        ends = {run.get(name, "absent") for run in runs}
        found["flaky" if len(ends) > 1 else "passing" if ends == {"passed"} else "failing"].append(name)
    if not found["passing"]:
        raise TaskError(f"runner: no test passes every time ({len(found['flaky'])} flaky)")
    return found


def _project(found: Mapping[str, Any], source: Provenance, sha256: str) -> Project:
    payload = found["payload"]
    place = Provenance(source.source, source.key, sha256, "the project's own")
    world = World(f"project-{digest(payload)}", "code", payload, digest(payload["files"]), (payload["name"],), (place,))
    passing = tuple(found["passing"])
    return Project(
        world, passing, tuple(found["failing"]), tuple(found["flaky"]), _inverted(found["cover"], passing), found["rungs"]
    )


def _inverted(cover: Mapping[str, list[list[Any]]], passing: tuple[str, ...]) -> dict[tuple[str, int], tuple[str, ...]]:
    """Function -> the passing tests that call it."""
    by_key: dict[str, list[str]] = {}
    for name in passing:
        file, owner, test = name.split("::", 2)
        key = f"{file}::{test.split('[')[0]}"
        by_key.setdefault(key, []).append(name)
        by_key.setdefault(f"{file}::{owner}.{test.split('[')[0]}", []).append(name)
    found: dict[tuple[str, int], set[str]] = {}
    for key, places in cover.items():
        for file, line in places:
            found.setdefault((file, line), set()).update(by_key.get(key, ()))
    return {place: tuple(sorted(tests)) for place, tests in found.items() if tests}
