"""The search family: one agent, a corpus behind search, open and find, a notebook, and a question with one short answer."""

from __future__ import annotations

from typing import Any

from rorqual.tasks.answer import check_answer
from rorqual.tasks.episode import Opening, as_object, error_text
from rorqual.tasks.families import Family
from rorqual.tasks.interpreter import PYTHON_TOOL, Notebook
from rorqual.tasks.retrieval import BROWSER_TOOLS, Browser, library
from rorqual.tasks.task import GateResult, Task, TaskError, World
from rorqual.tasks.verdict import Verdict

SEARCH_TOOLS: tuple[dict[str, Any], ...] = (*BROWSER_TOOLS, PYTHON_TOOL)
"""In the order of the published example."""


class SearchEpisode:
    """One attempt; each reset begins with an empty history of pages and, where it is used, a fresh notebook."""

    def __init__(self, task: Task, world: World, isolation: str):
        payload = world.payload
        self.task, self.isolation = task, isolation
        self._retriever = library(payload["corpus"], payload["backend"], payload["digest"])
        self._browser, self._notebook, self.calls = Browser(self._retriever), None, 0

    @property
    def is_over(self) -> bool:
        return self.calls >= self.task.max_calls

    def reset(self) -> Opening:
        self.close()
        self._browser, self.calls = Browser(self._retriever), 0
        return Opening(self.task.messages, self.task.tools)

    def call(self, name: str, arguments: dict[str, Any] | str) -> str:
        if self.is_over:
            return error_text("over", "the task has ended; no further call counts")
        self.calls += 1
        given = as_object(arguments)
        if given is None:
            return error_text("invalid_arguments", "arguments must be a JSON object")
        if name != "python":
            return self._browser.observe(name, given)
        if set(given) != {"code"} or not isinstance(given["code"], str):
            return error_text("invalid_arguments", "expected one argument, code, a string")
        self._notebook = self._notebook or Notebook(None)
        return self._notebook.run(given["code"])

    def finish(self, text: str | None = None) -> Verdict:
        return check_answer(self.task.payload["check"], text, self.isolation)

    def close(self) -> None:
        if self._notebook is not None:
            self._notebook.close()
            self._notebook = None


def open_search(task: Task, world: World | None, isolation: str) -> SearchEpisode:
    if world is None:
        raise TaskError(f"task {task.id}: its world {task.world} is missing from the store")
    return SearchEpisode(task, world, isolation)


def validate_search(task: Task, world: World | None, isolation: str) -> list[GateResult]:
    """Silence fails, the gold answer passes, and each piece of evidence stands where the task says."""
    episode = open_search(task, world, isolation)
    lost = []
    for piece in task.payload["evidence"]:
        episode.reset()
        page = episode.call("open", {"id": piece["url"], "view_source": True, "loc": piece["line"], "num_lines": 1})
        if piece["text"] not in page:
            lost.append(piece["url"])
    if task.payload["check"]["kind"] == "rubric":  # a judge scores it: there is no gold answer
        return [GateResult("silence_fails", not episode.finish(None).passed)]
    return [
        GateResult("silence_fails", not episode.finish(None).passed),
        GateResult("gold_passes", episode.finish(f"Answer: {task.payload['check']['value']}").passed),
        GateResult("evidence_stands", not lost, ", ".join(lost)),
    ]


FAMILY = Family("search", open_search, validate_search)
