"""The program that plays gold plans: its thoughts say only what the plan's state holds, and it keeps no state itself."""

from __future__ import annotations

import asyncio
import json

import pytest

from rorqual.policy import SamplingParams
from rorqual.rollout.agent import AgentConfig, play, speaker_of
from rorqual.rollout.gold import GoldPolicy, final_text
from rorqual.rollout.system_prompts import TEMPLATES, system_prompt, with_system_prompt
from rorqual.rollout.trajectory import End
from rorqual.tasks import AsyncEpisode, open_episode
from rorqual.tasks.plans import Move, Plan, gold_plan
from tests.tasks.worlds import task, world

PLAN = Plan((Move("list", {}), Move("book", {"slot": "S-3", "seats": 2, "at": 100})), "Answer: 20")


def reply(policy, messages):
    return asyncio.run(policy.reply(messages, (), SamplingParams())).message


def played(thinking, detail="brief"):
    given = task()
    policy = GoldPolicy(gold_plan(given, world(), "inline"), thinking, detail, "s")
    episode = AsyncEpisode(open_episode(given, world(), "inline"))
    return asyncio.run(play(episode, speaker_of(policy), AgentConfig(), SamplingParams()))


@pytest.mark.parametrize("thinking", [True, False])
def test_a_gold_plan_played_through_the_agent_loop_is_accepted_by_the_verifier(thinking):
    trajectory = played(thinking)
    assert trajectory.end is End.SUBMITTED and trajectory.verdict.passed
    assert trajectory.verdict.measures["errors"] == 0
    thoughts = [turn.message.get("reasoning_content") for turn in trajectory.turns]
    assert all(thoughts) if thinking else not any(thoughts)


def test_a_thought_traces_a_value_to_the_call_that_gave_it_and_nothing_that_was_not_seen():
    asked = [{"role": "user", "content": "q"}]
    first = reply(GoldPolicy(PLAN), asked)
    assert first["reasoning_content"] == "First list." and json.loads(first["tool_calls"][0]["function"]["arguments"]) == {}
    seen = [*asked, first, {"role": "tool", "content": '[{"id": "S-3", "price": 20}]'}]
    second = reply(GoldPolicy(PLAN), seen)["reasoning_content"]
    assert second.startswith("slot S-3, from list.") and "seats" not in second and "at 100" not in second
    unseen = [*asked, first, {"role": "tool", "content": '[{"id": "S-37"}, {"id": "AS-3"}]'}]
    assert "S-3, from" not in reply(GoldPolicy(PLAN), unseen)["reasoning_content"]


def test_the_last_thought_and_message():
    turn = {"role": "assistant", "content": ""}
    seen = [turn, {"role": "tool", "content": "[]"}, turn, {"role": "tool", "content": "price 20"}]
    last = reply(GoldPolicy(PLAN), seen)
    assert last["content"] == "Answer: 20" and "20 stands in what book gave" in last["reasoning_content"]
    worked = reply(GoldPolicy(Plan((), "Answer: 4", work="2 and 2 are 4.")), [])
    assert worked["reasoning_content"] == "2 and 2 are 4."
    assert final_text(Plan((Move("python", {}),), None), ["one\nAnswer: 3\n\n"]) == "Answer: 3"


def test_full_detail_says_the_whole_plan_and_what_came():
    texts = [turn.message["reasoning_content"] for turn in played(True, "full").turns]
    assert "The plan: list_slots, book, submit." in texts[0] and "list_slots gave 3 rows." in texts[1]


def test_words_vary_with_the_seed_and_repeat_with_it():
    policies = [GoldPolicy(PLAN, seed=str(seed)) for seed in (1, 1, *range(2, 12))]
    texts = [policy.thought(1, ["S-3"]) for policy in policies]
    assert texts[0] == texts[1] and len(set(texts)) > 1


def test_system_prompts_stand_before_a_task_s_own_and_fill_their_slots():
    messages = ({"role": "system", "content": "Rules."}, {"role": "user", "content": "q"})
    prompt = system_prompt("merged", "search", 7)
    joined = with_system_prompt(messages, prompt)
    assert joined[0]["content"] == f"{prompt}\n\nRules." and joined[1:] == messages[1:]
    assert with_system_prompt(messages[1:], prompt)[0] == {"role": "system", "content": prompt}
    assert "at most 7 calls" in prompt and "expert researcher" in prompt
    assert not [kind for kind in TEMPLATES if "{" in system_prompt(kind, "unheard of")]
    assert messages[0]["content"] == "Rules.", "the task's own messages are not changed"
