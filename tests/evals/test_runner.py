"""Evaluations: resumable, cached by content, re-scored without a policy; every outcome counted as what it is."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from rorqual.errors import UserError
from rorqual.evals import mathematics, runner
from rorqual.evals.benchmark import BOXED, Benchmark, Protocol, given_suite
from rorqual.evals.policies import PolicyOptions, Scripted, endless, open_policy, says
from rorqual.evals.results import Prices, chosen, curve, paired, table
from rorqual.evals.runner import Config
from rorqual.evals.text import text_opener
from rorqual.policy import ChatReply, StopReason
from rorqual.rollout.agent import speaker_of
from rorqual.rollout.trajectory import End, Trajectory, Turn
from rorqual.tasks.verdict import failed, invalid, passed

PROTOCOL = Protocol(BOXED, max_tokens=2000)


def sums(count=12):
    tasks = [
        mathematics.question_task(f"sum/{i}", f"{i}+{i}?", str(2 * i), f"\\boxed{{{2 * i}}}", PROTOCOL) for i in range(count)
    ]
    return given_suite("sums", tasks, text_opener(mathematics.score))


BENCHMARK = Benchmark(
    "sums", "Sums", "here", "none", PROTOCOL, lambda benchmark, options: sums(), answer_of=mathematics.answer_of
)


class Killed(BaseException):
    """What no handler of errors catches."""


class Player:
    """Right where the seed is even; counts what it is asked, and dies at the n-th question."""

    def __init__(self, suite, dies_at=None):
        self.asked, self.dies_at = 0, dies_at
        self.policy = Scripted(self.answer)
        self.identity, self.make_speaker, self.summariser = "player", speaker_of(self.policy), self.policy

    def answer(self, task, messages, params):
        self.asked += 1
        if self.asked == self.dies_at:
            raise Killed
        return says(task.payload["reference"] if params.seed % 2 == 0 else r"\boxed{-1}")


def evaluate(directory, suite=None, config=None, player=None, ks=(1,)):
    suite, config = suite or sums(), config or Config(samples=2, concurrency=3)
    player = player or Player(suite)
    store = runner.cache(directory, BENCHMARK, suite, config, player.identity)
    attempts = asyncio.run(runner.run(BENCHMARK, suite, player, config, store))
    return table(BENCHMARK, suite, attempts, config, ks), attempts, player


@pytest.mark.parametrize("dies_at", [1, 2, 9, 24])
def test_an_evaluation_that_dies_and_goes_on_gives_the_same_table(tmp_path, dies_at):
    whole, _, counted = evaluate(tmp_path / "whole")
    with pytest.raises(Killed):
        evaluate(tmp_path / "cut", player=Player(sums(), dies_at))
    resumed, _, again = evaluate(tmp_path / "cut")
    assert resumed == whole and counted.asked == 24
    assert again.asked <= 24 - (dies_at - 3), "what was finished is not played again"
    assert evaluate(tmp_path / "cut")[2].asked == 0


def test_attempts_are_stored_by_what_they_depend_on(tmp_path):
    evaluate(tmp_path, config=Config(samples=2))
    assert evaluate(tmp_path, config=Config(samples=3))[2].asked == 12, "more samples add to what there is"
    assert evaluate(tmp_path, sums(14), Config(samples=2))[2].asked == 4, "more tasks too"
    assert evaluate(tmp_path, config=Config(samples=2, seed=1))[2].asked == 24
    assert evaluate(tmp_path, config=Config(samples=2, temperature=0.5))[2].asked == 24
    suite = sums()
    changed = replace(suite.tasks["sum/3"], payload={**suite.tasks["sum/3"].payload, "gold": "7"})
    assert evaluate(tmp_path, replace(suite, tasks={**suite.tasks, "sum/3": changed}))[2].asked == 2, "a changed task is another"


def test_stored_attempts_are_judged_anew_without_the_policy(tmp_path):
    suite = sums()
    first, attempts, _ = evaluate(tmp_path, suite)
    same = asyncio.run(runner.rescore(suite, attempts))
    assert table(BENCHMARK, suite, same, Config(samples=2)) == first
    stricter = replace(suite, open_episode=text_opener(lambda task, text: failed("always")))
    judged = asyncio.run(runner.rescore(stricter, attempts))
    assert table(BENCHMARK, suite, judged, Config(samples=2))["score"]["value"] == 0.0


def test_calls_are_played_again_when_attempts_are_judged_anew():
    from rorqual.rollout.trajectory import Observation

    class Counter:
        is_over, count = False, 0
        task = sums().tasks["sum/1"]

        def reset(self): ...
        def close(self): ...
        def call(self, name, arguments):
            self.count += json.loads(arguments)["by"]
            return str(self.count)

        def finish(self, text=None):
            return passed() if (self.count, text) == (5, "done") else failed("wrong")

    def attempt(*seen):
        call = [{"function": {"name": "add", "arguments": f'{{"by": {by}}}'}} for by in (2, 3)]
        turns = [
            Turn({"role": "assistant", "tool_calls": [c]}, None, (Observation("x", "add", text),))
            for c, text in zip(call, seen, strict=True)
        ]
        return Trajectory("sum/1", 0, (*turns, Turn({"role": "assistant", "content": "done"}, None)), End.ANSWERED, failed("old"))

    suite = replace(sums(2), open_episode=lambda task: Counter())
    good, other = asyncio.run(runner.rescore(suite, {"sum/1": [attempt("2", "5"), attempt("2", "6")]}))["sum/1"]
    assert good.verdict.passed and not other.verdict.is_valid and "answers otherwise" in other.verdict.reasons[0]


def by_program(name, tmp_path, config):
    suite = sums(60)

    async def played():
        async with open_policy(f"program:{name}", BENCHMARK, True, PolicyOptions()) as player:
            store = runner.cache(tmp_path, BENCHMARK, suite, config, player.identity)
            return await runner.run(BENCHMARK, suite, player, config, store)

    return table(BENCHMARK, suite, asyncio.run(played()), config)


def test_an_endpoint_that_fails_for_a_tenth_of_the_calls_costs_attempts_not_score(tmp_path):
    found = by_program("failing", tmp_path, Config(samples=3))
    lost = found["unscored_attempts"]
    assert 5 <= lost <= 40 and found["outcomes"]["verdicts"] == {"passed": 180 - lost, "policy_failed": lost}
    assert found["score"]["value"] == 1.0 and found["passed_attempts"]["of"] == 180 - lost
    assert found["score_if_unscored_fail"] == pytest.approx(1 - lost / 180)
    assert found["outcomes"]["failures"] == {"status 503, as scripted": lost} and found["outcomes"]["reasons"] == {}


def test_failed_attempts_are_played_again_only_when_asked(tmp_path):
    class Broken(Player):
        def answer(self, task, messages, params):
            self.asked += 1
            return ChatReply({"role": "assistant", "content": "", "failure": "gone"}, StopReason.UNAVAILABLE)

    suite = sums()
    found, _, _ = evaluate(tmp_path, suite, player=Broken(suite))
    assert found["unscored_attempts"] == 24 and found["score"]["value"] is None and found["score_if_unscored_fail"] == 0.0
    assert evaluate(tmp_path)[2].asked == 0
    again, _, player = evaluate(tmp_path, config=Config(samples=2, concurrency=3, retry_failures=True))
    assert player.asked == 24 and again["unscored_attempts"] == 0


def test_a_policy_that_never_stops_is_unfinished_by_name(tmp_path):
    found = by_program("endless", tmp_path, Config())
    assert found["outcomes"]["ends"] == {"cut": 60} and found["outcomes"]["verdicts"] == {"unfinished": 60}
    assert found["score"]["value"] == 0.0 and found["unscored_attempts"] == 0
    assert found["accounts"]["sampled_tokens"] == 60 * 2000
    assert endless(None, [], _params(7)).usage["completion_tokens"] == 7


def _params(tokens):
    from rorqual.policy import SamplingParams

    return SamplingParams(max_tokens=tokens)


def attempt(task, sample, steps, verdict, end=End.ANSWERED, text=r"\boxed{1}"):
    turns = [Turn({"role": "assistant", "content": text}, None, sampled_tokens=10, context_tokens=100)] * steps
    return Trajectory(task, sample, tuple(turns), end, verdict)


def test_parallel_counts_the_shortest_answered_run_and_the_cost_of_all():
    suite, config = sums(2), Config(context="parallel-fewest-step", runs=3, samples=1)
    attempts = {
        "sum/0": [attempt("sum/0", 0, 5, passed()), attempt("sum/0", 1, 2, failed("unfinished"), End.MAX_TURNS),
                  attempt("sum/0", 2, 3, failed("wrong"))],
        "sum/1": [attempt("sum/1", 0, 4, failed("wrong")), attempt("sum/1", 1, 4, passed()), attempt("sum/1", 2, 3, passed())],
    }  # fmt: skip
    assert [each[0].sample for each in chosen(attempts, config).values()] == [2, 2]
    found = table(BENCHMARK, suite, attempts, config, prices=Prices(prompt=1.0, completion=2.0))
    assert found["score"]["value"] == 0.5 and found["accounts"]["steps"] == 21 and found["mean_steps"] == 10.5
    assert found["accounts"]["cost"] == pytest.approx((2100 * 1.0 + 210 * 2.0) / 1e6)
    points = curve(attempts, config)
    assert [(p["label"], p["steps"], p["score"]) for p in points] == [("N=1", 4.5, 0.5), ("N=2", 7.5, 0.5), ("N=3", 10.5, 0.5)]


def test_the_curve_is_what_smaller_budgets_would_have_given():
    attempts = {"sum/0": [attempt("sum/0", 0, 12, passed())], "sum/1": [attempt("sum/1", 0, 3, passed())]}
    points = {p["label"]: (p["steps"], p["score"]) for p in curve(attempts, Config())}
    assert points["at most 12"] == (7.5, 1.0) and points["at most 3"] == (3, 0.5) and points["at most 2"] == (2, 0.0)


def test_pass_at_k_majority_and_attempts_without_a_score():
    suite, config = sums(2), Config(samples=3)
    attempts = {
        "sum/0": [attempt("sum/0", i, 1, v, text=t) for i, (v, t) in enumerate(
            [(failed("wrong"), r"\boxed{7}"), (passed(), r"\boxed{0}"), (failed("wrong"), r"\boxed{7}")])],
        "sum/1": [attempt("sum/1", 0, 1, passed()), attempt("sum/1", 1, 1, invalid("undecided")),
                  attempt("sum/1", 2, 0, None, End.WORLD_FAILED)],
    }  # fmt: skip
    found = table(BENCHMARK, suite, attempts, config, (1, 2))
    assert found["score"]["value"] == pytest.approx((1 / 3 + 1) / 2)
    assert found["pass_at_k"]["1"]["value"] == pytest.approx((1 / 3 + 1) / 2)
    two = found["pass_at_k"]["2"]
    assert (two["value"], two["tasks"], two["tasks_with_too_few"]) == (pytest.approx(2 / 3), 1, 1)
    assert found["majority"]["value"] == 0.5 and found["unscored_attempts"] == 2
    assert found["outcomes"]["verdicts"] == {"passed": 2, "verifier_failed": 1, "world_failed": 1, "wrong": 2}
    with pytest.raises(UserError, match="pass@4 needs at least 4"):
        table(BENCHMARK, suite, attempts, config, (4,))


def test_paired_comparison_pairs_by_task_and_says_what_it_left_out():
    first = {"by_task": {"a": [1.0, 0.0], "b": [0.0], "c": [None], "d": [1.0]}}
    second = {"by_task": {"a": [1.0, 1.0], "b": [1.0], "c": [1.0]}}
    found = paired(first, second)
    assert (found["tasks"], found["tasks_left_out"], found["wins"], found["losses"]) == (2, 2, 2, 0)
    assert found["difference"]["value"] == 0.75
    with pytest.raises(UserError, match="no scored task"):
        paired(first, {"by_task": {"z": [1.0]}})
