"""Conversations become rows: the loss on what the assistant writes, each round in the context it would be sampled in."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rorqual.chat import encode_tokens, with_tools
from rorqual.data.conversations import batch_of, packed_rows, read_conversations
from rorqual.errors import UserError
from tests.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"role": "assistant", "content": "", "reasoning_content": "one",
        "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}  # fmt: skip
TWO_ROUNDS = [
    {"role": "user", "content": "q1"}, CALL, {"role": "tool", "tool_call_id": "a", "content": "r1"},
    {"role": "assistant", "content": "a1", "reasoning_content": "two"},
    {"role": "user", "content": "q2"}, {"role": "assistant", "content": "a2", "reasoning_content": "three"},
]  # fmt: skip


def written(tmp_path, *records):
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def trained_text(sample):
    return TOKENIZER.decode(sample.tokens[sample.trained].tolist())


def test_each_round_is_trained_in_the_context_it_would_be_sampled_in(tmp_path):
    path = written(tmp_path, {"messages": TWO_ROUNDS, "tools": TOOLS})
    first, second = read_conversations(path, TOKENIZER, 4000, held_out_share=0).train
    messages = with_tools(TWO_ROUNDS, TOOLS)
    assert first.tokens.tolist() == encode_tokens(messages[:5], TOKENIZER)
    assert second.tokens.tolist() == encode_tokens(messages, TOKENIZER)
    assert (
        trained_text(first).startswith("one</think>")
        and "two</think>a1" in trained_text(first)
        and "r1" not in trained_text(first)
    )
    assert trained_text(second) == "three</think>a2<｜end▁of▁sentence｜>", "earlier turns are context, not targets"
    assert "one" not in TOKENIZER.decode(second.tokens.tolist())


def test_without_thinking_or_with_reasoning_kept_a_conversation_is_one_sample(tmp_path):
    path = written(tmp_path, {"messages": TWO_ROUNDS, "tools": TOOLS, "thinking": False})
    (sample,) = read_conversations(path, TOKENIZER, 4000, 0).train
    assert "a1" in trained_text(sample) and "a2" in trained_text(sample) and "q2" not in trained_text(sample)
    path = written(tmp_path, {"messages": TWO_ROUNDS, "tools": TOOLS})
    (kept,) = read_conversations(path, TOKENIZER, 4000, 0, drop_thinking=False).train
    assert "one</think>" in trained_text(kept) and "three</think>a2" in trained_text(kept)


def test_packing_uses_every_sample_once_and_bounds_documents(tmp_path):
    records = [
        {"messages": [{"role": "user", "content": "x" * n}, {"role": "assistant", "content": "y"}], "thinking": False}
        for n in range(1, 40)
    ]
    samples = read_conversations(written(tmp_path, *records), TOKENIZER, 100, 0).train
    rows = packed_rows(samples, 100, "s")
    assert sorted(i for row in rows for i in row) == list(range(39)) and len(rows) < 39
    assert rows == packed_rows(samples, 100, "s") != packed_rows(samples, 100, "t")
    batch = batch_of(samples, rows, 100)
    for row, indices in enumerate(rows):
        for number, index in enumerate(indices):
            mine = batch.documents[row] == number
            np.testing.assert_array_equal(batch.tokens[row][mine].numpy(), samples[index].tokens)
            np.testing.assert_array_equal(batch.trained[row][mine].numpy(), samples[index].trained)


def test_the_split_is_by_conversation_and_what_is_too_long_is_counted(tmp_path):
    records = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "y"}], "thinking": False}
        for n in range(200)
    ]
    records.append(
        {"messages": [{"role": "user", "content": "x" * 500}, {"role": "assistant", "content": "y"}], "thinking": False}
    )
    found = read_conversations(written(tmp_path, *records), TOKENIZER, 60, 0.2)
    assert found.dropped == {"longer than a row": 1} and 20 < len(found.held_out) < 65
    assert len(found.train) + len(found.held_out) == 200


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "c.jsonl:1: not JSON"),
        ('{"message": []}', "c.jsonl:1: expected"),
        ('{"messages": [{"role": "wizard", "content": "x"}]}', r"c.jsonl:1: messages\[0\].role"),
        ("", r"no conversation of at most 100 tokens .*it is empty"),
    ],
)
def test_bad_lines_are_named(tmp_path, text, message):
    path = tmp_path / "c.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_conversations(path, TOKENIZER, 100, 0)
