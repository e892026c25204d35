"""What the format can't write is an error that names the message and the field."""

from __future__ import annotations

from typing import Any

import pytest

from rorqual.chat import ChatError, encode
from rorqual.errors import UserError
from tests.chat.test_encoder import call, result, say, user

CALLS = call(("f", "{}"), ("g", "{}"), ids=("a", "b"))


def with_arguments(arguments: Any) -> list[dict[str, Any]]:
    given = call(("f", "{}"))
    given["tool_calls"][0]["function"]["arguments"] = arguments
    return [user("Q"), given]


ARGUMENTS = "messages[1].tool_calls[0].function.arguments"
CASES: dict[str, tuple[Any, str, str]] = {
    "unknown role": ([user("Q"), {"role": "function", "content": "x"}], "messages[1].role", "unknown role 'function'"),
    "no role": ([{"content": "x"}], "messages[0].role", "unknown role None"),
    "result without a call": ([user("Q"), result("R")], "messages[1]", "no assistant message with tool_calls"),
    "result after an answer": ([user("Q"), say("a", "r"), result("R")], "messages[2]", "no assistant message"),
    "result of an unknown id": ([user("Q"), CALLS, result("R", "c")], "messages[2].tool_call_id", "'c' is none of the calls"),
    "two results of one call": ([user("Q"), CALLS, result("R", "a"), result("R", "a")], "messages[3].tool_call_id", "already"),
    "a result too many": ([user("Q"), call(("f", "{}")), result("R"), result("R")], "messages[3]", "one tool result too many"),
    "a result missing": ([user("Q"), CALLS, result("A", "a"), user("Q2")], "messages[1].tool_calls", "no result for 'b'"),
    "only the second result": ([user("Q"), CALLS, result("B", "b")], "messages[1].tool_calls", "no result for 'a'"),
    "duplicate ids": (
        [user("Q"), call(("f", "{}"), ("g", "{}"), ids=("a", "a"))],
        "messages[1].tool_calls[1].id",
        "'a' is the id of an earlier call",
    ),
    "arguments not JSON": (with_arguments('{"a": }'), ARGUMENTS, "is not JSON"),
    "arguments empty": (with_arguments(""), ARGUMENTS, "is not JSON"),
    "arguments not an object": (with_arguments("[1]"), ARGUMENTS, "expected the JSON text of an object"),
    "arguments null": (with_arguments(None), ARGUMENTS, "found NoneType"),
    "arguments with NaN": (with_arguments('{"a": NaN}'), ARGUMENTS, "NaN is not a JSON number"),
    "arguments beyond floats": (with_arguments('{"a": 1e999}'), ARGUMENTS, "beyond a float"),
    "arguments with a name twice": (with_arguments('{"a": 1, "a": 2}'), ARGUMENTS, "'a' stands twice"),
    "arguments too deep": (with_arguments('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"), ARGUMENTS, "is not JSON"),
    "a name that breaks its tag": (with_arguments({'a" string="true">b': 1}), ARGUMENTS, "can't stand in a tag"),
    "lone surrogate in content": ([user("a\ud800")], "messages[0].content", "lone surrogate (U+D800) at character 1"),
    "lone surrogate in reasoning": ([user("Q"), say("a", "\udc00")], "messages[1].reasoning_content", "lone surrogate"),
    "lone surrogate in arguments": (with_arguments('{"a": "\\ud800"}'), ARGUMENTS, "lone surrogate"),
    "null user content": ([{"role": "user", "content": None}], "messages[0].content", "null or missing"),
    "null system content": ([{"role": "system", "content": None}, user("Q")], "messages[0].content", "null or missing"),
    "null tool content": ([user("Q"), CALLS, {"role": "tool", "content": None}], "messages[2].content", "null or missing"),
    "empty developer content": ([{"role": "developer", "content": ""}], "messages[0].content", "is empty"),
    "null answer": ([user("Q"), {"role": "assistant", "content": None}], "messages[1].content", "is null"),
    "neither reasoning nor calls": ([user("Q"), say("a")], "messages[1].reasoning_content", "needs reasoning_content"),
    "content not text": ([{"role": "user", "content": 5}], "messages[0].content", "expected text, found int"),
    "a part not text": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        "messages[0].content[0].type",
        "found a part of type 'image_url'",
    ),
    "two reasonings": (
        [user("Q"), {"role": "assistant", "content": "", "reasoning": "a", "reasoning_content": "b"}],
        "messages[1].reasoning",
        "differs",
    ),
    "tools on a user message": ([user("Q") | {"tools": [{}]}], "messages[0].tools", "stands on a user message"),
    "a tool without a function": (
        [{"role": "system", "content": "", "tools": [{"name": "f"}]}],
        "messages[0].tools[0].function",
        "expected",
    ),
    "calls on a user message": ([user("Q") | {"tool_calls": [1]}], "messages[0].tool_calls", "stands on a user message"),
    "no message": ([5], "messages[0]", "expected an object"),
    "no list": ({"role": "user"}, "messages", "expected a list"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input_names_message_and_field(name: str) -> None:
    messages, where, problem = CASES[name]
    with pytest.raises(ChatError) as caught:
        encode(messages)
    assert caught.value.where == where
    assert problem in caught.value.problem
    assert isinstance(caught.value, UserError) and str(caught.value).startswith(where)


def test_context_has_its_own_name() -> None:
    with pytest.raises(ChatError) as caught:
        encode([user("Q")], context=[{"role": "user"}])
    assert caught.value.where == "context[0].content"
