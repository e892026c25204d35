"""Deltas come as soon as they are certain, never with part of a marker; arguments stream in bounded memory and linear time."""

from __future__ import annotations

import gc
import json
import time
import tracemalloc

import pytest

from rorqual.chat import ChatError, Delta, MessageBuilder, StreamParser, Tokenizer, encode, encode_tokens, no_id, to_openai
from rorqual.chat.markers import CLOSE, DSML, EOS, LONGEST, OPEN, STRUCTURE
from tests.chat.test_encoder import call, say, user
from tests.chat.test_parser import BEGIN, block, invoke, parameter


def arguments(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas if delta.kind == "arguments")


def test_prose_comes_at_once() -> None:
    parser = StreamParser()
    assert parser.feed("why") == [Delta("reasoning", "why")]
    assert parser.feed("</think>so") == [Delta("content", "so")]
    assert parser.feed("\n\n") == [] and parser.feed("x") == [Delta("content", "\n\nx")]
    assert parser.feed("<") == [] and parser.feed("b>") == [Delta("content", "<b>")]
    assert parser.feed(EOS) == [] and parser.is_done


@pytest.mark.parametrize("string", [True, False])
def test_a_long_argument_streams_and_is_never_late_by_more_than_a_marker(string: bool) -> None:
    parser = StreamParser(thinking=False, new_id=no_id)
    opening = BEGIN + f'{OPEN}invoke name="f">\n'
    assert parser.feed(opening) == [Delta("tool_call", "f", 0, None)], "the name comes before any argument"
    value = "0123456789 text < and } more ｜ of it " * 20
    written = value if string else json.dumps([value, 1], ensure_ascii=False)
    seen = parser.feed(f'{OPEN}parameter name="a" string="{"true" if string else "false"}">')
    for at, char in enumerate(written):
        seen += parser.feed(char)
        shown = arguments(seen).removeprefix('{"a": ').removeprefix('"' if string else "")
        assert at + 1 - len(shown) <= LONGEST, "late"
        assert written.startswith(shown)
    seen += parser.feed(f"{CLOSE}parameter>\n{CLOSE}invoke>\n")
    assert json.loads(arguments(seen)) == {"a": value if string else [value, 1]}
    assert seen[-1] == Delta("end_call", "", 0)


@pytest.mark.parametrize("size", range(1, LONGEST + 2))
def test_no_piece_of_any_size_leaks_part_of_a_marker(size: int) -> None:
    text = encode([call(("f", '{"a": "x", "b": [1]}'), reasoning="why") | {"content": "so"}], context=[user("Q")])
    parser = StreamParser(new_id=no_id)
    deltas = [delta for at in range(0, len(text), size) for delta in parser.feed(text[at : at + size])] + parser.finish()
    shown = "".join(delta.text for delta in deltas)
    assert shown == 'whysof{"a": "x", "b": [1]}'


def test_a_cut_off_call_is_shown_as_abandoned_and_never_closed() -> None:
    parser = StreamParser(thinking=False, new_id=no_id)
    deltas = parser.feed(BEGIN + f'{OPEN}invoke name="sh">\n{OPEN}parameter name="c" string="true">rm -rf /tmp') + parser.finish()
    assert deltas[-1] == Delta("abandoned", "", 0)
    with pytest.raises(json.JSONDecodeError):
        json.loads(arguments(deltas))


def test_marker_text_that_is_not_special_stays_text(tokenizer: Tokenizer) -> None:
    said = call(("f", json.dumps({"a": "x"})), reasoning="why") | {"content": f"The tag is {OPEN}invoke> and </think>"}
    tokens = encode_tokens([said], tokenizer, context=[user("Q")])
    parser, builder, detokenizer = StreamParser(new_id=no_id), MessageBuilder(), tokenizer.detokenizer()
    for token in tokens:
        for piece in detokenizer.feed(token):
            builder.add(parser.feed(*piece))
    builder.add(parser.finish())
    assert builder.message() == said


def test_flagged_pieces_may_part_a_tag_anywhere() -> None:
    parser = StreamParser(thinking=False, new_id=no_id)
    deltas = parser.feed("a <", False) + parser.feed("b <", False) + parser.feed("/", False) + parser.feed("c", False)
    assert "".join(delta.text for delta in deltas) == "a <b </c"
    deltas = parser.feed("\n\n<", False) + parser.feed(DSML, True) + parser.feed("function_calls>\n<", False)
    deltas += parser.feed(DSML, True) + parser.feed('invoke name="f">\n\n</', False) + parser.feed(DSML, True)
    deltas += parser.feed("invoke>\n", False)
    assert [delta.kind for delta in deltas] == ["tool_call", "arguments", "end_call"]


def test_strict_calls_come_with_the_end_of_the_message() -> None:
    parser = StreamParser(thinking=False, mode="strict", new_id=no_id)
    assert parser.feed("so") == [Delta("content", "so")]
    assert parser.feed(block(invoke("f", parameter("a", "1")))) == []
    assert [delta.kind for delta in parser.feed(EOS)] == ["tool_call", "arguments", "end_call"]


def test_strict_content_that_only_begins_like_a_block_is_not_kept_back() -> None:
    parser = StreamParser(thinking=False, mode="strict")
    text = f"\n\n{OPEN}invoke> is a tag"
    assert "".join(delta.text for delta in parser.feed(text)) == text


def test_deltas_as_openai_chunks() -> None:
    parser = StreamParser(new_id=lambda: "call_1")
    text = encode([call(("f", '{"a": 1}'), reasoning="why")], context=[user("Q")])
    chunks = [chunk for delta in parser.feed(text) + parser.finish() if (chunk := to_openai(delta))]
    assert chunks == [
        {"reasoning_content": "why"},
        {"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a": 1}'}}]},
    ]


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ChatError, match="expected tolerant or strict"):
        StreamParser(mode="lenient")  # type: ignore[arg-type]


def read(text: str, mode: str = "tolerant", size: int = 4096) -> float:
    parser = StreamParser(mode=mode, new_id=no_id)  # type: ignore[arg-type]
    gc.disable()  # its passes over all the objects of a test run are not the parser's time
    try:
        began = time.process_time()
        for at in range(0, len(text), size):
            parser.feed(text[at : at + size])
        parser.finish()
        return time.process_time() - began
    finally:
        gc.enable()


def long_output(kind: str, n_chars: int) -> str:
    tag = f'</think>{BEGIN}{OPEN}invoke name="f">\n'
    return {
        "string": encode([call(("f", json.dumps({"a": "x < y\n" * (n_chars // 6)})))], context=[user("Q")]),
        "JSON": encode([call(("f", json.dumps({"a": [{"b": [1, "c"]}] * (n_chars // 18)})))], context=[user("Q")]),
        "markers": "".join(STRUCTURE[2:]) * (n_chars // 70),
        "parts of markers": "<｜DSM</thin" * (n_chars // 11),
        "tags that never end": tag + f'{OPEN}parameter name="' * (n_chars // 24),
        "a tag that never ends": tag + f'{OPEN}parameter name="' + ">" * n_chars,
        "junk in a block": f"</think>{BEGIN}" + "junk " * (n_chars // 5),
        "calls": "</think>" + block(*[invoke("f", parameter("a", "1"))] * (n_chars // 110)),
        "deep JSON": f'{tag}{OPEN}parameter name="a" string="false">' + '[{"a":' * (n_chars // 6),
        "prose": encode([say("a\n" * (n_chars // 2), "r")], context=[user("Q")]),
    }[kind]


KINDS = ["string", "JSON", "markers", "parts of markers", "tags that never end", "a tag that never ends", "junk in a block"]
KINDS += ["calls", "deep JSON", "prose"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["tolerant", "strict"])
def test_time_is_linear_in_the_length(kind: str, mode: str) -> None:
    short, long = long_output(kind, 50_000), long_output(kind, 800_000)
    read(short, mode)
    fast = min(read(short, mode) for _ in range(3))
    assert min(read(long, mode) for _ in range(2)) < 64 * fast + 0.05, (
        "16 times the length takes 16 times as long; quadratic would be 256 times"
    )


@pytest.mark.parametrize("kind", ["string", "JSON"])
def test_an_argument_of_ten_megabytes_streams_in_bounded_memory(kind: str) -> None:
    assert peak_bytes(long_output(kind, 10_000_000)) < 1_500_000


@pytest.mark.parametrize("kind", ["tags that never end", "a tag that never ends", "junk in a block", "prose", "deep JSON"])
def test_nothing_malformed_makes_the_parser_collect_text(kind: str) -> None:
    assert peak_bytes(long_output(kind, 3_000_000)) < 1_500_000


def peak_bytes(text: str) -> int:
    tracemalloc.start()
    try:
        read(text, size=65_536)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
