"""The edge cases of other engines' parsers, as cases of our own: strict and tolerant readings, typed arguments."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rorqual.chat import new_id, no_id, parse, parse_with_repairs
from rorqual.chat.markers import BOS, CLOSE, EOS, OPEN, USER
from rorqual.chat.schema import is_json

BEGIN, END = f"\n\n{OPEN}function_calls>\n", f"{CLOSE}function_calls>"


def parameter(name: str, value: str, string: bool = True) -> str:
    return f'{OPEN}parameter name="{name}" string="{"true" if string else "false"}">{value}{CLOSE}parameter>\n'


def invoke(name: str, *parameters: str) -> str:
    return f'{OPEN}invoke name="{name}">\n' + ("".join(parameters) or "\n") + f"{CLOSE}invoke>\n"


def block(*invokes: str) -> str:
    return BEGIN + "".join(invokes) + END


def calls(message: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message.get("tool_calls", [])]


def tolerant(text: str, thinking: bool = False, **options: Any) -> tuple[dict[str, Any], list[str]]:
    """The message, and the kinds of the repairs; the same in pieces of every size up to the longest marker's and one more."""
    message, repairs = parse_with_repairs([(text, None)], thinking, new_id=no_id, **options)
    for size in range(1, 24):
        pieces = [(text[at : at + size], None) for at in range(0, len(text), size)]
        assert parse_with_repairs(pieces, thinking, new_id=no_id, **options) == (message, repairs), size
    return message, [repair.kind for repair in repairs]


# Well-formed outputs: strict and tolerant agree.

WELL_FORMED: dict[str, tuple[str, Any]] = {
    "no call": ("Hello", ("Hello", [])),
    "no parameters": (block(invoke("f")), (None, [("f", {})])),
    "prose before a call": ("Let me see." + block(invoke("f")), ("Let me see.", [("f", {})])),
    "prose that ends with line ends": ("See:\n\n" + block(invoke("f")), ("See:\n\n", [("f", {})])),
    "parallel calls": (
        block(invoke("f", parameter("a", "1")), invoke("g", parameter("a", "2"))),
        (None, [("f", {"a": "1"}), ("g", {"a": "2"})]),
    ),
    "white space in a string": (block(invoke("f", parameter("a", "  x\n\n"))), (None, [("f", {"a": "  x\n\n"})])),
    "an empty string": (block(invoke("f", parameter("a", ""))), (None, [("f", {"a": ""})])),
    "JSON values": (
        block(invoke("f", parameter("a", "5", False), parameter("b", '{"c": [null]}', False), parameter("e", "true", False))),
        (None, [("f", {"a": 5, "b": {"c": [None]}, "e": True})]),
    ),
    "a string that looks like JSON": (block(invoke("f", parameter("a", "5"))), (None, [("f", {"a": "5"})])),
    "quotes and backslashes": (block(invoke("f", parameter("a", 'say "hi" \\n\\'))), (None, [("f", {"a": 'say "hi" \\n\\'})])),
    "a literal < in prose": ("if a < b: </p> <｜", ("if a < b: </p> <｜", [])),
    "a false beginning of a marker": ("<｜DSM some text", ("<｜DSM some text", [])),
    "other markup in an argument": (block(invoke("f", parameter("a", "<b>x</b></｜"))), (None, [("f", {"a": "<b>x</b></｜"})])),
}  # fmt: skip


@pytest.mark.parametrize("name", WELL_FORMED)
@pytest.mark.parametrize("end", ["", EOS])
def test_well_formed_output(name: str, end: str) -> None:
    text, (content, expected) = WELL_FORMED[name]
    message = parse(text + end, thinking=False)
    assert (message["content"], calls(message)) == (content, expected)
    assert tolerant(text + end) == (message, [])


def test_thinking_is_split_from_the_answer_after_a_tool_result_too() -> None:
    assert parse("why</think>so") == {"role": "assistant", "content": "so", "reasoning_content": "why"}
    assert parse("</think>so") == {"role": "assistant", "content": "so"}
    assert parse("only reasoning" + EOS) == {"role": "assistant", "content": "", "reasoning_content": "only reasoning"}


def test_parse_invents_no_ids_and_a_stream_gives_every_call_its_own() -> None:
    text = block(invoke("f"), invoke("f"))
    assert all("id" not in call for call in parse(text, thinking=False)["tool_calls"])
    message, _ = parse_with_repairs([(text, None)], thinking=False, new_id=new_id)
    ids = [call["id"] for call in message["tool_calls"]]
    assert len(set(ids)) == 2 and all(len(i) == 29 and i.startswith("call_") for i in ids)


# Strict: one malformed member, and the whole block is plain text.

GOOD = invoke("g", parameter("a", "1"))
MALFORMED = {
    "missing marker": BEGIN + '<invoke name="f">\n</invoke>\n' + END,
    "no wrapper": "\n\n" + invoke("f", parameter("a", "1")),
    "missing string attribute": block(f'{OPEN}invoke name="f">\n{OPEN}parameter name="a">1{CLOSE}parameter>\n{CLOSE}invoke>\n'),
    "unterminated parameter": block(f'{OPEN}invoke name="f">\n{OPEN}parameter name="a" string="true">1\n{CLOSE}invoke>\n'),
    "unterminated block": BEGIN + GOOD,
    "truncated JSON": block(invoke("f", parameter("a", '{"b": 1', False))),
    "invalid JSON": block(invoke("f", parameter("a", "Rome", False))),
    "NaN": block(invoke("f", parameter("a", "NaN", False))),
    "an inline body": block(f'{OPEN}invoke name="f">\n{{"a": 1}}\n{CLOSE}invoke>\n'),
    "a non-object body": block(f'{OPEN}invoke name="f">\n[1]\n{CLOSE}invoke>\n'),
    "a good parameter, then a stray tag": block(invoke("f", parameter("a", "1"), f"{OPEN}b>\n")),
    "prose in the body": block(invoke("f", parameter("a", "1"), "Now,\n")),
    "prose between calls": block(GOOD, "and\n", GOOD),
    "text after the block": block(GOOD) + "\nDone.",
    "two blocks": block(GOOD) + block(GOOD),
    "a duplicate parameter": block(invoke("f", parameter("a", "1"), parameter("a", "2"))),
    "self-closed": block(f'{OPEN}invoke name="f"/>\n'),
    "no blank line before": "x\n" + block(GOOD)[2:],
    "an empty block": BEGIN + END,
    "a good call beside a bad one": block(GOOD, invoke("f", parameter("a", "x", False))),
}


@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.parametrize("end", ["", EOS])
def test_strictly_read_a_malformed_block_is_text_as_a_whole(name: str, end: str) -> None:
    text = "Prose." + MALFORMED[name]
    assert parse(text + end, thinking=False) == {"role": "assistant", "content": text}


def test_strictly_read_a_block_before_the_end_of_thinking_is_reasoning() -> None:
    assert parse("hm" + block(GOOD)) == {"role": "assistant", "content": "", "reasoning_content": "hm" + block(GOOD)}


def test_strictly_read_text_after_the_end_is_left_out_and_reported() -> None:
    message, repairs = parse_with_repairs([("a" + EOS + "b", None)], False, "strict")
    assert message["content"] == "a" and repairs == [("after_end", "b")]


# Tolerant: what is meant is found, and each repair is reported.

MENDED: dict[str, tuple[str, Any, set[str]]] = {
    "no wrapper": ("Hi\n\n" + invoke("f", parameter("a", "1")), [("f", {"a": "1"})], {"no_function_calls"}),
    "self-closed": (block(f'{OPEN}invoke name="f"/>\n'), [("f", {})], {"tag_spelling"}),
    "two blocks": (block(GOOD) + block(GOOD), [("g", {"a": "1"})] * 2, set()),
    "an inline body": (block(f'{OPEN}invoke name="f">\n{{"a": 1}}\n{CLOSE}invoke>\n'), [("f", {"a": 1})], {"inline_json"}),
    "an invalid inline body": (
        block(f'{OPEN}invoke name="f">\n{{"a": }}\n{CLOSE}invoke>\n', GOOD),
        [("g", {"a": "1"})],
        {"invalid_body"},
    ),
    "a non-object body": (block(f'{OPEN}invoke name="f">\n[1]\n{CLOSE}invoke>\n'), [], {"invalid_body", "text_between_tags"}),
    "missing string attribute": (MALFORMED["missing string attribute"], [("f", {"a": 1})], {"tag_spelling"}),
    "unterminated parameter": (MALFORMED["unterminated parameter"], [("f", {"a": "1"})], {"unclosed_parameter"}),
    "unterminated invoke": (
        BEGIN + f'{OPEN}invoke name="f">\n' + parameter("a", "1") + GOOD + END,
        [("f", {"a": "1"}), ("g", {"a": "1"})],
        {"unclosed_invoke"},
    ),
    "unterminated block": (BEGIN + GOOD + EOS, [("g", {"a": "1"})], {"unclosed_function_calls"}),
    "a bare word that is no JSON": (MALFORMED["invalid JSON"], [("f", {"a": "Rome"})], {"type"}),
    "a Python literal": (block(invoke("f", parameter("a", "True", False))), [("f", {"a": True})], {"type"}),
    "JSON that breaks off late": (
        block(invoke("f", parameter("a", json.dumps(list(range(40)))[:-1] + "?", False)), GOOD),
        [("g", {"a": "1"})],
        {"invalid_json"},
    ),
    "a duplicate parameter": (MALFORMED["a duplicate parameter"], [("f", {"a": "1"})], {"duplicate_parameter"}),
    "prose between calls": (MALFORMED["prose between calls"], [("g", {"a": "1"})] * 2, {"text_between_tags"}),
    "prose in the body": (MALFORMED["prose in the body"], [("f", {"a": "1"})], {"text_between_tags"}),
    "a stray tag": (MALFORMED["a good parameter, then a stray tag"], [("f", {"a": "1"})], {"stray_tag"}),
    "loose spelling": (block(f'{OPEN} invoke  name = "f" >\n{CLOSE}invoke>\n'), [("f", {})], {"tag_spelling"}),
    "cut off in a string": (
        BEGIN + f'{OPEN}invoke name="sh">\n{OPEN}parameter name="c" string="true">rm -rf /',
        [],
        {"truncated_call"},
    ),
    "cut off between parameters": (BEGIN + f'{OPEN}invoke name="f">\n' + parameter("a", "1"), [], {"truncated_call"}),
    "cut off in a tag": (BEGIN + f"{OPEN}inv", [], {"stray_tag", "unclosed_function_calls"}),
}  # fmt: skip


@pytest.mark.parametrize("name", MENDED)
def test_tolerantly_read_what_is_meant_is_found(name: str) -> None:
    text, expected, kinds = MENDED[name]
    message, repairs = tolerant(text)
    assert calls(message) == expected
    assert kinds <= set(repairs), repairs
    assert OPEN not in (message["content"] or "") and CLOSE not in (message["content"] or "")


def test_text_after_calls_is_content() -> None:
    assert tolerant(block(GOOD) + "\n\nDone.")[0]["content"] == "Done."


def test_a_call_before_the_end_of_thinking_ends_it() -> None:
    message, repairs = tolerant("hm" + block(GOOD), thinking=True)
    assert (message["reasoning_content"].strip(), calls(message)) == ("hm", [("g", {"a": "1"})])
    assert "call_in_reasoning" in repairs


def test_stray_thinking_markers() -> None:
    assert tolerant("<think>a</think>b", thinking=True)[0] == {"role": "assistant", "content": "b", "reasoning_content": "a"}
    assert tolerant("<think>a</think>b")[0] == {"role": "assistant", "content": "b", "reasoning_content": "a"}
    assert tolerant("</think>b")[0] == {"role": "assistant", "content": "b"}


@pytest.mark.parametrize("marker", [USER, BOS])
def test_a_marker_of_another_turn_ends_the_message(marker: str) -> None:
    message, repairs = tolerant(f"a{marker}made up")
    assert message["content"] == "a" and repairs == ["stray_marker", "after_end"]


def test_a_thinking_tag_inside_an_argument_is_text() -> None:
    text = block(invoke("write", parameter("text", "<think>x</think>")))
    assert calls(tolerant(text)[0]) == calls(parse(text, thinking=False)) == [("write", {"text": "<think>x</think>"})]


def test_prose_and_opener_in_one_piece_at_every_split_point() -> None:
    text = "Let me check." + block(GOOD)
    for at in range(len(text)):
        assert parse_with_repairs([(text[:at], None), (text[at:], None)], False, new_id=no_id)[0] == parse(text, thinking=False)


# Typed by the schema.

PROPERTIES = {
    "flag": {"type": "boolean"}, "count": {"type": "integer"}, "share": {"type": "number"}, "thing": {"type": "object"},
    "list": {"type": "array"}, "maybe": {"type": ["integer", "null"]}, "text": {"type": "string"},
    "any_of": {"anyOf": [{"type": "integer"}, {"type": "null"}]}, "one_of": {"oneOf": [{"type": "boolean"}, {"type": "string"}]},
    "maybe_text": {"type": ["string", "null"]}, "choice": {"enum": [1, 2]}, "free": {},
}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": PROPERTIES}}}]
TYPED = [
    ("flag", "true", True, True), ("flag", "False", True, False), ("count", "5", True, 5), ("count", "5.0", False, 5),
    ("count", "1e2", False, 100), ("share", "5.0", False, 5), ("share", "0.5", True, 0.5), ("thing", '{"a": 1}', True, {"a": 1}),
    ("list", "[1, 2]", True, [1, 2]), ("maybe", "null", True, None), ("maybe", "3", True, 3), ("text", "null", True, "null"),
    ("text", "5", False, "5"), ("text", '"quoted"', False, "quoted"), ("any_of", "null", False, None), ("any_of", "7", True, 7),
    ("one_of", "true", False, True), ("one_of", "word", False, "word"), ("maybe_text", "null", True, None),
    ("maybe_text", "nullable", True, "nullable"), ("maybe_text", "a longer text", True, "a longer text"),
    ("choice", "2", True, 2), ("free", "5", False, 5), ("free", "5", True, "5"), ("unknown", "[1]", False, [1]),
    ("count", "many", True, "many"), ("text", " kept ", True, " kept "),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "string", "expected"), TYPED)
def test_arguments_are_typed_by_the_schema(name: str, value: str, string: bool, expected: Any) -> None:
    text = block(invoke("f", parameter(name, value, string)))
    read_strictly = [parse(text, False, tools=TOOLS)] if string or is_json(value) else []
    for message in (tolerant(text, tools=TOOLS)[0], *read_strictly):
        found = calls(message)[0][1][name]
        assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("wrapper", ["arguments", "input"])
def test_a_parameter_that_wraps_all_arguments_is_unwrapped(wrapper: str) -> None:
    text = block(invoke("f", parameter(wrapper, '{"count": 5}', False)))
    message, repairs = tolerant(text, tools=TOOLS)
    assert calls(message) == [("f", {"count": 5})] and repairs == ["wrapped_arguments"]
    assert calls(tolerant(text)[0]) == [("f", {wrapper: {"count": 5}})], "without a schema nothing is known"
    other = block(invoke("f", parameter(wrapper, '{"other": 5}', False)))
    assert calls(tolerant(other, tools=TOOLS)[0]) == [("f", {wrapper: {"other": 5}})], "it does not fit"
    beside = block(invoke("f", parameter(wrapper, '{"count": 5}', False), parameter("text", "x")))
    assert calls(tolerant(beside, tools=TOOLS)[0]) == [("f", {wrapper: {"count": 5}, "text": "x"})]


def test_a_call_of_an_unknown_tool_is_kept_or_dropped_as_asked() -> None:
    text = block(invoke("nope", parameter("a", "1")), invoke("f"))
    assert calls(tolerant(text, tools=TOOLS)[0]) == [("nope", {"a": "1"}), ("f", {})]
    message, repairs = tolerant(text, tools=TOOLS, drop_unknown=True)
    assert calls(message) == [("f", {})] and repairs == ["unknown_tool"]
    assert calls(parse(text, False, tools=TOOLS, drop_unknown=True)) == []
