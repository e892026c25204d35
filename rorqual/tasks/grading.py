"""Grades a state of a Python project by its tests: a fresh sandbox, pristine tests, JUnit XML, and canaries that must fail.

The program under test shares a process with the test runner, so a hostile one could try to forge results. Three barriers: only
source files of the project are taken from the agent; a change may not name the machinery that forging needs, unless the gold
change does; and tests that must fail, under names drawn afresh, are run along: where one does not fail, nothing counts.
"""

from __future__ import annotations

import ast
import compileall
import secrets
import shutil
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from rorqual.tasks.task import TaskError
from rorqual.tasks.verdict import Verdict, failed, passed

RUNNER = ("pytest", "pluggy", "iniconfig", "packaging", "pygments")
TIMEOUT_S = 60.0
REPORT = "junit.xml"
NEVER_TAKEN = ("conftest.py", "sitecustomize.py", "usercustomize.py", "pytest.py", "_pytest.py", "unittest.py", "setup.py")
SUSPECT = frozenset((
    "_exit", "_pytest", "__builtins__", "__class__", "__eq__", "__import__", "__ne__", "__subclasses__", "abort",
    "atexit", "builtins", "compile", "ctypes", "eval", "exec", "faulthandler", "fork", "gc", "importlib", "inspect",
    "kill", "modules", "open", "pathlib", "pluggy", "popen", "posix", "pytest", "setprofile", "settrace", "shutil",
    "signal", "socket", "subprocess", "system", "threading", "traceback", "unittest", "weakref", "_getframe", "os",
    "setattr", "globals", "io",
))  # fmt: skip
"""Names that a change may not use more often than the file did before it, unless the gold change does too."""
CANARY = """import unittest

def test_asserts_{k}():
    assert False

def test_differs_{k}():
    assert [1, 2] == [1, 3]

def test_raises_{k}():
    raise ValueError

class Test{k}(unittest.TestCase):
    def test_unit_{k}(self):
        self.assertEqual(1, 2)

def test_holds_{k}():
    pass
"""
CANARIES = {
    "test_asserts": "failed",
    "test_differs": "failed",
    "test_raises": "failed",
    "test_unit": "failed",
    "test_holds": "passed",
}


@cache
def runner_packages() -> str:
    """A directory that holds the test runner and nothing else: no other installed package can leak an answer."""
    from rorqual.tasks.retrieval.library import cache_folder

    name = "-".join(f"{n}{metadata.version(n)}" for n in RUNNER)
    target = cache_folder().parent / "runner" / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent))
        scratch.chmod(0o755)
        for package in RUNNER:
            for file in metadata.files(package) or ():
                if ".." not in file.parts and file.suffix in (".py", ".typed"):
                    place = scratch / file
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(str(file.locate()), place)
            folder = next((f for f in metadata.files(package) or () if f.name == "METADATA"), None)
            if folder:
                (scratch / folder).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(str(folder.locate()), scratch / folder)
        compileall.compile_dir(scratch, quiet=2)  # else each run would compile the runner anew
        try:
            scratch.rename(target)
        except OSError:  # another process was first
            shutil.rmtree(scratch)
    return str(target)


def open_box(files: Mapping[str, str], backend: str = "bwrap") -> Any:
    """A sandbox with the project's files and the test runner."""
    from rorqual.sandbox import Limits, SandboxError, create

    try:
        limits = Limits(timeout_s=TIMEOUT_S, memory_mb=1024, disk_mb=128)
        box = create("bwrap" if backend == "inline" else backend, limits=limits, packages=(runner_packages(),))
    except SandboxError as error:
        raise TaskError(f"code: {error}") from error
    for path, text in files.items():
        box.upload(path, text)
    return box


def run_tests(box: Any, path: str, tests: Sequence[str], options: Sequence[str] = ()) -> dict[str, str] | str:
    """test id -> passed, failed or skipped; or why there are no results. `path`: where the project's packages are."""
    command = [box.python, "-B", "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir=.", "-p", "no:cacheprovider", "--tb=line",
               f"--junit-xml={REPORT}", "-o", "junit_family=xunit1", *options, *tests]  # fmt: skip
    result = box.run(command, env={"PYTHONPATH": f"{box.directory}/{path}:{runner_packages()}", "PYTHONHASHSEED": "0"})
    if str(result.ended) != "exited":
        return f"the run ended: {result.ended}"
    from rorqual.sandbox import SandboxError

    try:
        return read_report(box.download(REPORT))
    except SandboxError:
        return f"no report: {result.stdout[-300:]}"


def read_report(data: bytes) -> dict[str, str] | str:
    """JUnit XML -> test id -> outcome; the reason where it can't be read. Entities are refused."""
    if b"<!ENTITY" in data or b"<!DOCTYPE" in data:
        return "a report with entities"
    try:
        cases = list(ElementTree.fromstring(data).iter("testcase"))
    except ElementTree.ParseError as error:
        return f"not JUnit XML: {error}"
    found: dict[str, str] = {}
    for case in cases:
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        name = f"{case.get('file', '')}::{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        found[name] = "failed" if found.get(name) == "failed" else outcome
    return found


def is_source(path: str, project: Mapping[str, Any]) -> bool:
    """Whether an agent's version of a file is taken: a Python file of the packages, no test, nothing that Python runs itself."""
    parts = PurePosixPath(path).parts
    if not path.endswith(".py") or ".." in parts or parts[-1] in NEVER_TAKEN or parts[-1].startswith("test"):
        return False
    return any(path == root or path.startswith(f"{root}/") for root in project["sources"]) and not {"tests", "test"} & set(parts)


def names_in(source: str) -> Counter[str]:
    """How often each suspect name stands in a program. Raises SyntaxError."""
    found: Counter[str] = Counter()
    for node in ast.walk(ast.parse(source)):
        names = [getattr(node, field, None) for field in ("id", "attr", "arg", "module")]
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.alias):
            names.append(node.name)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 200:
            names.append(node.value)
        for name in names:
            if isinstance(name, str):
                found.update(part for part in name.replace("/", ".").split(".") if part in SUSPECT)
    return found


def suspect_growth(before: Mapping[str, str], after: Mapping[str, str]) -> Counter[str]:
    """The suspect names that a change adds. Raises SyntaxError."""
    grown: Counter[str] = Counter()
    for path, text in after.items():
        if text != before.get(path):
            grown += names_in(text) - names_in(before.get(path, ""))
    return grown


def grade(
    project: Mapping[str, Any], payload: Mapping[str, Any], submitted: Mapping[str, str], isolation: str = "bwrap"
) -> Verdict:
    """The verdict on source files: every fail-to-pass and pass-to-pass test passes, in a fresh sandbox with pristine tests."""
    base = {**project["files"], **payload["changes"]}
    taken = {path: text for path, text in submitted.items() if is_source(path, project)}
    gold = {path: project["files"][path] for path in payload["changes"]}
    try:
        added = suspect_growth(base, taken) - suspect_growth(base, gold)
    except (SyntaxError, ValueError, RecursionError) as error:
        return failed(f"the source does not compile: {type(error).__name__}")
    if added:
        return failed(f"the change names {', '.join(sorted(added))}, which the grader does not admit")
    key = secrets.token_hex(6)
    canary = f"test_canary_{key}.py"
    with open_box({**base, **taken, canary: CANARY.format(k=key)}, isolation) as box:
        wanted = [*payload["fail_to_pass"], *payload["pass_to_pass"]]
        found = run_tests(box, project["path"], [*sorted({name.partition("::")[0] for name in wanted}), canary])
    if isinstance(found, str):
        return failed(found)
    seen = {name.split("::")[-1].removesuffix(f"_{key}"): outcome for name, outcome in found.items() if key in name}
    if seen != CANARIES:
        return failed("tests that must fail did not")
    broken = [name for name in wanted if found.get(name) != "passed"]
    measures = {"passed": float(len(wanted) - len(broken)), "wanted": float(len(wanted))}
    return passed(measures) if not broken else failed(*broken[:5], measures=measures)
