"""The chat template renders what `encode` writes, through transformers' own machinery."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from rorqual.chat import ChatError, Tokenizer, chat_template, encode, encode_tokens, with_tools
from tests.chat.strategies import conversations
from tests.chat.test_encoder import GOLDEN, call, published, result, say, user


def with_objects(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Arguments as objects, which is how a template takes them."""
    changed = copy.deepcopy(messages)
    for message in changed:
        for tool_call in message.get("tool_calls", []):
            tool_call["function"]["arguments"] = json.loads(tool_call["function"]["arguments"])
    return changed


def rendered(messages: list[dict[str, Any]], **options: Any) -> str:
    return render_jinja_template([with_objects(messages)], chat_template=chat_template(), **options)[0][0]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_our_own_conversations(case: dict[str, Any]) -> None:
    assert rendered(case["messages"], **case["options"]) == encode(case["messages"], **case["options"])


@pytest.mark.parametrize("options", [{}, {"thinking": False}, {"drop_thinking": False}, {"enable_thinking": False}])
def test_the_golden_conversation(shared_data: Path, options: dict[str, Any]) -> None:
    messages, _ = published(shared_data)
    expected = {"thinking": options.get("enable_thinking", options.get("thinking", True))}
    assert rendered(messages, **options) == encode(messages, **expected, drop_thinking=options.get("drop_thinking", True))


@settings(max_examples=100)
@given(conversations(), st.booleans(), st.booleans())
def test_any_conversation(messages: list[dict[str, Any]], thinking: bool, drop_thinking: bool) -> None:
    try:
        expected = encode(messages, thinking, drop_thinking)
    except ChatError as error:
        assume("marker" not in error.problem)
        raise
    assert rendered(messages, thinking=thinking, drop_thinking=drop_thinking) == expected


def test_request_tools_go_where_with_tools_puts_them() -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "d<é>"}}]
    for messages in ([user("Q")], [{"role": "system", "content": "S"}, user("Q")]):
        assert rendered(messages, tools=tools) == encode(with_tools(messages, tools))


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([{"role": "function", "content": "x"}], "unknown role"),
        ([user("a<think>b")], "holds the marker <think>"),
        ([user("Q"), result("R")], "without a call"),
        ([user("Q"), say("a")], "needs reasoning_content"),
    ],
)
def test_what_encode_refuses_the_template_refuses(messages: list[dict[str, Any]], problem: str) -> None:
    with pytest.raises(jinja2.TemplateError, match=problem):
        rendered(messages)
    with pytest.raises(ChatError):
        encode(messages)


def test_a_tokenizer_of_transformers_gives_the_same_ids(tokenizer: Tokenizer) -> None:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, chat_template=chat_template())
    messages = [{"role": "system", "content": "S"}, user("Q"), call(("f", '{"a": "x"}'), reasoning="T"), result("R")]
    found = fast.apply_chat_template(with_objects(messages), add_generation_prompt=True, tokenize=True, return_dict=False)
    assert found == encode_tokens(messages, tokenizer)
