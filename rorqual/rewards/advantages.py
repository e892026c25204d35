"""From the rewards of a group of attempts to advantages (paper section 3.1): A_i = R_i - mean(R).

There is no division by the standard deviation: it would weigh the easiest and the hardest prompts most. It is an option, for
comparison. An attempt without a valid reward is left out of the group and counted; it is never a reward of 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rorqual.errors import require


@dataclass(frozen=True)
class AdvantageConfig:
    baseline: Literal["mean", "leave_one_out"] = "mean"
    """mean: the paper's. leave_one_out: the mean of the others, which is G / (G - 1) times as large."""
    divide_by_std: bool = False
    std_floor: float = 1e-6
    """Added to the standard deviation where it divides."""
    min_group: int = 2
    """Groups with fewer valid rewards say nothing of what is better, and give no advantages."""
    skip_flat: bool = False
    """Leave groups whose rewards are all equal out of training: they cost what the others cost, and the policy learns nothing
    from them. The indexers, the MTP module and the KL term then learn from the others alone."""

    def __post_init__(self) -> None:
        require(self, std_floor=(self.std_floor > 0, "more than 0"), min_group=(self.min_group >= 2, "at least 2"))


@dataclass(frozen=True)
class GroupAdvantages:
    """One advantage per attempt; None where it is left out. `dropped` says why, by attempt."""

    advantages: tuple[float | None, ...]
    dropped: dict[int, str]
    mean: float | None
    """Of the valid rewards; None where the group gave no advantages."""

    @property
    def is_flat(self) -> bool:
        """All valid rewards are equal: nothing to learn from."""
        return all(a in (None, 0.0) for a in self.advantages)


def group_advantages(rewards: Sequence[float | None], config: AdvantageConfig | None = None) -> GroupAdvantages:
    """Advantages of one group's rewards. None and NaN are attempts whose reward could not be had."""
    config = config or AdvantageConfig()
    dropped = {i: "no_reward" if r is None else "not_finite" for i, r in enumerate(rewards) if not _is_valid(r)}
    valid = [float(r) for r in rewards if r is not None and _is_valid(r)]
    if len(valid) < config.min_group:
        dropped |= {i: "group_too_small" for i in range(len(rewards)) if i not in dropped}
        return GroupAdvantages((None,) * len(rewards), dropped, None)
    mean = math.fsum(valid) / len(valid)
    scale = len(valid) / (len(valid) - 1) if config.baseline == "leave_one_out" else 1.0
    if config.divide_by_std:
        scale /= math.sqrt(math.fsum((r - mean) ** 2 for r in valid) / len(valid)) + config.std_floor
    advantages = tuple(None if i in dropped else (float(r) - mean) * scale for i, r in enumerate(rewards))  # type: ignore[arg-type]
    return GroupAdvantages(advantages, dropped, mean)


def _is_valid(reward: float | None) -> bool:
    return reward is not None and math.isfinite(reward)
