"""Each context strategy does what its definition says, seen through the loop by a scripted policy with a known failure.

The policy looks things up one by one. At its third call it is misled, and as long as it sees that result it can't answer: so only
a strategy that removes the third round lets it answer, and which rounds it sees afterwards says what was removed.
"""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.policy import ChatReply, SamplingParams, StopReason
from rorqual.rollout.agent import AgentConfig, play, speaker_of
from rorqual.rollout.context import SUMMARY_HEADING, fewest_steps
from rorqual.rollout.trajectory import End
from rorqual.tasks.verdict import failed, passed

MISLED = 3
OPENING = ({"role": "system", "content": "s"}, {"role": "user", "content": "q"})
PER_MESSAGE = 10
"""Tokens of each message, as the policy reports them (a result has four characters for each): the arithmetic is exact."""


class World:
    """Result n carries the number n; the third one misleads."""

    class task:
        id = "t"

    is_over, messages, tools = False, OPENING, ()

    def __init__(self):
        self.count = 0

    async def reset(self):
        self.count = 0
        return self

    async def call(self, name, arguments):
        self.count += 1
        return (f"misled {self.count}" if self.count == MISLED else f"result {self.count}").ljust(4 * PER_MESSAGE)

    async def finish(self, text=None):
        return passed() if text == "42" else failed("wrong" if text is not None else "unfinished")


class Searcher:
    """Calls until it has made `wants` calls; then answers, unless it still sees the misleading result: then it calls on."""

    def __init__(self, wants=6):
        self.wants, self.made, self.views = wants, 0, []

    async def reply(self, messages, tools, params):
        if messages[-1].get("role") == "user" and "context window" in messages[-1]["content"]:
            return ChatReply({"role": "assistant", "content": "seen so far"}, StopReason.STOP, usage=self.usage(messages))
        seen = [message["content"] for message in messages if message.get("role") == "tool"]
        self.views.append([int(text.split()[-1]) for text in seen])
        if self.made >= self.wants and not any("misled" in text for text in seen):
            return ChatReply({"role": "assistant", "content": "42"}, StopReason.STOP, usage=self.usage(messages))
        self.made += 1
        call = {"id": f"c{self.made}", "type": "function", "function": {"name": "look", "arguments": json.dumps({})}}
        return ChatReply({"role": "assistant", "content": "", "tool_calls": [call]}, StopReason.STOP, usage=self.usage(messages))

    def usage(self, messages):
        return {"prompt_tokens": PER_MESSAGE * len(messages), "completion_tokens": PER_MESSAGE}


def run(strategy, wants=6, window=150, max_turns=30, share=0.8):
    policy = Searcher(wants)
    config = AgentConfig(max_turns=max_turns, window=window, strategy=strategy, trigger_share=share)
    trajectory = asyncio.run(play(World(), speaker_of(policy), config, SamplingParams(max_tokens=50), summariser=policy))
    return trajectory, policy.views


def resets(trajectory):
    return [number for number, turn in enumerate(trajectory.turns) if turn.is_reset]


def test_none_removes_nothing_and_ends_where_the_window_does():
    trajectory, views = run("none")
    assert trajectory.end is End.CONTEXT and not trajectory.verdict.passed and resets(trajectory) == []
    assert views == [list(range(1, n + 1)) for n in range(len(views))]


def test_discard_all_removes_every_round_and_the_policy_recovers():
    trajectory, views = run("discard_all")
    assert trajectory.verdict.passed and len(resets(trajectory)) == 1
    at = resets(trajectory)[0]
    assert views[at] == [] and views[at - 1] == list(range(1, at)), "all were seen until the reset, none after it"
    assert [m["content"] for m in trajectory.messages[:2]] == ["s", "q"]


def test_discard_75_removes_the_oldest_three_quarters_and_keeps_the_rest():
    trajectory, views = run("discard_75")
    at = resets(trajectory)[0]
    assert trajectory.verdict.passed and views[at] == list(range(1, at + 1))[-(at - -(-3 * at // 4)) :]
    assert MISLED not in views[at] and views[at], "the misleading third round is among the oldest; the newest stay"


def test_summary_restarts_from_the_question_and_the_summary():
    trajectory, views = run("summary")
    at = resets(trajectory)[0]
    assert trajectory.verdict.passed and views[at] == []
    assert not any(SUMMARY_HEADING in str(m.get("content")) for m in trajectory.messages), "what was said is kept as it was said"


def test_steps_count_on_across_resets():
    trajectory, _ = run("discard_all", wants=100, max_turns=25)
    assert trajectory.end is End.MAX_TURNS and trajectory.steps == 25 and len(resets(trajectory)) >= 3


def test_tokens_count_on_across_resets():
    policy = Searcher(100)
    config = AgentConfig(max_turns=100, max_tokens=170, window=150, strategy="discard_all")
    trajectory = asyncio.run(play(World(), speaker_of(policy), config, SamplingParams(max_tokens=50)))
    assert trajectory.end is End.MAX_TOKENS and trajectory.sampled_tokens == 170 and resets(trajectory)


@settings(max_examples=60, deadline=None)
@given(strategy=st.sampled_from(["discard_all", "discard_75", "summary"]), window=st.integers(80, 400), share=st.floats(0.5, 1.0))
def test_a_strategy_acts_exactly_where_the_context_exceeds_its_share(strategy, window, share):
    trajectory, views = run(strategy, wants=1000, window=window, max_turns=40, share=share)
    for number, turn in enumerate(trajectory.turns):
        before = views[number - 1] if number else []
        grown = [*before, number] if number else []
        assert turn.context_tokens <= share * window or turn.is_reset, "above the share it acts"
        if not turn.is_reset:
            assert views[number] == grown, "a policy sees all that was there and the newest result"
        elif strategy == "discard_75":
            gone = -(-3 * len(grown) // 4)
            assert views[number] == grown[gone:]
        else:
            assert views[number] == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=8))
def test_the_shortest_answered_run_is_chosen_ties_to_the_lowest_index(runs):
    class Run:
        def __init__(self, steps, answered):
            self.steps, self.answered = steps, answered

    index = fewest_steps([Run(*each) for each in runs])
    answered = [steps for steps, is_answered in runs if is_answered]
    if answered:
        assert runs[index] == (min(answered), True) and runs.index((min(answered), True)) == index
    else:
        assert index == 0


@pytest.mark.parametrize("strategy", ["none", "discard_all", "discard_75", "summary"])
def test_with_room_enough_no_strategy_does_anything(strategy):
    trajectory, views = run(strategy, wants=2, window=10000)
    assert trajectory.verdict.passed and resets(trajectory) == [] and views == [[], [1], [1, 2]]
