"""One reward per attempt: the terms weighed by the domain it belongs to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from rorqual.errors import require
from rorqual.rewards.terms import LengthPenalty, language_consistency, outcome, well_formed
from rorqual.rollout.trajectory import Trajectory


@dataclass(frozen=True)
class DomainReward:
    """Weights of the terms. The reward is their weighted sum; the outcome carries the task, the others shape it.

    Unpublished in the paper: the defaults keep a correct attempt above any wrong one whatever its shape.
    """

    outcome: float = 1.0
    format: float = 0.1
    length: float = 0.1
    language: float = 0.05
    penalty: LengthPenalty = field(default_factory=LengthPenalty)

    def __post_init__(self) -> None:
        names = ("outcome", "format", "length", "language")
        require(self, **{name: (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0, "at least 0") for name in names})


@dataclass(frozen=True)
class RewardConfig:
    """Rewards by domain; domains that are not named take `default`."""

    default: DomainReward = field(default_factory=DomainReward)
    by_domain: Mapping[str, DomainReward] = field(default_factory=dict)

    def of(self, domain: str) -> DomainReward:
        return self.by_domain.get(domain, self.default)


@dataclass(frozen=True)
class Reward:
    """The number, or None with the reason; and each term, for the metrics."""

    value: float | None
    terms: dict[str, float]
    reason: str = ""


def reward(trajectory: Trajectory, config: DomainReward, judged: float | None = None) -> Reward:
    """The reward of one attempt. judged: the score of a rubric judge, in place of the verdict where tasks have none."""
    result = judged if judged is not None else outcome(trajectory)
    if result is None or not math.isfinite(result):
        return Reward(None, {}, f"no outcome: {trajectory.end}" if result is None else "the outcome is not finite")
    terms = {
        "outcome": result,
        "format": well_formed(trajectory),
        "length": config.penalty(trajectory),
        "language": language_consistency(trajectory),
    }
    return Reward(sum(getattr(config, name) * value for name, value in terms.items()), terms)
