"""SWE-bench-style directories: an agent with a shell mends a repository; hidden tests judge it in a fresh sandbox.

A directory holds one folder for each task: `task.json` {id, problem, fail_to_pass, pass_to_pass} with pytest's test ids,
`repository/` as the agent finds it, `tests/` (files laid over it for judging, never shown), and where known `solution/`
(files laid over the repository that solve it).

Judging starts from the pristine repository: the agent's other files come over it, but none that steers tests (conftest.py,
pytest's settings, sitecustomize) and none of the hidden tests' own; then the hidden tests. All of fail_to_pass and pass_to_pass
must pass. Tests see the packages of this interpreter; there is no network.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

from rorqual.errors import UserError
from rorqual.evals.benchmark import Benchmark, Options, Suite, given_suite
from rorqual.evals.source import Defect
from rorqual.sandbox import Limits, Sandbox, SandboxConfig, SandboxError, open_sandbox, site_packages
from rorqual.tasks import Task
from rorqual.tasks.episode import Opening
from rorqual.tasks.task import digest
from rorqual.tasks.verdict import Verdict, failed, invalid, passed

STEERS_TESTS = {"conftest.py", "pytest.ini", "tox.ini", "setup.cfg", "pyproject.toml", "sitecustomize.py", "usercustomize.py"}
TEMPLATE = "The repository in the working directory has this problem. Mend it there; hidden tests will judge.\n\n{question}"
SHELL = {
    "type": "function",
    "function": {
        "name": "bash",
        "description": "Run a command in the repository; gives its exit code and output.",
        "parameters": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
    },
}
ARCHIVE = "tree.tar"
MEMORY_MB = 1024


def files(folder: Path) -> dict[str, bytes]:
    """Relative path -> content of the plain files of a folder; history is left out, since it could hold the solution."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    names = {path: path.relative_to(folder) for path in found}
    return {str(name): path.read_bytes() for path, name in names.items() if not {".git", "__pycache__"} & set(name.parts)}


class RepositoryEpisode:
    """One attempt: a sandbox with the repository, and its shell."""

    is_over = False

    def __init__(self, task: Task, folder: Path, options: Options):
        self.task, self.folder, self.options = task, folder, options
        self._sandbox: Sandbox | None = None

    def reset(self) -> Opening:
        self.close()
        self._sandbox = self._fresh()
        for name, data in files(self.folder / "repository").items():
            self._sandbox.upload(name, data)
        return Opening(self.task.messages, self.task.tools)

    def _fresh(self) -> Sandbox:
        limits = Limits(timeout_s=self.options.timeout_s, memory_mb=MEMORY_MB)
        return open_sandbox(SandboxConfig(self.options.isolation, limits, packages=(site_packages(),)))

    def call(self, name: str, arguments: dict[str, Any] | str) -> str:
        assert self._sandbox is not None
        try:
            given = json.loads(arguments) if isinstance(arguments, str) else arguments
            command = str(given["command"])
        except (ValueError, KeyError, TypeError) as error:
            return f"error: {name} can't be called so ({type(error).__name__}: {error})"
        if name != "bash":
            return f"error: there is no tool {name}"
        result = self._sandbox.run(["bash", "-c", command])
        return f"exit code {result.exit_code} ({result.ended})\n{result.stdout}{result.stderr}"

    def finish(self, text: str | None = None) -> Verdict:
        """The repository as the agent left it, whatever it said."""
        assert self._sandbox is not None
        try:
            changed = self._left()
            with self._fresh() as judge:
                return self._judged(judge, changed)
        except (SandboxError, tarfile.TarError) as error:
            return invalid(f"the repository could not be judged: {error}")

    def _left(self) -> dict[str, bytes]:
        """The plain files of the agent's working directory."""
        assert self._sandbox is not None
        packed = self._sandbox.run(["tar", "-cf", ARCHIVE, "--exclude", ARCHIVE, "--exclude", "__pycache__", "."])
        if not packed.is_ok:
            raise SandboxError(f"the working directory could not be packed: {packed.stderr[:200]}")
        with tarfile.open(fileobj=io.BytesIO(self._sandbox.download(ARCHIVE))) as archive:
            members = [member for member in archive.getmembers() if member.isreg()]
            return {member.name.removeprefix("./"): archive.extractfile(member).read() for member in members}  # type: ignore[union-attr]

    def _judged(self, judge: Sandbox, left: dict[str, bytes]) -> Verdict:
        hidden, pristine = files(self.folder / "tests"), files(self.folder / "repository")
        own = {name: data for name, data in left.items() if Path(name).name not in STEERS_TESTS and not name.startswith(".")}
        kept = {name: data for name, data in pristine.items() if name in left or Path(name).name in STEERS_TESTS}
        for name, data in {**kept, **own, **hidden}.items():
            judge.upload(name, data)
        wanted = [*self.task.payload["fail_to_pass"], *self.task.payload["pass_to_pass"]]
        run = judge.run([judge.python, "-m", "pytest", "-q", "-rA", "--tb=no", "-p", "no:cacheprovider", *wanted])
        good = set(re.findall(r"^PASSED (\S+)", run.stdout, re.MULTILINE))
        missed = [name for name in wanted if name not in good]
        measures = {"tests_passed": len(wanted) - len(missed), "tests": len(wanted)}
        return failed(*missed[:5], measures=measures) if missed else passed(measures)

    def close(self) -> None:
        if self._sandbox is not None:
            self._sandbox.close()
            self._sandbox = None


def load(benchmark: Benchmark, options: Options) -> Suite:
    root = Path(options.data) if options.data else None
    if root is None or not root.is_dir():
        raise UserError(f"{benchmark.name}: --data names a directory with one folder for each task")
    tasks: list[Task] = []
    folders: dict[str, Path] = {}
    defects: list[Defect] = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if options.limit is not None and len(tasks) >= options.limit:
            break
        made = _task(folder, benchmark)
        if isinstance(made, Defect):
            defects.append(made)
        else:
            tasks.append(made)
            folders[made.id] = folder
    suite = given_suite(benchmark.name, tasks, lambda task: RepositoryEpisode(task, folders[task.id], options))
    return Suite(suite.tasks, suite.open_episode, tuple(defects))


def _task(folder: Path, benchmark: Benchmark) -> Task | Defect:
    try:
        value = json.loads((folder / "task.json").read_text(encoding="utf-8"))
        tests = {name: [str(test) for test in value[name]] for name in ("fail_to_pass", "pass_to_pass")}
        identity, problem = str(value["id"]), str(value["problem"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Defect(folder.name, f"task.json: {type(error).__name__}: {error}")
    if not tests["fail_to_pass"] or not (folder / "repository").is_dir() or not (folder / "tests").is_dir():
        return Defect(folder.name, "lacks repository/, tests/ or a test in fail_to_pass")
    texts = {part: {name: data.hex() for name, data in files(folder / part).items()} for part in ("repository", "tests")}
    solution = files(folder / "solution") if (folder / "solution").is_dir() else {}
    payload = {**tests, "content": digest(texts), "gold_calls": [_write(*each) for each in solution.items()]}
    payload |= {"reference": "done", "corrupted": "done"}
    return Task(identity, "repository", benchmark.protocol.messages(problem), (SHELL,), payload=payload)


def _write(name: str, data: bytes) -> list[Any]:
    """The shell command by which the gold program writes a file of the solution."""
    import base64

    return ["bash", {"command": f"base64 -d > '{name}' <<< {base64.b64encode(data).decode()}"}]
