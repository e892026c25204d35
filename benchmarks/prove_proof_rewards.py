"""Planted verifiers are exposed: one that always says 1 and one that always says 0 earn less than an honest one, and how.

On proofs of the formal system, at every mixture of true scores, the reward of the verifier R_format * R_score * R_meta is 1
for the honest one alone. R_score exposes the one that praises, by the mean of 1 - s. It does not expose the one that damns
where proofs are mostly flawed: there R_score alone gives it up to 1. The meta-verifier's R_meta does, for its flaws are
invented: 0 everywhere. The verifier that praises has R_meta = 1 by the rules (praise is not judged), so R_meta without R_score
would not expose it: both factors are needed. Automatic labels from panels of noisy verifiers are wrong only where all analyses
miss, and the refinement pool finds proofs that no first sample is.
"""

from __future__ import annotations

import asyncio
import random
from statistics import fmean

from rorqual.policy import ChatReply, SamplingParams, StopReason
from rorqual.rewards.labelling import LabelConfig, label
from rorqual.rewards.proof_judges import Judges, judged
from rorqual.rewards.proof_programs import (
    ProofProgram,
    Reply,
    always_one,
    always_zero,
    exact_meta_verifier,
    exact_verifier,
    flawed,
)
from rorqual.rewards.proofs import ProofReward
from rorqual.rollout.refinement import RefineConfig, SearchEnd, refine
from rorqual.tasks.derivations import Derivation, Flaw, check, derive, plant, read_findings, score_of
from rorqual.tasks.proof_tasks import Role, proof_task
from rorqual.tasks.proofs import asked_parts, write_proof

SECONDS = 60
QUICK_SECONDS = 15
FLAWS = {1.0: (None,), 0.5: (Flaw.RULE, Flaw.GAP), 0.0: (Flaw.FALSE, Flaw.END, Flaw.LEAP)}
VERIFIERS: dict[str, Reply] = {"honest": exact_verifier, "always_one": always_one, "always_zero": always_zero}
MIXTURES = {"even": (1, 1, 1), "mostly right": (8, 1, 1), "mostly flawed": (1, 1, 8), "all flawed": (0, 0, 1)}
META = ProofProgram(exact_meta_verifier)
Sample = tuple[str, str, float]
"""(problem, solution, true score)."""


def samples(count: int, seed: int) -> dict[float, list[Sample]]:
    """`count` solutions of each score."""
    rng, found = random.Random(seed), dict[float, list[Sample]]()
    for score, flaws in FLAWS.items():
        mine: list[Sample] = []
        while len(mine) < count:
            derivation, flaw = derive(rng, rng.randrange(2, 6), rng.randrange(2, 6)), rng.choice(flaws)
            solution = derivation and (plant(derivation, flaw, rng) if flaw else derivation.solution)
            if derivation and solution:
                assert score_of(check(derivation.problem, solution)) == score
                mine.append((derivation.problem, solution, score))
        found[score] = mine
    return found


async def rewarded(verifier: Reply, made: list[Sample], judges: Judges) -> list[ProofReward]:
    found = []
    for problem, solution, score in made:
        task = proof_task(Role.VERIFY, {"problem": problem, "solution": solution, "score": score})
        each = await judged(task, verifier(asked_parts(task.messages), random.Random(0)), judges)
        assert isinstance(each, ProofReward)
        found.append(each)
    return found


async def by_verifier(made: dict[float, list[Sample]]) -> dict[str, dict[float, dict[str, float]]]:
    """verifier -> true score -> its mean reward and factors there."""
    found: dict[str, dict[float, dict[str, float]]] = {}
    for name, verifier in VERIFIERS.items():
        found[name] = {}
        for score, group in made.items():
            rewards = await rewarded(verifier, group, Judges(meta_verifier=META))
            terms = {term: fmean(each.terms[term] for each in rewards) for term in ("score", "meta")}
            found[name][score] = {"reward": fmean(each.value for each in rewards), **terms}
    return found


def mixed(by_score: dict[float, dict[str, float]], shares: tuple[int, ...], term: str) -> float:
    return sum(share * by_score[score][term] for share, score in zip(shares, FLAWS, strict=True)) / sum(shares)


def exposed(found: dict[str, dict[float, dict[str, float]]]) -> dict[str, dict]:
    """Every mixture's rewards; asserts that the honest verifier alone has 1 and what exposes each planted one."""
    figures: dict[str, dict] = {}
    for mixture, shares in MIXTURES.items():
        row = {
            name: {term: round(mixed(by_score, shares, term), 4) for term in ("reward", "score", "meta")}
            for name, by_score in found.items()
        }
        true_mean = sum(share * score for share, score in zip(shares, FLAWS, strict=True)) / sum(shares)
        assert row["honest"]["reward"] == 1.0
        assert abs(row["always_one"]["reward"] - true_mean) < 1e-4, "R_score takes 1 - s from praise"
        assert abs(row["always_zero"]["score"] - (1 - true_mean)) < 1e-4 and row["always_zero"]["reward"] == 0
        assert row["always_zero"]["meta"] == 0 and row["always_one"]["meta"] == 1
        figures[mixture] = row
    return figures


async def labelled(made: list[Sample], noise: float) -> dict[str, int]:
    """What becomes of proofs whose verifiers answer with an invented flaw for a share of the analyses."""
    config, params = LabelConfig(analyses=6, checks=3, needed=2), SamplingParams(seed=7)
    policy = ProofProgram(flawed(exact_verifier, noise, always_zero))
    counts = {"right": 0, "wrong": 0, "discarded": 0}
    for number, (problem, solution, score) in enumerate(made):
        given = await label(problem, solution, policy, META, config, params, str(number))
        counts["discarded" if given.score is None else "right" if given.score == score else "wrong"] += 1
    return counts


class Slipping:
    """A prover that writes some wrong rules, and mends one named line of a proof that it is shown."""

    def __init__(self, derivation: Derivation, slips: int):
        self.right, self.slips = derivation.solution.splitlines(), slips

    async def reply(self, messages, tools, params) -> ChatReply:
        parts, noise = asked_parts(messages), random.Random(params.seed)
        if "solution" in parts:
            lines = parts["solution"].splitlines()
            places = [finding.line - 1 for finding in read_findings(parts["evaluations"])][:1]
            wanted = {place: self.right[place] for place in places}
        else:
            lines, places = list(self.right), noise.sample(range(1, len(self.right)), self.slips)
            wanted = {place: lines[place].split("[")[0] + "[null]" for place in places}
        lines = [wanted.get(place, line) for place, line in enumerate(lines)]
        text = write_proof("\n".join(lines), "No flaw.", 1)
        return ChatReply({"role": "assistant", "content": text}, StopReason.STOP)


async def searched(count: int) -> dict[str, float]:
    """Problems whose proof a first sample is, and the pool finds, each with the same verifier."""
    rng, first, pool, rounds = random.Random(3), 0, 0, []
    config = RefineConfig(pool=8, verifications=3, best=4, prompts_per_proof=2, rounds=16, words="brief")
    done = 0
    while done < count:
        derivation = derive(rng, 5, 4)
        if derivation is None:
            continue
        done += 1
        found = await refine(derivation.problem, Slipping(derivation, 3), ProofProgram(exact_verifier), config)
        first += found.best_by_round[0] == 1
        pool += found.end is SearchEnd.PASSED
        rounds.append(found.rounds)
    return {"problems": count, "proved by a first sample": first, "proved by the pool": pool, "mean_rounds": fmean(rounds)}


def main(quick: bool) -> dict:
    made = samples(20 if quick else 200, seed=1)
    figures: dict = {"verifiers": exposed(asyncio.run(by_verifier(made)))}
    some = [sample for group in made.values() for sample in group[: 10 if quick else 60]]
    figures["labels"] = {f"noise {noise}": asyncio.run(labelled(some, noise)) for noise in (0.0, 0.3, 0.6)}
    assert figures["labels"]["noise 0.3"]["wrong"] == 0 and figures["labels"]["noise 0.6"]["wrong"] <= 0.1 * len(some)
    assert figures["labels"]["noise 0.0"] == {"right": len(some), "wrong": 0, "discarded": 0}
    figures["search"] = asyncio.run(searched(5 if quick else 40))
    assert figures["search"]["proved by the pool"] > figures["search"]["proved by a first sample"]
    return {"samples_of_each_score": len(made[1.0]), **figures}
