"""Programs in the roles of prover, verifier and meta-verifier over the formal system: exact ones, and ones planted to cheat.

Each is a ChatPolicy that reads what it needs from its prompt. A role's reward must tell the exact ones from the planted; and a
stage can run on them where there is no model to judge.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rorqual.policy import ChatReply, Message, SamplingParams, StopReason
from rorqual.rewards.proofs import evaluation_quality
from rorqual.tasks.derivations import Finding, Flaw, check, read_findings, score_of, write_findings
from rorqual.tasks.proofs import Malformed, asked_parts, read_evaluation, write_evaluation, write_meta_evaluation

Reply = Callable[[dict[str, str], random.Random], str]
"""(the parts of the prompt, noise from the request's seed) -> the text of the reply."""


class ProofProgram:
    """A ChatPolicy that says what a function of the prompt's parts gives."""

    def __init__(self, answer: Reply):
        self.answer = answer

    async def reply(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], params: SamplingParams) -> ChatReply:
        text = self.answer(asked_parts(messages), random.Random(params.seed))
        usage = {"prompt_tokens": len(str(messages[-1]["content"])) // 4, "completion_tokens": len(text) // 4}
        return ChatReply({"role": "assistant", "content": text}, StopReason.STOP, usage=usage)


def exact_verifier(parts: Mapping[str, str], noise: random.Random) -> str:
    """Every flaw, and the score that follows."""
    findings = check(parts["problem"], parts["solution"])
    return write_evaluation(write_findings(findings), score_of(findings))


def always_one(parts: Mapping[str, str], noise: random.Random) -> str:
    """Praises whatever it sees."""
    return write_evaluation("Every step is right.", 1.0)


def always_zero(parts: Mapping[str, str], noise: random.Random) -> str:
    """Damns whatever it sees, for a flaw that it invents in a line where there is none."""
    known = check(parts["problem"], parts["solution"])
    lines = range(1, len(parts["solution"].splitlines()) + 2)
    invented = next(each for line in lines if (each := Finding(line, Flaw.FALSE)) not in known)
    return write_evaluation(write_findings([invented]), 0.0)


def exact_meta_verifier(parts: Mapping[str, str], noise: random.Random) -> str:
    """The quality of an evaluation, by the rules: are the named flaws there, and does the score follow from them?"""
    reply = read_evaluation(parts["evaluation"])
    if isinstance(reply, Malformed):
        return write_meta_evaluation(f"Unreadable: {reply}.", 0.5)
    named, true = read_findings(reply.analysis), set(check(parts["problem"], parts["solution"]))
    reasonable = [finding in true for finding in named]
    wrong = [finding for finding in named if finding not in true]
    quality = evaluation_quality(reasonable, score_follows=reply.score == score_of(named))
    return write_meta_evaluation("\n".join(f"There is no {each}" for each in wrong) or "The named flaws exist.", quality)


def flawed(program: Reply, error: float, other: Reply) -> Reply:
    """A program that for a share of its requests answers as another one."""

    def answer(parts: dict[str, str], noise: random.Random) -> str:
        chosen = other if noise.random() < error else program
        return chosen(parts, noise)

    return answer


PROGRAMS: dict[str, Reply] = {
    "exact_verifier": exact_verifier,
    "exact_meta_verifier": exact_meta_verifier,
    "always_one": always_one,
    "always_zero": always_zero,
}
