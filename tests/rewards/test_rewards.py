"""Rewards: each term by hand-made cases, their sum by domain, and judges that misbehave."""

from __future__ import annotations

import asyncio
import math

import pytest

from rorqual.policy import ChatReply, SamplingParams, StopReason
from rorqual.rewards.domains import DomainReward, RewardConfig, reward
from rorqual.rewards.rubric import Criterion, judge, score
from rorqual.rewards.terms import LengthPenalty, language_consistency, outcome, well_formed
from rorqual.rollout.trajectory import End, Trajectory, Turn
from rorqual.tasks.verdict import Outcome, Verdict, failed, passed


def played(end=End.ANSWERED, verdict=None, text="An answer.", reasoning="", sampled=10, asked="What is it?"):
    turn = Turn({"role": "assistant", "content": text, "reasoning_content": reasoning}, None, sampled_tokens=sampled)
    return Trajectory("t", 0, (turn,), end, verdict, ({"role": "user", "content": asked},))


def test_an_outcome_that_could_not_be_had_is_none_and_never_zero():
    assert outcome(played(verdict=passed())) == 1.0 and outcome(played(verdict=failed("x"))) == 0.0
    assert outcome(played()) is None
    assert outcome(played(verdict=Verdict(Outcome.INVALID, None, ("raised",)))) is None
    assert outcome(played(End.WORLD_FAILED, passed())) is None
    assert reward(played(), DomainReward()).value is None
    assert reward(played(), DomainReward(), judged=math.nan).reason == "the outcome is not finite"


@pytest.mark.parametrize(("tokens", "penalty"), [(0, 0), (100, 0), (150, -0.5), (200, -1), (9999, -1)])
def test_length_is_free_then_falls_linearly(tokens, penalty):
    assert LengthPenalty(100, 200)(played(sampled=tokens)) == penalty


def test_language_consistency_is_the_share_of_letters_in_the_prompts_script():
    assert language_consistency(played(text="plain English, 123 + 4")) == 1
    assert language_consistency(played(text="abcd", reasoning="答案")) == pytest.approx(4 / 6)
    assert language_consistency(played(asked="这是什么?", text="答案是 ab")) == pytest.approx(3 / 5)
    assert language_consistency(played(asked="", text="x")) == language_consistency(played(text="42")) == 1


def test_a_right_answer_beats_any_wrong_one_under_the_default_weights():
    long_and_right = reward(played(verdict=passed(), sampled=10**6, text="答"), DomainReward()).value
    short_and_wrong = reward(played(verdict=failed("x")), DomainReward()).value
    assert long_and_right > short_and_wrong
    assert well_formed(played(End.MALFORMED)) == well_formed(played(End.CUT)) == 0


def test_domains_have_weights_of_their_own():
    config = RewardConfig(by_domain={"maths": DomainReward(length=0.0, format=0, language=0)})
    assert reward(played(verdict=passed(), sampled=10**6), config.of("maths")).value == 1.0
    assert config.of("search") == DomainReward()


class Judge:
    def __init__(self, *texts):
        self.texts = list(texts)

    async def reply(self, messages, tools, params):
        return ChatReply({"role": "assistant", "content": self.texts.pop(0)}, StopReason.STOP)


RUBRIC = [Criterion("clear", "is it clear?", 2.0), Criterion("rude", "is it rude?", -1.0)]


def judged(*texts):
    return asyncio.run(judge(Judge(*texts), "q", "a", RUBRIC, SamplingParams()))


def test_marks_become_a_score_between_the_worst_and_the_best():
    assert judged('Here: {"clear": 10, "rude": 0}').score == 1.0
    assert judged('{"clear": 0, "rude": 10}').score == 0.0
    assert score({"clear": 5.0, "rude": 0.0}, RUBRIC) == pytest.approx((1.0 + 1.0) / 3.0)


@pytest.mark.parametrize(
    "text", ["no object", '{"clear": 3}', '{"clear": 11, "rude": 0}', '{"clear": true, "rude": 0}', '{"clear": }']
)
def test_a_judge_that_misbehaves_is_asked_again_and_then_gives_no_score(text):
    assert judged(text, '{"clear": 10, "rude": 0}').score == 1.0
    found = judged(text, text)
    assert found.score is None and found.reason
