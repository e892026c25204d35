"""Batches ahead of training: in order, never further than allowed, failures where they are taken; the line that shows them."""

from __future__ import annotations

import threading

import pytest

from rorqual.rollout.ahead import Ahead
from rorqual.rollout.trajectory import End, Trajectory, Turn
from rorqual.rollout.view import RolloutView
from rorqual.tasks.verdict import failed, passed


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_batches_come_in_order_and_are_begun_with_weights_at_most_so_old(staleness):
    version, begun = [0], []

    def play(step):
        begun.append((step, version[0], threading.current_thread() is threading.main_thread()))
        return step * 10

    ahead = Ahead(play, 7, staleness)
    for step in range(7):
        version[0] = step
        assert ahead.take(step) == step * 10
    ahead.close()
    assert [step for step, _, _ in begun] == list(range(7))
    assert all(0 <= step - weights <= staleness for step, weights, _ in begun), begun
    assert all(is_main == (staleness == 0) for _, _, is_main in begun)


def test_a_run_may_begin_anywhere_and_plays_nothing_beyond_its_end():
    begun = []
    ahead = Ahead(begun.append, 6, 2)
    for step in (4, 5):
        ahead.take(step)
    ahead.close()
    assert begun == [4, 5]


def test_what_playing_raises_is_raised_where_the_batch_is_taken():
    def play(step):
        if step == 1:
            raise RuntimeError("no tasks")
        return step

    ahead = Ahead(play, 3, 1)
    assert ahead.take(0) == 0
    with pytest.raises(RuntimeError, match="no tasks"):
        ahead.take(1)
    ahead.close()


def test_the_view_counts_what_came():
    shown = []
    view = RolloutView(shown.append)
    view(Trajectory("a", 0, (Turn({}, None, sampled_tokens=1500),), End.ANSWERED, passed()))
    view(Trajectory("a", 1, (), End.CUT, failed("x")))
    view(Trajectory("a", 2, (), End.WORLD_FAILED))
    assert shown[-1].startswith("passed 1 of 3, 1,500 tokens (") and shown[-1].endswith("answered 1, cut 1, world_failed 1")
