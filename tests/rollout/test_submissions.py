"""Which samples are submitted in a contest: the filter by name, the order by rule, and each program run once."""

from __future__ import annotations

import asyncio

import pytest

from rorqual.errors import FieldErrors
from rorqual.policy import ChatReply, SamplingParams, StopReason
from rorqual.rollout.submissions import ICPC, IOI, Attempt, ContestRule, Dropped, refusal_judge, sample, select

RULE = ContestRule(samples=10, submissions=2)


def chosen(attempts, rule=RULE, **options):
    ran = []

    async def passes_samples(program):
        ran.append(program)
        return {"wrong": False, "unknown": None}.get(program, True)

    return asyncio.run(select(attempts, rule, passes_samples, **options)), ran


def test_samples_are_dropped_by_name_and_the_longest_thinking_is_submitted_first():
    attempts = [
        Attempt("a", 10), Attempt("wrong", 99), Attempt("b", 30), Attempt(None, 98),
        Attempt("c", 97, stop_reason=StopReason.LENGTH), Attempt("unknown", 96), Attempt("d", 20), Attempt(" ", 95),
        Attempt("e", 94, stop_reason=StopReason.UNAVAILABLE),
    ]  # fmt: skip
    found, _ = chosen(attempts)
    assert found.submitted == (2, 6)
    assert found.dropped == {
        0: Dropped.SURPLUS, 1: Dropped.FAILS_SAMPLES, 3: Dropped.NO_PROGRAM, 4: Dropped.OVER_LENGTH, 5: Dropped.UNDECIDED,
        7: Dropped.NO_PROGRAM, 8: Dropped.FAILED,
    }  # fmt: skip


def test_equal_programs_are_run_once_and_copies_submitted_once():
    attempts = [Attempt("a\n", 1), Attempt("a\n", 5), Attempt("a  \n\n", 3), Attempt("b", 2)]
    found, ran = chosen(attempts)
    assert found.submitted == (1, 3) and found.dropped == {0: Dropped.COPY, 2: Dropped.COPY}
    assert sorted(ran) == ["a\n", "a  \n\n", "b"] or len(ran) == 3
    assert chosen(attempts, ContestRule(4, 4, drop_copies=False))[0].submitted == (1, 2, 3, 0)


@pytest.mark.parametrize(
    ("order", "submitted"), [("longest_thinking", (1, 0)), ("shortest_thinking", (2, 0)), ("sampled", (0, 1))]
)
def test_the_order_is_a_setting_and_ties_go_to_the_earlier_sample(order, submitted):
    attempts = [Attempt("a", 2), Attempt("b", 3), Attempt("c", 1), Attempt("d", 2)]
    assert chosen(attempts, ContestRule(4, 2, order))[0].submitted == submitted


def test_the_papers_numbers_hold_for_fifty_of_five_hundred():
    attempts = [Attempt(f"p{n}", (n * 7919) % 500) for n in range(500)]
    found, _ = chosen(attempts, IOI)
    assert [attempts[n].thinking for n in found.submitted] == list(range(499, 449, -1))
    assert (ICPC.samples, IOI.samples, IOI.submissions) == (32, 500, 50)
    with pytest.raises(FieldErrors, match="submissions"):
        ContestRule(samples=4, submissions=5)


class Solver:
    def __init__(self):
        self.seeds = []

    async def reply(self, messages, tools, params):
        self.seeds.append(params.seed)
        if "refuse" in messages[0]["content"]:
            return ChatReply(
                {"role": "assistant", "content": "Yes." if "I won't" in messages[0]["content"] else "No."}, StopReason.STOP
            )
        message = {"role": "assistant", "content": f"print({params.seed})", "reasoning_content": "hm" * params.seed}
        return ChatReply(message, StopReason.STOP)


def test_samples_have_seeds_of_their_own_and_their_thinking_is_measured():
    policy = Solver()
    found = asyncio.run(sample(policy, [{"role": "user", "content": "q"}], RULE, SamplingParams(seed=3), lambda text: text))
    assert sorted(policy.seeds) == list(range(3, 13)) and [each.thinking for each in found] == [2 * n for n in range(3, 13)]


def test_refusals_are_removed_by_a_policy():
    attempts = [Attempt("a", 1, "I won't do that; print(1)"), Attempt("b", 2, "print(2)")]
    found, _ = chosen(attempts, is_refusal=refusal_judge(Solver(), SamplingParams(seed=0)))
    assert found.submitted == (1,) and found.dropped == {0: Dropped.REFUSED}
