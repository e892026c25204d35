"""The statistics of evaluation: success rates with intervals, pass@k, majority, paired comparison. Plain numbers in and out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from rorqual.errors import UserError


@dataclass(frozen=True)
class Interval:
    """A figure and the bounds of its confidence interval."""

    value: float
    low: float
    high: float

    def is_apart_from(self, other: Interval) -> bool:
        """The two intervals share no point."""
        return self.low > other.high or other.low > self.high


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The unbiased estimate of the chance that at least one of k samples is right: 1 - C(n - c, k) / C(n, k).

    Raises UserError for k above n: fewer samples than k say nothing unbiased about k.
    """
    if not 1 <= k <= num_samples:
        raise UserError(f"pass@{k} needs at least {k} samples of each task, found {num_samples}")
    if not 0 <= num_correct <= num_samples:
        raise UserError(f"pass@{k}: {num_correct} of {num_samples} samples can't be right")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def wilson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a success rate: sound for small counts and for rates near 0 and 1. No trials: [0, 1]."""
    if trials == 0:
        return Interval(math.nan, 0.0, 1.0)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = successes / trials
    centre = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    return Interval(rate, min(max(centre - half, 0.0), rate), max(min(centre + half, 1.0), rate))


def bootstrap(
    values: Sequence[float] | np.ndarray,
    statistic: Callable[[np.ndarray], float] = lambda drawn: float(np.mean(drawn)),
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """The percentile bootstrap of a statistic over tasks: resample tasks (not samples of a task) with replacement."""
    data = np.asarray(values, dtype=np.float64)
    if not len(data):
        return Interval(math.nan, math.nan, math.nan)
    generator = np.random.default_rng(seed)
    found = [statistic(data[generator.integers(0, len(data), len(data))]) for _ in range(draws)]
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(statistic(data), float(low), float(high))


@dataclass(frozen=True)
class Comparison:
    """Two policies on the same tasks: the mean difference (second less first), its interval, and how surprising it is."""

    difference: Interval
    wins: int
    losses: int
    p_value: float
    """Two-sided sign-flip test of the mean difference: exact up to 16 tasks that differ, else by random flips."""


def compare(
    first: Sequence[float], second: Sequence[float], confidence: float = 0.95, draws: int = 5000, seed: int = 0
) -> Comparison:
    """Compare scores task by task; first[i] and second[i] are of one task."""
    if len(first) != len(second):
        raise UserError(f"a paired comparison needs the same tasks, found {len(first)} and {len(second)}")
    deltas = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    return Comparison(
        bootstrap(deltas, confidence=confidence, draws=draws, seed=seed),
        int((deltas > 0).sum()),
        int((deltas < 0).sum()),
        _sign_flip(deltas[deltas != 0], draws, seed),
    )


def _sign_flip(deltas: np.ndarray, draws: int, seed: int) -> float:
    """The share of sign assignments whose sum is at least as far from 0 as the one seen."""
    if not len(deltas):
        return 1.0
    if len(deltas) <= 16:
        codes = np.arange(2 ** len(deltas))[:, None] >> np.arange(len(deltas)) & 1
        signs = 1.0 - 2.0 * codes
        extra = 0
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], (draws, len(deltas)))
        extra = 1  # the assignment seen is one of them, so that no p-value is 0
    sums = np.abs(signs @ deltas)
    return float(((sums >= abs(deltas.sum()) - 1e-12).sum() + extra) / (len(sums) + extra))


def majority(answers: Sequence[Hashable | None]) -> Hashable | None:
    """The commonest answer; ties to the one given first; attempts without an answer have no vote."""
    counts = Counter(answer for answer in answers if answer is not None)
    return max(counts, key=lambda answer: counts[answer], default=None)
