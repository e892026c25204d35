"""Group-relative advantages: the paper's form, its variants against closed forms, and rewards that could not be had."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rorqual.rewards.advantages import AdvantageConfig, group_advantages

REWARDS = st.lists(st.floats(-5, 5), min_size=2, max_size=12)


@given(REWARDS)
def test_advantages_are_deviations_from_the_mean_and_sum_to_zero(rewards):
    found = group_advantages(rewards).advantages
    assert found == pytest.approx([r - sum(rewards) / len(rewards) for r in rewards], abs=1e-12)
    assert math.fsum(found) == pytest.approx(0, abs=1e-9)


@given(REWARDS)
def test_leave_one_out_compares_with_the_mean_of_the_others(rewards):
    found = group_advantages(rewards, AdvantageConfig(baseline="leave_one_out")).advantages
    others = [(sum(rewards) - r) / (len(rewards) - 1) for r in rewards]
    assert found == pytest.approx([r - o for r, o in zip(rewards, others, strict=True)], abs=1e-9)


def test_division_by_the_standard_deviation_is_an_option():
    rewards = [0.0, 1.0, 1.0, 0.0, 0.5]
    found = group_advantages(rewards, AdvantageConfig(divide_by_std=True)).advantages
    values = torch.tensor(rewards, dtype=torch.float64)
    expected = (values - values.mean()) / (values.std(unbiased=False) + 1e-6)
    assert found == pytest.approx(expected.tolist(), abs=1e-12)


def test_rewards_that_could_not_be_had_are_left_out_and_named():
    found = group_advantages([1.0, None, 0.0, math.nan, math.inf])
    assert found.advantages == (0.5, None, -0.5, None, None)
    assert found.dropped == {1: "no_reward", 3: "not_finite", 4: "not_finite"} and found.mean == 0.5


def test_a_group_with_one_survivor_teaches_nothing():
    found = group_advantages([None, 1.0, None])
    assert found.advantages == (None, None, None) and found.mean is None
    assert found.dropped == {0: "no_reward", 1: "group_too_small", 2: "no_reward"}


def test_a_group_of_equals_is_flat():
    assert group_advantages([1.0, 1.0, 1.0]).is_flat and not group_advantages([1.0, 0.0]).is_flat
