"""Statistics against enumeration, published values and their own definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.errors import UserError
from rorqual.evals.statistics import bootstrap, compare, majority, pass_at_k, wilson


@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_sample(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_too_few_samples_for_k_is_an_error():
    with pytest.raises(UserError, match="pass@4 needs at least 4 samples of each task, found 3"):
        pass_at_k(3, 1, 4)
    with pytest.raises(UserError, match="can't be right"):
        pass_at_k(3, 4, 1)


def test_wilson_gives_the_textbook_interval_and_stays_inside_the_unit():
    found = wilson(8, 10)
    assert (found.low, found.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson(0, 20).low == 0 and wilson(20, 20).high == 1
    assert (wilson(0, 0).low, wilson(0, 0).high) == (0, 1)


def test_wilson_covers_the_true_rate_as_often_as_it_says():
    """On the mean over true rates, which is what the score interval promises; at one rate it swings with the grid of 1/n."""
    generator = np.random.default_rng(0)
    rates = generator.uniform(0.05, 0.95, 20000)
    found = [wilson(int(s), 40) for s in generator.binomial(40, rates)]
    covered = np.mean([i.low <= rate <= i.high for i, rate in zip(found, rates, strict=True)])
    assert covered == pytest.approx(0.95, abs=0.01)


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval_and_repeats():
    values = np.random.default_rng(1).normal(size=400)
    found = bootstrap(values)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.value == pytest.approx(half, rel=0.15) and found == bootstrap(values)
    assert math.isnan(bootstrap([]).value)


def test_paired_comparison_sees_what_unpaired_intervals_hide():
    generator = np.random.default_rng(2)
    hard = generator.normal(size=200) * 5
    found = compare(hard, hard + 0.3 + generator.normal(size=200) * 0.5)
    assert found.difference.low > 0 and found.p_value < 0.01
    assert compare(hard, hard).p_value == 1.0


def test_the_sign_flip_test_is_exact_for_few_tasks():
    found = compare([0, 0, 0, 0, 1], [1, 1, 1, 1, 1])
    assert found.p_value == pytest.approx(2 / 16) and (found.wins, found.losses) == (4, 0)
    with pytest.raises(UserError, match="found 1 and 2"):
        compare([0], [1, 2])


def test_majority_ignores_missing_answers_and_breaks_ties_by_order():
    assert majority(["b", "a", None, "a", "b"]) == "b"
    assert majority([None]) is None
