"""What a parser gives: typed deltas, the repairs it made, and the message that deltas add up to."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

REASONING = "reasoning"
CONTENT = "content"
TOOL_CALL = "tool_call"
ARGUMENTS = "arguments"
END_CALL = "end_call"
ABANDONED = "abandoned"

_ALPHABET = string.ascii_letters + string.digits


class Delta(NamedTuple):
    """A piece of the message that has become certain.

    kind: reasoning and content carry text; tool_call carries the function's name and the call's id and opens call `index`;
    arguments carries a fragment of its JSON text; end_call says that the call is complete; abandoned says that it will never
    be (cut off, or its arguments are no JSON): it's no part of the message, and what came of its arguments is not valid JSON.
    """

    kind: str
    text: str = ""
    index: int = -1
    id: str | None = None


class Repair(NamedTuple):
    """One departure from the format that the parser mended or dropped. kind is one of docs/chat.md's list."""

    kind: str
    text: str
    """What was dropped or changed, at most 200 characters of it."""


def new_id() -> str:
    """A fresh call id, in the shape that OpenAI's API gives."""
    return "call_" + "".join(secrets.choice(_ALPHABET) for _ in range(24))


def to_openai(delta: Delta) -> dict[str, Any] | None:
    """A delta as the `delta` object of an OpenAI streaming chunk; None for kinds that the API doesn't have."""
    if delta.kind == REASONING:
        return {"reasoning_content": delta.text}
    if delta.kind == CONTENT:
        return {"content": delta.text}
    if delta.kind == TOOL_CALL:
        function = {"name": delta.text, "arguments": ""}
        return {"tool_calls": [{"index": delta.index, "id": delta.id, "type": "function", "function": function}]}
    if delta.kind == ARGUMENTS:
        return {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.text}}]}
    return None


class MessageBuilder:
    """Adds deltas up to an assistant message: content, and where present reasoning_content and tool_calls."""

    def __init__(self) -> None:
        self._texts: dict[str, list[str]] = {REASONING: [], CONTENT: []}
        self._calls: dict[int, tuple[Delta, list[str]]] = {}
        self._complete: set[int] = set()

    def add(self, deltas: Iterable[Delta]) -> None:
        for delta in deltas:
            if delta.kind == ARGUMENTS:
                self._calls[delta.index][1].append(delta.text)
            elif delta.kind in self._texts:
                self._texts[delta.kind].append(delta.text)
            elif delta.kind == TOOL_CALL:
                self._calls[delta.index] = (delta, [])
            elif delta.kind == END_CALL:
                self._complete.add(delta.index)

    def message(self) -> dict[str, Any]:
        """The message so far, with the calls that are complete. content is None where there are calls and no text."""
        content, reasoning = "".join(self._texts[CONTENT]), "".join(self._texts[REASONING])
        calls = [_call(*self._calls[index]) for index in sorted(self._complete)]
        message: dict[str, Any] = {"role": "assistant", "content": (content or None) if calls else content}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return message


def _call(start: Delta, fragments: list[str]) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": start.text, "arguments": "".join(fragments)}}
    return call if start.id is None else {"id": start.id, **call}


NewId = Callable[[], str | None]


def no_id() -> None:
    """For parsers that shall invent no ids."""
