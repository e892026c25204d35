"""The search for a proof: it finds what a single sample does not, stops by its rules, and goes on after a kill."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import replace

import pytest

from rorqual.errors import FieldErrors, UserError
from rorqual.policy import ChatReply, StopReason
from rorqual.rewards.proof_programs import ProofProgram, always_zero, exact_verifier
from rorqual.rollout.refinement import (
    PAPER,
    RELEASED,
    Candidate,
    RefineConfig,
    SearchEnd,
    choose_evaluations,
    ranked_places,
    refine,
    refine_in_turn,
)
from rorqual.tasks.derivations import derive, read_findings
from rorqual.tasks.proofs import Evaluation, Proof, asked_parts, write_evaluation, write_proof

SMALL = RefineConfig(
    pool=4, verifications=3, best=2, prompts_per_proof=2, rounds=16, proof_tokens=200, evaluation_tokens=200, words="brief"
)
DERIVATION = next(each for seed in range(99) if (each := derive(random.Random(seed), 5, 5)))
PROBLEM = DERIVATION.problem


class Prover:
    """Knows the lines of the proof but writes a wrong rule into most of them; mends one named line for each evaluation shown."""

    def __init__(self, slips: int = 4):
        self.slips, self.asked = slips, 0

    async def reply(self, messages, tools, params):
        self.asked += 1
        parts, noise = asked_parts(messages), random.Random(params.seed)
        right = DERIVATION.solution.splitlines()
        if "solution" not in parts:
            lines = list(right)
            for at in noise.sample(range(1, len(lines)), self.slips):
                lines[at] = lines[at].split("[")[0] + "[null]"
        else:
            lines = parts["solution"].splitlines()
            named = [finding.line - 1 for finding in read_findings(parts["evaluations"])]
            if named:
                at = noise.choice(named)
                lines[at] = right[at]
        text = write_proof("\n".join(lines), "No flaw.", 1 if lines == right else 0.5)
        return ChatReply({"role": "assistant", "content": text}, StopReason.STOP, usage={"completion_tokens": 50})


def search(prover=None, verifier=exact_verifier, config=SMALL, log=None, **options):
    policy = ProofProgram(verifier) if callable(verifier) else verifier
    return asyncio.run(refine(PROBLEM, prover or Prover(), policy, config, log, **options))


def test_it_finds_a_proof_that_no_single_sample_is():
    course = []
    found = search(advanced=lambda number, pool: course.append([each.score for each in pool]))
    assert max(course[0]) < 1, "no sample of the first round is a proof"
    assert found.end is SearchEnd.PASSED and found.best is not None and found.best.passes
    assert found.best.proof.solution == DERIVATION.solution
    assert 5 <= found.rounds <= 16, "four slips, at most one mended in each round after the first"
    assert list(found.best_by_round) == sorted(found.best_by_round)


def test_it_stops_at_the_first_round_with_a_proof_that_passes_every_verification():
    prover = Prover(slips=0)
    found = search(prover)
    assert (found.end, found.rounds, prover.asked) == (SearchEnd.PASSED, 1, SMALL.pool)
    assert found.candidates == 1, "the same solution is verified once"
    assert found.accounts.requests == {"prover": 4, "verifier": 3}


def test_it_stops_after_its_rounds_where_nothing_passes():
    found = search(verifier=always_zero, config=replace(SMALL, rounds=3))
    assert (found.end, found.rounds) == (SearchEnd.ROUNDS, 3) and found.best is not None and found.best.score == 0


def test_one_doubting_verifier_in_three_keeps_a_proof_from_passing():
    class Doubts:
        def __init__(self):
            self.asked = 0

        async def reply(self, messages, tools, params):
            self.asked += 1
            score = 0.5 if self.asked % 3 == 0 else 1
            return ChatReply({"role": "assistant", "content": write_evaluation("x", score)}, StopReason.STOP)

    found = search(Prover(slips=0), Doubts(), replace(SMALL, rounds=2))
    assert found.end is SearchEnd.ROUNDS and found.best is not None and found.best.score == pytest.approx(5 / 6)


def test_a_verifier_that_keeps_no_form_or_gives_no_answer_never_passes_a_proof():
    class Mute:
        async def reply(self, messages, tools, params):
            return ChatReply({"role": "assistant", "content": ""}, StopReason.UNAVAILABLE)

    class Babbles:
        async def reply(self, messages, tools, params):
            return ChatReply({"role": "assistant", "content": "great proof!"}, StopReason.STOP)

    mute, babble = (search(Prover(slips=0), each(), replace(SMALL, rounds=2)) for each in (Mute, Babbles))
    assert mute.end is babble.end is SearchEnd.ROUNDS
    assert mute.accounts.failed == {"verifier": 3} and babble.accounts.malformed == {"verifier": 3}
    nothing = search(Babbles(), exact_verifier)
    assert (nothing.end, nothing.best) == (SearchEnd.NO_PROOFS, None)


def test_a_budget_ends_it_and_a_larger_one_goes_on_without_asking_twice(tmp_path):
    log, whole_log = tmp_path / "search.jsonl", tmp_path / "whole.jsonl"
    whole_prover = Prover()
    whole = search(whole_prover, log=whole_log)
    cut = search(config=replace(SMALL, max_requests=20, concurrency=1), log=log)
    assert cut.end is SearchEnd.BUDGET and sum(cut.accounts.requests.values()) == 20
    again = search(config=replace(SMALL, max_requests=20), log=log)
    assert again.end is SearchEnd.BUDGET and sum(again.accounts.requests.values()) == 20, "the same budget buys nothing more"
    rest = Prover()
    found = search(rest, log=log)
    assert found.best == whole.best and found.accounts.requests == whole.accounts.requests
    assert rest.asked == whole_prover.asked - sum("prover" in line for line in log_lines(log)[:21])


def log_lines(log):
    return log.read_text().splitlines()


@pytest.mark.parametrize("cut", [0, 1, 7, 30, -1])
def test_a_killed_search_ends_as_an_unbroken_one(tmp_path, cut):
    log = tmp_path / "search.jsonl"
    whole = search(log=log)
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:cut]) + lines[cut][: len(lines[cut]) // 2])
    prover = Prover()
    found = search(prover, log=log)
    assert found == whole and prover.asked <= whole.accounts.requests["prover"]
    assert sorted(json.loads(line).get("name", "") for line in log.read_bytes().splitlines() if parses(line)) == sorted(
        json.loads(line).get("name", "") for line in lines
    )


def parses(line):
    try:
        return bool(json.loads(line))
    except ValueError:
        return False


def test_a_log_of_another_search_is_refused_and_more_rounds_are_not_another_search(tmp_path):
    log = tmp_path / "search.jsonl"
    search(config=replace(SMALL, rounds=1), log=log)
    with pytest.raises(UserError, match=r"pool, verifications differ"):
        search(config=replace(SMALL, pool=5, verifications=2), log=log)
    assert search(log=log).end is SearchEnd.PASSED


def candidate(scores, self_score=1.0, asked=None):
    evaluations = tuple(Evaluation(str(n), score, f"e{n}:{score}") for n, score in enumerate(scores))
    return Candidate("c", 0, Proof("s", Evaluation("", self_score, ""), ""), evaluations, asked or len(scores))


def test_the_best_are_by_mean_score_then_by_their_authors_own():
    pool = [candidate([1, 0]), candidate([1, 0.5]), candidate([0.5, 0.5], 0.5), candidate([1], asked=2), candidate([0.5, 0.5])]
    orders = {tuple(ranked_places(pool, str(seed))) for seed in range(20)}
    assert orders == {(3, 1, 0, 4, 2), (3, 1, 4, 0, 2)}, "ties are drawn by the seed"
    assert not pool[3].passes, "one verification is missing"


def test_evaluations_that_name_flaws_are_shown_first_and_each_prompt_has_its_own():
    proof = candidate([1, 0.5, 1, 0, 1])
    config = replace(SMALL, evaluations_per_prompt=1)
    shown = [choose_evaluations(proof, n, config, "seed")[0] for n in range(6)]
    assert {each.score for each in shown[:2]} == {0, 0.5} and {each.text for each in shown[2:5]} == {"e0:1", "e2:1", "e4:1"}
    assert shown[5] == shown[0]
    together = choose_evaluations(proof, 0, replace(SMALL, evaluations_per_prompt=8), "seed")
    assert len(together) == 5 and {each.score for each in together[:2]} == {0, 0.5}


def test_the_sequential_form_mends_until_its_author_is_content():
    made = asyncio.run(refine_in_turn(PROBLEM, Stubborn(3), SMALL, revisions=8))
    assert [proof.self_score for proof in made.proofs] == [0, 0.5, 0.5, 1] and made.end is SearchEnd.PASSED
    short = asyncio.run(refine_in_turn(PROBLEM, Stubborn(3), SMALL, revisions=2))
    assert short.end is SearchEnd.ROUNDS and len(short.proofs) == 3 and short.best == short.proofs[2]


class Stubborn:
    """Needs so many revisions until it is content; each must be shown the last proof and its own evaluation of it."""

    def __init__(self, needed):
        self.needed, self.done, self.last = needed, -1, ""

    async def reply(self, messages, tools, params):
        parts = asked_parts(messages)
        self.done += 1
        assert (parts.get("solution", ""), "doubt" in parts.get("evaluations", "")) == (self.last, bool(self.last))
        self.last = f"attempt {self.done}"
        score = 1 if self.done == self.needed else min(self.done, 1) / 2
        return ChatReply({"role": "assistant", "content": write_proof(self.last, "doubt", score)}, StopReason.STOP)


def test_the_published_settings():
    assert (PAPER.pool, PAPER.verifications, PAPER.best, PAPER.prompts_per_proof, PAPER.rounds) == (64, 64, 64, 8, 16)
    assert (RELEASED.pool, RELEASED.verifications, RELEASED.best, RELEASED.rounds) == (128, 64, 32, 16)
    assert RELEASED.best * RELEASED.prompts_per_proof * RELEASED.samples_per_prompt == 128
    assert (RELEASED.temperature, RELEASED.proof_tokens, RELEASED.evaluation_tokens) == (1.0, 128 * 1024, 64 * 1024)
    with pytest.raises(FieldErrors, match="rounds"):
        RefineConfig(rounds=0)
