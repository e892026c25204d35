"""Python projects: pytest from a directory of its own, the interpreter's other packages hidden, dependencies as wheels."""

from __future__ import annotations

import ast
import compileall
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from rorqual.tasks.language import REPORT, TIMEOUT_S, Project, Run, limits_of, read_report
from rorqual.tasks.task import TaskError, digest

RUNNER = ("pytest", "pluggy", "iniconfig", "packaging", "pygments")
NEVER_TAKEN = ("conftest.py", "sitecustomize.py", "usercustomize.py", "pytest.py", "_pytest.py", "unittest.py", "setup.py")
NO_SOURCES = {
    "tests",
    "test",
    "testing",
    "docs",
    "doc",
    "examples",
    "benchmarks",
    "setup.py",
    "conftest.py",
    "tasks.py",
    "noxfile.py",
}
SUSPECT = frozenset((
    "_exit", "_pytest", "__builtins__", "__class__", "__eq__", "__import__", "__ne__", "__subclasses__", "abort",
    "atexit", "builtins", "compile", "ctypes", "eval", "exec", "faulthandler", "fork", "gc", "importlib", "inspect",
    "kill", "modules", "open", "pathlib", "pluggy", "popen", "posix", "pytest", "setprofile", "settrace", "shutil",
    "signal", "socket", "subprocess", "system", "threading", "traceback", "unittest", "weakref", "_getframe", "os",
    "setattr", "globals", "io",
))  # fmt: skip
"""Names that a change may not use more often than the file did before it, unless the gold change does too."""
CHOOSE = '''"""Keeps only chosen tests, by the names that JUnit XML gives them, and those of files that no chosen one is in."""
from _pytest.junitxml import mangle_test_address

chosen = set(CHOSEN)
files = {name.partition("::")[0] for name in chosen}

def is_wanted(item):
    *owner, name = mangle_test_address(item.nodeid)
    file = item.nodeid.partition("::")[0]
    return file not in files or f"{file}::{'.'.join(owner).rpartition('.')[2]}::{name}" in chosen

def pytest_collection_modifyitems(items):
    items[:] = [item for item in items if is_wanted(item)]
'''
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
CANARIES = {"test_asserts": "failed", "test_differs": "failed", "test_raises": "failed", "test_unit": "failed",
            "test_holds": "passed"}  # fmt: skip
VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"


def cache_of(kind: str) -> Path:
    """A directory of the user's cache."""
    from rorqual.tasks.retrieval.library import cache_folder

    folder = cache_folder().parent / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _placed(scratch: Path, target: Path) -> str:
    """Rename into place; where another process was first, its directory stands."""
    compileall.compile_dir(scratch, quiet=2)  # else each run would compile it anew
    try:
        scratch.rename(target)
    except OSError:
        shutil.rmtree(scratch)
    return str(target)


@cache
def runner_packages() -> str:
    """A directory that holds the test runner and nothing else: no other installed package can leak an answer."""
    target = cache_of("runner") / "-".join([VERSION, *(f"{n}{metadata.version(n)}" for n in RUNNER)])
    if target.exists():
        return str(target)
    scratch = Path(tempfile.mkdtemp(dir=target.parent))
    scratch.chmod(0o755)
    for package in RUNNER:
        for file in metadata.files(package) or ():
            if ".." not in file.parts and (file.suffix in (".py", ".typed") or file.name == "METADATA"):
                place = scratch / file
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(str(file.locate()), place)
    return _placed(scratch, target)


@cache
def dependency_packages(requires: tuple[str, ...], without: tuple[str, ...] = ()) -> str:
    """A directory with these requirements from wheels alone: installing a wheel runs none of its code.

    without: top-level names that are taken out, since they are the project's own. Raises TaskError.
    """
    target = cache_of("dependencies") / digest([VERSION, list(requires), list(without)])
    if target.exists():
        return str(target)
    scratch = Path(tempfile.mkdtemp(dir=target.parent))
    command = [sys.executable, "-m", "pip", "install", "-q", "--only-binary", ":all:", "--target", str(scratch), *requires]
    done = subprocess.run([*command, "--no-compile", "--disable-pip-version-check"], capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(scratch)
        last = (done.stderr.strip().split("\n") or [""])[-1]
        raise TaskError(f"dependencies {', '.join(requires)}: pip gave no wheels ({last[:200]})")
    for place in list(scratch.iterdir()):
        plain = re.split(r"[-.]", place.name)[0].lower().replace("-", "_")
        if plain in {*without, *RUNNER, "_pytest"}:
            shutil.rmtree(place) if place.is_dir() else place.unlink()
    for place in (scratch / "bin").glob("*"):  # scripts name this machine's interpreter; programs, as ninja, stay
        if place.is_file() and place.read_bytes()[:2] == b"#!":
            place.unlink()
    scratch.chmod(0o755)
    return _placed(scratch, target)


def _masks() -> tuple[Any, ...]:
    """An empty directory over each place where this machine keeps installed packages: one of them may be the answer."""
    from rorqual.sandbox import Bind
    from rorqual.sandbox.view import PYTHON_HOME, interpreter

    places = [f"/usr/lib/python3/{name}" for name in ("dist-packages", "site-packages")]
    places += [f"/usr/{part}lib/{VERSION}/{name}" for part in ("", "local/") for name in ("dist-packages", "site-packages")]
    shown = [place for place in places if os.path.isdir(place)]
    source = interpreter().source
    if source and os.path.isdir(f"{source}/lib/{VERSION}/site-packages"):
        shown.append(f"{PYTHON_HOME}/lib/{VERSION}/site-packages")
    empty = cache_of("empty")
    empty.chmod(0o755)
    return tuple(Bind(str(empty), place) for place in shown)


def package_paths(box: Any) -> list[str]:
    """The directories of packages as programs inside see them."""
    from rorqual.sandbox.view import PACKAGES

    return [f"{PACKAGES}/{i}" if box.config.backend == "bwrap" else path for i, path in enumerate(box.config.packages)]


class Python:
    """See rorqual.tasks.language.Language."""

    name = "python"

    def open_box(self, files: Mapping[str, str], project: Project, backend: str, timeout_s: float | None = TIMEOUT_S) -> Any:
        from rorqual.sandbox import SandboxError, create

        packages = [runner_packages()]
        if requires := tuple(project.get("requires", ())):
            packages.append(dependency_packages(requires, tuple(project.get("tops", ()))))
        try:
            kind, limits = limits_of(backend, timeout_s)
            box = create(kind, limits=limits, packages=tuple(packages), binds=_masks() if kind == "bwrap" else ())
        except SandboxError as error:
            raise TaskError(f"code: {error}") from error
        for path, text in files.items():
            box.upload(path, text)
        return box

    def environment(self, box: Any, project: Project) -> dict[str, str]:
        paths = [str(PurePosixPath(box.directory) / part) for part in project.get("path", ".").split(":")] + package_paths(box)
        return {"PYTHONPATH": ":".join(paths), "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}

    def command(self, project: Project) -> list[str]:
        """pytest's arguments without its report: those that decide how tests are found and named."""
        return ["-q", "-c", "/dev/null", "--rootdir=.", "-p", "no:cacheprovider", "--tb=line", *project.get("options", ())]

    def run(
        self, box: Any, project: Project, tests: Sequence[str], options: Sequence[str] = (), only: Sequence[str] | None = None
    ) -> Run:
        from rorqual.sandbox import SandboxError

        if only is not None:  # a name drawn afresh: the project can't hold a module of this name
            chooser = f"rorqual_chosen_{secrets.token_hex(6)}"
            box.upload(f"{chooser}.py", CHOOSE.replace("CHOSEN", repr(sorted(only))))
            project = {**project, "path": f"{project.get('path', '.')}:{box.directory}"}
            options = ["-p", chooser, *options]
        report = [f"--junit-xml={REPORT}", "-o", "junit_family=xunit1"]
        result = box.run([box.python, "-B", "-m", "pytest", *self.command(project), *report, *options, *tests],
                         env=self.environment(box, project))  # fmt: skip
        if str(result.ended) != "exited":
            return Run(problem=f"the run ended: {result.ended}", output=result.stdout[-20000:])
        try:
            found = read_report(box.download(REPORT), files=tests)
        except SandboxError:
            return Run(problem=f"no report: {(result.stdout + result.stderr)[-300:]}", output=result.stdout[-20000:])
        if isinstance(found, str):
            return Run(problem=found, output=result.stdout[-20000:])
        return Run(found, output=result.stdout[-20000:])

    def layout(self, files: Mapping[str, str]) -> dict[str, Any]:
        path = "src" if any(name.startswith("src/") and name.endswith(".py") for name in files) else "."
        prefix = "src/" if path == "src" else ""
        tests = sorted(n for n in files if re.fullmatch(r"test_.*\.py|.*_test\.py|tests?\.py", PurePosixPath(n).name))
        packages = {
            prefix + n.removeprefix(prefix).split("/")[0] for n in files if n.startswith(prefix) and n.endswith("/__init__.py")
        }
        single = {n for n in files if n.startswith(prefix) and n.endswith(".py") and n.count("/") == prefix.count("/")}
        found = sorted(p for p in (packages | single) - set(tests) if p.removeprefix(prefix) not in NO_SOURCES)
        if not tests:
            raise TaskError("no tests")
        if not found:
            raise TaskError("no packages")
        tops = sorted({p.removeprefix(prefix).removesuffix(".py").lower() for p in found})
        return {"path": path, "sources": found, "tests": tests, "tops": tops}

    def is_source(self, path: str, project: Project) -> bool:
        parts = PurePosixPath(path).parts
        if not path.endswith(".py") or ".." in parts or parts[-1] in NEVER_TAKEN or parts[-1].startswith("test"):
            return False
        if {"tests", "test"} & set(parts):
            return False
        return any(path == root or path.startswith(f"{root}/") for root in project["sources"])

    def suspects(self, source: str) -> Counter[str]:
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

    def canary(self, key: str) -> tuple[str, str, dict[str, str]]:
        return f"test_canary_{key}.py", CANARY.format(k=key), CANARIES


LANGUAGE = Python()
