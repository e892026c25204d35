"""A contest problem played as the paper plays it, its programs run in the sandbox."""

from __future__ import annotations

import asyncio

from rorqual.evals.benchmark import Options
from rorqual.evals.submissions import play_contest
from rorqual.policy import ChatReply, SamplingParams, StopReason
from rorqual.rollout.submissions import ContestRule, Dropped

REPLIES = (
    ("print(sum(map(int, input().split())))", 3),
    ("print(7)", 9),
    ("import sys\nprint(sum(map(int, sys.stdin.read().split())))", 5),
    ("while True: pass", 8),
    ("print(sum(map(int, input().split())))", 1),
)


class Contestant:
    async def reply(self, messages, tools, params):
        program, thinking = REPLIES[params.seed]
        message = {"role": "assistant", "content": f"So:\n```python\n{program}\n```", "reasoning_content": "x" * thinking}
        return ChatReply(message, StopReason.STOP)


def test_programs_that_fail_the_given_samples_are_not_submitted_and_the_longest_thinking_goes_first():
    question = [{"role": "user", "content": "Add the two numbers."}]
    rule, options = ContestRule(samples=5, submissions=2), Options(timeout_s=2.0)
    played = asyncio.run(
        play_contest(Contestant(), question, [["1 2", "3"], ["10 -4", "6"]], rule, SamplingParams(seed=0), options)
    )
    assert played.selection.submitted == (2, 0)
    assert played.selection.dropped == {1: Dropped.FAILS_SAMPLES, 3: Dropped.FAILS_SAMPLES, 4: Dropped.COPY}
    assert played.submissions[0].startswith("```python\nimport sys")
