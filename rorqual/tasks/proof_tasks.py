"""The proof family: prove a statement, evaluate a proof, or judge an evaluation.

    payload   role: prove, verify or meta_verify        system: "derivation", or empty for mathematics in words
              problem                                   solution (verify, meta_verify), evaluation (meta_verify)
              score (verify): the true one              quality (meta_verify): the true one        gold: a reply that passes

In the formal system (`rorqual.tasks.derivations`) a program judges every role exactly. Outside it a proof has no exact judge: the
task's own verdict is then invalid by name, and rewards come from policies (`rorqual.rewards.proof_judges`).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from rorqual.tasks import derivations
from rorqual.tasks.episode import Opening, error_text
from rorqual.tasks.families import Family
from rorqual.tasks.proofs import (
    Malformed,
    Messages,
    Words,
    meta_messages,
    prover_messages,
    read_evaluation,
    read_meta_evaluation,
    read_proof,
    verifier_messages,
)
from rorqual.tasks.task import GateResult, Provenance, Task, TaskError, World, digest
from rorqual.tasks.verdict import Outcome, Verdict, failed, invalid, passed

DERIVATION = "derivation"


class Role(StrEnum):
    """Who is asked."""

    PROVE = "prove"
    VERIFY = "verify"
    META_VERIFY = "meta_verify"


def proof_task(
    role: Role, payload: dict[str, Any], words: Words = "full", tier: int = 0, *provenance: Provenance
) -> Task:  # fmt: skip
    """A task of the family; its prompt follows from role, payload and words."""
    problem, solution = payload["problem"], payload.get("solution", "")
    messages: Messages
    match role:
        case Role.PROVE:
            messages = prover_messages(problem, words)
        case Role.VERIFY:
            messages = verifier_messages(problem, solution, words)
        case Role.META_VERIFY:
            messages = meta_messages(problem, solution, payload["evaluation"], words)
    name = f"proof-{role}-{digest([list(messages), payload], 12)}"
    tags = {"kind": str(role), "source": payload.get("system") or "words", "language": "en"}
    return Task(
        name, "proof", messages, payload={"role": str(role), **payload}, tier=tier, max_calls=0, tags=tags, provenance=provenance
    )


def exact_verdict(task: Task, text: str | None) -> Verdict:
    """What the program says of a reply; invalid where the task is not of the formal system."""
    payload = task.payload
    if payload.get("system") != DERIVATION:
        return invalid("a proof in words has no exact judge; give a verifier")
    match Role(payload["role"]):
        case Role.PROVE:
            return _proved(payload["problem"], text)
        case Role.VERIFY:
            return _verified(payload, text)
        case Role.META_VERIFY:
            reply = read_meta_evaluation(text)
            if isinstance(reply, Malformed):
                return failed(reply)
            return passed() if reply.score == payload["quality"] else failed("another quality")


def _proved(problem: str, text: str | None) -> Verdict:
    proof = read_proof(text)
    if isinstance(proof, Malformed):
        return failed(proof)
    findings = derivations.check(problem, proof.solution)
    score = derivations.score_of(findings)
    measures = {"proof_score": score, "self_score": proof.self_score}
    outcome = Outcome.PASSED if score == 1 else Outcome.FAILED
    return Verdict(outcome, score, tuple(map(str, findings)), measures)


def _verified(payload: dict[str, Any], text: str | None) -> Verdict:
    """The true score, for the true reasons: every flaw of the solution named, and no other."""
    reply = read_evaluation(text)
    if isinstance(reply, Malformed):
        return failed(reply)
    true = set(derivations.check(payload["problem"], payload["solution"]))
    named = set(derivations.read_findings(reply.analysis))
    if reply.score != payload["score"]:
        return failed("another score")
    return passed() if named == true else failed("other flaws")


class ProofEpisode:
    """One reply, judged by the program."""

    is_over = False

    def __init__(self, task: Task):
        self.task = task

    def reset(self) -> Opening:
        return Opening(self.task.messages, self.task.tools)

    def call(self, name: str, arguments: dict[str, Any] | str) -> str:
        return error_text("unknown_tool", f"there is no tool {name}")

    def finish(self, text: str | None = None) -> Verdict:
        return exact_verdict(self.task, text)

    def close(self) -> None:
        pass


def open_proof(task: Task, world: World | None, isolation: str) -> ProofEpisode:
    if "role" not in task.payload:
        raise TaskError(f"{task.id}: a proof task needs a role in its payload")
    return ProofEpisode(task)


def validate_proof(task: Task, world: World | None, isolation: str) -> list[GateResult]:
    """In the formal system: silence fails and the gold reply passes. In words: that the parts are there."""
    if task.payload.get("system") != DERIVATION:
        needed = {"prove": ("problem",), "verify": ("solution", "score"), "meta_verify": ("evaluation", "quality")}
        missing = [name for name in needed[task.payload["role"]] if name not in task.payload]
        return [GateResult("parts_are_there", not missing, ", ".join(missing))]
    silent, gold = exact_verdict(task, ""), exact_verdict(task, task.payload["gold"])
    return [
        GateResult("silence_fails", silent.is_valid and not silent.passed),
        GateResult("gold_passes", gold.passed, "; ".join(gold.reasons)),
    ]


FAMILY = Family("proof", open_proof, validate_proof)
