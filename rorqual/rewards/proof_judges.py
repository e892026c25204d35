"""Verifiers and meta-verifiers as policies, and the episode that has an attempt judged by them.

Any ChatPolicy plays either role: a trained checkpoint, an endpoint, a program. What it says is read strictly; a reply that breaks
the form is asked for again, and one that can't be had is an `Unjudged`: the attempt then has no reward, never one of 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, TypeVar

from rorqual.policy import ChatPolicy, SamplingParams, StopReason
from rorqual.rewards.proofs import ProofReward, ProofWeights, generator_reward, verifier_reward
from rorqual.tasks.episode import Opening
from rorqual.tasks.proof_tasks import Role
from rorqual.tasks.proofs import (
    Evaluation,
    Malformed,
    Messages,
    Proof,
    Words,
    meta_messages,
    read_evaluation,
    read_meta_evaluation,
    read_proof,
    verifier_messages,
)
from rorqual.tasks.task import Task
from rorqual.tasks.verdict import Outcome, Verdict, invalid

Read = TypeVar("Read", Evaluation, Proof)


@dataclass(frozen=True)
class Unjudged:
    """A judgement that could not be had."""

    reason: str


async def ask_verifier(
    policy: ChatPolicy, problem: str, solution: str, params: SamplingParams, name: str = "", tries: int = 2,
    words: Words = "full",
) -> Evaluation | Unjudged:  # fmt: skip
    """A verifier's evaluation of a proof. name: makes a seed of its own from that of `params`."""
    return await ask(policy, verifier_messages(problem, solution, words), read_evaluation, params, f"verify/{name}", tries)


async def ask_meta_verifier(
    policy: ChatPolicy, problem: str, solution: str, evaluation: str, params: SamplingParams, name: str = "", tries: int = 2,
    words: Words = "full",
) -> Evaluation | Unjudged:  # fmt: skip
    """A meta-verifier's evaluation of an evaluation; its score is the quality R_meta."""
    messages = meta_messages(problem, solution, evaluation, words)
    return await ask(policy, messages, read_meta_evaluation, params, f"meta/{name}", tries)


async def ask(
    policy: ChatPolicy, messages: Messages, read: Callable[[str | None], Read | Malformed], params: SamplingParams, name: str,
    tries: int,
) -> Read | Unjudged:  # fmt: skip
    """Ask until the reply keeps the form. Each try has a seed of its own, made of that of `params` and the name."""
    reason = ""
    for attempt in range(tries):
        seed = None if params.seed is None else seed_of(params.seed, f"{name}/{attempt}")
        reply = await policy.reply(messages, (), replace(params, seed=seed))
        if reply.stop_reason not in (StopReason.STOP, StopReason.CONSTRAINT):
            reason = str(reply.message.get("failure") or reply.stop_reason)
            continue
        found = read(reply.message.get("content"))
        if not isinstance(found, Malformed):
            return found
        reason = str(found)
    return Unjudged(f"{name.partition('/')[0]}: {reason}")


def seed_of(seed: int, name: str) -> int:
    """A seed for what is named."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest(), "little")


@dataclass(frozen=True)
class Judges:
    """Who judges the attempts of a stage, and how often each is asked."""

    verifier: ChatPolicy | None = None
    """Scores proofs; None where no proofs are attempted."""
    meta_verifier: ChatPolicy | None = None
    """None: R_meta is 1, as before the first meta-verifier is trained."""
    params: SamplingParams = field(default_factory=lambda: SamplingParams(max_tokens=65536, seed=0))
    verifications: int = 1
    """Evaluations of each proof; R_Y is the mean of their scores."""
    meta_checks: int = 1
    """Of each analysis; R_meta is their mean."""
    tries: int = 3
    words: Words = "full"
    weights: ProofWeights = field(default_factory=ProofWeights)


class JudgedProof:
    """One attempt at a proof task whose verdict's score is the role's reward; an asynchronous episode, as `play` takes it."""

    is_over = False

    def __init__(self, task: Task, judges: Judges):
        self.task, self.judges = task, judges

    async def reset(self) -> Opening:
        return Opening(self.task.messages, self.task.tools)

    async def call(self, name: str, arguments: dict[str, Any] | str) -> str:
        return f"there is no tool {name}; answer in text"

    async def finish(self, text: str | None = None) -> Verdict:
        found = await judged(self.task, text, self.judges)
        if isinstance(found, Unjudged):
            return invalid(found.reason)
        outcome = Outcome.PASSED if found.value >= 1 - 1e-9 else Outcome.FAILED
        return Verdict(outcome, found.value, (found.problem,) if found.problem else (), found.terms)


async def judged(task: Task, text: str | None, judges: Judges) -> ProofReward | Unjudged:
    """The reward of a reply to a proof task, by the task's role."""
    payload, role = task.payload, Role(task.payload["role"])
    if role is Role.META_VERIFY:
        return verifier_reward(read_meta_evaluation(text), payload["quality"])
    if role is Role.VERIFY:
        reply = read_evaluation(text)
        meta = await _meta(task, payload["solution"], reply, judges)
        return meta if isinstance(meta, Unjudged) else verifier_reward(reply, payload["score"], meta)
    proof = read_proof(text)
    if isinstance(proof, Malformed):
        return generator_reward(proof, 0.0, 0.0, judges.weights)
    score = await _proof_score(task, proof, judges)
    meta = await _meta(task, proof.solution, proof.self_evaluation, judges)
    failure = next((each for each in (score, meta) if isinstance(each, Unjudged)), None)
    return failure or generator_reward(proof, float(score), float(meta), judges.weights)  # type: ignore[arg-type]


async def _proof_score(task: Task, proof: Proof, judges: Judges) -> float | Unjudged:
    if judges.verifier is None:
        return Unjudged("verify: no verifier was given")
    found = []
    for number in range(judges.verifications):
        each = await ask_verifier(
            judges.verifier, task.payload["problem"], proof.solution, judges.params, f"{task.id}/{number}", judges.tries,
            judges.words,
        )  # fmt: skip
        if isinstance(each, Unjudged):
            return each
        found.append(each.score)
    return fmean(found)


async def _meta(task: Task, solution: str, reply: Evaluation | Malformed, judges: Judges) -> float | Unjudged:
    """R_meta of an analysis; a malformed one needs none, its reward is 0 already."""
    if judges.meta_verifier is None or isinstance(reply, Malformed):
        return 1.0
    found = []
    for number in range(judges.meta_checks):
        each = await ask_meta_verifier(
            judges.meta_verifier, task.payload["problem"], solution, reply.text, judges.params, f"{task.id}/{number}",
            judges.tries, judges.words,
        )  # fmt: skip
        if isinstance(each, Unjudged):
            return each
        found.append(each.score)
    return fmean(found)
