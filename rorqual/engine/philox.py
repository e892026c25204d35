"""Counter-based noise, many streams at once: Philox4x64-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3; 2011).

numpy's own generator of that name gives the same numbers (a test holds it to that), but takes tens of microseconds to be made
for each number that is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ROUNDS = 10
MULTIPLIERS = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
KEY_STEPS = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)
LOW, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """The number in [0, 1) that belongs to each request's seed and the position of the token to draw: float64 [N].

    The first word of the block after `position` under the key (seed mod 2^64, 0), as numpy's Philox gives it.
    """
    keys = np.array([seed % 2**64 for seed in seeds], dtype=np.uint64)
    counters = np.array(positions, dtype=np.uint64) + np.uint64(1)
    return (first_words(counters, keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def uniform(seed: int, position: int) -> float:
    """`uniforms` of one."""
    return float(uniforms([seed], [position])[0])


def first_words(counters: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The first of the four words of each block: the counter (c, 0, 0, 0) under the key (k, 0), uint64 [N]."""
    a, b, c, d = counters, *(np.zeros_like(counters) for _ in range(3))
    key, other = keys, np.zeros_like(keys)
    for _ in range(ROUNDS):
        (high, low), (top, bottom) = wide_product(a, MULTIPLIERS[0]), wide_product(c, MULTIPLIERS[1])
        a, b, c, d = top ^ b ^ key, bottom, high ^ d ^ other, low
        key, other = key + KEY_STEPS[0], other + KEY_STEPS[1]
    return a


def wide_product(x: np.ndarray, factor: np.uint64) -> tuple[np.ndarray, np.ndarray]:
    """The high and the low 64 bits of x times factor."""
    x_high, x_low, f_high, f_low = x >> HALF, x & LOW, factor >> HALF, factor & LOW
    middle = x_high * f_low + (x_low * f_low >> HALF)
    carry = (middle & LOW) + x_low * f_high
    return x_high * f_high + (middle >> HALF) + (carry >> HALF), x * factor
