"""The context strategies do what their definitions say, on random conversations and on planted cases."""

from __future__ import annotations

import asyncio
import copy
import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.policy import ChatReply, StopReason
from rorqual.rollout.context import (
    SUMMARY_HEADING,
    ContextError,
    discard_75,
    discard_all,
    exceeds,
    fewest_steps,
    none,
    parallel_fewest_step,
    rounds,
    summary,
)


def a_round(number: int, calls: int = 1) -> list[dict]:
    ids = [f"c{number}.{i}" for i in range(calls)]
    asked = [{"id": i, "type": "function", "function": {"name": "f", "arguments": "{}"}} for i in ids]
    head = {"role": "assistant", "content": "", "reasoning_content": f"think {number}", "tool_calls": asked}
    return [head, *({"role": "tool", "tool_call_id": i, "content": f"result {i}"} for i in ids)]


PREFIX = [{"role": "system", "content": "s", "tools": [{"type": "function"}]}, {"role": "user", "content": "q"}]


@st.composite
def conversations(draw) -> list[dict]:
    """System, then user turns, each with rounds and perhaps a plain answer; perhaps a last round still being played."""
    messages, number = [copy.deepcopy(PREFIX[0])], 0
    for turn in range(draw(st.integers(1, 3))):
        messages.append({"role": draw(st.sampled_from(["user", "developer"])), "content": f"user {turn}"})
        for _ in range(draw(st.integers(0, 5))):
            messages += a_round(number, draw(st.integers(1, 3)))
            number += 1
        if draw(st.booleans()):
            messages.append({"role": "assistant", "content": f"answer {turn}", "reasoning_content": "r"})
    if draw(st.booleans()):
        messages += a_round(number, 3)[: draw(st.integers(1, 3))]
    return messages


@given(conversations())
def test_discards_keep_all_but_the_oldest_rounds_whole_and_in_order(messages):
    before, n = copy.deepcopy(messages), len(rounds(messages))
    for strategy, gone in [(none, 0), (discard_75, math.ceil(0.75 * n)), (discard_all, n)]:
        result = strategy(messages)
        assert messages == before, "the input is not changed"
        left = rounds(result)  # raises where a call was parted from its result
        assert len(left) == n - gone
        assert [m for m in result if not m.get("tool_calls") and m["role"] != "tool"] == [
            m for m in messages if not m.get("tool_calls") and m["role"] != "tool"
        ], "questions, system text, tool definitions and plain answers stay"
        assert [result[r.call] for r in left] == [messages[r.call] for r in rounds(messages)[gone:]], "the newest rounds stay"
        rest = iter(messages)
        assert all(any(m is other for other in rest) for m in result), "the result is a subsequence"


@given(conversations())
def test_discarding_again_changes_nothing_when_nothing_is_left(messages):
    assert discard_all(discard_all(messages)) == discard_all(messages)
    assert discard_all(discard_75(messages)) == discard_all(messages)


@pytest.mark.parametrize(("n", "left"), [(0, 0), (1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (8, 2), (9, 2)])
def test_discard_75_drops_the_ceiling_of_three_quarters(n, left):
    messages = PREFIX + [m for i in range(n) for m in a_round(i)]
    assert len(rounds(discard_75(messages))) == left


def test_a_round_still_being_played_is_kept_and_not_counted():
    messages = PREFIX + a_round(0) + a_round(1, calls=2)[:2]
    assert discard_all(messages) == PREFIX + a_round(1, calls=2)[:2]


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        (PREFIX + a_round(0)[1:], "message 2: a tool result with no assistant message"),
        (PREFIX + a_round(0, 2)[:2] + PREFIX[1:], "message 2: 2 tool calls, but 1 results follow"),
        (PREFIX + a_round(0) + a_round(0)[1:], "message 2: 1 tool calls, but 2 results follow"),
    ],
)
def test_conversations_that_are_none_are_refused_by_index(messages, text):
    with pytest.raises(ContextError, match=text):
        discard_all(messages)


def test_the_trigger_is_strictly_above_the_share():
    assert not exceeds(800, 1000) and exceeds(801, 1000) and exceeds(501, 1000, share=0.5)


class Scripted:
    def __init__(self, text):
        self.text, self.seen = text, None

    async def reply(self, messages, tools, params):
        self.seen = messages
        assert not tools, "the one who sums up cannot call"
        return ChatReply({"role": "assistant", "content": self.text}, StopReason.STOP)


def test_summary_replaces_the_rounds_and_an_earlier_summary():
    messages = PREFIX + a_round(0)
    first = asyncio.run(summary(messages, Scripted("found A")))
    assert first == [*PREFIX, {"role": "user", "content": f"{SUMMARY_HEADING}\nfound A"}]
    policy = Scripted("found A and B")
    second = asyncio.run(summary(first + a_round(1), policy))
    assert second == [*PREFIX, {"role": "user", "content": f"{SUMMARY_HEADING}\nfound A and B"}]
    assert policy.seen[: len(first)] == first, "the earlier summary was summed up too"
    with pytest.raises(ContextError, match="empty"):
        asyncio.run(summary(messages, Scripted("  ")))


@dataclass
class Played:
    steps: int
    answered: bool


def test_parallel_takes_the_shortest_run_that_answered():
    runs = [Played(1, False), Played(5, True), Played(3, True), Played(3, True)]

    async def play(index):
        await asyncio.sleep(0.001 * (4 - index))  # the last started ends first: the order of ending plays no part
        return runs[index]

    best, played = asyncio.run(parallel_fewest_step(play, 4))
    assert best is runs[2] and played == runs
    assert fewest_steps([Played(2, False), Played(1, False)]) == 0
    with pytest.raises(ContextError):
        asyncio.run(parallel_fewest_step(play, 0))
