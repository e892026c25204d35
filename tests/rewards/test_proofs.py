"""Rewards of proofs: the formulas by hand, judges that cheat or fail, and automatic labels against a slow restatement."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest

from rorqual.errors import FieldErrors
from rorqual.policy import ChatReply, SamplingParams, StopReason
from rorqual.rewards.domains import DomainReward, reward
from rorqual.rewards.labelling import Checked, Ground, LabelConfig, decide, label
from rorqual.rewards.proof_judges import JudgedProof, Judges, Unjudged, ask_verifier, judged
from rorqual.rewards.proof_programs import (
    ProofProgram,
    always_one,
    always_zero,
    exact_meta_verifier,
    exact_verifier,
    flawed,
)
from rorqual.rewards.proofs import ProofWeights, evaluation_quality, generator_reward, verifier_reward
from rorqual.rollout.agent import AgentConfig, play, speaker_of
from rorqual.tasks.derivations import Flaw, check, derive, plant, score_of
from rorqual.tasks.proof_tasks import DERIVATION, Role, proof_task
from rorqual.tasks.proofs import (
    EVALUATION,
    EVALUATION_SCORE,
    META_EVALUATION,
    META_SCORE,
    Malformed,
    asked_parts,
    read_evaluation,
    read_proof,
    write_evaluation,
    write_proof,
)

PARAMS = SamplingParams(seed=1)


# --- the formulas


@pytest.mark.parametrize(
    ("given", "true", "meta", "wanted"),
    [
        (1, 1, 1, 1), (0.5, 0.5, 1, 1), (0, 0, 1, 1), (1, 0, 1, 0), (0, 1, 1, 0), (0.5, 1, 1, 0.5), (0.5, 0, 1, 0.5),
        (1, 0.5, 1, 0.5),
        (1, 1, 0.5, 0.5), (0, 0, 0, 0), (0.5, 1, 0.5, 0.25), (0, 0.5, 0.5, 0.25),
    ],
)  # fmt: skip
def test_the_verifiers_reward_by_hand(given, true, meta, wanted):
    found = verifier_reward(read_evaluation(write_evaluation("x", given)), true, meta)
    assert found.value == wanted and found.problem == ""


@pytest.mark.parametrize(
    ("self_score", "score", "meta", "wanted"),
    [
        (1, 1, 1, 1.0),
        (1, 0, 1, 0.0),  # a flawed proof called perfect
        (0, 0, 1, 0.24),  # a flawed proof whose author admits it
        (0.5, 0.5, 1, 0.38 + 0.24),
        (1, 0.5, 1, 0.38 + 0.12),
        (0, 1, 1, 0.76),
        (1, 1, 0, 0.76),
        (0, 0, 0.5, 0.12),
        (0.5, 0, 0.5, 0.06),
    ],
)
def test_the_generators_reward_by_hand(self_score, score, meta, wanted):
    proof = read_proof(write_proof("a", "x", self_score))
    assert generator_reward(proof, score, meta).value == pytest.approx(wanted)


def test_a_malformed_reply_earns_nothing_and_says_why():
    for found in (verifier_reward(Malformed.NO_SCORE, 1.0), generator_reward(Malformed.NO_SCORE, 1.0, 1.0)):
        assert (found.value, found.problem, found.terms) == (0.0, "no_score", {"format": 0.0})


def test_weights_sum_to_one():
    proof = read_proof(write_proof("a", "x", 0))
    assert generator_reward(proof, 1, 1, ProofWeights(0.5, 0.5)).value == 0.5
    with pytest.raises(FieldErrors):
        ProofWeights(0.76, 0.3)


@pytest.mark.parametrize(
    ("findings", "options", "quality"),
    [
        ([], {}, 1), ([True], {}, 1), ([True, True], {}, 1), ([False], {}, 0), ([False, False], {}, 0), ([True, False], {}, 0.5),
        ([True], {"is_clear": False}, 0.5), ([True], {"score_follows": False}, 0.5), ([], {"score_follows": False}, 0.5),
        ([False], {"score_follows": False}, 0), ([True, False], {"is_clear": False}, 0.5),
    ],
)  # fmt: skip
def test_the_meta_verifiers_rules_by_hand(findings, options, quality):
    assert evaluation_quality(findings, **options) == quality


# --- planted verifiers


def proofs(count: int, seed: int = 0) -> list[tuple[str, str, float]]:
    """(problem, solution, true score), a third of each score."""
    rng, found = random.Random(seed), []
    kinds = itertools.cycle([None, Flaw.RULE, Flaw.FALSE, None, Flaw.GAP, Flaw.END])
    kind = next(kinds)
    while len(found) < count:
        derivation = derive(rng, rng.randrange(2, 5), rng.randrange(2, 5))
        solution = derivation and (plant(derivation, kind, rng) if kind else derivation.solution)
        if derivation and solution:
            found.append((derivation.problem, solution, score_of(check(derivation.problem, solution))))
            kind = next(kinds)
    return found


def mean_reward(program, made, meta=exact_meta_verifier) -> float:
    judges = Judges(meta_verifier=ProofProgram(meta) if meta else None)

    async def one(problem, solution, score):
        task = proof_task(Role.VERIFY, {"problem": problem, "solution": solution, "score": score})
        text = program(asked_parts(task.messages), random.Random(0))
        return (await judged(task, text, judges)).value

    async def every():
        return await asyncio.gather(*(one(*each) for each in made))

    values = asyncio.run(every())
    return sum(values) / len(values)


def test_planted_verifiers_earn_less_than_an_honest_one_and_the_meta_verifier_exposes_the_one_that_invents_flaws():
    made = proofs(60)
    assert mean_reward(exact_verifier, made) == 1
    assert mean_reward(always_one, made) == pytest.approx(0.5), "0, 0.5 and 1 by thirds: R_score exposes praise"
    assert mean_reward(always_zero, made, meta=None) == pytest.approx(0.5)
    assert mean_reward(always_zero, made) == 0, "its flaws are invented"
    bad = [each for each in made if each[2] == 0]
    assert mean_reward(always_zero, bad, meta=None) == 1, "on flawed proofs R_score alone can't tell it from an honest one"
    assert mean_reward(always_zero, bad) == 0 < mean_reward(exact_verifier, bad) == 1


def test_the_meta_verifier_judges_named_flaws_and_their_score_and_no_praise():
    meta = ProofProgram(exact_meta_verifier)
    task = proof_task(Role.VERIFY, {"problem": "(a+0)*b = b*a", "solution": "(a+0)*b\n= b*a [comm]", "score": 0.5})
    cases = {
        "Line 2: gap": (0.5, 1), "Line 2: gap\nLine 2: false": (0, 0.5), "Line 2: rule": (0.5, 0),
        "All is well.": (1, 1), "Line 2: gap ": (1, 0.5),
    }  # fmt: skip
    for analysis, (score, quality) in cases.items():
        found = asyncio.run(judged(task, write_evaluation(analysis.strip(), score), Judges(meta_verifier=meta)))
        assert found.terms["meta"] == quality, analysis


def test_an_author_who_hides_a_flaw_earns_less_than_one_who_admits_it():
    judges = Judges(ProofProgram(exact_verifier), ProofProgram(exact_meta_verifier))
    task = proof_task(Role.PROVE, {"problem": "(a+0)*b = b*a"})
    gap, full = "(a+0)*b\n= b*a [comm]", "(a+0)*b\n= a*b [zero]\n= b*a [comm]"

    def earned(solution, analysis, score):
        return asyncio.run(judged(task, write_proof(solution, analysis, score), judges)).value

    assert earned(full, "No flaw.", 1) == 1
    assert earned(gap, "Line 2: gap", 0.5) == pytest.approx(0.76 * 0.5 + 0.24)
    assert earned(gap, "No flaw.", 1) == pytest.approx(0.76 * 0.5 + 0.12)
    assert earned(gap, "Line 1: start", 0) == pytest.approx(0.76 * 0.5), "invented flaws earn no honesty"


# --- judges that fail


class Says:
    def __init__(self, *replies):
        self.replies, self.asked = list(replies), 0

    async def reply(self, messages, tools, params):
        self.asked += 1
        said = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if said is None:
            return ChatReply({"role": "assistant", "content": "", "failure": "status 503"}, StopReason.UNAVAILABLE)
        return ChatReply({"role": "assistant", "content": said}, StopReason.STOP)


def test_a_judge_is_asked_again_and_one_that_never_keeps_the_form_leaves_no_reward():
    good = write_evaluation("x", 0.5)
    policy = Says("gibberish", None, good)
    assert asyncio.run(ask_verifier(policy, "p", "s", PARAMS, tries=3)).score == 0.5 and policy.asked == 3
    found = asyncio.run(ask_verifier(Says("gibberish"), "p", "s", PARAMS, tries=2))
    assert found == Unjudged("verify: no_analysis")
    assert asyncio.run(ask_verifier(Says(None), "p", "s", PARAMS)) == Unjudged("verify: status 503")


def test_an_attempt_whose_judge_fails_is_invalid_and_never_zero():
    task = proof_task(Role.PROVE, {"problem": "a = a"})
    own = write_proof("a", "No flaw.", 1)
    for judges in (
        Judges(),
        Judges(Says("no"), ProofProgram(exact_meta_verifier)),
        Judges(ProofProgram(exact_verifier), Says(None)),
    ):
        verdict = asyncio.run(JudgedProof(task, judges).finish(own))
        assert not verdict.is_valid and verdict.score is None
    assert asyncio.run(JudgedProof(task, Judges()).finish("no form")).score == 0, "but the form needs no judge"


def test_a_judged_episode_is_played_and_its_verdict_is_the_domains_outcome():
    task = proof_task(Role.PROVE, {"problem": "a+0 = a"})
    judges = Judges(ProofProgram(exact_verifier), ProofProgram(exact_meta_verifier))
    made = write_proof("a+0\n= a [one]", "No flaw.", 1)
    played = asyncio.run(play(JudgedProof(task, judges), speaker_of(Says(made)), AgentConfig(), PARAMS))
    found = reward(played, DomainReward(outcome=1.0, format=0.0, length=0.0, language=0.0))
    assert found.value == pytest.approx(0.76 * 0.5 + 0.24 * 0.5)
    assert played.verdict.measures == {"format": 1.0, "proof": 0.5, "self_evaluation": 0.5, "meta": 1.0}


# --- automatic labels


def slow_label(analyses, checks, needed):
    """The paper's paragraph once more, with counts in place of code."""
    by_score = {0.0: [0, 0], 0.5: [0, 0], 1.0: [0, 0]}  # score -> [analyses, valid ones]
    for score, confirmed in analyses:
        by_score[score][0] += 1
        if score != 1.0 and confirmed > checks - confirmed:
            by_score[score][1] += 1
    if by_score[0.0][0]:
        if by_score[0.0][1] >= needed:
            return 0.0
    elif by_score[0.5][0] and by_score[0.5][1] >= needed:
        return 0.5
    return 1.0 if by_score[0.0][1] + by_score[0.5][1] == 0 else "discard"


CHECKS = 3
STATES = [(1.0, 0)] + [(score, confirmed) for score in (0.0, 0.5) for confirmed in range(CHECKS + 1)]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_decision_equals_the_slow_restatement(count):
    for analyses in itertools.product(STATES, repeat=count):
        checked = [
            Checked(score, () if score == 1 else tuple(i < confirmed for i in range(CHECKS))) for score, confirmed in analyses
        ]
        for needed in range(1, count + 1):
            found = decide(checked, needed)
            assert ("discard" if found.score is None else found.score) == slow_label(analyses, CHECKS, needed), analyses


class ScriptedPanel:
    """Verifier and meta-verifier at once: analysis i scores as the plan says, and the first `confirmed` of its checks agree."""

    def __init__(self, plan):
        self.plan, self.verified, self.checked = plan, 0, [0] * len(plan)

    async def reply(self, messages, tools, params):
        text = messages[-1]["content"]
        if "Evaluation:\n" in text:
            number = int(text.rpartition("analysis ")[2].split()[0])
            self.checked[number] += 1
            quality = 1 if self.checked[number] <= self.plan[number][1] else 0.5
            said = f"{META_EVALUATION} so so {META_SCORE} \\boxed{{{quality}}}"
        else:
            number, self.verified = self.verified, self.verified + 1
            said = f"{EVALUATION} analysis {number} here {EVALUATION_SCORE} \\boxed{{{self.plan[number][0]}}}"
        return ChatReply({"role": "assistant", "content": said}, StopReason.STOP)


@pytest.mark.parametrize("needed", [1, 2, 3])
def test_labels_from_scripted_verifiers_reproduce_the_decision_table(needed):
    for plan in itertools.product(STATES, repeat=3):
        panel = ScriptedPanel(plan)
        config = LabelConfig(analyses=3, checks=CHECKS, needed=needed)
        found = asyncio.run(label("p", "s", panel, panel, config, PARAMS))
        assert ("discard" if found.score is None else found.score) == slow_label(plan, CHECKS, needed), plan
        assert panel.checked == [0 if score == 1 else CHECKS for score, _ in plan], "only analyses that find fault are checked"


def test_a_missing_analysis_or_check_leaves_a_proof_without_a_label():
    config = LabelConfig(analyses=2, checks=1, needed=1, tries=1)
    fault = write_evaluation("Line 1: false", 0)
    for verifier, meta in ((Says(None), Says(None)), (Says(fault), Says("no form")), (Says(fault, "no form"), Says(None))):
        found = asyncio.run(label("p", "s", verifier, meta, config, PARAMS))
        assert found.score is None and found.ground is Ground.INCOMPLETE and found.detail


def test_a_noisy_panel_labels_as_the_checker_does_and_one_that_invents_is_overruled():
    config = LabelConfig(analyses=6, checks=3, needed=2)
    noisy, cheat = ProofProgram(flawed(exact_verifier, 0.3, always_zero)), ProofProgram(always_zero)
    meta = ProofProgram(exact_meta_verifier)
    right = wrong = 0
    for number, (problem, solution, score) in enumerate(proofs(30, seed=2)):
        found = asyncio.run(label(problem, solution, noisy, meta, config, PARAMS, str(number)))
        right, wrong = right + (found.score == score), wrong + (found.score not in (score, None))
        assert asyncio.run(label(problem, solution, cheat, meta, config, PARAMS)).ground is Ground.NO_VALID_ISSUE
    assert wrong == 0 and right >= 10


def test_label_settings_out_of_range_are_named():
    with pytest.raises(FieldErrors, match="checks"):
        LabelConfig(checks=4)
    with pytest.raises(FieldErrors, match="needed"):
        LabelConfig(analyses=2, needed=3)
    assert DERIVATION == "derivation"
