"""Tasks that a rubric judge scores: writing, questions and answers, alignment [V3.2, 3.1].

General tasks are judged by a generative reward model with each prompt's own rubric. Here the judge stands in the episode: its
score becomes the verdict, is kept with the trajectory, and so is asked for once, whatever is killed or resumed. Rules that a
program can check stay the verifier's; without a judge they are all there is. A judgement that could not be had is an invalid
verdict, which takes the attempt out of its group; it is never a score of 0.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from rorqual.config import load
from rorqual.errors import require
from rorqual.policy import ChatPolicy, SamplingParams
from rorqual.rewards.rubric import Criterion, Judgement, judge
from rorqual.rollout.endpoint import EndpointConfig, EndpointPolicy
from rorqual.tasks.episode import AsyncEpisode, Episode
from rorqual.tasks.verdict import Outcome, Verdict, failed, invalid

GENERAL_RUBRIC = (
    Criterion("instructions", "It does what the prompt asks, all of it and nothing else.", 2.0),
    Criterion("substance", "What it says is right, relevant and to the point."),
    Criterion("language", "It is well written, in the language of the prompt, without mixing languages."),
    Criterion("harm", "It is rude, deceptive or dangerous.", -2.0),
)


@dataclass(frozen=True)
class JudgeConfig:
    """Who judges what. The endpoint's key is read from the environment."""

    endpoint: EndpointConfig
    domains: tuple[str, ...] = ("writing",)
    rubric: tuple[Criterion, ...] = GENERAL_RUBRIC
    """For prompts that bring none (`payload["rubric"]`: a list of name, text and weight)."""
    share: float = 1.0
    """Of the judge's score in the verdict's; the rest is the verifier's."""
    pass_mark: float = 0.7
    """The score from which an attempt counts as passed: for success rates and rejection sampling, not for rewards."""
    temperature: float = 0.0
    max_tokens: int = 2048
    tries: int = 2

    def __post_init__(self) -> None:
        require(
            self,
            rubric=(any(line.weight > 0 for line in self.rubric), "a criterion of positive weight"),
            share=(0 < self.share <= 1, "in (0, 1]"),
            pass_mark=(0 <= self.pass_mark <= 1, "in [0, 1]"),
            tries=(self.tries >= 1, "at least 1"),
        )


def open_judge(source: str | None) -> JudgeConfig | None:
    """From an address, or a TOML file with a table [judge]; None for none."""
    if not source:
        return None
    if source.startswith(("http://", "https://")):
        return JudgeConfig(EndpointConfig(source))
    return load(JudgeConfig, source, table="judge")


@dataclass(frozen=True)
class Judge:
    """A config with the policy that answers for it; None asks the config's endpoint."""

    config: JudgeConfig
    policy: ChatPolicy | None = None

    async def __call__(self, task: Any, answer: str) -> Judgement:
        rubric = tuple(Criterion(**line) for line in task.payload.get("rubric", ())) or self.config.rubric
        params = SamplingParams(max_tokens=self.config.max_tokens, temperature=self.config.temperature)
        async with self._asked() as policy:
            return await judge(policy, task.prompt, answer, rubric, params, self.config.tries)

    def _asked(self) -> AbstractAsyncContextManager[ChatPolicy]:
        # A client belongs to one event loop, and every batch of rollouts has its own.
        return EndpointPolicy(self.config.endpoint) if self.policy is None else _given(self.policy)


@asynccontextmanager
async def _given(policy: ChatPolicy) -> AsyncIterator[ChatPolicy]:
    yield policy


class JudgedEpisode(AsyncEpisode):
    """An episode whose last message a judge scores."""

    def __init__(self, episode: Episode, judge: Judge):
        super().__init__(episode)
        self.judge = judge

    async def finish(self, text: str | None = None) -> Verdict:
        verified = await super().finish(text)
        if not text or not text.strip():
            return failed("no answer")
        return joined(verified, await self.judge(self.task, text), self.judge.config)


def joined(verified: Verdict, judgement: Judgement, config: JudgeConfig) -> Verdict:
    """One verdict of the verifier's and the judge's. Both marks and the verifier's own score stay as measures."""
    if judgement.score is None:
        return invalid(f"judge: {judgement.reason}")
    if config.share < 1 and verified.score is None:
        return verified
    score = config.share * judgement.score + (1 - config.share) * (verified.score or 0.0)
    passed = score >= config.pass_mark
    measures = {**verified.measures, "judged": judgement.score, **{f"mark/{k}": v for k, v in judgement.marks.items()}}
    if verified.score is not None:
        measures["verified"] = verified.score
    reasons = () if passed else (f"judged {score:.2f}, below {config.pass_mark}", *verified.reasons)
    return Verdict(Outcome.PASSED if passed else Outcome.FAILED, score, reasons, measures)
