"""The code family: a repository with a fault and a shell over it; the agent's last state is graded elsewhere."""

from __future__ import annotations

from typing import Any

from rorqual.tasks.episode import Opening, as_object, error_text
from rorqual.tasks.families import Family
from rorqual.tasks.grading import changed, gold_of, grade, open_box
from rorqual.tasks.language import language_of
from rorqual.tasks.task import GateResult, Task, TaskError, World
from rorqual.tasks.verdict import Verdict, failed

MAX_OUTPUT = 20_000
MAX_FILES = 2000
BASH_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "bash",
        "description": "Run a command in the repository's directory. There is no network; a command may take 60 seconds.",
        "parameters": {
            "type": "object",
            "properties": {"command": {"type": "string"}},
            "required": ["command"],
            "additionalProperties": False,
        },
    },
}


class CodeEpisode:
    """One attempt. The box holds the faulty state alone: no history, no other version, no network."""

    def __init__(self, task: Task, world: World, isolation: str):
        self.task, self.project, self.isolation = task, world.payload, isolation
        self._box, self.calls = None, 0

    @property
    def is_over(self) -> bool:
        return self.calls >= self.task.max_calls

    def reset(self) -> Opening:
        self.close()
        files = changed(self.project["files"], self.task.payload["changes"])
        self._box, self.calls = open_box(files, self.project, self.isolation), 0
        return Opening(self.task.messages, self.task.tools)

    def call(self, name: str, arguments: dict[str, Any] | str) -> str:
        if self.is_over or self._box is None:
            return error_text("over", "the task has ended; no further call counts")
        self.calls += 1
        given = as_object(arguments)
        if name != "bash":
            return error_text("unknown_tool", f"there is no tool {name}")
        if given is None or set(given) != {"command"} or not isinstance(given["command"], str):
            return error_text("invalid_arguments", "expected one argument, command, a string")
        env = language_of(self.project).environment(self._box, self.project)
        result = self._box.run(["/bin/sh", "-c", given["command"]], env=env)
        text = (result.stdout + result.stderr)[:MAX_OUTPUT]
        return f"{text}\n[exit {result.exit_code}{'' if str(result.ended) == 'exited' else f', {result.ended}'}]"

    def submitted(self) -> dict[str, str | None]:
        """The source files as the agent left them, None where there is none; links and odd files are not followed."""
        from rorqual.sandbox import SandboxError

        assert self._box is not None
        speaks = language_of(self.project)
        listed = self._box.run(["/usr/bin/find", ".", "-type", "f"]).stdout.split("\n")
        paths = sorted({line.removeprefix("./") for line in listed if line} | set(self.task.payload["changes"]))
        taken: dict[str, str | None] = {}
        for path in [p for p in paths if speaks.is_source(p, self.project)][:MAX_FILES]:
            try:
                taken[path] = self._box.download(path, 1 << 20).decode("utf-8")
            except UnicodeDecodeError:
                taken[path] = ""
            except SandboxError:
                taken[path] = None
        return taken

    def finish(self, text: str | None = None) -> Verdict:
        if self._box is None:
            return failed("nothing was begun")
        return grade(self.project, self.task.payload, self.submitted(), self.isolation)

    def close(self) -> None:
        if self._box is not None:
            self._box.close()
            self._box = None


def open_code(task: Task, world: World | None, isolation: str) -> CodeEpisode:
    if world is None:
        raise TaskError(f"task {task.id}: its world {task.world} is missing from the store")
    return CodeEpisode(task, world, isolation)


def validate_code(task: Task, world: World | None, isolation: str) -> list[GateResult]:
    """The state as given fails; the gold change passes."""
    if world is None:
        raise TaskError(f"task {task.id}: its world {task.world} is missing from the store")
    gold = gold_of(world.payload, task.payload)
    idle, fixed = grade(world.payload, task.payload, {}, isolation), grade(world.payload, task.payload, gold, isolation)
    return [
        GateResult("initial_fails", idle.is_valid and not idle.passed, "; ".join(idle.reasons)),
        GateResult("gold_passes", fixed.passed, "; ".join(fixed.reasons)),
    ]


FAMILY = Family("code", open_code, validate_code)
