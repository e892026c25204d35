"""JavaScript projects: Node's own test runner with its JUnit reporter, dependencies by npm with install scripts off."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from rorqual.tasks.language import TIMEOUT_S, Project, Run, limits_of, read_report
from rorqual.tasks.language_python import cache_of
from rorqual.tasks.task import TaskError, digest

SUFFIXES = (".js", ".mjs", ".cjs")
TEST_FOLDERS = {"test", "tests", "__tests__"}
NO_SOURCES = {"node_modules", "docs", "examples", "benchmark", "benchmarks", "coverage", "dist"}
_TEST_NAME = re.compile(r".*[.\-_](test|spec)\.[cm]?js|test\.[cm]?js")
_CODE = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
SUSPECT = frozenset((
    "process", "child_process", "require", "import", "eval", "Function", "globalThis", "global", "prototype", "__proto__",
    "defineProperty", "setPrototypeOf", "assert", "test", "module", "fs", "vm", "constructor", "Proxy", "Symbol", "valueOf",
    "toString", "toJSON", "Reflect", "cache", "exit", "kill", "abort",
))  # fmt: skip
"""Words that a change may not use more often than the file did before it, unless the gold change does too."""
CANARY = """import test from 'node:test';
import assert from 'node:assert';

test('asserts_{k}', () => {{ assert.ok(false); }});
test('differs_{k}', () => {{ assert.deepStrictEqual([1, 2], [1, 3]); }});
test('raises_{k}', () => {{ throw new Error('yes'); }});
test('holds_{k}', () => {{}});
"""
CANARIES = {"asserts": "failed", "differs": "failed", "raises": "failed", "holds": "passed"}
RUN_EACH = """i=0
for file; do
  node --test --test-reporter=junit --test-reporter-destination="junit-$i.xml" "$file" >/dev/null 2>&1
  i=$((i+1))
done"""
"""A report does not say from which file a test is, so each file has a report of its own."""


@cache
def node_modules(requires: tuple[str, ...]) -> str:
    """A directory node_modules with these packages, name@version; no install script runs. Raises TaskError."""
    target = cache_of("node") / digest(list(requires))
    if not target.exists():
        scratch = Path(tempfile.mkdtemp(dir=target.parent))
        command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(scratch), *requires]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(scratch)
            raise TaskError(f"dependencies {', '.join(requires)}: npm gave none ({done.stderr.strip()[-200:]})")
        scratch.chmod(0o755)
        try:
            scratch.rename(target)
        except OSError:  # another process was first
            shutil.rmtree(scratch)
    return str(target / "node_modules")


class JavaScript:
    """See rorqual.tasks.language.Language."""

    name = "javascript"

    def open_box(self, files: Mapping[str, str], project: Project, backend: str, timeout_s: float | None = TIMEOUT_S) -> Any:
        from rorqual.sandbox import Bind, SandboxError, create

        if shutil.which("node") is None:
            raise TaskError("code: node is not installed (Debian: apt-get install nodejs)")
        requires = tuple(project.get("requires", ()))
        binds = (Bind(node_modules(requires), "/node_modules"),) if requires else ()
        try:
            # Node reserves far more address space than it uses.
            kind, limits = limits_of(backend, timeout_s, address_space_mb=0)
            box = create(kind, limits=limits, binds=binds)
        except SandboxError as error:
            raise TaskError(f"code: {error}") from error
        for path, text in files.items():
            box.upload(path, text)
        return box

    def environment(self, box: Any, project: Project) -> dict[str, str]:
        return {"NODE_OPTIONS": "--max-old-space-size=512"}

    def run(
        self, box: Any, project: Project, tests: Sequence[str], options: Sequence[str] = (), only: Sequence[str] | None = None
    ) -> Run:
        from rorqual.sandbox import SandboxError

        result = box.run(["/bin/sh", "-c", RUN_EACH, "sh", *tests], env=self.environment(box, project))
        if str(result.ended) != "exited":
            return Run(problem=f"the run ended: {result.ended}", output=result.stdout)
        found: dict[str, str] = {}
        for number, file in enumerate(tests):
            try:
                read = read_report(box.download(f"junit-{number}.xml"), file)
            except SandboxError:
                read = "no report"
            if isinstance(read, str):
                return Run(problem=f"{file}: {read}", output=result.stdout)
            found |= read
        return Run(found, output=result.stdout)

    def layout(self, files: Mapping[str, str]) -> dict[str, Any]:
        """Node's own rules: files in a folder `test`, and names that end in .test.js and the like."""
        scripts = [name for name in files if name.endswith(SUFFIXES) and "node_modules" not in PurePosixPath(name).parts]
        tests = sorted(name for name in scripts if _is_test(name))
        sources = sorted(name for name in scripts if not _is_test(name) and PurePosixPath(name).parts[0] not in NO_SOURCES)
        if not tests:
            raise TaskError("no tests")
        if not sources:
            raise TaskError("no sources")
        roots = sorted({PurePosixPath(name).parts[0] for name in sources})
        return {"path": ".", "sources": roots, "tests": tests, "tops": [], "requires": _pinned(files)}

    def is_source(self, path: str, project: Project) -> bool:
        parts = PurePosixPath(path).parts
        if not path.endswith(SUFFIXES) or ".." in parts or _is_test(path) or "node_modules" in parts:
            return False
        return any(path == root or path.startswith(f"{root}/") for root in project["sources"])

    def suspects(self, source: str) -> Counter[str]:
        return Counter(word for word in re.findall(r"[A-Za-z_]\w*", _CODE.sub("", source)) if word in SUSPECT)

    def canary(self, key: str) -> tuple[str, str, dict[str, str]]:
        return f"canary_{key}.test.mjs", CANARY.format(k=key), CANARIES


def _is_test(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return bool(TEST_FOLDERS & set(parts[:-1])) or _TEST_NAME.fullmatch(parts[-1]) is not None


def _pinned(files: Mapping[str, str]) -> list[str]:
    """name@version of the direct dependencies: from the lock file where there is one, else as package.json asks."""
    try:
        package, lock = json.loads(files.get("package.json", "{}")), json.loads(files.get("package-lock.json", "{}"))
    except ValueError as error:
        raise TaskError(f"package.json: {error}") from None
    wanted = {**package.get("dependencies", {}), **package.get("devDependencies", {})}
    locked = {name.removeprefix("node_modules/"): entry.get("version") for name, entry in lock.get("packages", {}).items()}
    return sorted(f"{name}@{locked.get(name) or wish}" for name, wish in wanted.items())


LANGUAGE = JavaScript()
