"""An episode: one attempt at a task, as a rollout plays it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from rorqual.tasks.session import ToolCall, WorldSession, as_answer
from rorqual.tasks.task import Task, World
from rorqual.tasks.verdict import Verdict, failed

SUBMIT = "submit"
"""The tool by which an agent hands in its answer, where a task has it; else the last message's text is the answer."""
SUBMIT_TOOL = {
    "type": "function",
    "function": {
        "name": SUBMIT,
        "description": "Hand in the final answer and end the task.",
        "parameters": {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]},
    },
}


@dataclass(frozen=True)
class Opening:
    """What an agent sees first. Both OpenAI-shaped."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...]


class Episode(Protocol):
    """One attempt. `reset` may be called again for another attempt from the same initial state, byte for byte.

    Failures of tools are observations, failures of verifiers are invalid verdicts: nothing here raises for what a policy does.
    """

    task: Task

    @property
    def is_over(self) -> bool:
        """The answer was handed in, or the calls are used up: no further call will do anything."""
        ...

    def reset(self) -> Opening: ...

    def call(self, name: str, arguments: dict[str, Any] | str) -> str:
        """The observation, as text for the agent. Arguments: an object, or the JSON text of one."""
        ...

    def finish(self, text: str | None = None) -> Verdict:
        """Judge the attempt. `text`: the agent's last message, which is the answer where none was handed in."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class Dialogue(Protocol):
    """What an episode has beside the rest where its user goes on after a message without calls."""

    def follow_up(self, text: str) -> str | None:
        """The user's next message; None where the user has nothing more to say, and the attempt has ended."""
        ...


class AsyncEpisode:
    """An episode for an event loop: each operation runs in a worker thread, one at a time."""

    def __init__(self, episode: Episode):
        self.episode = episode
        self._lock = asyncio.Lock()

    @property
    def task(self) -> Task:
        return self.episode.task

    @property
    def is_over(self) -> bool:
        return self.episode.is_over

    async def reset(self) -> Opening:
        return await self._run(self.episode.reset)

    async def call(self, name: str, arguments: dict[str, Any] | str) -> str:
        return await self._run(self.episode.call, name, arguments)

    async def finish(self, text: str | None = None) -> Verdict:
        return await self._run(self.episode.finish, text)

    async def follow_up(self, text: str) -> str | None:
        return await self._run(self.episode.follow_up, text) if isinstance(self.episode, Dialogue) else None

    async def close(self) -> None:
        await self._run(self.episode.close)

    async def _run(self, function: Any, *arguments: Any) -> Any:
        async with self._lock:
            return await asyncio.to_thread(function, *arguments)


class WorldEpisode:
    """An episode in a world of tables. A session that is passed in is shared, and stays open."""

    def __init__(self, task: Task, world: World, isolation: str = "bwrap", session: WorldSession | None = None):
        self.task = task
        self._owns_session = session is None
        self.session = session or WorldSession(world, isolation)
        self.calls: list[ToolCall] = []
        self._answer: str | None = None
        self._is_submitted = False
        self._names = {tool["function"]["name"] for tool in task.tools}

    @property
    def is_over(self) -> bool:
        return self._is_submitted or len(self.calls) >= self.task.max_calls

    def reset(self) -> Opening:
        self.session.prepare(self.task)
        self.session.reset()
        self.calls, self._answer, self._is_submitted = [], None, False
        return Opening(self.task.messages, self.task.tools)

    def call(self, name: str, arguments: dict[str, Any] | str) -> str:
        if self.is_over:
            return error_text("over", "the task has ended; no further call counts")
        made = self._call(name, as_object(arguments))
        self.calls.append(made)
        return made.observation

    def _call(self, name: str, arguments: dict[str, Any] | None) -> ToolCall:
        if name not in self._names:
            return ToolCall(name, arguments or {}, error_text("unknown_tool", f"there is no tool {name}"))
        if arguments is None:
            return ToolCall(name, {}, error_text("invalid_arguments", "arguments must be a JSON object"))
        if name != SUBMIT:
            return self.session.call(name, arguments)
        self._answer, self._is_submitted = as_answer(arguments.get("answer")), True
        return ToolCall(name, arguments, '{"submitted": true}')

    def finish(self, text: str | None = None) -> Verdict:
        from rorqual.tasks.box import BoxError

        answer = self._answer if self._is_submitted else (text.strip() if text else None)
        try:
            delta = self.session.delta()
        except BoxError as error:
            return failed(f"world: {error.reason}")
        measures = {"calls": float(len(self.calls)), "errors": float(sum(call.is_error for call in self.calls))}
        verdict = self.session.verify(self.task, delta, answer)
        return Verdict(verdict.outcome, verdict.score, verdict.reasons, measures)

    def close(self) -> None:
        if self._owns_session:
            self.session.close()


def as_object(arguments: dict[str, Any] | str) -> dict[str, Any] | None:
    """The arguments of a call as an object; None where the text is no JSON object."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError:
            return None
    return arguments if isinstance(arguments, dict) else None


def error_text(code: str, message: str) -> str:
    return json.dumps({"error": code, "message": message}, ensure_ascii=False)
