"""A judge's word becomes the verdict; what it could not say drops the attempt, and never scores it 0."""

from __future__ import annotations

import asyncio
import json

import pytest

from rorqual.config import dump, load
from rorqual.errors import FieldErrors
from rorqual.policy import ChatReply, SamplingParams, StopReason
from rorqual.rewards.domains import DomainReward, reward
from rorqual.rewards.judging import GENERAL_RUBRIC, Judge, JudgeConfig, JudgedEpisode, joined, open_judge
from rorqual.rewards.rubric import Criterion, Judgement
from rorqual.rollout.agent import AgentConfig, play, speaker_of
from rorqual.rollout.endpoint import EndpointConfig
from rorqual.rollout.gold import GoldPolicy
from rorqual.stages.task_set import open_tasks
from rorqual.tasks import Store, Task, TaskRow, open_episode, task_record
from rorqual.tasks.plans import Plan
from rorqual.tasks.verdict import Outcome, Verdict, failed, passed

RUBRIC = [{"name": "red", "text": "It says red."}, {"name": "shouts", "text": "It shouts.", "weight": -1.0}]
RULES = {"kind": "constraints", "rules": [{"rule": "includes", "word": "red"}]}
CONFIG = JudgeConfig(EndpointConfig("http://127.0.0.1:9"), share=1.0, pass_mark=0.7)


class Scripted:
    """A judge that marks by looking at the text; it keeps what it was asked."""

    def __init__(self, broken=False):
        self.broken, self.asked = broken, []

    async def reply(self, messages, tools, params):
        self.asked.append(messages[1]["content"])
        answer = messages[1]["content"].partition("Answer:\n")[2].partition("\n\nRubric:")[0]
        marks = {"red": 10 if "red" in answer else 0, "shouts": 10 if answer.isupper() else 0}
        return ChatReply({"role": "assistant", "content": "well..." if self.broken else json.dumps(marks)}, StopReason.STOP)


def text_task(**payload):
    return Task("w", "writing", ({"role": "user", "content": "Say red."},), payload={"check": RULES, "rubric": RUBRIC, **payload})


def attempt(answer, judge):
    episode = JudgedEpisode(open_episode(text_task(), None, "inline"), judge)
    return asyncio.run(play(episode, speaker_of(GoldPolicy(Plan((), answer))), AgentConfig(), SamplingParams()))


def test_the_judge_s_score_is_the_outcome_of_the_reward():
    policy = Scripted()
    good, loud, none = (attempt(text, Judge(CONFIG, policy)) for text in ("a red rose", "A ROSE", "a rose"))
    assert good.verdict.passed and good.verdict.score == 1.0 and good.verdict.measures["mark/red"] == 10
    assert loud.verdict.score == 0.0 and not loud.verdict.passed
    assert none.verdict.score == 0.5 and "judged 0.50, below 0.7" in none.verdict.reasons
    assert "Question:\nSay red." in policy.asked[0] and "- shouts: It shouts." in policy.asked[0]
    weights = DomainReward(format=0, length=0, language=0)
    assert [reward(t, weights).value for t in (good, loud, none)] == [1.0, 0.0, 0.5]


def test_a_judgement_that_could_not_be_had_is_invalid_and_drops_the_attempt():
    policy = Scripted(broken=True)
    found = attempt("a red rose", Judge(CONFIG, policy))
    assert found.verdict.outcome is Outcome.INVALID and "no JSON object" in found.verdict.reasons[0]
    assert len(policy.asked) == 2 and reward(found, DomainReward()).value is None


def test_silence_fails_without_asking():
    policy = Scripted()
    assert not attempt("  ", Judge(CONFIG, policy)).verdict.passed and policy.asked == []


def test_verifier_and_judge_share_the_score():
    config = JudgeConfig(EndpointConfig("http://127.0.0.1:9"), share=0.25, pass_mark=0.8)
    both = joined(passed(), Judgement(0.4, {"x": 4.0}), config)
    assert both.score == pytest.approx(0.25 * 0.4 + 0.75) and both.passed and both.measures["verified"] == 1.0
    assert joined(failed("words"), Judgement(1.0, {}), config).reasons == ("judged 0.25, below 0.8", "words")
    broken = Verdict(Outcome.INVALID, None, ("checker",))
    assert joined(broken, Judgement(1.0, {}), config) is broken
    assert joined(broken, Judgement(1.0, {}), CONFIG).passed, "with the whole share the verifier is not needed"


def test_only_its_domains_are_judged_and_the_lineage_says_by_what(tmp_path):
    store = Store(tmp_path)
    store.append(task_record(TaskRow(text_task()), (0,)))
    maths = {"check": {"kind": "number", "value": "4"}, "gold": "4"}
    store.append(task_record(TaskRow(Task("m", "maths", ({"role": "user", "content": "2+2"},), payload=maths)), (1,)))
    store.seal({})
    tasks = open_tasks(tmp_path, "inline", "all", CONFIG)
    assert isinstance(tasks.open("w"), JudgedEpisode) and not isinstance(tasks.open("m"), JudgedEpisode)
    assert tasks.settings["judge"]["pass_mark"] == 0.7 and tasks.of(["maths"]).judge is tasks.judge
    assert not isinstance(open_tasks(tmp_path, "inline", "all").open("w"), JudgedEpisode)


def test_a_judge_comes_from_an_address_or_a_table(tmp_path):
    assert open_judge(None) is None and open_judge("http://h:1").endpoint.url == "http://h:1"
    (tmp_path / "j.toml").write_text('[judge]\nshare = 0.5\nendpoint = { url = "http://h:2", model = "m" }\n')
    found = open_judge(str(tmp_path / "j.toml"))
    assert found.share == 0.5 and found.endpoint.model == "m" and found.rubric == GENERAL_RUBRIC
    (tmp_path / "k.toml").write_text(dump(found))
    assert load(JudgeConfig, tmp_path / "k.toml") == found
    with pytest.raises(FieldErrors, match="a criterion of positive weight"):
        JudgeConfig(EndpointConfig("http://h:1"), rubric=(Criterion("harm", "bad", -1.0),))
