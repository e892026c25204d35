"""A conversation of the studio, without its looks: messages, the tools that carry out calls, and what comes as it comes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from rorqual.chat import Delta
from rorqual.policy import Completion, Message
from rorqual.serve import chat_api
from rorqual.serve.backend import Backend
from rorqual.serve.requests import ChatRequest
from rorqual.tasks.episode import AsyncEpisode


@dataclass(frozen=True)
class Settings:
    """How the next answer is sampled."""

    thinking: bool = True
    temperature: float = 1.0
    max_tokens: int = 512
    """Of one message; fewer where the context is nearly full."""
    max_rounds: int = 8
    """Rounds of calls within one answer."""


@dataclass(frozen=True)
class Result:
    """What a call gave, as the model sees it."""

    name: str
    content: str


@dataclass(frozen=True)
class Said:
    """The end of one message of the model. More follow where it made calls."""

    message: Message
    finish_reason: str
    completion: Completion | None
    usage: dict[str, Any]


class Workbench(Protocol):
    """What carries out a conversation's calls."""

    definitions: list[dict[str, Any]]

    async def call(self, name: str, arguments: str) -> str: ...
    async def close(self) -> None: ...


class NoTools:
    """A conversation in words alone."""

    definitions: list[dict[str, Any]] = []  # noqa: RUF012 - never written

    async def call(self, name: str, arguments: str) -> str:
        return f"error: there is no tool {name}"

    async def close(self) -> None:
        pass


class PythonTool:
    """A stateful notebook in the sandbox."""

    def __init__(self) -> None:
        from rorqual.serve.terminal import python_tool

        self._tool = python_tool()
        self.definitions = [self._tool.definition]

    async def call(self, name: str, arguments: str) -> str:
        if name != self._tool.name:
            return f"error: there is no tool {name}"
        try:
            given = json.loads(arguments or "{}")
        except json.JSONDecodeError as error:
            return f"error: the arguments are no JSON: {error}"
        return await asyncio.to_thread(self._tool.call, given)

    async def close(self) -> None:
        await asyncio.to_thread(self._tool.close)


class EnvironmentTools:
    """The tools of an environment that someone else opened and closes."""

    def __init__(self, episode: AsyncEpisode):
        self._episode, self.definitions = episode, list(episode.task.tools)

    async def call(self, name: str, arguments: str) -> str:
        return await self._episode.call(name, arguments)

    async def close(self) -> None:
        pass


@dataclass
class Conversation:
    """One user's chat with a backend."""

    backend: Backend
    defaults: chat_api.Defaults
    workbench: Workbench = field(default_factory=NoTools)
    messages: list[Message] = field(default_factory=list)

    async def answer(self, text: str, settings: Settings) -> AsyncGenerator[Delta | Result | Said, None]:
        """Ask, and give what comes: deltas, the end of each message, results of calls. An answer that breaks leaves no trace.

        Raises Refusal and ChatError for what can't be asked.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        is_whole = False
        try:
            for _ in range(settings.max_rounds + 1):
                async for step in self._speak(settings):
                    yield step
                calls = self.messages[-1].get("tool_calls", ())
                for call in calls:
                    yield await self._carry_out(call)
                if not calls:
                    break
            is_whole = True
        finally:
            if not is_whole:
                self.messages = before

    async def _speak(self, settings: Settings) -> AsyncGenerator[Delta | Said, None]:
        request = ChatRequest(
            messages=self.messages, tools=self.workbench.definitions, thinking=settings.thinking, temperature=settings.temperature
        )
        defaults = replace(self.defaults, max_tokens=settings.max_tokens)
        choices = chat_api.open_choices(request, self.backend, None, defaults)
        try:
            async for deltas, _ in choices[0].deltas():
                for delta in deltas:
                    yield delta
        finally:
            chat_api.abort(choices)
        ending, message = choices[0].ending, choices[0].builder.message()
        self.messages.append(message)
        completion = ending.completion if ending else None
        yield Said(message, choices[0].finish_reason, completion, chat_api.usage(choices))

    async def _carry_out(self, call: dict[str, Any]) -> Result:
        name = call["function"]["name"]
        content = await self.workbench.call(name, call["function"]["arguments"])
        self.messages.append({"role": "tool", "tool_call_id": call.get("id"), "content": content})
        return Result(name, content)
