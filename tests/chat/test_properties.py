"""Properties over random conversations and outputs. HYPOTHESIS_PROFILE=nightly runs 10,000 examples of each."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import assume, given
from hypothesis import strategies as st

from rorqual.chat import (
    ChatError,
    MessageBuilder,
    Tokenizer,
    encode,
    encode_spans,
    encode_tokens,
    no_id,
    parse,
    parse_tokens,
    parse_with_repairs,
)
from rorqual.chat.markers import CLOSE, EOS, OPEN, SPECIAL_TOKENS, STRUCTURE
from rorqual.chat.stream import StreamParser
from tests.chat.strategies import conversations, cut, hostile, outputs

PLACES = st.lists(st.integers(0, 400), max_size=12)


def encoded(messages: list[dict[str, Any]], **options: Any) -> str:
    """`encode`, skipping conversations in which two neighbouring system texts happen to make a marker."""
    try:
        return encode(messages, **options)
    except ChatError as error:
        assume("marker" not in error.problem)
        raise


def current_assistants(messages: list[dict[str, Any]]) -> list[int]:
    """The assistant messages after the last user message: those whose reasoning is written."""
    last = max(n for n, message in enumerate(messages) if message["role"] in ("user", "developer"))
    return [n for n in range(last, len(messages)) if messages[n]["role"] == "assistant"]


@given(conversations(), st.booleans(), st.data())
def test_parse_is_the_inverse_of_encode_and_rounds_only_append(
    messages: list[dict[str, Any]], thinking: bool, data: st.DataObject
) -> None:
    whole = encoded(messages, drop_thinking=False)
    current = current_assistants(messages)
    for n, message in enumerate(messages):
        if message["role"] == "assistant":
            is_current = n in current
            text = encode([message], thinking=is_current, context=messages[:n])
            said = {key: value for key, value in message.items() if is_current or key != "reasoning_content"}
            assert parse(text, is_current) == said
            assert parse_with_repairs([(text, None)], is_current, new_id=no_id) == (said, [])
        assert whole.startswith(encode(messages[:n], drop_thinking=False)), "kept reasoning: a conversation only appends"
    whole = encode(messages)
    for n in range(current[0], len(messages)):
        assert whole.startswith(encode(messages[:n])), "the rest of a round only appends"
    n = data.draw(st.integers(1, len(messages)))
    assert whole.endswith(encode(messages[n:], context=messages[:n]))
    spans = encode_spans(messages, thinking)
    text = encode(messages, thinking)
    assert text == "".join(span.text for span in spans)
    for token in SPECIAL_TOKENS:
        assert text.count(token) == sum(span.text == token and span.is_special for span in spans)


@given(conversations(hostile))
def test_over_ids_the_round_trip_is_exact_for_any_text_and_only_special_spans_are_special(
    tokenizer: Tokenizer, messages: list[dict[str, Any]]
) -> None:
    for n in current_assistants(messages):
        tokens = encode_tokens([messages[n]], tokenizer, context=messages[:n])
        assert parse_tokens(tokens, tokenizer) == messages[n]
        assert parse_tokens(tokens, tokenizer, mode="tolerant") == messages[n]
    spans = encode_spans(messages)
    special = [tokenizer.special_id(span.text) for span in spans if span.is_special]
    tokens = encode_tokens(messages, tokenizer)
    assert [token for token in tokens if token in tokenizer.special_tokens] == special
    assert tokenizer.decode(tokens) == "".join(span.text for span in spans)


@given(outputs, PLACES, st.sampled_from(["strict", "tolerant"]), st.booleans())
def test_any_split_gives_the_same_as_one_piece(text: str, places: list[int], mode: Any, thinking: bool) -> None:
    whole = parse_with_repairs([(text, None)], thinking, mode, new_id=no_id)
    assert parse_with_repairs(cut(text, places), thinking, mode, new_id=no_id) == whole
    assert parse_with_repairs([(char, None) for char in text], thinking, mode, new_id=no_id) == whole


@given(outputs, PLACES, st.booleans())
def test_tolerant_deltas_hold_no_marker_and_its_calls_hold_json(text: str, places: list[int], thinking: bool) -> None:
    parser, builder = StreamParser(thinking), MessageBuilder()
    deltas = [delta for piece, _ in cut(text, places) for delta in parser.feed(piece)] + parser.finish()
    for kind in ("reasoning", "content"):
        said = "".join(delta.text for delta in deltas if delta.kind == kind)
        assert not [marker for marker in STRUCTURE if marker in said]
    for delta in deltas:
        assert not [marker for marker in (OPEN, CLOSE, EOS) if marker in delta.text]
    builder.add(deltas)
    for call in builder.message().get("tool_calls", []):
        assert isinstance(json.loads(call["function"]["arguments"]), dict)
        assert call["function"]["name"]


@given(outputs, st.booleans())
def test_strict_reading_returns_no_call_that_the_text_does_not_contain(text: str, thinking: bool) -> None:
    message = parse(text, thinking)
    calls = message.get("tool_calls", [])
    assert len(calls) <= text.count(f"{OPEN}invoke")
    for call in calls:
        assert f'{OPEN}invoke name="{call["function"]["name"]}">\n' in text
        for name, value in json.loads(call["function"]["arguments"]).items():
            is_raw = isinstance(value, str) and f'name="{name}" string="true">{value}{CLOSE}parameter>' in text
            assert is_raw or f'{OPEN}parameter name="{name}" string="false">' in text
    if not calls:
        written = text.partition(EOS)[0]
        said = message.get("reasoning_content", "") + message["content"]
        assert said == (written.replace("</think>", "", 1) if thinking else written), "all else is given back as it stands"


@given(st.text("ab \n\t", max_size=20), st.integers(0, 3))
def test_white_space_of_a_string_argument_survives(value: str, ends: int) -> None:
    value = "\n" * ends + value + " \n" * ends
    call = {"type": "function", "function": {"name": "f", "arguments": json.dumps({"text": value})}}
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    text = encode([said], context=[{"role": "user", "content": "Q"}])
    assert f'string="true">{value}{CLOSE}' in text
    assert parse(text) == said
