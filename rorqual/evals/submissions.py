"""A contest problem played as the paper plays it: sample, filter on the given samples in the sandbox, submit by the rule."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rorqual.evals.answers import code_block
from rorqual.evals.benchmark import Options
from rorqual.evals.programs import Case, Undecided, in_sandbox, passes
from rorqual.policy import ChatPolicy, Message, SamplingParams
from rorqual.rollout.submissions import Attempt, ContestRule, IsRefusal, PassesSamples, Selection, sample, select
from rorqual.tasks.verdict import failed, passed


@dataclass(frozen=True)
class Played:
    """All samples of a problem, and which are submitted in which order."""

    attempts: tuple[Attempt, ...]
    selection: Selection

    @property
    def submissions(self) -> list[str]:
        """The programs, in order, as answers that a scorer reads."""
        return [f"```python\n{self.attempts[place].program}\n```" for place in self.selection.submitted]


def samples_in_sandbox(samples: Sequence[Sequence[str]], options: Options, concurrency: int = 2) -> PassesSamples:
    """passes_samples over [input, output] pairs: each program in a sandbox of its own, `concurrency` at a time."""
    cases, slots = [Case(*pair) for pair in samples], asyncio.Semaphore(concurrency)

    def run(program: str) -> bool | None:
        def judge(sandbox: Any) -> Any:
            for case in cases:
                reason = passes(sandbox, program, case, "", options.timeout_s)
                if reason:
                    return failed(reason)
            return passed()

        verdict = in_sandbox(options, judge)
        return verdict.passed if verdict.is_valid else None

    async def passes_samples(program: str) -> bool | None:
        async with slots:
            return await asyncio.to_thread(run, program)

    return passes_samples


async def play_contest(
    policy: ChatPolicy, messages: Sequence[Message], samples: Sequence[Sequence[str]], rule: ContestRule,
    params: SamplingParams, options: Options, is_refusal: IsRefusal | None = None,
) -> Played:  # fmt: skip
    """Sample and select for one problem. samples: the [input, output] pairs that its statement gives."""
    attempts = await sample(policy, messages, rule, params, code_block)
    selection = await select(attempts, rule, samples_in_sandbox(samples, options), is_refusal)
    return Played(tuple(attempts), selection)


__all__ = ["Played", "Undecided", "play_contest", "samples_in_sandbox"]
