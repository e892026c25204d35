"""Groups of attempts: archived as they finish, never played twice, the same whatever ran beside them."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from rorqual.errors import UserError
from rorqual.policy import Completion, KeptTokens, SamplingParams, StopReason
from rorqual.rollout.agent import AgentConfig, speaker_of
from rorqual.rollout.archive import Archive
from rorqual.rollout.collect import GroupConfig, collect
from rorqual.rollout.trajectory import End, Observation, Trajectory, Turn
from rorqual.tasks.verdict import failed
from tests.rollout.test_agent import TOKENIZER, Crash, Scripted, Task, World, answer, call


class Policy(Scripted):
    """Answers 42 where the message's seed is even; counts what it was asked."""

    asked = 0

    async def complete(self, prompt_tokens, params):
        self.asked += 1
        await asyncio.sleep((params.seed % 7) / 1000)
        tokens = tuple(self.write(answer("42" if params.seed % 2 == 0 else "41")))
        return Completion(tuple(prompt_tokens), tokens, np.full(len(tokens), -1, np.float32), StopReason.STOP)


def play_all(policy, archive=None, tasks=("a", "b", "c"), concurrency=4, run_seed=3, open_episode=None):
    return asyncio.run(
        collect(
            tasks, open_episode or (lambda task_id: World(task=Task(task_id))), speaker_of(policy, TOKENIZER),
            GroupConfig(4, concurrency), AgentConfig(), SamplingParams(max_tokens=500), run_seed, archive,
        )
    )  # fmt: skip


def verdicts(groups):
    return [[t.verdict.passed for t in group] for group in groups]


def test_groups_come_whole_in_order_and_do_not_depend_on_what_ran_beside_them():
    groups = play_all(Policy())
    assert [[(t.task_id, t.sample) for t in g] for g in groups] == [[(x, i) for i in range(4)] for x in "abc"]
    assert verdicts(groups) == verdicts(play_all(Policy(), concurrency=1))
    assert verdicts(groups)[1] == verdicts(play_all(Policy(), tasks=("b",)))[0]
    assert len({v for g in verdicts(groups) for v in g}) == 2 and verdicts(groups) != verdicts(play_all(Policy(), run_seed=4))


def test_finished_attempts_are_never_played_twice(tmp_path):
    archive, first = Archive(tmp_path), Policy()
    groups = play_all(first, archive, tasks=("a", "b"))
    again = Policy()
    resumed = play_all(again, archive)
    assert first.asked == 8 and again.asked == 4 and len(archive) == 12
    assert [t.turns[0].completion.tokens for t in resumed[0]] == [t.turns[0].completion.tokens for t in groups[0]]


def test_one_world_that_breaks_harms_no_sibling():
    groups = play_all(
        Scripted(*[call() for _ in range(4)], *[answer() for _ in range(30)]),
        tasks=("bad", "good"), concurrency=1,
        open_episode=lambda task_id: (Crash if task_id == "bad" else World)(task=Task(task_id)),
    )  # fmt: skip
    assert [t.end for t in groups[0]] == [End.WORLD_FAILED] * 4
    assert [t.verdict.passed for t in groups[1]] == [True] * 4


def test_a_trajectory_survives_the_archive_with_every_array(tmp_path):
    done = Completion(
        (1, 2), (3,), np.array([-0.5], np.float32), StopReason.STOP,
        kept_tokens=KeptTokens(np.array([3, 4], np.int32), np.array([0, 2])),
        routed_experts=np.ones((2, 1, 2), np.int16), selected_indices=(np.array([[0, -1], [0, 1]], np.int32),),
        temperature=0.7, policy_versions=np.array([5], np.int32), cached_len=1, statistics={"drafted": 2},
    )  # fmt: skip
    turn = Turn({"role": "assistant", "content": "é"}, done, (Observation("c", "f", "r", 0.1, "timeout"),), 2, 1, True, 0.5)
    kept = Trajectory("odd/task é", 2, (turn, Turn({}, None)), End.MAX_TURNS, failed("x"), ({"role": "user"},), "d", {"m": 1.0})
    archive = Archive(tmp_path)
    archive.save(kept)
    found = archive.load("odd/task é", 2)
    assert archive.load("odd/task é", 1) is None and found.verdict == kept.verdict and found.turns[1] == kept.turns[1]
    for name in ("logprobs", "routed_experts", "policy_versions"):
        np.testing.assert_array_equal(getattr(found.turns[0].completion, name), getattr(done, name))
    np.testing.assert_array_equal(found.turns[0].completion.selected_indices[0], done.selected_indices[0])
    assert found.turns[0].completion.kept_tokens.row(0).tolist() == [3, 4]
    assert found.turns[0].observations == turn.observations and found.messages == kept.messages


def test_a_full_disk_is_said_and_leaves_no_part_behind(tmp_path, monkeypatch):
    import rorqual.rollout.archive as module

    def full(*args, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.np, "savez", full)
    with pytest.raises(UserError, match="No space left"):
        Archive(tmp_path).save(Trajectory("t", 0, (), End.ANSWERED))
    assert list(tmp_path.iterdir()) == []
