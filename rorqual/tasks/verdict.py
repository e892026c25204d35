"""What a verifier says of an attempt: passed, failed, or that the verifier itself can't be trusted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Outcome(StrEnum):
    """INVALID is a state of its own: a verifier that raised, hung or could not be reached says nothing about the attempt."""

    PASSED = "passed"
    FAILED = "failed"
    INVALID = "invalid"


@dataclass(frozen=True)
class Verdict:
    """The end of an episode. A trainer drops an invalid one; it never counts it as a reward of 0."""

    outcome: Outcome
    score: float | None = None
    """In [0, 1]; None where invalid."""
    reasons: tuple[str, ...] = ()
    """Names of the predicates that failed, or what made the verdict invalid."""
    measures: Mapping[str, float] = field(default_factory=dict)
    """Figures of partial credit and the like; they never change the outcome."""

    def __post_init__(self) -> None:
        if (self.score is None) != (self.outcome is Outcome.INVALID):
            raise ValueError(f"a verdict has a score exactly where it is not invalid, found {self.outcome} with {self.score}")
        if self.score is not None and not 0 <= self.score <= 1:
            raise ValueError(f"score: expected in [0, 1], found {self.score}")

    @property
    def passed(self) -> bool:
        return self.outcome is Outcome.PASSED

    @property
    def is_valid(self) -> bool:
        return self.outcome is not Outcome.INVALID

    def to_json(self) -> dict[str, Any]:
        return {
            "outcome": str(self.outcome),
            "score": self.score,
            "reasons": list(self.reasons),
            "measures": dict(self.measures),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Verdict:
        outcome = Outcome(value["outcome"])
        return Verdict(outcome, value["score"], tuple(value.get("reasons", ())), dict(value.get("measures", {})))


def passed(measures: Mapping[str, float] | None = None) -> Verdict:
    return Verdict(Outcome.PASSED, 1.0, (), measures or {})


def failed(*reasons: str, score: float = 0.0, measures: Mapping[str, float] | None = None) -> Verdict:
    return Verdict(Outcome.FAILED, score, reasons, measures or {})


def invalid(*reasons: str) -> Verdict:
    return Verdict(Outcome.INVALID, None, reasons)
