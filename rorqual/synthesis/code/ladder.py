"""The set-up ladder of a project: metadata, build back end, extras, test runner. Each rung says what it found or why it failed.

Only wheels are installed, which runs none of their code; the build back end and the tests run in a sandbox without network.
"""

from __future__ import annotations

import email
import json
import re
import shutil
import tomllib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from rorqual.tasks import TaskError, digest
from rorqual.tasks.language import Run, language, language_of_files
from rorqual.tasks.language_python import LANGUAGE, RUNNER, VERSION, cache_of, dependency_packages

SET_UP_S = 300.0
OPTIONS: tuple[tuple[str, ...], ...] = ((), ("--import-mode=importlib",), ("--noconftest",))
"""Ways to call pytest, tried in turn until some test passes."""
EXTRAS_ROUNDS = 3
ALIASES = {"bs4": "beautifulsoup4", "yaml": "pyyaml", "dateutil": "python-dateutil", "attr": "attrs", "markupsafe": "markupsafe"}
_MISSING = re.compile(r"No module named '([\w]+)")
BUILD = """import importlib, json, os, re, sys, zipfile
from importlib import metadata
HERE = os.getcwd()
module, _, attribute = BACKEND.partition(":")
sys.path[:0] = PATHS
os.makedirs("/tmp/programs")
for entry in metadata.entry_points(group="console_scripts"):
    with open("/tmp/programs/" + entry.name, "w") as file:
        first = entry.attr.partition(".")[0]
        file.write(f"#!{sys.executable}\\nfrom {entry.module} import {first}\\nraise SystemExit({entry.attr}())\\n")
    os.chmod(file.name, 0o755)
os.environ["PATH"] = ":".join(["/tmp/programs", *(path + "/bin" for path in sys.path if path), os.environ.get("PATH", "")])
backend = importlib.import_module(module)
for part in filter(None, attribute.split(".")):
    backend = getattr(backend, part)

def is_there(wish):
    try:
        return bool(metadata.distribution(re.match(r"[\\w.-]+", wish)[0]))
    except metadata.PackageNotFoundError:
        return False

asked = getattr(backend, "get_requires_for_build_wheel", list)()
if missing := [wish for wish in asked if not is_there(wish)]:
    with open(HERE + "/rorqual_wheel.json", "w") as file:
        json.dump({"needs": missing}, file)
    raise SystemExit
os.makedirs("/tmp/wheel")
name = backend.build_wheel("/tmp/wheel")
with zipfile.ZipFile("/tmp/wheel/" + name) as wheel:
    wanted = [n for n in wheel.namelist() if n.endswith((".py", ".dist-info/METADATA", "entry_points.txt"))]
    found = {"files": {n: wheel.read(n).decode("utf-8", "replace") for n in wanted}}
with open(HERE + "/rorqual_wheel.json", "w") as file:
    json.dump(found, file)
"""


@dataclass(frozen=True)
class Environment:
    """A project whose tests run: a world's payload, what each rung gave, and the first run of the tests."""

    payload: dict[str, Any]
    rungs: dict[str, str]
    first: dict[str, str]


def set_up(files: Mapping[str, str], name: str, version: str) -> Environment:
    """Climb the ladder. Raises TaskError that names the rung."""
    kind = language_of_files(files)
    speaks = language(kind)
    payload = {"files": dict(files), "name": name, "version": version, "language": kind, "options": [], "requires": []}
    payload |= speaks.layout(files)
    if kind != "python":
        rungs = {"metadata": "package.json", "build": "none", "extras": ", ".join(payload["requires"]), "runner": "node --test"}
        return proven(payload, rungs, run_once(payload))
    if taken := set(payload["tops"]) & {*RUNNER, "_pytest"}:
        raise TaskError(f"runner: the test runner itself needs {', '.join(sorted(taken))}")
    wishes = requirements(files)
    rungs = {"metadata": f"{len(wishes)} requirements"}
    rungs["build"] = build(payload)
    return _climb(payload, rungs, wishes)


def _climb(payload: dict[str, Any], rungs: dict[str, str], wishes: list[Requirement]) -> Environment:
    """The extras and runner rungs: install what is required and what tests miss, and find a way to run them."""
    asked = [str(wish) for wish in wishes if is_needed(wish)]
    run = Run()
    for _ in range(EXTRAS_ROUNDS):
        payload["requires"] = pinned(asked, payload["tops"])
        for options in OPTIONS:
            payload["options"] = list(options)
            run = run_once(payload)
            if "passed" in run.results.values():
                break
        lost: list[str] = _MISSING.findall(run.output + run.problem)
        missing = {ALIASES.get(module, module).lower() for module in lost}
        added = [plain(wish) for wish in wishes if wish.name.lower().replace("-", "_") in {m.replace("-", "_") for m in missing}]
        if not (fresh := [wish for wish in added if wish not in asked and wish.split(";")[0] not in asked]):
            break
        asked += fresh
    rungs |= {"extras": ", ".join(payload["requires"]) or "none", "runner": " ".join(["pytest", *payload["options"]])}
    return proven(payload, rungs, run)


def proven(payload: dict[str, Any], rungs: dict[str, str], run: Run) -> Environment:
    if run.problem:
        raise TaskError(f"runner: tests do not run: {run.problem[-300:]}")
    if "passed" not in run.results.values():
        lost = sorted(set(_MISSING.findall(run.output)))
        raise TaskError(f"runner: no test passes{'; missing ' + ', '.join(lost) if lost else ''}")
    return Environment(payload, rungs, run.results)


def run_once(payload: Mapping[str, Any]) -> Run:
    """All tests in a fresh sandbox."""
    speaks = language(payload["language"])
    with speaks.open_box(payload["files"], payload, "bwrap", SET_UP_S) as box:
        return speaks.run(box, payload, payload["tests"])


def requirements(files: Mapping[str, str]) -> list[Requirement]:
    """What the project's metadata asks for: with extras, dependency groups and files of test requirements."""
    lines = list(email.message_from_string(files.get("PKG-INFO", "")).get_all("Requires-Dist") or ())
    table = _pyproject(files)
    if not lines:
        lines += table.get("project", {}).get("dependencies", ())
        for name, extra in table.get("project", {}).get("optional-dependencies", {}).items():
            lines += [f"{line}; extra == '{name}'" for line in extra if ";" not in line]
    for group in table.get("dependency-groups", {}).values():
        lines += [f"{line}; extra == 'group'" for line in group if isinstance(line, str) and ";" not in line]
    poetry = table.get("tool", {}).get("poetry", {})
    for group in (*(g.get("dependencies", {}) for g in poetry.get("group", {}).values()), poetry.get("dev-dependencies", {})):
        lines += [f"{name}; extra == 'group'" for name in group if name != "python"]
    tested = [text for path, text in files.items() if re.search(r"(test|dev)[^/]*\.(txt|in)$|requirements[^/]*\.txt$", path)]
    for text in tested:
        lines += [
            f"{line.strip()}; extra == 'file'" for line in text.split("\n") if re.match(r"[A-Za-z]", line) and ";" not in line
        ]
    found = []
    for line in lines:
        try:
            found.append(Requirement(line.split(" #")[0].strip()))
        except InvalidRequirement:
            continue
    return found


def _pyproject(files: Mapping[str, str]) -> dict[str, Any]:
    try:
        return tomllib.loads(files.get("pyproject.toml", ""))
    except tomllib.TOMLDecodeError as error:
        raise TaskError(f"metadata: pyproject.toml: {error}") from None


def is_needed(wish: Requirement) -> bool:
    """Whether it is asked for without any extra, on this interpreter."""
    return wish.marker is None or wish.marker.evaluate({"extra": ""})


def plain(wish: Requirement) -> str:
    return f"{wish.name}{wish.specifier}"


def pinned(asked: list[str], tops: list[str]) -> list[str]:
    """name==version of everything that these requirements bring, so that another machine installs the same."""
    if not asked:
        return []
    place = dependency_packages(tuple(sorted(asked)), tuple(tops))
    found = sorted(_named(entry.name) for entry in Path(place).glob("*.dist-info"))
    target = cache_of("dependencies") / digest([VERSION, found, list(tops)])
    if not target.exists():
        scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        shutil.copytree(place, scratch, dirs_exist_ok=True)
        try:
            scratch.rename(target)
        except OSError:  # another process was first
            shutil.rmtree(scratch)
    return found


def _named(folder: str) -> str:
    name, _, version = folder.removesuffix(".dist-info").partition("-")
    return f"{name}=={version}"


def back_end(files: Mapping[str, str]) -> str:
    """The build back end that the project names; setuptools' old form where it names none."""
    system = _pyproject(files).get("build-system", {})
    if not system and "setup.py" not in files and "setup.cfg" not in files:
        return "none"
    return system.get("build-backend", "setuptools.build_meta:__legacy__")


def build(payload: dict[str, Any]) -> str:
    """Make a wheel in the sandbox; its metadata and generated modules join the files. What came, in a word.

    A back end that can't work offline is no reason to refuse a project whose tests run from its source.
    """
    files = payload["files"]
    backend = back_end(files)
    if backend == "none":
        return "none"
    system = _pyproject(files).get("build-system", {})
    asked, script = list(system.get("requires", ["setuptools", "wheel"])), BUILD.replace("BACKEND", repr(backend))
    script = script.replace("PATHS", repr(system.get("backend-path", [])))
    try:
        made = _built(payload, script, asked)
        if "needs" in made:  # what the back end says that it needs beyond what is written, as meson's does ninja
            made = _built(payload, script, asked + made["needs"])
    except TaskError as error:
        return f"{backend}: not built ({error})"[:200]
    _adopt(payload, made.get("files", {}))
    return backend


def _built(payload: Mapping[str, Any], script: str, asked: list[str]) -> dict[str, Any]:
    """The wheel's files, or what its making needs. Raises TaskError."""
    inside = {**payload, "requires": pinned(asked, []), "tops": [], "path": "."}
    with LANGUAGE.open_box({**payload["files"], "rorqual_build.py": script}, inside, "bwrap", SET_UP_S) as box:
        env = {**LANGUAGE.environment(box, inside), "SETUPTOOLS_SCM_PRETEND_VERSION": payload["version"] or "0"}
        result = box.run([box.python, "-B", "rorqual_build.py"], env=env)
        if not result.is_ok:
            raise TaskError(result.stderr.strip()[-120:])
        return json.loads(box.download("rorqual_wheel.json"))


def _adopt(payload: dict[str, Any], made: Mapping[str, str]) -> None:
    """Take the wheel's metadata, and modules that the build wrote, into the project's files."""
    prefix = "src/" if payload["path"] == "src" else ""
    for path, text in made.items():
        top = path.split("/")[0]
        is_own = any(root in (prefix + top, prefix + path) for root in payload["sources"])
        if ".dist-info/" in path or (is_own and f"{prefix}{path}" not in payload["files"]):
            payload["files"].setdefault(f"{prefix}{path}", text)
