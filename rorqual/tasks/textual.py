"""Families whose tasks are a prompt and a text: maths, logic, programming, writing. No world and no tools."""

from __future__ import annotations

from typing import Any

from rorqual.tasks.answer import check_answer
from rorqual.tasks.episode import Opening, error_text
from rorqual.tasks.families import Family
from rorqual.tasks.task import GateResult, Task, World
from rorqual.tasks.verdict import Verdict


class TextEpisode:
    """One reply, judged by the task's check."""

    def __init__(self, task: Task, isolation: str):
        self.task, self.isolation = task, isolation
        self.is_over = False

    def reset(self) -> Opening:
        return Opening(self.task.messages, self.task.tools)

    def call(self, name: str, arguments: dict[str, Any] | str) -> str:
        return error_text("unknown_tool", f"there is no tool {name}")

    def finish(self, text: str | None = None) -> Verdict:
        return check_answer(self.task.payload["check"], text, self.isolation)

    def close(self) -> None:
        pass


def open_text(task: Task, world: World | None, isolation: str) -> TextEpisode:
    return TextEpisode(task, isolation)


def validate_text(task: Task, world: World | None, isolation: str) -> list[GateResult]:
    """Silence fails and the stored gold reply passes, twice."""
    check = task.payload["check"]
    silent = check_answer(check, "", isolation)
    gold = [check_answer(check, task.payload["gold"], isolation) for _ in range(2)]
    return [
        GateResult("silence_fails", silent.is_valid and not silent.passed),
        GateResult("gold_passes", all(verdict.passed for verdict in gold), "; ".join(gold[0].reasons)),
    ]


MATHS = Family("maths", open_text, validate_text)
LOGIC = Family("logic", open_text, validate_text)
PROGRAMMING = Family("programming", open_text, validate_text)
WRITING = Family("writing", open_text, validate_text)
