"""The encoder byte for byte: the golden file, the worked examples, the retention rule, and where the published encoder fails."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from rorqual.chat import encode, encode_spans, parse, with_tools
from rorqual.chat.markers import ASSISTANT, BOS, CLOSE, END_THINK, EOS, OPEN, THINK, USER

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text(encoding="utf-8"))


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def say(content: str, reasoning: str = "") -> dict[str, Any]:
    return {"role": "assistant", "content": content} | ({"reasoning_content": reasoning} if reasoning else {})


def call(*calls: tuple[str, str], reasoning: str = "", ids: tuple[str, ...] = ()) -> dict[str, Any]:
    found = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    found = [{"id": i, **c} for i, c in zip(ids, found, strict=True)] if ids else found
    return {"role": "assistant", "content": None, "reasoning_content": reasoning, "tool_calls": found}


def result(content: str, call_id: str | None = None) -> dict[str, Any]:
    return {"role": "tool", "content": content} | ({"tool_call_id": call_id} if call_id else {})


def published(folder: Path) -> tuple[list[dict[str, Any]], str]:
    """The published test's conversation, its tools on message 0, and its prompt (the file ends with one line end more)."""
    given = json.loads((folder / "encoding/test_input.json").read_text(encoding="utf-8"))
    given["messages"][0]["tools"] = given["tools"]
    return given["messages"], (folder / "encoding/test_output.txt").read_text(encoding="utf-8").removesuffix("\n")


def test_the_golden_file_is_met_byte_for_byte(shared_data: Path) -> None:
    messages, prompt = published(shared_data)
    assert encode(messages) == prompt


def test_golden_turns_encoded_in_context_are_parsed_back(shared_data: Path) -> None:
    messages, prompt = published(shared_data)
    for n in (9, 12):
        text = encode([messages[n]], context=messages[:n])
        assert text in prompt
        said = {key: value for key, value in parse(text).items() if value is not None}
        expected = copy.deepcopy(messages[n])
        for tool_call in expected.get("tool_calls", []):
            del tool_call["id"]
        assert said == expected


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_our_own_conversations_keep_their_recorded_digests(case: dict[str, Any]) -> None:
    prompt = encode(case["messages"], **case["options"])
    assert hashlib.sha256(prompt.encode()).hexdigest() == case["sha256"], prompt


def test_worked_example_a() -> None:
    messages = [user("hello"), say("Hello! I am DeepSeek.", "hm"), user("1+1=?")]
    expected = f"{BOS}{USER}hello{ASSISTANT}</think>Hello! I am DeepSeek.{EOS}{USER}1+1=?{ASSISTANT}<think>"
    assert encode(messages) == expected
    assert encode(messages, thinking=False) == expected.removesuffix(THINK) + END_THINK


CALL_B = (
    f'\n\n{OPEN}function_calls>\n{OPEN}invoke name="f">\n{OPEN}parameter name="city" string="true">Rome{CLOSE}parameter>\n'
    f'{OPEN}parameter name="n" string="false">3{CLOSE}parameter>\n{CLOSE}invoke>\n{CLOSE}function_calls>{EOS}'
    "\n\n<function_results>\n<result>R</result>\n</function_results>\n\n"
)
EXAMPLE_B = [user("Q"), call(("f", '{"city":"Rome","n":3}'), reasoning="T"), result("R")]


def test_worked_example_b() -> None:
    assert encode(EXAMPLE_B) == f"{BOS}{USER}Q{ASSISTANT}<think>T</think>{CALL_B}<think>"


def test_worked_example_b_after_a_new_user_message() -> None:
    messages = [*EXAMPLE_B, say("ANSWER", "T2"), user("Q2")]
    assert encode(messages) == f"{BOS}{USER}Q{ASSISTANT}</think>{CALL_B}</think>ANSWER{EOS}{USER}Q2{ASSISTANT}<think>"


def test_worked_example_c_parallel_calls_share_one_block() -> None:
    prompt = encode([user("Q"), call(("f", "{}"), ("g", '{"a":null}'), reasoning="T"), result("R1"), result("R2")])
    block = (
        f'{OPEN}function_calls>\n{OPEN}invoke name="f">\n\n{CLOSE}invoke>\n{OPEN}invoke name="g">\n'
        f'{OPEN}parameter name="a" string="false">null{CLOSE}parameter>\n{CLOSE}invoke>\n{CLOSE}function_calls>{EOS}'
    )
    results = "\n\n<function_results>\n<result>R1</result>\n<result>R2</result>\n</function_results>\n\n<think>"
    assert prompt == f"{BOS}{USER}Q{ASSISTANT}<think>T</think>\n\n{block}{results}"


def test_reasoning_goes_only_when_a_new_user_message_arrives() -> None:
    # [P 3.2.1, Fig. 4]
    turn_1 = [user("u1"), call(("f", "{}"), reasoning="think1.1"), result("result1.1")]
    turn_1 += [call(("f", "{}"), reasoning="think1.2"), result("result1.2"), say("answer1", "think1.3")]
    for n in range(1, len(turn_1) + 1):
        prompt = encode(turn_1[:n])
        assert all(prompt.count(f"think1.{k}") == 1 for k in (1, 2, 3) if k <= n // 2)
    later = encode([*turn_1, user("u2")])
    assert "think1" not in later
    assert all(text in later for text in ("result1.1", "result1.2", "answer1"))
    assert later.count(f"{OPEN}invoke") == 2


def test_without_drop_thinking_earlier_reasoning_stays_in_its_place() -> None:
    messages = [user("a"), say("b", "r"), user("c"), say("d"), user("e")]
    prompt = encode(messages, drop_thinking=False)
    assert prompt == (f"{BOS}{USER}a{ASSISTANT}<think>r</think>b{EOS}{USER}c{ASSISTANT}</think>d{EOS}{USER}e{ASSISTANT}<think>")
    assert prompt.startswith(encode(messages[:2], drop_thinking=False))


def test_drop_thinking_means_nothing_in_chat_mode() -> None:
    messages = [user("a"), say("b", "r"), user("c")]
    assert encode(messages, thinking=False) == encode(messages, thinking=False, drop_thinking=False)


def test_an_earlier_developer_message_is_kept() -> None:
    # The published encoder drops it from the list and then runs past the list's end.
    developer = {"role": "developer", "content": "D"}
    prompt = encode([developer, say("b", "r"), user("c")])
    assert prompt == f"{BOS}{USER}\n\n# The user's message is: D{ASSISTANT}</think>b{EOS}{USER}c{ASSISTANT}<think>"


def test_results_are_written_in_the_order_of_the_calls() -> None:
    # The published encoder matches by position and would answer a with B.
    calls = call(("f", "{}"), ("g", "{}"), ids=("a", "b"))
    swapped = encode([user("Q"), calls, result("B", "b"), result("A", "a")])
    assert swapped == encode([user("Q"), calls, result("A", "a"), result("B", "b")])
    assert swapped.index("<result>A") < swapped.index("<result>B")


def test_results_without_ids_follow_the_order_they_came_in() -> None:
    calls = call(("f", "{}"), ("g", "{}"), ids=("a", "b"))
    assert encode([user("Q"), calls, result("A"), result("B")]) == encode([user("Q"), calls, result("B", "b"), result("A", "a")])


def test_the_first_results_alone_leave_the_block_open() -> None:
    calls = call(("f", "{}"), ("g", "{}"), ids=("a", "b"))
    whole = encode([user("Q"), calls, result("A", "a"), result("B", "b")])
    part = encode([user("Q"), calls, result("A", "a")])
    assert part.endswith("<result>A</result>") and whole.startswith(part)


def test_tools_and_response_format_of_a_developer_message_come_before_its_text() -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "é"}}
    message = {"role": "developer", "content": "D", "tools": [tool], "response_format": {"type": "object"}}
    prompt = encode([message])
    assert prompt.startswith(f"{BOS}{USER}\n\n## Tools\n\nYou have access")
    assert prompt.endswith(
        '<functions>\n{"name": "f", "description": "é"}\n</functions>\n\n\n## Response Format:\n\nYou MUST strictly adhere to '
        f'the following schema to reply:\n{{"type": "object"}}\n\n# The user\'s message is: D{ASSISTANT}<think>'
    )


def test_context_is_known_but_not_written() -> None:
    messages = [
        user("a"),
        say("b", "r"),
        user("c"),
        call(("f", "{}"), ("g", "{}"), ids=("x", "y")),
        result("1", "x"),
        result("2", "y"),
    ]
    whole = encode(messages)
    for n in range(1, len(messages)):
        assert whole.endswith(encode(messages[n:], context=messages[:n]))
    assert encode([user("a")], add_bos=False) == f"{USER}a{ASSISTANT}<think>"


def test_arguments_may_be_given_as_an_object_and_text_as_parts() -> None:
    given = call(("f", '{"city": "Rome"}'))
    given["tool_calls"][0]["function"]["arguments"] = {"city": "Rome"}
    assert encode([user("Q"), given]) == encode([user("Q"), call(("f", '{"city": "Rome"}'))])
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert encode([{"role": "user", "content": parts}]) == encode([user("ab")])


def test_reasoning_is_taken_under_both_names() -> None:
    assert encode([user("Q"), {"role": "assistant", "content": "a", "reasoning": "r"}]) == encode([user("Q"), say("a", "r")])


def test_request_tools_replace_message_tools_and_stand_after_the_system_text() -> None:
    tools = [[{"type": "function", "function": {"name": name}}] for name in ("old", "new")]
    prompt = encode(with_tools([{"role": "system", "content": "S", "tools": tools[0]}, user("Q")], tools[1]))
    assert prompt.count("## Tools") == 1 and '"new"' in prompt and '"old"' not in prompt
    assert prompt.startswith(f"{BOS}S\n\n## Tools")
    assert encode(with_tools([user("Q")], tools[1])).startswith(f"{BOS}\n\n## Tools")


def test_the_loss_falls_on_all_that_the_model_writes_and_on_nothing_else() -> None:
    spans = encode_spans([{"role": "system", "content": "S"}, *EXAMPLE_B, say("ANSWER", "T2")])
    generated = "".join(span.text for span in spans if span.source.is_generated)
    assert generated == f"T</think>{CALL_B.partition(EOS)[0]}{EOS}T2</think>ANSWER{EOS}"
    fields = {span.source.field for span in spans if span.source.message == 2}
    assert fields == {"reasoning_content", "tool_calls[0]", "format"}
