"""Tasks that are answered by a text: one question, no tools, one scorer over the last message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rorqual.tasks import Task
from rorqual.tasks.episode import Opening
from rorqual.tasks.verdict import Verdict, failed

Score = Callable[[Task, str], Verdict]
"""(task, the final message's text) -> verdict. What keeps the scorer itself from deciding is an invalid verdict."""


class TextEpisode:
    """One attempt at a question. An attempt that ended without a final message fails as `unfinished`."""

    is_over = False

    def __init__(self, task: Task, score: Score):
        self.task, self.score = task, score

    def reset(self) -> Opening:
        return Opening(self.task.messages, self.task.tools)

    def call(self, name: str, arguments: dict[str, Any] | str) -> str:
        return f"there is no tool {name}; answer in text"

    def finish(self, text: str | None = None) -> Verdict:
        return failed("unfinished") if text is None else self.score(self.task, text)

    def close(self) -> None:
        pass


def text_opener(score: Score) -> Callable[[Task], TextEpisode]:
    return lambda task: TextEpisode(task, score)
