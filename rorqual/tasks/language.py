"""What grading must know of a programming language, and which languages there are.

To add one: write a module with a `Language` named LANGUAGE, and name it in LANGUAGES. Nothing else of the code family asks which
language a project is in.
"""

from __future__ import annotations

import importlib
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rorqual.tasks.task import TaskError

Project = Mapping[str, Any]
"""A world's payload: files, path, sources, tests, language, options, requires."""
TIMEOUT_S, WAIT = 60.0, 4
"""How long a project's tests may compute; and the multiple of it that they may take, since other work makes them wait."""
REPORT = "junit.xml"


@dataclass(frozen=True)
class Run:
    """One run of tests: test id -> passed, failed or skipped; or the problem why there are no results."""

    results: dict[str, str] = field(default_factory=dict)
    problem: str = ""
    output: str = ""
    """What the runner printed."""


class Language(Protocol):
    """How projects of one language are laid out, confined, tested and guarded."""

    name: str

    def open_box(self, files: Mapping[str, str], project: Project, backend: str, timeout_s: float | None = TIMEOUT_S) -> Any:
        """A sandbox with the files, the test runner and the project's dependencies: no network, nothing else installed."""
        ...

    def environment(self, box: Any, project: Project) -> dict[str, str]:
        """The variables under which the project's programs run."""
        ...

    def run(
        self, box: Any, project: Project, tests: Sequence[str], options: Sequence[str] = (), only: Sequence[str] | None = None
    ) -> Run:
        """Run test files; results come from JUnit XML.

        only: these test ids, and every test of a file that none of them names; a language that can't choose runs all.
        """
        ...

    def layout(self, files: Mapping[str, str]) -> dict[str, Any]:
        """path, sources and tests of a project. Raises TaskError where there is nothing to test."""
        ...

    def is_source(self, path: str, project: Project) -> bool:
        """Whether an agent's version of a file is taken: part of the program, no test, nothing that the runner obeys."""
        ...

    def suspects(self, source: str) -> Counter[str]:
        """How often a program names what forging results needs. Raises SyntaxError or ValueError."""
        ...

    def canary(self, key: str) -> tuple[str, str, dict[str, str]]:
        """(path, text, the outcome by name) of a test file most of whose tests must fail; its names end in `_key`."""
        ...


LANGUAGES: dict[str, str] = {
    "python": "rorqual.tasks.language_python:LANGUAGE",
    "javascript": "rorqual.tasks.language_javascript:LANGUAGE",
}
"""name -> "module:attribute". The paper's others (Java, TypeScript, C, C++, Go, PHP) have no entry yet."""


def language(name: str) -> Language:
    """A language by name. Raises TaskError where there is none."""
    if name not in LANGUAGES:
        raise TaskError(f"there is no language {name!r}; there are {', '.join(sorted(LANGUAGES))}")
    module, _, attribute = LANGUAGES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def language_of(project: Project) -> Language:
    return language(project.get("language", "python"))


def language_of_files(files: Mapping[str, str]) -> str:
    """By what stands at the root of a project."""
    return "javascript" if "package.json" in files and "pyproject.toml" not in files and "setup.py" not in files else "python"


def read_report(data: bytes, file: str = "", files: Sequence[str] = ()) -> dict[str, str] | str:
    """JUnit XML -> test id (file::class or suites::name) -> outcome; the reason where it can't be read. Entities are refused.

    file: the one that was run, where the report names none. files: those that were run; a test that a class inherits is of the
    file that was run, not of the one that defines it.
    """
    dotted = {path.removesuffix(".py").replace("/", "."): path for path in files}
    if b"<!ENTITY" in data or b"<!DOCTYPE" in data:
        return "a report with entities"
    try:
        root = ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        return f"not JUnit XML: {error}"
    found: dict[str, str] = {}
    for suites, case in _cases(root, ()):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        owner = " > ".join(suites) if file else case.get("classname", "").rpartition(".")[2]
        place = _place(case.get("classname", ""), dotted) or case.get("file", file)
        name = f"{place}::{owner}::{case.get('name')}"
        found[name] = "failed" if found.get(name) == "failed" else outcome
    return found


def _place(name: str, dotted: Mapping[str, str]) -> str:
    """The file whose module a class's dotted name begins with."""
    while name and name not in dotted:
        name = name.rpartition(".")[0]
    return dotted.get(name, "")


def _cases(node: Any, suites: tuple[str, ...]) -> list[tuple[tuple[str, ...], Any]]:
    """Each test case with the names of the suites around it."""
    found = []
    for child in node:
        if child.tag == "testcase":
            found.append((suites, child))
        elif child.tag in ("testsuite", "testsuites"):
            found += _cases(child, (*suites, child.get("name") or "") if child.tag == "testsuite" else suites)
    return found


def limits_of(backend: str, timeout_s: float | None, **more: Any) -> tuple[str, Any]:
    """(back end, its limits) for a project's tests. An agent's or a project's code never runs outside a sandbox."""
    from rorqual.sandbox import Limits

    wait_s = None if timeout_s is None else WAIT * timeout_s
    limits = Limits(timeout_s=wait_s, cpu_s=timeout_s, memory_mb=1024, disk_mb=192, **more)
    return ("bwrap" if backend == "inline" else backend), limits
