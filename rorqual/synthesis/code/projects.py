"""Projects and their set-up ladder: fetch, find the packages and the tests, run them three times, map tests to functions.

Each rung that fails says why: no tests, tests that don't run, flaky tests (left out and counted).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from rorqual.tasks import Provenance, TaskError, World, digest
from rorqual.tasks.grading import open_box, run_tests
from rorqual.tasks.retrieval.library import cache_folder

TEXT = (".py", ".toml", ".cfg", ".txt", ".md", ".rst", ".json", ".pyi")
MAX_FILE_BYTES, MAX_FILES = 400_000, 800
RUNS = 3
COVER = '''"""Writes which functions each test calls: {test: [[file, first line], ...]}."""
import json, os, sys

called, found, here = set(), {}, os.getcwd() + os.sep

def note(frame, event, argument):
    if event == "call" and frame.f_code.co_filename.startswith(here):
        called.add((frame.f_code.co_filename[len(here):], frame.f_code.co_firstlineno))

def pytest_runtest_setup(item):
    called.clear()
    sys.setprofile(note)

def pytest_runtest_teardown(item):
    sys.setprofile(None)
    found.setdefault(f"{item.location[0]}::{item.location[2].split('[')[0]}", set()).update(called)

def pytest_sessionfinish(session):
    with open("cover.json", "w") as file:
        json.dump({name: sorted(places) for name, places in found.items()}, file)
'''


@dataclass(frozen=True)
class Project:
    """A project whose tests run: its world, the tests that pass every time, and which functions each calls."""

    world: World
    passing: tuple[str, ...]
    flaky: int
    covers: Mapping[tuple[str, int], tuple[str, ...]]
    """(file, first line) -> test ids."""


def fetch(wish: str) -> dict[str, str]:
    """path -> text of a project's files. Raises TaskError."""
    place = Path(wish)
    if place.is_dir():
        found = {str(p.relative_to(place)): p for p in sorted(place.rglob("*")) if p.is_file() and ".git" not in p.parts}
        return _texts(
            {name: p.read_bytes() for name, p in found.items() if p.suffix in TEXT and p.stat().st_size <= MAX_FILE_BYTES}
        )
    archive = place if place.is_file() else _download(wish)
    try:
        with tarfile.open(archive) as tar:
            members = [
                m for m in tar.getmembers() if m.isfile() and m.size <= MAX_FILE_BYTES and PurePosixPath(m.name).suffix in TEXT
            ]
            return _texts({m.name.partition("/")[2]: tar.extractfile(m).read() for m in members})  # type: ignore[union-attr]
    except (OSError, tarfile.TarError) as error:
        raise TaskError(f"project {wish}: {type(error).__name__}: {error}") from None


def _texts(found: Mapping[str, bytes]) -> dict[str, str]:
    texts = {}
    for name, data in sorted(found.items())[:MAX_FILES]:
        try:
            texts[name] = data.decode("utf-8")
        except UnicodeDecodeError:
            continue
    return texts


def _download(wish: str) -> Path:
    """The source archive of name==version by pip, kept in the cache."""
    name, equals, version = wish.partition("==")
    if not equals or not version:
        raise TaskError(f"project {wish}: no such file; a package is written name==version")
    folder = cache_folder().parent / "sources" / wish
    if not list(folder.glob("*.tar.gz")):
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", name]
        done = subprocess.run([*command, "-d", str(folder), wish], capture_output=True, text=True)
        if not list(folder.glob("*.tar.gz")):
            last = (done.stderr.strip().split("\n") or [""])[-1]
            raise TaskError(f"project {wish}: pip gave no source archive ({last[:200]})")
    return sorted(folder.glob("*.tar.gz"))[0]


def layout(files: Mapping[str, str]) -> dict[str, Any]:
    """Where packages and tests are. Raises TaskError where there is nothing to test."""
    path = "src" if any(name.startswith("src/") for name in files) else "."
    prefix = "src/" if path == "src" else ""
    tests = [n for n in files if PurePosixPath(n).name.startswith("test_") or PurePosixPath(n).name.endswith("_test.py")]
    tests = [n for n in tests if n.endswith(".py")]
    packages = {
        prefix + n.removeprefix(prefix).split("/")[0] for n in files if n.startswith(prefix) and n.endswith("/__init__.py")
    }
    single = {n for n in files if n.startswith(prefix) and n.endswith(".py") and n.count("/") == prefix.count("/")}
    sources = sorted((packages | single) - set(tests) - {"tests", "test", "docs", "examples", "setup.py", "conftest.py"})
    if not tests:
        raise TaskError("no tests")
    if not sources:
        raise TaskError("no packages")
    return {"path": path, "sources": sources, "tests": sorted(tests)}


@cache
def project(wish: str) -> Project:
    """The ladder for one project. Raises TaskError that names the rung."""
    files = fetch(wish)
    payload = {"files": files, "name": wish.partition("==")[0], "version": wish.partition("==")[2], **layout(files)}
    runs = []
    with open_box({**files, "rorqual_cover.py": COVER}) as box:
        for number in range(RUNS):
            options = ["-p", "rorqual_cover"] if number == 0 else []
            path = payload["path"] if number else f"{payload['path']}:{box.directory}"
            found = run_tests(box, path, payload["tests"], options)
            if isinstance(found, str):
                raise TaskError(f"project {wish}: tests do not run: {found[-300:]}")
            runs.append(found)
        cover = json.loads(box.download("cover.json"))
    passing = tuple(name for name in sorted(runs[0]) if all(run.get(name) == "passed" for run in runs))
    flaky = sum(len({run.get(name) for run in runs}) > 1 for name in runs[0])
    if not passing:
        raise TaskError(f"project {wish}: no test passes every time")
    world = World(f"project-{digest(payload)}", "code", payload, digest(files), (payload["name"],),
                  (Provenance(wish, "source archive", digest(files, 64), "the project's own"),))  # fmt: skip
    return Project(world, passing, flaky, _inverted(cover, passing))


def _inverted(cover: Mapping[str, list[list[Any]]], passing: tuple[str, ...]) -> dict[tuple[str, int], tuple[str, ...]]:
    """Function -> the passing tests that call it."""
    by_key: dict[str, list[str]] = {}
    for name in passing:
        file, owner, test = name.split("::")
        key = f"{file}::{test.split('[')[0]}"
        by_key.setdefault(key, []).append(name)
        by_key.setdefault(f"{file}::{owner}.{test.split('[')[0]}", []).append(name)
    found: dict[tuple[str, int], set[str]] = {}
    for key, places in cover.items():
        for file, line in places:
            found.setdefault((file, line), set()).update(by_key.get(key, ()))
    return {place: tuple(sorted(tests)) for place, tests in found.items() if tests}
