"""The code-interpreter family: a stateful Jupyter kernel as the tool `python(code)`, data files beside it, an answer in text."""

from __future__ import annotations

from typing import Any

from rorqual.tasks.answer import check_answer
from rorqual.tasks.episode import Opening, as_object, error_text
from rorqual.tasks.families import Family
from rorqual.tasks.task import GateResult, Task, TaskError, World
from rorqual.tasks.verdict import Verdict

CELL_TIMEOUT_S = 120.0
MAX_OUTPUT_CHARS = 20_000
PYTHON_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "python",
        "description": "Run Python code in a stateful Jupyter notebook; a cell may take 120.0 seconds. "
        "The user does not see its output.",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "The code to run"}},
            "required": ["code"],
            "additionalProperties": False,
            "$schema": "http://json-schema.org/draft-07/schema#",
        },
    },
}


class Notebook:
    """A kernel with a world's files in its directory. Always in a bubblewrap sandbox: there is no weaker form."""

    def __init__(self, world: World | None):
        from rorqual.sandbox import SandboxError
        from rorqual.sandbox.kernel import Kernel

        try:
            self.kernel = Kernel()
        except SandboxError as error:
            raise TaskError(f"the interpreter: {error}") from error
        self.lay_out(world)

    def lay_out(self, world: World | None) -> None:
        for name, text in (world.payload["files"] if world else {}).items():
            self.kernel.sandbox.upload(name, text)

    def run(self, code: str, timeout_s: float = CELL_TIMEOUT_S) -> str:
        """What an agent sees of a cell: output, the last value, the error."""
        from rorqual.sandbox.kernel import CellEnded

        cell = self.kernel.run(code, timeout_s)
        text = "\n".join(part for part in (cell.output.rstrip("\n"), cell.value, cell.error) if part)
        if cell.ended not in (CellEnded.DONE, CellEnded.ERROR):
            text += f"\n[the cell ended: {cell.ended}]"
        return text[:MAX_OUTPUT_CHARS] + ("\n[cut]" if len(text) > MAX_OUTPUT_CHARS else "")

    def close(self) -> None:
        self.kernel.close()


class InterpreterEpisode:
    """One attempt. The kernel starts with the first cell, and each reset begins with a fresh one."""

    def __init__(self, task: Task, world: World | None, isolation: str):
        self.task, self.world, self.isolation = task, world, isolation
        self._notebook: Notebook | None = None
        self.calls = 0

    @property
    def is_over(self) -> bool:
        return self.calls >= self.task.max_calls

    def reset(self) -> Opening:
        self.close()
        self.calls = 0
        return Opening(self.task.messages, self.task.tools)

    def call(self, name: str, arguments: dict[str, Any] | str) -> str:
        if self.is_over:
            return error_text("over", "the task has ended; no further call counts")
        self.calls += 1
        given = as_object(arguments)
        if name != "python":
            return error_text("unknown_tool", f"there is no tool {name}")
        if given is None or set(given) != {"code"} or not isinstance(given["code"], str):
            return error_text("invalid_arguments", "expected one argument, code, a string")
        if self._notebook is None:
            self._notebook = Notebook(self.world)
        return self._notebook.run(given["code"])

    def finish(self, text: str | None = None) -> Verdict:
        return check_answer(self.task.payload["check"], text, self.isolation)

    def close(self) -> None:
        if self._notebook is not None:
            self._notebook.close()
            self._notebook = None


def open_interpreter(task: Task, world: World | None, isolation: str) -> InterpreterEpisode:
    if task.world and world is None:
        raise TaskError(f"task {task.id}: its world {task.world} is missing from the store")
    return InterpreterEpisode(task, world, isolation)


def validate_interpreter(task: Task, world: World | None, isolation: str) -> list[GateResult]:
    """Silence fails; the stored program, run in the notebook, prints an answer that passes."""
    episode = open_interpreter(task, world, isolation)
    try:
        episode.reset()
        idle = episode.finish(None)
        printed = episode.call("python", {"code": task.payload["program"]})
        verdict = episode.finish(printed)
        return [
            GateResult("silence_fails", idle.is_valid and not idle.passed),
            GateResult("program_passes", verdict.passed, "; ".join(verdict.reasons) or printed[-200:] * (not verdict.passed)),
        ]
    finally:
        episode.close()


FAMILY = Family("interpreter", open_interpreter, validate_interpreter)
