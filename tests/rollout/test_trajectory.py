"""Turns become samples token for token: one sample while the context only grows, a new one where it was rewritten."""

from __future__ import annotations

import numpy as np

from rorqual.policy import Completion, KeptTokens, StopReason
from rorqual.rollout.trajectory import End, Trajectory, Turn, samples


def completion(prompt, tokens, version=0, layers=2):
    n, computed = len(tokens), len(prompt) + max(len(tokens) - 1, 0)
    mark = np.arange(computed)[:, None, None] + 100 * version
    return Completion(
        tuple(prompt),
        tuple(tokens),
        -np.arange(1, n + 1, dtype=np.float32) - version,
        StopReason.STOP,
        kept_tokens=KeptTokens(np.array(tokens, np.int32), np.arange(n + 1)),
        routed_experts=np.broadcast_to(mark, (computed, layers, 1)).astype(np.int16),
        selected_indices=(np.broadcast_to(mark[:, 0], (computed, 1)).astype(np.int32),),
        policy_versions=np.full(n, version, np.int32),
        temperature=0.7,
    )


def trajectory(*completions):
    return Trajectory("t", 0, tuple(Turn({}, each, sampled_tokens=len(each.tokens)) for each in completions), End.ANSWERED)


def test_turns_that_extend_each_other_are_one_sample_with_loss_on_what_was_sampled():
    first = completion([1, 2], [3, 4])
    second = completion([1, 2, 3, 4, 9, 9], [5], version=1)
    (sample,) = samples(trajectory(first, second))
    assert sample.tokens.tolist() == [1, 2, 3, 4, 9, 9, 5]
    assert sample.mask.tolist() == [0, 0, 1, 1, 0, 0, 1]
    assert sample.logprobs.tolist() == [0, 0, -1, -2, 0, 0, -2]
    assert sample.versions.tolist() == [-1, -1, 0, 0, -1, -1, 1]
    assert [sample.kept.row(t).tolist() for t in range(7)] == [[], [], [3], [4], [], [], [5]]
    # Tokens 0..2 went through the model as the first turn sampled, 3..5 in the second; the last never did.
    assert sample.routed_experts[:, 0, 0].tolist() == [0, 1, 2, 103, 104, 105, -1]
    assert sample.selected_indices[0][:, 0].tolist() == [0, 1, 2, 103, 104, 105, -1]
    assert sample.temperature == 0.7


def test_a_rewritten_context_begins_a_new_sample():
    first, second = completion([1, 2], [3, 4]), completion([1, 2, 9], [5])
    chain = samples(trajectory(first, second))
    assert [s.tokens.tolist() for s in chain] == [[1, 2, 3, 4], [1, 2, 9, 5]]
    assert trajectory(first, second).policy_versions == (0, 0)


def test_what_was_not_recorded_is_not_invented():
    bare = Completion((1,), (2,), np.zeros(1, np.float32), StopReason.STOP)
    (sample,) = samples(trajectory(completion([1], []), bare))
    assert sample.routed_experts is None and sample.selected_indices is None
    assert sample.versions.tolist() == [-1, -1]
    assert samples(trajectory(completion([1], []))) == [], "an empty completion leaves nothing to train"
    assert samples(Trajectory("t", 0, (Turn({}, None),), End.ANSWERED)) == []


def test_a_refused_message_at_the_end_takes_nothing_from_what_was_recorded_before():
    refused = Completion((1, 2, 3, 4, 9), (), np.zeros(0, np.float32), StopReason.TOO_LONG)
    (sample,) = samples(trajectory(completion([1, 2], [3, 4]), refused))
    assert sample.tokens.tolist() == [1, 2, 3, 4]
    assert sample.routed_experts[:, 0, 0].tolist() == [0, 1, 2, -1]
    assert sample.selected_indices is not None
