"""Proofs as text, in the DeepSeekMath-V2 form: what a prover, a verifier and a meta-verifier are asked, and how each is read.

    prover         "## Solution", a proof, "## Self Evaluation", an evaluation of it by the same rubric
    verifier       "Here is my evaluation of the solution:", an analysis, "Based on my evaluation, the final overall score
                   should be:", \\boxed{0, 0.5 or 1}
    meta-verifier  judges an evaluation: "Here is my analysis of the evaluation:", an analysis, "Based on my analysis, I rate
                   the evaluation as:", \\boxed{0, 0.5 or 1}

The verifier's two phrases and the prover's two headings are the published ones; the meta-verifier's phrases and the wording of
all prompts are ours. A text that breaks the form is read as a `Malformed`, which says how; R_format is 0 exactly there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

SCORES = (0.0, 0.5, 1.0)
"""1: complete and rigorous; 0.5: sound, with minor errors or omissions; 0: fatally flawed."""

SOLUTION, SELF_EVALUATION = "## Solution", "## Self Evaluation"
EVALUATION = "Here is my evaluation of the solution:"
EVALUATION_SCORE = "Based on my evaluation, the final overall score should be:"
META_EVALUATION = "Here is my analysis of the evaluation:"
META_SCORE = "Based on my analysis, I rate the evaluation as:"


class Malformed(StrEnum):
    """How a text breaks the form."""

    EMPTY = "empty"
    NO_SOLUTION = "no_solution"  # the heading is missing, or nothing stands below it
    NO_SELF_EVALUATION = "no_self_evaluation"  # the heading is missing, or comes before the solution
    NO_ANALYSIS = "no_analysis"  # the phrase that opens the analysis is missing
    NO_VERDICT = "no_verdict"  # the phrase before the score is missing, or comes before the analysis
    NO_SCORE = "no_score"  # no \boxed{} after it
    BAD_SCORE = "bad_score"  # a boxed text that is not 0, 0.5 or 1
    TWO_SCORES = "two_scores"  # boxed scores that differ


@dataclass(frozen=True)
class Evaluation:
    """An analysis and the score it comes to: a verifier's of a proof, or a meta-verifier's of an evaluation."""

    analysis: str
    score: float
    text: str
    """The whole of it, as another prompt quotes it."""


@dataclass(frozen=True)
class Proof:
    """A solution and its author's own evaluation of it."""

    solution: str
    self_evaluation: Evaluation
    text: str

    @property
    def self_score(self) -> float:
        return self.self_evaluation.score


# --- reading

_BOXED = re.compile(r"\\boxed\s*\{([^{}]*)\}")
_DECIMAL = re.compile(r"\d*\.?\d+|\d+\.")


def read_evaluation(text: str | None) -> Evaluation | Malformed:
    """A verifier's reply."""
    return _read(text, EVALUATION, EVALUATION_SCORE)


def read_meta_evaluation(text: str | None) -> Evaluation | Malformed:
    """A meta-verifier's reply; its score is the quality of the evaluation that it judges."""
    return _read(text, META_EVALUATION, META_SCORE)


def read_proof(text: str | None) -> Proof | Malformed:
    """A prover's reply. What stands before the first heading is no part of the proof."""
    if not text or not text.strip():
        return Malformed.EMPTY
    start = _heading(text, SOLUTION)
    if start is None:
        return Malformed.NO_SOLUTION
    end = _heading(text, SELF_EVALUATION)
    if end is None or end < start:
        return Malformed.NO_SELF_EVALUATION
    solution = text[start + len(SOLUTION) : end].strip()
    if not solution:
        return Malformed.NO_SOLUTION
    evaluation = read_evaluation(text[end + len(SELF_EVALUATION) :])
    return evaluation if isinstance(evaluation, Malformed) else Proof(solution, evaluation, text[start:].strip())


def _heading(text: str, heading: str) -> int | None:
    """Where the last line that is this heading begins: a proof may quote one, but only its own comes last."""
    found = list(re.finditer(rf"^{re.escape(heading)}[ \t:]*$", text, re.MULTILINE))
    return found[-1].start() if found else None


def _read(text: str | None, opening: str, closing: str) -> Evaluation | Malformed:
    if not text or not text.strip():
        return Malformed.EMPTY
    start = text.find(opening)
    if start < 0:
        return Malformed.NO_ANALYSIS
    end = text.rfind(closing)
    if end < start:
        return Malformed.NO_VERDICT
    score = _score(text[end + len(closing) :])
    if isinstance(score, Malformed):
        return score
    return Evaluation(text[start + len(opening) : end].strip(), score, text[start:].strip())


def _score(text: str) -> float | Malformed:
    boxed = [found.strip().strip("$").strip() for found in _BOXED.findall(text)]
    if not boxed:
        return Malformed.NO_SCORE
    values = {float(found) if _DECIMAL.fullmatch(found) else -1.0 for found in boxed}
    if not values <= set(SCORES):
        return Malformed.BAD_SCORE
    return values.pop() if len(values) == 1 else Malformed.TWO_SCORES


# --- writing

RUBRIC = """- 1: the proof is complete and rigorous; every step is stated and justified.
- 0.5: the proof is sound as a whole, but has minor errors or leaves details out.
- 0: the proof does not solve the problem, has a fatal error, or has a severe gap."""


def score_text(score: float) -> str:
    """0, 0.5 or 1, as it stands in the box."""
    return f"{score:g}"


def write_evaluation(analysis: str, score: float) -> str:
    """An evaluation in the form that `read_evaluation` reads."""
    return f"{EVALUATION}\n{analysis}\n{EVALUATION_SCORE} \\boxed{{{score_text(score)}}}"


def write_meta_evaluation(analysis: str, score: float) -> str:
    return f"{META_EVALUATION}\n{analysis}\n{META_SCORE} \\boxed{{{score_text(score)}}}"


def write_proof(solution: str, analysis: str, score: float) -> str:
    return f"{SOLUTION}\n{solution}\n\n{SELF_EVALUATION}\n{write_evaluation(analysis, score)}"


Messages = tuple[dict[str, Any], ...]
Words = Literal["full", "brief"]
"""How roles are asked: in full, or by the role's name alone (for a model that was trained to know what it means)."""

_PROVE = f"""Prove what is asked, completely and rigorously. Your reply has two parts, under these two headings:

{SOLUTION}
the proof

{SELF_EVALUATION}
{EVALUATION}
go through your own proof and name every flaw that is left in it
{EVALUATION_SCORE} \\boxed{{the score}}

The score is one of:
{RUBRIC}

Another reader will score the proof by the same scale, and will check that your evaluation is honest: a flaw that you admit costs
less than one that you hide. Mend every flaw that you can before you reply."""

_VERIFY = f"""Evaluate this solution. Go through it step by step, and name every error and every gap, with the step it stands in.
Scores:
{RUBRIC}

Your reply has this form:
{EVALUATION}
the analysis
{EVALUATION_SCORE} \\boxed{{the score}}"""

_META = f"""Another reader evaluated this solution. Judge the evaluation, not the solution: does each flaw that it names exist in
the solution, and do the named flaws justify the score? What it praises is not judged, even where a praised step is wrong.
Scores:
- 1: every named flaw exists (or none is named), the score follows from them, and all is clearly said.
- 0.5: some named flaws exist and some do not; or all exist, but the score does not follow from them or they are ill expressed.
- 0: none of the named flaws exists.

Your reply has this form:
{META_EVALUATION}
the analysis
{META_SCORE} \\boxed{{the score}}"""

_REFINE = """Write a better solution than the one below, of which evaluations follow; they may err. Mend the flaws that are
real, keep what is right, or begin anew. Keep to the two headings."""

_ASKED = {
    "full": {"prove": _PROVE, "verify": _VERIFY, "meta": _META, "refine": f"{_PROVE}\n\n{_REFINE}"},
    "brief": {"prove": "Prove.", "verify": "Evaluate.", "meta": "Judge the evaluation.", "refine": "Prove better."},
}


_PART = re.compile(r"^(?=(?:Problem|Solution|Evaluations?):$)", re.MULTILINE)
"""Where a part's own text spells a part's heading: it is moved in by a space, so that no solution can forge another problem."""


def _ask(role: str, words: Words, **parts: str) -> Messages:
    shown = [f"{name.capitalize()}:\n{_PART.sub(' ', text)}" for name, text in parts.items()]
    return ({"role": "user", "content": "\n\n".join([_ASKED[words][role], *shown])},)


def prover_messages(problem: str, words: Words = "full") -> Messages:
    """What a prover is asked."""
    return _ask("prove", words, problem=problem)


def verifier_messages(problem: str, solution: str, words: Words = "full") -> Messages:
    """What a verifier is asked. Its author's self-evaluation is not shown."""
    return _ask("verify", words, problem=problem, solution=solution)


def meta_messages(problem: str, solution: str, evaluation: str, words: Words = "full") -> Messages:
    """What a meta-verifier is asked of a verifier's evaluation."""
    return _ask("meta", words, problem=problem, solution=solution, evaluation=evaluation)


def refine_messages(problem: str, solution: str, evaluations: Sequence[str], words: Words = "full") -> Messages:
    """What a prover is asked to make of an earlier solution and what was said of it."""
    return _ask("refine", words, problem=problem, solution=solution, evaluations="\n\n".join(evaluations))


_ASKED_PART = re.compile(r"^(Problem|Solution|Evaluations?):\n", re.MULTILINE)


def asked_parts(messages: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What a program needs of a prompt made here: problem, solution, evaluation or evaluations, by name."""
    text = str(messages[-1]["content"])
    found = list(_ASKED_PART.finditer(text))
    ends = [*(part.start() for part in found[1:]), len(text)]
    return {part[1].lower(): text[part.end() : end].strip() for part, end in zip(found, ends, strict=True)}
