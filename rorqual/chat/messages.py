"""OpenAI-shaped messages read into turns: every field checked, each error naming the message index and the field."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rorqual.chat.errors import ChatError
from rorqual.chat.grammar import is_writable_function, is_writable_parameter

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Call:
    """One function call of an assistant turn."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True)
class Turn:
    """A message whose fields hold what the format can write."""

    role: str
    content: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    tools: tuple[str, ...] = ()
    """Each function's schema as one line of JSON."""
    response_format: str = ""
    """JSON."""
    call_id: str | None = None
    """Of a tool result: the call that it answers."""

    @property
    def is_user(self) -> bool:
        """Whether it opens a round: reasoning before it is dropped."""
        return self.role in ("user", "developer")


def read_messages(messages: Sequence[Mapping[str, Any]], name: str = "messages") -> list[Turn]:
    """The turns of a conversation. Raises ChatError at the first field that the format can't write."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ChatError(name, f"expected a list of messages, found {type(messages).__name__}")
    return [_turn(message, f"{name}[{n}]") for n, message in enumerate(messages)]


def with_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), response_format: Any = None
) -> list[dict[str, Any]]:
    """The messages with a request's tools and response format on the first system message (added in front if there is none).

    For servers: OpenAI's API takes tools beside the messages, the format wants them on a message. A request's tools replace
    those that stand on messages, so that the prompt holds one tools block.
    """
    changed = [dict(message) for message in messages]
    fields = {"tools": list(tools), "response_format": response_format}
    fields = {field: value for field, value in fields.items() if value}
    if not fields:
        return changed
    for message in changed:
        for field in fields:
            message.pop(field, None)
    first = next((message for message in changed if message.get("role") == "system"), None)
    if first is None:
        first = {"role": "system", "content": ""}
        changed.insert(0, first)
    first.update(fields)
    return changed


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, Mapping):
        raise ChatError(where, f"expected an object with a role, found {type(message).__name__}")
    role = message.get("role")
    if role not in ROLES:
        raise ChatError(f"{where}.role", f"unknown role {role!r}; expected one of {', '.join(ROLES)}")
    _refuse_misplaced(message, role, where)
    turn = Turn(
        role,
        _content(message, role, where),
        _reasoning(message, where) if role == "assistant" else "",
        _calls(message, where) if role == "assistant" else (),
        _tools(message, where),
        _response_format(message, where),
        _identifier(message, "tool_call_id", where),
    )
    if role == "assistant" and message.get("content") is None and not (turn.calls or turn.reasoning):
        raise ChatError(f"{where}.content", "is null in an assistant message with neither reasoning_content nor tool_calls")
    return turn


_PLACES = {
    "tools": ("system", "developer"),
    "response_format": ("system", "developer"),
    "tool_calls": ("assistant",),
    "reasoning_content": ("assistant",),
    "tool_call_id": ("tool",),
}


def _refuse_misplaced(message: Mapping[str, Any], role: str, where: str) -> None:
    for field, roles in _PLACES.items():
        if message.get(field) and role not in roles:
            raise ChatError(f"{where}.{field}", f"stands on a {role} message; expected on {' or '.join(roles)}")


def _content(message: Mapping[str, Any], role: str, where: str) -> str:
    content = message.get("content")
    if content is None:
        can_lack = role == "assistant" or (
            role == "system" and "content" not in message and (message.get("tools") or message.get("response_format"))
        )
        if can_lack:
            return ""
        raise ChatError(f"{where}.content", f"is null or missing; a {role} message needs text")
    text = _text(content, f"{where}.content")
    if role == "developer" and not text:
        raise ChatError(f"{where}.content", "is empty; a developer message needs text")
    return text


def _text(value: Any, where: str) -> str:
    """A string, or OpenAI's list of text parts, joined."""
    if isinstance(value, list | tuple):
        return "".join(_part(part, f"{where}[{n}]") for n, part in enumerate(value))
    if not isinstance(value, str):
        raise ChatError(where, f"expected text, found {type(value).__name__}")
    return _without_surrogates(value, where)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return _text(part, where)
    if not isinstance(part, Mapping) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise ChatError(f"{where}.type", f"the format holds text only, found a part of type {kind!r}")
    if not isinstance(part.get("text"), str):
        raise ChatError(f"{where}.text", f"expected text, found {type(part.get('text')).__name__}")
    return _text(part["text"], f"{where}.text")


def _without_surrogates(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ChatError(where, f"holds a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}") from None
    return text


def _reasoning(message: Mapping[str, Any], where: str) -> str:
    """`reasoning_content`, or `reasoning` as some servers call it; the two must not disagree."""
    found = {field: message[field] for field in ("reasoning_content", "reasoning") if message.get(field) is not None}
    texts = {field: _text(value, f"{where}.{field}") for field, value in found.items()}
    if len(set(texts.values())) > 1:
        raise ChatError(f"{where}.reasoning", "differs from reasoning_content; give one of the two")
    return next(iter(texts.values()), "")


def _tools(message: Mapping[str, Any], where: str) -> tuple[str, ...]:
    tools = message.get("tools") or ()
    if not isinstance(tools, list | tuple):
        raise ChatError(f"{where}.tools", f"expected a list, found {type(tools).__name__}")
    return tuple(_schema(tool, f"{where}.tools[{n}]") for n, tool in enumerate(tools))


def _schema(tool: Any, where: str) -> str:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping):
        raise ChatError(f"{where}.function", 'expected {"type": "function", "function": {"name": …, "parameters": …}}')
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise ChatError(f"{where}.function.name", "is missing or empty")
    return _json(function, f"{where}.function")


def _response_format(message: Mapping[str, Any], where: str) -> str:
    value = message.get("response_format")
    return _json(value, f"{where}.response_format") if value else ""


def _json(value: Any, where: str) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatError(where, f"can't be written as JSON: {error}") from None
    return _without_surrogates(text, where)


def _identifier(message: Mapping[str, Any], field: str, where: str) -> str | None:
    value = message.get(field)
    if value is not None and not isinstance(value, str):
        raise ChatError(f"{where}.{field}", f"expected text, found {type(value).__name__}")
    return value


def _calls(message: Mapping[str, Any], where: str) -> tuple[Call, ...]:
    found = message.get("tool_calls") or ()
    if not isinstance(found, list | tuple):
        raise ChatError(f"{where}.tool_calls", f"expected a list, found {type(found).__name__}")
    calls = tuple(_call(call, f"{where}.tool_calls[{n}]") for n, call in enumerate(found))
    seen: set[str] = set()
    for n, call in enumerate(calls):
        if call.id is not None and call.id in seen:
            raise ChatError(f"{where}.tool_calls[{n}].id", f"{call.id!r} is the id of an earlier call of this message too")
        seen |= {call.id} if call.id is not None else set()
    return calls


def _call(call: Any, where: str) -> Call:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise ChatError(f"{where}.function", 'expected {"id": …, "type": "function", "function": {"name": …, "arguments": …}}')
    if call.get("type", "function") != "function":
        raise ChatError(f"{where}.type", f"expected 'function', found {call['type']!r}")
    name = function.get("name")
    if not isinstance(name, str) or not is_writable_function(_without_surrogates(name, f"{where}.function.name")):
        raise ChatError(f"{where}.function.name", f"{name!r} can't stand in a tag")
    arguments = read_arguments(function.get("arguments"), f"{where}.function.arguments")
    return Call(name, arguments, _identifier(call, "id", where))


def read_arguments(value: Any, where: str) -> dict[str, Any]:
    """A call's arguments: JSON text of an object, or the object. Raises ChatError for anything else."""
    if isinstance(value, Mapping):
        value = _json(value, where)
    if not isinstance(value, str):
        raise ChatError(where, f"expected the JSON text of an object, found {type(value).__name__}")
    try:
        arguments = json.loads(value, object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_float)
    except (ValueError, RecursionError) as error:
        raise ChatError(where, f"is not JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise ChatError(where, f"expected the JSON text of an object, found {value[:40]!r}")
    _without_surrogates(json.dumps(arguments, ensure_ascii=False), where)
    for name in arguments:
        if not is_writable_parameter(name):
            raise ChatError(where, f"the parameter name {name!r} can't stand in a tag")
    return arguments


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)!r} stands twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is beyond a float")
    return value
