"""Labels for proofs without annotators (DeepSeekMath-V2): n analyses, m meta-checks of each that finds fault, a majority.

    lowest score < 1, at least k of the analyses with it valid     -> that score
    no analysis below 1 is valid                                   -> 1
    else                                                           -> none: discard, or ask a person

An analysis is valid where more than half of its meta-checks confirm it. The paper says which analyses count (those with the
lowest score of all n), not what becomes of a reply that never came: here a label is then refused, by name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from rorqual.errors import require
from rorqual.policy import ChatPolicy, SamplingParams
from rorqual.rewards.proof_judges import Unjudged, ask_meta_verifier, ask_verifier
from rorqual.tasks.proofs import Evaluation, Words


@dataclass(frozen=True)
class LabelConfig:
    """The paper publishes none of these numbers."""

    analyses: int = 8
    """n: analyses of each proof."""
    checks: int = 5
    """m: meta-checks of each analysis with a score below 1; odd, so that there is a majority."""
    needed: int = 2
    """k: valid analyses with the lowest score that make it the label."""
    confirmed_at: float = 1.0
    """The quality from which a meta-check confirms; at 0.5 one does whose flaws exist in part."""
    tries: int = 3
    """Times that a malformed reply is asked for."""
    words: Words = "full"

    def __post_init__(self) -> None:
        require(
            self,
            analyses=(self.analyses >= 1, "at least 1"),
            checks=(self.checks >= 1 and self.checks % 2 == 1, "odd, at least 1"),
            needed=(1 <= self.needed <= self.analyses, "from 1 to analyses"),
            confirmed_at=(self.confirmed_at in (0.5, 1.0), "0.5 or 1"),
            tries=(self.tries >= 1, "at least 1"),
        )


class Ground(StrEnum):
    """Why a proof has its label, or none."""

    CONFIRMED = "confirmed"  # enough valid analyses give the lowest score
    NO_VALID_ISSUE = "no_valid_issue"
    DISPUTED = "disputed"  # valid issues, but too few of them at the lowest score
    INCOMPLETE = "incomplete"  # an analysis or a meta-check could not be had


@dataclass(frozen=True)
class Checked:
    """An analysis's score, and of each meta-check whether it confirms; none where the score is 1."""

    score: float
    confirmations: tuple[bool, ...] = ()

    @property
    def is_valid(self) -> bool:
        """It names flaws, and most checks confirm them."""
        return self.score < 1 and 2 * sum(self.confirmations) > len(self.confirmations)


@dataclass(frozen=True)
class Label:
    """score: 0, 0.5 or 1; None: discard the proof, or ask a person."""

    score: float | None
    ground: Ground
    analyses: tuple[Checked, ...] = ()
    detail: str = ""


def decide(analyses: Sequence[Checked], needed: int) -> Label:
    """The decision table, over at least one analysis."""
    lowest = min(each.score for each in analyses)
    valid = [each.score for each in analyses if each.is_valid]
    if lowest < 1 and valid.count(lowest) >= needed:
        return Label(lowest, Ground.CONFIRMED, tuple(analyses))
    if not valid:
        return Label(1.0, Ground.NO_VALID_ISSUE, tuple(analyses))
    return Label(None, Ground.DISPUTED, tuple(analyses))


async def label(
    problem: str, solution: str, verifier: ChatPolicy, meta_verifier: ChatPolicy, config: LabelConfig, params: SamplingParams,
    name: str = "",
) -> Label:  # fmt: skip
    """Label one proof. name: of the proof; with the seed of `params` it gives every reply a seed of its own."""

    async def checked(number: int) -> Checked | Unjudged:
        found = await ask_verifier(verifier, problem, solution, params, f"{name}/{number}", config.tries, config.words)
        if isinstance(found, Unjudged) or found.score == 1:
            return found if isinstance(found, Unjudged) else Checked(found.score)
        checks = [_check(found, number, check) for check in range(config.checks)]
        confirmations = await asyncio.gather(*checks)
        missing = next((each for each in confirmations if isinstance(each, Unjudged)), None)
        return missing or Checked(found.score, tuple(bool(each) for each in confirmations))

    async def _check(found: Evaluation, number: int, check: int) -> bool | Unjudged:
        judged = await ask_meta_verifier(
            meta_verifier, problem, solution, found.text, params, f"{name}/{number}/{check}", config.tries, config.words
        )
        return judged if isinstance(judged, Unjudged) else judged.score >= config.confirmed_at

    analyses = await asyncio.gather(*(checked(number) for number in range(config.analyses)))
    missing = next((each for each in analyses if isinstance(each, Unjudged)), None)
    if missing is not None:
        return Label(None, Ground.INCOMPLETE, tuple(a for a in analyses if isinstance(a, Checked)), missing.reason)
    return decide([each for each in analyses if isinstance(each, Checked)], config.needed)
