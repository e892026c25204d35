"""Rewards of proofs, in the DeepSeekMath-V2 form: each formula stands here and nowhere else.

    verifier       R_V = R_format * R_score * R_meta          R_score = 1 - |s' - s|
    meta-verifier  R   = R_format * R_score                   against the annotated quality of the evaluation
    generator      R   = R_format * (0.76 R_Y + 0.24 R_Z)     R_Y = s,  R_Z = R_score(s', s) * R_meta(Z)

s' is the score that the policy gives, s the true one: of an annotated proof, or for the generator the verifier's. R_meta is the
quality that a meta-verifier gives the analysis (1 before there is one). R_format is 1 where the reply was read, else 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rorqual.errors import require
from rorqual.tasks.proofs import Evaluation, Malformed, Proof


@dataclass(frozen=True)
class ProofWeights:
    """Of the generator's reward: the proof's score, and the honesty of its self-evaluation. They sum to 1."""

    proof: float = 0.76
    self_evaluation: float = 0.24

    def __post_init__(self) -> None:
        whole = abs(self.proof + self.self_evaluation - 1) < 1e-9
        require(
            self,
            proof=(0 <= self.proof <= 1 and whole, "in [0, 1], 1 together with self_evaluation"),
            self_evaluation=(0 <= self.self_evaluation <= 1, "in [0, 1]"),
        )


@dataclass(frozen=True)
class ProofReward:
    """The number and what it is made of. `problem` says why R_format is 0; empty where it is 1."""

    value: float
    terms: dict[str, float]
    problem: str = ""


def format_reward(reply: Evaluation | Proof | Malformed) -> float:
    """R_format."""
    return 0.0 if isinstance(reply, Malformed) else 1.0


def score_reward(given: float, true: float) -> float:
    """R_score = 1 - |s' - s|."""
    return 1.0 - abs(given - true)


def verifier_reward(reply: Evaluation | Malformed, true_score: float, meta: float = 1.0) -> ProofReward:
    """R_V = R_format * R_score * R_meta. meta: 1 where there is no meta-verifier yet; the meta-verifier's own reward too."""
    if isinstance(reply, Malformed):
        return _malformed(reply)
    terms = {"format": format_reward(reply), "score": score_reward(reply.score, true_score), "meta": meta}
    return ProofReward(terms["format"] * terms["score"] * terms["meta"], terms)


def self_evaluation_reward(self_score: float, true_score: float, meta: float) -> float:
    """R_Z = R_score(s', s) * R_meta(Z)."""
    return score_reward(self_score, true_score) * meta


def generator_reward(
    reply: Proof | Malformed, proof_score: float, meta: float, weights: ProofWeights | None = None
) -> ProofReward:
    """R = R_format * (0.76 R_Y + 0.24 R_Z). proof_score: the verifier's s; meta: the quality of the self-evaluation."""
    if isinstance(reply, Malformed):
        return _malformed(reply)
    weights = weights or ProofWeights()
    own = self_evaluation_reward(reply.self_score, proof_score, meta)
    terms = {"format": format_reward(reply), "proof": proof_score, "self_evaluation": own, "meta": meta}
    return ProofReward(terms["format"] * (weights.proof * proof_score + weights.self_evaluation * own), terms)


def evaluation_quality(findings: Sequence[bool], *, is_clear: bool = True, score_follows: bool = True) -> float:
    """The meta-verifier's rules. findings: of each flaw that an evaluation names, whether it is reasonable.

    All unreasonable: 0. Some of each: 0.5. All reasonable, or none named: 1, but 0.5 where the evaluation is ill expressed or
    its score does not follow from what it names. What is praised is not judged.
    """
    if findings and not any(findings):
        return 0.0
    return 1.0 if all(findings) and is_clear and score_follows else 0.5


def _malformed(reply: Malformed) -> ProofReward:
    return ProofReward(0.0, {"format": format_reward(reply)}, str(reply))
