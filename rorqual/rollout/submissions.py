"""Contests at test time (paper, appendix D): sample many programs, drop those that fail the given samples, submit by a rule.

    IOI    500 samples a problem; those that fail the given samples, ran over length or refuse are dropped; of the rest the 50
           with the longest thinking are submitted
    ICPC   32 samples, the same filter; submitted one after another until one is accepted

The order of ICPC's submissions is unpublished; longest thinking first is taken there too. How a program runs is not this file's
matter: `passes_samples` is given (rorqual.evals.submissions has the one that runs it in the sandbox).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

from rorqual.errors import require
from rorqual.policy import ChatPolicy, Message, SamplingParams, StopReason

Order = Literal["longest_thinking", "shortest_thinking", "sampled"]


@dataclass(frozen=True)
class ContestRule:
    """How many programs are sampled, how many submitted, and which first."""

    samples: int
    submissions: int
    order: Order = "longest_thinking"
    drop_copies: bool = True
    """Of programs that are equal but for spaces only the first in order is submitted; the paper does not say."""

    def __post_init__(self) -> None:
        require(
            self,
            samples=(self.samples >= 1, "at least 1"),
            submissions=(1 <= self.submissions <= self.samples, "from 1 to samples"),
        )


IOI = ContestRule(samples=500, submissions=50)
ICPC = ContestRule(samples=32, submissions=32)


class Dropped(StrEnum):
    """Why a sample is not submitted."""

    FAILED = "failed"  # the policy gave no reply
    OVER_LENGTH = "over_length"
    NO_PROGRAM = "no_program"
    REFUSED = "refused"
    FAILS_SAMPLES = "fails_samples"
    UNDECIDED = "undecided"  # the sandbox could not run it
    COPY = "copy"
    SURPLUS = "surplus"  # more than may be submitted


@dataclass(frozen=True)
class Attempt:
    """One sample. program: None where the reply holds none."""

    program: str | None
    thinking: int
    """Its length: tokens where the policy counts them, else characters."""
    text: str = ""
    stop_reason: StopReason = StopReason.STOP


@dataclass(frozen=True)
class Selection:
    """What is submitted, in this order (places among the attempts), and why each other one is not."""

    submitted: tuple[int, ...]
    dropped: Mapping[int, Dropped]


PassesSamples = Callable[[str], Awaitable[bool | None]]
"""Whether a program gives the right output on all given samples; None where that could not be found out."""
IsRefusal = Callable[[str], Awaitable[bool]]
"""Whether a reply's text refuses the problem instead of solving it."""


async def sample(
    policy: ChatPolicy, messages: Sequence[Message], rule: ContestRule, params: SamplingParams,
    program_of: Callable[[str], str | None], concurrency: int = 64,
) -> list[Attempt]:  # fmt: skip
    """The rule's number of samples, each with a seed of its own."""
    slots = asyncio.Semaphore(concurrency)

    async def one(number: int) -> Attempt:
        async with slots:
            seeded = replace(params, seed=None if params.seed is None else params.seed + number)
            reply = await policy.reply(messages, (), seeded)
        text = str(reply.message.get("content") or "")
        thinking = reply.usage.get("reasoning_tokens") or len(str(reply.message.get("reasoning_content") or ""))
        return Attempt(program_of(text), thinking, text, reply.stop_reason)

    return await asyncio.gather(*(one(number) for number in range(rule.samples)))


async def select(
    attempts: Sequence[Attempt], rule: ContestRule, passes_samples: PassesSamples, is_refusal: IsRefusal | None = None
) -> Selection:
    """Filter and order by the rule. A program that stands twice is run once."""
    verdicts: dict[str, asyncio.Task[bool | None]] = {}

    async def why_dropped(attempt: Attempt) -> Dropped | None:
        if attempt.stop_reason is StopReason.LENGTH:
            return Dropped.OVER_LENGTH
        if attempt.stop_reason is not StopReason.STOP:
            return Dropped.FAILED
        if attempt.program is None or not attempt.program.strip():
            return Dropped.NO_PROGRAM
        if is_refusal is not None and await is_refusal(attempt.text):
            return Dropped.REFUSED
        if attempt.program not in verdicts:
            verdicts[attempt.program] = asyncio.ensure_future(passes_samples(attempt.program))  # type: ignore[arg-type]
        passed = await verdicts[attempt.program]
        return Dropped.UNDECIDED if passed is None else None if passed else Dropped.FAILS_SAMPLES

    reasons = await asyncio.gather(*map(why_dropped, attempts))
    dropped = {place: reason for place, reason in enumerate(reasons) if reason is not None}
    kept = _ordered([place for place, reason in enumerate(reasons) if reason is None], attempts, rule.order)
    unique, copies = _without_copies(kept, attempts) if rule.drop_copies else (kept, [])
    dropped |= dict.fromkeys(copies, Dropped.COPY) | dict.fromkeys(unique[rule.submissions :], Dropped.SURPLUS)
    return Selection(tuple(unique[: rule.submissions]), dropped)


def _ordered(places: Sequence[int], attempts: Sequence[Attempt], order: Order) -> list[int]:
    sign = {"longest_thinking": -1, "shortest_thinking": 1, "sampled": 0}[order]
    return sorted(places, key=lambda place: (sign * attempts[place].thinking, place))


def _without_copies(places: Sequence[int], attempts: Sequence[Attempt]) -> tuple[list[int], list[int]]:
    seen, unique, copies = set[str](), list[int](), list[int]()
    for place in places:
        bare = re.sub(r"[ \t]+(?=\n|$)|\n(?=\s*\n)", "", str(attempts[place].program)).strip()
        (copies if bare in seen else unique).append(place)
        seen.add(bare)
    return unique, copies


def refusal_judge(policy: ChatPolicy, params: SamplingParams) -> IsRefusal:
    """A policy as the judge of refusals (the paper has V3.2-Exp remove them). An answer that is not yes keeps the attempt."""

    async def is_refusal(text: str) -> bool:
        question = f"Does this reply refuse to solve the problem, or give up on it? Answer yes or no.\n\nReply:\n{text}"
        reply = await policy.reply([{"role": "user", "content": question}], (), params)
        return str(reply.message.get("content") or "").strip().lower().startswith("yes")

    return is_refusal
